"""What a checkpoint holds: the network, recognised from keys and shapes, or another form."""

import pytest
import torch
from helpers import golden, needs_golden, official_keys
from mmengine.registry import MODELS

from orepa_mm.checkpoints import (
    PUBLISHED,
    Architecture,
    convert_official_state_dict,
    read_classifier,
    recognize_architecture,
)
from orepa_mm.checkpoints.architectures import build_backbone, plain_form_of
from orepa_mm.checkpoints.official import read_plain_classifier
from orepa_mm.errors import CheckpointError

NARROW = {
    'net_resnet18_narrow': ('ResNet-18, 8 channels wide', dict(
        type='OREPAResNet', depth=18, base_channels=8, stem_channels=8)),
    'net_resnet50_narrow': ('ResNet-50, 8 channels wide', dict(
        type='OREPAResNet', depth=50, base_channels=8, stem_channels=8)),
    'net_resnext50_narrow': ('ResNeXt-50, 4 x 1d, 16 channels wide', dict(
        type='OREPAResNeXt', depth=50, base_channels=16, stem_channels=16, groups=4,
        width_per_group=1)),
    'net_repvgg_narrow': ('RepVGG of (1, 2, 1, 1) blocks, (8, 16, 32, 64) channels wide', dict(
        type='OREPARepVGG', arch=dict(
            num_blocks=[1, 2, 1, 1], width_factor=[0.125] * 4, group_layer_map=None, se_cfg=None,
            stem_channels=8))),
}

PACKAGES = ('mmpretrain', 'mmdet', 'mmseg')
#: What the authors' files hold beside weights: buffers of the blocks that never change.
CONSTANTS = ('.id_tensor', '_avg_avg', '_prior')


def resnet_config(depth, channels):
    return dict(type='OREPAResNet', depth=depth, base_channels=channels, stem_channels=channels)


RELEASED = {
    'ResNet-18': resnet_config(18, 64),
    'ResNet-34': resnet_config(34, 64),
    'ResNet-50': resnet_config(50, 64),
    'ResNet-101': resnet_config(101, 64),
    'ResNet-18-2x': resnet_config(18, 128),
    'ResNeXt-50': dict(resnet_config(50, 64), type='OREPAResNeXt', groups=32, width_per_group=4),
    'RepVGG-A0': dict(type='OREPARepVGG', arch='A0'),
    'RepVGG-A1': dict(type='OREPARepVGG', arch='A1'),
    'RepVGG-A2': dict(type='OREPARepVGG', arch='A2'),
}


def released(name):
    """A released checkpoint without its numbers."""
    return {key: torch.empty(shape, device='meta') for key, shape in official_keys()[name].items()}


def widened(state, factor):
    """The shapes of a narrow network at a multiple of its width."""
    fixed = {1, 3, 5, 6, 10, 24}  # window sizes, the image's channels, scales, classes
    return {key: torch.empty([n if n in fixed else int(n * factor) for n in value.shape],
                             device='meta') for key, value in state.items()}


@pytest.mark.parametrize('wrap', [lambda state: state, lambda state: {
    'state_dict': {f'module.{key}': value for key, value in state.items()}, 'epoch': 120,
}], ids=['bare', 'under state_dict'])
@pytest.mark.parametrize('name', RELEASED)
def test_released_checkpoints(name, wrap):
    state = released(name)
    architecture, converted = read_classifier(wrap(state))
    assert (architecture.name, architecture.num_classes) == (name, 1000)
    assert architecture.backbone == RELEASED[name]
    assert name in PUBLISHED
    assert len(converted) == len([key for key in state if not key.endswith(CONSTANTS)])
    assert {key.partition('.')[0] for key in converted} == {'backbone', 'head'}
    # the same network is recognised in our names, and read as it is
    assert read_classifier(converted) == (architecture, converted)


@needs_golden
@pytest.mark.parametrize('name', NARROW)
def test_narrow_networks_are_described(name):
    state = golden(name)['state_dict']
    for names in (state, convert_official_state_dict(state)):
        architecture = recognize_architecture(names)
        assert (architecture.name, architecture.backbone) == NARROW[name]
        assert architecture.num_classes == 10


@needs_golden
@pytest.mark.parametrize(('factor', 'name', 'channels'), [
    (8, 'ResNet-18', 64), (12, 'ResNet-18-1.5x', 96), (16, 'ResNet-18-2x', 128),
    (10, 'ResNet-18, 80 channels wide', 80)])
def test_widths_of_resnet_18(factor, name, channels):
    architecture, _ = read_classifier(widened(golden('net_resnet18_narrow')['state_dict'], factor))
    assert architecture.name == name
    assert architecture.backbone == resnet_config(18, channels)


def test_a_number_of_classes_other_than_imagenets():
    state = released('RepVGG-A1')
    for key in ('linear.weight', 'linear.bias'):
        state[key] = state[key][:7]
    assert read_classifier(state)[0].num_classes == 7


# --- built ------------------------------------------------------------------

@pytest.mark.parametrize('config', [*(resnet_config(depth, 8) for depth in (18, 34, 50, 101, 152)),
                                    *(dict(type='OREPARepVGG', arch=arch) for arch in (
                                        'A0', 'A1', 'A2', 'B0', 'B1', 'B2', 'B3'))],
                         ids=lambda config: str(config.get('depth', config.get('arch'))))
def test_every_stock_depth_is_recognized_as_what_it_is(config):
    """The tables of blocks and widths here against the stock classes' own."""
    backbone = build_backbone(Architecture('', config, 3)).state_dict()
    state = {f'backbone.{key}': value for key, value in backbone.items()}
    assert all(value.is_meta for value in state.values())
    *_, features = (value.numel() for key, value in state.items() if key.endswith('running_var'))
    with torch.device('meta'):
        state |= {'head.fc.weight': torch.zeros(3, features), 'head.fc.bias': torch.zeros(3)}
    architecture, converted = read_classifier(state)
    assert architecture.backbone == config
    assert converted == state


def test_a_package_is_imported_before_the_meta_device_is_set(monkeypatch):
    """MMCV makes tensors while it is imported, which everybody uses later."""
    get, devices = MODELS.get, []

    def recorded(name):
        devices.append(torch.empty(0).device.type)
        return get(name)

    monkeypatch.setattr(MODELS, 'get', recorded)
    build_backbone(Architecture('', resnet_config(18, 8), 3))
    assert devices[0] == 'cpu'


@pytest.fixture
def missing(monkeypatch):
    """Let a backbone of some packages fail as it does where they are not installed."""
    def miss(name, packages):
        for package in packages:
            def fail(package=package, **kwargs):
                raise ImportError(f'{package} is not installed')

            MODELS.get(f'{package}.{name}')  # now, or loading the package later puts it back
            monkeypatch.setitem(MODELS.children[package].module_dict, name, fail)
    return miss


@needs_golden
@pytest.mark.parametrize('package', PACKAGES)
def test_the_first_package_that_is_there(missing, package):
    """A ResNeXt, whose arguments differ."""
    missing('OREPAResNeXt', PACKAGES[:PACKAGES.index(package)])
    architecture, state = read_classifier(golden('net_resnext50_narrow')['state_dict'])
    backbone = build_backbone(architecture)
    assert isinstance(backbone, MODELS.get(f'{package}.ResNeXt'))
    assert {f'backbone.{key}': value.shape for key, value in backbone.state_dict().items()} == {
        key: value.shape for key, value in state.items() if not key.startswith('head.')}


@needs_golden
@pytest.mark.parametrize(('name', 'kind', 'packages'), [
    ('net_resnet18_narrow', 'OREPAResNet', PACKAGES),
    ('net_repvgg_narrow', 'OREPARepVGG', PACKAGES[:1])])
def test_without_any_package(missing, name, kind, packages):
    missing(kind, packages)
    state = golden(name)['state_dict']
    assert recognize_architecture(state).name == NARROW[name][0]
    with pytest.raises(ImportError, match='; '.join(
            f'{package} is not installed' for package in packages)):
        convert_official_state_dict(state)


# --- truncated --------------------------------------------------------------

def without(state, *prefixes):
    return {key: value for key, value in state.items() if not key.startswith(prefixes)}


@pytest.mark.parametrize(('name', 'prefixes', 'message'), [
    ('ResNet-18', ['stage4.1.'], r'\(2, 2, 2, 1\) blocks .*a ResNet-18 has .* no stage4\.1\.\*'),
    ('ResNet-50', ['stage4.', 'linear.'], r'\(3, 4, 6, 0\) .*ResNet-50 .* no stage4\.0\.\*, '
     r'stage4\.1\.\*, stage4\.2\.\*$'),
    ('ResNet-101', ['stage3.22.'], r'ResNet-101 .* no stage3\.22\.\*'),
    ('RepVGG-A0', ['stage3.13.'], r'\(2, 4, 13, 1\) .*RepVGG-A0 .* no stage3\.13\.\*'),
    ('RepVGG-A2', ['stage4.', 'linear.'], r'RepVGG-A2 .* no stage4\.0\.\*'),
    ('ResNet-18', ['stage2.0.'], r'no key stage2\.0\.conv1\.\*, stage2\.0\.conv1\.bn\.\*, .* and '
     r'1 more: it is truncated'),
    ('RepVGG-A1', ['stage2.1.'], r'no key stage2\.1\.rbr_identity\.\*, '
     r'stage2\.1\.rbr_dense\.\*, .*: it is truncated'),
    ('RepVGG-A1', ['stage2.0.'], r'no key stage2\.0\.rbr_dense\.weight_rbr_origin: it is trunc'),
    ('ResNeXt-50', ['stage0.'], r'no key stage0\.conv1\.weight0\.weight_orepa_origin: it is trunc'),
    ('RepVGG-A1', ['linear.'], r'no key linear\.weight: it is truncated'),
])
def test_missing_blocks_are_named(name, prefixes, message):
    with pytest.raises(CheckpointError, match=message):
        read_classifier(without(released(name), *prefixes))


def test_a_shorter_repvgg_is_one_only_if_it_was_trained_here():
    converted = convert_official_state_dict(released('RepVGG-A1'))
    architecture, _ = read_classifier(without(converted, 'backbone.stage_3.13.'))
    assert architecture.backbone['arch']['num_blocks'] == [2, 4, 13, 1]
    with pytest.raises(CheckpointError, match=r'\(2, 4, 14, 0\) blocks'):
        read_classifier(without(converted, 'backbone.stage_4.'))


def test_a_shape_that_tells_nothing():
    state = released('ResNet-18')
    for shape in ((), (0, 3, 3, 3)):
        state['stage0.conv1.weight0.weight_orepa_origin'] = torch.zeros(shape)
        with pytest.raises(CheckpointError, match=r'weight_orepa_origin has the shape .*where 4'):
            read_classifier(state)


def test_a_block_count_that_no_resnet_has():
    state = released('ResNet-18')
    more = {key.replace('stage1.1.', 'stage1.40.'): value for key, value in state.items()
            if key.startswith('stage1.1.')}
    with pytest.raises(CheckpointError, match=r'\(41, 2, 2, 2\) blocks .* none of the networks'):
        read_classifier({**state, **more})


# --- other forms ------------------------------------------------------------

TRAINED = {'backbone.conv1.weight0.weight_orepa_origin': (8, 3, 3, 3), 'backbone.bn1.weight': (8,)}
PLAIN = {'conv1.weight': (64, 3, 7, 7), 'layer1.0.conv1.weight': (64, 64, 3, 3)}


@pytest.mark.parametrize(('shapes', 'message'), [
    *(({f'stage1.0.{block}.weight': (8, 8, 3, 3), 'linear.weight': (10, 64)},
       f"deployed by the authors' code already .*{block}") for block in (
        'conv1.orepa_reparam', 'conv1.or1x1_reparam', 'conv1.or_large_reparam', 'rbr_reparam')),
    ({'backbone.layer1.0.conv1.weight': (64, 64, 3, 3), 'head.fc.weight': (10, 512)},
     "OpenMMLab's plain names .*deploy form already"),
    ({'backbone.stem.branch_reparam.weight': (48, 3, 3, 3), 'head.fc.weight': (10, 1280)},
     "OpenMMLab's plain names .*deploy form already"),
    ({**PLAIN, 'fc.weight': (10, 512)}, 'plain ResNet in the names of torchvision'),
    (PLAIN, 'plain ResNet in the names of a backbone alone'),
    ({**TRAINED, 'neck.fpn_convs.0.conv.weight': (8, 8, 3, 3), 'rpn_head.rpn_cls.weight': (3, 8),
      'roi_head.bbox_head.fc_cls.weight': (3, 8)},
     r'a detector in training form \(backbone, neck, roi_head, rpn_head\).*tools/reparam\.py'),
    ({**TRAINED, 'bbox_head.retina_cls.weight': (3, 8, 3, 3)}, 'a detector in training form'),
    ({**TRAINED, 'neck.convs.0.weight': (8, 8, 3, 3), 'decode_head.conv_seg.weight': (19, 8, 1, 1)},
     r'a segmentor in training form .*tools/reparam\.py'),
    ({key.removeprefix('backbone.'): shape for key, shape in TRAINED.items()},
     r'training form, but is no image classifier.* begins with the keys conv1\.weight0\.'),
    ({'backbone.layer1.0.conv1.dbb_origin.conv.weight': (8, 8, 3, 3)},
     r'Diverse Branch Blocks, not OREPA.*tools/reparam\.py'),
    ({'stage0.conv1.conv.weight': (64, 3, 7, 7), 'stage0.conv1.bn.weight': (64,)},
     r'no OREPA block and it begins with the keys stage0\.conv1\.conv\.weight'),
    ({'features.0.weight': (8, 3, 3, 3)}, r'begins with the keys features\.0\.weight'),
])
@pytest.mark.parametrize('read', [read_classifier, convert_official_state_dict])
def test_other_forms_are_told_by_name(read, shapes, message):
    with pytest.raises(CheckpointError, match=message):
        read({key: torch.zeros(shape) for key, shape in shapes.items()})


def test_our_training_form_needs_no_conversion():
    converted = convert_official_state_dict(released('ResNet-18'))
    with pytest.raises(CheckpointError, match='training form already: there is nothing to do'):
        convert_official_state_dict({'meta': {'epoch': 1}, 'state_dict': converted})


@needs_golden
@pytest.mark.parametrize(('change', 'message'), [
    ({'neck.extra.weight': (1,)}, r'unknown key neck\.extra\.weight'),
    ({'backbone.stem.0.vector': (6, 8)}, r'unknown key backbone\.stem\.0\.vector'),
    ({'head.fc.weight': (10, 8)}, r'head\.fc\.weight has the shape \(10, 8\), where ResNet-18, 8 '
     r'channels wide asks for \(10, 64\)'),
    ({'backbone.layer2.0.bn1.bias': None}, r'no key backbone\.layer2\.0\.bn1\.bias'),
])
def test_our_training_form_of_another_kind(change, message):
    state = convert_official_state_dict(golden('net_resnet18_narrow')['state_dict'])
    for key, shape in change.items():
        state[key] = None if shape is None else torch.zeros(shape)
    state = {key: value for key, value in state.items() if value is not None}
    with pytest.raises(CheckpointError, match=message + r'.*its config: tools/reparam\.py'):
        read_classifier(state)


# --- plain --------------------------------------------------------------------

def in_openmmlabs_names(state):
    return {f'head.{key}' if key.startswith('fc.') else f'backbone.{key}': value
            for key, value in state.items()}


@pytest.mark.parametrize(('name', 'depth', 'groups', 'width'), [
    *((f'resnet{depth}', depth, 1, 64) for depth in (18, 34, 50, 101, 152)),
    ('resnext50_32x4d', 50, 32, 4), ('resnext101_32x8d', 101, 32, 8)])
def test_plain_networks_of_torchvision(name, depth, groups, width):
    import torchvision

    with torch.device('meta'):
        state = getattr(torchvision.models, name)(num_classes=7).state_dict()
    expected = resnet_config(depth, 64)
    if groups > 1:
        expected |= dict(type='OREPAResNeXt', groups=groups, width_per_group=width)
    assert plain_form_of(state) == 'torchvision'
    architecture, stock = read_plain_classifier({'state_dict': state})
    assert (architecture.backbone, architecture.num_classes) == (expected, 7)
    assert stock == in_openmmlabs_names(state)
    assert plain_form_of(stock) == 'openmmlab'
    assert recognize_architecture(stock) == architecture
    assert read_plain_classifier(stock) == (architecture, stock)
    with pytest.raises(CheckpointError, match='plain'):
        read_classifier(stock)


def test_a_wider_bottleneck_is_not_taken_for_another_network():
    import torchvision

    with torch.device('meta'):
        state = torchvision.models.wide_resnet50_2().state_dict()
    with pytest.raises(CheckpointError, match=r'layer1\.0\.conv1\.weight has the shape '
                       r'\(128, 64, 1, 1\), where ResNet-50 asks for \(64, 64, 1, 1\)'):
        read_plain_classifier(state)


@pytest.mark.parametrize('shapes', [
    TRAINED, {**PLAIN, 'layer1.0.conv2.weight_orepa_origin': (64, 64, 3, 3)},
    {'features.0.weight': (8, 3, 3, 3)},
    {'conv1.0.weight': (32, 3, 3, 3), 'layer1.0.conv1.weight': (64, 64, 1, 1)}])
def test_what_is_no_plain_resnet(shapes):
    assert plain_form_of(shapes) is None
