"""Finding data sets and numbers of classes in configs."""

from mmdet.datasets import CocoDataset
from mmengine.config import Config

from orepa_mm.datasets.config_walk import dicts_with, find_datasets, set_num_classes, type_name


def test_data_sets_inside_wrappers():
    leaves = [dict(type='A', n=i, pipeline=[dict(dataset=dict(n=9))]) for i in range(4)]
    cfg = Config(dict(
        train_dataloader=dict(dataset=dict(type='RepeatDataset', times=2, dataset=dict(
            type='ConcatDataset', datasets=[leaves[0], dict(type='X', dataset=leaves[1])]))),
        val_dataloader=dict(dataset=leaves[2]), test_dataloader=None))
    found = find_datasets(cfg)
    assert [dataset.n for dataset in found] == [0, 1, 2]
    found[1]['n'] = 7
    assert cfg.train_dataloader.dataset.dataset.datasets[1].dataset.n == 7
    assert find_datasets(Config()) == []


def test_types_by_name_scope_or_class():
    types = ('CocoDataset', 'mmdet.CocoDataset', CocoDataset)
    assert {type_name(dict(type=type_)) for type_ in types} == {'CocoDataset'}
    assert type_name({}) == ''


def test_dicts_with_a_key_but_not_in_pipelines():
    config = dict(k=1, inner=[dict(k=2), dict(k=None)], pipeline=[dict(k=3)])
    assert [found['k'] for found in dicts_with('k', config)] == [1, 2]


def test_number_of_classes_in_every_head_that_tells_them_apart():
    model = dict(
        decode_head=[dict(num_classes=19), dict(num_classes=19)],
        rpn_head=dict(num_classes=1), neck=dict(channels=3),
        roi_head=dict(bbox_head=dict(num_classes=80), semantic_head=dict(num_classes=183)))
    set_num_classes(model, 4)
    assert model == dict(
        decode_head=[dict(num_classes=4), dict(num_classes=4)],
        rpn_head=dict(num_classes=1), neck=dict(channels=3),
        roi_head=dict(bbox_head=dict(num_classes=4), semantic_head=dict(num_classes=183)))
