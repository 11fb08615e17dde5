"""Walks over a model: its re-parameterizable layers, and stock convolutions in their place."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from torch import nn

from .base import ReparamConv2d

#: Conv layer types of this package.
_OUR_TYPES = ('OREPA', 'DBB')


def reparam_layers(model: nn.Module) -> Iterator[ReparamConv2d]:
    """Every layer of the model that generates its kernel, once.

    A layer is one unit: the generators inside a stem are not listed.

    Args:
        model: Any module; it may be such a layer itself.
    """
    seen: set[nn.Module] = set()

    def walk(module: nn.Module) -> Iterator[ReparamConv2d]:
        if module in seen:
            return
        seen.add(module)
        if isinstance(module, ReparamConv2d):
            yield module
            return
        for child in module.children():
            yield from walk(child)

    return walk(model)


def replace_with_conv2d(model: nn.Module) -> nn.Module:
    """Replace every `ReparamConv2d` by the convolution it equals, in place.

    A layer that is shared by several parents stays shared. Modules that note
    their `conv_cfg` forget it: what they build later is to be stock as well.

    Args:
        model: Any module. If it is such a layer itself, its convolution is returned.

    Returns:
        The model.
    """
    replaced: dict[ReparamConv2d, nn.Conv2d] = {}

    def walk(module: nn.Module) -> nn.Module:
        if isinstance(module, ReparamConv2d):
            if module not in replaced:
                replaced[module] = module.to_conv2d()
            return replaced[module]
        # not named_children(): that names a layer once that has two names here
        for name, child in list(module._modules.items()):
            if child is not None:
                module._modules[name] = walk(child)
        conv_cfg = getattr(module, 'conv_cfg', None)
        if isinstance(conv_cfg, dict) and conv_cfg.get('type') in _OUR_TYPES:
            module.conv_cfg = None  # type: ignore[assignment]  # a config, no submodule
        return module

    return walk(model)


def adjacent_children(model: nn.Module
                      ) -> Iterator[tuple[nn.Module, str, nn.Module, str, nn.Module]]:
    """Every two children that are registered one after the other, as a BN after its convolution.

    Inside of a layer that generates its kernel nothing is listed.

    Args:
        model: Any module; children may be replaced while this runs.

    Yields:
        Parent, name of the first child, the child, name of the second, the second.
    """
    inside = {module for layer in reparam_layers(model) for module in layer.modules()}
    for parent in list(model.modules()):
        if parent not in inside:
            # not named_children(): that leaves out a child that was there before
            children = [(name, child) for name, child in parent._modules.items()
                        if child is not None]
            for (first_name, first), (name, second) in pairwise(children):
                yield parent, first_name, first, name, second
