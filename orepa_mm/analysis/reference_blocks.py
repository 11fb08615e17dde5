"""OREPA as the authors write it: one operation per branch. What ours is measured against.

Source: Hu et al., "Online Convolutional Re-parameterization", CVPR 2022
(arXiv 2204.00826), and the shape of the authors' implementation: every branch
becomes a whole kernel, is scaled by itself, and is added. Nothing here uses the
squeeze functions of `orepa_mm.layers`, so that the two can be compared.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers import DBBConv2d, ReparamConv2d

#: What the authors' names of a block's branches begin with.
_PREFIXES = ('weight_orepa_', 'weight_rbr_', 'weight_online_', 'weight_or1x1_')


class ReferenceConv2d(nn.Module):
    """A convolution whose kernel is generated branch by branch, at every call.

    Args:
        layer: An OREPA layer of ours, any block; its parameters are used, not copied.

    Attributes:
        layer: That layer.

    Raises:
        TypeError: If the layer is no OREPA block.
    """

    def __init__(self, layer: ReparamConv2d) -> None:
        super().__init__()
        self.layer = layer
        padding_mode = getattr(layer, 'padding_mode', 'zeros')  # a generator has none
        if padding_mode != 'zeros':
            raise ValueError(f'the authors pad with zeros, got {padding_mode!r}')
        names = [name for name, _ in layer.named_parameters()]
        generators = getattr(layer, 'generators', [])
        self.generators = nn.ModuleList(map(ReferenceConv2d, generators))
        self.prefix = next((prefix for prefix in _PREFIXES if f'{prefix}origin' in names), None)
        if self.prefix is None and not generators:
            raise TypeError(f'{type(layer).__name__} is no OREPA block')
        if self.prefix in _PREFIXES[:3]:
            o, k = layer.out_channels, layer.kernel_size[0]
            options = dict(dtype=layer.vector.dtype, device=layer.vector.device)
            # in float32 first: checkpoints hold it so
            self.register_buffer('average', torch.full((k, k), 1 / k**2).to(**options))
            self.register_buffer('prior', _prior(o, k).to(**options))
            first = self._branch('1x1_kxk_idconv1')
            if first is not None:
                t, i = first.shape[:2]
                self.register_buffer(
                    'identity', torch.eye(i, **options).repeat(math.ceil(t / i), 1)[:t])

    def _branch(self, name: str) -> Tensor | None:
        return getattr(self.layer, f'{self.prefix}{name}', None)

    def kernel(self) -> Tensor:
        """The kernel, `(o, i, k, k)`, in the dtype of the parameters."""
        if self.prefix is None:
            return self._stem_kernel()
        return self._pointwise_kernel() if self.prefix == _PREFIXES[3] else self._kxk_kernel()

    def forward(self, x: Tensor) -> Tensor:
        """Convolve.

        Args:
            x: Feature map, `(N, I, H, W)`.

        Returns:
            Feature map, `(N, o, H', W')`.
        """
        layer = self.layer
        return F.conv2d(x, self.kernel(), layer.bias, layer.stride, layer.padding,
                        layer.dilation, layer.groups)

    def _stem_kernel(self) -> Tensor:
        first, *others = (generator.kernel() for generator in self.generators)
        kernel = first.transpose(0, 1)
        for other in others:
            kernel = F.conv2d(kernel, other, padding=2)
        return kernel.transpose(0, 1)

    def _pointwise_kernel(self) -> Tensor:
        scales, groups = self.layer.vector, self.layer.groups
        first, second = self._branch('l2i_conv1'), self._branch('l2i_conv2')
        if groups == 1:
            product = torch.einsum('tihw,othw->oihw', first, second)
        else:
            product = torch.einsum('gti,got->goi', first.view(groups, -1, first.shape[1]),
                                   second.view(groups, -1, second.shape[1]))
            product = product.reshape(self.layer.kernel_shape)
        return (torch.einsum('oihw,o->oihw', self._branch('origin'), scales[0])
                + torch.einsum('oihw,o->oihw', product, scales[1]))

    def _kxk_kernel(self) -> Tensor:
        scales, k = self.layer.vector, self.layer.kernel_shape[-1]
        origin = torch.einsum('oihw,o->oihw', self._branch('origin'), scales[0])
        average = torch.einsum('oi,hw->oihw', self._branch('avg_conv').flatten(1), self.average)
        average = torch.einsum('oihw,o->oihw', average, scales[1])
        prior = torch.einsum('oi,ohw->oihw', self._branch('pfir_conv').flatten(1), self.prior)
        prior = torch.einsum('oihw,o->oihw', prior, scales[2])
        sequential = torch.einsum('oihw,o->oihw', self._sequential(), scales[3])
        kernel = origin + average + prior + sequential
        pointwise = self._branch('1x1')
        if pointwise is not None:
            pointwise = F.pad(pointwise, [k // 2] * 4)
            kernel = kernel + torch.einsum('oihw,o->oihw', pointwise, scales[4])
        separable = self._separable()
        kernel = kernel + torch.einsum('oihw,o->oihw', separable,
                                       scales[4 if pointwise is None else 5])
        if self.prefix == _PREFIXES[2] and len(scales) == 7:  # not the authors': written alike
            copied = torch.eye(kernel.shape[1]).to(scales).repeat(self.layer.groups, 1)
            copied = F.pad(copied[:, :, None, None], [k // 2] * 4)
            kernel = kernel + torch.einsum('oihw,o->oihw', copied, scales[6])
        return kernel

    def _sequential(self) -> Tensor:
        first, groups = self._branch('1x1_kxk_idconv1'), self.layer.groups
        first = (self._branch('1x1_kxk_conv1').flatten(1) if first is None
                 else first.flatten(1) + self.identity)
        second = self._branch('1x1_kxk_conv2')
        if groups == 1:
            return torch.einsum('ti,othw->oihw', first, second)
        second = second.view(groups, -1, *second.shape[1:])
        kernel = torch.einsum('gti,gothw->goihw', first.view(groups, -1, first.shape[1]), second)
        return kernel.reshape(self.layer.kernel_shape)

    def _separable(self) -> Tensor:
        o, i, k, _ = self.layer.kernel_shape
        groups = self.layer.groups
        depthwise = self._branch('gconv_dw').view(groups, i, -1, k, k)
        pointwise = self._branch('gconv_pw').view(o // groups, groups, i, -1)
        return torch.einsum('githw,ogit->goihw', depthwise, pointwise).reshape(o, i, k, k)


def as_published(model: nn.Module) -> nn.Module:
    """Replace every OREPA layer by one that generates its kernel as the authors do, in place.

    Args:
        model: Any module that is no such layer itself; Diverse Branch Blocks are left alone.

    Returns:
        The model.
    """
    for name, child in list(model.named_children()):
        if isinstance(child, ReparamConv2d) and not isinstance(child, DBBConv2d):
            setattr(model, name, ReferenceConv2d(child))
        else:
            as_published(child)
    return model


def _prior(out_channels: int, kernel_size: int) -> Tensor:
    """The frequency prior, `(o, k, k)`, float32: cosines along the height, then the width."""
    half, positions = out_channels / 2, torch.arange(kernel_size, dtype=torch.float64) + 0.5
    prior = torch.empty(out_channels, kernel_size, kernel_size, dtype=torch.float64)
    for channel in range(out_channels):
        if channel < half:
            wave = torch.cos(math.pi * positions * (channel + 1) / kernel_size)
            prior[channel] = wave[:, None]
        else:
            prior[channel] = torch.cos(math.pi * positions * (channel + 1 - half) / kernel_size)
    return prior.float()
