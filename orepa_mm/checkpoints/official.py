"""The authors' checkpoints: their names turned into ours.

They hold each convolution with its BN in one block; OpenMMLab keeps them
apart. The names inside a block are the same here and there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from ..errors import CheckpointError
from ..layers import OREPAConv1x1, OREPAConv2d, OREPAStemConv2d
from .architectures import (
    Architecture,
    Part,
    network_parts,
    recognize_architecture,
    shortened,
    tensor_shape,
)
from .forms import training_form_of
from .io import model_state_dict


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
    layer = _empty_layer(state_dict)
    source = 'conv' if isinstance(layer, nn.Conv2d) else ''
    state = _renamed(state_dict, [
        Part(source, 'conv', layer),
        Part('bn', 'bn', nn.BatchNorm2d(layer.out_channels, device='meta')),
    ], 'authors', 'the rest of the block')
    conv, bn = ({key.removeprefix(prefix): value for key, value in state.items()
                 if key.startswith(prefix)} for prefix in ('conv.', 'bn.'))
    return conv, bn


def convert_official_state_dict(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """Turn the authors' ResNet, ResNeXt or RepVGG weights into ours.

    Args:
        checkpoint: What their file holds: a state dict, or a dictionary with
            one under `state_dict`, with or without the prefix `module.`.

    Returns:
        State dict of an image classifier: `backbone.*` for `OREPAResNet`,
        `OREPAResNeXt` or `OREPARepVGG`, and `head.fc.*`. The tensors are not copied.

    Raises:
        CheckpointError: If it is no such checkpoint, a key is unknown or
            missing, or a shape does not fit; it is named.
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
        CheckpointError: If it is no such classifier, a key is unknown or
            missing, or a shape does not fit; it is named.
    """
    state = model_state_dict(checkpoint)
    form = training_form_of(state)
    others = [key for key, value in checkpoint.get('state_dict', checkpoint).items()
              if not isinstance(value, Tensor)]
    if others:
        raise CheckpointError(f'the checkpoint has an unknown key {others[0]}, which is no tensor')
    try:
        architecture = recognize_architecture(state)
        return architecture, _renamed(state, network_parts(architecture), form, architecture.name)
    except CheckpointError as error:
        if form == 'authors':
            raise
        raise CheckpointError(
            f'{error}. A network that differs from the published kind can be re-parameterized '
            'with its config: tools/reparam.py CONFIG CHECKPOINT') from error


def _renamed(state: Mapping[str, Tensor], parts: Iterable[Part], form: str, whole: str
             ) -> dict[str, Tensor]:
    """The tensors in our names, if they are exactly those of `parts`.

    `form` says which of its names a part goes by in `state`; `whole` is what
    asks for the shapes, for an error.
    """
    renamed: dict[str, Tensor] = {}
    expected, missing, misfits = set(), [], []
    for part in parts:
        source = getattr(part, form)
        shapes = {f'{source}.{key}' if source else key: (f'{part.ours}.{key}', tensor.shape)
                  for key, tensor in part.layer.state_dict().items()}
        expected |= shapes.keys()
        absent = [key for key in shapes if key not in state]
        all_of_it = source and len(absent) == len(shapes) > 1
        missing += [f'{source}.*'] if all_of_it else absent
        for key, (name, shape) in shapes.items():
            if key in state:
                renamed[name] = state[key]
                if state[key].shape != shape:
                    misfits.append(f'{key} has the shape {tuple(state[key].shape)}, where {whole} '
                                   f'asks for {tuple(shape)}')
    unknown = sorted(state.keys() - expected)
    if unknown:
        raise CheckpointError(f'the checkpoint has an unknown key {shortened(unknown)}')
    if missing:
        raise CheckpointError(f'the checkpoint has no key {shortened(missing)}: it is truncated')
    if misfits:
        raise CheckpointError(misfits[0])
    return renamed


def _empty_layer(block: Mapping[str, Tensor]) -> nn.Module:
    """The layer of a block, without content, whose size is that of its main kernel."""
    empty = {'bias': False, 'device': 'meta'}
    numbers = [int(m[1]) for key in block if (m := re.match(r'weight(\d+)\.', key))]
    if numbers:
        out, channels, *_ = tensor_shape(block, 'weight0.weight_orepa_origin')
        return OREPAStemConv2d(channels, out, 2 * max(numbers) + 3, **empty)
    if any(key.startswith('weight_or1x1_') for key in block):
        out, channels, *_ = tensor_shape(block, 'weight_or1x1_origin')
        return OREPAConv1x1(channels, out, **empty)
    if 'conv.weight' in block:
        out, channels, *_ = tensor_shape(block, 'conv.weight')
        return nn.Conv2d(channels, out, 1, **empty)
    out, group_in, size, _ = tensor_shape(block, 'weight_orepa_origin')
    channels = tensor_shape(block, 'weight_orepa_gconv_dw')[0] // OREPAConv2d.expansion
    return OREPAConv2d(channels, out, size, groups=channels // group_in, **empty)

