# ruff: noqa: E501  # a table
"""What is put in place of names of others.

| name | why | what breaks without it |
| --- | --- | --- |
| `pkgutil.find_loader`, where it is missing | Python 3.14 dropped it; MMEngine 0.10.7 and mmcv 2.1 call it | `collect_env` before every run, and mmcv's check of operators |
| `collect_env` of MMEngine's runners | asks a shell for the compiler that Python was built with | `x86_64-linux-gnu-gcc: not found` in the middle of a training log |
| `BaseModel.__call__` of MMEngine | here every forward pass begins and ends | a head that is called on five levels is squeezed five times |
| `load_from_local`, `load_from_http` in `mmengine.runner.checkpoint`, and in `CheckpointLoader` for files, `http://` and `https://` | MMEngine reads downloads by PyTorch's hub, which runs code that a file holds; PyTorch compares no checksums | a crafted file runs its code; a damaged one is loaded |
| `_safe_torch_load` in `mmengine.runner.checkpoint`, in the maintained forks | falls back to an unsafe load where a safe one fails | a crafted file runs its code |
| `load_state_dict` in `mmengine.runner` and `mmengine.runner.checkpoint` | all that MMEngine loads ends there, and missing keys are a warning | plain weights are not expanded, a checkpoint of the other form leaves random weights |
| `resume` of `Runner` and `FlexibleRunner` | the optimizer's state belongs to the form of the weights | a run is resumed from plain weights, expanded, with the state of other parameters |
| `MODELS._add_child` | toolboxes make their registries when they are imported | our backbones are found only if `orepa_mm` is imported after the toolbox |
| `DefaultOptimWrapperConstructor.__call__`, which those of the toolboxes inherit | it tells parameters by their names | `custom_keys={'X.weight': ...}` reaches the branches of the layer X and not its scales, or a part of a DBB; `conv1` reaches a branch of every layer |
"""

from __future__ import annotations

import functools
import importlib.util
import pkgutil
import shutil
import sysconfig
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import Any

from ..layers import cached

#: Whether a runner is resuming.
_resuming: ContextVar[bool] = ContextVar('resuming', default=False)


def patch() -> None:
    """Put all of the table in place; a second call does nothing."""
    if not hasattr(pkgutil, 'find_loader'):
        pkgutil.find_loader = _find_loader  # type: ignore[attr-defined]
    import mmengine._strategy.base as strategies
    import mmengine.runner.runner as runners
    import torch
    from mmengine import runner
    from mmengine.model import BaseModel
    from mmengine.optim import DefaultOptimWrapperConstructor
    from mmengine.registry import MODELS
    from mmengine.runner import CheckpointLoader, FlexibleRunner, Runner
    from mmengine.runner import checkpoint as loading

    from ..checkpoints.sources import load_from_http, load_from_local
    from .paramwise import with_whole_layers
    for module in (runners, strategies):
        _wrap(module, 'collect_env', _without_missing_compiler)
    _wrap(BaseModel, '__call__', _sharing_kernels)
    # torchvision://, modelzoo://, open-mmlab://, openmmlab:// and mmcls:// look an address up and
    # call the function for http by its name; pavi:// and s3:// call torch.load, safe by default
    CheckpointLoader.register_scheme('', load_from_local, force=True)
    CheckpointLoader.register_scheme(('http://', 'https://'), load_from_http, force=True)
    loading.load_from_local, loading.load_from_http = load_from_local, load_from_http
    if hasattr(loading, '_safe_torch_load'):
        loading._safe_torch_load = torch.load
    _wrap(loading, 'load_state_dict', _checked)
    runner.load_state_dict = loading.load_state_dict
    for kind in (Runner, FlexibleRunner):
        _wrap(kind, 'resume', _noticed)
    _wrap(MODELS, '_add_child', _with_location)
    _wrap(DefaultOptimWrapperConstructor, '__call__', with_whole_layers)


def _wrap(owner: Any, name: str, wrapper: Callable[[Callable[..., Any]], Callable[..., Any]]
          ) -> None:
    """Put what `wrapper` makes of a function in its place, once."""
    if not hasattr(getattr(owner, name), '_orepa_mm'):
        wrapped = wrapper(getattr(owner, name))
        wrapped._orepa_mm = True  # type: ignore[attr-defined]  # a mark, for a second call
        setattr(owner, name, wrapped)


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


def _sharing_kernels(call: Callable[..., Any]) -> Callable[..., Any]:
    """The call of a model, which is a context `cached()`. Hooks run inside."""
    from mmengine.model import BaseModel

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        with cached():
            # looked up now: tracers of fx put their own in place of it
            return super(BaseModel, self).__call__(*args, **kwargs)

    return __call__


def _checked(load: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which expands plain weights first, but not in resuming, and checks the form."""
    from ..checkpoints import expanded_state_dict, require_same_form
    from ..checkpoints.forms import without_mark

    @functools.wraps(load)
    def load_state_dict(module: Any, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any
                        ) -> Any:
        if not _resuming.get():
            state_dict = expanded_state_dict(module, state_dict)
        require_same_form(module, state_dict)
        return load(module, without_mark(state_dict), *args, **kwargs)

    return load_state_dict


def _noticed(resume: Callable[..., Any]) -> Callable[..., Any]:
    """The method, during which `_resuming` is true."""
    @functools.wraps(resume)
    def noticed(*args: Any, **kwargs: Any) -> Any:
        token = _resuming.set(True)
        try:
            return resume(*args, **kwargs)
        finally:
            _resuming.reset(token)

    return noticed


def _with_location(add_child: Callable[[Any], None]) -> Callable[[Any], None]:
    """The method, after which a toolbox's registry finds our backbones."""
    from ..backbones.registration import add_location

    @functools.wraps(add_child)
    def add_child_and_location(registry: Any) -> None:
        add_child(registry)
        add_location(registry)

    return add_child_and_location
