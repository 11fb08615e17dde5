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
    conv = nn.Conv2d(kernel.shape[1] * layer.groups, kernel.shape[0], kernel.shape[2:],
                     layer.stride, layer.padding, layer.dilation, layer.groups, bias is not None,
                     layer.padding_mode, device='meta')
    channels_last = any(
        p.dim() == 4 and p.is_contiguous(memory_format=torch.channels_last)
        and not p.is_contiguous() for p in layer.parameters())
    conv.weight = nn.Parameter(kernel.to(reference.dtype).to(reference.device).contiguous(
        memory_format=torch.channels_last if channels_last else torch.contiguous_format), trainable)
    if bias is not None:
        conv.bias = nn.Parameter(bias.to(reference.dtype).to(reference.device), trainable)
    conv.reparameterized = True  # tells a second conversion that there was a first
    return conv.train(layer.training)
