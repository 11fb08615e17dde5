"""The networks: recognised from a checkpoint, and every layer that each one has."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..errors import CheckpointError
from ..layers import OREPAConv1x1, OREPAConv2d, OREPARepVGGConv2d, OREPAStemConv2d
from .forms import training_form_of

#: Names of the networks that the authors describe.
PUBLISHED = ('ResNet-18', 'ResNet-34', 'ResNet-50', 'ResNet-101', 'ResNet-18-1.5x',
             'ResNet-18-2x', 'ResNeXt-50', 'RepVGG-A0', 'RepVGG-A1', 'RepVGG-A2', 'RepVGG-B1')

#: (has three convolutions per block, blocks per stage) of each depth.
_RESNETS = {
    18: (False, (2, 2, 2, 2)),
    34: (False, (3, 4, 6, 3)),
    50: (True, (3, 4, 6, 3)),
    101: (True, (3, 4, 23, 3)),
    152: (True, (3, 8, 36, 3)),
}
#: (blocks per stage, channels per stage) of MMPretrain's plain RepVGGs.
_REPVGGS = {
    'A0': ((2, 4, 14, 1), (48, 96, 192, 1280)),
    'A1': ((2, 4, 14, 1), (64, 128, 256, 1280)),
    'A2': ((2, 4, 14, 1), (96, 192, 384, 1408)),
    'B0': ((4, 6, 16, 1), (64, 128, 256, 1280)),
    'B1': ((4, 6, 16, 1), (128, 256, 512, 2048)),
    'B2': ((4, 6, 16, 1), (160, 320, 640, 2560)),
    'B3': ((4, 6, 16, 1), (192, 384, 768, 2560)),
}
#: By (depth, channels of stage 1), where a published width has a name.
_WIDTH_NAMES = {(18, 96): '-1.5x', (18, 128): '-2x'}
_BASE_CHANNELS = 64
_BOTTLENECK_EXPANSION = 4
#: Layers that have shapes but hold no memory.
_EMPTY = {'bias': False, 'device': 'meta'}


@dataclass(frozen=True)
class Architecture:
    """The network that a checkpoint holds.

    Attributes:
        name: The authors' name, e.g. `ResNet-18-2x`, or for a network that they
            did not publish a description, e.g. `ResNet-18, 16 channels wide`.
        backbone: Config of our backbone for MMPretrain. MMDetection and
            MMSegmentation call `width_per_group` of a ResNeXt `base_width`.
        num_classes: Outputs of the classifier.
    """

    name: str
    backbone: dict[str, Any]
    num_classes: int


class Part(NamedTuple):
    """One layer under both names.

    Attributes:
        authors: What its keys begin with in the authors' checkpoints.
        ours: What they begin with in an OpenMMLab classifier.
        layer: The layer without content, for the rest of its keys and their shapes.
    """

    authors: str
    ours: str
    layer: nn.Module


class _Names(NamedTuple):
    """Where the shapes that tell a network stand."""

    stem: str
    resnet_block: str
    repvgg_stem: str
    repvgg_block: str
    repvgg_dense: str
    linear: str


_NAMES = {
    'authors': _Names('stage0.conv1', 'stage{}.{}', 'stage0.rbr_dense', 'stage{}.{}', 'rbr_dense',
                      'linear'),
    'ours': _Names('backbone.conv1', 'backbone.layer{}.{}', 'backbone.stem.branch_3x3.conv',
                   'backbone.stage_{}.{}', 'branch_3x3.conv', 'head.fc'),
}


def recognize_architecture(state_dict: Mapping[str, Tensor]) -> Architecture:
    """Tell from keys and shapes which network a classifier in training form is.

    Args:
        state_dict: In the authors' names or in ours, without the prefix
            `module.`. Only what tells the network is looked at.

    Returns:
        The network.

    Raises:
        CheckpointError: If it is no such classifier, or blocks are missing; it
            says what the checkpoint is, or which.
    """
    form = training_form_of(state_dict)
    names = _NAMES[form]
    if any('.weight_rbr_' in key for key in state_dict):
        name, backbone = _recognize_repvgg(state_dict, names, only_whole=form == 'authors')
    else:
        name, backbone = _recognize_resnet(state_dict, names)
    return Architecture(name, backbone, tensor_shape(state_dict, f'{names.linear}.weight', 2)[0])


def network_parts(architecture: Architecture) -> list[Part]:
    """Every layer of a network.

    Args:
        architecture: From `recognize_architecture`.

    Returns:
        The layers in order, the classifier's `linear` last.
    """
    config = {key: value for key, value in architecture.backbone.items() if key != 'type'}
    parts = _repvgg_parts if architecture.backbone['type'] == 'OREPARepVGG' else _resnet_parts
    return list(parts(architecture.num_classes, **config))


def _recognize_resnet(state: Mapping[str, Tensor], names: _Names) -> tuple[str, dict[str, Any]]:
    """Name and backbone config of a ResNet or ResNeXt."""
    counts = _block_counts(state, names.resnet_block)
    first = names.resnet_block.format(1, 0)
    bottleneck = any(re.search(r'\.conv3\.', key) for key in state)
    depths = {depth: blocks for depth, (three, blocks) in _RESNETS.items() if three == bottleneck}
    depth = next((depth for depth, blocks in depths.items() if blocks == counts), None)
    if depth is None:
        raise _missing_blocks(counts, {f'a ResNet-{depth}': blocks for depth, blocks
                                       in depths.items()}, names.resnet_block)
    stem = tensor_shape(state, f'{names.stem}.weight0.weight_orepa_origin')[0]
    if bottleneck:
        out = tensor_shape(state, f'{first}.conv3.weight_or1x1_origin')[0]
        base = max(out // _BOTTLENECK_EXPANSION, 1)
        hidden, group_width = tensor_shape(state, f'{first}.conv2.weight_orepa_origin')[:2]
        groups = max(hidden // group_width, 1)
    else:
        base, groups = tensor_shape(state, f'{first}.conv1.weight_orepa_origin')[0], 1
    config = {'type': 'OREPAResNet' if groups == 1 else 'OREPAResNeXt', 'depth': depth,
              'base_channels': base, 'stem_channels': stem}
    notes = [f'ResNet-{depth}{_WIDTH_NAMES.get((depth, base), "")}']
    if groups > 1:
        config.update(groups=groups, width_per_group=group_width)
        notes = [f'ResNeXt-{depth}']
        if (groups, group_width) != (32, 4):
            notes.append(f'{groups} x {group_width}d')
    if base != _BASE_CHANNELS and (depth, base) not in _WIDTH_NAMES:
        notes.append(f'{base} channels wide')
    if stem != base:
        notes.append(f'with a stem of {stem} channels')
    return ', '.join(notes), config


def _recognize_repvgg(state: Mapping[str, Tensor], names: _Names, only_whole: bool
                      ) -> tuple[str, dict[str, Any]]:
    """Name and backbone config of a RepVGG.

    With `only_whole`, a network of published width is refused if it has less
    blocks than that: a shorter one is a RepVGG too, only the authors have none.
    """
    def width_of(block: str) -> int:
        return tensor_shape(state, f'{block}.weight_rbr_origin')[0]

    counts = _block_counts(state, names.repvgg_block)
    widths = tuple(width_of(f'{names.repvgg_block.format(stage, 0)}.{names.repvgg_dense}')
                   if count else None for stage, count in enumerate(counts, start=1))
    alike = {name: blocks for name, (blocks, published) in _REPVGGS.items()
             if all(width in (None, other) for width, other in zip(widths, published))}
    if 0 in counts or (only_whole and alike and counts not in alike.values()):
        raise _missing_blocks(counts, {f'RepVGG-{name}': blocks for name, blocks in alike.items()},
                              names.repvgg_block)
    stem = width_of(names.repvgg_stem)
    for name, (blocks, published) in _REPVGGS.items():
        if (counts, widths, stem) == (blocks, published, min(_BASE_CHANNELS, published[0])):
            return f'RepVGG-{name}', {'type': 'OREPARepVGG', 'arch': name}
    factors = [width / (_BASE_CHANNELS * 2**stage) for stage, width in enumerate(widths)]
    arch = {'num_blocks': list(counts), 'width_factor': factors, 'group_layer_map': None,
            'se_cfg': None, 'stem_channels': stem}
    return (f'RepVGG of {counts} blocks, {widths} channels wide',
            {'type': 'OREPARepVGG', 'arch': arch})


def _block_counts(state: Mapping[str, Tensor], block: str) -> tuple[int, ...]:
    """Blocks in each of the four stages; `block` is their name, to be formatted."""
    pattern = re.compile(block.replace('.', r'\.').format(r'([1-4])', r'(\d+)') + r'\.')
    counts = [0] * 4
    for match in filter(None, map(pattern.match, state)):
        stage, index = int(match[1]) - 1, int(match[2])
        counts[stage] = max(counts[stage], index + 1)
    return tuple(counts)


def _missing_blocks(counts: tuple[int, ...], known: Mapping[str, tuple[int, ...]],
                    block: str) -> CheckpointError:
    """The error for a number of blocks that no network has; `known` is by name, shortest first."""
    text = f'the checkpoint has {counts} blocks in its four stages'
    for name, blocks in known.items():
        missing = [block.format(stage, index) + '.*'
                   for stage, (found, there) in enumerate(zip(counts, blocks), start=1)
                   for index in range(found, there)]
        if missing and all(found <= there for found, there in zip(counts, blocks)):
            return CheckpointError(f'{text}, where {name} has {blocks}: it is truncated, there is '
                                   f'no {shortened(missing)}')
    return CheckpointError(f'{text}, as none of the networks known here has')


def shortened(names: list[str]) -> str:
    """Join names for a message.

    Args:
        names: At least one.

    Returns:
        The first five, and how many there are besides.
    """
    more = f' and {len(names) - 5} more' if len(names) > 5 else ''
    return ', '.join(names[:5]) + more


def tensor_shape(state_dict: Mapping[str, Tensor], key: str, dimensions: int = 4
                 ) -> tuple[int, ...]:
    """The shape of a tensor that tells the sizes of others.

    Args:
        state_dict: Any.
        key: The tensor's.
        dimensions: How many it must have, none of them empty.

    Returns:
        The shape.

    Raises:
        CheckpointError: If there is no such tensor, or of another kind of shape.
    """
    if key not in state_dict:
        raise CheckpointError(f'the checkpoint has no key {key}: it is truncated')
    shape = tuple(state_dict[key].shape)
    if len(shape) != dimensions or 0 in shape:
        raise CheckpointError(f'{key} has the shape {shape}, where {dimensions} dimensions are '
                              'needed, and none of them empty')
    return shape


def _resnet_parts(num_classes: int, depth: int, base_channels: int, stem_channels: int,
                  groups: int = 1, width_per_group: int = 0) -> Iterator[Part]:
    bottleneck, counts = _RESNETS[depth]
    yield from _conv_and_bn('stage0.conv1', 'conv1', 'bn1',
                            OREPAStemConv2d(3, stem_channels, 7, **_EMPTY))
    channels = stem_channels
    for stage, count in enumerate(counts, start=1):
        scale = 2 ** (stage - 1)
        hidden = scale * (groups * width_per_group if groups > 1 else base_channels)
        out = scale * base_channels * (_BOTTLENECK_EXPANSION if bottleneck else 1)
        for index in range(count):
            if bottleneck:
                layers = [OREPAConv1x1(channels, hidden, **_EMPTY),
                          OREPAConv2d(hidden, hidden, 3, groups=groups, **_EMPTY),
                          OREPAConv1x1(hidden, out, **_EMPTY)]
            else:
                layers = [OREPAConv2d(channels, out, 3, **_EMPTY),
                          OREPAConv2d(out, out, 3, **_EMPTY)]
            source, target = f'stage{stage}.{index}', f'layer{stage}.{index}'
            for n, layer in enumerate(layers, start=1):
                yield from _conv_and_bn(f'{source}.conv{n}', f'{target}.conv{n}',
                                        f'{target}.bn{n}', layer)
            if index == 0 and (stage > 1 or channels != out):
                shortcut = OREPAConv1x1 if bottleneck else nn.Conv2d
                yield from _conv_and_bn(f'{source}.shortcut', f'{target}.downsample.0',
                                        f'{target}.downsample.1',
                                        shortcut(channels, out, 1, **_EMPTY))
            channels = out
    yield _classifier(channels, num_classes)


def _repvgg_parts(num_classes: int, arch: str | dict[str, Any]) -> Iterator[Part]:
    if isinstance(arch, str):
        counts, widths = _REPVGGS[arch]
        channels = min(_BASE_CHANNELS, widths[0])
    else:
        counts, channels = arch['num_blocks'], arch['stem_channels']
        widths = [int(_BASE_CHANNELS * 2**stage * factor)
                  for stage, factor in enumerate(arch['width_factor'])]
    yield from _repvgg_block('stage0', 'stem', 3, channels, 2)
    for stage, (count, width) in enumerate(zip(counts, widths), start=1):
        for index in range(count):
            yield from _repvgg_block(f'stage{stage}.{index}', f'stage_{stage}.{index}', channels,
                                     width, 1 if index else 2)
            channels = width
    yield _classifier(channels, num_classes)


def _repvgg_block(source: str, target: str, channels: int, out: int, stride: int
                  ) -> Iterator[Part]:
    yield from _conv_and_bn(f'{source}.rbr_dense', f'{target}.branch_3x3.conv',
                            f'{target}.branch_3x3.norm',
                            OREPARepVGGConv2d(channels, out, 3, stride, 1, **_EMPTY))
    yield from _conv_and_bn(f'{source}.rbr_1x1', f'{target}.branch_1x1.conv',
                            f'{target}.branch_1x1.norm', nn.Conv2d(channels, out, 1, **_EMPTY))
    if channels == out and stride == 1:
        yield Part(f'{source}.rbr_identity', f'backbone.{target}.branch_norm',
                   nn.BatchNorm2d(out, device='meta'))


def _conv_and_bn(source: str, conv: str, bn: str, layer: nn.Module) -> Iterator[Part]:
    """The authors keep a plain convolution beside its BN, a block's tensors around it."""
    inner = '.conv' if isinstance(layer, nn.Conv2d) else ''
    yield Part(source + inner, f'backbone.{conv}', layer)
    yield Part(f'{source}.bn', f'backbone.{bn}', nn.BatchNorm2d(layer.out_channels, device='meta'))


def _classifier(features: int, num_classes: int) -> Part:
    return Part('linear', 'head.fc', nn.Linear(features, num_classes, device='meta'))
