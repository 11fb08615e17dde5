"""Predictions from nothing but an end-to-end file, here small graphs whose answer is known.

Those of networks are in test_quantization.py, of real end-to-end files in
tests/export/test_onnx_end2end.py.
"""

import json

import cv2
import numpy as np
import onnx
import pytest
from helpers import exit_code
from mmcv.transforms import CenterCrop, Resize
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmpretrain.datasets import ResizeEdge
from onnx import TensorProto, helper, numpy_helper

from orepa_mm.errors import CheckpointError, ConfigError
from orepa_mm.export.onnx.end2end_file import placed
from orepa_mm.workflow.onnx_model import load_onnx, network_meta

#: What images of 32 x 48 pixels in blue, green, red become: (inputs, outputs, nodes).
TASKS = {
    'segmentation': (['images', 'sizes'], {'label_map': TensorProto.INT64}, [
        ('Cast', ['images'], 'pixels', {'to': TensorProto.FLOAT}),
        ('ArgMax', ['pixels'], 'label_map', {'axis': 3, 'keepdims': 0})]),
    'classification': (['images'], {'probabilities': TensorProto.FLOAT}, [
        ('Cast', ['images'], 'pixels', {'to': TensorProto.FLOAT}),
        ('ReduceMean', ['pixels', 'sides'], 'means', {'keepdims': 0}),
        ('Div', ['means', 'hundred'], 'logits', {}),
        ('Softmax', ['logits'], 'probabilities', {'axis': 1})]),
    # the left upper quarter of each image is an object of the second class
    'detection': (['images', 'sizes'], {
        'boxes': TensorProto.FLOAT, 'scores': TensorProto.FLOAT, 'labels': TensorProto.INT64,
        'count': TensorProto.INT64}, [
        ('Cast', ['sizes'], 'lengths', {'to': TensorProto.FLOAT}),
        ('Gather', ['lengths', 'order'], 'far', {'axis': 1}),
        ('Mul', ['far', 'half'], 'middle', {}),
        ('Mul', ['far', 'zero'], 'corner', {}),
        ('Concat', ['corner', 'middle'], 'flat', {'axis': 1}),
        ('Unsqueeze', ['flat', 'first'], 'boxes', {}),
        ('Cos', ['corner'], 'ones', {}),
        ('Gather', ['ones', 'first'], 'one', {'axis': 1}),
        ('Mul', ['one', 'half'], 'scores', {}),
        ('Cast', ['one'], 'labels', {'to': TensorProto.INT64}),
        ('ReduceMax', ['labels', 'first'], 'count', {'keepdims': 0})]),
}
CONSTANTS = {'sides': np.array([1, 2]), 'hundred': np.float32(100), 'order': np.array([1, 0]),
             'half': np.float32(0.5), 'zero': np.float32(0), 'first': np.array([1])}
META = {'graph': 'end2end', 'resize': 'fit', 'resize_height': '32', 'resize_width': '48',
        'channel_order': 'bgr', 'classes': '["blue", "green", "red"]'}


def made(path, kind, **meta):
    """Write such a file; a value of None leaves an entry of the metadata out."""
    inputs, outputs, nodes = TASKS[kind]
    shapes = {'images': (TensorProto.UINT8, ['batch', 32, 48, 3]),
              'sizes': (TensorProto.INT64, ['batch', 2])}
    graph = helper.make_graph(
        [helper.make_node(operator, names, [out], **options)
         for operator, names, out, options in nodes],
        kind, [helper.make_tensor_value_info(name, *shapes[name]) for name in inputs],
        [helper.make_tensor_value_info(name, dtype, None) for name, dtype in outputs.items()],
        [numpy_helper.from_array(value, name) for name, value in CONSTANTS.items()
         if any(name in names for _, names, *_ in nodes)])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid('', 18)], ir_version=10)
    meta = {**META, 'task': kind, **meta}
    helper.set_model_props(model, {key: value for key, value in meta.items() if value is not None})
    onnx.save(model, path)
    return path


@pytest.fixture
def images(tmp_path):
    """Images of three shapes: blue above, red below, and a grey margin at the right."""
    folder = tmp_path / 'my images'
    folder.mkdir()
    for name, (height, width) in {'wide': (64, 96), 'high': (96, 60), 'small': (16, 16)}.items():
        image = np.full((height, width, 3), 9, np.uint8)
        image[:height // 2, :, 0] = image[height // 2:, :, 2] = 200
        cv2.imwrite(str(folder / f'{name}.png'), image)
    return folder


def predicted(file, images, out, *options):
    assert exit_code('tools/predict.py', file, images, '--out', out, *options) == 0
    names = [path.stem for path in sorted(out.glob('vis/*'))]
    assert names == ([] if '--no-draw' in options else ['high', 'small', 'wide'])
    return json.loads((out / 'predictions.json').read_text())


@pytest.mark.parametrize('order', ['bgr', 'rgb'])
def test_label_maps_are_as_large_as_the_images(order, images, tmp_path):
    file = made(tmp_path / 'a.onnx', 'segmentation', channel_order=order)
    found = predicted(file, images, tmp_path / 'out', '--batch-size', 2)
    assert found['classes'] == ['blue', 'green', 'red']
    above, below = (0, 2) if order == 'bgr' else (2, 0)
    for image in found['images']:
        labels = cv2.imread(str(tmp_path / 'out' / image['labels']), cv2.IMREAD_UNCHANGED)
        assert labels.shape == cv2.imread(image['file_name']).shape[:2]
        height = len(labels)
        edge = height // 12  # where both colours are mixed
        assert (labels[:height // 2 - edge] == above).all()
        assert (labels[height // 2 + edge:] == below).all()


def test_boxes_are_in_pixels_of_the_images(images, tmp_path):
    found = predicted(made(tmp_path / 'a.onnx', 'detection'), images, tmp_path / 'out')
    assert [item['bbox'] for item in found] == [
        pytest.approx(box) for box in ([0, 0, 30, 48], [0, 0, 8, 8], [0, 0, 48, 32])]
    assert {(item['category_name'], item['score']) for item in found} == {('green', 0.5)}
    none = predicted(made(tmp_path / 'b.onnx', 'detection'), images, tmp_path / 'none',
                     '--score-thr', 0.5, '--no-draw')
    assert none == []


def test_classes(images, tmp_path):
    file = made(tmp_path / 'a.onnx', 'classification', resize='stretch')
    for image in predicted(file, images, tmp_path / 'out', '--top-k', 2):
        assert {item['class'] for item in image['top']} == {'blue', 'red'}
        # 200 in one half and 9 in the other, against 9
        high = np.exp(1.045) / (2 * np.exp(1.045) + np.exp(0.09))
        assert image['top'][0]['score'] == pytest.approx(high, abs=0.01)


@pytest.mark.parametrize(('height', 'width'), [(50, 80), (97, 33), (33, 97), (64, 64), (7, 300)])
def test_sizes_are_those_of_the_toolboxes(height, width):
    register_all_modules(init_default_scope=True)
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    square = {'resize_height': '64', 'resize_width': '64'}
    expected = Resize(scale=(64, 64), keep_ratio=True)({'img': image})
    pixels, size = placed(image, {'resize': 'fit', **square})
    np.testing.assert_array_equal(pixels, expected['img'])
    assert np.divide(size, image.shape[:2])[::-1] == pytest.approx(expected['scale_factor'])
    pixels, _ = placed(image, {'resize': 'stretch', **square})
    np.testing.assert_array_equal(pixels, Resize(scale=(64, 64))({'img': image})['img'])
    expected = CenterCrop(crop_size=64)(ResizeEdge(scale=73)({'img': image}))
    pixels, _ = placed(image, {'resize': 'crop', 'short_edge': '73', **square})
    np.testing.assert_array_equal(pixels, expected['img'])


@pytest.mark.parametrize(('meta', 'error', 'named'), [
    ({'graph': None}, CheckpointError, 'no ONNX file that `mim run orepa_mm reparam` wrote'),
    ({'graph': 'bbox'}, CheckpointError, 'the graph bbox of a detector alone'),
    ({'graph': 'network'}, CheckpointError, 'an older version wrote it: write it anew'),
    ({'graph': 'network', 'image_size': '[9, 9]', 'config': '{broken'}, ConfigError,
     'builds no model (SyntaxError'),
    ({'graph': 'network', 'image_size': '[9, 9]', 'config': "{'model': {'type': 'Nothing'}}"},
     ConfigError, 'Nothing'),
    ({'resize': None}, CheckpointError, 'its metadata lack resize'),
    ({'task': 'poetry'}, CheckpointError, 'write it anew'),
])
def test_files_that_do_not_say_enough(meta, error, named, tmp_path):
    path = made(tmp_path / 'a.onnx', 'classification', **meta)
    with pytest.raises(error) as found:
        load_onnx(path)
    assert named in str(found.value)
    assert 'a.onnx' in str(found.value)


@pytest.mark.parametrize(('words', 'named'), [
    ('nowhere.onnx images', 'there is no ONNX file nowhere.onnx'),
    ('folder.onnx images', 'there is no ONNX file folder.onnx'),
    ('torn.onnx images', 'torn.onnx cannot be read as ONNX'),
    ('empty.onnx images', 'empty.onnx cannot be read as ONNX'),
    ('file.onnx nowhere.jpg', 'no image nowhere.jpg'),
    ('file.onnx', 'no images were given'),
    ('file.onnx torn.onnx', 'none of the images can be read'),
    ('file.onnx images --out folder.onnx', 'folder.onnx exists already'),
])
def test_what_is_refused(words, named, images, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    images.rename('images')
    content = made(tmp_path / 'file.onnx', 'classification').read_bytes()
    (tmp_path / 'torn.onnx').write_bytes(content[:len(content) // 2])
    (tmp_path / 'empty.onnx').touch()
    (tmp_path / 'folder.onnx' / 'inside').mkdir(parents=True)
    out = [] if '--out' in words else ['--out', 'out']
    assert exit_code('tools/predict.py', *words.split(), *out) == 1
    assert named in capsys.readouterr().err
    assert not (tmp_path / 'out').exists()


def test_what_does_not_go_with_a_file(capsys):
    for option in ('--device cuda', '--data-root x', '--cfg-options model.type=x'):
        assert exit_code('tools/predict.py', 'a.onnx', 'a.jpg', '--out', 'out',
                         *option.split()) == 2
        assert 'an ONNX file brings its config' in capsys.readouterr().err


def test_a_config_is_stored_whole_or_not_at_all():
    batch = {'inputs': np.zeros((1, 3, 96, 128))}
    pipeline = [dict(type='LoadImageFromFile'), dict(type='Resize', scale=(96, 128))]
    cfg = Config(dict(model=dict(type='A', sizes=(1, 2)), test_dataloader=dict(dataset=dict(
        type='Wrapper', dataset=dict(type='B', pipeline=pipeline))), data_root='/home/me'))
    found = network_meta(cfg, batch)
    assert found['image_size'] == [96, 128]
    assert "'sizes': (1, 2)" in found['config']
    assert "'scale': (96, 128)" in found['config']
    assert '/home/me' not in found['config']
    cfg.model.limit = float('inf')
    assert network_meta(cfg, batch) == {}
    del cfg.model.limit, cfg.test_dataloader.dataset.dataset.pipeline
    assert network_meta(cfg, batch) == {}
