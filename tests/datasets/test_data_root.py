"""Pointing configs at a user's own folder."""

import json

import pytest
from helpers import ROOT
from mmengine.config import Config

from orepa_mm.datasets import DataRootError, apply_data_root, make_shapes_coco

CONFIG = ROOT / 'configs' / 'faster_rcnn' / 'faster-rcnn_orepa-r18-light_fpn_400i_coco.py'


@pytest.fixture
def data(tmp_path):
    return make_shapes_coco(tmp_path / 'data', 2, 1, 64)


def edit(data, split, change):
    path = data / 'annotations' / f'instances_{split}2017.json'
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_every_dataloader_evaluator_and_head(data):
    cfg = apply_data_root(Config.fromfile(CONFIG), data)
    for name in ('train', 'val', 'test'):
        dataset = cfg[f'{name}_dataloader'].dataset
        assert dataset.data_root == str(data)
        assert dataset.metainfo.classes == ('circle', 'square', 'triangle')
    for name in ('val', 'test'):
        assert cfg[f'{name}_evaluator'].ann_file == str(
            data / 'annotations' / 'instances_val2017.json')
    assert cfg.model.roi_head.bbox_head.num_classes == 3
    assert 'num_classes' not in cfg.model.rpn_head


def test_nested_data_sets_and_heads(data):
    cfg = Config.fromfile(CONFIG)
    inner = cfg.train_dataloader.dataset
    cfg.train_dataloader.dataset = dict(type='RepeatDataset', times=2, dataset=dict(
        type='ConcatDataset', datasets=[inner, inner]))
    cfg.test_evaluator = [cfg.test_evaluator]
    cfg.model.roi_head.bbox_head = [dict(num_classes=80), dict(num_classes=80)]
    cfg.model.rpn_head.num_classes = 1
    cfg = apply_data_root(cfg, data)
    for one in cfg.train_dataloader.dataset.dataset.datasets:
        assert one.data_root == str(data)
    assert cfg.test_evaluator[0].ann_file.startswith(str(data))
    assert [head.num_classes for head in cfg.model.roi_head.bbox_head] == [3, 3]
    assert cfg.model.rpn_head.num_classes == 1


def test_missing_folder(tmp_path):
    with pytest.raises(DataRootError, match='is no folder'):
        apply_data_root(Config.fromfile(CONFIG), tmp_path / 'nothing')


def test_missing_annotation_file_lists_what_is_there(data):
    path = data / 'annotations' / 'instances_train2017.json'
    path.rename(path.with_name('train.json'))
    with pytest.raises(DataRootError, match=r'instances_train2017\.json is missing.*train\.json'):
        apply_data_root(Config.fromfile(CONFIG), data)


def test_missing_image_folder(data):
    (data / 'val2017').rename(data / 'images')
    with pytest.raises(DataRootError, match='val2017 is missing'):
        apply_data_root(Config.fromfile(CONFIG), data)


@pytest.mark.parametrize('change', [
    lambda c: c.pop('categories'), lambda c: c['categories'].clear(),
    lambda c: c['categories'][0].pop('name')])
def test_not_coco_format(data, change):
    edit(data, 'train', change)
    with pytest.raises(DataRootError, match=r'COCO format|needs categories'):
        apply_data_root(Config.fromfile(CONFIG), data)


def test_other_order_of_categories_is_an_error(data):
    # mmdet would give the labels of one file the names of the other
    edit(data, 'val', lambda c: c['categories'].reverse())
    with pytest.raises(DataRootError, match='same order'):
        apply_data_root(Config.fromfile(CONFIG), data)
