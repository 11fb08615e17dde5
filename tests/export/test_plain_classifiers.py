"""Plain classifiers, expanded: the stock network's outputs are the oracle."""

import pytest
import torch
from helpers import relative_error
from mmengine.registry import MODELS
from test_checkpoint import as_the_runner_saves, logits_of

from orepa_mm.checkpoints import load_checkpoint
from orepa_mm.errors import CheckpointError
from orepa_mm.export import convert_checkpoint_file
from orepa_mm.export.checkpoint import load_plain_weights
from orepa_mm.layers import reparam_layers


def trained(model, seed=0):
    """Every BN at random, and kernels of which some channels nearly died."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.1)
            elif isinstance(module, torch.nn.Conv2d):
                module.weight[::7].mul_(1e-4)
    model.eval()
    return model


def in_training_form(path, backbone):
    """Our backbone with the file's weights, loaded as a user does, and the layer behind it."""
    built = MODELS.build({**backbone, 'init_cfg': dict(
        type='Pretrained', checkpoint=str(path), prefix='backbone.')})
    built.init_weights()
    state = load_checkpoint(path)['state_dict']
    return built, state['head.fc.weight'], state['head.fc.bias']


@pytest.mark.parametrize(('name', 'expanded'), [
    ('resnet18', 17), ('resnet50', 53)])
def test_a_plain_file_of_torchvision_is_expanded(saved, tmp_path, name, expanded):
    import torchvision

    theirs = trained(getattr(torchvision.models, name)(num_classes=7))
    state = theirs.state_dict()
    if name == 'resnet18':  # older files have no counters
        state = {key: value for key, value in state.items() if 'num_batches' not in key}
    target = tmp_path / 'expanded.pth'
    arch = name.replace('resnet', 'ResNet-')
    written = convert_checkpoint_file(saved(state), target, arch)
    assert (written.architecture.name, written.form) == (arch, 'training')
    # 20 or 53 convolutions; the shortcut of a BasicBlock stays plain
    assert written.expanded == expanded
    meta = load_checkpoint(target)['meta']
    assert (meta['form'], meta['source']) == ('training', 'source.pth')
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = theirs.double()(x.double())
    for package in ('mmpretrain', 'mmdet'):
        backbone, *fc = in_training_form(target, dict(type=f'{package}.OREPAResNet',
                                                      depth=int(name[6:])))
        assert len(list(reparam_layers(backbone))) == expanded
        assert relative_error(logits_of(backbone, *fc, x), expected) < 1e-5


@pytest.mark.parametrize(('stock', 'ours', 'name'), [
    (dict(type='ResNet', depth=34, base_channels=8, stem_channels=24), 'OREPAResNet',
     'ResNet-34, 8 channels wide, with a stem of 24 channels'),
    (dict(type='ResNet', depth=50, base_channels=20, stem_channels=20), 'OREPAResNet',
     'ResNet-50, 20 channels wide'),
    (dict(type='ResNeXt', depth=50, base_channels=32, stem_channels=32, groups=4,
          width_per_group=2), 'OREPAResNeXt', 'ResNeXt-50, 4 x 2d, 32 channels wide'),
])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.float16], ids=str)
def test_a_plain_classifier_of_mmpretrain_is_expanded(saved, tmp_path, stock, ours, name, dtype):
    classifier = trained(MODELS.build(dict(
        type='mmpretrain.ImageClassifier', backbone=stock, neck=dict(type='GlobalAveragePooling'),
        head=dict(type='LinearClsHead', num_classes=7,
                  in_channels=stock['base_channels'] * 8 * (1 if stock['depth'] == 34 else 4)))))
    classifier.to(dtype)
    target = tmp_path / 'expanded.pth'
    written = convert_checkpoint_file(saved(as_the_runner_saves(classifier)), target)
    assert written.architecture.name == name
    stored = torch.promote_types(dtype, torch.float32)
    assert {value.dtype for value in load_checkpoint(target)['state_dict'].values()} == {
        stored, torch.int64}
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    fc = classifier.head.fc
    expected = logits_of(classifier.backbone, fc.weight.double(), fc.bias.double(), x)
    backbone, *fc = in_training_form(target, {**stock, 'type': f'mmpretrain.{ours}'})
    assert relative_error(logits_of(backbone, *fc, x), expected) < 1e-4


@pytest.fixture(scope='module')
def plain():
    return trained(MODELS.build(dict(
        type='mmpretrain.ImageClassifier',
        backbone=dict(type='ResNet', depth=18, base_channels=8, stem_channels=24),
        neck=dict(type='GlobalAveragePooling'),
        head=dict(type='LinearClsHead', num_classes=7, in_channels=64)))).state_dict()


def torchvisions(state):
    return {key.removeprefix('backbone.').removeprefix('head.'): value
            for key, value in state.items()}


def with_nan(state):
    return {key: torch.full_like(value, torch.nan) if key.endswith('layer1.0.conv2.weight')
            else value for key, value in state.items()}


NAME = 'ResNet-18, 8 channels wide, with a stem of 24 channels'


@pytest.mark.parametrize('names', [dict, torchvisions], ids=['openmmlab', 'torchvision'])
@pytest.mark.parametrize(('change', 'options', 'message'), [
    (dict, dict(arch='ResNet-50'), f'it holds {NAME}, not ResNet-50$'),
    (lambda s: {k: v for k, v in s.items() if 'layer4.1.' not in k}, {},
     r'\(2, 2, 2, 1\) blocks .*truncated, there is no (backbone\.)?layer4\.1\.\*'),
    (lambda s: {k: v for k, v in s.items() if 'layer2.0.bn1' not in k}, {},
     r'no key (backbone\.)?layer2\.0\.bn1\..*truncated'),
    (lambda s: {k: v for k, v in s.items() if 'fc.' not in k}, {}, r'no key (head\.)?fc\.weight'),
    (with_nan, {}, r'layer1\.0\.conv2\.weight holds .*not finite'),
    (lambda s: {**s, next(k for k in s if 'fc.' in k) + '_se': torch.zeros(1)}, {},
     r'unknown key (head\.)?fc\.weight_se'),
    (lambda s: {k: v[:-1] if k.endswith('layer3.0.downsample.0.weight') else v
                for k, v in s.items()}, {}, r'layer3\.0\.downsample\.0\.weight has the shape'),
    (dict, dict(form='deploy'), 'deploy(ed)? .*already'),
])
def test_bad_plain_files(saved, tmp_path, plain, names, change, options, message):
    with pytest.raises(CheckpointError, match=r'source\.pth: .*' + message):
        convert_checkpoint_file(saved(change(names(plain))), tmp_path / 'target.pth', **options)
    assert [path.name for path in tmp_path.iterdir()] == ['source.pth']


def test_training_form_in_part_or_whole_is_not_expanded(saved, tmp_path, plain):
    convert_checkpoint_file(saved(plain), tmp_path / 'whole.pth')
    whole = load_checkpoint(tmp_path / 'whole.pth')['state_dict']
    with pytest.raises(CheckpointError, match='training form already: there is nothing to do'):
        convert_checkpoint_file(tmp_path / 'whole.pth', tmp_path / 'target.pth')
    half = {**{k: v for k, v in whole.items() if not k.startswith('backbone.layer2')},
            **{k: v for k, v in plain.items() if k.startswith('backbone.layer2')}}
    for form in ('training', 'deploy'):
        with pytest.raises(CheckpointError, match=r'training form|unknown key backbone\.layer2\.'):
            convert_checkpoint_file(saved(half), tmp_path / 'target.pth', form=form)
    assert not (tmp_path / 'target.pth').exists()


@pytest.mark.parametrize('key', ['backbone.stem.branch_reparam.weight',
                                 'stages.0.0.reparam_conv.weight'])
def test_a_deployed_repvgg_cannot_be_expanded(saved, tmp_path, key):
    source = saved({key: torch.zeros(48, 3, 3, 3), 'head.fc.weight': torch.zeros(10, 1280)})
    with pytest.raises(CheckpointError, match=r'RepVGG in deploy form .*cannot be recovered'):
        convert_checkpoint_file(source, tmp_path / 'target.pth')


def test_a_plain_detector_is_told_what_to_call(saved, tmp_path, plain):
    detector = {k: v for k, v in plain.items() if k.startswith('backbone.')}
    source = saved({**detector, 'neck.fpn_convs.0.conv.weight': torch.zeros(8, 8, 3, 3)})
    with pytest.raises(CheckpointError, match=r'(?s)a plain model \(backbone, neck\).*mim run '
                       'orepa_mm expand CONFIG CHECKPOINT OUT'):
        convert_checkpoint_file(source, tmp_path / 'target.pth')


def test_blocks_that_no_plain_kernel_fills_are_named():
    """A stock network beside the training form: everything of either is used, or named."""
    model = MODELS.build(dict(type='mmdet.OREPAResNet', depth=18, base_channels=24))
    stock = trained(MODELS.build(dict(type='mmdet.ResNet', depth=18, base_channels=24)))
    state = stock.state_dict()
    assert load_plain_weights(model, state, 'it') == 17
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for other, message in (
            ({k: v for k, v in state.items() if k != 'bn1.bias'}, r'nothing for bn1\.bias\.'),
            ({**state, 'gone.weight': torch.zeros(1)}, r'no place for gone\.weight\.'),
            ({k: v for k, v in state.items() if k != 'layer1.0.conv1.weight'},
             r'nothing for layer1\.0\.conv1\.\w+, .* more\.')):
        with pytest.raises(CheckpointError, match='^it: .*' + message):
            load_plain_weights(model, other, 'it')
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_what_a_user_sees_of_a_plain_file(saved, tmp_path, plain, command):
    code, output, errors = command(saved(plain), tmp_path / 'ours.pth', '--arch', NAME)
    assert (code, errors) == (0, '')
    assert f'ours.pth: {NAME}, training form, ' in output
    assert '17 plain convolutions expanded' in output
    assert 'in the backbone of type OREPAResNet' in output
