"""What turns a stock OpenMMLab ResNet into its OREPA version."""

from __future__ import annotations

from typing import Any

from mmcv.cnn import build_conv_layer
from torch import nn

from ..checkpoints import load_pretrained
from ..layers import replace_with_conv2d


class OREPABackboneMixin:
    """Build the stock backbone beside it with OREPA convolutions.

    Put before the stock class: `class OREPAResNet(OREPABackboneMixin, ResNet)`.
    Every option of the stock class is kept. As in the authors' networks, the
    shortcut of a BasicBlock stays a plain 1 x 1 convolution.

    Args:
        *args: As of the stock class.
        deploy: Build the stock network, for re-parameterized weights.
        conv_cfg: The conv layer type and its options;
            `dict(type='OREPA')` by default.
        **kwargs: As of the stock class.
    """

    #: Name under which the deployed form is registered, without this package.
    stock_type: str

    def __init__(self, *args: Any, deploy: bool = False, conv_cfg: dict | None = None,
                 **kwargs: Any) -> None:
        conv_cfg = None if deploy else {'type': 'OREPA', **(conv_cfg or {})}
        super().__init__(*args, conv_cfg=conv_cfg, **kwargs)
        self.deploy = deploy

    def make_res_layer(self, **kwargs: Any) -> nn.Module:
        """Build a stage; a BasicBlock's only 1 x 1 convolution is its shortcut."""
        conv_cfg = kwargs['conv_cfg']
        if conv_cfg is not None and conv_cfg['type'] == 'OREPA' and kwargs['block'].expansion == 1:
            kwargs['conv_cfg'] = {**conv_cfg, 'pointwise': False}
        if conv_cfg is None or kwargs.get('dcn') is None:
            return super().make_res_layer(**kwargs)
        # The stock block refuses a conv_cfg beside deformable convolutions, which stay.
        stage = super().make_res_layer(**{**kwargs, 'conv_cfg': None})
        for block in stage:
            _replace_convs(block, conv_cfg)
            if block.downsample is not None:
                _replace_convs(block.downsample, conv_cfg)
        return stage

    def init_weights(self) -> None:
        """Initialise as the stock class does, but load pretrained weights strictly."""
        init_cfg = self.init_cfg
        if isinstance(init_cfg, dict) and init_cfg.get('type') == 'Pretrained':
            load_pretrained(self, init_cfg['checkpoint'], init_cfg.get('prefix'))
            self._is_init = True
        else:
            super().init_weights()

    def switch_to_deploy(self) -> None:
        """Re-parameterize in place: afterwards this is the stock network.

        A second call does nothing.
        """
        replace_with_conv2d(self)
        self.deploy = True

    def train(self, mode: bool = True) -> OREPABackboneMixin:
        """Set the mode; returns itself, as the stock class forgets to."""
        super().train(mode)
        return self

    def _freeze_stages(self) -> None:
        super()._freeze_stages()
        if self.frozen_stages >= 0 and not self.deep_stem:
            self.conv1.eval()  # lets the frozen stem keep its generated kernel

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        if self.deploy and any(key.startswith(prefix) and key.endswith('.vector')
                               for key in state_dict):
            raise RuntimeError(
                f'{type(self).__name__}(deploy=True) is in deploy form, but the checkpoint holds '
                'its training form (scaling vectors and branches). Re-parameterize the checkpoint '
                'with tools/reparam.py, or build the backbone without deploy=True.')
        super()._load_from_state_dict(state_dict, prefix, *args)


def _replace_convs(block: nn.Module, conv_cfg: dict) -> None:
    """Build the plain convolutions right below `block` anew, of another type."""
    for name, conv in list(block.named_children()):
        if type(conv) is nn.Conv2d:
            setattr(block, name, build_conv_layer(
                conv_cfg, conv.in_channels, conv.out_channels, conv.kernel_size,
                stride=conv.stride, padding=conv.padding, dilation=conv.dilation,
                groups=conv.groups, bias=conv.bias is not None))
