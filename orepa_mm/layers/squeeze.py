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


def centre_window(kernel_size: int) -> Tensor:
    """The window of a 1 x 1 kernel inside a larger one: one at the centre, zero around it.

    Args:
        kernel_size: `k`, odd.

    Returns:
        Float32 tensor of shape `(k, k)`.
    """
    at_centre = torch.arange(kernel_size) == kernel_size // 2
    return (at_centre[:, None] & at_centre).float()


# --- one function per block -------------------------------------------------------


def orepa_kernel(
    *, origin: Tensor, average: Tensor, prior: Tensor, first: Tensor, second: Tensor,
    pointwise: Tensor | None, depthwise: Tensor, separable: Tensor, scales: Tensor,
    average_window: Tensor, prior_window: Tensor, centre_window: Tensor | None,
    identity: Tensor | None, groups: int = 1,
) -> Tensor:
    """The kernel of an OREPA block: the sum of its branches, each with its scaling vector.

    Args:
        origin: The `k x k` branch, `(o, i, k, k)`.
        average: The 1 x 1 that is averaged, `(o, i, 1, 1)`.
        prior: The 1 x 1 that the frequency prior follows, `(o, i, 1, 1)`.
        first: The 1 x 1 of the 1 x 1 then k x k branch, `(t, i, 1, 1)`.
        second: The k x k of that branch, `(o, t/g, k, k)`.
        pointwise: The 1 x 1 branch, `(o, i, 1, 1)`; None in the block of RepVGG,
            which has such a convolution beside it.
        depthwise: Of the depthwise-separable branch, `(e*I, 1, k, k)`.
        separable: The 1 x 1 of that branch, `(o, e*i, 1, 1)`.
        scales: Scaling vectors, one row per branch: origin, average, prior, 1 x 1
            then k x k, pointwise if there is one, depthwise-separable; `(5 or 6, o)`.
            A further row is not read.
        average_window: `1 / k^2` everywhere, `(k, k)`.
        prior_window: See `frequency_prior`, `(o, k, k)`.
        centre_window: See `centre_window`, `(k, k)`; read if `pointwise` is given.
        identity: Added to `first`, `(t, i, 1, 1)`, or None.
        groups: `g`.

    Returns:
        Kernel of shape `(o, i, k, k)`.
    """
    rows = scales.unbind()
    if pointwise is None:
        for_origin, for_average, for_prior, for_sequential, for_separable = rows[:5]
    else:
        (for_origin, for_average, for_prior, for_sequential, for_pointwise,
         for_separable) = rows[:6]
    if identity is not None:
        first = first + identity
    mixes = [average, prior]
    windows = [for_average.view(-1, 1, 1) * average_window, for_prior.view(-1, 1, 1) * prior_window]
    if pointwise is not None:
        mixes.append(pointwise)
        windows.append(for_pointwise.view(-1, 1, 1) * centre_window)
    kernel = scale_kernel(origin, for_origin)
    kernel = kernel + scale_kernel(squeeze_sequential(first, second, groups), for_sequential)
    kernel = kernel + squeeze_windows(mixes, windows)
    expansion = separable.shape[1] // origin.shape[1]
    return kernel + scale_kernel(
        squeeze_depthwise_separable(depthwise, separable, groups, expansion), for_separable)


def orepa_1x1_kernel(*, origin: Tensor, first: Tensor, second: Tensor, scales: Tensor,
                     groups: int = 1) -> Tensor:
    """The kernel of a 1 x 1 OREPA block: one kernel plus a product of two.

    Args:
        origin: `(o, i, 1, 1)`.
        first: First factor, `(t, i, 1, 1)`.
        second: Second factor, `(o, t/g, 1, 1)`.
        scales: Scaling vectors of both, `(2, o)`.
        groups: `g`.

    Returns:
        Kernel of shape `(o, i, 1, 1)`.
    """
    for_origin, for_product = scales.unbind()
    return scale_kernel(origin, for_origin) + scale_kernel(
        squeeze_sequential(first, second, groups), for_product)


def stem_kernel(kernels: Sequence[Tensor]) -> Tensor:
    """The kernel of the linear deep stem: a chain of 3 x 3 kernels as one large kernel.

    The composition is a cross-correlation in weight space, without a flip, so
    it is the definition of the stem and not a stack of three layers.

    Args:
        kernels: `n` kernels, the first `(o, I, 3, 3)`, the others `(o, o, 3, 3)`.

    Returns:
        Kernel of shape `(o, I, k, k)`, where `k = 2 n + 1`.
    """
    first, *others = kernels
    composed = first.transpose(0, 1)
    for step, kernel in enumerate(others, 1):
        size = 3 + 2 * step  # counted: to a tracer the size of a tensor is a tensor
        composed = (kernel.flatten(1) @ stem_patches(composed)).reshape(
            -1, kernel.shape[0], size, size)
    return composed.transpose(0, 1)


def stem_patches(composed: Tensor) -> Tensor:
    """What the next kernel of a stem is multiplied with: a convolution as a matrix product.

    Args:
        composed: The chain so far, transposed, `(I, o, m, m)`.

    Returns:
        Patches `(I, 9 o, (m + 2)^2)`.
    """
    return F.unfold(composed, 3, padding=2)


def dbb_kernel_bias(
    *, origin: tuple[Tensor, Tensor], pointwise: tuple[Tensor, Tensor],
    first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor],
    average: tuple[Tensor, Tensor], window: tuple[Tensor, Tensor], groups: int = 1,
) -> tuple[Tensor, Tensor]:
    """Kernel and bias of a Diverse Branch Block in eval mode.

    Every argument is a convolution with its BN folded in: kernel and bias `(o,)`.

    Args:
        origin: The `k x k` branch, `(o, i, k, k)`.
        pointwise: The 1 x 1 branch, `(o, i, 1, 1)`.
        first: The 1 x 1 of the 1 x 1 then k x k branch, `(t, i, 1, 1)`.
        second: The k x k of that branch, `(o, t/g, k, k)`.
        average: The 1 x 1 of the average branch, `(o, i, 1, 1)`.
        window: Its average, a depthwise kernel `(o, 1, k, k)`.
        groups: `g`.

    Returns:
        Kernel `(o, i, k, k)` and bias `(o,)`.
    """
    kernel, bias = origin
    margin = kernel.shape[-1] // 2
    kernel = kernel + F.pad(pointwise[0], [margin] * 4)
    kernel = kernel + squeeze_sequential(first[0], second[0], groups)
    kernel = kernel + squeeze_windows([average[0]], [window[0].squeeze(1)])
    return kernel, (bias + pointwise[1]
                    + second[1] + squeeze_bias(first[1], second[0], groups)
                    + window[1] + average[1] * window[0].sum(dim=(1, 2, 3)))


# --- what the blocks are made of -----------------------------------------------------


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
    return (mix @ bank.flatten(2)).reshape(*mix.shape[:2], *bank.shape[2:])


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
    grouped = conv.sum(dim=(2, 3)).reshape(groups, -1, conv.shape[1])  # (g, o/g, t/g)
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
