"""The re-parameterizable backbones for MMPretrain; `OREPARepVGG` serves all three packages."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from mmpretrain.models.backbones import RepVGG, ResNet, ResNetV1c, ResNeXt
from mmpretrain.models.backbones.repvgg import RepVGGBlock
from mmpretrain.registry import MODELS
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from ..layers import ReparamConv2d, conv2d_like
from ..layers.precision import has_float64
from ..layers.squeeze import identity_pointwise
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
    stage_name = 'stage_{}'
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


@torch.no_grad()
def deploy_repvgg_block(block: RepVGGBlock) -> None:
    """Make the branches of a block one convolution, in place: BN folded, summed in float64.

    The stock block's own method would build OREPA layers anew, forget the
    training flag and `requires_grad`, and refuse SyncBN.

    Args:
        block: MMPretrain's, with or without OREPA layers in it.
    """
    if block.deploy:
        return
    dense = block.branch_3x3.conv
    margin = [size // 2 for size in dense.kernel_size for _ in range(2)]
    branches = [(_kernel(dense), block.branch_3x3.norm),
                (F.pad(_kernel(block.branch_1x1.conv), margin), block.branch_1x1.norm)]
    if block.branch_norm is not None:
        identity = identity_pointwise(dense.out_channels, dense.in_channels // dense.groups)
        branches.append((F.pad(identity.to(branches[0][0]), margin), block.branch_norm))
    fused = [fuse_conv_bn_weights(kernel, None, *(
        tensor.to(kernel.device).double() for tensor in (norm.running_mean, norm.running_var)),
        norm.eps, *(tensor.to(kernel.device).double() for tensor in (norm.weight, norm.bias)))
        for kernel, norm in branches]
    kernel, bias = (sum(terms) for terms in zip(*fused))
    trainable = any(parameter.requires_grad for branch in (
        block.branch_3x3, block.branch_1x1, block.branch_norm) if branch is not None
        for parameter in branch.parameters())
    block.branch_reparam = conv2d_like(dense, kernel, bias, block.branch_3x3.norm.weight)
    block.branch_reparam.requires_grad_(trainable).train(block.training)
    for name in ('branch_3x3', 'branch_1x1', 'branch_norm'):
        delattr(block, name)
    block.conv_cfg, block.deploy = None, True


def _kernel(conv: nn.Module) -> Tensor:
    """The kernel in float64, `(o, i, k, k)`."""
    if isinstance(conv, ReparamConv2d):
        return conv.equivalent_kernel_bias()[0]
    weight = conv.weight.detach()
    return (weight if has_float64(weight.device) else weight.cpu()).double()
