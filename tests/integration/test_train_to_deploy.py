"""One short real run through the tools: train, resume, test, re-parameterize, test."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from helpers import ROOT, metrics_of_test, run, run_each

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


def test_training_form(folder, deployed):
    run('tools/test.py', folder / 'config.py', folder / 'train' / 'iter_4.pth',
        '--work-dir', folder / 'tested', '--data-root', folder / 'data')
    report = json.loads((deployed / 'report.json').read_text())
    found = metrics_of_test(folder / 'tested')
    # the log has three digits, the report all
    assert {name: found[name] for name in report['metrics']['training']} == pytest.approx(
        report['metrics']['training'], abs=0.51e-3)


def test_reparam(deployed):
    assert sorted(p.name for p in deployed.iterdir()) == ['config.py', 'model.pth', 'report.json']
    report = json.loads((deployed / 'report.json').read_text())
    assert report['verification']['passed']
    assert report['largest_difference']['tensors'] < 1e-6
    assert report['largest_difference']['float32'] < 1e-4
    assert report['parameters']['deployed'] < report['parameters']['training']
    assert report['multiply_adds']['deployed'] < report['multiply_adds']['training']
    for name, value in report['metrics']['training'].items():
        assert report['metrics']['deployed'][name] == pytest.approx(value, abs=1e-4)


def test_predictions_of_the_deployed_form_are_drawn(folder, deployed):
    assert len(list((folder / 'drawn').rglob('*.png'))) == 3


def test_the_deployed_model_needs_stock_mmdet_only(folder, deployed):
    """In a process where orepa_mm cannot be imported, with mmdet's own API."""
    script = '''
import sys
sys.modules['orepa_mm'] = None
import torch
folder = sys.argv[1]
# tensors and plain types only: loads without any allowlist
content = torch.load(f'{folder}/deployed/model.pth', weights_only=True)
assert content['meta']['form'] == 'plain'
from mmdet.apis import inference_detector, init_detector
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


#: MMDetection's own test tool, for a user's own run: there the config alone imports orepa_mm.
MMDET_TEST = Path(find_spec('mmdet').origin).parent / '.mim' / 'tools' / 'test.py'
#: Command lines that must not run (RUN is the folder of this run), and what they say.
REFUSED = {
    f'{MMDET_TEST} RUN/stock.py RUN/train/iter_4.pth':
        'is in training form, but the model is in plain form',
    'tools/test.py RUN/config.py RUN/deployed/model.pth':
        'is in plain form, but the model is in training form',
    'tools/test.py RUN/deployed/config.py RUN/train/iter_4.pth': 'mim run orepa_mm reparam',
    'tools/reparam.py RUN/deployed/config.py RUN/deployed/model.pth':
        'is in plain form already',
    'tools/reparam.py RUN/config.py RUN/deployed/model.pth':
        'is in plain form, but the model is in training form',
    'tools/train.py RUN/config.py --resume RUN/deployed/model.pth':
        'is in plain form, but the model is in training form',
}


@pytest.fixture(scope='module')
def refusals(folder, deployed):
    """{command: (exit code, output)}."""
    (folder / 'stock.py').write_text(f"""
_base_ = '{deployed / 'config.py'}'
custom_imports = dict(imports=['orepa_mm'], allow_failed_imports=False)
""")
    options = {command: f' --work-dir {folder}/refused' + (
        f' --data-root {folder}/data' if command.startswith('tools') else '')
        for command in REFUSED}
    return dict(zip(REFUSED, run_each(*(
        (command.replace('RUN', str(folder)) + options[command]).split() for command in REFUSED))))


@pytest.mark.parametrize('command', REFUSED,
                         ids=lambda command: command.removeprefix(str(MMDET_TEST.parents[1])))
def test_checkpoint_of_the_other_form_is_refused(folder, refusals, command):
    code, output = refusals[command]
    assert code == 1, output
    assert REFUSED[command].replace('RUN', str(folder)) in output
    assert ('Traceback' in output) == command.startswith(str(MMDET_TEST))
    if command.startswith(('tools/test', 'tools/reparam')):
        assert f'error: {command.split()[-1].replace("RUN", str(folder))}' in output


def test_help_answers():
    tools = sorted((ROOT / 'tools').glob('*.py'))
    for tool, (code, output) in zip(tools, run_each(*((tool, '-h') for tool in tools))):
        assert code == 0, tool
        assert 'usage' in output, tool
