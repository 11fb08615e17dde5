"""The convolution that a layer equals, with all that others gave the layer."""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from ..layers import ReparamConv2d, reparam_layers, replace_with_conv2d
from .copies import replaced
from .fold import bias_into_norm, hidden_methods
from .proof import difference, within

#: What sets a tensor anew before each forward pass: done once, when the kernel is squeezed.
_SETTERS = (BasePruningMethod, SpectralNorm, WeightNorm)
#: Where a module holds the hooks of its passes.
_HOOKS = tuple(name for name in vars(nn.Module()) if '_hooks' in name and 'state_dict' not in name)


def convolutions(layers: Mapping[ReparamConv2d, str]) -> dict[nn.Module, nn.Module]:
    """A convolution for each layer; layers whose branches are tied share its kernel.

    Args:
        layers: With the name of each, for messages.

    Raises:
        ValueError: If a hook or a method of its own changes what a layer gives.
    """
    convs: dict[nn.Module, nn.Module] = {}
    tied: dict[Any, nn.Conv2d] = {}
    for layer, name in layers.items():
        conv = _convolution(layer, name)
        branches = {key: id(value) for key, value in layer.named_parameters() if key != 'bias'}
        first = tied.setdefault((type(layer), layer.kernel_shape, *branches.items()), conv)
        if branches and first is not conv and (
                conv.weight.is_meta or torch.equal(first.weight, conv.weight)):
            conv.weight = first.weight
        if layer.bias is not None:
            first = tied.setdefault(id(layer.bias), conv)
            conv.bias = first.bias
        convs[layer] = conv
    return convs


def put_convolutions(model: nn.Module, but: Collection[nn.Module] = ()) -> nn.Module:
    """Put its convolution in place of each layer, wherever a model holds it, in place.

    Args:
        model: Any module.
        but: Layers that stay.

    Returns:
        The model, or the convolution in its place.
    """
    model = replaced(model, convolutions({layer: name for layer, name in layers_by_name(
        model).items() if layer not in but}))
    if not but:
        model = replace_with_conv2d(model)  # the modules around them forget their conv_cfg
        bias_into_norm(model)
    return model


def layers_by_name(model: nn.Module) -> dict[ReparamConv2d, str]:
    """Every layer that generates its kernel, with its first name.

    Args:
        model: Any module; it may be such a layer itself.
    """
    layers = set(reparam_layers(model))
    return {module: name or 'itself' for name, module in model.named_modules()
            if isinstance(module, ReparamConv2d) and module in layers}


def _convolution(layer: ReparamConv2d, name: str) -> nn.Conv2d:
    training = {module: module.training for module in layer.modules()}
    try:
        for module in training:
            module.training = False
        for hook in layer._forward_pre_hooks.values():
            if isinstance(hook, _SETTERS):
                with torch.enable_grad():
                    hook(layer, ())
        conv = layer.to_conv2d()
        own = [hook for hooks in (layer._forward_hooks, layer._forward_pre_hooks)
               for hook in hooks.values() if not isinstance(hook, _SETTERS)]
        if (own or hidden_methods(layer)) and not conv.weight.is_meta:
            error = difference(layer, conv)
            if error is None or not within(error, conv.weight.dtype):
                raise ValueError(
                    f'{name} ({type(layer).__name__}) does not give what its convolution gives: '
                    'it has a hook, or a method of its own instance, that changes its output, '
                    'which a re-parameterized model would lose. Take it off first, or put what it '
                    'does into a module behind the layer')
    finally:
        for module, mode in training.items():
            module.training = mode
    if layer.bias is not None:
        conv.weight.requires_grad_(any(parameter.requires_grad for parameter in layer.parameters()
                                       if parameter is not layer.bias))
        conv.bias.requires_grad_(layer.bias.requires_grad)  # type: ignore[union-attr]
    carry_over(layer, conv, _names(
        type(layer), layer.kernel_size))  # type: ignore[arg-type]
    return conv.train(layer.training)


@functools.cache
def _names(kind: type[ReparamConv2d], kernel_size: tuple[int, int]) -> frozenset[str]:
    """What a layer of this type holds by itself."""
    fresh = kind(8, 8, kernel_size, padding=kernel_size[0] // 2, device='meta')
    return frozenset((*vars(fresh), *fresh._parameters, *fresh._buffers, *fresh._modules,
                      *_methods(kind)))


def _methods(kind: type[nn.Module]) -> set[str]:
    return set(dir(kind)) - set(dir(nn.Conv2d))


def carry_over(old: nn.Module, new: nn.Module, names: Collection[str]) -> None:
    """Give a module in place of another one the hooks and attributes that others gave that one.

    Args:
        old: The one that goes.
        new: The one that comes.
        names: Of attributes that are of the old one's class.
    """
    for name in _HOOKS:
        vars(new)[name].update({key: hook for key, hook in vars(old)[name].items()
                                if not isinstance(hook, _SETTERS)})
    new._is_full_backward_hook = old._is_full_backward_hook
    taken = {*names, *hidden_methods(old), *vars(new), *_methods(type(new))}
    vars(new).update({name: value for name, value in vars(old).items() if name not in taken})
