"""The tools on the other tasks: segmentation, masks, and ImageNet weights transferred."""

import json
import pickle
from importlib.metadata import packages_distributions

import pytest
import torch
from helpers import ROOT, STOCK_TEST, WITHOUT_US, metrics_of_test, run
from pycocotools.mask import iou

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


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """The folder of a task after two iterations; each is trained once."""
    folders = {}

    def folder_of(name):
        if name not in folders:
            config, make, *_ = TASKS[name]
            folder = folders[name] = tmp_path_factory.mktemp(name)
            make(folder / 'data', 12, 12, 64)
            (folder / 'config.py').write_text(config)
            run('tools/train.py', folder / 'config.py', '--work-dir', folder / 'train',
                '--data-root', folder / 'data')
            let_every_layer_matter(folder / 'train' / 'iter_2.pth')
        return folders[name]

    return folder_of


def let_every_layer_matter(path):
    """Vary BN and scales: a residual branch starts behind a scale of 0, which hides it."""
    checkpoint = load_checkpoint(path)
    state = checkpoint['state_dict']
    for key in [*state]:
        if key.endswith('.running_var') or key.endswith('.vector'):
            tensor = state[key.replace('.running_var', '.weight')]
            tensor.add_(torch.randn_like(tensor) * 0.2)
    torch.save(checkpoint, path)


@pytest.fixture(scope='module', params=[
    pytest.param(name, marks=pytest.mark.long if name == 'instances' else ()) for name in TASKS])
def task(request, trained):
    """With the re-parameterized model, too: (folder, metric, stock package)."""
    *_, metric, package = TASKS[request.param]
    folder = trained(request.param)
    run('tools/reparam.py', folder / 'config.py', folder / 'train' / 'iter_2.pth', '--work-dir',
        folder / 'test', '--data-root', folder / 'data', '--out', folder / 'deployed',
        '--latency-rounds', 1, '--num-images', 2, '--show-dir', folder / 'pictures')
    return folder, metric, package


def test_both_forms_score_the_same(task):
    folder, metric, package = task
    report = json.loads((folder / 'deployed' / 'report.json').read_text())
    assert report['largest_difference']['float32'] < 1e-4
    assert report['largest_difference']['tensors'] < 1e-6
    before, after = report['metrics']['training'], report['metrics']['deployed']
    assert metric in before
    assert before == pytest.approx(after, abs=1e-4, nan_ok=True)
    assert packages_distributions()[package] == [report['package']]
    if package == 'mmseg':  # with all digits, where mmseg gives two
        assert round(before[metric], 2) != before[metric]


#: To how many digits the stock packages round a metric.
STOCK_DIGITS = {'mmdet': 3, 'mmseg': 2, 'mmpretrain': 12}


def test_the_stock_package_tests_the_result(task):
    """Where orepa_mm cannot be imported: its metrics are those of our test of the training form."""
    folder, metric, package = task
    out = folder / ('stock_maps' if package == 'mmseg' else 'stock.pkl')
    output = run('-c', WITHOUT_US + STOCK_TEST, package, folder / 'deployed' / 'config.py',
                 folder / 'deployed' / 'model.pth', '--work-dir', folder / 'stock', '--out', out)
    for complaint in ('unexpected key', 'missing keys', 'size mismatch'):
        assert complaint not in output
    ours = json.loads((folder / 'deployed' / 'report.json').read_text())['metrics']['training']
    stock = metrics_of_test(folder / 'stock')
    assert metric in ours
    margin = 0.51 * 10**-STOCK_DIGITS[package] + 1e-4
    assert {name: stock[name] for name in ours} == pytest.approx(ours, abs=margin, nan_ok=True)
    if package != 'mmseg':  # near chance these metrics hide much; mIoU counts every pixel
        compare_predictions(folder, package)


def compare_predictions(folder, package):
    """Those of our test of the training form with those of the stock package."""
    run('tools/test.py', folder / 'config.py', folder / 'train' / 'iter_2.pth', '--work-dir',
        folder / 'test', '--data-root', folder / 'data', '--out', folder / 'ours.pkl')
    ours, stock = (pickle.loads((folder / name).read_bytes())
                   for name in ('ours.pkl', 'stock.pkl'))
    assert len(ours) == len(stock) == 12
    for one, other in zip(ours, stock):
        if package == 'mmdet':
            assert share_found(one['pred_instances'], other['pred_instances']) > 0.8
        else:
            assert one['pred_score'].std() > 2e-4
            assert torch.allclose(one['pred_score'], other['pred_score'], rtol=0, atol=1e-5)


def share_found(one, other):
    """How many of one form's instances the other has, too.

    The same label, box (0.1 pixels), score (0.001) and mask. Not all: at random weights a rounding
    error decides here and there which of two boxes is suppressed.
    """
    assert len(one['scores']) > 10
    first, second = (torch.cat([found['bboxes'], found['labels'][:, None] * 1000,
                                found['scores'][:, None] * 100], dim=1) for found in (one, other))
    distance, nearest = torch.cdist(first, second, p=float('inf')).min(dim=1)
    same_mask = [iou([mask], [other['masks'][index]], [0])[0, 0] > 0.99
                 for mask, index in zip(one['masks'], nearest.tolist())]
    return ((distance < 0.1) & torch.tensor(same_mask)).double().mean()


def test_predictions_are_drawn(task):
    folder, *_ = task
    drawn = [path for where in (folder / 'pictures', folder / 'test')
             for pattern in ('*.png', '*.jpg') for path in where.rglob(pattern)]
    assert len(drawn) == 12


def test_pretrained_weights_reach_the_detector(trained, tmp_path):
    """ImageNet -> the runner's file -> init_cfg -> fine-tuned."""
    make_shapes_coco(tmp_path / 'data', 4, 3, 64)
    checkpoint = trained('classification') / 'train' / 'iter_2.pth'
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
