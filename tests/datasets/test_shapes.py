"""The generated data set, read with the COCO tools and looked at pixel by pixel."""

import cv2
import numpy as np
import pytest
from pycocotools.coco import COCO

from orepa_mm.datasets import make_shapes_coco


def test_layout_boxes_and_polygons(tmp_path):
    root = make_shapes_coco(tmp_path, 6, 3, 96)
    for split, count in (('train2017', 6), ('val2017', 3)):
        coco = COCO(root / 'annotations' / f'instances_{split}.json')
        assert len(coco.imgs) == len(list((root / split).glob('*.png'))) == count
        assert coco.anns
        for annotation in coco.anns.values():
            x, y, w, h = annotation['bbox']
            assert min(x, y) >= 0
            assert max(x + w, y + h) <= 96
            mask = coco.annToMask(annotation)
            assert mask.sum() == pytest.approx(annotation['area'], rel=0.15)
            rows, columns = np.nonzero(mask)
            assert [columns.min(), rows.min(), columns.max(), rows.max()] == pytest.approx(
                [x, y, x + w, y + h], abs=2)  # a corner may miss its pixel


def test_a_shape_is_where_its_polygon_is(tmp_path):
    root = make_shapes_coco(tmp_path, 8, 1, 128)
    coco = COCO(root / 'annotations' / 'instances_train2017.json')
    for image in coco.imgs.values():
        picture = cv2.imread(str(root / 'train2017' / image['file_name']))
        for annotation in coco.imgToAnns[image['id']]:
            mask = cv2.erode(coco.annToMask(annotation), np.ones((3, 3)))
            assert picture[mask > 0].std(axis=0).max() < 2  # one colour inside


def test_the_seed_decides(tmp_path):
    texts = [(make_shapes_coco(tmp_path / str(i), 2, 1, 64, seed) / 'annotations'
              / 'instances_train2017.json').read_text() for i, seed in enumerate((1, 1, 2))]
    assert texts[0] == texts[1] != texts[2]


def test_bad_numbers(tmp_path):
    with pytest.raises(ValueError, match='64 pixels'):
        make_shapes_coco(tmp_path, 0)
