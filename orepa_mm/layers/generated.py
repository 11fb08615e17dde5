"""The generated kernel as it is handed out: what is written into it reaches the branches."""

from __future__ import annotations

import logging
from typing import Any

import torch
from mmengine.logging import print_log
from torch import Tensor, nn
from torch.utils._pytree import tree_map

#: Methods whose names end like those of in-place operations, but which write no values.
_NO_WRITES = frozenset({'requires_grad_', 'detach_', 'share_memory_', 'rename_'})
_ITEM_WRITES = frozenset({'__setitem__', '__iadd__', '__isub__', '__imul__', '__itruediv__',
                          '__idiv__', '__ipow__', '__ifloordiv__', '__imod__'})


class GeneratedKernel(Tensor):
    """A kernel that its layer generated; reads as a tensor, and every result is a plain one.

    Stock code writes into `conv.weight`: rules of initialisation do, and blocks
    that re-parameterize themselves (`conv.weight.data = kernel`). Here such a
    write is passed on to `ReparamConv2d.set_kernel`.
    """

    @staticmethod
    def of(layer: nn.Module | None, kernel: Tensor) -> GeneratedKernel:
        """Hand out a kernel.

        Args:
            layer: What generated it; None for a part of a kernel, which cannot
                be written.
            kernel: `(o, i, k, k)`.
        """
        handed_out = kernel.as_subclass(GeneratedKernel)
        handed_out.layer = layer
        return handed_out

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (),
                           kwargs: dict | None = None) -> Any:
        """Call a function of PyTorch on the plain tensor; a write goes to the layer."""
        kwargs = kwargs or {}
        target = args[0] if args else kwargs.get('tensor', kwargs.get('input'))
        if isinstance(kwargs.get('out'), cls):
            target = kwargs['out']
        if isinstance(target, cls):
            if func == Tensor.data.__set__:
                return _write(target, _plain(args[1]))
            if _writes(func) or target is kwargs.get('out'):
                return _write_by(target, func, args, kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*tree_map(_plain, args), **tree_map(_plain, kwargs))
            if isinstance(target, cls) and func == Tensor.data.__get__:
                return cls.of(target.layer, result)
            if isinstance(target, cls) and type(result) is Tensor and _shares(result, target):
                return cls.of(None, result)
        return result


def _writes(func: Any) -> bool:
    name = getattr(func, '__name__', '')
    return name in _ITEM_WRITES or (
        name.endswith('_') and not name.startswith('__') and name not in _NO_WRITES)


def _write_by(target: GeneratedKernel, func: Any, args: tuple, kwargs: dict) -> GeneratedKernel:
    """Let a function write into a copy, and put that into the layer."""
    with torch._C.DisableTorchFunctionSubclass(), torch.no_grad():
        # laid out as a stock kernel: random numbers come in the order of the memory
        copy = _plain(target).detach().clone(memory_format=torch.contiguous_format)

        def exchanged(value: Any) -> Any:
            return copy if value is target else _plain(value)

        func(*tree_map(exchanged, args), **tree_map(exchanged, kwargs))
    return _write(target, copy)


def _write(target: GeneratedKernel, kernel: Tensor) -> GeneratedKernel:
    if target.layer is None:
        raise RuntimeError('this is a part of a generated kernel: a write into it would be lost. '
                           "Call the layer's set_kernel(kernel) with the whole one")
    with torch._C.DisableTorchFunctionSubclass(), torch.no_grad():
        missed = target.layer.set_kernel(kernel, strict=False)
        if missed > 1e-4:
            print_log(f'{type(target.layer).__name__} cannot generate the kernel that was written '
                      f'into its weight: it misses it by {missed:.1e} of its largest value',
                      'current', logging.WARNING)
        _plain(target).detach().copy_(kernel)
    return target


def _plain(value: Any) -> Any:
    if isinstance(value, GeneratedKernel):
        with torch._C.DisableTorchFunctionSubclass():
            return value.as_subclass(Tensor)
    return value


def _shares(result: Tensor, target: GeneratedKernel) -> bool:
    try:
        return (result.untyped_storage().data_ptr()
                == _plain(target).untyped_storage().data_ptr() != 0)
    except (RuntimeError, NotImplementedError):  # tensors without storage
        return False
