"""One short real run through the tools: train, resume, test, re-parameterize, test."""

import json
import os
import subprocess
import sys

import pytest
import torch
from helpers import ROOT, STOCK_TEST, run
from mmengine.config import Config

from orepa_mm.checkpoints import load_checkpoint
from orepa_mm.datasets import make_shapes_coco

CONFIG = f'''
_base_ = '{ROOT}/configs/faster_rcnn/faster-rcnn_orepa-r18-light_fpn_400i_coco.py'
model = dict(backbone=dict(base_channels=8), neck=dict(in_channels=[8, 16, 32, 64]))
train_dataloader = dict(batch_size=2, num_workers=0, persistent_workers=False)
val_dataloader = dict(num_workers=0, persistent_workers=False)
test_dataloader = dict(num_workers=0, persistent_workers=False)
train_cfg = dict(max_iters=2, val_interval=2)
default_hooks = dict(checkpoint=dict(interval=2), logger=dict(interval=1))
custom_hooks = [dict(type='EMAHook', momentum=0.5)]
'''


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('run')
    make_shapes_coco(folder / 'data', 4, 3, 64)
    (folder / 'config.py').write_text(CONFIG)
    return folder


@pytest.fixture(scope='module')
def trained(folder):
    """Two iterations, then two more by resuming; EMA is on."""
    arguments = [folder / 'config.py', '--work-dir', folder / 'train', '--data-root',
                 folder / 'data']
    run('tools/train.py', *arguments)
    first = load_checkpoint(folder / 'train' / 'iter_2.pth')
    output = run('tools/train.py', *arguments, '--resume', '--cfg-options',
                 'train_cfg.max_iters=4')
    assert 'resumed epoch' in output
    second = load_checkpoint(folder / 'train' / 'iter_4.pth')
    return first, second


@pytest.fixture(scope='module')
def deployed(folder, trained):
    """The folder of the re-parameterized model."""
    output = run('tools/reparam.py', folder / 'config.py', folder / 'train' / 'iter_4.pth',
                 '--work-dir', folder / 'test', '--data-root', folder / 'data', '--out',
                 folder / 'deployed', '--latency-rounds', 1, '--num-images', 2,
                 '--show-dir', folder / 'drawn')
    assert 'largest relative output difference' in output
    assert 'left out of the checkpoint: ' in output
    assert 'ema_state_dict (' in output
    return folder / 'deployed'


def test_resume_goes_on(trained):
    first, second = trained
    assert (first['meta']['iter'], second['meta']['iter']) == (2, 4)
    assert second['optimizer']['state'][0]['step'] == 4
    assert 'ema_state_dict' in second
    key = 'backbone.layer1.0.conv1.vector'
    assert not torch.equal(first['state_dict'][key], second['state_dict'][key])
    assert not torch.equal(second['state_dict'][key], second['ema_state_dict'][f'module.{key}'])


def test_training_form(folder, trained):
    output = run('tools/test.py', folder / 'config.py', folder / 'train' / 'iter_4.pth',
                 '--work-dir', folder / 'test', '--data-root', folder / 'data')
    assert 'coco/bbox_mAP' in output


def test_reparam(deployed):
    assert sorted(p.name for p in deployed.iterdir()) == ['config.py', 'model.pth', 'report.json']
    report = json.loads((deployed / 'report.json').read_text())
    assert report['verification']['passed']
    assert report['largest_difference']['float64'] < 1e-6
    assert report['parameters']['deployed'] < report['parameters']['training']
    assert report['multiply_adds']['deployed'] < report['multiply_adds']['training']
    for name, value in report['metrics']['training'].items():
        assert report['metrics']['deployed'][name] == pytest.approx(value, abs=1e-4)

    # tensors and plain types only: loads without any allowlist of ours
    script = ('import sys, torch; c = torch.load(sys.argv[1], weights_only=True); '
              'print(c["meta"]["form"], len(c["state_dict"]))')
    assert 'plain' in run('-c', script, deployed / 'model.pth')


def test_predictions_of_the_deployed_form_are_drawn(folder, deployed):
    assert len(list((folder / 'drawn').rglob('*.png'))) == 3


def test_the_deployed_model_needs_stock_mmdet_only(folder, deployed):
    """In a process where orepa_mm cannot be imported, with mmdet's own API."""
    script = '''
import sys
sys.modules['orepa_mm'] = None
from mmdet.apis import inference_detector, init_detector
folder = sys.argv[1]
model = init_detector(f'{folder}/deployed/config.py', f'{folder}/deployed/model.pth',
                      device='cpu')
assert type(model.backbone).__name__ == 'ResNet'
assert model.dataset_meta['classes'] == ('circle', 'square', 'triangle'), model.dataset_meta
result = inference_detector(model, f'{folder}/data/val2017/000001.png')
print('boxes', tuple(result.pred_instances.bboxes.shape))
'''
    output = run('-c', script, folder)
    assert 'boxes' in output
    for complaint in ('unexpected key', 'missing keys', 'size mismatch'):
        assert complaint not in output


def test_report(folder, deployed):
    out = folder / 'report.html'
    run('tools/report.py', folder / 'train', deployed, '--out', out,
        '--num-images', 2)
    page = out.read_text()
    assert page.count('src="data:image/png;base64,') == 2
    assert 'coco/bbox_mAP_50' in page
    assert 'largest relative output difference' in page
    for name in ('detections', 'curves'):
        assert out.with_name(f'report-{name}.png').read_bytes().startswith(b'\x89PNG')


def refused(*command):
    """What a tool prints when it refuses with exit code 1, without a traceback."""
    result = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, capture_output=True,
                            text=True)
    assert result.returncode == 1
    assert 'Traceback' not in result.stderr
    return result.stderr


@pytest.mark.parametrize(('tool', 'config', 'checkpoint', 'said'), [
    ('test', 'config.py', 'deployed/model.pth', 'is in plain form, but the model is in training'),
    ('test', 'deployed/config.py', 'train/iter_4.pth', 'mim run orepa_mm reparam'),
    ('reparam', 'deployed/config.py', 'deployed/model.pth', 'is in plain form already'),
    ('reparam', 'config.py', 'deployed/model.pth', 'is in plain form, but the model is in train'),
])
def test_checkpoint_of_the_other_form_is_refused(folder, deployed, tool, config, checkpoint, said):
    error = refused(f'tools/{tool}.py', folder / config, folder / checkpoint,
                    '--work-dir', folder / 'test', '--data-root', folder / 'data')
    assert f'error: {folder / checkpoint}' in error
    assert said in error


@pytest.mark.parametrize('how', ['load_from', 'resume'])
def test_training_does_not_start_from_the_other_form(folder, deployed, how):
    options = ['--cfg-options', f'load_from={deployed / "model.pth"}'] if how == 'load_from' else [
        '--resume', deployed / 'model.pth']
    error = refused('tools/train.py', folder / 'config.py', '--work-dir', folder / 'other',
                    '--data-root', folder / 'data', *options)
    assert 'is in plain form, but the model is in training form' in error


def test_the_stock_package_refuses_it_too(folder, deployed):
    """A user's own run, with MMDetection's tools, where orepa_mm is imported."""
    (folder / 'stock.py').write_text(f"""
_base_ = '{deployed / 'config.py'}'
custom_imports = dict(imports=['orepa_mm'], allow_failed_imports=False)
""")
    result = subprocess.run(
        [sys.executable, '-c', STOCK_TEST, 'mmdet', folder / 'stock.py',
         folder / 'train' / 'iter_4.pth', '--work-dir', folder / 'test'],
        cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1
    assert 'is in training form, but the model is in plain form' in result.stderr


def test_two_processes_on_the_cpu(folder):
    output = run('-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', 2,
                 'tools/train.py', folder / 'config.py', '--work-dir', folder / 'distributed',
                 '--data-root', folder / 'data', '--launcher', 'pytorch',
                 env={**os.environ, 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': '-1'})
    assert 'coco/bbox_mAP' in output
    assert (folder / 'distributed' / 'iter_2.pth').is_file()


def test_two_processes_re_parameterize(folder, trained):
    """Both test; the main one compares and writes."""
    output = run('-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', 2,
                 'tools/reparam.py', folder / 'config.py', folder / 'train' / 'iter_4.pth',
                 '--work-dir', folder / 'distributed', '--data-root', folder / 'data',
                 '--out', folder / 'deployed2', '--latency-rounds', 1, '--launcher', 'pytorch',
                 env={**os.environ, 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': '-1'})
    assert output.count('before and after re-parameterization') == 1
    report = json.loads((folder / 'deployed2' / 'report.json').read_text())
    assert report['metrics']['deployed'] == pytest.approx(report['metrics']['training'], abs=1e-4)
    cfg = Config.fromfile(folder / 'deployed2' / 'config.py')
    assert 'model_wrapper_cfg' not in cfg


@pytest.mark.parametrize('tool', sorted(path.name for path in (ROOT / 'tools').glob('*.py')))
def test_help_answers(tool):
    assert 'usage' in run(f'tools/{tool}', '-h')
