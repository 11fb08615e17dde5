"""The conv layer types `OREPA` and `DBB`: what `conv_cfg=dict(type=...)` builds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn.modules.utils import _pair

from .dbb import DBBConv2d
from .orepa import (
    Branched,
    OREPAConv1x1,
    OREPAConv2d,
    OREPARepVGGConv2d,
    OREPARepVGGOnlineConv2d,
)
from .stem import OREPAStemConv2d

#: Kernels from this size on are composed as a linear deep stem; DBB leaves them plain.
STEM_KERNEL_SIZE = 7
#: The k x k block that goes by each name.
_BLOCKS = {'orepa': OREPAConv2d, 'repvgg': OREPARepVGGConv2d,
           'repvgg_online': OREPARepVGGOnlineConv2d}


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
    block: str = 'orepa',
    compile: bool = False,
    **kwargs: Any,
) -> nn.Conv2d:
    """Build the OREPA block for a convolution, chosen by kernel size as the authors do.

    1 x 1 gives `OREPAConv1x1`; 7 x 7 and larger the linear deep stem, unless it
    is grouped; every other odd kernel `OREPAConv2d`, or the block of RepVGG that is asked for.

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
        block: `orepa`; or `repvgg` for the k x k of the OREPA-RepVGG block,
            which has a 1 x 1 convolution of its own beside it; or `repvgg_online`
            for RepVGG's block as a whole, whose 1 x 1 and identity are branches of
            the kernel.
        compile: Whether to run the squeeze through `torch.compile`: the kernel, not
            the model. The same result, quicker; the first steps take longer.
        **kwargs: `padding_mode`, `device`, `dtype` as of `torch.nn.Conv2d`, and
            the options of the blocks, which come from `conv_cfg`: `start`,
            `single_init`, `init_hyper_gamma`, `init_hyper_para`.

    Returns:
        The layer; a plain `nn.Conv2d` for 1 x 1 where `pointwise` is false.

    Raises:
        ValueError: If there is no OREPA block for this kernel, or of this name.

    Example:
        >>> build_orepa_conv(3, 8, 3, padding=1)
        OREPAConv2d(3, 8, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))
        >>> type(build_orepa_conv(3, 64, 7, padding=3)).__name__
        'OREPAStemConv2d'
    """
    if block not in _BLOCKS:
        raise ValueError(f"conv_cfg=dict(type='OREPA', block={block!r}): there is no such block, "
                         f'choose one of {", ".join(_BLOCKS)}')
    height, width = _pair(kernel_size)
    if height != width or height % 2 == 0:
        raise ValueError(f"conv_cfg=dict(type='OREPA') needs odd square kernels, but a "
                         f'convolution with kernel_size={kernel_size} was asked for. Leave the '
                         'module that asks for it without this conv_cfg.')
    kind: type[nn.Conv2d]
    if height == 1:
        if not pointwise:
            for option in ('start', 'single_init', 'init_hyper_gamma', 'init_hyper_para'):
                kwargs.pop(option, None)
            kind = nn.Conv2d
        else:
            kind = OREPAConv1x1
    elif height >= STEM_KERNEL_SIZE and groups == 1:
        kind = OREPAStemConv2d
    else:
        kind = _BLOCKS[block]
    layer = kind(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias,
                 **kwargs)
    for part in layer.modules():
        if isinstance(part, Branched):
            part.compiled = compile
    return layer


def build_dbb_conv(
    in_channels: int,
    out_channels: int,
    kernel_size: int | tuple[int, int],
    *args: Any,
    norm_layer: Callable[[int], nn.Module] | None = None,
    **kwargs: Any,
) -> nn.Conv2d:
    """Build the Diverse Branch Block for a convolution; 1 x 1 and stems stay plain, as published.

    Args:
        in_channels: `I`.
        out_channels: `o`.
        kernel_size: `k`, odd.
        *args: As of `torch.nn.Conv2d`.
        norm_layer: Builds the BN of a branch from its channels. In a config it is
            `norm_cfg=dict(type='SyncBN')`.
        **kwargs: As of `torch.nn.Conv2d`.

    Returns:
        The layer; a plain `nn.Conv2d` for 1 x 1, and from 7 x 7 on.

    Raises:
        ValueError: If there is no such block for this kernel or padding.
    """
    height, width = _pair(kernel_size)
    if height == width and (height == 1 or height >= STEM_KERNEL_SIZE):
        return nn.Conv2d(in_channels, out_channels, kernel_size, *args, **kwargs)
    return DBBConv2d(in_channels, out_channels, kernel_size, *args, norm_layer=norm_layer, **kwargs)
