"""The re-parameterizable backbones for MMPretrain; `OREPARepVGG` serves all three packages."""

from __future__ import annotations

from typing import Any

from mmpretrain.models.backbones import RepVGG, ResNet, ResNet_CIFAR, ResNetV1c, ResNeXt
from mmpretrain.registry import MODELS

from ..errors import CheckpointError
from .mixin import DBBMixin, OREPAMixin, ReparamBackboneMixin
from .repvgg import ExcitedBlock, OnlineRepVGGBlock, deploy_repvgg_block, repvgg_blocks


@MODELS.register_module()
class OREPAResNet(OREPAMixin, ResNet):
    """MMPretrain's `ResNet` (18, 34, 50, 101, 152) with OREPA convolutions.

    Wide ones by `base_channels` and `stem_channels`. Arguments: those of the
    stock class, and `deploy` and `conv_cfg` as of `ReparamBackboneMixin`.
    """

    stock_type = 'ResNet'


@MODELS.register_module()
class OREPAResNet_CIFAR(OREPAMixin, ResNet_CIFAR):
    """MMPretrain's `ResNet_CIFAR`, for images of 32 x 32, with OREPA convolutions.

    Arguments: as of `OREPAResNet`.
    """

    stock_type = 'ResNet_CIFAR'


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
class DBBResNet_CIFAR(DBBMixin, ResNet_CIFAR):
    """MMPretrain's `ResNet_CIFAR` with Diverse Branch Blocks; its stem is a block as well.

    Arguments: as of `OREPAResNet`.
    """

    stock_type = 'ResNet_CIFAR'


@MODELS.register_module()
class OREPARepVGG(ReparamBackboneMixin, RepVGG):
    """MMPretrain's `RepVGG` whose 3 x 3 convolutions are OREPA blocks.

    The 1 x 1 and identity branches of every block stay beside them, each with
    its BN, as published. With `conv_cfg=dict(type='OREPA', block='repvgg_online')`
    they are branches of the generated kernel, and a block is one convolution with
    one BN, see `OnlineRepVGGBlock`. Squeeze-and-excitation, groups and dilation
    stay as they are. It is found from the configs of MMDetection and
    MMSegmentation as well.

    Arguments: as of `OREPAResNet`; `deploy` builds one 3 x 3 convolution with a
    bias per block.
    """

    stock_type = 'mmpretrain.RepVGG'
    stock_has_deploy = True
    default_conv_cfg = {'type': 'OREPA', 'block': 'repvgg', 'pointwise': False}

    def __init__(self, *args: Any, deploy: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, deploy=deploy, **kwargs)
        #: Whether 1 x 1 and identity are branches of the kernel, or stand beside it.
        self.online = not deploy and self.conv_cfg.get('block') == 'repvgg_online'
        if deploy:
            self.switch_to_deploy()  # keeps squeeze-and-excitation
        elif self.online:
            for parent, name, block in repvgg_blocks(self):
                setattr(parent, name, OnlineRepVGGBlock(block))

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
        for parent, name, block in repvgg_blocks(self):
            deploy_repvgg_block(block)
            if block.se_layer is not None:
                setattr(parent, name, ExcitedBlock(block))
        super().switch_to_deploy()  # what else there may be: the pooling block of YOLOX-PAI

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        own = [key.removeprefix(prefix) for key in state_dict if key.startswith(prefix)]
        other = '.branch_1x1.' if self.online else '.weight_online_'
        if not self.deploy and any(other in key for key in own):
            kinds = ("a BN in each branch of a block (a stock RepVGG, or block='repvgg')",
                     "one BN per block (block='repvgg_online')")
            raise CheckpointError(
                f'this {type(self).__name__} has {kinds[self.online]}, but the checkpoint is of a '
                f'RepVGG with {kinds[not self.online]}. The statistics of the one cannot be told '
                'from those of the other: build the backbone with the conv_cfg that the checkpoint '
                'was trained with.')
        super()._load_from_state_dict(state_dict, prefix, *args)
