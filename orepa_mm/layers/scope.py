"""A scope in which every layer is squeezed once, as `torch.nn.utils.parametrize.cached`."""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from mmengine.model import BaseModel
from torch import Tensor, nn

from .kept import KeptKernel, is_captured, is_recorded


class _Scope(dict[nn.Module, dict[tuple[bool, bool], KeptKernel]]):
    """Kernels by layer and by what autograd does; a class of its own, to be referred to weakly."""


#: The outermost scope that is open in this thread.
_open: ContextVar[_Scope | None] = ContextVar('squeezed_once', default=None)
#: What packs the tensors that are saved for backward, and which backward pass is running.
_top_hooks = getattr(torch._C._autograd, '_top_saved_tensors_default_hooks', None)
_graph_task = getattr(torch._C, '_current_graph_task_id', None)


@contextlib.contextmanager
def squeezed_once() -> Iterator[None]:
    """Squeeze every layer at most once in this context, however often it is called.

    The forward pass of every MMEngine model (`BaseModel.__call__`) is such a
    context; one inside of another is part of it. Gradients are those of a layer
    that is squeezed at each call. A layer is squeezed anew when one of its
    tensors was written, when its kernel has had its gradient, and wherever
    what is saved for backward is intercepted: in the segments of
    `torch.utils.checkpoint`, which are computed twice. (Before PyTorch 2.8 that
    cannot be told, and nothing is shared where gradients flow.) What is written through
    `parameter.data` cannot be seen: call `layer.forget_kernel()` after it.
    Nothing outlives the context but what autograd keeps of the calls themselves.

    The calls share one graph: go backward once through all of them, or keep it
    (`retain_graph=True`). Inside a compiled or traced function this does nothing.

    Example:
        >>> import torch
        >>> from orepa_mm.layers import OREPAConv2d, squeezed_once
        >>> head = OREPAConv2d(4, 4, 3, padding=1)
        >>> levels = [torch.rand(1, 4, size, size) for size in (16, 8, 4)]
        >>> with squeezed_once():
        ...     loss = sum(head(level).square().mean() for level in levels)
        >>> loss.backward()
    """
    if is_recorded() or _open.get() is not None:
        yield
        return
    scope = _Scope()
    token = _open.set(scope)
    try:
        yield
    finally:
        _open.reset(token)
        scope.clear()


def is_open() -> bool:
    """Whether kernels are shared between calls here."""
    return _open.get() is not None


def shared_kernel(layer: nn.Module, generate: Callable[[], Tensor]) -> Tensor:
    """The layer's kernel of this scope; a new one where there is none, or outside of scopes.

    Args:
        layer: What generates it.
        generate: Generates it, `(o, i, k, k)`.

    Returns:
        The kernel, not to be written into.
    """
    scope, grad = _open.get(), torch.is_grad_enabled()
    if scope is None or (grad and _is_intercepted()):
        return generate()
    mode = grad, torch.is_inference_mode_enabled()
    kept = scope.get(layer, {}).get(mode)
    if kept is not None and kept.holds_for(layer) and not is_captured(kept.kernel):
        return kept.kernel
    kernel = generate()
    kept = KeptKernel.of(layer, kernel)
    if kept is not None:
        scope.setdefault(layer, {})[mode] = kept
        if kernel.requires_grad:
            # a backward pass inside the scope frees the graph behind the kernel
            kernel.register_hook(functools.partial(_forget, weakref.ref(scope), layer))
    return kernel


def forget(layer: nn.Module) -> None:
    """Squeeze a layer anew at its next call, also in the scope that is open.

    Args:
        layer: What generates a kernel.
    """
    scope = _open.get()
    if scope is not None:
        scope.pop(layer, None)


def open_in_forward_passes() -> None:
    """Make the forward pass of every MMEngine model a scope; a second call does nothing.

    `train_step`, `val_step`, `test_step`, their distributed wrappers and a plain
    call all go through `BaseModel.__call__`. Hooks of the model run inside.
    """
    if hasattr(BaseModel.__call__, 'opens_scope'):
        return

    def __call__(self: BaseModel, *args: Any, **kwargs: Any) -> Any:
        with squeezed_once():
            # looked up now: tracers of fx put their own in place of it
            return super(BaseModel, self).__call__(*args, **kwargs)

    __call__.opens_scope = True  # type: ignore[attr-defined]  # a mark, for the second call
    BaseModel.__call__ = __call__


def _forget(scope: weakref.ref[_Scope], layer: nn.Module, _: Tensor) -> None:
    kernels = scope()
    if kernels is not None:
        kernels.pop(layer, None)


def _is_intercepted() -> bool:
    """Whether what is saved for backward is packed, or a backward pass computes anew.

    Checkpointing does both: a kernel of another segment, or from outside, would
    not be saved twice in the same way, or its graph be gone through twice.
    Where this PyTorch does not tell, it is taken for true.
    """
    if _top_hooks is None or _graph_task is None:
        return True
    return _top_hooks(True) is not None or _graph_task() != -1
