"""Each kind of fault, made by hand in a sound set, is found by its name; the sound set passes."""

import json
import shutil

import numpy as np
import pytest
from checking import (
    LIGHT,
    MASK_RCNN,
    RESNET,
    UPERNET,
    checked,
    cut,
    edit,
    first,
    found_in,
    names_of,
)
from helpers import SHARED, run_each
from mmengine.hub import get_config

from orepa_mm.datasets import (
    SPLITS,
    apply_data_root,
    make_shapes_cityscapes,
    make_shapes_coco,
    make_shapes_imagenet,
    require_usable_data,
)
from orepa_mm.datasets.check import check_data
from orepa_mm.datasets.check_findings import METRIC, NOTE, SPOILS, STOPS
from orepa_mm.errors import DataRootError


@pytest.mark.parametrize(('name', 'make', 'sizes'), [
    (MASK_RCNN, make_shapes_coco, (3, 2)), (UPERNET, make_shapes_cityscapes, (3, 2)),
    (RESNET, make_shapes_imagenet, (24, 12))])
def test_sound_sets_pass(tmp_path, name, make, sizes, all_files):
    root = make(tmp_path, *sizes, 64)
    before, calls = all_files(root), []
    check = checked(name, root, progress=lambda *call: calls.append(call))
    assert check.passed
    assert not check.findings
    assert [count[1:] for count in check.counts] == [(n, n) for n in sizes]  # val is test
    assert [call[1:] for call in calls] == [(i, n) for n in sizes for i in range(1, n + 1)]
    assert all_files(root) == before


@pytest.mark.parametrize(('name', 'folder', 'config'), [
    ('bccd_coco', 'bccd_coco', MASK_RCNN), ('camvid_cityscapes', 'camvid_cityscapes', UPERNET)])
def test_real_annotations(name, folder, config):
    """Those that people trained on with success are not refused."""
    root = SHARED / 'data' / folder
    if not root.is_dir():
        pytest.skip(f'the real images are not here ({root}): they come with a development checkout')
    assert checked(config, root, max_images=2).passed
    require_usable_data(apply_data_root(get_config(config), root))


NAN, INF = float('nan'), float('inf')
#: Change of the annotation file; the problem; its effect in training, and in testing.
ANNOTATIONS = {
    'nan': (first('bbox', [1, NAN, 9, 9]), 'box is NaN or infinite', SPOILS, METRIC),
    'null': (first('bbox', [1, None, 9, 9]), 'box is NaN or infinite', SPOILS, METRIC),
    'infinite': (first('bbox', [1, 1, INF, 9]), 'box is NaN or infinite', SPOILS, METRIC),
    'negative': (first('bbox', [30, 30, -9, 9]), 'box of negative size', SPOILS, METRIC),
    'flat': (first('bbox', [30, 30, 0, 9]), 'box of no area', NOTE, METRIC),
    'outside': (first('bbox', [64, 3, 9, 9]), 'box outside of the image', NOTE, METRIC),
    'left of it': (first('bbox', [-9, 3, 9, 9]), 'box outside of the image', NOTE, METRIC),
    'reaching': (first('bbox', [60, 3, 9, 9]), 'box reaches out of the image', NOTE, NOTE),
    'three numbers': (first('bbox', [1, 2, 3]), 'box is not four numbers', STOPS, STOPS),
    'no box': (lambda c: c['annotations'][0].pop('bbox'), 'box is not four numbers', STOPS, STOPS),
    'area': (first('area', 0), 'area is not positive', NOTE, METRIC),
    'no area': (lambda c: c['annotations'][0].pop('area'), 'area is missing', STOPS, STOPS),
    'no crowd': (lambda c: c['annotations'][0].pop('iscrowd'), 'iscrowd is missing', NOTE, STOPS),
    'category': (first('category_id', 99), 'category id is not in the file', SPOILS, METRIC),
    'image': (first('image_id', 99), 'annotation of an image that is not in the file', NOTE, NOTE),
    'annotation id': (lambda c: c['annotations'][1].update(id=1), 'annotation id used twice',
                      STOPS, STOPS),
    'image id': (lambda c: c['images'][1].update(id=1), 'image id used twice', SPOILS, METRIC),
    'category id': (lambda c: c['categories'][1].update(id=1), 'category id used twice',
                    SPOILS, METRIC),
    'no id': (lambda c: c['annotations'][0].pop('id'), 'entry without an id', STOPS, STOPS),
    'no size': (lambda c: c['images'][0].pop('width'), 'image without file name, width or height',
                STOPS, STOPS),
    'no mask': (lambda c: c['annotations'][0].pop('segmentation'), 'mask is missing',
                STOPS, STOPS),
    'line': (first('segmentation', [[1, 1, 9, 9]]), 'mask is broken', SPOILS, METRIC),
    'nan mask': (first('segmentation', [[1, 1, 9, NAN, 9, 9]]), 'mask is broken', SPOILS, METRIC),
    'run lengths': (first('segmentation', {'size': [9, 9], 'counts': [81]}), 'mask is broken',
                    SPOILS, METRIC),
    'unlabelled': (lambda c: [a.update(image_id=1) for a in c['annotations']],
                   'image without labels', NOTE, NOTE),
    'nothing': (lambda c: c['annotations'].clear(), 'no labels at all', STOPS, METRIC),
    'size': (lambda c: c['images'][0].update(width=640),
             'size differs from that in the annotation file', SPOILS, METRIC),
}
#: What the quick part refuses.
SILENT = {'nan', 'null', 'infinite', 'negative', 'three numbers', 'no box', 'category',
          'annotation id', 'image id', 'category id', 'no id'}


@pytest.mark.parametrize('fault', ANNOTATIONS)
def test_annotations(coco, fault):
    change, problem, in_training, in_testing = ANNOTATIONS[fault]
    for split in ('train', 'val'):
        edit(coco, split, change)
    found = found_in(checked(MASK_RCNN, coco))
    assert found[('train', problem)] == in_training
    assert found[('val', problem)] == in_testing
    others = {name for _, name in found} - {problem}
    # one fault may bring about another
    assert others <= {'image without labels', 'box reaches out of the image', 'mask is broken',
                      'annotation of an image that is not in the file',
                      'category id is not in the file'}


@pytest.mark.parametrize('fault', ANNOTATIONS)
def test_the_quick_part_refuses_what_would_pass_in_silence(coco, fault):
    change, problem, *_ = ANNOTATIONS[fault]
    cfg = apply_data_root(get_config(MASK_RCNN), coco)
    edit(coco, 'val', change)
    require_usable_data(cfg, ['train'])
    if fault not in SILENT:
        require_usable_data(cfg)
        return
    for splits in (SPLITS, ['test']):
        with pytest.raises(DataRootError, match=problem) as error:
            require_usable_data(cfg, splits)
        assert 'instances_val2017.json' in str(error.value)
        assert 'check_data CONFIG' in str(error.value)


def test_the_quick_part_reads_what_the_metric_reads(coco):
    """An evaluator may name another file than the data set."""
    cfg = apply_data_root(get_config(MASK_RCNN), coco)
    copy = shutil.copy(coco / 'annotations' / 'instances_val2017.json', coco / 'metric.json')
    cfg.test_evaluator.ann_file = str(copy)
    edit(coco, 'train', lambda c: None)
    content = json.loads((coco / 'metric.json').read_text())
    content['annotations'][0]['bbox'][0] = NAN
    (coco / 'metric.json').write_text(json.dumps(content))
    require_usable_data(cfg, ['train', 'val'])
    with pytest.raises(DataRootError, match=r'metric\.json: box is NaN or infinite, 1 in all: '
                       r'annotation 1 \(000001\.png\): \[nan'):
        require_usable_data(cfg, ['test'])


@pytest.mark.parametrize('text', ['{"images": [], "annotations": [{"caption": "a"}], '
                                  '"categories": []}', '[1, 2]', '{"images": 3}'])
def test_other_formats_are_left_alone(coco, text):
    cfg = apply_data_root(get_config(MASK_RCNN), coco)
    path = coco / 'annotations' / 'instances_val2017.json'
    path.write_text(text)
    require_usable_data(cfg)
    with pytest.raises(DataRootError, match='CocoDataset is not known here'):
        check_data(cfg)
    path.unlink()
    require_usable_data(cfg)
    assert found_in(check_data(cfg))[('val', 'data cannot be listed')] == STOPS
    path.write_text('{"images": ')
    with pytest.raises(DataRootError, match=r'instances_val2017\.json is no JSON file'):
        require_usable_data(cfg)


#: What is done to a file, and what is found of it.
FILES = {'missing': (lambda path: path.unlink(), 'image file is missing'),
         'empty': (lambda path: path.write_bytes(b''), 'image file is empty'),
         'cut': (cut, 'image cannot be read'),
         'text': (lambda path: path.write_text('no image'), 'image cannot be read')}


@pytest.mark.parametrize('fault', FILES)
def test_image_files(coco, streets, classes, fault):
    change, problem = FILES[fault]
    for name, root, file in (
            (MASK_RCNN, coco, 'val2017/000002.png'),
            (UPERNET, streets, 'leftImg8bit/val/shapes/shapes_000002_leftImg8bit.png'),
            (RESNET, classes, 'val/ring_plain/ring_plain_000001.png')):
        image = root / file
        if fault == 'missing' and name != MASK_RCNN:
            continue  # the others take what is there
        change(image)
        check = checked(name, root)
        assert found_in(check)[('val', problem)] == STOPS
        assert names_of(check, problem) == [str(image)]
        assert not check.passed


def test_an_image_that_ends_early_though_opencv_reads_it(coco, monkeypatch):
    """OpenCV fills up a JPEG file with grey, depending on its version."""
    import mmcv

    decode = mmcv.imfrombytes
    cut(coco / 'val2017' / '000001.png', 0.9)
    monkeypatch.setattr(mmcv, 'imfrombytes', lambda content, flag, backend='cv2': (
        decode(content, flag, backend=backend) if backend == 'pillow'
        else np.zeros((64, 64, 3), np.uint8)))
    check = checked(MASK_RCNN, coco)
    assert found_in(check) == {('val', 'image is cut off'): METRIC}
    assert names_of(check, 'image is cut off') == [str(coco / 'val2017' / '000001.png')]


def test_a_turned_photograph(coco):
    """The pipelines turn an image as its EXIF says: the annotations must be those of the turned."""
    from PIL import Image

    path = coco / 'val2017' / '000001.png'
    image = Image.open(path).resize((64, 32))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(path, exif=exif)
    edit(coco, 'val', lambda c: c['images'][0].update(width=64, height=32))
    names = names_of(checked(MASK_RCNN, coco), 'size differs from that in the annotation file')
    assert names == [f'{path}: 32 x 64, not 64 x 32']


def test_classes_of_another_data_set(coco):
    """A forgotten --data-root, or metainfo: COCO's eighty, none of which the file has."""
    cfg = get_config(MASK_RCNN)
    for name in SPLITS:
        cfg[f'{name}_dataloader'].dataset.data_root = str(coco)
    check = check_data(cfg)
    found = found_in(check)
    assert found[('val', 'class of the config that the file does not have')] == METRIC
    assert found[('val', 'category that the config does not use')] == NOTE
    assert len(names_of(check, 'class of the config that the file does not have')) == 160


@pytest.mark.parametrize('name', ['coco', 'streets', 'classes'])
def test_splits_that_share_images(request, name):
    root = request.getfixturevalue(name)
    config, train, val = {
        'coco': (MASK_RCNN, 'train2017/000003.png', 'val2017/000002.png'),
        'streets': (UPERNET, 'leftImg8bit/train/shapes/shapes_000003_leftImg8bit.png',
                    'leftImg8bit/val/shapes/shapes_000002_leftImg8bit.png'),
        'classes': (RESNET, 'train/ring_plain/ring_plain_000002.png',
                    'val/ring_plain/ring_plain_000001.png')}[name]
    shutil.copy(root / train, root / val)
    check = checked(config, root, max_images=0)
    assert found_in(check) == {('val', 'image in training and test data'): METRIC}
    assert names_of(check, 'image in training and test data') == [f'{root / val} is {root / train}']


def test_sets_that_are_joined(coco, tmp_path):
    """Each has a name of its own; images that are trained on twice are no leak."""
    other = shutil.copytree(coco, tmp_path / 'other')
    cfg = apply_data_root(get_config(MASK_RCNN), coco)
    inner = cfg.train_dataloader.dataset
    cfg.train_dataloader.dataset = dict(type='ConcatDataset', datasets=[
        inner, dict(inner, data_root=str(other)), inner])
    cfg.test_dataloader.dataset = dict(cfg.val_dataloader.dataset, data_root=str(other))
    check = check_data(cfg)
    assert [name for name, *_ in check.counts] == [
        'train (instances_train2017.json)',
        f'train ({other}/annotations/instances_train2017.json)',
        'val (instances_val2017.json)', 'test (instances_val2017.json)']
    assert found_in(check) == {('test', 'image in two sets of test data'): NOTE}
    assert check.passed


def test_one_set_to_train_and_test_on(coco):
    """It is one set, looked at once; what is worse of its two uses counts."""
    edit(coco, 'train', first('bbox', [30, 30, 0, 9]))
    cfg = apply_data_root(get_config(MASK_RCNN), coco)
    cfg.val_dataloader.dataset = dict(cfg.train_dataloader.dataset, test_mode=True)
    check = check_data(cfg, ['train', 'val'])
    assert check.counts == [('train, val (instances_train2017.json)', 3, 3)]
    assert found_in(check) == {('train', 'box of no area'): METRIC}


def test_a_sample_of_the_images(coco):
    (coco / 'train2017' / '000002.png').write_text('no image')
    check = checked(MASK_RCNN, coco, max_images=2)
    assert check.counts[0][1:] == (3, 2)
    assert check.passed
    assert not checked(MASK_RCNN, coco).passed


def test_data_of_another_kind(tmp_path):
    cfg = get_config('mmpretrain::resnet/resnet18_8xb16_cifar10.py')
    with pytest.raises(DataRootError, match='names no data for train'):
        check_data(type(cfg)(), ['train'])
    cfg = get_config('mmdet::pascal_voc/faster-rcnn_r50_fpn_1x_voc0712.py')
    with pytest.raises(DataRootError, match='VOCDataset is not known here'):
        check_data(cfg, ['test'])


def test_command_line(tmp_path):
    root = make_shapes_coco(tmp_path / 'good', 2, 2, 64)
    bad = shutil.copytree(root, tmp_path / 'bad [1]')
    (bad / 'val2017' / '000002.png').write_bytes(b'')
    shutil.copytree(bad, only := tmp_path / 'test only')
    (only / 'annotations' / 'instances_train2017.json').unlink()
    shutil.rmtree(only / 'train2017')
    edit(only, 'val', lambda c: c['annotations'][0].update(bbox=[1, 1, NAN, 1]))
    command = ['tools/check_data.py', LIGHT, '--data-root']
    good, wrong, tested, both, train = run_each(
        [*command, root], [*command, bad, '--json', tmp_path / 'found.json'],
        [*command, only, '--splits', 'test', '--max-images', 0], [*command, only],
        ['tools/train.py', LIGHT, '--work-dir', tmp_path / 'run', '--data-root', only])
    assert good[0] == 0
    assert 'nothing that stops a run' in good[1]
    assert wrong[0] == 1
    assert '1 of 2' in wrong[1]  # progress, where there is no terminal
    assert 'val2017/000002.png' in wrong[1]
    found = json.loads((tmp_path / 'found.json').read_text())
    assert found['passed'] is False
    assert [(f['problem'], f['count'], f['names']) for f in found['findings']] == [
        ('image file is empty', 1, [str(bad / 'val2017' / '000002.png')])]
    assert tested[0] == 1
    assert '2 images, 0 opened' in tested[1]
    assert '[1, 1, nan, 1]' in ' '.join(tested[1].split())
    for code, output in (both, train):
        assert code == 1
        assert 'instances_train2017.json is missing' in ' '.join(output.split())
