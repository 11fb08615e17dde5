"""Fold BN into the convolution before it, for a model that will not be trained any more."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ..layers import FoldedNorm, adjacent_children
from .copies import occurrences
from .proof import stays_same

#: Methods that a subclass may bring and compute the same.
_HARMLESS = ('__init__', '__repr__', '_check_input_dim', 'extra_repr', 'init_weights',
             'reset_parameters')

def fold_batch_norm(model: nn.Module) -> int:
    """Fold every BN into the plain convolution right before it, in place.

    The sums are PyTorch's own (`torch.nn.utils.fusion`), in float64. A folded
    BN is replaced by an identity, so that the stock code around it still runs; in
    the state dict the convolution, its new bias and a mark, `folded_norm`, are left.
    Dtype, device, memory format, training flag and `requires_grad` are kept.
    What the model computes in eval mode stays; trained further, it would have
    no BN.

    Not folded is a BN that does not follow a stock convolution (after another
    layer, a deformable or weight-standardised convolution), one without running
    statistics, one with an activation of its own, one of which either side has
    hooks or a parametrization, and one of which either side is shared: a head
    whose levels share convolutions but not the BN has no folded form. What is
    registered one after the other may be called otherwise: the module that has
    both is run on random input, and keeps its BN if it would compute something
    else without. `verify` tells where it runs on none and that is wrong.

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
    once = {module for module, count in occurrences(model).items() if count == 1}
    pairs: dict[nn.Module, list[tuple[str, str]]] = {}
    for parent, conv_name, conv, norm_name, norm in adjacent_children(model):
        if follows(conv, norm) and {conv, norm} <= once:
            pairs.setdefault(parent, []).append((conv_name, norm_name))
    folded = 0
    for parent, names in pairs.items():
        if not stays_same(parent, lambda other: _fold(other, names)):  # noqa: B023
            names = [pair for pair in names
                     if stays_same(parent, lambda other: _fold(other, [pair]))]  # noqa: B023
        _fold(parent, names)
        folded += len(names)
    return folded


def _fold(parent: nn.Module, names: list[tuple[str, str]]) -> None:
    for conv_name, norm_name in names:
        conv, norm = parent._modules[conv_name], parent._modules[norm_name]
        parent._modules[conv_name] = _fused(conv, norm)  # type: ignore[arg-type]  # see follows
        parent._modules[norm_name] = FoldedNorm().train(norm.training)  # type: ignore[union-attr]


def bias_into_norm(model: nn.Module) -> None:
    """Move a bias that a block brought along into the BN behind it, which the stock model has.

    A stock convolution before a BN has no bias. BN takes the mean away, so that
    a bias before it is one in its running mean.

    Args:
        model: Changed in place.
    """
    norms: dict[nn.Module, list[nn.Module]] = {}
    for parent, conv_name, conv, norm_name, norm in adjacent_children(model):
        if (getattr(conv, 'gained_bias', False) and conv.bias is not None and follows(conv, norm)
                and stays_same(parent, lambda other: _move_bias(
                    *(other.get_submodule(name) for name in (conv_name, norm_name))))):  # noqa: B023
            norms.setdefault(conv, []).append(norm)
    uses = occurrences(model) if norms else {}
    for conv, behind in norms.items():
        if len(behind) == uses[conv]:  # else some use has no BN
            _move_bias(conv, *dict.fromkeys(behind))


def _move_bias(conv: nn.Module, *norms: nn.Module) -> None:
    for norm in norms:
        norm.get_buffer('running_mean').data.sub_(conv.get_parameter('bias').detach())
    conv.register_parameter('bias', None)


def follows(conv: nn.Module, norm: nn.Module) -> bool:
    """Whether a convolution and a BN can be one convolution, if one is called after the other.

    Args:
        conv: Any module.
        norm: Any module.
    """
    return (is_stock(conv, nn.Conv2d) and is_stock(norm, _BatchNorm, nn.SyncBatchNorm)
            and not any(layer._forward_hooks or layer._forward_pre_hooks for layer in (conv, norm))
            and conv.out_channels == norm.num_features and norm.running_mean is not None)


def is_stock(layer: nn.Module, *stock: type[nn.Module]) -> bool:
    """Whether a module computes what one of these classes does, with tensors of its own.

    A subclass does so that brings no method but for its start and its text, and
    mmcv's convolution for empty batches; not one with a parametrization or with
    a method of its own instance.

    Args:
        layer: Any module; its hooks are not looked at.
        *stock: Classes of PyTorch.
    """
    kind = type(layer)
    kinds = kind.__mro__[:next((n for n, base in enumerate(kind.__mro__) if base in stock), 0)]
    if not isinstance(layer, stock) or hidden_methods(layer):
        return False
    if any(callable(value) or isinstance(value, property) for base in kinds
           if base.__module__ != 'mmcv.cnn.bricks.wrappers' for name, value in vars(base).items()
           if name not in _HARMLESS):
        return False
    return all(name in layer._parameters for name in ('weight', 'bias'))


def hidden_methods(layer: nn.Module) -> list[str]:
    """Names of methods of the forward pass that an instance hides by attributes of its own.

    Args:
        layer: Any module.
    """
    return [name for name in ('forward', '_conv_forward', '_call_impl') if name in vars(layer)]


def _fused(conv: nn.Conv2d, norm: _BatchNorm) -> nn.Conv2d:
    trainable = any(p.requires_grad for layer in (conv, norm) for p in layer.parameters())
    dtype, training = conv.weight.dtype, conv.training
    with torch.no_grad():
        fused = fuse_conv_bn_eval(copy.deepcopy(conv).double().eval(),
                                  copy.deepcopy(norm).double().eval()).to(dtype)
    fused.requires_grad_(trainable)
    return fused.train(training)
