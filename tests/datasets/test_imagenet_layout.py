"""Classification configs, pointed at a folder in ImageNet layout."""

import shutil

import pytest
import torch
from mmengine.hub import get_config
from mmpretrain.datasets import CustomDataset
from mmpretrain.registry import METRICS, MODELS

from orepa_mm.datasets import apply_data_root, make_shapes_imagenet
from orepa_mm.datasets.shapes import OBJECT_CLASSES
from orepa_mm.errors import DataRootError

RESNET = 'mmpretrain::resnet/resnet18_8xb32_in1k.py'


@pytest.fixture
def data(tmp_path):
    return make_shapes_imagenet(tmp_path / 'data', 24, 12, 32)


@pytest.fixture
def cfg():
    return get_config(RESNET)


def keep_classes(data, names):
    for folder in data.glob('*/*'):
        if folder.name not in names:
            shutil.rmtree(folder) if folder.is_dir() else folder.unlink()


def test_data_sets_and_head(cfg, data, build_datasets):
    (data / 'meta').mkdir()  # ImageNet would read its list of images
    (data / 'meta' / 'train.txt').write_text('star_plain/star_plain_000001.png 0\n')
    apply_data_root(cfg, data)
    datasets = build_datasets(cfg)
    assert [len(dataset) for dataset in datasets] == [24, 12, 12]
    for dataset in datasets:
        assert type(dataset) is CustomDataset
        assert dataset.metainfo['classes'] == OBJECT_CLASSES
        for i in range(len(dataset)):
            sample = dataset[i]['data_samples']
            assert f'/{OBJECT_CLASSES[sample.gt_label.item()]}/' in sample.img_path
    assert cfg.model.head.num_classes == cfg.data_preprocessor.num_classes == 12
    assert cfg.model.head.topk == cfg.val_evaluator.topk == (1, 5)


@pytest.mark.parametrize('prefix', [
    dict(data_prefix='train'), dict(data_prefix=dict(img_path='train/'), split=''),
    dict(split='train', ann_file='meta/train.txt')])
def test_ways_to_name_the_folder(cfg, data, build_datasets, prefix):
    cfg.train_dataloader.dataset.pop('split')
    cfg.train_dataloader.dataset.update(prefix)
    cfg.train_dataloader.dataset = dict(type='RepeatDataset', times=2,
                                        dataset=cfg.train_dataloader.dataset)
    assert len(build_datasets(apply_data_root(cfg, data))[0]) == 48


def test_no_name_of_the_folder(cfg, data):
    cfg.val_dataloader.dataset.pop('split')
    with pytest.raises(DataRootError, match='neither split nor data_prefix'):
        apply_data_root(cfg, data)


def test_every_number_of_classes_in_the_model(data):
    cfg = get_config('mmpretrain::vgg/vgg11_8xb32_in1k.py')
    cfg.model.data_preprocessor = dict(cfg.data_preprocessor)
    apply_data_root(cfg, data)
    assert cfg.model.backbone.num_classes == cfg.model.data_preprocessor.num_classes == 12


def test_fewer_classes_than_top_five(cfg, data):
    """The real loss and metric: top-5 of three classes would fail in both."""
    keep_classes(data, names := ('ring_plain', 'star_plain', 'star_striped'))
    apply_data_root(cfg, data)
    head = MODELS.build({**cfg.model.head, '_scope_': 'mmpretrain', 'cal_acc': True})
    samples = [sample(i % 3) for i in range(4)]
    losses = head.loss((torch.rand(4, 512),), samples)
    assert {'loss', 'accuracy_top-1'} == set(losses)
    for evaluator in (cfg.val_evaluator, cfg.test_evaluator):
        metric = METRICS.build({**evaluator, '_scope_': 'mmpretrain'})
        metric.process(None, [dict(pred_score=torch.eye(3)[i], gt_label=torch.tensor([i]))
                              for i in range(3)])
        assert metric.evaluate(3) == {'accuracy/top1': 100}
    assert cfg.train_dataloader.dataset.metainfo.classes == names


def sample(label):
    from mmpretrain.structures import DataSample

    return DataSample().set_gt_label(label)


@pytest.mark.parametrize(('topk', 'expected'), [((1, 3, 5), (1, 3)), (5, (1,)), (2, 2)])
def test_top_k_of_three_classes(cfg, data, topk, expected):
    keep_classes(data, ('ring_plain', 'star_plain', 'star_striped'))
    cfg.test_evaluator = [dict(type='Accuracy', topk=topk)]
    apply_data_root(cfg, data)
    assert cfg.test_evaluator[0].topk == expected


@pytest.mark.parametrize('split', ['train', 'val'])
def test_missing_folder(cfg, data, split):
    (data / split).rename(data / 'images')
    with pytest.raises(DataRootError, match=rf"{split} is missing; .*'images'"):
        apply_data_root(cfg, data)


def test_images_without_class_folders(cfg, data):
    for path in (data / 'train').glob('*/*.png'):
        path.rename(data / 'train' / f'{path.parent.name}-{path.name}')
    keep_classes(data, [path.name for path in (data / 'train').glob('*.png')])
    with pytest.raises(DataRootError, match='train needs a folder of images for each'):
        apply_data_root(cfg, data)


def test_other_classes_to_validate(cfg, data):
    """As many, but of another name: mmpretrain would take them for each other."""
    (data / 'val' / 'star_plain').rename(data / 'val' / 'apple')
    with pytest.raises(DataRootError, match=r"missing are \['star_plain'\], additional are "
                       r"\['apple'\]"):
        apply_data_root(cfg, data)


def test_classes_without_images(cfg, data):
    (data / 'val' / 'star_plain' / 'star_plain_000001.png').unlink()
    apply_data_root(cfg, data)  # nothing to validate of a rare class: may be
    for path in (data / 'train' / 'star_plain').iterdir():
        path.rename(path.with_suffix('.txt'))
    with pytest.raises(DataRootError, match=r'train has no images of star_plain'):
        apply_data_root(cfg, data)


def test_a_folder_to_test_on_only_may_lack_images_of_a_class(cfg, data):
    (data / 'val' / 'star_plain' / 'star_plain_000001.png').unlink()
    shutil.rmtree(data / 'train')
    apply_data_root(cfg, data, ['test'])
    assert cfg.test_dataloader.dataset.metainfo.classes == OBJECT_CLASSES


def test_no_images_to_validate(cfg, data):
    for path in (data / 'val').glob('*/*.png'):
        path.unlink()
    with pytest.raises(DataRootError, match=r'val has no images of circle_plain, '):
        apply_data_root(cfg, data)
