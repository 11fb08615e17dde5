"""The tools on the other tasks: segmentation, masks, and ImageNet weights transferred."""

import json

import pytest
import torch
from helpers import ROOT, STOCK_TEST, WITHOUT_US, run

from orepa_mm.checkpoints import load_checkpoint
from orepa_mm.datasets import make_shapes_cityscapes, make_shapes_coco, make_shapes_imagenet

NO_WORKERS = '''
train_dataloader = dict(batch_size=2, num_workers=0, persistent_workers=False)
val_dataloader = dict(num_workers=0, persistent_workers=False)
test_dataloader = dict(num_workers=0, persistent_workers=False)
train_cfg = dict(max_iters=2, val_interval=2)
default_hooks = dict(checkpoint=dict(by_epoch=False, interval=2), logger=dict(interval=1))
'''
#: Config and what makes it small; the stock package that tests the result.
TASKS = {
    'segmentation': (f'''
_base_ = '{ROOT}/configs/upernet/upernet_orepa-r18-light_400i_cityscapes-192x192.py'
model = dict(
    backbone=dict(base_channels=8, stem_channels=8),
    decode_head=dict(in_channels=[8, 16, 32, 64], channels=8),
    auxiliary_head=dict(in_channels=32, channels=8))
''' + NO_WORKERS, make_shapes_cityscapes, 'mIoU', 'mmseg'),
    'instances': (f'''
_base_ = '{ROOT}/configs/mask_rcnn/mask-rcnn_orepa-r18-light_fpn_400i_coco.py'
model = dict(backbone=dict(base_channels=8), neck=dict(in_channels=[8, 16, 32, 64]))
''' + NO_WORKERS, make_shapes_coco, 'coco/segm_mAP', 'mmdet'),
    'classification': (f'''
_base_ = '{ROOT}/configs/imagenet/orepa-resnet18-light_300i_in1k.py'
model = dict(backbone=dict(base_channels=8, stem_channels=8), head=dict(in_channels=64))
''' + NO_WORKERS, make_shapes_imagenet, 'accuracy/top1', 'mmpretrain'),
}


@pytest.fixture(scope='module', params=TASKS)
def task(request, tmp_path_factory):
    """Two iterations and the re-parameterized model: (folder, metric, stock package)."""
    config, make, metric, package = TASKS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    make(folder / 'data', 12, 12, 64)
    (folder / 'config.py').write_text(config)
    run('tools/train.py', folder / 'config.py', '--work-dir', folder / 'train', '--data-root',
        folder / 'data')
    run('tools/reparam.py', folder / 'config.py', folder / 'train' / 'iter_2.pth', '--work-dir',
        folder / 'test', '--data-root', folder / 'data', '--out', folder / 'deployed',
        '--latency-rounds', 1, '--num-images', 2)
    return folder, metric, package


def test_both_forms_score_the_same(task):
    folder, metric, package = task
    report = json.loads((folder / 'deployed' / 'report.json').read_text())
    assert report['largest_difference']['float32'] < 1e-4
    assert report['largest_difference']['float64'] < 1e-6
    before, after = report['metrics']['training'], report['metrics']['deployed']
    assert metric in before
    assert before == pytest.approx(after, abs=1e-4, nan_ok=True)
    assert {'mmseg': 'mmsegmentation'}.get(package, package) == report['package']
    if package == 'mmseg':  # with all digits, where mmseg gives two
        assert round(before[metric], 2) != before[metric]


def test_the_stock_package_tests_the_result(task):
    folder, metric, package = task
    output = run('-c', WITHOUT_US + STOCK_TEST, package, folder / 'deployed' / 'config.py',
                 folder / 'deployed' / 'model.pth', '--work-dir', folder / 'stock')
    metric = metric.rpartition('/')[2]
    assert metric in output
    for complaint in ('unexpected key', 'missing keys', 'size mismatch'):
        assert complaint not in output


def test_predictions_are_drawn(task):
    folder, *_ = task
    run('tools/test.py', folder / 'config.py', folder / 'train' / 'iter_2.pth', '--work-dir',
        folder / 'drawn', '--data-root', folder / 'data', '--show-dir', folder / 'pictures')
    drawn = [path for where in (folder / 'pictures', folder / 'drawn')
             for pattern in ('*.png', '*.jpg') for path in where.rglob(pattern)]
    assert len(drawn) == 12


def test_pretrained_weights_reach_the_detector(tmp_path):
    """ImageNet -> converted names or the runner's file -> init_cfg -> fine-tuned."""
    make_shapes_imagenet(tmp_path / 'shapes', 24, 12, 64)
    make_shapes_coco(tmp_path / 'data', 4, 3, 64)
    (tmp_path / 'pretrain.py').write_text(TASKS['classification'][0])
    run('tools/train.py', tmp_path / 'pretrain.py', '--work-dir', tmp_path / 'pretrain',
        '--data-root', tmp_path / 'shapes')
    checkpoint = tmp_path / 'pretrain' / 'iter_2.pth'
    (tmp_path / 'detector.py').write_text(f'''
_base_ = '{ROOT}/configs/faster_rcnn/faster-rcnn_orepa-r18-light-pretrained_fpn_400i_coco.py'
model = dict(
    backbone=dict(base_channels=8, init_cfg=dict(checkpoint='{checkpoint}')),
    neck=dict(in_channels=[8, 16, 32, 64]))
optim_wrapper = dict(optimizer=dict(lr=0.0), paramwise_cfg=dict(stem_lr_mult=0.5))
''' + NO_WORKERS)
    output = run('tools/train.py', tmp_path / 'detector.py', '--work-dir', tmp_path / 'train',
                 '--data-root', tmp_path / 'data')
    assert 'learning rate of the stem backbone.conv1: times 0.5' in output
    before = load_checkpoint(checkpoint)['state_dict']
    after = load_checkpoint(tmp_path / 'train' / 'iter_2.pth')['state_dict']
    moved = {key for key, value in after.items() if key.startswith('backbone.')
             and not torch.equal(value, before[key])}
    assert moved == {key for key in moved if 'running_' in key or 'num_batches' in key}
