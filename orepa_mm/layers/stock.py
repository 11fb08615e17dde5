"""Stock convolutions built from generated kernels."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def conv2d_like(layer: nn.Module, kernel: Tensor, bias: Tensor | None, reference: Tensor
                ) -> nn.Conv2d:
    """Build a stock convolution with the geometry of a layer, and a kernel of its own.

    Args:
        layer: What the convolution comes from: its stride, padding, dilation,
            groups, memory format, training flag, and whether anything in it is
            trainable.
        kernel: `(o, i, k, k)`, any dtype and device.
        bias: `(o,)` or None.
        reference: Its dtype and device are those of the result.

    Returns:
        A new `torch.nn.Conv2d`, marked as `reparameterized`.
    """
    trainable = any(parameter.requires_grad for parameter in layer.parameters())
    geometry = {name: getattr(layer, name) for name in (
        'kernel_size', 'stride', 'padding', 'dilation', 'groups', 'padding_mode')}
    conv = nn.Conv2d(kernel.shape[1] * geometry['groups'], kernel.shape[0],
                     bias=bias is not None, device='meta', **geometry)
    channels_last = any(
        p.dim() == 4 and p.is_contiguous(memory_format=torch.channels_last)
        and not p.is_contiguous() for p in layer.parameters())
    conv.weight = nn.Parameter(kernel.to(reference.dtype).to(reference.device).contiguous(
        memory_format=torch.channels_last if channels_last else torch.contiguous_format), trainable)
    if bias is not None:
        conv.bias = nn.Parameter(bias.to(reference.dtype).to(reference.device), trainable)
    conv.reparameterized = True  # type: ignore[assignment]  # tells a second conversion of a first
    return conv.train(layer.training)
