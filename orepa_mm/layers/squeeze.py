"""Squeezing: pure functions from branch weights to one convolution kernel.

Every function takes and returns tensors, is differentiable, and keeps dtype and
device. Shapes use the letters of the paper: `o` output channels, `I` input
channels, `g` groups, `i = I / g`, `k` kernel size, `t` hidden channels.

Source: Hu et al., "Online Convolutional Re-parameterization", CVPR 2022
(arXiv 2204.00826), and the authors' implementation where the paper is silent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def frequency_prior(out_channels: int, kernel_size: int) -> Tensor:
    """The fixed cosine window of the frequency-prior branch.

    The first half of the channels holds cosines along the height, the second
    half along the width, of a frequency that grows with the channel index.

    Args:
        out_channels: `o`.
        kernel_size: `k`. The paper uses 3; the basis is the same for any `k`.

    Returns:
        Float32 tensor of shape `(o, k, k)`.
    """
    half = out_channels / 2
    channel = torch.arange(out_channels, dtype=torch.float64)
    along_height = channel < half
    frequency = torch.where(along_height, channel + 1, channel + 1 - half)
    position = torch.arange(kernel_size, dtype=torch.float64) + 0.5
    wave = torch.cos(math.pi / kernel_size * frequency[:, None] * position)  # (o, k)
    prior = torch.where(along_height[:, None, None], wave[:, :, None], wave[:, None, :])
    return prior.float()


def identity_pointwise(hidden_channels: int, group_in_channels: int) -> Tensor:
    """A 1 x 1 kernel that copies input channel `r mod i` to hidden channel `r`.

    Args:
        hidden_channels: `t`.
        group_in_channels: `i`.

    Returns:
        Float32 tensor of shape `(t, i, 1, 1)`.
    """
    source = torch.arange(hidden_channels) % group_in_channels
    identity = source[:, None] == torch.arange(group_in_channels)
    return identity.float()[:, :, None, None]


def scale_kernel(kernel: Tensor, scale: Tensor) -> Tensor:
    """Scale the output channels, as the linear scaling layer of a branch does.

    Args:
        kernel: `(o, i, k, k)`.
        scale: One row of the scaling vectors, `(o,)`.

    Returns:
        Kernel of shape `(o, i, k, k)`.
    """
    return kernel * scale.view(-1, 1, 1, 1)


def squeeze_windows(pointwise: Sequence[Tensor], windows: Sequence[Tensor]) -> Tensor:
    """Sum of kernels of 1 x 1 convolutions, each followed by a window per output channel.

    An average, the frequency prior, and no spatial extent at all (a window
    that is one at the centre) are such windows; a scaling vector goes into
    them. One matrix product per output channel serves all branches.

    Args:
        pointwise: `n` kernels of shape `(o, i, 1, 1)`.
        windows: `n` windows of shape `(o, k, k)`.

    Returns:
        Kernel of shape `(o, i, k, k)`.
    """
    mix = torch.cat([weight.flatten(2) for weight in pointwise], dim=2)  # (o, i, n)
    bank = torch.stack(list(windows), dim=1)  # (o, n, k, k)
    return (mix @ bank.flatten(2)).unflatten(2, bank.shape[2:])


def squeeze_sequential(pointwise: Tensor, conv: Tensor, groups: int = 1) -> Tensor:
    """Kernel of a 1 x 1 convolution followed by a `k x k` convolution.

    Args:
        pointwise: First kernel, `(t, i, 1, 1)`.
        conv: Second kernel, `(o, t/g, k, k)`.
        groups: `g`, of both convolutions.

    Returns:
        Kernel of shape `(o, i, k, k)`.
    """
    hidden, group_in = pointwise.shape[:2]
    out, group_hidden, height, width = conv.shape
    first = pointwise.reshape(groups, hidden // groups, group_in)
    second = conv.reshape(groups, out // groups, group_hidden, height, width)
    kernel = torch.einsum('gti,gothw->goihw', first, second)
    return kernel.reshape(out, group_in, height, width)


def squeeze_bias(bias: Tensor, conv: Tensor, groups: int = 1) -> Tensor:
    """What a `k x k` convolution makes of a constant added to its input.

    Args:
        bias: One constant per input channel, `(t,)`.
        conv: Kernel, `(o, t/g, k, k)`.
        groups: `g`.

    Returns:
        One constant per output channel, `(o,)`.
    """
    grouped = conv.sum(dim=(2, 3)).unflatten(0, (groups, -1))  # (g, o/g, t/g)
    return (grouped @ bias.view(groups, -1, 1)).flatten()


def squeeze_depthwise_separable(
    depthwise: Tensor, pointwise: Tensor, groups: int = 1, expansion: int = 8
) -> Tensor:
    """Kernel of a depthwise `k x k` convolution followed by a 1 x 1 convolution.

    The depthwise convolution expands each input channel `e` times. The authors
    split the OUTPUT axis of `pointwise` as `(o/g, g)`, the group running
    fastest, unlike an ordinary grouped convolution; their checkpoints need it.

    Args:
        depthwise: `(e*I, 1, k, k)`.
        pointwise: `(o, e*i, 1, 1)`.
        groups: `g`.
        expansion: `e`.

    Returns:
        Kernel of shape `(o, i, k, k)`.
    """
    out, group_expanded = pointwise.shape[:2]
    group_in = group_expanded // expansion
    height, width = depthwise.shape[-2:]
    spatial = depthwise.reshape(groups, group_in, expansion, height, width)
    mix = pointwise.reshape(out // groups, groups, group_in, expansion)
    kernel = torch.einsum('gbehw,agbe->gabhw', spatial, mix)
    return kernel.reshape(out, group_in, height, width)


def compose_stem(kernels: Sequence[Tensor]) -> Tensor:
    """Kernel of the linear deep stem: a chain of 3 x 3 kernels as one large kernel.

    The composition is a cross-correlation in weight space, without a flip, so
    it is the definition of the stem and not a stack of three layers.

    Args:
        kernels: `n` kernels, the first `(o, I, 3, 3)`, the others `(o, o, 3, 3)`.

    Returns:
        Kernel of shape `(o, I, k, k)`, where `k = 2 n + 1`.
    """
    first, *others = kernels
    composed = first.transpose(0, 1)
    for kernel in others:
        # a convolution as a matrix product: cuDNN's would use TF32 by default
        size = composed.shape[-1] + 2
        patches = F.unfold(composed, kernel.shape[-1], padding=2)  # (I, o*9, size**2)
        composed = (kernel.flatten(1) @ patches).unflatten(2, (size, size))
    return composed.transpose(0, 1)
