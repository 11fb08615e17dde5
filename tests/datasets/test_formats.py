"""YOLO and Pascal VOC format in their variants; each fault in them is named, none is guessed at."""

import copy
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from mmengine.hub import get_config

from orepa_mm.datasets import apply_data_root
from orepa_mm.datasets.conversion import conversion_of
from orepa_mm.errors import DataRootError

CONFIG = get_config('mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py')
#: Width and height of all images here.
SIZE = (50, 40)


def write(root, files):
    """Text files by their path; images where the text is None."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if text is None:
            assert cv2.imwrite(str(path), np.zeros((*SIZE[::-1], 3), np.uint8))
        else:
            path.write_text(text)
    return root


def convert(root, splits=('train', 'val', 'test'), ann_file=None):
    """{image: [(class, box)]} of the test set; its entries; the problems of the training set."""
    cfg = copy.deepcopy(CONFIG)
    if ann_file:
        cfg.test_dataloader.dataset.ann_file = cfg.test_evaluator.ann_file = ann_file
    apply_data_root(cfg, root, splits)
    test, train = (cfg[f'{split}_dataloader'].dataset for split in ('test', 'train'))
    content = json.loads(Path(test.data_root, test.ann_file).read_text())
    names = {category['id']: category['name'] for category in content['categories']}
    found = {image['id']: (image['file_name'], []) for image in content['images']}
    for entry in content['annotations']:
        found[entry['image_id']][1].append((names[entry['category_id']], entry['bbox']))
    problems = conversion_of(train.data_root, Path(train.data_root, train.ann_file)).get('problems')
    return dict(found.values()), content, problems


#: A sound set: one box in the middle of an image each.
YOLO = {'data.yaml': 'train: images/train\nval: images/val\nnames: [cat, no]\n',
        'images/train/a.png': None, 'labels/train/a.txt': '1 0.5 0.5 0.2 0.2\n',
        'images/val/b.png': None, 'labels/val/b.txt': '0 0.5 0.5 0.2 0.2\n'}
MIDDLE = pytest.approx([20, 16, 10, 8])


@pytest.mark.parametrize('text', [
    'train: images/train\nval: images/val\nnames:\n  0: cat\n  1: no\n',
    'path: /no/such/machine\ntrain: images/train\nval: images/val\nnc: 2\nnames: [cat, no]\n',
    'train: ../images/train\nval: ../images/val\nnames: {1: no, 0: cat}\n',
    'train: images/train\nval: [images/val]\nnames: [cat, no]\ntest:  # none\n',
    'train: train.txt\nval: lists/val.txt\nnames: [cat, no]\n',
    'path: images/..\ntrain: images/train\nval: ./images/val/\nnames: [cat, no]\n'])
def test_ways_to_say_where_images_are(tmp_path, text):
    root = write(tmp_path, {**YOLO, 'data.yaml': text, 'train.txt': './images/train/a.png\n',
                            'lists/val.txt': '\nimages/val/b.png\r\n'})
    found, content, problems = convert(root)
    assert found == {str(root / 'images' / 'val' / 'b.png'): [('cat', MIDDLE)]}
    assert [category['name'] for category in content['categories']] == ['cat', 'no']
    assert (content['images'][0]['width'], content['images'][0]['height']) == SIZE
    assert not problems


def test_other_places_and_names(tmp_path):
    """Another name of the file, a list of folders, labels beside images, images elsewhere."""
    root = write(tmp_path / 'set', {
        'mine.yml': f'path: {tmp_path / "else"}\ntrain: [one, two]\nval: three\nnc: 2\n'})
    write(tmp_path / 'else', {
        'one/a.png': None, 'one/a.txt': '0 0.5 0.5 0.2 0.2', 'two/images/b.PNG': None,
        'two/labels/b.txt': '', 'three/deep/images/c.png': None, 'three/.hidden.png': None,
        'three/deep/labels/c.txt': '1 0.5 0.5 0.2 0.2\n'})
    found, _, problems = convert(root)
    assert found == {str(tmp_path / 'else/three/deep/images/c.png'): [('class_1', MIDDLE)]}
    assert problems == {'image without labels': [str(tmp_path / 'else/two/images/b.PNG')]}


def test_a_test_set_of_its_own(tmp_path):
    """Read where the config's test set is another than the one to validate on."""
    text = YOLO['data.yaml'] + 'test: images/test\n'
    root = write(tmp_path, {**YOLO, 'data.yaml': text, 'images/test/c.png': None,
                            'labels/test/c.txt': '0 0.5 0.5 0.2 0.2\n'})
    assert [Path(name).name for name in convert(root)[0]] == ['b.png']
    found, *_ = convert(root, ann_file='annotations/instances_test2017.json')
    assert [Path(name).name for name in found] == ['c.png']


#: Rows of a label file beside a sound one; the problem.
ROWS = {
    '': None, '1 0.5 0.5 0.2 0.2': 'label given twice, left out once',
    '2 0.5 0.5 0.2 0.2': 'label of an unknown class, left out',
    '-1 0.5 0.5 0.2 0.2': 'label of an unknown class, left out',
    '0.5 0.5 0.5 0.2 0.2': 'label cannot be read, left out',
    '0 0.5 0.5 0.2': 'label cannot be read, left out',
    '0 0.5 0.5 0.2 0.2 0.9': 'label cannot be read, left out',
    '0 0.1 0.1 0.2 0.2 0.3 0.3 0.4': 'label cannot be read, left out',
    '0 0.5 0.5 nan 0.2': 'label cannot be read, left out',
    'inf 0.5 0.5 0.2 0.2': 'label cannot be read, left out',
    'cat 0.5 0.5 0.2 0.2': 'label cannot be read, left out',
    '0 0.5 0.5 0 0.2': 'box of no area, left out',
    '0 0.5 0.5 -0.2 0.2': 'box of no area, left out',
    '0 0.1 0.1 0.2 0.2 0.3 0.3': 'box of no area, left out',
    '0 25 20 10 8': 'box outside of the image, left out',
    '0 -0.2 0.5 0.2 0.2': 'box outside of the image, left out'}


@pytest.mark.parametrize('row', ROWS)
def test_rows(tmp_path, row):
    root = write(tmp_path, {**YOLO, 'labels/train/a.txt': f'{YOLO["labels/train/a.txt"]}{row}\n'})
    *_, problems = convert(root)
    expected = {ROWS[row]: [f'{root}/labels/train/a.txt: {row}']} if row else {}
    assert problems == expected


def test_what_reaches_out_is_kept(tmp_path):
    """A hundredth of a pixel is rounding, and no problem."""
    rows = '0 0.1 0.5 0.4 0.2\n0 0.1 0.5 0.2004 0.2\n'
    found, _, problems = convert(write(tmp_path, {
        **YOLO, 'labels/val/b.txt': rows, 'labels/train/a.txt': rows}))
    boxes, = found.values()
    assert [box for _, box in boxes] == [pytest.approx([-5, 16, 20, 8]),
                                         pytest.approx([-0.01, 16, 10.02, 8])]
    assert {name: len(names) for name, names in problems.items()} == {
        'box reaches out of the image': 1}


def test_keypoints(tmp_path):
    root = write(tmp_path, {**YOLO, 'data.yaml': YOLO['data.yaml'] + 'kpt_shape: [2, 3]\n',
                            'labels/train/a.txt': '1 0.5 0.5 0.2 0.2 0.5 0.5 2 0.6 0.6 1\n'})
    assert list(convert(root)[2]) == ['keypoints are not used']


def test_outlines(tmp_path):
    """An L: its area is less than that of its box; it is not the box's corners."""
    row = '0 0.2 0.25 0.6 0.25 0.6 0.5 0.4 0.5 0.4 0.75 0.2 0.75\n'
    _, content, _ = convert(write(tmp_path, {**YOLO, 'labels/val/b.txt': row}))
    entry, = content['annotations']
    assert entry['bbox'] == pytest.approx([10, 10, 20, 20])
    assert entry['area'] == pytest.approx(300)
    assert entry['segmentation'] == [pytest.approx(
        [10, 10, 30, 10, 30, 20, 20, 20, 20, 30, 10, 30])]


#: Files that are other ones than in the sound set, or missing (False); what is said.
INCOMPLETE = {
    'data.yaml is missing': ({'data.yaml': False}, r'needs one file data\.yaml .*: none$'),
    'another one': ({'b.yaml': YOLO['data.yaml']}, r'such files there: b\.yaml, data\.yaml'),
    'no YAML': ({'data.yaml': 'train: ['}, 'is no YAML file'),
    'empty': ({'data.yaml': ''}, 'holds no settings'),
    'no names': ({'data.yaml': 'train: images/train\nval: images/val\n'}, 'names must list'),
    'gap': ({'data.yaml': 'train: x\nval: x\nnames: {0: a, 2: b}'}, 'numbered from 0 to 1'),
    'twice': ({'data.yaml': 'train: x\nval: x\nnames: [a, a]'}, 'a name of its own'),
    'number': ({'data.yaml': 'train: x\nval: x\nnc: 3\nnames: [a, b]'}, 'nc is 3, but names has 2'),
    'no val': ({'data.yaml': 'train: images/train\nnames: [a, b]'}, 'names no images for val'),
    'no folder': ({'data.yaml': 'train: images/no\nval: images/val\nnames: [a, b]'},
                  'names images/no for train, which is missing; looked for .*/images/no$'),
    'no image': ({'images/val/b.png': False}, 'images/val, which .* holds no images'),
    'no label': ({'labels/val/b.txt': False}, r'none of the 1 images for val has a label file: .* '
                 r'looked for in .*/labels/val/b\.txt'),
    'pixels': ({'labels/train/a.txt': '0 25 20 10 8\n'}, 'not one label for train can be used: box '
               'outside of the image'),
}


@pytest.mark.parametrize('case', INCOMPLETE)
def test_incomplete_yolo(tmp_path, case):
    changes, message = INCOMPLETE[case]
    write(tmp_path, {name: text for name, text in {**YOLO, **changes}.items() if text is not False})
    for name in ('images/val', 'labels/val'):
        (tmp_path / name).mkdir(exist_ok=True)
    with pytest.raises(DataRootError, match=message):
        convert(tmp_path)


def xml(*objects, size=SIZE):
    return (f'<annotation><size><width>{size[0]}</width><height>{size[1]}</height></size>'
            f'{"".join(objects)}</annotation>')


def thing(name='cat', box=(21, 17, 30, 24), **flags):
    corners = zip(('xmin', 'ymin', 'xmax', 'ymax'), box, strict=True)
    return (f'<object><name>{name}</name>{"".join(f"<{k}>{v}</{k}>" for k, v in flags.items())}'
            f'<bndbox>{"".join(f"<{k}>{v}</{k}>" for k, v in corners)}</bndbox></object>')


VOC = {'JPEGImages/a.png': None, 'Annotations/a.xml': xml(thing(), thing('no', (1, 1, 50, 40))),
       'JPEGImages/b.jpg': None, 'Annotations/b.xml': xml(thing()),
       'ImageSets/Main/train.txt': 'a\n', 'ImageSets/Main/val.txt': 'b\n'}


def test_corners_count_from_one_and_belong_to_the_box(tmp_path):
    root = write(tmp_path, {**VOC, 'ImageSets/Main/val.txt': 'a\nb\n'})
    found, content, problems = convert(root)
    assert found == {str(root / 'JPEGImages/a.png'): [('cat', [20, 16, 10, 8]),
                                                      ('no', [0, 0, *SIZE])],
                     str(root / 'JPEGImages/b.jpg'): [('cat', [20, 16, 10, 8])]}
    assert [entry['area'] for entry in content['annotations']] == [80, 2000, 80]
    assert not problems


def test_flags(tmp_path):
    text = xml(thing(difficult=1, truncated=1), thing(box=(1, 1, 5, 5), difficult=0, occluded=1))
    _, content, _ = convert(write(tmp_path, {**VOC, 'Annotations/b.xml': text}))
    assert [{key: entry.get(key) for key in ('iscrowd', 'difficult', 'truncated', 'occluded')}
            for entry in content['annotations']] == [
        {'iscrowd': 1, 'difficult': 1, 'truncated': 1, 'occluded': None},
        {'iscrowd': 0, 'difficult': None, 'truncated': None, 'occluded': 1}]


@pytest.mark.parametrize(('lists', 'images'), [
    ({'train': 'a', 'val': 'b', 'trainval': 'a\nb', 'test': 'c'}, ['b']),
    ({'trainval': 'a', 'test': 'b'}, ['b']), ({'train': 'a  1\n', 'val': 'b -1\n'}, ['b'])])
def test_lists(tmp_path, lists, images):
    files = {name: text for name, text in VOC.items() if 'Main' not in name}
    root = write(tmp_path, {**files, **{f'ImageSets/Main/{name}.txt': text
                                        for name, text in lists.items()}})
    assert [Path(name).stem for name in convert(root)[0]] == images


#: Files that are other ones, and the problem of the training set.
FAULTS = {
    'difficult': ({'Annotations/a.xml': xml(thing(difficult=1), thing('no'))},
                  'difficult object, counted neither in training nor in the metric'),
    'no name': ({'Annotations/a.xml': xml(thing(), thing(''))}, 'label cannot be read, left out'),
    'no box': ({'Annotations/a.xml': xml(thing(), '<object><name>cat</name></object>')},
               'label cannot be read, left out'),
    'words': ({'Annotations/a.xml': xml(thing(), thing(box=(1, 2, 'x', 4)))},
              'label cannot be read, left out'),
    'swapped': ({'Annotations/a.xml': xml(thing(), thing(box=(9, 9, 3, 3)))},
                'box of no area, left out'),
    'outside': ({'Annotations/a.xml': xml(thing(), thing(box=(51, 9, 60, 30)))},
                'box outside of the image, left out'),
    'reaching': ({'Annotations/a.xml': xml(thing(), thing(box=(21, 9, 60, 30)))},
                 'box reaches out of the image'),
    'from zero': ({'Annotations/a.xml': xml(thing(), thing(box=(0, 9, 30, 30)))},
                  'box begins before the first pixel, which is 1'),
    'size': ({'Annotations/a.xml': xml(thing(), size=(40, 50))},
             'size in the label file differs from that of the image'),
    'classes': ({'classes.txt': 'cat\n'}, 'label of an unknown class, left out'),
    'empty': ({'Annotations/a.xml': xml()}, 'image without labels'),
    'no file': ({'ImageSets/Main/train.txt': 'a\nc\n', 'JPEGImages/c.png': None},
                'label file is missing, image left out'),
    'no XML': ({'ImageSets/Main/train.txt': 'a\nc\n', 'JPEGImages/c.png': None,
                'Annotations/c.xml': '<annotation>'}, 'label file cannot be read, image left out'),
    'no image': ({'ImageSets/Main/train.txt': 'a\nc\n', 'Annotations/c.xml': xml(thing())},
                 'image file is missing, left out'),
    'twice': ({'ImageSets/Main/train.txt': 'a\na\n'}, 'image listed twice, left out once'),
}


@pytest.mark.parametrize('case', FAULTS)
def test_faults_of_voc(tmp_path, case):
    changes, problem = FAULTS[case]
    *_, problems = convert(write(tmp_path, {**VOC, **changes}))
    assert {name: len(names) for name, names in problems.items()} == {problem: 1}


@pytest.mark.parametrize(('missing', 'message'), [
    ('JPEGImages', 'lacks JPEGImages:'), ('Annotations', 'lacks Annotations:'),
    ('ImageSets', 'lacks ImageSets/Main:'), ('val.txt', r'val\.txt is missing; .* train\.txt$'),
    ('b.xml', r'none of the 1 images of .*val\.txt has a label file')])
def test_incomplete_voc(tmp_path, missing, message):
    write(tmp_path, {name: text for name, text in VOC.items() if missing not in name})
    (tmp_path / 'Annotations').mkdir(exist_ok=missing != 'Annotations') if missing == 'b.xml' else 0
    with pytest.raises(DataRootError, match=message):
        convert(tmp_path)


def test_an_image_that_is_turned(tmp_path):
    """Its size is that of the image as pipelines load it."""
    from PIL import Image

    image = Image.new('RGB', SIZE)
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(write(tmp_path, YOLO) / 'images' / 'val' / 'b.png', exif=exif)
    _, content, _ = convert(tmp_path)
    assert (content['images'][0]['width'], content['images'][0]['height']) == SIZE[::-1]
    assert content['annotations'][0]['bbox'] == pytest.approx([16, 20, 8, 10])
