"""The networks: recognised from a checkpoint, named as the authors do, built without memory."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..errors import CheckpointError, shortened
from .forms import is_branch_key, training_form_of

#: Names of the networks that the authors describe.
PUBLISHED = ('ResNet-18', 'ResNet-34', 'ResNet-50', 'ResNet-101', 'ResNet-18-1.5x',
             'ResNet-18-2x', 'ResNeXt-50', 'RepVGG-A0', 'RepVGG-A1', 'RepVGG-A2', 'RepVGG-B1')

#: Blocks per stage, by depth; from depth 50 on a block has three convolutions.
_RESNETS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3),
            50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
#: Blocks per stage, by the letter, and channels per stage of MMPretrain's plain RepVGGs.
_REPVGG_BLOCKS = {'A': (2, 4, 14, 1), 'B': (4, 6, 16, 1)}
_REPVGGS = {'A0': (48, 96, 192, 1280), 'A1': (64, 128, 256, 1280), 'A2': (96, 192, 384, 1408),
            'B0': (64, 128, 256, 1280), 'B1': (128, 256, 512, 2048), 'B2': (160, 320, 640, 2560),
            'B3': (192, 384, 768, 2560)}
#: By (depth, channels of stage 1), where a published width has a name.
_WIDTH_NAMES = {(18, 96): '-1.5x', (18, 128): '-2x'}
_BASE_CHANNELS = 64
_BOTTLENECK_EXPANSION = 4
#: The packages whose backbones are tried, in this order; the first one alone has RepVGG.
_PACKAGES = ('mmpretrain', 'mmdet', 'mmseg')
#: What a part of our keys is called by the authors, who keep a convolution and its BN together.
_AUTHORS_NAMES = [(re.compile(pattern), name) for pattern, name in (
    (r'^head\.fc\.', 'linear.'),
    (r'^backbone\.(conv1|bn1)\.', r'stage0.\1.'),
    (r'^backbone\.stem\.', 'stage0.'),
    (r'^backbone\.(?:layer|stage_)(\d)\.', r'stage\1.'),
    (r'\.bn(\d)\.', r'.conv\1.bn.'),
    (r'\.downsample\.0\.weight$', '.shortcut.conv.weight'),  # a plain one, else there are branches
    (r'\.downsample\.0\.', '.shortcut.'),
    (r'\.downsample\.1\.', '.shortcut.bn.'),
    (r'\.branch_3x3\.conv\.', '.rbr_dense.'),
    (r'\.branch_3x3\.norm\.', '.rbr_dense.bn.'),
    (r'\.branch_1x1\.conv\.', '.rbr_1x1.conv.'),
    (r'\.branch_1x1\.norm\.', '.rbr_1x1.bn.'),
    (r'\.branch_norm\.', '.rbr_identity.'),
)]
#: Stage and number of a block, in any names.
_BLOCK = re.compile(r'(?:stage|(?:backbone\.)?layer|backbone\.stage_)([1-4])\.(\d+)\.')
#: A branch of RepVGG's 3 x 3, which has a 1 x 1 and an identity beside it, or among its branches.
_REPVGG_BRANCH = re.compile(r'\.weight_(rbr|online)_')
#: The one convolution of a deployed RepVGG block, at MMPretrain and at timm.
_DEPLOYED_REPVGG = re.compile(r'\.(branch_reparam|reparam_conv)\.')


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


def recognize_architecture(state_dict: Mapping[str, Tensor]) -> Architecture:
    """Tell from keys and shapes which network a classifier is.

    Args:
        state_dict: In training form, in the authors' names or in ours; or a
            plain ResNet or ResNeXt, see `plain_form_of`. Without the prefix
            `module.`. Only what tells the network is looked at.

    Returns:
        The network.

    Raises:
        CheckpointError: If it is no such classifier, or blocks are missing; it
            says what the checkpoint is, or which.
    """
    form = plain_form_of(state_dict) or training_form_of(state_dict)
    is_repvgg = any(map(_REPVGG_BRANCH.search, state_dict))
    name, backbone = (_recognize_repvgg if is_repvgg else _recognize_resnet)(state_dict, form)
    num_classes = tensor_shape(state_dict, key_in(form, 'head.fc.weight'), 2)[0]
    return Architecture(name, backbone, num_classes)


def plain_form_of(keys: Collection[str]) -> str | None:
    """Tell in whose names a classifier is a plain ResNet or ResNeXt.

    Args:
        keys: Of a state dict, without the prefix `module.`.

    Returns:
        `torchvision` for its names, which timm has too (`conv1.*`,
        `layer1.0.conv1.*`, `fc.*`), `openmmlab` for `backbone.*` and
        `head.fc.*`. None for all else, e.g. a training form.

    Raises:
        CheckpointError: If it is a deployed RepVGG, whose branches are gone, or
            a plain detector or segmentor.
    """
    if any(map(is_branch_key, keys)):
        return None
    deployed = next((key for key in keys if _DEPLOYED_REPVGG.search(key)), None)
    if deployed:
        raise CheckpointError(
            f'this is a RepVGG in deploy form already (it has {deployed}): its branches have a BN '
            'each and cannot be recovered from one kernel. Give the checkpoint in training form')
    form = next((form for form, prefix in (('torchvision', ''), ('openmmlab', 'backbone.'))
                 if f'{prefix}conv1.weight' in keys and f'{prefix}layer1.0.conv1.weight' in keys),
                None)
    parts = {key.partition('.')[0] for key in keys}
    if form == 'openmmlab' and not parts <= {'backbone', 'head'}:
        raise CheckpointError(
            f'this is a plain model ({", ".join(sorted(parts))}), where an image classifier is '
            'expected. Expand it with the config of its training form:\n'
            '  mim run orepa_mm expand CONFIG CHECKPOINT OUT')
    return form


def build_backbone(architecture: Architecture, plain: bool = False, device: str = 'meta'
                   ) -> nn.Module:
    """Build a network's backbone, with the first package that has it.

    Args:
        architecture: The network.
        plain: Build the stock network instead of the training form.
        device: Where. On the meta device it is without values, for weights that
            are loaded with `assign=True`.

    Returns:
        The backbone.

    Raises:
        ImportError: If no such package is installed; it says what to install.
    """
    name = architecture.backbone['type']
    reasons = []
    for package in _PACKAGES[:1] if name == 'OREPARepVGG' else _PACKAGES:
        cfg = {**architecture.backbone, 'type': f'{package}.{name}', 'deploy': plain}
        if package != 'mmpretrain' and 'width_per_group' in cfg:
            cfg['base_width'] = cfg.pop('width_per_group')
        try:
            MODELS.get(cfg['type'])  # imports the package, which may make tensors of its own
            with torch.device(device), _ReadableLinspace():
                return MODELS.build(cfg)
        except ImportError as error:
            reasons.append(str(error))
    raise ImportError('; '.join(reasons))


class _ReadableLinspace(TorchFunctionMode):
    """Keeps `torch.linspace` on the CPU: MMPretrain's ResNet reads its values while building."""

    def __torch_function__(self, func: Callable[..., Any], types: Any,
                           args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
                           ) -> Any:
        kwargs = kwargs or {}
        if func is torch.linspace:
            kwargs = {**kwargs, 'device': 'cpu'}
        return func(*args, **kwargs)


def key_in(form: str, key: str) -> str:
    """What a key is called in a checkpoint.

    Args:
        form: From `training_form_of` or `plain_form_of`.
        key: Or the beginning of one, in our names: `backbone.*` or `head.fc.*`.

    Returns:
        The key in the names of that checkpoint.
    """
    if form == 'authors':
        for pattern, name in _AUTHORS_NAMES:
            key = pattern.sub(name, key)
    elif form == 'torchvision':
        key = key.removeprefix('backbone.').removeprefix('head.')
    return key


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


def _recognize_resnet(state: Mapping[str, Tensor], form: str) -> tuple[str, dict[str, Any]]:
    """Name and backbone config of a ResNet or ResNeXt."""
    def shape_of(layer: str, branch: str = 'weight_orepa_origin', generator: str = ''
                 ) -> tuple[int, ...]:
        key = f'{layer}.{generator}{branch}' if form in ('authors', 'ours') else f'{layer}.weight'
        return tensor_shape(state, key_in(form, f'backbone.{key}'))

    counts = _block_counts(state)
    bottleneck = any('.conv3.' in key for key in state)
    depths = {depth: blocks for depth, blocks in _RESNETS.items() if (depth >= 50) == bottleneck}
    depth = next((depth for depth, blocks in depths.items() if blocks == counts), None)
    if depth is None:
        raise _missing_blocks(counts, {f'a ResNet-{depth}': blocks for depth, blocks
                                       in depths.items()}, form, 'layer')
    stem, groups = shape_of('conv1', generator='weight0.')[0], 1
    if bottleneck:
        out = shape_of('layer1.0.conv3', 'weight_or1x1_origin')[0]
        base = max(out // _BOTTLENECK_EXPANSION, 1)
        hidden, group_width = shape_of('layer1.0.conv2')[:2]
        groups = max(hidden // group_width, 1)
    else:
        base = shape_of('layer1.0.conv1')[0]
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


def _recognize_repvgg(state: Mapping[str, Tensor], form: str) -> tuple[str, dict[str, Any]]:
    """Name and backbone config of a RepVGG.

    A shorter one of published width is a RepVGG too, but not the authors'.
    """
    def width_of(block: str) -> int:
        kernel = f'backbone.{block}.branch_3x3.conv.weight_{branches}_origin'
        return tensor_shape(state, key_in(form, kernel))[0]

    online = any('.weight_online_' in key for key in state)
    branches = 'online' if online else 'rbr'
    options = {'conv_cfg': {'type': 'OREPA', 'block': 'repvgg_online'}} if online else {}
    kind = ' with one BN per block' * online
    counts = _block_counts(state)
    widths = tuple(width_of(f'stage_{stage}.0') if count else 0
                   for stage, count in enumerate(counts, start=1))
    alike = {name: _REPVGG_BLOCKS[name[0]] for name, published in _REPVGGS.items()
             if all(width in (0, other) for width, other in zip(widths, published))}
    name = next((name for name, blocks in alike.items() if blocks == counts), None)
    if 0 in counts or (form == 'authors' and alike and name is None):
        raise _missing_blocks(counts, {f'RepVGG-{name}': blocks for name, blocks in alike.items()},
                              form, 'stage_')
    stem = width_of('stem')
    if name is not None and stem == min(_BASE_CHANNELS, widths[0]):
        return f'RepVGG-{name}{kind}', {'type': 'OREPARepVGG', 'arch': name, **options}
    factors = [width / (_BASE_CHANNELS * 2**stage) for stage, width in enumerate(widths)]
    arch = {'num_blocks': list(counts), 'width_factor': factors, 'group_layer_map': None,
            'se_cfg': None, 'stem_channels': stem}
    return (f'RepVGG of {counts} blocks, {widths} channels wide{kind}',
            {'type': 'OREPARepVGG', 'arch': arch, **options})


def _block_counts(state: Mapping[str, Tensor]) -> tuple[int, ...]:
    """Blocks in each of the four stages."""
    counts = [0] * 4
    for match in filter(None, map(_BLOCK.match, state)):
        stage, index = int(match[1]) - 1, int(match[2])
        counts[stage] = max(counts[stage], index + 1)
    return tuple(counts)


def _missing_blocks(counts: tuple[int, ...], known: Mapping[str, tuple[int, ...]], form: str,
                    stage_name: str) -> CheckpointError:
    """The error for a number of blocks that no network has; `known` is by name, shortest first."""
    text = f'the checkpoint has {counts} blocks in its four stages'
    for name, blocks in known.items():
        missing = [key_in(form, f'backbone.{stage_name}{stage}.{index}.') + '*'
                   for stage, (found, there) in enumerate(zip(counts, blocks), start=1)
                   for index in range(found, there)]
        if missing and all(found <= there for found, there in zip(counts, blocks)):
            return CheckpointError(f'{text}, where {name} has {blocks}: it is truncated, there is '
                                   f'no {shortened(missing)}')
    return CheckpointError(f'{text}, as none of the networks known here has')
