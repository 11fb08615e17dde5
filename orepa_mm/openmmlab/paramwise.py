"""Rules for parameters in a config: one for `X.weight` is for the layer X as a whole."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..layers import ReparamConv2d, reparam_layers


def with_whole_layers(build: Callable[..., Any]) -> Callable[..., Any]:
    """An optimizer constructor's `__call__`, to which a layer with branches is one thing.

    MMEngine takes the longest key of `custom_keys` that is found anywhere in the name of a
    parameter. Here a key that is found in `X.weight` is for every parameter of the layer `X` but
    its bias. So is none that is found inside the name of a branch by chance (`conv` in
    `X.weight_orepa_avg_conv`). One that a branch's name begins or ends with, as `vector` or
    `X.weight_orepa_origin`, is for that branch. A depthwise layer is one in all its parts.
    """
    @functools.wraps(build)
    def with_rules(self: Any, model: nn.Module) -> Any:
        given = self.paramwise_cfg
        rules = _rules_of_layers(getattr(model, 'module', model), given)
        if rules:
            self.paramwise_cfg = {
                **given, 'custom_keys': {**(given.get('custom_keys') or {}), **rules}}
        try:
            return build(self, model)
        finally:
            self.paramwise_cfg = given

    return with_rules


def _rules_of_layers(model: nn.Module, options: Mapping[str, Any]) -> dict[str, Any]:
    """What the given rules mean where MMEngine takes others, by whole names of parameters."""
    given, depthwise = options.get('custom_keys') or {}, options.get('dwconv_decay_mult')
    rules = {}
    for name, prefix, layer, part in _branches(model) if given or depthwise is not None else ():
        weight = f'{prefix}.weight'  # MMEngine names that of the model itself so, too
        meant = _longest(key for key in given if key in weight or (key in name and (
            f'.{name}'.endswith(f'.{key}') or name.find(key) <= len(prefix) + bool(prefix))))
        is_depthwise = layer.in_channels == layer.groups and not isinstance(part, _BatchNorm)
        if meant is not None:
            rules[name] = given[meant]
        elif any(key in name for key in given) or (is_depthwise and depthwise is not None):
            # a rule takes the place of all other options
            decay = (options.get('norm_decay_mult') if isinstance(part, _BatchNorm) else
                     depthwise if is_depthwise else None)
            rules[name] = {} if decay is None else {'decay_mult': decay}
    return rules


def _branches(model: nn.Module) -> Iterator[tuple[str, str, ReparamConv2d, nn.Module]]:
    """Each parameter of a layer but its bias: name, the layer's name, it, the part that has it."""
    layers = set(reparam_layers(model))
    for prefix, layer in model.named_modules():
        for path, part in layer.named_modules() if layer in layers else ():
            for last, _ in part.named_parameters(recurse=False):
                if part is not layer or last != 'bias':
                    yield '.'.join(filter(None, (prefix, path, last))), prefix, layer, part


def _longest(keys: Iterator[str]) -> str | None:
    """The one that MMEngine takes of several."""
    return min(keys, key=lambda key: (-len(key), key), default=None)
