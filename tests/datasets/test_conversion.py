"""Folders in YOLO and Pascal VOC format give what the same set in COCO layout gives."""

import copy
import json
import multiprocessing
import os
import re
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
from checking import LIGHT, MASK_RCNN, checked, found_in, names_of
from format_writers import read_split, write_voc, write_yolo
from helpers import SHARED, run_each
from mmdet.registry import METRICS
from mmengine.config import Config
from mmengine.hub import get_config
from pycocotools.coco import COCO

from orepa_mm.datasets import apply_data_root, conversion, make_shapes_coco
from orepa_mm.datasets.check_findings import METRIC, NOTE, SPOILS
from orepa_mm.errors import DataRootError

FASTER_RCNN = 'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py'
CONFIGS = {name: get_config(name) for name in (FASTER_RCNN, MASK_RCNN)}
BCCD = SHARED / 'data' / 'bccd_coco'
WRITERS = {'yolo': write_yolo, 'voc': write_voc}


def applied(root, name=FASTER_RCNN, **options):
    return apply_data_root(copy.deepcopy(CONFIGS[name]), root, **options)


def annotation_file(cfg, split):
    dataset = cfg[f'{split}_dataloader'].dataset
    return Path(dataset.data_root, dataset.ann_file)


def annotations(cfg, split='train'):
    return json.loads(annotation_file(cfg, split).read_text())['annotations']


def described(images, categories, name_of):
    """{image: its size and sorted objects, as class, box, outline and area}"""
    names = {category['id']: category['name'] for category in categories}
    return {name_of(file): ((image['width'], image['height']), sorted(
        (names[entry['category_id']], [*entry['bbox']], *entry.get('segmentation', [[]]),
         entry['area']) for entry in entries)) for file, image, entries in images}


def nearest(objects, box):
    return min(objects, key=lambda entry: sum(
        abs(a - b) for a, b in zip(entry[1], box, strict=True)))


@pytest.fixture(params=['bccd', 'shapes'])
def original(request, coco):
    if request.param == 'bccd' and not BCCD.is_dir():
        pytest.skip(f'the real images are not here ({BCCD}): they come with a development checkout')
    return BCCD if request.param == 'bccd' else coco


@pytest.mark.parametrize('kind', ['yolo', 'yolo outlines', 'voc'])
def test_round_trip(original, tmp_path, kind):
    """Decimals of YOLO: six, of 640 pixels at most."""
    root = (write_voc(original, tmp_path / 'voc') if kind == 'voc'
            else write_yolo(original, tmp_path / 'yolo', 'outlines' in kind))
    cfg = applied(root, MASK_RCNN if 'outlines' in kind else FASTER_RCNN)
    assert cfg.data_root == str(root)
    for split in ('train', 'val'):
        read = COCO(annotation_file(cfg, split))
        images = [(Path(image['file_name']), image, read.imgToAnns[image['id']])
                  for image in read.dataset['images']]
        assert all(file.is_file() and file.is_relative_to(root) for file, *_ in images)
        found = described(images, read.dataset['categories'],
                          lambda file: re.sub('^(train|val)_', '', file.name))
        categories, images = read_split(original, split)
        expected = described(images, categories, lambda file: file.name)
        assert found.keys() == expected.keys()
        tolerance = 1e-9 if kind == 'voc' else 1e-3
        for name, (size, objects) in expected.items():
            assert found[name][0] == size
            assert len(found[name][1]) == len(objects)
            for category, box, outline, _ in objects:
                if 'outlines' in kind:
                    x, y = outline[::2], outline[1::2]
                    box = [min(x), min(y), max(x) - min(x), max(y) - min(y)]
                entry = nearest(found[name][1], box)
                found[name][1].remove(entry)  # each stands for one
                if 'outlines' in kind:
                    assert np.allclose(entry[2], outline, rtol=0, atol=tolerance)
                    corners = np.float32(outline).reshape(-1, 2)
                    assert np.isclose(entry[3], cv2.contourArea(corners), rtol=1e-4)
                assert entry[0] == category
                assert np.allclose(entry[1], box, rtol=0, atol=tolerance)
        names = tuple(category['name'] for category in categories)
        assert cfg.train_dataloader.dataset.metainfo.classes == (
            tuple(sorted(names)) if kind == 'voc' else names)


@pytest.mark.parametrize('kind', WRITERS)
def test_what_reads_it(coco, tmp_path, kind, build_datasets):
    cfg = applied(WRITERS[kind](coco, tmp_path / 'my set'))
    for dataset, count in zip(build_datasets(cfg), (3, 2, 2), strict=True):
        assert len(dataset) == count
        assert dataset[0]['inputs'].shape[0] == 3
        assert len(dataset[0]['data_samples'].gt_instances)
    assert len(METRICS.build({**cfg.test_evaluator, '_scope_': 'mmdet'})._coco_api.imgs) == 2
    assert cfg.model.roi_head.bbox_head.num_classes == 3
    # a run's own dump of the config goes to a folder in COCO layout
    again = apply_data_root(Config.fromstring(cfg.pretty_text, '.py'), coco)
    assert 'my set' not in again.pretty_text
    assert again.val_evaluator.ann_file == str(coco / 'annotations' / 'instances_val2017.json')


@pytest.mark.parametrize('kind', WRITERS)
def test_the_cache(coco, tmp_path, kind, all_files, cache, monkeypatch):
    root = WRITERS[kind](coco, tmp_path / 'set')
    before = all_files(root)
    first = annotation_file(applied(root), 'train')
    assert first.is_relative_to(cache)
    assert all_files(root) == before
    with monkeypatch.context() as patch:
        patch.setattr(conversion, '_write', None)  # would fail
        assert annotation_file(applied(root), 'train') == first
    labels = next(path for path in sorted(before) if path.name.endswith('000001.txt')
                  or path.name.endswith('000001.xml'))
    one = rb'<object>.*?</object>' if kind == 'voc' else rb'^.*\n'
    (root / labels).write_bytes(re.sub(one, b'', before[labels], count=1))
    count = len(json.loads(first.read_text())['annotations'])
    second = applied(root)
    assert annotation_file(second, 'train') != first
    assert len(annotations(second)) == count - 1
    assert len(json.loads(first.read_text())['annotations']) == count  # for a run that uses it


def test_an_interrupted_conversion_leaves_nothing(coco, tmp_path, cache, monkeypatch):
    root = write_yolo(coco, tmp_path / 'set')

    def interrupt(*args):
        raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(conversion, '_coco', interrupt)
        with pytest.raises(KeyboardInterrupt):
            applied(root)
    assert [path.name for path in conversion.cache_folder().iterdir()] == ['.lock']
    assert len(annotations(applied(root)))


def test_a_cache_that_cannot_be_written(coco, tmp_path, monkeypatch):
    (tmp_path / 'file').touch()
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'file'))
    with pytest.raises(DataRootError, match=r'must be converted once.*set XDG_CACHE_HOME'):
        applied(write_yolo(coco, tmp_path / 'set'))


def _convert(root, barrier, results):
    barrier.wait()
    path = annotation_file(applied(root), 'train')
    results.put((str(path), os.stat(path).st_ino))


def test_processes_that_start_together(coco, tmp_path):
    """One writes, the others wait: all read the same file."""
    root, context = write_yolo(coco, tmp_path / 'set'), multiprocessing.get_context('fork')
    barrier, results = context.Barrier(4), context.SimpleQueue()
    processes = [context.Process(target=_convert, args=(root, barrier, results)) for _ in range(4)]
    for process in processes:
        process.start()
    found = {results.get() for _ in processes}
    for process in processes:
        process.join()
    assert len(found) == 1


@pytest.mark.parametrize('kind', WRITERS)
def test_a_folder_to_test_on_only(coco, tmp_path, kind):
    root = WRITERS[kind](coco, tmp_path / 'set')
    if kind == 'yolo':
        shutil.rmtree(root / 'images' / 'train')
    else:
        (root / 'ImageSets' / 'Main' / 'train.txt').unlink()
    cfg = applied(root, splits=['test'])
    assert len(annotations(cfg, 'test'))
    for _ in range(2):  # converted now, and before
        with pytest.raises(DataRootError, match=r'images/train.*is missing|train\.txt is missing'):
            applied(root)


def test_masks_need_outlines(coco, tmp_path):
    root = write_yolo(coco, tmp_path / 'set')
    with pytest.raises(DataRootError, match=r'reads masks, but \d+ of \d+ labels for train in '):
        applied(root, MASK_RCNN)
    assert ('train', 'mask is missing') in found_in(checked(MASK_RCNN, root))


@pytest.mark.parametrize('kind', WRITERS)
def test_coco_layout_comes_first(coco, tmp_path, kind, cache):
    WRITERS[kind](coco, tmp_path / 'set')
    shutil.copytree(tmp_path / 'set', coco, dirs_exist_ok=True)
    cfg = applied(coco)
    assert annotation_file(cfg, 'train') == coco / 'annotations' / 'instances_train2017.json'
    assert not any(cache.iterdir())


def test_two_formats_at_once(coco, tmp_path):
    write_voc(coco, tmp_path / 'set')
    write_yolo(coco, tmp_path / 'set')
    with pytest.raises(DataRootError, match=r'two formats, YOLO \(data.yaml\) and Pascal VOC'):
        applied(tmp_path / 'set')


def test_no_format(coco, tmp_path):
    write_voc(coco, tmp_path / 'kit' / 'VOC2007')
    with pytest.raises(DataRootError, match=r'instances_train2017.json is missing.*YOLO format.*'
                       'Pascal VOC format.*: VOC2007$'):
        applied(tmp_path / 'kit')


@pytest.mark.parametrize('kind', WRITERS)
def test_the_check(coco, tmp_path, kind):
    root = WRITERS[kind](coco, tmp_path / 'set')
    assert not checked(FASTER_RCNN, root).findings
    pictures = root / ('images/val' if kind == 'yolo' else 'JPEGImages')
    image = next(path for path in sorted(pictures.iterdir()) if path.name[:3] in ('000', 'val'))
    image.write_text('no image')
    check = checked(FASTER_RCNN, root)
    assert found_in(check) == {('val', 'image cannot be read, left out'): METRIC}
    assert names_of(check, 'image cannot be read, left out') == [str(image)]


def test_effects_of_what_is_left_out(coco, tmp_path):
    root = write_yolo(coco, tmp_path / 'set')
    for split in ('train', 'val'):
        with (root / 'labels' / split / '000001.txt').open('a') as file:
            file.write('9 0.5 0.5 0.1 0.1\n0 0.5 0.5 0.1 0\n')
    assert found_in(checked(FASTER_RCNN, root)) == {
        ('train', 'label of an unknown class, left out'): SPOILS,
        ('val', 'label of an unknown class, left out'): METRIC,
        ('train', 'box of no area, left out'): NOTE, ('val', 'box of no area, left out'): NOTE}


def test_command_line(tmp_path, coco):
    root = write_voc(coco, tmp_path / 'a set [1]')
    broken = shutil.copytree(root, tmp_path / 'broken')
    shutil.rmtree(broken / 'ImageSets')
    command = ['tools/check_data.py', LIGHT, '--data-root']
    (root / 'JPEGImages' / 'val_000001.png').write_text('no image')
    good, bad = run_each([*command, root, '--splits', 'train'], [*command, broken])
    assert good[0] == 0, good[1]
    assert 'is in Pascal VOC format' in good[1]
    assert 'val: 1 images, ' in good[1]
    assert 'image cannot be read, left out   1          JPEGImages/val_000001.png' in good[1]
    assert bad[0] == 1
    assert 'lacks ImageSets/Main' in ' '.join(bad[1].split())


def test_a_set_of_the_toy_data_is_not_converted(tmp_path, cache):
    applied(make_shapes_coco(tmp_path, 1, 1, 64))
    assert not any(cache.iterdir())
