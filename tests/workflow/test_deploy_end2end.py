"""What is said of an end-to-end ONNX file: how images get their size, and which metrics moved."""

import math

import pytest
import torch
from mmengine.config import Config
from mmengine.structures import BaseDataElement

from orepa_mm.workflow.end2end import moved_metrics, resizing


@pytest.mark.parametrize(('scope', 'pipeline', 'expected', 'fill'), [
    ('mmdet', [dict(type='Resize', scale=(256, 256), keep_ratio=True)], 'fit', None),
    ('mmdet', [dict(type='mmdet.Resize', scale=(256, 256))], 'stretch', None),
    ('mmdet', [dict(type='Resize', scale=(256, 256), keep_ratio=True),
               dict(type='Pad', size=(256, 256), pad_val=dict(img=(114, 114, 114)))],
     'fit', [114.0] * 3),
    ('mmdet', [dict(type='Pad', size_divisor=32)], 'fit', [0.0] * 3),
    ('mmpretrain', [dict(type='ResizeEdge', scale=96), dict(type='CenterCrop', crop_size=80)],
     'crop', None),
    ('mmpretrain', [dict(type='LoadImageFromFile')], 'stretch', None),
])
def test_how_images_get_their_size(scope, pipeline, expected, fill):
    cfg = Config(dict(default_scope=scope, test_dataloader=dict(dataset=dict(
        type='CocoDataset', pipeline=pipeline))))
    sample = BaseDataElement(metainfo={'img_shape': (80, 90)})
    found, filling = resizing(cfg, {'inputs': torch.zeros(1, 3, 96, 96), 'data_samples': [sample]})
    assert (found['resize'], found['resize_height'], found['resize_width']) == (expected, 80, 90)
    assert found.get('short_edge') == (96 if expected == 'crop' else None)
    assert filling == fill


def test_the_third_decimal_counts():
    assert not moved_metrics({'ap': 0.5, 'acc': 61.0, 'none': math.nan},
                             {'ap': 0.5004, 'acc': 61.04, 'none': math.nan})
    assert moved_metrics({'ap': 0.5, 'acc': 61.0}, {'ap': 0.501, 'acc': 61.04}) == [
        'ap is 0.5000 deployed but 0.5010 by the end-to-end ONNX file']
    assert len(moved_metrics({'ap': 0.5, 'acc': 61.0}, {'acc': 61.1})) == 2
