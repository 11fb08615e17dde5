"""Register the backbones of every installed package, and errors in place of the others."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec

from mmengine.registry import MODELS, Registry

#: Package: (what to install, our module for it, the backbones there).
PACKAGES = {
    'mmdet': ('mmdet', 'det', ('OREPAResNet', 'OREPAResNeXt', 'DBBResNet')),
    'mmseg': ('mmsegmentation', 'seg', ('OREPAResNet', 'OREPAResNetV1c', 'OREPAResNeXt',
                                        'DBBResNet', 'DBBResNetV1c')),
    'mmpretrain': ('mmpretrain', 'cls', ('OREPAResNet', 'OREPAResNetV1c', 'OREPAResNeXt',
                                         'DBBResNet', 'OREPARepVGG')),
}


def register_backbones() -> None:
    """Register the backbones of each package that is installed.

    Where a package is missing or broken, and where a name does not belong to
    the scope of a config, the name stands for an `ImportError` that says which
    package is needed.
    """
    reasons = {}
    for package, (distribution, module, names) in PACKAGES.items():
        if find_spec(package) is None:
            reasons[package] = f'{package} is not installed (pip install {distribution})'
        else:
            try:
                import_module(f'.{module}', __package__)
            except Exception as error:  # whatever a broken installation raises
                reasons[package] = (f'{package} does not load ({type(error).__name__}: {error}); '
                                    '`python -m orepa_mm.doctor` says what to do')
        if package in reasons:
            _register_error(package, names, reasons[package])
    for name in sorted({name for _, _, names in PACKAGES.values() for name in names}):
        if name not in MODELS.module_dict:
            MODELS.register_module(name=name, module=_failing(_explain_scope(name, reasons)))


def _register_error(package: str, names: tuple[str, ...], reason: str) -> None:
    """Let `package.Name` be found in a config, and fail with the reason."""
    registry = MODELS.children.get(package) or Registry('model', parent=MODELS, scope=package)
    for name in names:
        registry.register_module(name=name, force=True, module=_failing(
            f'{package}.{name} cannot be built: {reason}'))


def _explain_scope(name: str, reasons: dict[str, str]) -> str:
    homes = [package for package, (_, _, names) in PACKAGES.items() if name in names]
    loaded = [package for package in homes if package not in reasons]
    text = f'{name} was not found in the scope of this config: it belongs to {", ".join(homes)}.'
    if loaded:
        text += f" Write type='{loaded[0]}.{name}', or set default_scope = '{loaded[0]}'."
    return ' '.join([text, *(f'{reasons[package]}.' for package in homes if package in reasons)])


def _failing(message: str) -> Callable[..., None]:
    def fail(*args: object, **kwargs: object) -> None:
        raise ImportError(message)

    return fail
