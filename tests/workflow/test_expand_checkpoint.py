"""From a plain checkpoint file to one in training form: the same function, or no file."""

import argparse
import functools
import runpy
import sys
from collections import namedtuple

import pytest
import torch
from batches import tiny_batch
from helpers import ROOT, relative_error
from mmengine.optim import OptimWrapper
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner import load_checkpoint as mmengine_load_checkpoint

from orepa_mm.checkpoints import load_weights
from orepa_mm.datasets import make_shapes_cityscapes, make_shapes_coco, make_shapes_imagenet
from orepa_mm.engine import add_config_arguments, load_config
from orepa_mm.errors import (
    CheckpointError,
    ConfigError,
    NothingToConvertError,
    VerificationError,
)
from orepa_mm.export.stock import deploy_config
from orepa_mm.files import sha256
from orepa_mm.layers import reparam_layers
from orepa_mm.reparam import reparameterize
from orepa_mm.workflow import expand as pipeline
from orepa_mm.workflow import expand_checkpoint

SLIM = 'test_dataloader = dict(num_workers=0, persistent_workers=False)'
#: Convolutions with and without bias, in every part that takes a `conv_cfg`. A narrower stem than
#: of 17 channels could not generate every 7 x 7.
CONFIGS = {
    'retinanet': ('retinanet/retinanet_orepa-r18-light_fpn_400i_coco.py', '''
model = dict(
    backbone=dict(stem_channels=32, base_channels=8),
    neck=dict(in_channels=[8, 16, 32, 64], out_channels=16, conv_cfg=dict(type='OREPA')),
    bbox_head=dict(in_channels=16, feat_channels=16, stacked_convs=1,
                   conv_cfg=dict(type='OREPA')))
'''),
    'faster_rcnn': ('faster_rcnn/faster-rcnn_orepa-r18-light_fpn_400i_coco.py', '''
model = dict(
    backbone=dict(stem_channels=32, base_channels=8),
    neck=dict(in_channels=[8, 16, 32, 64], out_channels=16),
    rpn_head=dict(in_channels=16, feat_channels=16),
    roi_head=dict(bbox_roi_extractor=dict(out_channels=16),
                  bbox_head=dict(in_channels=16, fc_out_channels=32)))
'''),
    'upernet': ('upernet/upernet_orepa-r18-light_400i_cityscapes-192x192.py', '''
model = dict(
    backbone=dict(stem_channels=32, base_channels=8),
    decode_head=dict(in_channels=[8, 16, 32, 64], channels=16),
    auxiliary_head=dict(in_channels=32, channels=16))
'''),
    'imagenet': ('imagenet/orepa-resnet18-light_300i_in1k.py', '''
model = dict(backbone=dict(stem_channels=32, base_channels=8), head=dict(in_channels=64))
'''),
}
#: Layers with branches: 17 in the backbone; 8 in the FPN with its 5 levels, 2 in the head.
EXPANDED = {'retinanet': 27, 'faster_rcnn': 17, 'upernet': 17, 'imagenet': 17}
DATA = {'mmdet': lambda root: make_shapes_coco(root, 2, 2, 64),
        'mmseg': lambda root: make_shapes_cityscapes(root, 2, 2, 64),
        'mmpretrain': lambda root: make_shapes_imagenet(root, 12, 12, 64)}
#: An option: as on a machine that has no data set.
NOWHERE = 'test_dataloader.dataset.data_root=nowhere/'
CLASSES = ('circle', 'square', 'triangle')

Case = namedtuple('Case', 'kind folder scope done')


def config(folder, *options, name='config.py', root='data'):
    parser = argparse.ArgumentParser()
    add_config_arguments(parser)
    return load_config(parser.parse_args([
        str(folder / name), *(['--data-root', str(folder / root)] if root else []), '--work-dir',
        str(folder / 'work'), *(['--cfg-options', *options] if options else [])]))


def build(cfg):
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        return MODELS.build(cfg.model)


def trained(model):
    """Stand for training: BN statistics, and channels that nearly died."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.1)
            elif isinstance(module, torch.nn.Conv2d):
                module.weight[::5].mul_(1e-3)
    return model


@pytest.fixture(scope='module')
def prepared(tmp_path_factory):
    """For each kind: config with OREPA, data set, a plain checkpoint, and that one expanded."""
    @functools.cache
    def prepare(kind):
        folder = tmp_path_factory.mktemp(kind)
        base, changes = CONFIGS[kind]
        (folder / 'config.py').write_text(f"_base_ = '{ROOT}/configs/{base}'\n{changes}{SLIM}\n")
        torch.manual_seed(0)
        scope = config(folder, root=None).default_scope
        DATA[scope](folder / 'data')
        plain = trained(build(deploy_config(config(folder))))
        torch.save({'meta': {'dataset_meta': {'classes': CLASSES}, 'iter': 5},
                    'state_dict': plain.state_dict(),
                    'optimizer': {'state': {}, 'param_groups': []}}, folder / 'plain.pth')
        done = expand_checkpoint(config(folder), folder / 'plain.pth',
                                 folder / 'out' / 'expanded.pth', num_images=2)
        return Case(kind, folder, scope, done)
    return prepare


@pytest.fixture(params=CONFIGS)
def case(request, prepared):
    return prepared(request.param)


@pytest.fixture
def detector(prepared):
    return prepared('retinanet')


def outputs(model, scope):
    """Raw outputs on noise, by the model's own parts."""
    model.eval()
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        features = model.extract_feat(x)
        if scope == 'mmseg':
            return [*features, model.decode_head(features), model.auxiliary_head(features)]
        if scope == 'mmpretrain':
            return [*features, model.head(features)]
        head = getattr(model, 'rpn_head', None) or model.bbox_head
        return [*features, *(level for group in head(features) for level in group)]


def alike(model, other, scope):
    return max(map(relative_error, outputs(model, scope), outputs(other, scope)))


# --- what is written ----------------------------------------------------------

def test_the_expanded_model_computes_what_the_plain_one_does(case):
    folder, scope = case.folder, case.scope
    cfg = config(folder)
    plain, model = build(deploy_config(cfg)), build(cfg)
    load_weights(plain, folder / 'plain.pth')
    before = model.state_dict()
    load_weights(model, folder / 'out' / 'expanded.pth')
    assert case.done.expanded == len(list(reparam_layers(model))) == EXPANDED[case.kind]
    assert alike(model, plain, scope) < 1e-4
    # what is no branch is the plain one's, bit by bit
    state, stock = model.state_dict(), plain.state_dict()
    assert all(torch.equal(state[key], stock[key]) for key in state.keys() & stock.keys())
    assert case.done.copied == len(state.keys() & stock.keys())
    assert before.keys() == state.keys()


def test_it_trains_on_and_is_the_stock_model_again(case):
    folder, scope = case.folder, case.scope
    cfg = config(folder)
    model = build(cfg)
    mmengine_load_checkpoint(model, str(folder / 'out' / 'expanded.pth'), strict=True)
    model.train()
    kernels = {layer: layer.weight.detach().clone() for layer in reparam_layers(model)}
    optimizer = OptimWrapper(torch.optim.SGD(model.parameters(), lr=1e-4))
    batch = tiny_batch(scope)
    if scope == 'mmseg':
        for sample in batch['data_samples']:
            sample.gt_sem_seg.data.clamp_(max=model.decode_head.num_classes - 1)
    with DefaultScope.overwrite_default_scope(scope):
        model.train_step(batch, optimizer)
    moved = [not torch.equal(layer.weight, kernel) for layer, kernel in kernels.items()]
    assert sum(moved) >= len(moved) - 2  # not every level of a pyramid sees an object
    stock = build(deploy_config(cfg))
    stock.load_state_dict(reparameterize(model).state_dict(), strict=True)
    assert alike(model, stock, scope) < 1e-4


def test_the_file_says_what_it_is(case):
    folder = case.folder
    checkpoint = torch.load(folder / 'out' / 'expanded.pth', weights_only=True)
    assert checkpoint.keys() == {'meta', 'state_dict'}
    assert [path.name for path in (folder / 'out').iterdir()] == ['expanded.pth']
    meta = checkpoint['meta']
    assert meta == case.done.meta
    assert (meta['form'], meta['verified'], meta['source']) == ('training', True, 'plain.pth')
    assert meta['source_sha256'] == sha256(folder / 'plain.pth')
    assert meta['verified_on'] == '2 test images'
    assert meta['versions'].keys() >= {'orepa_mm', 'torch', 'mmengine', 'mmcv', case.scope}
    assert meta['largest_difference']['float32'] < 1e-4
    assert meta['dataset_meta'] == {'classes': CLASSES}
    assert 'OREPAResNet' in meta['cfg']
    assert case.done.verification.passed
    assert not case.done.verification.skipped


def test_without_images_noise_is_compared(case, tmp_path):
    done = expand_checkpoint(config(case.folder, NOWHERE), case.folder / 'plain.pth',
                             tmp_path / 'out.pth', images=False)
    assert done.meta['verified_on'] == 'random noise'
    assert done.verification.passed
    assert not done.verification.skipped
    assert {error.name for error in done.verification.errors} == {
        error.name for error in case.done.verification.errors}


def test_images_are_compared_as_the_network_sees_them(case, tmp_path, monkeypatch):
    """Normalised: MMPretrain's configs say how outside of the model."""
    batches = []

    def recorded(model, plain, inputs):
        batches.extend(inputs)
        raise VerificationError('seen')

    monkeypatch.setattr(pipeline, 'verify', recorded)
    with pytest.raises(VerificationError, match='seen'):
        expand_checkpoint(config(case.folder), case.folder / 'plain.pth', tmp_path / 'out.pth',
                          num_images=1)
    batch, = batches
    assert batch['inputs'].dim() == 4
    assert len(batch['inputs']) == len(batch['data_samples']) == 1
    assert 0.1 < batch['inputs'].abs().max() < 5


# --- refusals -----------------------------------------------------------------

def test_missing_images_are_named_with_both_ways_out(case, tmp_path):
    with pytest.raises(FileNotFoundError, match=r'(?s)--data-root.*--no-images'):
        expand_checkpoint(config(case.folder, NOWHERE), case.folder / 'plain.pth',
                          tmp_path / 'out.pth')
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(('change', 'message'), [
    (lambda s: {**s, 'backbone.layer1.0.conv1.weight': torch.full((8, 32, 3, 3), float('nan'))},
     r'backbone\.layer1\.0\.conv1\.weight holds .*not finite'),
    (lambda s: {**s, 'backbone.layer1.0.conv1.weight': torch.zeros(9, 32, 3, 3)},
     r'size mismatch for backbone\.layer1\.0\.conv1\.weight'),
    (lambda s: {k: v for k, v in s.items() if not k.startswith('backbone.layer4')},
     r'it has no backbone\.layer4\.0\.conv1\.weight'),
    (lambda s: {**s, 'surprise.weight': torch.zeros(1)}, r'has no surprise\.weight'),
    (lambda s: {'fc.weight': torch.zeros(3, 3)}, r'it has no backbone\.conv1\.weight'),
], ids=['nan', 'shape', 'truncated', 'other key', 'other network'])
def test_bad_plain_checkpoints(detector, tmp_path, change, message):
    state = torch.load(detector.folder / 'plain.pth')['state_dict']
    torch.save(change(state), tmp_path / 'bad.pth')
    with pytest.raises(CheckpointError, match=r'(?s)bad\.pth.*' + message):
        expand_checkpoint(config(detector.folder), tmp_path / 'bad.pth', tmp_path / 'out.pth')
    assert [path.name for path in tmp_path.iterdir()] == ['bad.pth']


def test_training_form_and_half_of_it(detector, tmp_path):
    done = detector.folder / 'out' / 'expanded.pth'
    with pytest.raises(CheckpointError, match=r'expanded\.pth is in training form already .*'
                       r'nothing to expand.*load_from='):
        expand_checkpoint(config(detector.folder), done, tmp_path / 'out.pth')
    half = {key: value for key, value in torch.load(done)['state_dict'].items()
            if not key.startswith('backbone.layer2')}
    plain = torch.load(detector.folder / 'plain.pth')['state_dict']
    half |= {key: value for key, value in plain.items() if key.startswith('backbone.layer2')}
    torch.save({'state_dict': half}, tmp_path / 'half.pth')
    with pytest.raises(CheckpointError, match=r'half plain, half in training form: '
                       r'backbone\.layer2\.0\.conv1\.weight is a plain kernel, and backbone\.'):
        expand_checkpoint(config(detector.folder), tmp_path / 'half.pth', tmp_path / 'out.pth')
    assert not (tmp_path / 'out.pth').exists()


def test_no_file_is_overwritten_and_a_missing_one_is_named(detector):
    plain = detector.folder / 'plain.pth'
    before = sha256(plain)
    for out in (plain, detector.folder / 'out' / 'expanded.pth', detector.folder):
        with pytest.raises(FileExistsError, match='nothing is overwritten'):
            expand_checkpoint(config(detector.folder), plain, out)
    assert sha256(plain) == before
    with pytest.raises(FileNotFoundError, match=r'no checkpoint .*nothing\.pth'):
        expand_checkpoint(config(detector.folder), detector.folder / 'nothing.pth',
                          detector.folder / 'new.pth')


def test_a_write_that_fails_leaves_nothing(detector, tmp_path, monkeypatch):
    cfg = config(detector.folder)

    def full(content, path):
        path.write_bytes(b'half')
        raise OSError('no space left')

    monkeypatch.setattr(torch, 'save', full)
    with pytest.raises(OSError, match='no space left'):
        expand_checkpoint(cfg, detector.folder / 'plain.pth', tmp_path / 'out.pth', images=False)
    assert not list(tmp_path.iterdir())


def test_a_wrong_expansion_is_not_saved(detector, tmp_path, monkeypatch):
    good = pipeline.load_plain_weights

    def wrong(model, *args):
        count = good(model, *args)
        layer = model.backbone.layer3[0].conv2
        kernel = layer.weight.detach().clone()
        kernel[0] *= 1 + 1e-3  # one of those channels that nearly died: no output shows it
        layer.set_kernel(kernel)
        kernel[1] *= 1.5
        layer.set_kernel(kernel)
        return count

    monkeypatch.setattr(pipeline, 'load_plain_weights', wrong)
    with pytest.raises(VerificationError, match=r'(?s)nothing was saved.*backbone\.layer3\.0'
                       r'\.conv2\.weight.*starts in the layer backbone\.layer3\.0\.conv2'):
        expand_checkpoint(config(detector.folder), detector.folder / 'plain.pth',
                          tmp_path / 'out.pth', num_images=1)
    assert not list(tmp_path.iterdir())


def test_a_config_without_orepa(detector, tmp_path):
    cfg = deploy_config(config(detector.folder))
    with pytest.raises(NothingToConvertError, match='nothing to expand into'):
        expand_checkpoint(cfg, detector.folder / 'plain.pth', tmp_path / 'out.pth')


@pytest.mark.parametrize(('backbone', 'key'), [
    (dict(type='OREPARepVGG', arch='A0'), r'branch_1x1'),
    (dict(type='DBBResNet', depth=18, base_channels=8, stem_channels=8), r'dbb_')])
def test_blocks_that_one_kernel_cannot_fill(tmp_path, backbone, key):
    base = CONFIGS['imagenet'][0]
    (tmp_path / 'config.py').write_text(f"_base_ = '{ROOT}/configs/{base}'\n")
    cfg = config(tmp_path, root=None)
    cfg.model.backbone = backbone
    cfg.model.head.in_channels = 1280 if 'arch' in backbone else 64
    torch.save(build(deploy_config(cfg)).state_dict(), tmp_path / 'plain.pth')
    with pytest.raises(CheckpointError, match=rf'nothing for backbone\..*{key}.*RepVGG, DBB'):
        expand_checkpoint(cfg, tmp_path / 'plain.pth', tmp_path / 'out.pth', images=False)
    assert not (tmp_path / 'out.pth').exists()


def test_a_config_without_test_images(detector, tmp_path):
    cfg = config(detector.folder)
    cfg.test_dataloader = None
    with pytest.raises(ConfigError, match=r'no test_dataloader.*--no-images'):
        expand_checkpoint(cfg, detector.folder / 'plain.pth', tmp_path / 'out.pth')


# --- the command line ---------------------------------------------------------

@pytest.fixture
def command(monkeypatch, capsys):
    """Run the tool; gives its exit code, standard output and standard error."""
    def run(*arguments):
        tool = str(ROOT / 'tools' / 'expand.py')
        monkeypatch.setattr(sys, 'argv', [tool, *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_info:
            runpy.run_path(tool, run_name='__main__')
        return exit_info.value.code, *capsys.readouterr()
    return run


def test_what_a_user_sees(detector, tmp_path, command):
    folder, out = detector.folder, tmp_path / 'out.pth'
    arguments = folder / 'config.py', folder / 'plain.pth', out
    code, output, errors = command(*arguments, '--data-root', folder / 'data', '--num-images', 1)
    assert (code, errors) == (0, '')
    assert f'wrote {out}: 27 convolutions expanded, {detector.done.copied} tensors cop' in output
    assert 'verified on 1 test images' in output
    assert f'mim train orepa_mm {arguments[0]} --cfg-options load_from={out}\n' in output
    code, output, errors = command(*arguments, '--no-images')
    assert code == 1
    assert 'error: ' in errors
    assert 'nothing is overwritten' in errors
    out.unlink()
    child = tmp_path / 'pretrained.py'
    child.write_text(f"_base_ = '{arguments[0]}'\nmodel = dict(backbone=dict("
                     "init_cfg=dict(_delete_=True, type='Pretrained', checkpoint='none.pth')))\n")
    code, output, errors = command(child, *arguments[1:], '--no-images', '--data-root',
                                   folder / 'data', '--cfg-options', NOWHERE)
    assert (code, errors) == (0, '')
    assert 'verified on random noise' in output
    assert f'load_from={out} model.backbone.init_cfg=None\n' in output
    assert command(*arguments, '--num-images', 0)[0] == 2
    assert command(*arguments, '--launcher', 'pytorch')[0] == 2
