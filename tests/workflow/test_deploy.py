"""From a checkpoint file to deployed files: what is written, and when nothing is."""

import copy
import dataclasses
import json
import sys

import onnx
import pytest
import torch
from helpers import ROOT, relative_error, run, vary_scales
from mmengine.config import Config
from mmengine.logging import HistoryBuffer
from mmengine.registry import MODELS
from tiny_runs import config

from orepa_mm.checkpoints import load_weights
from orepa_mm.datasets import make_shapes_coco
from orepa_mm.errors import CheckpointError, NothingToConvertError, VerificationError
from orepa_mm.files import sha256
from orepa_mm.workflow import deploy as pipeline
from orepa_mm.workflow import print_report, reparameterize_checkpoint
from orepa_mm.workflow.evidence import first_images

CONFIG = f'''
_base_ = '{ROOT}/configs/retinanet/retinanet_orepa-r18-light_fpn_400i_coco.py'
model = dict(
    backbone=dict(base_channels=8), neck=dict(in_channels=[8, 16, 32, 64], out_channels=16),
    bbox_head=dict(in_channels=16, feat_channels=16, stacked_convs=1))
test_dataloader = dict(num_workers=0, persistent_workers=False)
custom_hooks = [dict(type='ReparamTestHook')]
'''


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A data set, a config, and a checkpoint as the runner saves it."""
    folder = tmp_path_factory.mktemp('pipeline')
    make_shapes_coco(folder / 'data', 1, 10, 64)  # so many that random boxes hit
    (folder / 'config.py').write_text(CONFIG)
    torch.manual_seed(0)
    model = MODELS.build(config(folder).model)
    model.init_weights()
    vary_scales(model)
    with torch.no_grad():
        model.bbox_head.retina_cls.bias.fill_(-1.0)  # let there be detections
        model.bbox_head.retina_cls.weight.normal_(0, 0.1)
    state = model.state_dict()
    torch.save({
        'meta': {'dataset_meta': {'classes': ('circle', 'square', 'triangle')}, 'iter': 5},
        'state_dict': state,
        'ema_state_dict': {f'module.{key}': value.clone() for key, value in state.items()},
        'message_hub': {'log_scalars': {'loss': HistoryBuffer([1.0], [1])}},
        'optimizer': {'state': {0: {'momentum_buffer': torch.zeros(1000)}}, 'param_groups': []},
    }, folder / 'iter_5.pth')
    return folder


def deploy(folder, out, **options):
    return reparameterize_checkpoint(config(folder), folder / 'iter_5.pth', out,
                                     **{'num_images': 2, 'latency_rounds': 1, **options})


def plain_types(value):
    if isinstance(value, dict):
        return all(isinstance(key, str) and plain_types(item) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(plain_types, value))
    return value is None or type(value) in (str, int, float, bool)


@pytest.fixture(scope='module')
def plain(folder):
    return deploy(folder, folder / 'plain', safetensors=True), folder / 'plain'


def test_what_is_written(folder, plain):
    report, out = plain
    assert sorted(p.name for p in out.iterdir()) == [
        'config.py', 'model.pth', 'model.safetensors', 'report.json']
    assert report['metrics']['training']['coco/bbox_mAP'] > 0  # there was something to compare
    assert report['problems'] == []
    assert report['warnings'] == []
    assert report['verification']['complete']
    assert report['images'] == 2
    saved = json.loads((out / 'report.json').read_text())
    assert (saved['form'], saved['problems']) == ('plain', [])
    checkpoint = torch.load(out / 'model.pth', weights_only=True)
    assert checkpoint.keys() == {'meta', 'state_dict'}
    meta = checkpoint['meta']
    assert plain_types(meta)
    assert (meta['form'], meta['verified'], meta['source']) == ('plain', True, 'iter_5.pth')
    assert meta['source_sha256'] == sha256(folder / 'iter_5.pth')
    assert len(meta['source_sha256']) == 64
    assert meta['versions'].keys() == {'orepa_mm', 'torch', 'mmengine', 'mmcv', 'mmdet'}
    assert meta['largest_difference']['float32'] < 1e-4
    assert meta['largest_difference']['tensors'] < 5e-7
    text = (out / 'config.py').read_text()
    assert meta['cfg'] == text
    data = Config.fromfile(out / 'config.py').test_dataloader.dataset.data_root
    assert text.startswith(f'data_root = {data!r}')
    assert text.count(data) == 1  # all else is made of that line
    assert meta['metrics'] == report['metrics']['deployed']
    assert meta['dataset_meta']['classes'] == ('circle', 'square', 'triangle')


def test_what_is_left_out_is_reported(folder, plain, capsys):
    report, out = plain
    assert report['dropped_bytes'].keys() == {'ema_state_dict', 'message_hub', 'optimizer'}
    assert report['dropped_bytes']['optimizer'] == 4000
    state = torch.load(folder / 'iter_5.pth')['state_dict']
    assert report['dropped_bytes']['ema_state_dict'] == sum(v.nbytes for v in state.values())
    assert report['file_bytes']['training'] > 5 * report['file_bytes']['deployed']
    capsys.readouterr()
    print_report(report, out)
    printed = capsys.readouterr().out
    assert 'checkpoint file (MB)' in printed
    assert 'ema_state_dict (' in printed
    assert 'tensors that agree' in printed
    assert 'note: a metric at chance proves nothing' in printed  # the weights are random
    assert 'UNVERIFIED' not in printed


def test_the_config_is_the_stock_one(plain):
    text = (plain[1] / 'config.py').read_text()
    assert 'orepa' not in text.lower().replace('retinanet_orepa', '')
    assert 'ReparamTestHook' not in text


def test_safetensors_hold_the_same(plain):
    from safetensors import safe_open

    state = torch.load(plain[1] / 'model.pth')['state_dict']
    with safe_open(plain[1] / 'model.safetensors', 'pt') as file:
        assert set(file.keys()) == set(state)
        assert all(torch.equal(file.get_tensor(key), value) for key, value in state.items())
        assert json.loads(file.metadata()['meta'])['form'] == 'plain'


def test_folded(folder, plain):
    report = deploy(folder, folder / 'folded', form='folded', tta=True)
    metrics = report['metrics']
    assert metrics['deployed'] == pytest.approx(metrics['training'], abs=1e-4)
    # augmented: not the numbers of the test without
    assert metrics['training'] != pytest.approx(plain[0]['metrics']['training'], abs=1e-6)
    assert report['parameters']['deployed'] < plain[0]['parameters']['deployed']
    model = MODELS.build(Config.fromfile(folder / 'folded' / 'config.py').model)
    assert type(model).__name__ == 'RetinaNet'
    meta = load_weights(model, folder / 'folded' / 'model.pth')['meta']
    assert (meta['form'], meta['verified']) == ('folded', True)
    assert not [key for key in model.state_dict() if 'running' in key]
    stock = MODELS.build(Config.fromfile(plain[1] / 'config.py').model)
    load_weights(stock, plain[1] / 'model.pth')
    model.eval()
    stock.eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        for one, other in zip(model.extract_feat(x), stock.extract_feat(x)):
            assert relative_error(one, other) < 1e-4
    # neither loads into the other
    with pytest.raises(CheckpointError, match=r'is in folded form.*in plain form'):
        load_weights(stock, folder / 'folded' / 'model.pth')
    with pytest.raises(CheckpointError, match=r'is in plain form.*in folded form'):
        load_weights(model, plain[1] / 'model.pth')


def test_onnx(folder, capsys):
    report = deploy(folder, folder / 'onnx', onnx=True, test=False, form='folded')
    assert sorted(p.name for p in (folder / 'onnx').iterdir()) == [
        'config.py', 'model.onnx', 'model.pth', 'report.json']
    assert report['onnx']['passed']
    assert report['onnx']['boxes']['matched'] > 0
    assert report['onnx']['inputs']['network']['inputs'][0] == 'batch'
    properties = {entry.key: entry.value
                  for entry in onnx.load(folder / 'onnx' / 'model.onnx').metadata_props}
    assert properties['source_sha256'] == sha256(folder / 'iter_5.pth')
    assert (properties['form'], json.loads(properties['verified'])) == ('folded', True)
    assert json.loads(properties['classes']) == ['circle', 'square', 'triangle']
    print_report(report, folder / 'onnx')
    assert 'final boxes that ONNX Runtime finds as well' in capsys.readouterr().out
    deploy(folder, folder / 'onnx', test=False)  # replaced as a whole: no graph of other weights
    assert sorted(p.name for p in (folder / 'onnx').iterdir()) == [
        'config.py', 'model.pth', 'report.json']


def test_end2end(folder, capsys):
    """The file alone, with numpy and Pillow, gives the boxes that it gave in the test."""
    out = folder / 'end to end'
    report = deploy(folder, out, end2end=True)
    assert sorted(p.name for p in out.iterdir()) == [
        'config.py', 'model.pth', 'model_end2end.onnx', 'report.json']
    found = json.loads((out / 'report.json').read_text())['end2end']
    assert found['passed']
    assert found['boxes']['matched'] > 0
    assert found['other_size'] == 0
    assert found['metrics'] == pytest.approx(report['metrics']['deployed'], abs=5e-4)
    assert (found['resize'], found['resize_height'], found['resize_width']) == ('fit', 256, 256)
    print_report(report, out)
    assert 'model_end2end.onnx: any number of images of 256 x 256' in capsys.readouterr().out
    image = next(path for path in (folder / 'data').rglob('*') if path.suffix in ('.png', '.jpg'))
    printed = run('examples/onnx_predict.py', out / 'model_end2end.onnx', image, '--out',
                  folder / 'drawn image.png')
    assert (folder / 'drawn image.png').is_file()
    rows = [line.split() for line in printed.splitlines()]
    assert {row[0] for row in rows} <= {'circle', 'square', 'triangle'}
    boxes = torch.tensor([[float(number) for number in row[2:]] for row in rows])
    assert boxes.shape == (100, 4)
    assert boxes.max() <= 64  # pixels of the original image
    assert boxes.max() > 40


def test_a_wrong_onnx_is_not_saved(folder, monkeypatch):
    good = pipeline.export_onnx

    def wrong(model, *args, **kwargs):
        model = copy.deepcopy(model)
        with torch.no_grad():
            model.neck.fpn_convs[0].conv.bias.add_(1)
        return good(model, *args, **kwargs)

    monkeypatch.setattr(pipeline, 'export_onnx', wrong)
    with pytest.raises(VerificationError, match=r'(?s)ONNX file does not compute the same.*'
                       'nothing was saved.*cls_scores_0'):
        deploy(folder, folder / 'wrong_onnx', onnx=True)
    assert not (folder / 'wrong_onnx').exists()


@pytest.mark.parametrize(('option', 'module'), [('onnx', 'onnxruntime'),
                                                ('safetensors', 'safetensors.torch')])
def test_what_is_not_installed_is_named_before_long_work(folder, monkeypatch, option, module):
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(pipeline, 'build_test_runner', None)
    with pytest.raises(ImportError, match=f'pip install .*{module.partition(".")[0]}'):
        deploy(folder, folder / 'missing', **{option: True})


@pytest.fixture
def wrong_conversion(monkeypatch):
    """One channel of one kernel is off."""
    good = pipeline.reparameterize

    def wrong(model, **kwargs):
        model = good(model, **kwargs)
        with torch.no_grad():
            model.backbone.layer3[0].conv2.weight[0].mul_(1.5)
        return model

    monkeypatch.setattr(pipeline, 'reparameterize', wrong)


def test_a_wrong_conversion_is_not_saved(folder, wrong_conversion):
    with pytest.raises(VerificationError) as error:
        deploy(folder, folder / 'wrong')
    assert 'does not compute the same function, nothing was saved' in str(error.value)
    assert 'in float32: ' in str(error.value)
    assert 'starts in the layer backbone.layer3.0.conv2' in str(error.value)
    assert not (folder / 'wrong').exists()


def test_a_wrong_conversion_is_saved_on_demand(folder, wrong_conversion, capsys):
    report = deploy(folder, folder / 'unverified', save_unverified=True, test=False)
    assert 'backbone.layer3.0.conv2' in report['problems'][0]
    meta = torch.load(folder / 'unverified' / 'model.pth')['meta']
    assert not meta['verified']
    assert meta['verification']['first_difference'] == 'backbone.layer3.0.conv2'
    print_report(report, folder / 'unverified')
    assert 'UNVERIFIED' in capsys.readouterr().out


@pytest.fixture
def moving_metric(monkeypatch):
    found = iter([{'coco/bbox_mAP': 0.5}, {'coco/bbox_mAP': 0.4997}])
    monkeypatch.setattr(pipeline, 'tested_metrics', lambda *args: next(found))


@pytest.mark.usefixtures('moving_metric')
def test_a_metric_that_moves_is_a_warning_where_all_outputs_agree(folder, capsys):
    report = deploy(folder, folder / 'warned')
    assert report['problems'] == []
    assert 'coco/bbox_mAP is 0.50000 in training form but 0.49970' in report['warnings'][0]
    assert torch.load(folder / 'warned' / 'model.pth')['meta']['verified']
    saved = json.loads((folder / 'warned' / 'report.json').read_text())
    assert saved['warnings'] == report['warnings']
    capsys.readouterr()
    print_report(report, folder / 'warned')
    printed = capsys.readouterr().out
    assert 'a metric moved, though every raw output' in printed
    assert 'moved by 3.00e-04' in printed


@pytest.mark.usefixtures('moving_metric')
def test_a_metric_that_moves_is_not_saved_where_not_all_was_compared(folder, monkeypatch):
    good = pipeline.verify
    monkeypatch.setattr(pipeline, 'verify', lambda *args: dataclasses.replace(
        good(*args), not_run=('bbox_head.unseen',)))
    with pytest.raises(VerificationError, match=r'(?s)coco/bbox_mAP is 0\.50000 .*0\.49970.*'
                       r'3\.00e-04.*on 2 images.*depends on:\n  bbox_head\.unseen'):
        deploy(folder, folder / 'moved')
    assert not (folder / 'moved').exists()


def test_a_failure_leaves_nothing_behind(folder, monkeypatch):
    def fail(*args):
        raise OSError('the disk is full')

    monkeypatch.setattr(pipeline, 'tested_metrics', fail)
    (folder / 'kept').mkdir()
    (folder / 'kept' / 'mine.txt').touch()
    for out in ('kept', 'gone'):
        with pytest.raises(OSError, match='disk is full'):
            deploy(folder, folder / out)
    assert [path.name for path in (folder / 'kept').iterdir()] == ['mine.txt']
    assert not (folder / 'gone').exists()


def test_the_input_is_not_overwritten(folder):
    for name in ('model.pth', 'config.py'):
        (folder / name).exists() or (folder / name).symlink_to(folder / 'iter_5.pth')
    with pytest.raises(FileExistsError, match='would overwrite the input'):
        reparameterize_checkpoint(config(folder), folder / 'model.pth', folder)


def test_an_earlier_result_is_replaced_as_a_whole(folder):
    out = folder / 'replaced'
    deploy(folder, out, test=False)
    (out / 'report.json').write_text('old')
    report = deploy(folder, out, test=False, form='folded')
    assert report['notes'][0].startswith('no metric was tested')
    assert torch.load(out / 'model.pth')['meta']['form'] == 'folded'
    assert json.loads((out / 'report.json').read_text())['form'] == 'folded'
    (out / 'mine.txt').touch()
    with pytest.raises(FileExistsError, match=r'other files as well \(mine\.txt\)'):
        deploy(folder, out, test=False)
    assert not [path for path in folder.iterdir() if path.name.startswith('.')]


def test_an_inferencer_builds_the_model_from_the_weights_alone(folder, plain):
    """As MMDetection documents it: `DetInferencer(weights=...)`."""
    from mmdet.apis import DetInferencer

    inferencer = DetInferencer(weights=str(plain[1] / 'model.pth'), device='cpu')
    assert type(inferencer.model.backbone).__name__ == 'ResNet'
    assert inferencer.model.dataset_meta['classes'] == ('circle', 'square', 'triangle')
    image = next((folder / 'data').rglob('*.png'), None) or next((folder / 'data').rglob('*.jpg'))
    found = inferencer(str(image), no_save_vis=True)['predictions'][0]
    again = DetInferencer(str(plain[1] / 'config.py'), str(plain[1] / 'model.pth'), device='cpu')
    assert found == again(str(image), no_save_vis=True)['predictions'][0]
    assert len(found['scores']) > 0


@pytest.mark.parametrize(('count', 'sizes'), [(1, [1]), (4, [3, 1]), (6, [3, 3]), (9, [3, 3, 1]),
                                              (99, [3, 3, 1])])
def test_images_are_counted_not_batches(count, sizes):
    class Preprocessor:
        @staticmethod
        def data_preprocessor(data, training):
            assert not training
            return {'inputs': torch.stack(data), 'data_samples': [int(x[0]) for x in data],
                    'scale': 2.0}

    images = [torch.full((2,), float(i)) for i in range(7)]
    batches = first_images([images[:3], images[3:6], images[6:]], Preprocessor, count)
    assert [len(batch['inputs']) for batch in batches] == sizes
    assert [i for batch in batches for i in batch['data_samples']] == list(range(sum(sizes)))
    assert all(batch['scale'] == 2.0 for batch in batches)


def test_a_plain_model_has_nothing_to_convert(folder, plain):
    cfg = Config.fromfile(plain[1] / 'config.py')
    cfg.work_dir, cfg.launcher = str(folder / 'work'), 'none'
    with pytest.raises(CheckpointError, match=r'is in plain form already, .*training form'):
        reparameterize_checkpoint(cfg, plain[1] / 'model.pth', folder / 'again')
    stock = torch.load(plain[1] / 'model.pth')['state_dict']
    torch.save(stock, folder / 'stock.pth')
    with pytest.raises(NothingToConvertError, match='nothing to re-parameterize'):
        reparameterize_checkpoint(cfg, folder / 'stock.pth', folder / 'again')


def test_a_config_whose_network_does_not_take_the_weights_is_refused(folder, monkeypatch):
    def deeper(cfg, form):
        cfg = deploy_config(cfg, form)
        cfg.model.bbox_head.stacked_convs = 2
        return cfg

    deploy_config = pipeline.deploy_config
    monkeypatch.setattr(pipeline, 'deploy_config', deeper)
    with pytest.raises(VerificationError, match=r'(?s)builds another model.*cls_convs\.1'):
        deploy(folder, folder / 'other')
    assert not (folder / 'other').exists()
