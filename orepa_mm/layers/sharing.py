"""`cached()`: a context in which every layer is squeezed once."""

from __future__ import annotations

import sys
import threading
import weakref
from operator import is_
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.optim.optimizer import register_optimizer_step_post_hook

if TYPE_CHECKING:
    from .base import ReparamConv2d

_functorch_is_active = getattr(torch._C, '_are_functorch_transforms_active', lambda: False)
#: What packs the tensors that are saved for backward, and which backward pass is running.
_top_hooks = getattr(torch._C._autograd, '_top_saved_tensors_default_hooks', None)
_graph_task = getattr(torch._C, '_current_graph_task_id', None)
#: Subclasses may hide their content.
_PLAIN = frozenset((Tensor, nn.Parameter))
#: How many steps the optimizers of this process took: fused ones advance no version counter.
_steps = [0]


def _count_step(*_: object) -> None:
    _steps[0] += 1


register_optimizer_step_post_hook(_count_step)


class _Open(threading.local):
    """The contexts that are open in this thread, by the identity of the frame that opened them."""

    def __init__(self) -> None:
        self.contexts: dict[int, weakref.ref[cached]] = {}


_open = _Open()


class cached:
    """Squeeze every layer at most once in this context, however often it is called.

    Three rules. A kernel is shared between calls of one kind: with or without
    gradients, in inference mode or not, inside the same dispatch mode, with the
    same tensors requiring a gradient. It is dropped when one of the layer's
    tensors is replaced or written in place, and at every step of an optimizer.
    Nothing outlives the context, and it serves only what the function with the
    `with` statement calls: no other thread, nor the caller of a generator.

    Gradients are those of a layer that is squeezed at each call, and several
    losses may go backward one after the other. Nothing is shared in what
    `torch.utils.checkpoint` computes twice, under `torch.func`, while a CUDA
    graph is captured, nor in what is compiled or traced. What cannot be seen is a
    write through `parameter.data` or NumPy between two calls.

    The forward pass of every MMEngine model is such a context. One inside of
    another is part of it.

    Example:
        >>> import torch
        >>> from orepa_mm.layers import OREPAConv2d, cached
        >>> head = OREPAConv2d(4, 4, 3, padding=1)
        >>> levels = [torch.rand(1, 4, size, size) for size in (16, 8, 4)]
        >>> with cached():
        ...     loss = sum(head(level).square().mean() for level in levels)
        >>> loss.backward()
    """

    _frame: FrameType | None = None

    def __enter__(self) -> None:
        if is_recorded():
            return
        frame = sys._getframe(1)
        if current(frame) is None:
            self._frame, self._contexts = frame, _open.contexts
            self.kernels: dict[Any, tuple[Sources, Tensor]] = {}
            self._contexts[id(frame)] = weakref.ref(self)

    def __exit__(self, *_: object) -> None:
        if self._frame is not None:
            del self._contexts[id(self._frame)]
            self._frame = None
            self.kernels.clear()


def current(frame: FrameType | None = None) -> cached | None:
    """The context that serves a frame: one that it, or a frame that called it, has opened.

    Args:
        frame: The caller's own by default.
    """
    contexts, frame = _open.contexts, frame or sys._getframe(1)
    while frame is not None and contexts:
        reference = contexts.get(id(frame))
        if reference is not None:
            context = reference()
            if context is not None and context._frame is frame:
                return context
        frame = frame.f_back
    return None


def shared_kernel(layer: ReparamConv2d) -> Tensor:
    """The layer's kernel of the context that serves the caller, or a new one.

    Args:
        layer: What generates it, `(o, i, k, k)`.

    Returns:
        The kernel, not to be written into.
    """
    context, grad = current(), torch.is_grad_enabled()
    if (context is None or torch.jit.is_tracing() or _functorch_is_active()
            or getattr(forward_ad, '_current_level', -1) >= 0):
        return layer._generate()
    # Checkpointing packs what is saved for backward, and computes anew in a backward pass: a
    # kernel of another segment, or from outside, would not be saved twice in the same way.
    # Where this PyTorch does not tell, that is taken for true.
    if grad and (not layer.graph_is_reusable or _top_hooks is None or _graph_task is None
                 or _top_hooks(True) is not None or _graph_task() != -1):
        return layer._generate()
    tensors = layer._sources()
    try:
        sources = Sources(tensors)
    except RuntimeError:
        return layer._generate()
    kind: list[Any] = [layer, grad, torch.is_inference_mode_enabled()]
    depth = torch._C._len_torch_dispatch_stack()
    if depth:
        kind.append(torch._C._get_dispatch_stack_at(depth - 1))
    if tensors[0].is_cuda:
        if torch.cuda.is_current_stream_capturing():
            return layer._generate()
        kind.append(torch.cuda.current_stream(tensors[0].device))
    for tensor in tensors:
        kind.append(tensor.requires_grad)
    found = context.kernels.get(tuple(kind))
    if found is not None and found[0].are(sources):
        return found[1]
    kernel = layer._generate()
    context.kernels[tuple(kind)] = sources, kernel
    return kernel


class Sources:
    """What a kernel is generated from, and all that PyTorch tells of it without a device's wait.

    Attributes:
        tensors: Every parameter and buffer, alive, so that no identity comes back for another one.
        memory: Theirs, alive, so that no address comes back for other content.
        facts: Address, version and layout of each; how many steps optimizers took.

    Args:
        tensors: All that the kernel is generated from.

    Raises:
        RuntimeError: If the tensors do not tell of their content: there are none, or subclasses,
            inference tensors, tensors without storage.
    """

    __slots__ = 'facts', 'memory', 'tensors'

    def __init__(self, tensors: list[Tensor]) -> None:
        if not tensors or not _PLAIN.issuperset(map(type, tensors)):
            raise RuntimeError('these tensors may change unseen')
        self.tensors = tensors
        self.facts: list[Any] = [*_steps]
        self.memory = []
        for t in tensors:
            self.facts += t.data_ptr(), t._version, t.stride()
            self.memory.append(t.untyped_storage())

    def are(self, others: Sources) -> bool:
        """Whether a kernel of the others would be the same."""
        return (self.facts == others.facts and len(self.tensors) == len(others.tensors)
                and all(map(is_, self.tensors, others.tensors)))


def is_recorded() -> bool:
    """Whether a compiler or a tracer records what runs."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()
