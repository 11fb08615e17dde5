"""Images and annotations that nobody wrote on purpose: named, or read as what they are."""

import copy
import json
import math
import random

import numpy as np
import pytest
from mmengine.hub import get_config
from mmengine.registry import DATASETS, DefaultScope
from PIL import Image

from orepa_mm.datasets import (
    apply_data_root,
    make_shapes_cityscapes,
    make_shapes_coco,
    require_usable_data,
)
from orepa_mm.datasets.check import check_data
from orepa_mm.engine import read_config
from orepa_mm.errors import DataRootError
from orepa_mm.workflow import load_model, predict

#: What may stand in place of any value of an annotation file.
VALUES = (None, True, -1, 0, 1.5, 10**12, 10**30, math.nan, math.inf, -math.inf, '', 'x',
          '../../x', [], [[]], [None], {}, {'x': 1})


def mode(name, **options):
    """An image of Pillow, saved as this."""
    def write(path):
        kind, suffix = name.split()
        image = Image.fromarray((np.indices((40, 50)).sum(0) % 256).astype('uint8'))
        image = image.convert('RGB').convert(kind) if kind != 'I;16' else Image.fromarray(
            np.indices((40, 50)).sum(0).astype('uint16') * 700)
        image.save(path.with_suffix(suffix), **options)
        return path.with_suffix(suffix)
    return write


def animated(path):
    frames = [Image.new('RGB', (50, 40), color) for color in ('red', 'green', 'blue')]
    frames[0].save(path.with_suffix('.gif'), save_all=True, append_images=frames[1:])
    return path.with_suffix('.gif')


def size(width, height):
    def write(path):
        Image.new('RGB', (width, height), 'red').save(path.with_suffix('.png'))
        return path.with_suffix('.png')
    return write


def content(*parts):
    def write(path):
        path.with_suffix('.png').write_bytes(b''.join(parts))
        return path.with_suffix('.png')
    return write


def cut(path):
    file = size(200, 200)(path)
    file.write_bytes(file.read_bytes()[:40])
    return file


IMAGES = {
    **{name: mode(name) for name in (
        'L .png', 'L .jpg', '1 .png', 'LA .png', 'P .png', 'P .gif', 'RGBA .png', 'CMYK .jpg',
        'I;16 .png', 'I;16 .tif', 'RGB .bmp', 'RGB .webp')},
    'animated': animated, 'one pixel': size(1, 1), 'a line': size(3000, 1),
}
NO_IMAGES = {
    'empty': content(), 'text': content(b'an image'), 'cut': cut,
    'a header alone': content(b'\x89PNG\r\n\x1a\n'),
    'a size of two thousand million': content(
        b'\x89PNG\r\n\x1a\n\0\0\0\rIHDR\x7f\xff\xff\xff\x7f\xff\xff\xff\x08\x02\0\0\0', bytes(50)),
}


@pytest.fixture(scope='module')
def model(room, tmp_path_factory):
    path = tmp_path_factory.mktemp('model') / 'model.pth'
    path.write_bytes(room.content)
    return load_model(read_config(room.config), path)


@pytest.mark.parametrize('kind', IMAGES)
def test_images_of_any_kind_are_read(kind, model, tmp_path):
    path = IMAGES[kind](tmp_path / 'ein Bild é')
    before = path.read_bytes()
    done = predict(model, [str(path)], tmp_path / 'out', draw=False)
    assert (done.count, list(done.skipped)) == (1, [])
    assert path.read_bytes() == before


@pytest.mark.parametrize('kind', NO_IMAGES)
def test_what_is_no_image_is_named_and_the_rest_is_done(kind, model, tmp_path):
    folder = tmp_path / 'images'
    folder.mkdir()
    size(30, 30)(folder / 'good')
    path = NO_IMAGES[kind](folder / 'kein Bild é')
    done = predict(model, [str(folder)], tmp_path / 'out', draw=False)
    assert done.count == 1
    (line,) = done.skipped
    assert path.name in line


UPERNET = 'mmseg::upernet/upernet_r18_4xb2-40k_cityscapes-512x1024.py'
ALL_VALUES = (np.arange(64 * 64) % 256).astype(np.uint8).reshape(64, 64)
IDS = np.eye(64, dtype=np.uint8)
#: Label maps of 64 x 64, as somebody may save them.
LABEL_MAPS = {
    'L': Image.fromarray(IDS),
    'L with 255': Image.fromarray(IDS * 255),
    'L with every value': Image.fromarray(ALL_VALUES),
    'one bit': Image.fromarray(IDS * 255).convert('1'),
    'palette': Image.fromarray(IDS).convert('P'),
    'palette of colours': Image.effect_noise((64, 64), 90).convert('RGB').quantize(7),
    '16 bit': Image.fromarray(np.eye(64, dtype=np.uint16)),
    '16 bit, large': Image.fromarray(np.eye(64, dtype=np.uint16) * 300),
    'LA': Image.fromarray(IDS).convert('LA'),
    'RGB': Image.fromarray(IDS).convert('RGB'),
    'RGBA': Image.fromarray(IDS).convert('RGBA'),
    'small': Image.new('L', (1, 1)),
    'wide': Image.new('L', (64, 65)),
}
SOUND = {'L', 'L with 255', 'one bit', 'palette', '16 bit'}


@pytest.mark.parametrize('kind', LABEL_MAPS)
def test_a_label_map_that_passes_is_read_within_its_range(kind, tmp_path):
    root = make_shapes_cityscapes(tmp_path / 'streets', 1, 1, 64)
    path, = root.glob('gtFine/val/*/*_labelTrainIds.png')
    LABEL_MAPS[kind].save(path)
    content = path.read_bytes()
    cfg = apply_data_root(get_config(UPERNET), root, ['test'], check=False)
    check = check_data(cfg, ['test'])
    assert check.passed == (kind in SOUND)
    assert path.read_bytes() == content
    if not check.passed:
        assert any(str(path) in name for finding in check.findings for name in finding.names)
        return
    dataset = cfg.test_dataloader.dataset
    dataset.pipeline = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations')]
    with DefaultScope.overwrite_default_scope('mmseg'):
        sample = DATASETS.build(dataset)[0]
    values = sample['gt_seg_map']
    assert values.shape == sample['img'].shape[:2]
    assert set(np.unique(values)) <= {*range(len(dataset.metainfo['classes'])), 255}


MASK_RCNN = 'mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py'


def changed(value, chance):
    """The same with one value of it, anywhere, exchanged, doubled or lost."""
    places = []

    def walk(node):
        for key, child in node.items() if isinstance(node, dict) else enumerate(node):
            places.append((node, key))
            if isinstance(child, (dict, list)):
                walk(child)

    walk(value)
    node, key = chance.choice(places)
    act = chance.choice(['exchange', 'exchange', 'lose', 'double'])
    if act == 'lose':
        del node[key]
    elif act == 'double' and isinstance(node, list):
        node.insert(key, node[key])
    else:
        node[key] = chance.choice(VALUES)
    return value


def try_annotations(folder, seed, rounds):
    """No other error than ours, whatever an annotation file says; it is named, and as it was."""
    chance, stock = random.Random(seed), get_config(MASK_RCNN)
    root = make_shapes_coco(folder / 'coco', 1, 2, 64)
    path = root / 'annotations' / 'instances_val2017.json'
    sound, refused, failed = path.read_text(), 0, []
    for _ in range(rounds):
        text = json.dumps(changed(json.loads(sound), chance))
        path.write_text(text)
        for call in (lambda: require_usable_data(
                         apply_data_root(copy.deepcopy(stock), root, ['test']), ['test']),
                     lambda: check_data(apply_data_root(copy.deepcopy(stock), root, ['test'],
                                                        check=False), ['test'], max_images=0)):
            try:
                call()
            except DataRootError as error:
                refused += path.name in str(error)
            except Exception as error:
                failed.append(f'{type(error).__name__}: {error}: {text}')
        assert path.read_text() == text
    assert not failed, '\n'.join(failed[:20])
    assert refused > rounds // 20


def test_annotations_with_any_value_anywhere(tmp_path):
    try_annotations(tmp_path, 0, 60)


@pytest.mark.long
@pytest.mark.parametrize('seed', range(1, 6))
def test_annotations_with_many_more(seed, tmp_path):
    try_annotations(tmp_path, seed, 1000)
