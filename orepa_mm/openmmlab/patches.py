# ruff: noqa: E501  # a table
"""What is put in place of names of others.

| name | why | what breaks without it |
| --- | --- | --- |
| `pkgutil.find_loader`, where it is missing | Python 3.14 dropped it; MMEngine 0.10.7 and mmcv 2.1 call it | `collect_env` before every run, and mmcv's check of operators |
| `collect_env` of MMEngine's runners | asks a shell for the compiler that Python was built with | `x86_64-linux-gnu-gcc: not found` in the middle of a training log |
| `BaseModel.__call__` of MMEngine | here every forward pass begins and ends | a head that is called on five levels is squeezed five times |
"""

from __future__ import annotations

import functools
import importlib.util
import pkgutil
import shutil
import sysconfig
from collections.abc import Callable
from typing import Any

from ..layers import cached


def patch() -> None:
    """Put all of the table in place; a second call does nothing."""
    if not hasattr(pkgutil, 'find_loader'):
        pkgutil.find_loader = _find_loader  # type: ignore[attr-defined]
    import mmengine._strategy.base as strategies
    import mmengine.runner.runner as runners
    for module in (runners, strategies):
        if not hasattr(module.collect_env, '__wrapped__'):
            module.collect_env = _without_missing_compiler(module.collect_env)
    _share_kernels_in_forward_passes()


def _share_kernels_in_forward_passes() -> None:
    """Make the forward pass of every MMEngine model a context `cached()`. Hooks run inside."""
    from mmengine.model import BaseModel
    if hasattr(BaseModel.__call__, 'shares_kernels'):
        return

    def __call__(self: BaseModel, *args: Any, **kwargs: Any) -> Any:
        with cached():
            # looked up now: tracers of fx put their own in place of it
            return super(BaseModel, self).__call__(*args, **kwargs)

    __call__.shares_kernels = True  # type: ignore[attr-defined]  # a mark, for the second call
    BaseModel.__call__ = __call__


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
