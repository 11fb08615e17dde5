"""Predictions on images of one's own: the files are compared with the model's own test step."""

import json
import os

import cv2
import numpy as np
import pytest
import torch
from helpers import ROOT, exit_code, vary_scales
from mmengine.runner import Runner
from pycocotools.coco import COCO
from pycocotools.mask import decode
from tiny_runs import config, let_outputs_be_moderate

from orepa_mm import load
from orepa_mm.datasets import make_shapes_cityscapes, make_shapes_coco, make_shapes_imagenet
from orepa_mm.export import deploy_config, save_deployed
from orepa_mm.files import sha256
from orepa_mm.reparam import reparameterize
from orepa_mm.workflow import predict, predictors
from orepa_mm.workflow.evidence import built_model
from orepa_mm.workflow.pictures import find_sources

#: What makes a config tiny, and its data set.
TASKS = {
    'detector': ('mask_rcnn/mask-rcnn_orepa-r18-light_fpn_400i_coco.py', '''
model = dict(
    backbone=dict(base_channels=8), neck=dict(in_channels=[8, 16, 32, 64]),
    test_cfg=dict(rcnn=dict(max_per_img=5)))
''', make_shapes_coco),
    'segmentor': ('upernet/upernet_orepa-r18-light_400i_cityscapes-192x192.py', '''
model = dict(
    backbone=dict(base_channels=8, stem_channels=8),
    decode_head=dict(in_channels=[8, 16, 32, 64], channels=8),
    auxiliary_head=dict(in_channels=32, channels=8))
''', make_shapes_cityscapes),
    'classifier': ('imagenet/orepa-resnet18-light_300i_in1k.py', '''
model = dict(backbone=dict(base_channels=8, stem_channels=8), head=dict(in_channels=64))
''', make_shapes_imagenet),
}
IMAGES = {'detector': 'data/val2017', 'segmentor': 'data/leftImg8bit/val',
          'classifier': 'data/val'}
CLASSES = ('circle', 'square', 'triangle')


@pytest.fixture(scope='module')
def folder_of(tmp_path_factory):
    """For each task: config, data, a checkpoint in training form, and what `reparam` writes."""
    folders = {}

    def prepare(task):
        if task not in folders:
            folder = folders[task] = tmp_path_factory.mktemp(task)
            base, changes, make = TASKS[task]
            make(folder / 'data', 12, 12, 64)
            (folder / 'config.py').write_text(f"_base_ = '{ROOT}/configs/{base}'\n{changes}")
            cfg = config(folder)
            torch.manual_seed(0)
            model = built_model(cfg)
            vary_scales(model)
            let_outputs_be_moderate(model)
            torch.save({'state_dict': model.state_dict()}, folder / 'iter_2.pth')
            meta = {'dataset_meta': {'classes': CLASSES}} if task == 'detector' else {}
            save_deployed(reparameterize(model.eval()), deploy_config(cfg), folder / 'deployed',
                          {'form': 'plain', **meta})
        return folders[task]
    return prepare


def own_predictions(model):
    """{file name: data sample}, by the test set's loader and the model alone."""
    loader = {**model.cfg.test_dataloader, 'num_workers': 0, 'persistent_workers': False,
              'batch_size': 1}
    samples = [sample for batch in Runner.build_dataloader(loader)
               for sample in model.test_step(batch)]
    return {sample.img_path: sample for sample in samples}


def tool(*words):
    """Exit code of the tool."""
    return exit_code('tools/predict.py', *words)


def test_detector(folder_of, tmp_path):
    folder = folder_of('detector')
    model = load(folder / 'deployed')
    done = predict(model, [folder / IMAGES['detector']], tmp_path / 'out', batch_size=5,
                   score_thr=0.37)
    assert (done.count, done.skipped) == (12, ())
    truth = COCO(str(tmp_path / 'out' / 'images.json'))
    assert [c['name'] for c in truth.loadCats(truth.getCatIds())] == [*CLASSES]
    results = truth.loadRes(str(tmp_path / 'out' / 'predictions.json'))
    image_ids = {image['file_name']: image['id'] for image in truth.dataset['images']}
    expected = own_predictions(model)
    assert image_ids.keys() == expected.keys()
    compared = 0
    for name, sample in expected.items():
        found = results.loadAnns(results.getAnnIds(image_ids[name]))
        kept = sample.pred_instances[sample.pred_instances.scores > 0.37]
        assert len(found) == len(kept)
        for item, box, score, label, mask in zip(found, kept.bboxes, kept.scores, kept.labels,
                                                 kept.masks):
            left, top, width, height = item['bbox']
            # a batch of another size is added up in another order
            assert [left, top, left + width, top + height] == pytest.approx(box.tolist(), abs=1e-2)
            assert item['score'] == pytest.approx(score.item(), abs=1e-5)
            assert item['category_id'] == label + 1
            assert item['category_name'] == CLASSES[label]
            assert item['file_name'] == name
            assert (decode(item['segmentation']) != mask.numpy()).mean() < 1e-2
            compared += 1
    assert 12 < compared < 60  # the threshold leaves some out
    assert {path.stem for path in (tmp_path / 'out' / 'vis').iterdir()} == {
        f'{i:06d}' for i in range(1, 13)}


def test_what_comes_meanwhile_is_not_overwritten(folder_of, tmp_path, monkeypatch):
    folder = folder_of('detector')
    model, out = load(folder / 'deployed'), tmp_path / 'out'
    add = predictors.DetectionPredictor.add

    def add_later(self, picture, sample):
        out.mkdir(exist_ok=True)
        (out / 'predictions.json').write_text('mine')
        add(self, picture, sample)

    monkeypatch.setattr(predictors.DetectionPredictor, 'add', add_later)
    with pytest.raises(FileExistsError, match='nothing is overwritten'):
        predict(model, [folder / IMAGES['detector']], out, draw=False)
    assert [path.name for path in out.iterdir()] == ['predictions.json']
    assert (out / 'predictions.json').read_text() == 'mine'
    assert os.listdir(tmp_path) == ['out']


def test_segmentor(folder_of, tmp_path):
    folder = folder_of('segmentor')
    model = load(folder / 'deployed')
    predict(model, [folder / IMAGES['segmentor']], tmp_path / 'out', batch_size=2, draw=False)
    written = json.loads((tmp_path / 'out' / 'predictions.json').read_text())
    assert written['classes'] == ['ground', *CLASSES]
    expected = own_predictions(model)
    assert [image['file_name'] for image in written['images']] == sorted(expected)
    for image in written['images']:
        assert image['labels'].startswith('labels/shapes/shapes_0000')
        labels = cv2.imread(str(tmp_path / 'out' / image['labels']), cv2.IMREAD_UNCHANGED)
        own = expected[image['file_name']].pred_sem_seg.data[0].numpy()
        assert labels.shape == own.shape
        assert (labels != own).mean() < 1e-3
    assert len(np.unique(labels)) > 1
    assert not (tmp_path / 'out' / 'vis').exists()
    # MMSegmentation takes no batch of several sizes
    cv2.imwrite(str(tmp_path / 'wide.png'), cv2.imread(image['file_name'])[:40])
    done = predict(model, [image['file_name'], tmp_path / 'wide.png'], tmp_path / 'sizes',
                   batch_size=2)
    assert done.count == 2
    assert cv2.imread(str(tmp_path / 'sizes' / 'labels' / 'wide.png')).shape == (40, 64, 3)


def test_classifier(folder_of, tmp_path):
    folder = folder_of('classifier')
    model = load(folder / 'deployed')
    predict(model, [folder / IMAGES['classifier']], tmp_path / 'out', top_k=3)
    written = json.loads((tmp_path / 'out' / 'predictions.json').read_text())
    expected = own_predictions(model)
    classes = (folder / 'data' / 'classes.txt').read_text().split()
    assert {image['file_name'] for image in written} == expected.keys()
    for image in written:
        scores = expected[image['file_name']].pred_score
        best = scores.argsort(descending=True)[:3].tolist()
        assert [item['label'] for item in image['top']] == best
        assert [item['class'] for item in image['top']] == [classes[label] for label in best]
        assert [item['score'] for item in image['top']] == pytest.approx(scores[best].tolist())
    assert len(list((tmp_path / 'out' / 'vis').rglob('*.jpg'))) == 12


def test_what_cannot_be_read_is_skipped_and_the_rest_is_done(folder_of, tmp_path, capsys):
    """Damaged and empty images, sizes that differ, a video; the training form, by the tool."""
    folder, images = folder_of('classifier'), tmp_path / 'images'
    images.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (6, 64, 48, 3), np.uint8)
    cv2.imwrite(str(images / 'a.png'), noise[0])
    cv2.imwrite(str(images / 'd.png'), noise[1, :40])
    (images / 'b.png').write_bytes((images / 'a.png').read_bytes()[:99])
    (images / 'c.jpg').touch()
    video = cv2.VideoWriter(str(tmp_path / 'film.avi'), cv2.VideoWriter_fourcc(*'MJPG'), 5,
                            (48, 64))
    for frame in noise[2:5]:
        video.write(frame)
    video.release()
    (tmp_path / 'torn.mp4').write_bytes(b'nothing')
    film = (tmp_path / 'film.avi').read_bytes()
    (tmp_path / 'cut.avi').write_bytes(film[:len(film) // 2])
    before = {path: sha256(path) for path in tmp_path.rglob('*') if path.is_file()}
    assert tool(folder / 'config.py', folder / 'iter_2.pth', images, tmp_path / 'film.avi',
                tmp_path / 'torn.mp4', tmp_path / 'cut.avi', '--out', tmp_path / 'out',
                '--batch-size', 3, '--data-root', folder / 'data', '--device', 'cpu') == 1
    output = capsys.readouterr()
    assert 'predicted on 6 images' in output.out
    skipped = [line for line in output.err.splitlines() if line.startswith('skipped ')]
    assert len(skipped) == 4
    for name, line in zip(('b.png', 'c.jpg', 'torn.mp4', 'cut.avi: it announces 3'), skipped):
        assert name in line
    written = json.loads((tmp_path / 'out' / 'predictions.json').read_text())
    assert [image['file_name'].rpartition('/')[2] for image in written] == [
        'a.png', 'd.png', 'film.avi#000000', 'film.avi#000001', 'film.avi#000002',
        'cut.avi#000000']
    assert (tmp_path / 'out' / 'vis' / 'film' / '000002.jpg').is_file()
    assert before == {path: sha256(path) for path in before}
    # the model that `reparam` writes gives the same, one by one
    assert tool(folder / 'deployed', images / '*.png', '--out', tmp_path / 'again',
                '--device', 'cpu') == 1
    again = json.loads((tmp_path / 'again' / 'predictions.json').read_text())
    for image, same in zip(again, written):
        assert [x['score'] for x in image['top']] == pytest.approx(
            [x['score'] for x in same['top']], abs=1e-4)


@pytest.mark.parametrize(('words', 'named'), [
    ('deployed nowhere.jpg', 'no image nowhere.jpg'),
    ('deployed empty', 'no image in the folder empty'),
    ('deployed empty/*.png', 'no image empty/*.png'),
    ('deployed', 'no images were given'),
    ('deployed data/classes.txt', 'none of the images can be read:\ndata/classes.txt'),
    ('deployed data/val --out data', 'data exists already: nothing is overwritten'),
    ('deployed data/val --device nonsense', "on the device 'nonsense'"),
    ('config.py data/val', 'a checkpoint (.pth) must follow the config config.py, found data/val'),
    ('config.py nowhere.pth data/val', 'no checkpoint nowhere.pth'),
    ('nowhere.py iter_2.pth data/val', 'no config file nowhere.py'),
    ('data iter_2.pth data/val', 'data has no config.py and no model.pth'),
    ('deployed/config.py iter_2.pth data/val --data-root data', 'is in training form, but the '
     'model is in plain form'),
    ('config.py deployed/model.pth data/val --data-root data', 'is in plain form, but the model '
     'is in training form'),
    ('iter_2.pth data/val', 'iter_2.pth is a checkpoint: give its config before it'),
])
def test_what_is_refused(words, named, folder_of, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(folder_of('classifier'))
    (folder_of('classifier') / 'empty').mkdir(exist_ok=True)
    out = [] if '--out' in words else ['--out', tmp_path / 'out']
    assert tool(*words.split(), *out) == 1
    assert named in capsys.readouterr().err
    assert not (tmp_path / 'out').exists()


def test_sources(tmp_path):
    """Subfolders keep their place, hidden files are no images, nothing is taken twice."""
    for name in ('a/1.png', 'a/deep/1.PNG', 'a/.hidden.png', 'a/.cache/2.png', 'a/1.jpg',
                 'a/notes.txt', 'b/1.png', 'b/raw'):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    sources = find_sources([tmp_path / 'a', tmp_path / 'b' / '1.png', tmp_path / '*' / '1.png',
                            tmp_path / 'b' / 'raw'])
    assert [(str(s.path.relative_to(tmp_path)), s.name) for s in sources] == [
        ('a/1.jpg', '1'), ('a/1.png', '1-2'), ('a/deep/1.PNG', 'deep/1'), ('b/1.png', '1-3'),
        ('b/raw', 'raw')]
