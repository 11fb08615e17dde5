"""A kernel that a layer uses again, and how it is known to be up to date."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

#: Subclasses may hide their content.
_PLAIN = frozenset((Tensor, nn.Parameter))


@dataclass(slots=True)
class KeptKernel:
    """A generated kernel, and what it was generated from.

    Nothing is read back from the device to compare: a tensor is the same if it
    is the same object, lies at the same address in the same layout, and its
    version counter, which PyTorch advances at each in-place write, stands where
    it stood.

    Attributes:
        kernel: `(o, i, k, k)`; never handed out, so that nobody writes into it.
        sources: Identity, address, layout and version of every parameter and buffer.
        tensors: These, alive, so that no identity can come back for another one.
        memory: Theirs, alive, so that no address can come back for other content.
    """

    kernel: Tensor
    sources: list[tuple[Any, ...]]
    tensors: list[Tensor]
    memory: list[torch.UntypedStorage]

    @classmethod
    def of(cls, layer: nn.Module, kernel: Tensor) -> KeptKernel | None:
        """Keep a kernel; None where it may not be used again.

        Args:
            layer: What generated it.
            kernel: Just generated, `(o, i, k, k)`.
        """
        if type(kernel) is not Tensor or kernel.is_meta or is_captured(kernel):
            return None  # a subclass that may hide its content, no content, or not our memory
        tensors = _tensors(layer)
        if not _PLAIN.issuperset(map(type, tensors)):
            return None
        for module in layer.modules() if layer._modules else ():
            if 'parametrizations' in module._modules:
                return None  # which may compute from more than tensors
        try:
            kernel.data_ptr()
            return cls(kernel, _state(tensors), tensors, [t.untyped_storage() for t in tensors])
        except RuntimeError:  # inference tensors, tensors inside torch.func transforms
            return None

    def holds_for(self, layer: nn.Module) -> bool:
        """Whether the layer would generate this kernel again.

        Args:
            layer: What generated it.
        """
        try:
            return self.sources == _state(_tensors(layer))
        except RuntimeError:
            return False


def is_recorded() -> bool:
    """Whether a compiler or a tracer records what runs: then nothing may be kept."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def is_captured(kernel: Tensor) -> bool:
    """Whether a CUDA graph is being captured, whose memory is not ours to keep.

    Args:
        kernel: Tells whether this runs on a GPU at all.
    """
    return kernel.is_cuda and torch.cuda.is_current_stream_capturing()


def _tensors(layer: nn.Module) -> list[Tensor]:
    """All parameters and buffers; quicker than asking for them by name."""
    return [tensor for module in (layer.modules() if layer._modules else (layer,))
            for tensors in (module._parameters, module._buffers)
            for tensor in tensors.values() if tensor is not None]


def _state(tensors: list[Tensor]) -> list[tuple[Any, ...]]:
    return [(id(t), t.data_ptr(), t._version, t.stride()) for t in tensors]
