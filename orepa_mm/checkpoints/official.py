"""The authors' checkpoints: their names turned into ours.

Their ResNets hold each convolution with its BN in one block; OpenMMLab keeps
them apart. The names inside a block are the same here and there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..layers import OREPAConv1x1, OREPAConv2d, OREPAStemConv2d
from .io import CheckpointError, load_checkpoint, model_state_dict, written_whole

#: (has three convolutions per block, blocks per stage) of the published ResNets.
_ARCHITECTURES = {
    18: (False, (2, 2, 2, 2)),
    34: (False, (3, 4, 6, 3)),
    50: (True, (3, 4, 6, 3)),
    101: (True, (3, 4, 23, 3)),
}

#: The 7 x 7 stem is a chain of so many 3 x 3 kernels.
_STEM_KERNELS = 3

_BN_KEYS = frozenset(nn.BatchNorm2d(1).state_dict())
_BLOCK_KEYS = {
    kind: frozenset(layer.state_dict()) for kind, layer in {
        'OREPA': OREPAConv2d(1, 1, 3, bias=False, device='meta'),
        'OREPA_1x1': OREPAConv1x1(1, 1, bias=False, device='meta'),
        'plain': nn.Conv2d(1, 1, 1, bias=False, device='meta'),
    }.items()
}


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
    numbers = {int(m[1]) for key in state_dict if (m := re.match(r'weight(\d+)\.', key))}
    if numbers:
        kind = max(numbers) + 1
    elif any(key.startswith('weight_or1x1_') for key in state_dict):
        kind = 'OREPA_1x1'
    else:
        kind = 'plain' if 'conv.weight' in state_dict else 'OREPA'
    return _split_block(state_dict, kind, '')


def convert_official_state_dict(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """Turn the authors' ResNet or ResNeXt weights into ours.

    Args:
        checkpoint: What their file holds: a state dict, or a dictionary with
            one under `state_dict`, with or without the prefix `module.`.

    Returns:
        State dict of an image classifier: `backbone.*` for `OREPAResNet` or
        `OREPAResNeXt`, and `head.fc.*`. The tensors are not copied.

    Raises:
        CheckpointError: If a key is unknown or missing; it is named.
    """
    state = model_state_dict(checkpoint)
    others = [key for key, value in checkpoint.get('state_dict', checkpoint).items()
              if not isinstance(value, Tensor)]
    if others:
        raise CheckpointError(f'the checkpoint has an unknown key {others[0]}, which is no tensor')
    rest = dict(state)
    converted: dict[str, Tensor] = {}
    for source, kind, conv_name, bn_name in _blocks(_depth_of(state)):
        block = {key.removeprefix(f'{source}.'): rest.pop(key) for key in state
                 if key.startswith(f'{source}.')}
        if not block:
            raise CheckpointError(f'the checkpoint has no {source}.*: it is truncated')
        conv, bn = _split_block(block, kind, f'{source}.')
        converted.update({f'backbone.{conv_name}.{key}': value for key, value in conv.items()})
        converted.update({f'backbone.{bn_name}.{key}': value for key, value in bn.items()})
    _check_keys(rest.keys(), {'linear.weight', 'linear.bias'}, '')
    if rest['linear.weight'].shape[:1] != rest['linear.bias'].shape:
        raise CheckpointError('linear.weight and linear.bias differ in their number of classes')
    converted.update({'head.fc.weight': rest['linear.weight'], 'head.fc.bias': rest['linear.bias']})
    return converted


def convert_checkpoint_file(source: str | Path, target: str | Path) -> int:
    """Convert a file of the authors to a checkpoint for `init_cfg=dict(type='Pretrained')`.

    Args:
        source: Their file, see `convert_official_state_dict`.
        target: File to write, whole or not at all.

    Returns:
        Number of tensors written.

    Raises:
        FileNotFoundError: If there is no such file.
        FileExistsError: If the target exists already.
        CheckpointError: If it is no checkpoint of the authors' ResNets.
    """
    if Path(target).exists():
        raise FileExistsError(f'{target} exists already: nothing is overwritten')
    state = convert_official_state_dict(load_checkpoint(source))
    with written_whole(target) as path:
        torch.save({'meta': {'form': 'training', 'source': Path(source).name},
                    'state_dict': state}, path)
    return len(state)


def _depth_of(state: Mapping[str, Tensor]) -> int:
    """The depth of the ResNet with these keys in the authors' names."""
    numbers = [{int(m[1]) for key in state if (m := re.match(rf'stage{stage}\.(\d+)\.conv', key))}
               for stage in range(1, 5)]
    blocks = tuple(max(found, default=-1) + 1 for found in numbers)
    bottleneck = any(re.match(r'stage\d\.\d+\.conv3\.', key) for key in state)
    for depth, architecture in _ARCHITECTURES.items():
        if architecture == (bottleneck, blocks):
            return depth
    first = ', '.join(list(state)[:3])
    raise CheckpointError(
        'this is no OREPA ResNet-18/34/50/101 or ResNeXt-50 of the authors: it has '
        f'{blocks} blocks in stage1 to stage4 and begins with the keys {first}')


def _blocks(depth: int) -> Iterator[tuple[str, str | int, str, str]]:
    """(the authors' block, its kind, our convolution, our BN) for every block of a ResNet.

    The kind of a stem is the number of its 3 x 3 kernels.
    """
    bottleneck, stage_blocks = _ARCHITECTURES[depth]
    kinds = ['OREPA_1x1', 'OREPA', 'OREPA_1x1'] if bottleneck else ['OREPA', 'OREPA']
    yield 'stage0.conv1', _STEM_KERNELS, 'conv1', 'bn1'
    for stage, count in enumerate(stage_blocks, start=1):
        for index in range(count):
            source, target = f'stage{stage}.{index}', f'layer{stage}.{index}'
            for n, kind in enumerate(kinds, start=1):
                yield f'{source}.conv{n}', kind, f'{target}.conv{n}', f'{target}.bn{n}'
            if index == 0 and (bottleneck or stage > 1):
                yield (f'{source}.shortcut', 'OREPA_1x1' if bottleneck else 'plain',
                       f'{target}.downsample.0', f'{target}.downsample.1')


def _split_block(state_dict: Mapping[str, Tensor], kind: str | int, prefix: str
                 ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """State dicts of the convolution and the BN; `prefix` is for errors."""
    if isinstance(kind, int):
        expected = {f'weight{n}.{key}' for n in range(kind) for key in _BLOCK_KEYS['OREPA']}
    else:
        expected = {f'conv.{key}' if kind == 'plain' else key for key in _BLOCK_KEYS[kind]}
    _check_keys(state_dict, expected | {f'bn.{key}' for key in _BN_KEYS}, prefix)
    conv = {key.removeprefix('conv.'): value for key, value in state_dict.items()
            if not key.startswith('bn.')}
    bn = {key.removeprefix('bn.'): value for key, value in state_dict.items()
          if key.startswith('bn.')}
    layer = _empty_layer(conv, kind)
    for part, module, given in (('', layer, conv), ('bn.', nn.BatchNorm2d(
            layer.out_channels, device='meta'), bn)):
        for key, tensor in module.state_dict().items():
            if tensor.shape != given[key].shape:
                raise CheckpointError(
                    f'{prefix}{part}{key} has the shape {tuple(given[key].shape)}, where the '
                    f'other tensors of its block ask for {tuple(tensor.shape)}')
    return conv, bn


def _empty_layer(state: Mapping[str, Tensor], kind: str | int) -> nn.Module:
    """A layer without content whose size is that of the block's main kernel."""
    if isinstance(kind, int):
        out, channels = state['weight0.weight_orepa_origin'].shape[:2]
        return OREPAStemConv2d(channels, out, 2 * kind + 1, bias=False, device='meta')
    if kind == 'OREPA':
        out, group_in, size = state['weight_orepa_origin'].shape[:3]
        channels = state['weight_orepa_gconv_dw'].shape[0] // OREPAConv2d.expansion
        return OREPAConv2d(channels, out, size, groups=channels // group_in, bias=False,
                           device='meta')
    if kind == 'OREPA_1x1':
        out, channels = state['weight_or1x1_origin'].shape[:2]
        return OREPAConv1x1(channels, out, bias=False, device='meta')
    out, channels = state['weight'].shape[:2]
    return nn.Conv2d(channels, out, 1, bias=False, device='meta')


def _check_keys(found: Iterable[str], expected: Iterable[str], prefix: str) -> None:
    for problem, keys in (('an unknown key', set(found) - set(expected)),
                          ('no key', set(expected) - set(found))):
        if keys:
            names = ', '.join(f'{prefix}{key}' for key in sorted(keys)[:5])
            more = f' and {len(keys) - 5} more' if len(keys) > 5 else ''
            raise CheckpointError(f'the checkpoint has {problem} {names}{more}')
