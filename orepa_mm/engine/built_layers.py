"""What a config built: how many convolutions generate their kernel, and where none does."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from typing import Any

from mmengine.logging import print_log
from mmengine.registry import MODELS
from torch import nn

from .. import backbones, layers
from ..layers import reparam_layers


def log_built_layers(model: nn.Module, model_cfg: Mapping[str, Any]) -> None:
    """Log how many convolutions are re-parameterizable; warn where they were asked for in vain.

    Some stock modules take a `conv_cfg` and do not use it.

    Args:
        model: As built, without wrappers.
        model_cfg: The config that it was built from.
    """
    print_log(describe_layers(model), 'current')
    for name, part_cfg in model_cfg.items():
        if not _asks(part_cfg):
            continue
        part = getattr(model, name, None)
        where = f'model.{name}'
        if not isinstance(part, nn.Module):
            part, where = model, f'the model (because of model.{name})'
        if next(reparam_layers(part), None) is None:
            print_log(
                f'the config asks for re-parameterizable convolutions in {where}, but '
                f'{type(part).__name__} built none ({describe_layers(part)}): it trains as the '
                'plain network. Not every stock module uses its conv_cfg: take another, or a '
                'backbone of this package (docs/custom-configs.md).', 'current', logging.WARNING)


def describe_layers(model: nn.Module) -> str:
    """Say how many 2-D convolutions generate their kernel, by kind, and where the plain ones are.

    A layer counts as one, whatever it is made of.

    Args:
        model: Any module.

    Returns:
        E.g. `2 of 5 convolutions are re-parameterizable: 2 OREPAConv2d; left plain: 3 in neck`.
    """
    ours = list(reparam_layers(model))
    inside = {module for layer in ours for module in layer.modules()}
    plain = Counter(name.partition('.')[0] for name, module in model.named_modules()
                    if isinstance(module, nn.Conv2d) and module not in inside)
    kinds = Counter(type(layer).__name__ for layer in ours)
    text = f'{len(ours)} of {len(ours) + plain.total()} convolutions are re-parameterizable'
    if kinds:
        text += ': ' + ', '.join(f'{count} {kind}' for kind, count in kinds.most_common())
    if kinds and plain:
        text += '; left plain: ' + ', '.join(
            f'{count} in {name}' for name, count in plain.items())
    return text


def _asks(value: Any) -> bool:
    """Whether a part of a model's config asks for layers of ours."""
    if isinstance(value, (list, tuple)):
        return any(map(_asks, value))
    if not isinstance(value, Mapping):
        return False
    if _is_ours(value.get('type')) and not value.get('deploy'):
        return True
    return any(map(_asks, value.values()))


def _is_ours(name: Any) -> bool:
    """Whether a config's `type` is a conv layer type or a backbone of this package."""
    # the root registry knows our names in every scope
    found = MODELS.module_dict.get(name.rpartition('.')[2]) if isinstance(name, str) else name
    return getattr(found, '__module__', '').rpartition('.')[0] in (
        layers.__name__, backbones.__name__)
