"""The conv layer type `OREPA`: what `conv_cfg=dict(type='OREPA')` builds."""

from __future__ import annotations

from typing import Any

from mmengine.registry import MODELS
from torch import nn
from torch.nn.modules.utils import _pair

from .base import ReparamConv2d
from .orepa import OREPAConv1x1, OREPAConv2d, OREPAStemConv2d

#: Kernels from this size on are composed as a linear deep stem.
STEM_KERNEL_SIZE = 7


@MODELS.register_module(name='OREPA')
def build_orepa_conv(
    in_channels: int,
    out_channels: int,
    kernel_size: int | tuple[int, int],
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    bias: bool = True,
    *,
    pointwise: bool = True,
    **kwargs: Any,
) -> ReparamConv2d | nn.Conv2d:
    """Build the OREPA block for a convolution, chosen by kernel size as the authors do.

    1 x 1 gives `OREPAConv1x1`; 7 x 7 and larger the linear deep stem, unless it
    is grouped; every other odd kernel `OREPAConv2d`.

    Args:
        in_channels: `I`.
        out_channels: `o`.
        kernel_size: `k`, odd.
        stride: As of `torch.nn.Conv2d`.
        padding: As of `torch.nn.Conv2d`.
        dilation: As of `torch.nn.Conv2d`.
        groups: `g`.
        bias: Whether to add a learnable bias.
        pointwise: Whether 1 x 1 convolutions become OREPA blocks as well. The
            authors leave the shortcut of a BasicBlock plain.
        **kwargs: `padding_mode`, `device`, `dtype` as of `torch.nn.Conv2d`, and
            the options of the blocks, which come from `conv_cfg`:
            `single_init`, `init_hyper_gamma`, `init_hyper_para`.

    Returns:
        The layer; a plain `nn.Conv2d` for 1 x 1 where `pointwise` is false.

    Raises:
        ValueError: If there is no OREPA block for this kernel.
    """
    height, width = _pair(kernel_size)
    if height != width or height % 2 == 0:
        raise ValueError(f"conv_cfg=dict(type='OREPA') needs odd square kernels, but a "
                         f'convolution with kernel_size={kernel_size} was asked for. Leave the '
                         'module that asks for it without this conv_cfg.')
    if height == 1:
        if not pointwise:
            for option in ('single_init', 'init_hyper_gamma', 'init_hyper_para'):
                kwargs.pop(option, None)
            layer = nn.Conv2d
        else:
            layer = OREPAConv1x1
    elif height >= STEM_KERNEL_SIZE and groups == 1:
        layer = OREPAStemConv2d
    else:
        layer = OREPAConv2d
    return layer(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias,
                 **kwargs)
