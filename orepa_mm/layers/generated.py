"""The generated kernel as it is handed out: what is written into it reaches the branches."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from mmengine.logging import print_log
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

if TYPE_CHECKING:
    from .base import ReparamConv2d

_SET_DATA = Tensor.data.__set__  # type: ignore[attr-defined]  # of the class, a descriptor


class GeneratedKernel(Tensor):
    """A kernel that its layer generated, or a view of it; all other results are plain tensors.

    Stock code writes into `conv.weight`: rules of initialisation do, and blocks
    that re-parameterize themselves (`conv.weight.data = kernel`). Whatever
    writes, PyTorch's version counter tells; the layer's `set_kernel` is then
    called with the whole kernel.

    Attributes:
        layer: What generated it.
        whole: The kernel that was handed out, of which this is a view or all,
            `(o, i, k, k)`; a plain tensor.
    """

    layer: ReparamConv2d
    whole: Tensor

    @staticmethod
    def of(layer: ReparamConv2d, whole: Tensor, part: Tensor | None = None) -> GeneratedKernel:
        """Hand out a kernel.

        Args:
            layer: What generated it.
            whole: `(o, i, k, k)`; memory that is nobody else's.
            part: A view of it; all of it by default.
        """
        kernel = (whole if part is None else part).as_subclass(GeneratedKernel)
        # not by an ordinary assignment, which is refused below
        kernel.__dict__.update(layer=layer, whole=whole)
        return kernel

    def __setattr__(self, name: str, value: Any) -> None:
        if name == '_is_param':
            raise TypeError('a parameter cannot be made of a generated kernel itself: make it of a '
                            'copy, nn.Parameter(layer.weight.detach().clone())')
        super().__setattr__(name, value)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (),
                           kwargs: dict[str, Any] | None = None) -> Any:
        """Call a function of PyTorch on plain tensors; pass what it wrote on to the layer."""
        kwargs = kwargs or {}
        kernels = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, cls)]
        with torch._C.DisableTorchFunctionSubclass():
            if func == _SET_DATA and isinstance(args[0], cls):
                _plain(args[0]).detach().copy_(_plain(args[1]))
                _pass_on(args[0])
                return None
            versions = [kernel._version for kernel in kernels]
            args, kwargs = tree_map(_plain, (args, kwargs))
            result = func(*args, **kwargs)
            for kernel, version in zip(kernels, versions):
                if kernel._version != version:
                    _pass_on(kernel)
            return tree_map(lambda leaf: _tied(leaf, kernels), result)


def _plain(kernel: Any) -> Any:
    return kernel.as_subclass(Tensor) if isinstance(kernel, GeneratedKernel) else kernel


def _pass_on(kernel: GeneratedKernel) -> None:
    """Put what is now in a kernel's memory into its layer."""
    layer, whole = kernel.layer, kernel.whole.detach()
    name = type(layer).__name__
    if not whole.isfinite().all():
        # MMEngine's truncated normal has infinite values on its way
        print_log(f'values that are not finite were written into the weight of a {name}: its '
                  'branches stay as they are until finite ones follow', 'current', logging.WARNING)
        return
    missed = layer.set_kernel(whole, strict=False)
    if missed > max(1e-4, 8 * torch.finfo(whole.dtype).eps):
        print_log(f'{name} cannot generate the kernel that was written into its weight: it misses '
                  f'it by {missed:.1e} of its largest value', 'current', logging.WARNING)


def _tied(result: Any, kernels: list[GeneratedKernel]) -> Any:
    """A view of a kernel as one that passes writes on; anything else as it is."""
    if isinstance(result, np.ndarray):
        result.flags.writeable = False  # nothing would tell of a write
    if type(result) is Tensor:
        for kernel in kernels:
            if _storage(result) == _storage(kernel.whole) != 0:
                return GeneratedKernel.of(kernel.layer, kernel.whole, result)
    return result


def _storage(tensor: Tensor) -> int:
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # tensors without storage
        return 0
