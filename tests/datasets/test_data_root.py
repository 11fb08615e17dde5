"""The layout is chosen by what the config's data sets are."""

import pytest
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.hub import get_config
from mmengine.registry import DefaultScope

from orepa_mm.datasets import (
    apply_data_root,
    make_shapes_cityscapes,
    make_shapes_coco,
    make_shapes_imagenet,
)
from orepa_mm.errors import DataRootError

LAYOUTS = {
    'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py': (make_shapes_coco, 3),
    'mmseg::upernet/upernet_r18_4xb2-40k_cityscapes-512x1024.py': (make_shapes_cityscapes, 4),
    'mmpretrain::resnet/resnet18_8xb32_in1k.py': (make_shapes_imagenet, 12),
}


@pytest.mark.parametrize('name', LAYOUTS)
def test_layout_of_stock_configs(tmp_path, name, build_datasets):
    make, num_classes = LAYOUTS[name]
    root = make(tmp_path / 'first', 12, 12, 64)
    cfg = get_config(name)
    assert apply_data_root(cfg, str(root)) is cfg
    assert cfg.data_root == str(root)
    for dataset in build_datasets(cfg):
        assert len(dataset) == 12
        assert len(dataset.metainfo['classes']) == num_classes
        assert dataset[0]['inputs'].shape[0] == 3

    # a run's own dump of the config goes to yet another folder
    cfg = Config.fromstring(cfg.pretty_text, '.py')
    apply_data_root(cfg, make(tmp_path / 'second', 13, 14, 64))
    assert [len(dataset) for dataset in build_datasets(cfg)] == [13, 14, 14]
    assert 'first' not in cfg.pretty_text


@pytest.mark.parametrize('name', LAYOUTS)
def test_in_whichever_scope_another_config_left(tmp_path, name):
    """mmdet has a CityscapesDataset of its own, which would look for annotations."""
    root = LAYOUTS[name][0](tmp_path, 12, 12, 64)
    (root / 'classes.txt').unlink(missing_ok=True)
    register_all_modules(init_default_scope=False)
    for scope in ('mmdet', 'mmseg', 'mmpretrain'):
        with DefaultScope.overwrite_default_scope(scope):
            apply_data_root(get_config(name), root)


#: Of each layout: what training reads.
TRAINING = {'mmdet': ('annotations/instances_train2017.json', 'train2017'),
            'mmseg': ('leftImg8bit/train', 'gtFine/train'), 'mmpretrain': ('train',)}


@pytest.mark.parametrize('name', LAYOUTS)
@pytest.mark.parametrize('which', [slice(None), slice(1), slice(1, None)])
def test_a_folder_to_test_on_only(tmp_path, name, which):
    """All that training reads is missing, or a part; else the config is the same."""
    root = LAYOUTS[name][0](tmp_path / 'data', 12, 12, 64)
    whole = apply_data_root(get_config(name), root)
    for path in TRAINING[name.partition(':')[0]][which] or TRAINING['mmpretrain']:
        (root / path).rename(tmp_path / path.replace('/', '-'))
        with pytest.raises(DataRootError, match=r'is missing'):
            apply_data_root(get_config(name), root)
    cfg = apply_data_root(get_config(name), root, ['test'])
    assert cfg.test_dataloader == whole.test_dataloader
    assert cfg.val_dataloader == whole.val_dataloader
    assert cfg.test_evaluator == whole.test_evaluator
    assert cfg.model == whole.model
    assert cfg.train_dataloader.dataset.data_root == str(root)


def test_what_is_to_be_tested_on_must_be_there(tmp_path):
    name = 'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py'
    root = make_shapes_coco(tmp_path, 2, 2, 64)
    (root / 'annotations' / 'instances_val2017.json').unlink()
    with pytest.raises(DataRootError, match=r'instances_val2017\.json is missing'):
        apply_data_root(get_config(name), root, ['test'])
    apply_data_root(get_config(name), root, ['train'])


def test_without_a_look_at_the_data(tmp_path):
    """For the check, which names all that is wrong."""
    roots = {name: make(tmp_path / name.partition(':')[0], 12, 12, 64)
             for name, (make, _) in LAYOUTS.items()}
    coco, streets, classes = roots.values()
    (coco / 'train2017').rename(coco / 'images')
    next((streets / 'gtFine' / 'train').rglob('*.png')).unlink()
    next((classes / 'train' / 'star_plain').iterdir()).unlink()
    for name, root in roots.items():
        apply_data_root(get_config(name), root, check=False)
        with pytest.raises(DataRootError):
            apply_data_root(get_config(name), root)


def test_missing_folder(tmp_path):
    with pytest.raises(DataRootError, match='nothing is no folder'):
        apply_data_root(Config(), tmp_path / 'nothing')


@pytest.mark.parametrize(('dataset', 'found'), [
    (dict(type='ADE20KDataset', data_prefix=dict(img_path='i', seg_map_path='s')),
     'ADE20KDataset'),
    (dict(type='ConcatDataset', datasets=[dict(type='CocoDataset', ann_file='a.json'),
                                          dict(type='ImageNet', split='train')]),
     'CocoDataset, ImageNet'),
    (None, 'none')])
def test_another_or_no_layout(tmp_path, dataset, found):
    cfg = Config(dict(train_dataloader=dict(dataset=dataset), model=dict()))
    with pytest.raises(DataRootError, match=f'same layout.*its data sets: {found}$'):
        apply_data_root(cfg, tmp_path)
