"""Compare two forms layer by layer, whatever signal reaches a layer in the model."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..layers import ReparamConv2d, adjacent_children, reparam_layers
from .locate import has_bias
from .raw_outputs import scale_relative_error

#: An output channel whose largest weight is smaller than this share of the tensor's is
#: compared on the scale of that share: what is left there is cancellation.
_SMALLEST_CHANNEL = 1e-6


def layers_with_branches(model: nn.Module) -> dict[str, ReparamConv2d]:
    """Every layer that generates its kernel, by name.

    Args:
        model: Any module.
    """
    layers = set(reparam_layers(model))
    return {name: module for name, module in model.named_modules() if module in layers}


def stored_errors(reference: nn.Module, after: nn.Module) -> tuple[dict[str, float], set[str]]:
    """How far each stored tensor is from the one that was squeezed exactly.

    Args:
        reference: Re-parameterized in float64.
        after: The same network, as it is stored.

    Returns:
        By name the largest difference over the largest value of the same output
        channel (of a vector: of the whole); then the names that one side lacks.
    """
    expected, found = ({name: tensor for name, tensor in model.state_dict().items()
                        if tensor.is_floating_point()} for model in (reference, after))
    return ({name: _error_by_channel(tensor, found[name]) for name, tensor in expected.items()
             if name in found}, expected.keys() ^ found.keys())


def other_settings(reference: nn.Module, after: nn.Module) -> set[str]:
    """Layers of the same name that are set up differently: stride, eps and so on.

    Args:
        reference: Re-parameterized from the model before.
        after: The model after.
    """
    others = dict(after.named_modules())
    return {name for name, module in reference.named_modules()
            if name in others and not module._modules and not others[name]._modules
            and module.extra_repr() != others[name].extra_repr()}


def errors_on_random_inputs(before: nn.Module, after: nn.Module
                            ) -> tuple[dict[str, float], list[str]]:
    """Run every layer with branches, and what stands in its place, on an input of its own.

    A convolution that took over the bias of the BN behind it, or gave its own
    away, is run together with that BN. Where no convolution has the layer's
    name, the smallest block around it that both forms have is run.

    Args:
        before: In training form, float64, eval mode.
        after: Re-parameterized, float64, eval mode.

    Returns:
        Scale-relative errors by name of the layer or block; then the layers
        that could not be run like this.
    """
    modules, others = dict(before.named_modules()), dict(after.named_modules())
    names = {module: name for name, module in modules.items()}
    followers = {first: names[second] for _, _, first, _, second in adjacent_children(before)
                 if isinstance(second, (_BatchNorm, nn.Identity))}
    errors: dict[str, float] = {}
    missed = []
    for name, layer in layers_with_branches(before).items():
        counterpart = others.get(name)
        if isinstance(counterpart, nn.Conv2d):
            one, other, unit = modules[name], others[name], name
            norm = followers.get(layer)
            if norm in others and (has_bias(layer) != has_bias(counterpart)
                                   or type(modules[norm]) is not type(others[norm])):
                one = nn.Sequential(layer, modules[norm])
                other = nn.Sequential(counterpart, others[norm])
        else:
            unit = next(parent for parent in _parents(name) if parent in others)
            one, other = modules[unit], others[unit]
        if unit in errors:
            continue
        try:
            x = _random_input(layer)
            errors[unit] = scale_relative_error(one(x), other(x))
        except Exception:  # a block that takes something else
            missed.append(name)
    return errors, missed


def _error_by_channel(expected: Tensor, found: Tensor) -> float:
    if expected.shape != found.shape:
        return math.inf
    expected, found = expected.double(), found.to(expected.device).double()
    if not (expected.isfinite().all() and found.isfinite().all()):
        return math.inf
    if not expected.numel():
        return 0.0
    difference, scale = (tensor.abs().reshape(len(tensor) if tensor.dim() > 1 else 1, -1).amax(1)
                         for tensor in (expected - found, expected))
    if not scale.any():
        return math.inf if difference.any() else 0.0
    # below the smallest normal number the rounding does not get smaller
    smallest = max(scale.max().item() * _SMALLEST_CHANNEL, torch.finfo(torch.float32).tiny)
    return (difference / scale.clamp(min=smallest)).max().item()


def _random_input(layer: ReparamConv2d) -> Tensor:
    """Three windows wide: with every border, and its middle."""
    height, width = (3 * (dilation * (size - 1) + 1)
                     for dilation, size in zip(layer.dilation, layer.kernel_size))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, layer.in_channels, height, width, generator=generator, dtype=torch.float64)
    return x.to(next(layer.parameters()).device)


def _parents(name: str) -> Iterator[str]:
    """The names of the modules around one, the innermost first; the root is empty."""
    while name:
        name = name.rpartition('.')[0]
        yield name
