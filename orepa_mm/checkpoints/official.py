"""Classifiers' checkpoints: the names of the authors, and of others, turned into ours.

The authors' hold each convolution with its BN in one block; OpenMMLab keeps
them apart. The names inside a block are the same here and there.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, shortened
from ..layers import OREPAConv1x1, OREPAConv2d, OREPAStemConv2d, ReparamConv2d
from .architectures import (
    Architecture,
    build_backbone,
    key_in,
    plain_form_of,
    recognize_architecture,
    tensor_shape,
)
from .forms import training_form_of
from .io import below, model_state_dict, require_values


def convert_official_block(
    state_dict: Mapping[str, Tensor],
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Split one block of the authors into its convolution and its BN.

    Args:
        state_dict: The block's keys, without prefix: of `OREPA`, `OREPA_1x1`,
            `OREPA_LargeConv` or a plain convolution with BN.

    Returns:
        State dict of the `OREPAConv2d`, `OREPAConv1x1`, `OREPAStemConv2d` or
        `nn.Conv2d`, and state dict of the BN.

    Raises:
        CheckpointError: If a key is unknown or missing, or a shape does not fit
            the others; it is named.
    """
    conv = _empty_layer(state_dict)
    block = nn.ModuleDict({'conv': conv, 'bn': nn.BatchNorm2d(conv.out_channels, device='meta')})
    # a plain convolution stands beside its BN, a layer with branches around it
    inner = 'conv.' if isinstance(conv, ReparamConv2d) else ''
    state = _renamed(state_dict, block, lambda key: key.removeprefix(inner),
                     'the rest of the block')
    return below(state, 'conv.'), below(state, 'bn.')


def convert_official_state_dict(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """Turn the authors' ResNet, ResNeXt or RepVGG weights into ours.

    Args:
        checkpoint: What their file holds: a state dict, or a dictionary with
            one under `state_dict`, with or without the prefix `module.`. If all
            its tensors are on the meta device, names and shapes alone are converted.

    Returns:
        State dict of an image classifier: `backbone.*` for `OREPAResNet`,
        `OREPAResNeXt` or `OREPARepVGG`, and `head.fc.*`. The tensors are not copied.

    Raises:
        CheckpointError: As of `read_classifier`, or if it is in our names already.
        ImportError: As of `build_backbone`.
    """
    if training_form_of(model_state_dict(checkpoint)) == 'ours':
        raise CheckpointError('this has our names and is in training form already: there is '
                              'nothing to do. It can be converted to the forms deploy and '
                              'torchvision')
    return read_classifier(checkpoint)[1]


def read_classifier(checkpoint: Mapping[str, Any]) -> tuple[Architecture, dict[str, Tensor]]:
    """Read a classifier in training form, in the authors' names or in ours.

    Args:
        checkpoint: As of `convert_official_state_dict`, or what the runner
            saved of a classifier that was trained with one of our backbones.

    Returns:
        The network, and its state dict in our names: exactly the keys and
        shapes that this network has. The tensors are not copied.

    Raises:
        CheckpointError: If it is no such classifier, a key is unknown or missing,
            a shape does not fit, or a constant is not the layer's; it is named.
        ImportError: As of `build_backbone`.
    """
    state = model_state_dict(checkpoint)
    form = training_form_of(state)
    others = [key for key, value in checkpoint.get('state_dict', checkpoint).items()
              if not isinstance(value, Tensor)]
    if others:
        raise CheckpointError(f'the checkpoint has an unknown key {others[0]}, which is no tensor')
    try:
        architecture = recognize_architecture(state)
        return architecture, _renamed(state, _classifier(architecture), partial(key_in, form),
                                      architecture.name)
    except CheckpointError as error:
        if form == 'authors':
            raise
        raise CheckpointError(
            f'{error}. A network that differs from the published kind can be re-parameterized '
            'with its config: tools/reparam.py CONFIG CHECKPOINT') from error


def read_plain_classifier(checkpoint: Mapping[str, Any]
                          ) -> tuple[Architecture, dict[str, Tensor]]:
    """Read a plain ResNet or ResNeXt, in the names of torchvision, timm or OpenMMLab.

    Args:
        checkpoint: A state dict, or a dictionary with one under `state_dict`,
            of which `plain_form_of` tells in whose names it is.

    Returns:
        The network, and the state dict of its stock form in OpenMMLab's names.
        The tensors are not copied.

    Raises:
        CheckpointError: If it is no such network, a key is unknown or missing, a
            shape does not fit, or a value is not finite; it is named.
        ImportError: As of `build_backbone`.
    """
    state = model_state_dict(checkpoint)
    form = plain_form_of(state)
    if form is None:
        raise CheckpointError('this is no plain ResNet or ResNeXt in the names of torchvision, '
                              f'timm or OpenMMLab: it begins with {shortened(list(state))}')
    named = partial(key_in, form)
    architecture = recognize_architecture(state)
    classifier = _classifier(architecture, plain=True)
    # as MMEngine: older files have no such counter, and it starts at 0
    counters = {named(key): torch.tensor(0) for key in classifier.state_dict()
                if key.endswith('num_batches_tracked')}
    return architecture, _renamed({**counters, **state}, classifier, named, architecture.name)


def _classifier(architecture: Architecture, plain: bool = False) -> nn.Module:
    """A network with its head, without values, in our names."""
    backbone = build_backbone(architecture, plain)
    features = [norm.num_features for norm in backbone.modules()
                if isinstance(norm, nn.BatchNorm2d)][-1]
    fc = nn.Linear(features, architecture.num_classes, device='meta')
    return nn.ModuleDict({'backbone': backbone, 'head': nn.ModuleDict({'fc': fc})})


def _renamed(state: Mapping[str, Tensor], model: nn.Module, named: Callable[[str], str], whole: str
             ) -> dict[str, Tensor]:
    """The tensors in our names, if they are exactly those of `model`.

    `model` has no values. `named` says what a key of it is called in `state`, and
    `whole` what asks for the shapes, for an error. The layers' constants, which older
    files and the authors' hold, may be in `state`, and are left out.
    """
    tensors = {named(key): (key, tensor) for key, tensor in model.state_dict().items()}
    known = {**{named(key): (key, tensor) for key, tensor in model.named_buffers()}, **tensors}
    unknown = sorted(state.keys() - known.keys())
    if unknown:
        raise CheckpointError(f'the checkpoint has an unknown key {shortened(unknown)}')
    missing = []
    for layer, keys in groupby(tensors, lambda key: key.rpartition('.')[0]):
        parts = list(keys)
        absent = [key for key in parts if key not in state]
        missing += [f'{layer}.*'] if layer and len(absent) == len(parts) > 1 else absent
    if missing:
        raise CheckpointError(f'the checkpoint has no key {shortened(missing)}: it is truncated')
    shapes_only = all(value.is_meta for value in state.values())
    for source, value in state.items():
        tensor = known[source][1]
        if value.shape != tensor.shape:
            raise CheckpointError(f'{source} has the shape {tuple(value.shape)}, where {whole} '
                                  f'asks for {tuple(tensor.shape)}')
        if not shapes_only:
            require_values(source, value, tensor, whole)
    try:  # the layers compare the constants' values with their own
        model.to_empty(device='cpu').load_state_dict(
            {known[source][0]: value for source, value in state.items()}, assign=True)
    except RuntimeError as error:
        raise CheckpointError(str(error)) from error
    return {key: state[source] for source, (key, _) in tensors.items()}


def _empty_layer(block: Mapping[str, Tensor]) -> ReparamConv2d | nn.Conv2d:
    """The layer of a block, without content, whose size is that of its main kernel."""
    numbers = [int(m[1]) for key in block if (m := re.match(r'weight(\d+)\.', key))]
    with torch.device('meta'):
        if numbers:
            out, channels, *_ = tensor_shape(block, 'weight0.weight_orepa_origin')
            return OREPAStemConv2d(channels, out, 2 * max(numbers) + 3, bias=False)
        if any(key.startswith('weight_or1x1_') for key in block):
            out, channels, *_ = tensor_shape(block, 'weight_or1x1_origin')
            return OREPAConv1x1(channels, out, bias=False)
        if 'conv.weight' in block:
            out, channels, *_ = tensor_shape(block, 'conv.weight')
            return nn.Conv2d(channels, out, 1, bias=False)
        out, group_in, size, _ = tensor_shape(block, 'weight_orepa_origin')
        channels = tensor_shape(block, 'weight_orepa_gconv_dw')[0] // OREPAConv2d.expansion
        return OREPAConv2d(channels, out, size, groups=channels // group_in, bias=False)
