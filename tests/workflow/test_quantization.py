"""A deployed folder in int8: what is written, what is measured, and when nothing is."""

import json
import math
import shutil

import cv2
import numpy as np
import onnx
import pytest
import torch
from helpers import ROOT, vary_scales
from mmengine.runner import Runner
from tiny_runs import config, let_outputs_be_moderate

from orepa_mm import load
from orepa_mm.datasets import make_shapes_cityscapes, make_shapes_coco, make_shapes_imagenet
from orepa_mm.engine import (
    bare_model,
    build_test_runner,
    metrics,
)
from orepa_mm.errors import ConfigError, VerificationError
from orepa_mm.export import deploy_config, save_deployed
from orepa_mm.export.onnx import export_onnx
from orepa_mm.export.onnx.quantize import LayerNoise, quantizable_layers
from orepa_mm.files import sha256
from orepa_mm.reparam import reparameterize
from orepa_mm.workflow import predict, quantization
from orepa_mm.workflow.evidence import built_model, first_images
from orepa_mm.workflow.onnx_model import load_onnx, network_meta
from orepa_mm.workflow.quantization import fewest, quantize_deployed
from orepa_mm.workflow.quantization_report import quantization_table

#: What makes a config tiny, its data set, its metric, and its graphs.
TASKS = {
    'detector': ('faster_rcnn/faster-rcnn_orepa-r18-light_fpn_400i_coco.py', '''
model = dict(
    backbone=dict(base_channels=8), neck=dict(in_channels=[8, 16, 32, 64], out_channels=16),
    rpn_head=dict(in_channels=16, feat_channels=16),
    roi_head=dict(bbox_roi_extractor=dict(out_channels=16),
                  bbox_head=dict(in_channels=16, fc_out_channels=16)),
    test_cfg=dict(rpn=dict(max_per_img=50), rcnn=dict(score_thr=0.0)))
''', make_shapes_coco, 'coco/bbox_mAP', ['model_int8.onnx', 'model_int8_bbox.onnx']),
    'segmentor': ('upernet/upernet_orepa-r18-light_400i_cityscapes-192x192.py', '''
model = dict(
    backbone=dict(base_channels=8, stem_channels=8),
    decode_head=dict(in_channels=[8, 16, 32, 64], channels=8),
    auxiliary_head=dict(in_channels=32, channels=8))
''', make_shapes_cityscapes, 'mIoU', ['model_int8.onnx']),
    'classifier': ('imagenet/orepa-resnet18-light_300i_in1k.py', '''
model = dict(backbone=dict(base_channels=8, stem_channels=8), head=dict(in_channels=64))
''', make_shapes_imagenet, 'accuracy/top1', ['model_int8.onnx']),
}
LOADERS = ''.join(f'{name}_dataloader = dict(num_workers=0, persistent_workers=False)\n'
                  for name in ('train', 'val', 'test'))


@pytest.fixture(scope='module')
def folder_of(tmp_path_factory):
    """For each task: config, data, and a folder in folded form with ONNX."""
    folders = {}

    def prepare(task):
        if task not in folders:
            folder = folders[task] = tmp_path_factory.mktemp(f'my {task}')
            base, changes, make, *_ = TASKS[task]
            make(folder / 'data', 12, 12, 64)
            (folder / 'config.py').write_text(
                f"_base_ = '{ROOT}/configs/{base}'\n{changes}{LOADERS}")
            cfg = config(folder)
            torch.manual_seed(0)
            model = built_model(cfg)
            vary_scales(model)
            let_outputs_be_moderate(model)
            model = reparameterize(model.eval(), fold_bn=True)
            out = folder / 'deployed'
            save_deployed(model, deploy_config(cfg, 'folded'), out, {'form': 'folded'})
            batch, = first_images(Runner.build_dataloader(cfg.test_dataloader), model, 1)
            export_onnx(model, batch, out / 'model.onnx', meta={
                'form': 'folded', 'source': 'iter_2.pth', 'verified': True,
                **network_meta(deploy_config(cfg, 'folded'), batch)})
        return folders[task]
    return prepare


def contents(folder):
    return {path.name: sha256(path) for path in folder.iterdir()}


@pytest.mark.parametrize('task', [
    'detector', pytest.param('segmentor', marks=pytest.mark.long), 'classifier'])
def test_each_task(folder_of, task, tmp_path):
    folder = folder_of(task)
    *_, metric, files = TASKS[task]
    out = folder / 'deployed'
    before = contents(out)
    report = quantize_deployed(config(folder), out, calibration_images=3, latency_rounds=1,
                               methods=['min-max', 'percentile'])
    after = contents(out)
    assert after.keys() - before.keys() == {*files} == {*report['files']}
    assert before.items() <= after.items()
    # ONNX Runtime in the model's place finds what PyTorch finds
    runner = build_test_runner(config_of_deployed(folder), out / 'model.pth')
    expected = metrics.tested_metrics(runner, folder)
    assert report['metrics']['float'] == pytest.approx(expected, abs=2e-2 * max(
        1, *expected.values()) if task == 'detector' else 1e-2)
    assert report['metric'] == metric
    assert report['metrics']['int8'].keys() == report['metrics']['float'].keys()
    unit = 1 if task == 'detector' else 100
    assert report['drop'] == pytest.approx((
        report['metrics']['float'][metric] - report['metrics']['int8'][metric]) / unit)
    assert report['images'] == {'calibration': 3, 'compared': 4}
    assert report['file_bytes']['int8'] < 0.9 * report['file_bytes']['float']
    for graph, ratios in report['snr'].items():
        assert ratios[report['method'][graph]] == max(ratios.values())
        assert ratios.keys() == {'min-max', 'percentile'}
    noise = [layer['alone'] for layer in report['layers']]
    assert noise == sorted(noise)
    assert not report['float_layers']
    for name in files:
        proto = onnx.load(out / name)
        onnx.checker.check_model(proto, full_check=True)
        source = {item.key: item.value for item in onnx.load(
            out / name.replace('_int8', '')).metadata_props}
        meta = {item.key: item.value for item in proto.metadata_props}
        quantized = json.loads(meta.pop('quantization'))
        assert source.pop('verified') == 'true'
        assert meta == source  # form, source, graph, mean, classes, ...
        assert quantized['method'] == report['method'][meta['graph']]
        assert (quantized['per_channel'], quantized['float_layers']) == (True, [])
        convolutions = [node for node in proto.graph.node if node.op_type in ('Conv', 'Gemm')]
        assert all(node.input[1].endswith('_DequantizeLinear_Output') for node in convolutions)
    table = quantization_table(report)
    assert f'| {metric} |' in table
    assert report['layers'][0]['layer'] in table
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    for name in ('model.onnx', 'model_int8.onnx'):
        predicts_alone(task, folder, name, tmp_path / name.partition('.')[0])


def predicts_alone(task, folder, name, out):
    """The network's file, away from config and checkpoint, is enough to predict."""
    images = [folder / 'data' / {'detector': 'val2017', 'segmentor': 'leftImg8bit/val',
                                 'classifier': 'val'}[task]]
    shutil.copytree(folder / 'deployed', out / 'files', ignore=lambda _, names: [
        other for other in names if not other.endswith('.onnx')])
    for kind, model in (('torch', load(folder / 'deployed')),
                        ('onnx', load_onnx(out / 'files' / name))):
        predict(model, images, out / kind, draw=False, score_thr=0, batch_size=3)
    found, expected = (json.loads((out / kind / 'predictions.json').read_text())
                       for kind in ('onnx', 'torch'))
    exact = name == 'model.onnx'
    if task == 'detector':
        one, other = ([(item['file_name'], item['category_id'], *np.round(item['bbox']))
                       for item in items] for items in (found, expected))
        same = [box in set(other) for box in one]
        assert len(found) > 50
        assert np.mean(same) > (0.95 if exact else 0)
    elif task == 'segmentor':
        assert found['images'] == expected['images']
        maps = [np.stack([cv2.imread(str(out / kind / image['labels']))
                          for image in found['images']]) for kind in ('onnx', 'torch')]
        assert np.mean(maps[0] != maps[1]) < (1e-3 if exact else 0.5)
        assert len(np.unique(maps[0])) > 1
    else:
        for one, other in zip(found, expected, strict=True):
            assert one['file_name'] == other['file_name']
            scores = [{item['label']: item['score'] for item in image['top']}
                      for image in (one, other)]
            assert not exact or scores[0] == pytest.approx(scores[1], abs=1e-3)


def test_a_detectors_files_belong_together(folder_of, tmp_path):
    shutil.copy(folder_of('detector') / 'deployed' / 'model.onnx', tmp_path / 'model.onnx')
    with pytest.raises(FileNotFoundError, match=r'no model_bbox\.onnx beside .*model\.onnx'):
        load_onnx(tmp_path / 'model.onnx')


def config_of_deployed(folder):
    cfg = quantization._test_config(config(folder), folder / 'deployed' / 'config.py')
    cfg.visualizer.name = 'of PyTorch'
    return cfg


def without_a_test(monkeypatch, metric):
    """Tests whose metric depends on nothing but the number of layers in float, and known noise."""
    counts = []

    def tested(runner, folder):
        path = folder / 'model.onnx'
        float_layers = 0 if not path.is_file() else sum(
            node.op_type in ('Conv', 'Gemm') and node.input[1].endswith('.weight')
            for node in onnx.load(path).graph.node)
        counts.append(float_layers if path.is_file() else None)
        return {'accuracy/top1': metric(counts[-1])}

    def noise(graph, proto, *_, **__):
        layers = list(quantizable_layers(proto))
        return [LayerNoise(graph, layer, 20.0 + (7 * number) % len(layers), 30.0)
                for number, layer in enumerate(layers)]

    monkeypatch.setattr(quantization, 'tested_metrics', tested)
    monkeypatch.setattr(quantization, 'layer_noise', noise)
    return counts


def quantize(folder, **options):
    return quantize_deployed(config(folder), folder / 'deployed', latency_rounds=1,
                             **{'calibration_images': 1, 'methods': ['min-max'], **options})


def test_layers_stay_in_float_until_the_drop_is_small(folder_of, monkeypatch):
    folder = folder_of('classifier')
    counts = without_a_test(monkeypatch, lambda kept: 80 if kept is None else 70 + kept)
    report = quantize(folder, max_drop=0.05)
    assert counts == [None, 0, 1, 2, 4, 8, 6, 5]
    assert report['drop'] == pytest.approx(0.05)
    assert len(report['float_layers']) == 5
    assert report['float_layers'] == [layer['layer'] for layer in report['layers'][:5]]
    assert [trial['float_layers'] for trial in report['search']] == [0, 1, 2, 4, 5, 6, 8]
    proto = onnx.load(folder / 'deployed' / 'model_int8.onnx')
    stored = {item.name for item in proto.graph.initializer}
    assert {f'{layer}.weight' for layer in report['float_layers']} <= stored
    meta = {item.key: item.value for item in proto.metadata_props}
    assert json.loads(meta['quantization'])['float_layers'] == report['float_layers']
    report = quantize(folder, max_drop=0.11, float_layers=['backbone.conv1'])
    assert report['float_layers'] == ['backbone.conv1']


@pytest.mark.parametrize('found', [40, math.nan])
def test_a_drop_that_stays_writes_nothing(folder_of, monkeypatch, found):
    folder = folder_of('classifier')
    for path in (folder / 'deployed').glob('model_int8*'):
        path.unlink()
    before = contents(folder / 'deployed')
    counts = without_a_test(monkeypatch, lambda kept: 80 if kept is None else found)
    with pytest.raises(VerificationError, match=r'(?s)int8 loses (0.4000|all) of accuracy/top1, '
                       r'allowed is 0.01, with 10 of 21 layers.*nothing was written.*'
                       r'\| accuracy/top1 \| 80.0000'):
        quantize(folder, max_drop=0.01)
    assert max(counts[1:]) == 10  # half of all: int8 is not given up without a word
    assert contents(folder / 'deployed') == before


def test_what_is_refused(folder_of, tmp_path, monkeypatch):
    folder = folder_of('classifier')
    monkeypatch.setattr(quantization, 'build_test_runner', None)  # before long work
    for options, message in (
            ({'calibration_images': 0}, 'needs images to calibrate on, not 0'),
            ({'max_drop': 5}, 'a fraction of 1'), ({'max_drop': math.nan}, 'a fraction of 1'),
            ({'methods': ['best']}, 'no calibration method best, only min-max'),
            ({'methods': []}, 'no calibration method given')):
        with pytest.raises(ConfigError, match=message):
            quantize(folder, **options)
    with pytest.raises(FileNotFoundError, match='there is no folder'):
        quantize_deployed(config(folder), tmp_path / 'nothing')
    for name in ('config.py', 'model.pth'):
        (tmp_path / name).write_bytes((folder / 'deployed' / name).read_bytes())
    with pytest.raises(FileNotFoundError, match=r'model\.onnx: write .*--form folded --onnx'):
        quantize_deployed(config(folder), tmp_path)
    (tmp_path / 'model.onnx').write_bytes(b'nonsense')
    with pytest.raises(ConfigError, match='cannot be read as ONNX'):
        quantize_deployed(config(folder), tmp_path)
    proto = onnx.load(folder / 'deployed' / 'model.onnx')
    onnx.helper.set_model_props(proto, {'form': 'plain'})
    onnx.save(proto, tmp_path / 'model.onnx')
    with pytest.raises(ConfigError, match=r'is in plain form.*--form folded --onnx'):
        quantize_deployed(config(folder), tmp_path)


def test_what_the_config_or_the_network_lacks(folder_of):
    folder = folder_of('classifier')
    with pytest.raises(ConfigError, match=r'no layer backbone.conv9; it has backbone.conv1'):
        quantize(folder, float_layers=['backbone.conv9'])
    cfg = config(folder)
    cfg.pop('train_dataloader')
    with pytest.raises(ConfigError, match='training images'):
        quantize_deployed(cfg, folder / 'deployed')


def test_training_images_pass_the_test_pipeline(folder_of):
    """Spread over the training set, the same at every call, unlike those of the training."""
    folder = folder_of('segmentor')
    cfg = config(folder)
    model = bare_model(build_test_runner(config_of_deployed(folder),
                                         folder / 'deployed' / 'model.pth'))
    one, two = (quantization.calibration_batches(cfg, model, 3) for _ in range(2))
    names = [batch['data_samples'][0].img_path for batch in one]
    assert len(one) == 3
    assert all('/train/' in name for name in names)
    assert len(set(names)) == 3
    for first, second in zip(one, two):
        assert torch.equal(first['inputs'], second['inputs'])
        assert first['inputs'].shape == (1, 3, 240, 240)  # the test pipeline's size


@pytest.mark.parametrize(('needed', 'limit', 'expected'), [
    (0, 9, 0), (1, 9, 1), (3, 9, 3), (6, 9, 6), (9, 9, 9), (10, 9, 9), (1, 0, 0)])
def test_fewest(needed, limit, expected):
    tried = []

    def drop_with(count):
        tried.append(count)
        return 0.0 if count >= needed else 1.0

    assert fewest(drop_with, 0.5, limit) == expected
    assert expected in tried
    assert max(tried) <= limit
    assert len(set(tried)) <= 2 * np.log2(limit + 1) + 2


def test_without_a_limit_nothing_is_searched():
    assert fewest(lambda count: 1.0, None, 9) == 0
