"""What turns a stock OpenMMLab ResNet into its OREPA version."""

from __future__ import annotations

from typing import Any

from torch import nn

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
        return super().make_res_layer(**kwargs)

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


