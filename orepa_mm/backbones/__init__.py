"""OREPA backbones, registered for each OpenMMLab package that is installed."""

from importlib.util import find_spec

from .mixin import OREPABackboneMixin

__all__ = ['OREPABackboneMixin']

if find_spec('mmdet') is not None:
    from .det import OREPAResNet, OREPAResNeXt

    __all__ += ['OREPAResNeXt', 'OREPAResNet']
