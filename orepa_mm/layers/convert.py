"""The walk that puts stock convolutions in place of re-parameterizable layers."""

from __future__ import annotations

from collections import Counter

from torch import nn

from .base import ReparamConv2d


def replace_with_conv2d(model: nn.Module) -> tuple[nn.Module, Counter]:
    """Replace every `ReparamConv2d` by the convolution it equals, in place.

    A layer that is shared by several parents stays shared. A layer is one
    unit: the generators inside a stem are not looked at.

    Args:
        model: Any module. If it is such a layer itself, its convolution is returned.

    Returns:
        The model and how many layers of which class were replaced.
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
        return module

    model = walk(model)
    return model, Counter(type(layer).__name__ for layer in replaced)
