"""The conv layer types `OREPA` and `DBB`: what `conv_cfg=dict(type=...)` builds."""

from __future__ import annotations

from typing import Any

from mmcv.cnn import build_norm_layer
from mmengine.registry import MODELS
from torch import nn

from ..layers import build_dbb_conv, build_orepa_conv

MODELS.register_module(name='OREPA', module=build_orepa_conv)


@MODELS.register_module(name='DBB')
def build_dbb(*args: Any, norm_cfg: dict[str, Any] | None = None, **kwargs: Any) -> nn.Conv2d:
    """As `build_dbb_conv`.

    Args:
        *args: Of that function.
        norm_cfg: The BN of the branches, e.g. `dict(type='SyncBN')`.
        **kwargs: Of that function.
    """
    if norm_cfg is not None:
        kwargs['norm_layer'] = lambda channels: build_norm_layer(norm_cfg, channels)[1]
    return build_dbb_conv(*args, **kwargs)
