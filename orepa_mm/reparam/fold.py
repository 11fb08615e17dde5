"""Fold BN into the convolution before it, for a model that will not be trained any more."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import torch
from mmcv.cnn.bricks.wrappers import Conv2d
from mmengine.registry import MODELS
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ..layers import FoldedNorm, adjacent_children


def fold_batch_norm(model: nn.Module) -> int:
    """Fold every BN into the plain convolution right before it, in place.

    The sums are PyTorch's own (`torch.nn.utils.fusion`), in float64. A folded
    BN is replaced by an identity, so that the stock code around it still runs; in
    the state dict the convolution, its new bias and a mark, `folded_norm`, are left.
    Dtype, device, memory format, training flag and `requires_grad` are kept.
    What the model computes in eval mode stays; trained further, it would have
    no BN.

    Not folded is a BN that does not follow a stock convolution (after another
    layer, a deformable or weight-standardised convolution, or as
    `ConvModule(order=...)` says), one without running statistics, one with an
    activation of its own, one of which either side has hooks or a
    parametrization, and one of which either side is shared: a head whose levels
    share convolutions but not the BN has no folded form. What follows in the
    order of registration is taken to follow in that of execution: `verify`
    tells where that is wrong.

    Args:
        model: Any module, without layers that still generate their kernel.

    Returns:
        Number of folded BN.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)).eval()
        >>> fold_batch_norm(model)
        1
        >>> model[1]
        FoldedNorm()
    """
    uses = Counter(child for module in model.modules()
                   for child in module._modules.values() if child is not None)
    folded = 0
    for parent, conv_name, conv, norm_name, norm in adjacent_children(model):
        if (follows(parent, conv, norm) and uses[conv] == uses[norm] == 1
                and parent._modules[conv_name] is conv):
            parent._modules[conv_name] = _fused(conv, norm)  # type: ignore[arg-type]  # see follows
            parent._modules[norm_name] = FoldedNorm().train(norm.training)
            folded += 1
    return folded


@MODELS.register_module(name='BNFolded')
def build_bn_folded(model_type: str, **cfg: Any) -> nn.Module:
    """Build a stock model whose BN is folded, for the weights that were saved of one.

    No stock config can say that a convolution before a BN has a bias and the
    BN is gone. This builds the stock model, folds, and returns it: whatever
    reads the config or the model finds the stock one.

    Args:
        model_type: The stock model, e.g. `FasterRCNN`.
        **cfg: Its config.

    Returns:
        The stock model, `FoldedNorm` in place of each folded BN.

    Example:
        >>> model = dict(type='BNFolded', model_type='FasterRCNN', backbone=...)
    """
    model = MODELS.build({'type': model_type, **cfg})
    fold_batch_norm(model)
    return model


def follows(parent: nn.Module, conv: nn.Module, norm: nn.Module) -> bool:
    """Whether `norm` is a BN over what `conv` gives.

    Args:
        parent: The module that has both, one registered after the other.
        conv: Any module.
        norm: Any module.
    """
    if not (computes_as_conv2d(conv)
            and _computes_as(norm, _BatchNorm, nn.SyncBatchNorm)):
        return False
    order = getattr(parent, 'order', None)  # of mmcv's ConvModule
    if isinstance(order, tuple) and {'conv', 'norm'} <= set(order) and (
            order.index('norm') != order.index('conv') + 1):
        return False
    return conv.out_channels == norm.num_features and norm.running_mean is not None


def computes_as_conv2d(layer: nn.Module) -> bool:
    """Whether a module is a stock convolution: not a subclass that computes more, nor hooked.

    Args:
        layer: Any module.
    """
    return _computes_as(layer, nn.Conv2d, Conv2d)


def _computes_as(layer: nn.Module, *stock: type[nn.Module]) -> bool:
    """Whether a layer is one of these, or a subclass that computes the same, and nothing else."""
    return (isinstance(layer, stock)
            and type(layer).forward in [kind.forward for kind in stock]
            and getattr(type(layer), '_conv_forward', None) in (
                None, nn.Conv2d._conv_forward)
            and not (layer._forward_hooks or layer._forward_pre_hooks
                     or hasattr(layer, 'parametrizations')))


def _fused(conv: nn.Conv2d, norm: _BatchNorm) -> nn.Conv2d:
    trainable = any(p.requires_grad for layer in (conv, norm) for p in layer.parameters())
    dtype, training = conv.weight.dtype, conv.training
    with torch.no_grad():
        fused = fuse_conv_bn_eval(copy.deepcopy(conv).double().eval(),
                                  copy.deepcopy(norm).double().eval()).to(dtype)
    fused.requires_grad_(trainable)
    return fused.train(training)
