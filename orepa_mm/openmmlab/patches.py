"""What is put in place of names of others.

| name | why | what breaks without it |
| --- | --- | --- |
| `pkgutil.find_loader`, where it is missing | Python 3.14 dropped it; MMEngine 0.10.7 and mmcv 2.1 call it | `collect_env` before every run, and mmcv's check of operators |
| `collect_env` of MMEngine's runners | asks a shell for the compiler that Python was built with | `x86_64-linux-gnu-gcc: not found` in the middle of a training log |
| `DefaultOptimWrapperConstructor.__call__`, which those of the toolboxes inherit | it tells parameters by their names | `custom_keys={'X.weight': ...}` reaches the branches of the layer X and not its scales, or a part of a DBB |
"""

from __future__ import annotations

import functools
import importlib.util
import pkgutil
import shutil
import sysconfig
from collections.abc import Callable
from typing import Any


def patch() -> None:
    """Put all of the table in place; a second call does nothing."""
    if not hasattr(pkgutil, 'find_loader'):
        pkgutil.find_loader = _find_loader  # type: ignore[attr-defined]
    import mmengine._strategy.base as strategies
    import mmengine.runner.runner as runners
    for module in (runners, strategies):
        if not hasattr(module.collect_env, '__wrapped__'):
            module.collect_env = _without_missing_compiler(module.collect_env)
    from mmengine.optim import DefaultOptimWrapperConstructor

    from .paramwise import with_whole_layers
    if not hasattr(DefaultOptimWrapperConstructor.__call__, '__wrapped__'):
        DefaultOptimWrapperConstructor.__call__ = with_whole_layers(
            DefaultOptimWrapperConstructor.__call__)


def _find_loader(name: str) -> Any:
    spec = importlib.util.find_spec(name)
    return spec and spec.loader


def _without_missing_compiler(collect: Callable[[], dict]) -> Callable[[], dict]:
    """The function, to which a compiler that is not there is `false`, which fails silently."""
    @functools.wraps(collect)
    def collect_env() -> dict:
        variables = sysconfig.get_config_vars()
        named = variables.get('CC')
        if not named or shutil.which(named.split()[0].rpartition('/')[2]):
            return collect()
        variables['CC'] = 'false'
        try:
            return collect()
        finally:
            variables['CC'] = named

    return collect_env
