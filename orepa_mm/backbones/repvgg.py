"""The blocks of RepVGG: with one BN instead of three, and deployed as one convolution."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from mmengine.model import BaseModule
from mmpretrain.models.backbones.repvgg import RepVGGBlock
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.utils.checkpoint import checkpoint

from ..layers import ReparamConv2d, conv2d_like
from ..layers.precision import has_float64
from ..layers.squeeze import identity_pointwise


def repvgg_blocks(model: nn.Module) -> list[tuple[nn.Module, str, RepVGGBlock]]:
    """Every block of RepVGG in a model: its parent, its name there, and the block.

    Args:
        model: Any module; itself no block.
    """
    return [(parent, name, block) for parent in model.modules()
            for name, block in parent.named_children() if isinstance(block, RepVGGBlock)]


class OnlineRepVGGBlock(RepVGGBlock):
    """RepVGG's block as one convolution with one BN behind it.

    The convolution generates its kernel (`OREPARepVGGOnlineConv2d`), with the
    1 x 1 and the identity among its branches. It keeps the name of the stock
    block's 3 x 3, and deployed it is the stock block's one convolution.

    Args:
        block: A stock block, whose parts it takes over, without its 1 x 1 and
            identity.
    """

    def __init__(self, block: RepVGGBlock) -> None:
        BaseModule.__init__(self, block.init_cfg)
        for name in ('in_channels', 'out_channels', 'stride', 'padding', 'dilation', 'groups',
                     'se_cfg', 'with_cp', 'conv_cfg', 'norm_cfg', 'act_cfg', 'deploy',
                     'branch_3x3', 'se_layer', 'act'):
            setattr(self, name, getattr(block, name))
        self.branch_1x1 = self.branch_norm = None

    def forward(self, x: Tensor) -> Tensor:
        """Compute the block.

        Args:
            x: Feature map, `(N, I, H, W)`.

        Returns:
            Feature map, `(N, o, H', W')`, sizes as of the 3 x 3.
        """
        if self.deploy:
            return super().forward(x)
        if self.with_cp and x.requires_grad:
            return self.act(checkpoint(self._excited, x, use_reentrant=False))
        return self.act(self._excited(x))

    def _excited(self, x: Tensor) -> Tensor:
        out = self.branch_3x3(x)
        return out if self.se_layer is None else self.se_layer(out)

    def switch_to_deploy(self) -> None:
        """Re-parameterize in place, see `deploy_repvgg_block`."""
        deploy_repvgg_block(self)


class ExcitedBlock(nn.Module):
    """A deployed block with the squeeze-and-excitation that the stock one leaves out.

    Args:
        block: Deployed, whose parts it takes over.
    """

    def __init__(self, block: RepVGGBlock) -> None:
        super().__init__()
        self.branch_reparam, self.se_layer, self.act = (
            block.branch_reparam, block.se_layer, block.act)
        self.train(block.training)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the block, `(N, I, H, W)` to `(N, o, H', W')`."""
        return self.act(self.se_layer(self.branch_reparam(x)))


@torch.no_grad()
def deploy_repvgg_block(block: RepVGGBlock) -> None:
    """Make the branches of a block one convolution, in place: BN folded, summed in float64.

    The stock block's own method would build OREPA layers anew, forget the
    training flag and `requires_grad`, and refuse SyncBN.

    Args:
        block: MMPretrain's, with or without OREPA layers in it; or one with one BN.
    """
    if block.deploy:
        return
    dense = block.branch_3x3.conv
    margin = [size // 2 for size in dense.kernel_size for _ in range(2)]
    branches = [(_kernel(dense), block.branch_3x3.norm)]
    if block.branch_1x1 is not None:
        branches.append((F.pad(_kernel(block.branch_1x1.conv), margin), block.branch_1x1.norm))
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
