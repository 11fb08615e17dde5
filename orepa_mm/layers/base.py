"""The base of every convolution layer whose kernel is generated from branches."""

from __future__ import annotations

import contextlib
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


def _full_precision(device: torch.device) -> contextlib.AbstractContextManager:
    """Switch autocast off on `device`: half precision would spoil the squeeze."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


class ReparamConv2d(nn.Module, ABC):
    """A 2-D convolution whose `weight` is generated from several branches.

    It is called, printed and read as `torch.nn.Conv2d` is, and computes
    `conv2d(x, weight) + bias`. It is no subclass of it, so that an
    initialisation rule for `Conv2d` does not reach it.

    A subclass creates its parameters, calls `reset_parameters()` at the end of
    its `__init__`, and implements `squeeze` and `reset_branches`.

    In eval mode the kernel is generated once and kept as long as no gradient
    can flow to the branches. It is generated anew after `train()` and `eval()`
    (unless the layer is frozen), loading, moving to another device or dtype,
    and any in-place change of a parameter. MMEngine's moving averages write
    through `parameter.data`, which PyTorch's version counter does not see; a
    checksum of the branches does.

    Args:
        in_channels: `I`.
        out_channels: `o`.
        kernel_size: `k`, odd; a square window.
        stride: As in `torch.nn.Conv2d`.
        padding: As in `torch.nn.Conv2d`.
        dilation: As in `torch.nn.Conv2d`.
        groups: `g`.
        bias: Whether to add a learnable bias, `(o,)`.
        padding_mode: As in `torch.nn.Conv2d`.
        device: Where to create the parameters.
        dtype: Type of the parameters.

    Raises:
        ValueError: If the kernel is not an odd square, or the channels are not
            divisible by `groups`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = 'zeros',
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        # The stock layer checks and normalises the arguments; it holds no memory.
        geometry = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, dilation,
                             groups, bias, padding_mode, device='meta')
        height, width = geometry.kernel_size
        if height != width or height % 2 == 0:
            raise ValueError(f'{type(self).__name__} needs an odd square kernel, '
                             f'got kernel_size={kernel_size}')
        self.in_channels = geometry.in_channels
        self.out_channels = geometry.out_channels
        self.kernel_size = geometry.kernel_size
        self.stride = geometry.stride
        self.padding = geometry.padding
        self.dilation = geometry.dilation
        self.groups = geometry.groups
        self.padding_mode = geometry.padding_mode
        self.transposed = geometry.transposed
        self.output_padding = geometry.output_padding
        self._reversed_padding_repeated_twice = geometry._reversed_padding_repeated_twice
        self._factory_kwargs = {'device': device, 'dtype': dtype}
        if bias:
            self.bias = nn.Parameter(torch.empty(out_channels, **self._factory_kwargs))
        else:
            self.register_parameter('bias', None)
        self._cache: tuple[_State, Tensor, int] | None = None

    extra_repr = nn.Conv2d.extra_repr

    # --- to be given by a subclass -------------------------------------------

    @abstractmethod
    def squeeze(self, dtype: torch.dtype | None = None) -> Tensor:
        """Generate the kernel from the branches.

        Args:
            dtype: Type to compute in; the parameters' own by default.

        Returns:
            Kernel of shape `(o, i, k, k)` in that type.
        """

    @abstractmethod
    def reset_branches(self) -> None:
        """Draw the branch weights and set the scaling vectors anew."""

    # --- as a convolution ----------------------------------------------------

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise all parameters: the branches, and the bias as `Conv2d` does."""
        self.reset_branches()
        if self.bias is not None:
            fan_in = self.in_channels // self.groups * self.kernel_size[0] * self.kernel_size[1]
            bound = 1 / math.sqrt(fan_in)
            nn.init.uniform_(self.bias, -bound, bound)

    def init_weights(self) -> None:
        """The name under which MMEngine and MMCV ask a layer to initialise itself."""
        self.reset_parameters()

    @property
    def weight(self) -> Tensor:
        """The generated kernel, `(o, i, k, k)`, in the dtype of the parameters."""
        if self.training or self._gradient_can_flow() or _is_recorded():
            return self._generate()
        state = _State.of(self)
        if state is None:
            return self._generate()
        if self._cache is not None:
            cached_state, weight, version = self._cache
            if cached_state.equals(state) and weight._version == version:
                return weight
        # A tensor made in inference mode could not be used outside of it later.
        with torch.inference_mode(False), torch.no_grad():
            weight = self._generate()
        self._cache = (state, weight, weight._version)
        return weight

    def forward(self, x: Tensor) -> Tensor:
        """Convolve.

        Args:
            x: Feature map, `(N, I, H, W)`.

        Returns:
            Feature map, `(N, o, H', W')`, sizes as of `torch.nn.Conv2d`.
        """
        return nn.Conv2d._conv_forward(self, x, self.weight, self.bias)

    # --- re-parameterization -------------------------------------------------

    def equivalent_kernel_bias(self) -> tuple[Tensor, Tensor | None]:
        """The one convolution that this block equals, computed in float64.

        Returns:
            Kernel `(o, i, k, k)` and bias `(o,)` or None, in float64.
        """
        with torch.no_grad(), _full_precision(self._reference().device):
            bias = None if self.bias is None else self.bias.double()
            return self.squeeze(torch.float64), bias

    def to_conv2d(self) -> nn.Conv2d:
        """Build the stock convolution that this block equals.

        Dtype, device, memory format, training flag and `requires_grad` are kept.

        Returns:
            A new `torch.nn.Conv2d`; this layer is left as it is.
        """
        reference = self._reference()
        kernel, bias = self.equivalent_kernel_bias()
        trainable = any(parameter.requires_grad for parameter in self.parameters())
        conv = nn.Conv2d(self.in_channels, self.out_channels, self.kernel_size, self.stride,
                         self.padding, self.dilation, self.groups, bias is not None,
                         self.padding_mode, device='meta')
        memory_format = (torch.channels_last if self._is_channels_last()
                         else torch.contiguous_format)
        conv.weight = nn.Parameter(
            kernel.to(reference.dtype).contiguous(memory_format=memory_format), trainable)
        if bias is not None:
            conv.bias = nn.Parameter(bias.to(reference.dtype), trainable)
        conv.reparameterized = True  # tells a second conversion that there was a first
        return conv.train(self.training)

    # --- the cache of the kernel ---------------------------------------------

    def train(self, mode: bool = True) -> ReparamConv2d:
        """Set the mode as any module does; the kernel of a frozen layer is kept.

        Training loops call this at every iteration, and frozen stages are put
        back into eval mode: they shall be squeezed once.
        """
        if any(parameter.requires_grad for parameter in self.parameters()):
            self._cache = None
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> ReparamConv2d:
        self._cache = None
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        self._cache = None
        plain = {f'{prefix}weight', f'{prefix}bias'}
        if f'{prefix}weight' in state_dict and not (
                self.state_dict(prefix=prefix).keys() - plain) & state_dict.keys():
            # A runner would only warn, and go on with random weights.
            raise RuntimeError(
                f'{prefix[:-1]} is in training form ({type(self).__name__}), but the checkpoint '
                f'holds a plain convolution ({prefix}weight): it is a deployed or a stock '
                'checkpoint. Load it into the stock backbone (or deploy=True), or give a '
                'checkpoint in training form.')
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __getstate__(self) -> dict:
        """Copies and pickles start without a cached kernel."""
        return {**self.__dict__, '_cache': None}

    def _generate(self) -> Tensor:
        """Squeeze in float32 at least, also under autocast; return in our own dtype."""
        reference = self._reference()
        with _full_precision(reference.device):
            kernel = self.squeeze(torch.promote_types(reference.dtype, torch.float32))
        return kernel.to(reference.dtype)

    def _gradient_can_flow(self) -> bool:
        return torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())

    @abstractmethod
    def _reference(self) -> Tensor:
        """A branch parameter: its dtype and device are those of the layer."""

    def _is_channels_last(self) -> bool:
        return any(p.dim() == 4 and p.is_contiguous(memory_format=torch.channels_last)
                   and not p.is_contiguous() for p in self.parameters())


def _is_recorded() -> bool:
    """Whether a compiler, tracer or CUDA graph records what runs: then nothing may be kept."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing() or (
        torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())


@dataclass(frozen=True)
class _State:
    """What a generated kernel depends on.

    Attributes:
        tensors: All parameters and buffers, as (alias, address, version). The
            alias keeps the storage alive, so that an address cannot come back
            for other content.
        checksum: A weighted sum of every row of every branch parameter, which
            also sees what was written through `parameter.data`.
    """

    tensors: list[tuple[Tensor, int, int]]
    checksum: Tensor

    @classmethod
    def of(cls, layer: nn.Module) -> _State | None:
        """The present state; None where a tensor tells no version or address."""
        branches = [p.detach().flatten(1) for p in layer.parameters() if p.dim() > 1]
        if not branches or branches[0].is_meta or any(type(b) is not Tensor for b in branches):
            return None  # a replica, no content, or a subclass that may hide it
        try:
            tensors = [(tensor.detach(), tensor.data_ptr(), tensor._version)
                       for tensor in (*layer.parameters(), *layer.buffers())]
        except RuntimeError:  # inference tensors, tensors inside torch.func transforms
            return None
        with torch.no_grad(), _full_precision(branches[0].device):
            checksum = torch.cat([
                rows @ torch.linspace(1, 2, rows.shape[1], dtype=rows.dtype, device=rows.device)
                for rows in branches])
        return cls(tensors, checksum)

    def equals(self, other: _State) -> bool:
        return len(self.tensors) == len(other.tensors) and all(
            one[1:] == two[1:] and one[0].shape == two[0].shape
            for one, two in zip(self.tensors, other.tensors)
        ) and torch.equal(self.checksum, other.checksum)
