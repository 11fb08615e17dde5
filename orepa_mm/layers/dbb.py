"""The Diverse Branch Block, the offline baseline that OREPA is compared with.

Source: Ding et al., "Diverse Branch Block: Building a Convolution as an
Inception-like Unit", CVPR 2021 (arXiv 2103.13425). Parameter names are those
of its authors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from . import squeeze
from .base import ReparamConv2d
from .constants import WithConstants


class DBBConv2d(ReparamConv2d):
    """A `k x k` convolution trained as four convolving branches, each with its own BN.

    Branches: k x k; 1 x 1; 1 x 1 then k x k; 1 x 1 then average. Unlike an
    OREPA block it convolves the feature map once per branch, in training and
    in evaluation, and no BN should follow it. Re-parameterized it is one
    convolution with a bias.

    Args:
        in_channels: `I`.
        out_channels: `o`.
        kernel_size: `k`, odd and larger than 1.
        stride: As of `torch.nn.Conv2d`.
        padding: `dilation * (k // 2)`, which lets all branches see the same place.
        dilation: As of `torch.nn.Conv2d`.
        groups: `g`.
        bias: Whether to add a learnable bias beside those of the BNs.
        padding_mode: `zeros`.
        device: As of `torch.nn.Conv2d`.
        dtype: As of `torch.nn.Conv2d`.
        norm_layer: Builds a branch's BN from its number of channels.

    Attributes:
        dbb_origin: `conv` `(o, i, k, k)` and `bn`.
        dbb_1x1: `conv` `(o, i, 1, 1)` and `bn`.
        dbb_1x1_kxk: `idconv1` `(I, i, 1, 1)`, added to the identity (with one
            channel per group `conv1`, `(2 I, i, 1, 1)`); `bn1`, which pads;
            `conv2` `(o, t/g, k, k)`; `bn2`.
        dbb_avg: `conv` `(o, i, 1, 1)`; `bn`, which pads; `avgbn`, behind the average.

    Raises:
        ValueError: If the kernel, the padding or the norm layer is another.
    """

    #: What the kernel is a sum of, and the convolutions that each of these is a chain of.
    _CHAINS = {'origin': ('origin',), '1x1': ('pointwise',), '1x1-kxk': ('first', 'second'),
               'average': ('average', 'window')}
    #: As of the OREPA blocks.
    branch_names = tuple(_CHAINS)
    #: Ones, where the average is dilated, `(1, 1, k, k)`.
    window: Tensor

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
        *,
        norm_layer: Callable[[int], nn.Module] | None = None,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups,
                         bias, padding_mode, device, dtype)
        i, o, g, k = self.in_channels, self.out_channels, self.groups, self.kernel_size[0]
        margin = tuple(d * (k // 2) for d in self.dilation)
        if k == 1 or self.padding not in (margin, 'same') or self.padding_mode != 'zeros':
            raise ValueError(
                'DBBConv2d needs a kernel larger than 1 x 1 and zero padding of dilation * '
                f'(kernel_size // 2), got kernel_size={kernel_size}, padding={padding}, '
                f'dilation={dilation}, padding_mode={padding_mode!r}')

        def conv(channels: int, out: int, size: int, **kwargs: Any) -> nn.Conv2d:
            return _Branch(channels, out, size, groups=g, bias=False, **kwargs,
                             **self._factory_kwargs)

        def norm(channels: int) -> nn.Module:
            if norm_layer is None:
                return nn.BatchNorm2d(channels, **self._factory_kwargs)
            layer = norm_layer(channels).to(device=device, dtype=dtype)
            if not isinstance(layer, nn.modules.batchnorm._BatchNorm) or any(
                    part is None for part in (layer.running_mean, layer.weight, layer.bias)):
                raise ValueError('DBBConv2d needs batch norm in its branches, with running '
                                 f'statistics, weight and bias, got {layer}')
            return layer

        where = dict(stride=self.stride, dilation=self.dilation)
        # of any type: their layers are found by name
        self.dbb_origin: Any = nn.Sequential()
        self.dbb_origin.add_module('conv', conv(i, o, k, padding=margin, **where))
        self.dbb_origin.add_module('bn', norm(o))
        self.dbb_avg: Any = nn.Sequential()
        self.dbb_avg.add_module('conv', conv(i, o, 1))
        self.dbb_avg.add_module('bn', _BNAndPad(norm(o), margin))
        self.dbb_avg.add_module('avgbn', norm(o))
        self.dbb_1x1: Any = nn.Sequential()
        self.dbb_1x1.add_module('conv', conv(i, o, 1, stride=self.stride))
        self.dbb_1x1.add_module('bn', norm(o))
        self.dbb_1x1_kxk: Any = nn.Sequential()
        hidden = 2 * i if g > 1 and g == o else i
        if hidden == i:
            self.dbb_1x1_kxk.add_module('idconv1', _IdentityConv1x1(i, g, **self._factory_kwargs))
        else:
            self.dbb_1x1_kxk.add_module('conv1', conv(i, hidden, 1))
        self.dbb_1x1_kxk.add_module('bn1', _BNAndPad(norm(hidden), margin))
        self.dbb_1x1_kxk.add_module('conv2', conv(hidden, o, k, **where))
        self.dbb_1x1_kxk.add_module('bn2', norm(o))
        self._register_constants()
        self.reset_parameters()

    def reset_branches(self) -> None:
        """Initialise every layer of the branches as PyTorch does, the identity-based 1 x 1 at 0."""
        for layer in self.modules():
            if isinstance(layer, (_BranchConv2d, nn.modules.batchnorm._BatchNorm)):
                layer.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """Convolve branch by branch.

        Args:
            x: Feature map, `(N, I, H, W)`.

        Returns:
            Feature map, `(N, o, H', W')`.
        """
        average = self.dbb_avg.avgbn(self._averaged(self.dbb_avg.bn(self.dbb_avg.conv(x))))
        y = self.dbb_origin(x) + self.dbb_1x1(x) + average + self.dbb_1x1_kxk(x)
        return y if self.bias is None else y + self.bias.view(-1, 1, 1)

    def __getattr__(self, name: str) -> Any:
        if name == 'weight':
            raise AttributeError('the kernel of a DBBConv2d comes with a bias and cannot be set: '
                                 'equivalent_kernel_bias() gives both')
        return super().__getattr__(name)

    #: None to be had alone: whoever asks for it is told by `__getattr__`.
    weight = property(lambda self: self.__getattr__('weight'))

    def squeeze(self, dtype: torch.dtype | None = None, device: torch.device | None = None
                ) -> Tensor:
        """The kernel with the running statistics of the BNs, `(o, i, k, k)`, without gradients."""
        return self._squeeze_with_bias(dtype or self._reference().dtype, device)[0]

    def equivalent_kernel_bias(self) -> tuple[Tensor, Tensor]:
        """The one convolution that this block equals in eval mode; see the base class."""
        device = self._exact_device()
        kernel, bias = self._squeeze_with_bias(torch.float64, device)
        return kernel, bias if self.bias is None else bias + self.bias.to(device).double()

    @torch.no_grad()
    def branch_kernels(self, scaled: bool = True, dtype: torch.dtype = torch.float64
                       ) -> dict[str, Tensor]:
        """What each branch adds to the kernel, `(o, i, k, k)` each; their sum is the kernel.

        Args:
            scaled: Whether the BNs of a branch are folded in, with their running
                statistics: they are to this block what scaling vectors are to
                OREPA. Without it the branches are what their convolutions alone
                compute.
            dtype: Type to compute in.
        """
        convolutions = self._convolutions(dtype, self._exact_device(), scaled)
        nothing = {name: (torch.zeros_like(kernel), torch.zeros_like(bias))
                   for name, (kernel, bias) in convolutions.items()}
        found = {}
        for branch, chain in self._CHAINS.items():
            alone = {**nothing, **{name: convolutions[name] for name in chain}}
            found[branch] = squeeze.dbb_kernel_bias(**alone, groups=self.groups)[0]
        return found

    @torch.no_grad()
    def _squeeze_with_bias(self, dtype: torch.dtype, device: torch.device | None
                           ) -> tuple[Tensor, Tensor]:
        return squeeze.dbb_kernel_bias(**self._convolutions(dtype, device), groups=self.groups)

    def _convolutions(self, dtype: torch.dtype, device: torch.device | None,
                      with_norm: bool = True) -> dict[str, tuple[Tensor, Tensor]]:
        """Kernel and bias of every convolution of the branches, as the squeeze takes them."""
        def fused(kernel: Tensor, bn: nn.Module) -> tuple[Tensor, Tensor]:
            if not with_norm:
                kernel = kernel.to(device or kernel.device).to(dtype)
                return kernel, kernel.new_zeros(len(kernel))
            return _fuse(kernel, bn, dtype, device or kernel.device)

        first, k = next(self.dbb_1x1_kxk.children()), self.kernel_size[0]
        first = first.kernel if isinstance(first, _IdentityConv1x1) else first.weight
        average = self.dbb_avg.conv.weight
        return dict(
            origin=fused(self.dbb_origin.conv.weight, self.dbb_origin.bn),
            pointwise=fused(self.dbb_1x1.conv.weight, self.dbb_1x1.bn),
            first=fused(first, self.dbb_1x1_kxk.bn1.bn),
            second=fused(self.dbb_1x1_kxk.conv2.weight, self.dbb_1x1_kxk.bn2),
            average=fused(average, self.dbb_avg.bn.bn),
            window=fused(average.new_full((len(average), 1, k, k), 1 / k**2), self.dbb_avg.avgbn))

    def _make_constants(self) -> dict[str, Tensor]:
        return {} if self.dilation == (1, 1) else {'window': torch.ones(1, 1, *self.kernel_size)}

    def _averaged(self, y: Tensor) -> Tensor:
        """An average pooling that can be dilated, `(N, o, H, W)` to `(N, o, H', W')`."""
        if self.dilation == (1, 1):
            return F.avg_pool2d(y, self.kernel_size, self.stride)
        window = self.window.to(y.dtype).expand(self.out_channels, -1, -1, -1)
        return F.conv2d(y, window, None, self.stride, 0, self.dilation,
                        self.out_channels) / self.kernel_size[0] ** 2

    def _reference(self) -> Tensor:
        return self.dbb_origin.conv.weight


class _BranchConv2d(nn.Conv2d):
    """A convolution of a branch."""


class _Branch(_BranchConv2d):
    """The same, not to be found by MMEngine's rules for `Conv2d`: they compare names of bases.

    The BN of a branch takes the scale of its kernel away, so that such a rule has no meaning.
    """


class _IdentityConv1x1(WithConstants, _BranchConv2d):
    """A 1 x 1 convolution whose kernel is added to the identity."""

    identity: Tensor

    def __init__(self, channels: int, groups: int, device: torch.device | str | None,
                 dtype: torch.dtype | None) -> None:
        super().__init__(channels, channels, 1, groups=groups, bias=False, device=device,
                         dtype=dtype)
        self._factory_kwargs = {'device': device, 'dtype': dtype}
        self._register_constants()

    def _reference(self) -> Tensor:
        return self.weight

    def _make_constants(self) -> dict[str, Tensor]:
        return {'identity': squeeze.identity_pointwise(*self.weight.shape[:2])}

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)

    @property
    def kernel(self) -> Tensor:
        return self.weight + self.identity.to(self.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.kernel, groups=self.groups)


class _BNAndPad(nn.Module):
    """A BN that pads with what it makes of zero, so that the border stays one kernel's."""

    def __init__(self, bn: Any, margin: tuple[int, ...]) -> None:
        super().__init__()
        self.bn = bn
        self.margin = margin

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(x)
        scale = self.bn.weight.detach() / torch.sqrt(self.bn.running_var + self.bn.eps)
        value = self.bn.bias.detach() - self.bn.running_mean * scale
        (top, left), (height, width) = self.margin, y.shape[-2:]
        padded = value.to(y.dtype).view(1, -1, 1, 1).repeat(
            len(y), 1, height + 2 * top, width + 2 * left)
        padded[:, :, top:top + height, left:left + width] = y
        return padded


def _fuse(kernel: Tensor, bn: Any, dtype: torch.dtype, device: torch.device
          ) -> tuple[Tensor, Tensor]:
    """Kernel and bias of a convolution with its BN."""
    kernel, mean, variance, weight, bias = (
        tensor.to(device).to(dtype)
        for tensor in (kernel, bn.running_mean, bn.running_var, bn.weight, bn.bias))
    return fuse_conv_bn_weights(kernel, None, mean, variance, bn.eps, weight, bias)
