"""Converting checkpoint files: every form for numbers, every refusal, what a user sees."""

import pytest
import torch
from helpers import golden, needs_golden, randomize, relative_error
from mmengine.logging import HistoryBuffer
from mmengine.registry import MODELS

from orepa_mm.checkpoints import (
    convert_official_state_dict,
    load_checkpoint,
    recognize_architecture,
)
from orepa_mm.errors import CheckpointError
from orepa_mm.export import Conversion, convert_checkpoint_file
from orepa_mm.export.checkpoint import deployed_state_dict

#: The stock network of each narrow one: nothing of this package.
STOCK = {
    'net_resnet18_narrow': dict(type='mmdet.ResNet', depth=18, base_channels=8),
    'net_resnet50_narrow': dict(type='mmpretrain.ResNet', depth=50, base_channels=8,
                                stem_channels=8),
    'net_resnext50_narrow': dict(type='mmdet.ResNeXt', depth=50, base_channels=16, groups=4,
                                 base_width=1),
    'net_repvgg_narrow': dict(
        type='mmpretrain.RepVGG', deploy=True,
        arch=dict(num_blocks=[1, 2, 1, 1], width_factor=[0.125] * 4, group_layer_map=None,
                  se_cfg=None)),
}


def logits_of(backbone, fc_weight, fc_bias, x):
    backbone.double().eval()  # its train() does not return itself
    with torch.no_grad():
        features = backbone(x.double())
    features = features[-1] if isinstance(features, tuple) else features
    return features.mean(dim=(2, 3)) @ fc_weight.double().T + fc_bias.double()


def as_the_runner_saves(model):
    log = HistoryBuffer()
    log.update(1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return {'meta': {'epoch': 1, 'cfg': 'model = dict()'}, 'state_dict': model.state_dict(),
            'message_hub': {'log_scalars': {'train/loss': log}},
            'optimizer': optimizer.state_dict()}


# --- numbers ----------------------------------------------------------------

@needs_golden
@pytest.mark.parametrize(('names', 'dtype'), [
    ('authors', torch.float32), ('authors', torch.float64), ('ours', torch.float64)], ids=str)
@pytest.mark.parametrize(('name', 'form'), [
    (name, form) for name in STOCK for form in ('deploy', 'torchvision')
    if (name, form) != ('net_repvgg_narrow', 'torchvision')])
def test_the_stock_network_computes_the_authors_logits(saved, tmp_path, name, names, dtype, form):
    record = golden(name)
    source = {key: value.to(dtype) if value.is_floating_point() else value
              for key, value in record['state_dict'].items()}
    if names == 'ours':
        source = convert_official_state_dict(source)
    target = tmp_path / 'new' / 'target.pth'
    convert_checkpoint_file(saved(source), target, form=form)
    state = torch.load(target, weights_only=True)['state_dict']
    before, head = ('backbone.', 'head.fc.') if form == 'deploy' else ('', 'fc.')
    fc = [state.pop(f'{head}{key}') for key in ('weight', 'bias')]
    assert all(key.startswith(before) for key in state)
    assert {value.dtype for value in state.values()} <= {dtype, torch.int64}
    stock = MODELS.build(STOCK[name]).to(dtype)
    stock.load_state_dict({key.removeprefix(before): value for key, value in state.items()},
                          strict=True)
    # kernels are squeezed in float64, but stored in the dtype of the source
    tolerance = 1e-7 if dtype is torch.float64 else 1e-5
    assert relative_error(logits_of(stock, *fc, record['x']), record['logits']) < tolerance


def test_torchvisions_own_network_computes_the_same(saved, tmp_path):
    """A whole ResNet-18 classifier, every tensor of it at random, as the runner saves it."""
    from torchvision.models import resnet18

    classifier = randomize(MODELS.build(dict(
        type='mmpretrain.ImageClassifier', backbone=dict(type='OREPAResNet', depth=18),
        neck=dict(type='GlobalAveragePooling'),
        head=dict(type='LinearClsHead', num_classes=7, in_channels=512))))
    target = tmp_path / 'torchvision.pth'
    written = convert_checkpoint_file(saved(as_the_runner_saves(classifier)), target, 'resnet-18',
                                      'torchvision')
    assert written.architecture.name == 'ResNet-18'
    theirs = resnet18(num_classes=7)
    theirs.load_state_dict(torch.load(target, weights_only=True)['state_dict'], strict=True)
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    head = classifier.head.fc
    expected = logits_of(classifier.backbone, head.weight, head.bias, x)
    with torch.no_grad():
        found = theirs.double().eval()(x)
    assert relative_error(found, expected) < 1e-5


@needs_golden
def test_torchvision_has_the_names_of_a_bottleneck_and_a_grouped_one():
    from torchvision.models.resnet import Bottleneck, ResNet

    state = convert_official_state_dict(golden('net_resnet50_narrow')['state_dict'])
    deployed = deployed_state_dict(recognize_architecture(state), state)
    theirs = ResNet(Bottleneck, [3, 4, 6, 3]).state_dict()
    assert {key.removeprefix('backbone.').removeprefix('head.') for key in deployed} == set(theirs)


@needs_golden
def test_the_weights_given_are_left_alone():
    state = convert_official_state_dict(golden('net_repvgg_narrow')['state_dict'])
    before = {key: value.clone() for key, value in state.items()}
    deployed_state_dict(recognize_architecture(state), state)
    assert state.keys() == before.keys()
    assert all(torch.equal(state[key], value) and state[key].dtype == value.dtype
               for key, value in before.items())


# --- files ------------------------------------------------------------------

@needs_golden
@pytest.mark.parametrize('wrap', [lambda s: s, lambda s: {
    'state_dict': {f'module.{key}': value for key, value in s.items()}, 'epoch': 120}])
def test_file_to_pretrained_weights(saved, tmp_path, wrap):
    """The whole way of a user: convert, then build with init_cfg."""
    network = golden('net_resnet18_narrow')['state_dict']
    target = tmp_path / 'new' / 'ours.pth'
    written = convert_checkpoint_file(saved(wrap(network), 'authors.pth'), target)
    assert written == Conversion(recognize_architecture(network), 'training',
                                 len(convert_official_state_dict(network)))
    backbone = MODELS.build(dict(
        type='mmdet.OREPAResNet', depth=18, base_channels=8,
        init_cfg=dict(type='Pretrained', checkpoint=str(target), prefix='backbone.')))
    backbone.init_weights()
    assert torch.equal(backbone.layer1[0].conv1.vector, network['stage1.0.conv1.vector'])
    assert torch.equal(backbone.bn1.running_mean, network['stage0.conv1.bn.running_mean'])


@needs_golden
@pytest.mark.parametrize(('form', 'said'), [('training', 'training'), ('deploy', 'plain'),
                                            ('torchvision', 'torchvision')])
def test_the_file_says_what_it_is(saved, tmp_path, form, said):
    source = saved(golden('net_resnet18_narrow')['state_dict'], 'authors.pth')
    written = convert_checkpoint_file(source, tmp_path / 'target.pth', form=form)
    checkpoint = load_checkpoint(tmp_path / 'target.pth')
    assert checkpoint.keys() == {'meta', 'state_dict'}
    assert len(checkpoint['state_dict']) == written.num_tensors
    meta = checkpoint['meta']
    assert (meta['form'], meta['source']) == (said, 'authors.pth')
    assert meta['arch'] == 'ResNet-18, 8 channels wide'
    assert meta['backbone']['base_channels'] == 8


@needs_golden
@pytest.mark.parametrize('form', ['training', 'deploy', 'torchvision'])
def test_nothing_is_overwritten(saved, form):
    source = saved(golden('net_resnet18_narrow')['state_dict'])
    content = source.read_bytes()
    with pytest.raises(FileExistsError, match='nothing is overwritten'):
        convert_checkpoint_file(source, source, form=form)
    assert source.read_bytes() == content


@needs_golden
def test_a_write_that_fails_leaves_nothing(saved, tmp_path, monkeypatch):
    source = saved(golden('net_resnet18_narrow')['state_dict'])

    def full(content, path):
        path.write_bytes(b'half')
        raise OSError('no space left')

    monkeypatch.setattr(torch, 'save', full)
    with pytest.raises(OSError, match='no space left'):
        convert_checkpoint_file(source, tmp_path / 'target.pth')
    assert [path.name for path in tmp_path.iterdir()] == ['source.pth']


@needs_golden
@pytest.mark.parametrize(('change', 'options', 'message'), [
    (lambda s: s, dict(arch='ResNet-50'), r'it holds ResNet-18, 8 channels wide, not ResNet-50$'),
    (lambda s: s, dict(arch='ResNet-20'), r'not ResNet-20; the published .*ResNet-18-1\.5x'),
    (lambda s: s, dict(arch='resnet-50', form='deploy'), 'it holds ResNet-18, 8 channels wide'),
    (convert_official_state_dict, {}, 'there is nothing to do'),
    (lambda s: {**s, 'surprise.weight': torch.zeros(1)}, {}, r'unknown key surprise\.weight'),
    (lambda s: {k: v for k, v in s.items() if not k.startswith('stage4.1.')}, {},
     r'no stage4\.1\.\*'),
    (lambda s: {**s, 'stage1.0.conv1.orepa_reparam.weight': torch.zeros(1)}, {},
     "deployed by the authors' code"),
    (lambda s: {**convert_official_state_dict(s), 'neck.weight': torch.zeros(1)},
     dict(form='deploy'), r'unknown key neck\.weight.*tools/reparam\.py'),
    (lambda s: {'backbone.conv1.weight': torch.zeros(8, 3, 7, 7)}, dict(form='deploy'),
     'in deploy form already'),
])
def test_refusals_name_the_file_and_leave_nothing(saved, tmp_path, change, options, message):
    source = saved(change(golden('net_resnet18_narrow')['state_dict']))
    with pytest.raises(CheckpointError, match=r'source\.pth: .*' + message):
        convert_checkpoint_file(source, tmp_path / 'target.pth', **options)
    assert [path.name for path in tmp_path.iterdir()] == ['source.pth']


@needs_golden
def test_torchvision_has_no_repvgg(saved, tmp_path):
    source = saved(golden('net_repvgg_narrow')['state_dict'])
    with pytest.raises(CheckpointError, match=r'holds RepVGG of .*torchvision has no RepVGG'):
        convert_checkpoint_file(source, tmp_path / 'target.pth', form='torchvision')
    assert not (tmp_path / 'target.pth').exists()


def test_a_form_that_does_not_exist(tmp_path):
    with pytest.raises(ValueError, match="no form 'onnx', only training, deploy, torchvision"):
        convert_checkpoint_file(tmp_path / 'source.pth', tmp_path / 'target.pth', form='onnx')


# --- the command line -------------------------------------------------------

@needs_golden
def test_what_a_user_sees(saved, tmp_path, command):
    state = golden('net_resnet18_narrow')['state_dict']
    source, target = saved(state), tmp_path / 'ours.pth'
    code, output, errors = command(source, target, '--arch', 'RESNET-18, 8 channels wide')
    assert (code, errors) == (0, '')
    assert (f'wrote {target}: ResNet-18, 8 channels wide, training form, '
            f'{len(convert_official_state_dict(state))} tensors') in output
    line = f"init_cfg=dict(type='Pretrained', checkpoint='{target}', prefix='backbone.')"
    assert line in output
    assert 'OREPAResNet' in output
    code, output, errors = command(target, tmp_path / 'deployed.pth', '--to', 'deploy')
    count = len(load_checkpoint(tmp_path / 'deployed.pth')['state_dict'])
    assert code == 0
    assert f'ResNet-18, 8 channels wide, deploy form, {count} tensors' in output
    assert 'init_cfg' not in output


@needs_golden
def test_errors_go_to_standard_error(saved, tmp_path, command):
    source = saved(golden('net_repvgg_narrow')['state_dict'])
    for arguments, message in (
            ((tmp_path / 'nothing.pth', tmp_path / 'a.pth'), 'there is no checkpoint'),
            ((source, source), 'nothing is overwritten'),
            ((source, tmp_path / 'a.pth', '--arch', 'RepVGG-A0'), 'not RepVGG-A0'),
            ((source, tmp_path / 'a.pth', '--to', 'torchvision'), 'torchvision has no RepVGG'),
            ((source, source / 'a.pth'), 'source.pth')):
        code, output, errors = command(*arguments)
        assert (code, output) == (1, '')
        assert errors.startswith('error: ')
        assert message in errors
        assert [path.name for path in tmp_path.iterdir()] == ['source.pth']
