"""How a layer calls the squeeze of its block: with gradients by hand, compiled on demand."""

from __future__ import annotations

import functools
import logging
import time
import types
from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..logs import log
from . import gradients, squeeze
from .precision import without_autocast
from .sharing import _functorch_is_active

#: `_Compiled` looks at shapes itself; what is generated checks them again.
_OPTIONS: dict[str, Any] = {'guard_filter_fn': torch.compiler.skip_all_guards_unsafe} if hasattr(
    torch.compiler, 'skip_all_guards_unsafe') else {}

_version = attrgetter('_version')


def squeezed(block: str, names: Sequence[str], tensors: Sequence[Tensor],
             options: Mapping[str, Any], compiled: bool = False) -> Tensor:
    """The kernel of a block.

    Where a gradient may be asked for, it is made by `gradients`, and the graph
    holds nothing but the given tensors, and can be gone through again. A second derivative
    goes through the operations of the squeeze, as do `torch.func`, forward mode,
    and whatever records a graph.

    Args:
        block: Name of a function in `squeeze`.
        names: Names of its tensors.
        tensors: These, in that order.
        options: Its other arguments, which are hashable.
        compiled: Whether to run it through `torch.compile`, see `_Compiled`.

    Returns:
        Kernel `(o, i, k, k)`.
    """
    if (torch.compiler.is_compiling() or torch.jit.is_tracing() or _functorch_is_active()
            or getattr(forward_ad, '_current_level', -1) >= 0):
        return getattr(squeeze, block)(**dict(zip(names, tensors)), **options)
    if not torch.is_grad_enabled():
        return _runner(block, False, compiled)(**dict(zip(names, tensors)), **options)
    return _Squeeze.apply(block, names, options, compiled, *tensors)


class _Squeeze(torch.autograd.Function):
    """The squeeze of a block with its gradients.

    It holds its inputs by itself: what PyTorch saves for it would be gone after
    the first of two losses that share a kernel went backward.
    """

    @staticmethod
    def forward(ctx: Any, block: str, names: Sequence[str], options: Mapping[str, Any],
                compiled: bool, *tensors: Tensor) -> Tensor:
        ctx.call = block, names, options, compiled
        ctx.tensors, ctx.versions = tensors, list(map(_version, tensors))
        return _runner(block, False, compiled)(**dict(zip(names, tensors)), **options)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        block, names, options, compiled = ctx.call
        if list(map(_version, ctx.tensors)) != ctx.versions:
            raise RuntimeError(
                'a branch of a generated kernel was modified by an in-place operation after the '
                'forward pass and before the backward pass: its gradient would be another one. '
                'Go backward before optimizer.step() and other writes')
        tensors = dict(zip(names, ctx.tensors))
        with without_autocast(grad.device):
            found = (_through_the_operations(block, tensors, options, grad)
                     if torch.is_grad_enabled()  # a second derivative
                     or not hasattr(gradients, block) else
                     _runner(block, True, compiled)(grad, **tensors, **options))
        return (None, None, None, None, *[found.get(name) for name in names])


def _through_the_operations(block: str, tensors: Mapping[str, Tensor],
                            options: Mapping[str, Any], grad: Tensor) -> dict[str, Tensor]:
    """Gradients by PyTorch's own rules; they have gradients themselves where that is asked for."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # each under a name of its own: two branches may be one tensor, or depend on each other
        tensors = {name: tensor.view_as(tensor) for name, tensor in tensors.items()}
        kernel = getattr(squeeze, block)(**tensors, **options)
    inputs = {name: tensor for name, tensor in tensors.items() if tensor.requires_grad}
    return dict(zip(inputs, torch.autograd.grad(kernel, list(inputs.values()), grad,
                                                create_graph=create_graph)))


@functools.cache
def _runner(block: str, backward: bool, compiled: bool) -> Callable[..., Any]:
    function = getattr(gradients if backward else squeeze, block)
    return _Compiled(function) if compiled else function


class _Compiled:
    """A function compiled for each shape of its arguments that it meets.

    A kernel never changes its size, so each shape is a graph of its own, without
    symbolic sizes. `torch.compile` keeps what it made on disk, so a second start is
    quick. Where it cannot compile (no C++ compiler, no Triton), the function runs
    as it is, after one warning.

    Args:
        function: Pure, of tensors and hashable options.
    """

    #: Whether some function could not be compiled here.
    failed = False

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.by_shape: dict[tuple[Any, ...], Callable[..., Any]] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if _Compiled.failed:
            return self.function(*args, **kwargs)
        origin = kwargs['origin']  # whose shape, type and place tell those of the others
        key = (origin.shape, origin.dtype, origin.device, *(
            value.stride() if isinstance(value, Tensor) else value
            for value in (*args, *kwargs.values())))
        run = self.by_shape.get(key)
        return self._first_call(key, args, kwargs) if run is None else run(*args, **kwargs)

    def _first_call(self, key: tuple[Any, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
                    ) -> Any:
        # A code object of its own: TorchDynamo compiles few shapes of one, then gives up.
        code = self.function.__code__
        code = code.replace(co_consts=(*code.co_consts, len(self.by_shape)))
        own = types.FunctionType(code, self.function.__globals__, code.co_name)
        own.__kwdefaults__ = self.function.__kwdefaults__
        run = torch.compile(own, fullgraph=True, dynamic=False, options=_OPTIONS)
        start = time.perf_counter()
        try:
            result = run(*args, **kwargs)
        except Exception as error:  # whatever a missing compiler raises
            _Compiled.failed = True
            log(f'the squeeze runs without torch.compile, which fails here: '
                      f'{str(error).strip().splitlines()[0] or type(error).__name__}',
                      logging.WARNING)
            return self.function(*args, **kwargs)
        self.by_shape[key] = run
        shape = ' x '.join(map(str, kwargs['origin'].shape))
        log(f'compiled {self.function.__module__.rpartition(".")[2]}.{code.co_name} for a '
                  f'kernel of {shape} in {time.perf_counter() - start:.1f} s')
        return result
