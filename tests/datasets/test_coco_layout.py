"""Detection and instance segmentation configs, pointed at a folder in COCO layout."""


import pytest
from checking import edit
from helpers import SHARED
from mmdet.registry import METRICS
from mmengine.config import Config
from mmengine.hub import get_config

from orepa_mm.datasets import apply_data_root, make_shapes_coco
from orepa_mm.errors import DataRootError

FASTER_RCNN = 'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py'
BCCD = SHARED / 'data' / 'bccd_coco'

needs_bccd = pytest.mark.skipif(not BCCD.is_dir(), reason=f'the real images are not here ({BCCD}): '
                                'they come with a development checkout only')


@pytest.fixture
def data(tmp_path):
    return make_shapes_coco(tmp_path / 'data', 2, 1, 64)


@pytest.fixture
def cfg():
    return get_config(FASTER_RCNN)


def test_every_dataloader_evaluator_and_head(cfg, data):
    apply_data_root(cfg, data)
    for name in ('train', 'val', 'test'):
        dataset = cfg[f'{name}_dataloader'].dataset
        assert dataset.data_root == str(data)
        assert dataset.metainfo.classes == ('circle', 'square', 'triangle')
    for name in ('val', 'test'):
        assert cfg[f'{name}_evaluator'].ann_file == str(
            data / 'annotations' / 'instances_val2017.json')
    assert cfg.model.roi_head.bbox_head.num_classes == 3
    assert 'num_classes' not in cfg.model.rpn_head
    assert dict(type='NumClassCheckHook') in cfg.custom_hooks


def test_nested_data_sets_and_heads(cfg, data):
    inner = cfg.train_dataloader.dataset
    cfg.train_dataloader.dataset = dict(type='RepeatDataset', times=2, dataset=dict(
        type='ConcatDataset', datasets=[inner, inner]))
    cfg.test_evaluator = [cfg.test_evaluator]
    cfg.model.roi_head.bbox_head = [dict(num_classes=80), dict(num_classes=80)]
    cfg.model.rpn_head.num_classes = 1
    apply_data_root(cfg, data)
    for one in cfg.train_dataloader.dataset.dataset.datasets:
        assert one.data_root == str(data)
    assert cfg.test_evaluator[0].ann_file.startswith(str(data))
    assert [head.num_classes for head in cfg.model.roi_head.bbox_head] == [3, 3]
    assert cfg.model.rpn_head.num_classes == 1


@needs_bccd
@pytest.mark.parametrize(('name', 'heads', 'metric'), [
    ('mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py', ('bbox_head', 'mask_head'), ['bbox', 'segm']),
    ('retinanet/retinanet_r50_fpn_1x_coco.py', ('bbox_head',), 'bbox')])
def test_stock_configs_read_real_images(name, heads, metric, build_datasets):
    cfg = apply_data_root(get_config(f'mmdet::{name}'), BCCD)
    datasets = build_datasets(cfg)
    assert [len(dataset) for dataset in datasets] == [205, 87, 87]
    for dataset in datasets:
        assert dataset.metainfo['classes'] == ('WBC', 'RBC', 'Platelets')
        instances = dataset[0]['data_samples'].gt_instances
        assert len(instances)
        assert instances.labels.max() < 3
        assert ('masks' in instances) == ('mask_head' in heads)
        if 'masks' in instances:
            assert instances.masks.masks.any(axis=(1, 2)).all()
    for head in heads:
        assert cfg.model.get('roi_head', cfg.model)[head].num_classes == 3
    for evaluator in (cfg.val_evaluator, cfg.test_evaluator):
        assert evaluator.metric == metric
        assert len(METRICS.build({**evaluator, '_scope_': 'mmdet'})._coco_api.imgs) == 87


def test_missing_annotation_file_lists_what_is_there(cfg, data):
    path = data / 'annotations' / 'instances_train2017.json'
    path.rename(path.with_name('train.json'))
    with pytest.raises(DataRootError, match=r'instances_train2017\.json is missing.*train\.json'):
        apply_data_root(cfg, data)


def test_missing_image_folder(cfg, data):
    (data / 'val2017').rename(data / 'images')
    with pytest.raises(DataRootError, match='val2017 is missing'):
        apply_data_root(cfg, data)


@pytest.mark.parametrize('change', [
    lambda c: c.pop('categories'), lambda c: c['categories'].clear(),
    lambda c: c['categories'][0].pop('name')])
def test_not_coco_format(cfg, data, change):
    edit(data, 'train', change)
    with pytest.raises(DataRootError, match=r'COCO format|needs categories'):
        apply_data_root(cfg, data)


def test_other_order_of_categories_is_an_error(cfg, data):
    # mmdet would give the labels of one file the names of the other
    edit(data, 'val', lambda c: c['categories'].reverse())
    with pytest.raises(DataRootError, match='same order'):
        apply_data_root(cfg, data)


def test_mmdets_cityscapes_is_coco_layout(data):
    dataset = dict(type='CityscapesDataset', data_root='old',
                   ann_file='annotations/instances_train2017.json',
                   data_prefix=dict(img='train2017/'))
    cfg = Config(dict(train_dataloader=dict(dataset=dataset),
                      model=dict(bbox_head=dict(num_classes=8))))
    apply_data_root(cfg, data)
    assert cfg.train_dataloader.dataset.type == 'CityscapesDataset'
    assert cfg.model.bbox_head.num_classes == 3
