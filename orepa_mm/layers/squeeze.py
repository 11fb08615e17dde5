"""Squeezing: pure functions from branch weights to one convolution kernel.

Every function takes and returns tensors, is differentiable, and keeps dtype and
device. Shapes use the letters of the paper: `o` output channels, `I` input
channels, `g` groups, `i = I / g`, `k` kernel size, `t` hidden channels.

Source: Hu et al., "Online Convolutional Re-parameterization", CVPR 2022
(arXiv 2204.00826), and the authors' implementation where the paper is silent.
"""

from __future__ import annotations

import math

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


def branch_windows(out_channels: int, kernel_size: int, pointwise: bool) -> Tensor:
    """The windows that follow the 1 x 1 branches: an average, the frequency prior, the centre.

    One for each row of the scaling vectors behind the origin's. The 1 x 1 then
    k x k branch has a row among them but no window: zeros.

    Args:
        out_channels: `o`.
        kernel_size: `k`.
        pointwise: Whether the block has the 1 x 1 branch.

    Returns:
        Float32 tensor of shape `(o, n, k^2)`; `n` is 4, or 2 without that branch.
    """
    area = kernel_size**2
    windows = [torch.full((out_channels, area), 1 / area),
               frequency_prior(out_channels, kernel_size).flatten(1)]
    if pointwise:
        centre = centre_window(kernel_size).flatten().expand(out_channels, area)
        windows += [torch.zeros(out_channels, area), centre]
    return torch.stack(windows, dim=1)


# --- one function per block -------------------------------------------------------


def orepa_kernel(
    *, origin: Tensor, average: Tensor, prior: Tensor, first: Tensor, second: Tensor,
    depthwise: Tensor, separable: Tensor, scales: Tensor, windows: Tensor,
    pointwise: Tensor | None = None, identities: int = 1, groups: int = 1, identity: bool = False,
) -> Tensor:
    """The kernel of an OREPA block: the sum of its branches, each with its scaling vector.

    Args:
        origin: The `k x k` branch, `(o, i, k, k)`.
        average: The 1 x 1 that is averaged, `(o, i, 1, 1)`.
        prior: The 1 x 1 that the frequency prior follows, `(o, i, 1, 1)`.
        first: The 1 x 1 of the 1 x 1 then k x k branch, `(t, i, 1, 1)`.
        second: The k x k of that branch, `(o, t/g, k, k)`.
        depthwise: Of the depthwise-separable branch, `(e*I, 1, k, k)`.
        separable: The 1 x 1 of that branch, `(o, e*i, 1, 1)`. Its OUTPUT axis is
            `(o/g, g)` with the group running fastest, unlike that of an ordinary
            grouped convolution (and of the kernel); the authors' checkpoints need it.
        scales: Scaling vectors, one row per branch: origin, average, prior, 1 x 1
            then k x k, pointwise if there is one, depthwise-separable, identity if there is
            one; `(5 to 7, o)`. A further row is not read.
        windows: See `branch_windows`, `(o, 4 or 2, k^2)`.
        pointwise: The 1 x 1 branch, `(o, i, 1, 1)`; None in the block of RepVGG,
            which has such a convolution beside it.
        identities: How many identity matrices, one below the other, are added to the
            rows of each group in `first`: `t / I`, or 0 if none is.
        groups: `g`.
        identity: Whether the identity is a branch; `o = I`.

    Returns:
        Kernel of shape `(o, i, k, k)`.
    """
    out, i = origin.shape[:2]
    rows, area = windows.shape[1:]
    kernel = origin.contiguous() * scales[0].view(-1, 1, 1, 1)
    bank = windows * scales[1:rows + 1].t().unsqueeze(-1)
    kernel.view(out, i, area).baddbmm_(
        stacked_mixes(average, prior, pointwise).permute(1, 2, 0), bank)
    turned = turn(second, groups)
    factor = first.reshape(groups, -1, i).transpose(1, 2)
    if identities == 0:
        sequential = torch.bmm(factor, turned)
    else:  # what the identities add: the sum of the parts that they copy
        copied = turned if identities == 1 else turned.view(groups, identities, i, -1).sum(1)
        sequential = torch.baddbmm(copied, factor, turned)
    channels = i * groups
    spatial = torch.bmm(separable.reshape(-1, channels, separable.shape[1] // i).transpose(0, 1),
                        depthwise.reshape(channels, -1, area))
    last = 5 if pointwise is not None else 4
    shape = groups, i, out // groups, area
    for matrix, scale in ((sequential, scales[3]), (spatial, scales[last])):
        kernel.view(groups, out // groups, i, area).addcmul_(
            matrix.view(shape).transpose(1, 2), scale.reshape(groups, -1, 1, 1))
    if identity:
        centres = kernel.view(groups, i, i, area)[..., area // 2].diagonal(dim1=1, dim2=2)
        centres.add_(scales[last + 1].view(groups, -1))
    return kernel


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
    out, i = origin.shape[:2]
    kernel = scale_kernel(origin.contiguous(), scales[0])
    kernel.view(groups, -1, i).baddbmm_(
        scale_kernel(second, scales[1]).reshape(groups, out // groups, -1),
        first.reshape(groups, -1, i))
    return kernel


def stem_kernel(**kernels: Tensor) -> Tensor:
    """The kernel of the linear deep stem: a chain of 3 x 3 kernels as one large kernel.

    The composition is a cross-correlation in weight space, without a flip, so
    it is the definition of the stem and not a stack of three layers.

    Args:
        **kernels: `n` kernels in order, the first `(o, I, 3, 3)`, the others `(o, o, 3, 3)`.

    Returns:
        Kernel of shape `(o, I, k, k)`, where `k = 2 n + 1`.
    """
    first, *others = kernels.values()
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
    kernel = kernel + average[0] * window[0]
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


def stacked_mixes(average: Tensor, prior: Tensor, pointwise: Tensor | None) -> Tensor:
    """The 1 x 1 kernels in front of `branch_windows`, `(n, o, i)`.

    Args:
        average: `(o, i, 1, 1)`.
        prior: `(o, i, 1, 1)`.
        pointwise: `(o, i, 1, 1)` or None. In front of the window of zeros any kernel will do.
    """
    mixes = [average, prior] if pointwise is None else [average, prior, average, pointwise]
    return torch.cat(mixes).view(len(mixes), *average.shape[:2])


def turn(kernel: Tensor, groups: int = 1) -> Tensor:
    """A kernel with its input channels first, a matrix per group.

    Args:
        kernel: `(o, c, k, k)`.
        groups: `g`.

    Returns:
        `(g, c, o/g * k^2)`, contiguous.
    """
    out, channels = kernel.shape[:2]
    split = kernel.reshape(groups, out // groups, channels, -1)
    return split.transpose(1, 2).reshape(groups, channels, -1).contiguous()


def turn_back(matrix: Tensor, like: Tensor) -> Tensor:
    """The inverse of `turn`.

    Args:
        matrix: `(g, c, o/g * k^2)`.
        like: A kernel of the shape to return, `(o, c, k, k)`.
    """
    groups, channels = matrix.shape[:2]
    split = matrix.view(groups, channels, like.shape[0] // groups, -1)
    return split.transpose(1, 2).contiguous().view(like.shape)


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
