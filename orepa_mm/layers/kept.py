"""The kernel that a layer keeps between calls, and how it is known to be up to date."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class KeptKernel:
    """A generated kernel, and what it was generated from.

    Nothing is read back from the device to compare: a tensor is the same if it
    lies at the same address in the same layout and its version counter, which
    PyTorch advances at each in-place write, stands where it stood.

    Attributes:
        kernel: `(o, i, k, k)`.
        sources: Address, layout and version of every parameter and buffer, and of the kernel.
        aliases: Keep the memory of the sources alive, so that an address cannot
            come back for other content.
    """

    kernel: Tensor
    sources: list[tuple]
    aliases: list[Tensor]

    @classmethod
    def of(cls, layer: nn.Module, kernel: Tensor) -> KeptKernel | None:
        """Keep a kernel; None where tensors tell no address or version.

        Args:
            layer: What generated it.
            kernel: Just generated.
        """
        tensors = _tensors(layer)
        if kernel.is_meta or type(kernel) is not Tensor or any(
                type(tensor) not in (Tensor, nn.Parameter) for tensor in tensors):
            return None  # no content, or a subclass that may hide it
        if any('parametrizations' in module._modules for module in layer.modules()):
            return None  # which may compute from more than tensors
        try:
            return cls(kernel, _state([*tensors, kernel]), [t.detach() for t in tensors])
        except RuntimeError:  # inference tensors, tensors inside torch.func transforms
            return None

    def holds_for(self, layer: nn.Module) -> bool:
        """Whether the layer would generate this kernel again.

        Args:
            layer: What generated it.
        """
        try:
            return self.sources == _state([*_tensors(layer), self.kernel])
        except RuntimeError:
            return False


def _tensors(layer: nn.Module) -> list[Tensor]:
    """All parameters and buffers; quicker than asking for them by name."""
    return [tensor for module in (layer.modules() if layer._modules else (layer,))
            for tensors in (module._parameters, module._buffers)
            for tensor in tensors.values() if tensor is not None]


def _state(tensors: list[Tensor]) -> list[tuple]:
    return [(t.data_ptr(), t._version, t.shape, t.stride()) for t in tensors]
