"""OREPA (Online Convolutional Re-parameterization, CVPR 2022) for OpenMMLab.

Where MMEngine is installed, importing the package registers its conv layer
types, backbones, optimizer constructor and hooks; it lets the runner's own
checkpoints pass PyTorch's safe loading, and MMEngine refuse a checkpoint of the
other form. No toolbox is loaded: the backbones join a toolbox's registry when that is
first used. A broken installation is named in a warning, so that
`python -m orepa_mm.doctor`, which says what to do, always starts. Without
MMEngine nothing is registered; `orepa_mm.layers` needs PyTorch alone.
"""

import importlib
import importlib.util
import warnings
from typing import Any

from .version import __version__

__all__ = ['__version__', 'expand', 'load', 'reparameterize', 'verify']

#: Public names, and the rooms that they are loaded from when they are first used.
_ROOMS = {'expand': 'reparam', 'load': 'workflow', 'reparameterize': 'reparam',
          'verify': 'reparam'}


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    value = getattr(importlib.import_module(f'{__name__}.{_ROOMS[name]}'), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_ROOMS})


def _register() -> None:
    failures = []
    for module in ('orepa_mm.openmmlab', 'orepa_mm.checkpoints', 'orepa_mm.backbones',
                   'orepa_mm.engine', 'orepa_mm.openmmlab.expanded'):
        try:
            importlib.import_module(module)
        except Exception as error:  # whatever a broken installation raises
            failures.append(f'{module} ({type(error).__name__}: {error})')
    if failures:
        warnings.warn(f'OREPA models cannot be built, because there could not be loaded: '
                      f'{"; ".join(failures)}. Run `python -m orepa_mm.doctor` to see what to do.',
                      stacklevel=3)


if importlib.util.find_spec('mmengine') is not None:
    _register()
