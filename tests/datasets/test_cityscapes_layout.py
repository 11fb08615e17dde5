"""Segmentation configs, pointed at a folder in Cityscapes layout."""

import cv2
import numpy as np
import pytest
from helpers import SHARED
from mmengine.hub import get_config
from mmseg.datasets import CityscapesDataset

from orepa_mm.datasets import apply_data_root, make_shapes_cityscapes
from orepa_mm.datasets.cityscapes_layout import distinct_palette
from orepa_mm.errors import DataRootError

UPERNET = 'mmseg::upernet/upernet_r18_4xb2-40k_cityscapes-512x1024.py'
CAMVID = SHARED / 'data' / 'camvid_cityscapes'


@pytest.fixture
def data(tmp_path):
    return make_shapes_cityscapes(tmp_path / 'data', 3, 2, 64)


@pytest.fixture
def cfg():
    return get_config(UPERNET)


def label_file(data, split='val', number=1):
    return (data / 'gtFine' / split / 'shapes'
            / f'shapes_{number:06d}_gtFine_labelTrainIds.png')


@pytest.mark.skipif(not CAMVID.is_dir(), reason=f'the real images are not here ({CAMVID}): '
                    'they come with a development checkout only')
def test_real_images_with_the_classes_of_cityscapes(cfg, build_datasets):
    inner = cfg.train_dataloader.dataset
    cfg.train_dataloader.dataset = dict(type='RepeatDataset', times=3, dataset=inner)
    apply_data_root(cfg, CAMVID)
    datasets = build_datasets(cfg)
    assert [len(dataset) for dataset in datasets] == [3 * 62, 26, 26]
    for dataset in datasets:
        assert dataset.metainfo['classes'] == CityscapesDataset.METAINFO['classes']
        assert dataset.metainfo['label_map'] is None
        sample = dataset[0]['data_samples']
        assert sample.img_path.startswith(str(CAMVID.resolve() / 'leftImg8bit'))
        assert set(sample.gt_sem_seg.data.unique().tolist()) <= {*range(19), 255}
    assert {0, 2, 10} <= set(sample.gt_sem_seg.data.unique().tolist())  # road, building, sky
    assert cfg.model.decode_head.num_classes == cfg.model.auxiliary_head.num_classes == 19


def test_classes_of_the_folder(cfg, data, build_datasets):
    apply_data_root(cfg, data)
    datasets = build_datasets(cfg)
    assert [len(dataset) for dataset in datasets] == [3, 2, 2]
    for dataset in datasets:
        assert dataset.metainfo['classes'] == ('ground', 'circle', 'square', 'triangle')
        assert dataset.metainfo['palette'] == distinct_palette(4)
    expected = cv2.imread(str(label_file(data)), cv2.IMREAD_UNCHANGED)
    sample = datasets[1][0]['data_samples']  # not resized in testing
    assert np.array_equal(sample.gt_sem_seg.data[0].numpy(), expected)
    assert expected.max() > 0
    assert cfg.model.decode_head.num_classes == cfg.model.auxiliary_head.num_classes == 4


def test_the_order_of_classes_is_that_of_the_train_ids(cfg, data, build_datasets):
    """Names of Cityscapes in another order: CityscapesDataset would map the labels."""
    (data / 'classes.txt').write_text('car\nroad\nsky\nwall\n')
    dataset = build_datasets(apply_data_root(cfg, data))[1]
    assert dataset.metainfo['classes'] == ('car', 'road', 'sky', 'wall')
    expected = cv2.imread(str(label_file(data)), cv2.IMREAD_UNCHANGED)
    assert np.array_equal(dataset[0]['data_samples'].gt_sem_seg.data[0].numpy(), expected)


def test_classes_that_a_config_chose_stay(cfg, data, build_datasets):
    (data / 'classes.txt').unlink()
    chosen = ('sidewalk', 'building')
    for name in ('train', 'val', 'test'):
        cfg[f'{name}_dataloader'].dataset.metainfo = dict(classes=chosen)
    cfg.model.decode_head.num_classes = 2
    dataset = build_datasets(apply_data_root(cfg, data))[1]
    assert dataset.metainfo['classes'] == chosen
    assert cfg.model.decode_head.num_classes == 2


def test_lists_of_images_are_used(cfg, data, build_datasets):
    (data / 'mine.txt').write_text('shapes/shapes_000002\n')
    cfg.train_dataloader.dataset.ann_file = 'mine.txt'
    label_file(data, 'train', 1).unlink()  # of an image that is not in the list
    assert len(build_datasets(apply_data_root(cfg, data))[0]) == 1
    (data / 'mine.txt').unlink()
    with pytest.raises(DataRootError, match=r'mine\.txt is missing'):
        apply_data_root(cfg, data)


def test_palette_is_distinct():
    for count in (2, 19, 150, 255):
        palette = distinct_palette(count)
        assert len({tuple(colour) for colour in palette}) == len(palette) == count
        assert np.uint8(palette).tolist() == palette
    # neighbours in the list of classes are easy to tell apart
    assert np.abs(np.diff(distinct_palette(19), axis=0)).max(axis=1).min() > 80


@pytest.mark.parametrize('folder', ['leftImg8bit/train', 'gtFine/val'])
def test_missing_folder(cfg, data, folder):
    (data / folder).rename(data / 'elsewhere')
    with pytest.raises(DataRootError, match=rf"{folder} is missing; .*'elsewhere'"):
        apply_data_root(cfg, data)


def test_missing_label_file(cfg, data):
    label_file(data, 'train', 2).unlink()
    with pytest.raises(DataRootError) as error:
        apply_data_root(cfg, data)
    image = data / 'leftImg8bit/train/shapes/shapes_000002_leftImg8bit.png'
    assert str(error.value).startswith(f'{image} has no label file: '
                                       f'{label_file(data, "train", 2)} is missing')
    assert '1 of 3 images' in str(error.value)
    assert 'raw ids' not in str(error.value)


def test_raw_label_files_say_what_makes_the_right_ones(cfg, data):
    path = label_file(data)
    path.rename(path.with_name(path.name.replace('labelTrainIds', 'labelIds')))
    with pytest.raises(DataRootError, match=r'000001_gtFine_labelIds\.png is there.*'
                       r'tools/dataset_converters/cityscapes\.py'):
        apply_data_root(cfg, data)


def test_no_images(cfg, data):
    for path in (data / 'leftImg8bit' / 'val').glob('*/*.png'):
        path.rename(path.with_suffix('.jpg'))
    with pytest.raises(DataRootError, match=r'val holds no images: .*\*_leftImg8bit\.png'):
        apply_data_root(cfg, data)


def set_pixel(path, value):
    labels = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    labels[5, 7] = value
    cv2.imwrite(str(path), labels)


def test_label_without_a_class(cfg, data):
    set_pixel(label_file(data), 255)  # ignored: legal
    apply_data_root(cfg, data)
    set_pixel(label_file(data), 4)
    with pytest.raises(DataRootError, match=r'000001_gtFine_labelTrainIds\.png has the value 4: '
                       'with 4 classes the values are 0 to 3, and 255'):
        apply_data_root(cfg, data)


def test_label_without_a_class_of_cityscapes(cfg, data):
    (data / 'classes.txt').unlink()
    set_pixel(label_file(data), 18)
    apply_data_root(cfg, data)
    set_pixel(label_file(data), 19)
    with pytest.raises(DataRootError, match='has the value 19: with 19 classes'):
        apply_data_root(cfg, data)


def test_coloured_label_file(cfg, data):
    cv2.imwrite(str(label_file(data)), np.zeros((64, 64, 3), np.uint8))
    with pytest.raises(DataRootError, match='is a colour image'):
        apply_data_root(cfg, data)


def test_damaged_label_file(cfg, data):
    label_file(data).write_bytes(label_file(data).read_bytes()[:60])
    with pytest.raises(DataRootError, match=r'labelTrainIds\.png cannot be read'):
        apply_data_root(cfg, data)


@pytest.mark.parametrize('text', ['', 'road\n', 'road\nroad\n', 'road\n\ncar\n', b'\xff\xfe\x00'])
def test_bad_class_names(cfg, data, text):
    (data / 'classes.txt').write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataRootError, match=r'classes\.txt (needs 2 to 255|is no UTF-8)'):
        apply_data_root(cfg, data)


def test_class_names_of_any_editor(cfg, data):
    (data / 'classes.txt').write_bytes('\ufeffBöden\r\ncircle \r\nsquare\r\ntriangle\r\n\r\n'
                                       .encode())
    apply_data_root(cfg, data)
    assert cfg.train_dataloader.dataset.metainfo.classes == ('Böden', 'circle', 'square',
                                                             'triangle')


def test_weights_of_other_classes(cfg, data):
    cfg.model.decode_head.loss_decode.class_weight = [1.0] * 19
    with pytest.raises(DataRootError, match=r'19 weights in class_weight.* 4 classes'):
        apply_data_root(cfg, data)
    cfg.model.decode_head.loss_decode.class_weight = [1.0] * 4
    apply_data_root(cfg, data)


def test_config_without_class_names(cfg, data):
    (data / 'classes.txt').unlink()
    for name in ('train', 'val', 'test'):
        cfg[f'{name}_dataloader'].dataset.update(
            type='BaseSegDataset', img_suffix='_leftImg8bit.png',
            seg_map_suffix='_gtFine_labelTrainIds.png')
    with pytest.raises(DataRootError, match=r'classes\.txt is missing'):
        apply_data_root(cfg, data)
