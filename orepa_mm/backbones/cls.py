"""The re-parameterizable backbones for MMPretrain; `OREPARepVGG` serves all three packages."""

from __future__ import annotations

from typing import Any

import torch
from mmpretrain.models.backbones import RepVGG, ResNet, ResNetV1c, ResNeXt
from mmpretrain.models.backbones.repvgg import RepVGGBlock
from mmpretrain.registry import MODELS
from torch import Tensor, nn

from ..layers import replace_with_conv2d
from .mixin import DBBMixin, OREPAMixin, ReparamBackboneMixin


@MODELS.register_module()
class OREPAResNet(OREPAMixin, ResNet):
    """MMPretrain's `ResNet` (18, 34, 50, 101, 152) with OREPA convolutions.

    Wide ones by `base_channels` and `stem_channels`. Arguments: those of the
    stock class, and `deploy` and `conv_cfg` as of `ReparamBackboneMixin`.
    """

    stock_type = 'ResNet'


@MODELS.register_module()
class OREPAResNetV1c(OREPAMixin, ResNetV1c):
    """MMPretrain's `ResNetV1c`, whose stem is three 3 x 3, with OREPA convolutions.

    Arguments: as of `OREPAResNet`.
    """

    stock_type = 'ResNetV1c'


@MODELS.register_module()
class OREPAResNeXt(OREPAMixin, ResNeXt):
    """MMPretrain's `ResNeXt` (50, 101, 152) with OREPA convolutions.

    Arguments: as of `OREPAResNet`.
    """

    stock_type = 'ResNeXt'


@MODELS.register_module()
class DBBResNet(DBBMixin, ResNet):
    """MMPretrain's `ResNet` with Diverse Branch Blocks, the offline baseline.

    Arguments: as of `OREPAResNet`.
    """

    stock_type = 'ResNet'


@MODELS.register_module()
class OREPARepVGG(ReparamBackboneMixin, RepVGG):
    """MMPretrain's `RepVGG` whose 3 x 3 convolutions are OREPA blocks.

    The 1 x 1 and identity branches of every block, squeeze-and-excitation,
    groups and dilation stay as they are. It is found from the configs of
    MMDetection and MMSegmentation as well.

    Arguments: as of `OREPAResNet`; `deploy` builds one 3 x 3 convolution with a
    bias per block.
    """

    stock_type = 'mmpretrain.RepVGG'
    stock_has_deploy = True
    default_conv_cfg = {'type': 'OREPA', 'block': 'repvgg', 'pointwise': False}
    training_key = '.vector'

    def __init__(self, *args: Any, deploy: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, deploy=deploy, **kwargs)
        if deploy:
            self.switch_to_deploy()  # keeps squeeze-and-excitation

    @classmethod
    def stock_cfg(cls, cfg: dict) -> dict:
        """The config of the deployed form; see the base class.

        Raises:
            ValueError: If there is squeeze-and-excitation, which the stock
                class leaves out in its deploy form.
        """
        arch = cfg['arch']
        if (cls.arch_settings[arch] if isinstance(arch, str) else arch).get('se_cfg'):
            raise ValueError(
                f"MMPretrain's RepVGG leaves squeeze-and-excitation out in its deploy form, so "
                f'there is no stock config for arch={arch!r}. Re-parameterize the model in your '
                'own code (orepa_mm.reparameterize), and build it with deploy=True')
        return {**super().stock_cfg(cfg), 'deploy': True}

    def switch_to_deploy(self) -> None:
        """Re-parameterize in place: afterwards every block is one convolution with a bias.

        A second call does nothing.
        """
        for parent in list(self.modules()):
            for name, block in list(parent.named_children()):
                if isinstance(block, RepVGGBlock):
                    deploy_repvgg_block(block)
                    if block.se_layer is not None:
                        setattr(parent, name, _ExcitedBlock(block))
        super().switch_to_deploy()  # what else there may be: the pooling block of YOLOX-PAI


class _ExcitedBlock(nn.Module):
    """A deployed block with the squeeze-and-excitation that the stock one leaves out."""

    def __init__(self, block: RepVGGBlock) -> None:
        super().__init__()
        self.branch_reparam, self.se_layer, self.act = (
            block.branch_reparam, block.se_layer, block.act)
        self.train(block.training)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.se_layer(self.branch_reparam(x)))


def deploy_repvgg_block(block: RepVGGBlock) -> None:
    """Fuse the branches in place by the stock block's own method, in float64.

    As it is, that method would build OREPA layers anew, forget the training
    flag and `requires_grad`, and refuse SyncBN.

    Args:
        block: MMPretrain's, with or without OREPA layers in it.
    """
    if block.deploy:
        return
    dtype = next(block.parameters()).dtype
    trainable = any(parameter.requires_grad for parameter in block.parameters())
    excitation = {} if block.se_layer is None else {
        parameter: parameter.requires_grad for parameter in block.se_layer.parameters()}
    block.double()
    replace_with_conv2d(block)
    if block.norm_cfg['type'] == 'SyncBN':
        block.norm_cfg = {**block.norm_cfg, 'type': 'BN'}
    with torch.no_grad():
        block.switch_to_deploy()
    block.to(dtype)
    block.branch_reparam.requires_grad_(trainable)
    for parameter, requires_grad in excitation.items():
        parameter.requires_grad_(requires_grad)
    block.train(block.training)
