"""The generated kernel as it is handed out: what is written into it reaches the branches."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from ..logs import log
from .sharing import Sources

if TYPE_CHECKING:
    from .base import ReparamConv2d

# of the class, descriptors
_SET_DATA = Tensor.data.__set__  # type: ignore[attr-defined]
_SET_REQUIRES_GRAD = Tensor.requires_grad.__set__  # type: ignore[attr-defined]


class GeneratedKernel(Tensor):
    """A kernel that its layer generated, or a view of it; all other results are plain tensors.

    Stock code writes into `conv.weight`: rules of initialisation do, and blocks
    that re-parameterize themselves (`conv.weight.data = kernel`). Whatever
    writes, PyTorch's version counter tells; the layer's `set_kernel` is then
    called with the kernel that is in memory now. A kernel that was read before the branches
    changed takes no writes: they would bring the old branches back.

    Attributes:
        layer: What generated it.
        memory: The kernel that was handed out, of which this is a view or all,
            `(o, i, k, k)`; a plain tensor.
        sources: What it was generated from, in a list that all views of it share.
    """

    layer: ReparamConv2d
    memory: Tensor
    sources: list[Sources | None]

    @staticmethod
    def of(layer: ReparamConv2d, memory: Tensor) -> GeneratedKernel:
        """Hand out a kernel.

        Args:
            layer: What generated it.
            memory: `(o, i, k, k)`; memory that is nobody else's.
        """
        return _handed_out(memory, layer, memory, [_sources(layer)])

    def __setattr__(self, name: str, value: Any) -> None:
        if name == '_is_param':
            raise TypeError('a parameter cannot be made of a generated kernel itself: make it of a '
                            'copy, nn.Parameter(layer.weight.detach().clone())')
        super().__setattr__(name, value)

    def set_(self, source: Tensor) -> GeneratedKernel:  # type: ignore[override]
        """Take the values of another tensor, as by `.data`; PyTorch tells nobody of `set_`."""
        self.data = source
        return self

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
            if func in (_SET_REQUIRES_GRAD, Tensor.requires_grad_) and args[0] is kernels[0] and (
                    kernels[0].__dict__.get('is_weight')):
                return _require_grad(*args, **kwargs)
            versions = [kernel._version for kernel in kernels]
            args, kwargs = tree_map(_plain, (args, kwargs))
            result = func(*args, **kwargs)
            for kernel, version in zip(kernels, versions):
                if kernel._version != version:
                    _pass_on(kernel)
            if type(result) in (tuple, list):
                return type(result)(_tied(item, kernels) for item in result)
            return _tied(result, kernels)


def _sources(layer: ReparamConv2d) -> Sources | None:
    try:
        return Sources(layer._sources())
    except RuntimeError:  # they do not tell whether they change
        return None


def _plain(kernel: Any) -> Any:
    return kernel.as_subclass(Tensor) if isinstance(kernel, GeneratedKernel) else kernel


def _handed_out(part: Tensor, layer: ReparamConv2d, memory: Tensor,
                sources: list[Sources | None]) -> GeneratedKernel:
    kernel = part.as_subclass(GeneratedKernel)
    # not by an ordinary assignment, which is refused above
    kernel.__dict__.update(layer=layer, memory=memory, sources=sources, is_weight=part is memory)
    return kernel


def _require_grad(kernel: GeneratedKernel, value: bool = True) -> GeneratedKernel:
    """Of a stock weight: freezes it or lets it train. Of this one: all of its branches."""
    for name, parameter in kernel.layer.named_parameters():
        if name != 'bias':
            parameter.requires_grad_(value)
    return kernel


def _pass_on(kernel: GeneratedKernel) -> None:
    """Put what is now in a kernel's memory into its layer."""
    layer, memory = kernel.layer, kernel.memory.detach()
    name, now = type(layer).__name__, _sources(layer)
    read = kernel.sources[0]
    if read is not None and now is not None and not read.are(now):
        raise RuntimeError(
            f'what was written into this kernel does not reach its {name}: it was read from '
            'layer.weight before the branches changed. Read layer.weight again, or write into a '
            'copy, layer.weight.detach().clone()')
    if not memory.isfinite().all():
        # MMEngine's truncated normal has infinite values on its way
        log(f'values that are not finite were written into the weight of a {name}: its '
            'branches stay as they are until finite ones follow', logging.WARNING)
        return
    missed = layer.set_kernel(memory, strict=False)
    kernel.sources[0] = _sources(layer)
    if missed > max(1e-4, 8 * torch.finfo(memory.dtype).eps):
        log(f'{name} cannot generate the kernel that was written into its weight: it misses '
            f'it by {missed:.1e} of its largest value', logging.WARNING)


def _tied(result: Any, kernels: list[GeneratedKernel]) -> Any:
    """A view of a kernel as one that passes writes on; anything else as it is."""
    if type(result) is Tensor:
        for kernel in kernels:
            if _address(result) == _address(kernel.memory) != 0:
                return _handed_out(result, kernel.layer, kernel.memory, kernel.sources)
    elif kernels and hasattr(getattr(result, 'flags', None), 'writeable'):  # a NumPy array
        result.flags.writeable = False  # nothing would tell of a write
    return result


def _address(tensor: Tensor) -> int:
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # tensors without storage
        return 0
