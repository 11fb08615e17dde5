"""The backbones of every installed package, registered when its scope is first used.

Importing a toolbox takes seconds. MMEngine's registries know `locations`, modules that
are imported at their first look-up: ours become locations of the toolboxes' registries.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib import import_module, metadata
from importlib.util import find_spec
from typing import Any

from mmengine.config.utils import MODULE2PACKAGE
from mmengine.registry import MODELS, Registry

_FORKS = {'mmdet': 'onedl-mmdetection', 'mmseg': 'onedl-mmsegmentation',
          'mmpretrain': 'onedl-mmpretrain'}


def know_forks() -> None:
    """Tell MMEngine what the maintained forks are called, where its own is installed.

    It finds `_base_ = 'mmseg::...'` by the name of the distribution, and knows
    those of the official packages only. A second call changes nothing.
    """
    try:
        metadata.version('onedl-mmengine')
    except metadata.PackageNotFoundError:
        return
    MODULE2PACKAGE.update(_FORKS)


know_forks()
#: Package: (what to install, our module for it, the backbones there).
PACKAGES = {
    'mmdet': (MODULE2PACKAGE['mmdet'], 'det', ('OREPAResNet', 'OREPAResNeXt', 'DBBResNet')),
    'mmseg': (MODULE2PACKAGE['mmseg'], 'seg', ('OREPAResNet', 'OREPAResNetV1c', 'OREPAResNeXt',
                                               'DBBResNet', 'DBBResNetV1c')),
    'mmpretrain': (MODULE2PACKAGE['mmpretrain'], 'cls', (
        'OREPAResNet', 'OREPAResNet_CIFAR', 'OREPAResNetV1c', 'OREPAResNeXt', 'DBBResNet',
        'DBBResNet_CIFAR', 'OREPARepVGG')),
}
#: The backbone that the configs of all packages find without a scope, and its home.
_EVERYWHERE = ('OREPARepVGG', 'mmpretrain')


def register_backbones() -> None:
    """Let the registry of each package find our backbones, without importing the package.

    Where a package is missing or broken, and where a name does not belong to
    the scope of a config, the name stands for an `ImportError` that says which
    package is needed.
    """
    for package, (_, _, names) in PACKAGES.items():
        if package in MODELS.children:
            add_location(MODELS.children[package])
        elif find_spec(package) is None:
            registry = Registry('model', parent=MODELS, scope=package, locations=[__name__])
            for name in names:
                registry.register_module(name=name, module=_failing(
                    lambda name=name, package=package:
                    f'{package}.{name} cannot be built: {_problem_of(package)}'))
    for name in sorted({name for _, _, names in PACKAGES.values() for name in names}):
        elsewhere = _failing(functools.partial(_explain_scope, name))
        MODELS.register_module(name=name, module=_at_home(elsewhere) if name == _EVERYWHERE[0]
                               else elsewhere)


def resolved(found: Any) -> Any:
    """The class that a registry's answer stands for.

    Args:
        found: What `Registry.get` returned; a name that is known in every
            scope stands for a class that is imported only now.

    Raises:
        ImportError: If the package that it belongs to is missing.
    """
    return found.home_class() if hasattr(found, 'home_class') else found


def scope_of(backbone: type) -> str:
    """The scope in which one of our backbones is registered, and its stock class as well.

    Args:
        backbone: The class.
    """
    module = backbone.__module__.rpartition('.')[2]
    return next(package for package, (_, ours, _) in PACKAGES.items() if ours == module)


def add_location(registry: Registry) -> None:
    """Let a toolbox's registry find our backbones, without importing the toolbox.

    Args:
        registry: Of MMEngine; of another scope it is left as it is.
    """
    if registry.scope not in PACKAGES:
        return
    location = f'{__package__}.{PACKAGES[registry.scope][1]}'
    if registry._imported:  # too late for a location: the toolbox is loaded
        import_module(location)
    elif location not in registry._locations:
        registry._locations = [*registry._locations, location]


def _at_home(otherwise: Callable[..., Any]) -> Callable[..., Any]:
    """What builds `_EVERYWHERE` from any scope."""
    name, package = _EVERYWHERE

    def home_class() -> type:
        if find_spec(package) is None:
            otherwise()
        return getattr(import_module(f'{__package__}.{PACKAGES[package][1]}'), name)

    def build(*args: Any, **kwargs: Any) -> Any:
        return home_class()(*args, **kwargs)

    build.home_class = home_class
    return build


def _problem_of(package: str) -> str:
    """Why a package's backbones do not load; empty if they do."""
    distribution, module, _ = PACKAGES[package]
    if find_spec(package) is None:
        return f'{package} is not installed (pip install {distribution})'
    try:
        import_module(f'{__package__}.{module}')
    except Exception as error:  # whatever a broken installation raises
        return (f'{package} does not load ({type(error).__name__}: {error}); '
                '`python -m orepa_mm.doctor` says what to do')
    return ''


def _explain_scope(name: str) -> str:
    homes = [package for package, (_, _, names) in PACKAGES.items() if name in names]
    problems = {package: _problem_of(package) for package in homes}
    loaded = [package for package in homes if not problems[package]]
    text = f'{name} was not found in the scope of this config: it belongs to {", ".join(homes)}.'
    if loaded:
        text += f" Write type='{loaded[0]}.{name}', or set default_scope = '{loaded[0]}'."
    return ' '.join([text, *(f'{problem}.' for problem in problems.values() if problem)])


def _failing(explain: Callable[[], str]) -> Callable[..., None]:
    def fail(*args: object, **kwargs: object) -> None:
        raise ImportError(explain())

    return fail
