"""The generated data sets, read with their tools and looked at pixel by pixel."""

import runpy
import sys

import cv2
import numpy as np
import pytest
from helpers import ROOT
from pycocotools.coco import COCO

from orepa_mm.datasets import make_shapes_cityscapes, make_shapes_coco, make_shapes_imagenet
from orepa_mm.datasets.shapes import OBJECT_CLASSES, SCENE_CLASSES

MAKERS = (make_shapes_coco, make_shapes_cityscapes, make_shapes_imagenet)


def test_coco_layout_boxes_and_polygons(tmp_path):
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


def test_cityscapes_layout_is_that_of_coco_painted(tmp_path):
    """The same pictures; labels agree with the polygons that COCO has for them."""
    coco_root = make_shapes_coco(tmp_path / 'coco', 6, 2, 96, 5)
    root = make_shapes_cityscapes(tmp_path / 'cityscapes', 6, 2, 96, 5)
    assert (root / 'classes.txt').read_text().split() == ['ground', 'circle', 'square', 'triangle']
    for split, count in (('train', 6), ('val', 2)):
        coco = COCO(coco_root / 'annotations' / f'instances_{split}2017.json')
        assert len(list((root / 'leftImg8bit' / split / 'shapes').iterdir())) == count
        for number, image in coco.imgs.items():
            name = f'{split}/shapes/shapes_{number:06d}'
            picture = (root / 'leftImg8bit' / f'{name}_leftImg8bit.png').read_bytes()
            assert picture == (coco_root / f'{split}2017' / image['file_name']).read_bytes()
            labels = cv2.imread(str(root / 'gtFine' / f'{name}_gtFine_labelTrainIds.png'),
                                cv2.IMREAD_UNCHANGED)
            assert labels.shape == (96, 96)
            ground = np.ones((96, 96), np.uint8)
            for annotation in coco.imgToAnns[number]:
                mask = coco.annToMask(annotation)
                name = coco.cats[annotation['category_id']]['name']
                assert (labels[cv2.erode(mask, np.ones((3, 3))) > 0]
                        == SCENE_CLASSES.index(name)).all()
                # COCO counts pixels from their corners, which are rounded here
                ground &= 1 - cv2.dilate(mask, np.ones((5, 5)))
            assert not labels[ground > 0].any()


def test_imagenet_layout_is_balanced(tmp_path):
    root = make_shapes_imagenet(tmp_path, 30, 12, 32)
    assert (root / 'classes.txt').read_text().split() == list(OBJECT_CLASSES)
    assert len(OBJECT_CLASSES) == 12
    for split, counts in (('train', {2, 3}), ('val', {1})):
        assert tuple(sorted(path.name for path in (root / split).iterdir())) == OBJECT_CLASSES
        folders = [list(folder.iterdir()) for folder in (root / split).iterdir()]
        assert {len(files) for files in folders} == counts
        assert {cv2.imread(str(file)).shape for files in folders for file in files} == {
            (32, 32, 3)}


@pytest.mark.parametrize('make', MAKERS)
def test_the_seed_decides(tmp_path, make, all_files):
    contents = [all_files(make(tmp_path / str(i), 12, 12, 64, seed))
                for i, seed in enumerate((1, 1, 2))]
    assert contents[0] == contents[1]
    assert contents[0].keys() == contents[2].keys()
    assert len(set(contents[0].values())) >= 24  # no picture twice
    pictures = [path for path in contents[0]
                if path.suffix == '.png' and 'gtFine' not in path.parts]
    assert all(contents[0][path] != contents[2][path] for path in pictures)


@pytest.mark.parametrize(('make', 'numbers'), [
    (make_shapes_coco, (0, 1)), (make_shapes_coco, (1, 1, 63)),
    (make_shapes_cityscapes, (1, 0)), (make_shapes_cityscapes, (1, 1, 63)),
    (make_shapes_imagenet, (12, 11)), (make_shapes_imagenet, (12, 12, 31))])
def test_bad_numbers(tmp_path, make, numbers):
    with pytest.raises(ValueError, match=r'at least .* pixels are needed'):
        make(tmp_path, *numbers)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('make', MAKERS[1:])
def test_files_of_another_set_are_not_mixed_in(tmp_path, make, all_files):
    before = all_files(make(tmp_path, 13, 12, 64))
    assert all_files(make(tmp_path, 13, 12, 64)) == before  # again: the same files
    with pytest.raises(FileExistsError, match=r'000013|_plain_000002\.png would be read'):
        make(tmp_path, 12, 12, 64, 1)
    assert all_files(tmp_path) == before


@pytest.mark.parametrize('make', MAKERS)
def test_what_says_that_a_set_is_complete_comes_last(tmp_path, make, monkeypatch):
    written = []
    imwrite = cv2.imwrite

    def fail_at_the_last_image(path, image):
        written.append(path)
        return len(written) < last and imwrite(path, image)

    last = 48 if make is make_shapes_cityscapes else 24
    monkeypatch.setattr(cv2, 'imwrite', fail_at_the_last_image)
    with pytest.raises(OSError, match='could not write'):
        make(tmp_path, 12, 12, 64)
    files = [path for path in tmp_path.rglob('*') if path.is_file()]
    assert len(files) == last - 1
    assert {path.suffix for path in files} == {'.png'}


@pytest.mark.parametrize(('layout', 'file'), [
    ([], 'annotations/instances_val2017.json'),
    (['--layout', 'cityscapes'], 'gtFine/val/shapes/shapes_000012_gtFine_labelTrainIds.png'),
    (['--layout', 'imagenet'], 'val/star_striped/star_striped_000001.png')])
def test_tool(tmp_path, layout, file, monkeypatch, capsys):
    def run(train_images):
        monkeypatch.setattr(sys, 'argv', [
            'make_shapes.py', str(tmp_path / 'data'), *layout, '--val-images', '12',
            '--image-size', '64', '--train-images', train_images])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / 'tools' / 'make_shapes.py'), run_name='__main__')
        return end.value.code

    assert run('12') == 0
    assert (tmp_path / 'data' / file).is_file()
    assert run('0') == 1
    assert capsys.readouterr().err.startswith('error: at least')
