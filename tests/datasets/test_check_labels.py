"""Faults of label maps, class folders and lists of images are found by their names."""

import shutil

import cv2
import numpy as np
import pytest
from checking import RESNET, UPERNET, checked, cut, found_in, names_of
from mmengine.hub import get_config

from orepa_mm.datasets import apply_data_root
from orepa_mm.datasets.check import check_data
from orepa_mm.datasets.check_findings import METRIC, NOTE, SPOILS, STOPS

LABELS = 'gtFine/val/shapes/shapes_000001_gtFine_labelTrainIds.png'


def write_labels(root, values):
    assert cv2.imwrite(str(root / LABELS), values)


#: What is done to a folder of streets, the problem, and its effect.
LABEL_MAPS = {
    'value': (lambda r: write_labels(r, np.full((64, 64), 4, np.uint8)),
              'label value out of range', METRIC),
    'wide value': (lambda r: write_labels(r, np.full((64, 64), 256, np.uint16)),
                   'label value out of range', METRIC),
    'size': (lambda r: write_labels(r, np.zeros((64, 32), np.uint8)),
             'label map of another size than the image', STOPS),
    'colour': (lambda r: write_labels(r, np.zeros((64, 64, 3), np.uint8)),
               'label map is a colour image', STOPS),
    'ignored': (lambda r: write_labels(r, np.full((64, 64), 255, np.uint8)),
                'image without labels', NOTE),
    'missing': (lambda r: (r / LABELS).unlink(), 'label map is missing', STOPS),
    'empty': (lambda r: (r / LABELS).write_bytes(b''), 'label map is empty', STOPS),
    'cut': (lambda r: cut(r / LABELS), 'label map cannot be read', STOPS),
    'left over': (lambda r: (r / 'leftImg8bit/val/shapes/shapes_000001_leftImg8bit.png').unlink(),
                  'label map of an image that is not there', NOTE),
}


@pytest.mark.parametrize('fault', LABEL_MAPS)
def test_label_maps(streets, fault):
    change, problem, effect = LABEL_MAPS[fault]
    change(streets)
    check = checked(UPERNET, streets)
    assert found_in(check) == {('val', problem): effect}
    assert names_of(check, problem)[0].startswith(str(streets / LABELS))
    assert check.passed == (effect == NOTE)


def test_label_maps_whose_zero_is_no_class(streets):
    """With reduce_zero_label, values are one higher."""
    cfg = apply_data_root(get_config(UPERNET), streets)
    write_labels(streets, np.full((64, 64), 4, np.uint8))
    cfg.test_dataloader.dataset.reduce_zero_label = True
    assert check_data(cfg, ['test']).passed
    write_labels(streets, np.full((64, 64), 5, np.uint8))
    assert not check_data(cfg, ['test']).passed


def test_class_folders(classes):
    for split in ('train', 'val'):
        for path in (classes / split / 'star_plain').iterdir():
            path.unlink()
    check = checked(RESNET, classes)
    assert found_in(check) == {('train', 'class without images'): SPOILS,
                               ('val', 'class without images'): NOTE}
    shutil.rmtree(classes / 'train')
    cfg = get_config(RESNET)
    cfg.train_dataloader.dataset = dict(type='CustomDataset', data_prefix=str(classes / 'train'))
    assert found_in(check_data(cfg, ['train'])) == {('train', 'data cannot be listed'): STOPS}


def test_lists_of_images(classes):
    (classes / 'list.txt').write_text('ring_plain/ring_plain_000001.png 0\nno/such.png 12\n')
    cfg = get_config(RESNET)
    cfg.test_dataloader.dataset = dict(
        type='CustomDataset', data_root=str(classes), data_prefix='val', ann_file='list.txt',
        metainfo=dict(classes=[f'class {i}' for i in range(12)]))
    check = check_data(cfg, ['test'])
    assert names_of(check, 'class label out of range') == [f'{classes}/val/no/such.png: 12']
    assert names_of(check, 'image file is missing') == [f'{classes}/val/no/such.png']
    assert len(names_of(check, 'class without images')) == 11
