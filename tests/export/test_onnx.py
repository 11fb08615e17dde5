"""ONNX files of deployed models: what is in them, and what the comparison finds."""

import copy
import json
import sys

import onnx
import pytest
import torch
from batches import tiny_batch
from helpers import randomize, vary_scales
from mmdet.testing import demo_mm_inputs
from mmdet.utils import register_all_modules
from mmengine.config import ConfigDict
from mmengine.registry import MODELS, DefaultScope, init_default_scope
from mmengine.structures import InstanceData
from torch import nn

from orepa_mm.errors import ConfigError, OnnxExportError
from orepa_mm.export.onnx import BoxComparison, compare_onnx, export_onnx, require_onnx
from orepa_mm.export.onnx.session import Session
from orepa_mm.export.onnx.traceable import DynamicAdaptiveAvgPool2d
from orepa_mm.reparam import reparameterize

OREPA = dict(type='OREPA')
NORM = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], bgr_to_rgb=True)
BACKBONE = dict(type='ResNet', depth=18, base_channels=8, conv_cfg=OREPA)
NECK = dict(type='FPN', in_channels=[8, 16, 32, 64], out_channels=8, num_outs=5)
BOXES = dict(type='DeltaXYWHBBoxCoder', target_means=[0.] * 4, target_stds=[1.] * 4)
ROI = dict(type='SingleRoIExtractor', out_channels=8, featmap_strides=[4, 8, 16, 32],
           roi_layer=dict(type='RoIAlign', output_size=7, sampling_ratio=0))
NMS = dict(type='nms', iou_threshold=0.5)
DETECTOR = dict(data_preprocessor=dict(type='DetDataPreprocessor', pad_size_divisor=32, **NORM),
                backbone=BACKBONE, neck=NECK)
ANCHORS = dict(type='AnchorGenerator', scales=[4], ratios=[0.5, 1.0, 2.0],
               strides=[4, 8, 16, 32, 64])
CONFIGS = {
    'RetinaNet': dict(
        type='RetinaNet', **DETECTOR,
        bbox_head=dict(type='RetinaHead', num_classes=2, in_channels=8, feat_channels=8,
                       stacked_convs=1, bbox_coder=BOXES),
        test_cfg=dict(nms_pre=1000, min_bbox_size=0, score_thr=0.05, nms=NMS, max_per_img=100)),
    'FasterRCNN': dict(
        type='FasterRCNN', train_cfg=None, **DETECTOR,
        rpn_head=dict(type='RPNHead', in_channels=8, feat_channels=8, anchor_generator=ANCHORS,
                      bbox_coder=BOXES),
        roi_head=dict(type='StandardRoIHead', bbox_roi_extractor=ROI, bbox_head=dict(
            type='Shared2FCBBoxHead', in_channels=8, fc_out_channels=16, num_classes=2,
            bbox_coder=BOXES)),
        test_cfg=dict(rpn=dict(nms_pre=200, max_per_img=50, min_bbox_size=0,
                               nms=dict(type='nms', iou_threshold=0.7)),
                      rcnn=dict(score_thr=0.05, nms=NMS, max_per_img=100,
                                mask_thr_binary=0.5))),
    'PSPNet': dict(
        type='EncoderDecoder',
        data_preprocessor=dict(type='SegDataPreProcessor', test_cfg=dict(size_divisor=32), **NORM),
        backbone=dict(type='OREPAResNetV1c', depth=18, base_channels=8, strides=(1, 2, 1, 1),
                      dilations=(1, 1, 2, 4), out_indices=(3,), contract_dilation=True),
        decode_head=dict(type='PSPHead', in_channels=64, in_index=0, channels=8, num_classes=5,
                         pool_scales=(1, 2, 3, 6), norm_cfg=dict(type='BN')),
        test_cfg=dict(mode='whole')),
    'ImageClassifier': dict(
        type='ImageClassifier', data_preprocessor=dict(type='ClsDataPreprocessor'),
        backbone=dict(type='ResNet', depth=18, base_channels=8, stem_channels=8, conv_cfg=OREPA),
        neck=dict(type='GlobalAveragePooling'),
        head=dict(type='LinearClsHead', num_classes=5, in_channels=64)),
}
CONFIGS['MaskRCNN'] = copy.deepcopy(CONFIGS['FasterRCNN'])
CONFIGS['MaskRCNN']['type'] = 'MaskRCNN'
CONFIGS['MaskRCNN']['roi_head'].update(
    mask_roi_extractor={**ROI, 'roi_layer': {**ROI['roi_layer'], 'output_size': 14}},
    mask_head=dict(type='FCNMaskHead', num_convs=1, in_channels=8, conv_out_channels=8,
                   num_classes=2))
SCOPES = {'PSPNet': 'mmseg', 'ImageClassifier': 'mmpretrain'}
FOLDED = ('RetinaNet', 'ImageClassifier')


def build(name):
    """A deployed model whose predictions are not trivial, and a batch of two images."""
    scope = SCOPES.get(name, 'mmdet')
    if scope == 'mmdet':
        register_all_modules(init_default_scope=True)
    else:
        init_default_scope(scope)
    torch.manual_seed(3)  # weights at which rounding decides no rank
    with DefaultScope.overwrite_default_scope(scope):
        model = MODELS.build(ConfigDict(copy.deepcopy(CONFIGS[name])))
        model.init_weights()
        vary_scales(model)
        for part in ('bbox_head', 'rpn_head', 'roi_head', 'decode_head', 'head'):
            if hasattr(model, part):
                randomize(getattr(model, part))
        if hasattr(model, 'roi_head'):  # or nearly all is background, or nearly nothing
            nn.init.normal_(model.roi_head.bbox_head.fc_cls.weight, std=0.02)
            nn.init.zeros_(model.roi_head.bbox_head.fc_cls.bias)
        model.eval()
        model.dataset_meta = {'classes': ('cat', 'dog')}
        batch = (demo_mm_inputs(2, [[3, 96, 128], [3, 128, 96]]) if scope == 'mmdet'
                 else tiny_batch(scope))
        batch = model.data_preprocessor(batch, False)
    return reparameterize(model, fold_bn=name in FOLDED), batch


@pytest.fixture(scope='module', params=[
    pytest.param(name, marks=pytest.mark.long if name == 'FasterRCNN' else ())  # Mask R-CNN has it
    for name in CONFIGS])
def exported(request, tmp_path_factory):
    model, batch = build(request.param)
    path = tmp_path_factory.mktemp('onnx') / 'model.onnx'
    state = {key: value.clone() for key, value in model.state_dict().items()}
    random_state = torch.get_rng_state()
    export = export_onnx(model, batch, path, meta={'form': 'plain', 'versions': {'torch': '2'}})
    assert torch.equal(random_state, torch.get_rng_state())
    assert not model.training
    assert 'forward' not in vars(model)
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), key
    assert {type(m) for m in model.modules()}.isdisjoint({DynamicAdaptiveAvgPool2d})
    return request.param, model, batch, export


def test_the_files_compute_what_the_model_computes(exported):
    name, model, batch, export = exported
    report = compare_onnx(model, [batch], export.files['network'])
    if name == 'MaskRCNN':  # masks of random weights lie at their threshold: rounding flips some
        assert report.boxes.mask_flips < 0.01 * report.boxes.mask_pixels
        report.boxes.mask_flips = 0
    assert report.passed, report.explain()
    assert export.dynamic_size
    # as given, one image, and a larger one
    assert len({error.shape for error in report.errors}) == 3
    assert {e.graph for e in report.errors} == set(export.files)
    assert {(e.graph, e.output) for e in report.errors} == {
        (graph, output) for graph, outputs in export.outputs.items() for output in outputs}
    if name in SCOPES:
        assert report.boxes is None
    else:
        assert report.boxes.matched >= 40
        assert report.boxes.unmatched == 0
    assert (name == 'MaskRCNN') == bool(report.boxes and report.boxes.mask_pixels)
    assert json.loads(json.dumps(report.as_dict()))['passed']
    assert json.loads(json.dumps(export.as_dict()))['files'][0] == 'model.onnx'


def test_what_is_in_the_files(exported):
    name, _, _, export = exported
    expected = {'RetinaNet': {'network'}, 'FasterRCNN': {'network', 'bbox'},
                'MaskRCNN': {'network', 'bbox', 'mask'}}.get(name, {'network'})
    assert set(export.files) == expected
    folder = export.files['network'].parent
    assert set(folder.iterdir()) == set(export.files.values())  # nothing beside them
    for graph, path in export.files.items():
        proto = onnx.load(path)
        onnx.checker.check_model(proto, full_check=True)
        meta = {item.key: item.value for item in proto.metadata_props}
        assert json.loads(meta['classes']) == ['cat', 'dog']
        assert meta['form'] == 'plain'
        assert json.loads(meta['versions']) == {'torch': '2'}
        assert meta['graph'] == graph
        if name != 'ImageClassifier':
            assert json.loads(meta['mean']) == NORM['mean']
            assert json.loads(meta['std']) == NORM['std']
            assert meta['channel_order'] == 'rgb'
            assert meta['pad_size_divisor'] == '32'
        assert b'.py' not in path.read_bytes()  # no trace of the machine that wrote it
    assert export.inputs['network'] == {'inputs': ['batch', 3, 'height', 'width']}
    weights = {weight.name for weight in onnx.load(export.files['network']).graph.initializer}
    assert 'backbone.layer1.0.conv1.weight' in weights
    outputs = list(export.outputs['network'])
    if name == 'RetinaNet':
        assert outputs == [f'{kind}_{level}' for kind in ('cls_scores', 'bbox_preds')
                           for level in range(5)]
    elif name in SCOPES:
        assert outputs == ['output']
    else:
        assert outputs == [f'features_{level}' for level in range(4)] + [
            f'rpn_{kind}_{level}' for kind in ('cls_scores', 'bbox_preds') for level in range(5)]
        assert list(export.outputs['bbox']) == ['cls_score', 'bbox_pred']
        assert export.inputs['bbox']['rois'] == ['rois', 5]


BROKEN = {
    'RetinaNet': ('bbox_head.retina_reg', 'network', {f'bbox_preds_{i}' for i in range(5)}),
    'FasterRCNN': ('roi_head.bbox_head.fc_reg', 'bbox', {'bbox_pred'}),
    'MaskRCNN': ('roi_head.mask_head.conv_logits', 'mask', {'mask_preds'}),
    'PSPNet': ('decode_head.conv_seg', 'network', {'output'}),
    'ImageClassifier': ('head.fc', 'network', {'output'}),
}


def test_a_file_of_another_model_fails(exported):
    name, model, batch, export = exported
    layer, graph, outputs = BROKEN[name]
    model = copy.deepcopy(model)
    with torch.no_grad():
        model.get_submodule(layer).weight.neg_()
    report = compare_onnx(model, batch, export.files['network'])
    assert not report.passed
    assert {(e.graph, e.output) for e in report.errors if not e.passed} == {
        (graph, output) for output in outputs}
    assert sorted(outputs)[0] in report.explain()
    if report.boxes is not None:
        assert not report.boxes.passed
        assert 'final boxes differ' in report.explain()

    with torch.no_grad():
        model.get_submodule(layer).weight[0] = torch.nan
    report = compare_onnx(model, batch, export.files['network'])
    assert not report.passed
    assert report.largest == float('inf')


class FixedSize(nn.Sequential):
    """Flattens the image: works for one size of it only."""

    def __init__(self):
        super().__init__(nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(2 * 6 * 8, 3))


def test_a_module_of_one_size(tmp_path):
    model, inputs = randomize(FixedSize()), torch.randn(1, 3, 8, 10)
    export = export_onnx(model, inputs, tmp_path / 'a.onnx')
    assert model.training
    assert not export.dynamic_size
    assert 'network of FixedSize' in export.reason
    assert export.inputs['network'] == {'inputs': ['batch', 3, 8, 10]}
    report = compare_onnx(model, [inputs, torch.randn(1, 3, 9, 10)], tmp_path / 'a.onnx')
    assert report.passed
    assert [error.shape for error in report.errors] == [(1, 3, 8, 10), (2, 3, 8, 10)]
    assert not compare_onnx(model, torch.randn(1, 3, 9, 10), tmp_path / 'a.onnx').passed
    assert not compare_onnx(model, [], tmp_path / 'a.onnx').passed
    with pytest.raises(ConfigError, match='shape N x 3 x 8 x 10 only, and got 1 x 3 x 9 x 10'):
        Session(tmp_path / 'a.onnx')(torch.randn(1, 3, 9, 10))
    with pytest.raises(FileNotFoundError, match=r'b\.onnx'):
        compare_onnx(model, inputs, tmp_path / 'b.onnx')


class DependsOnData(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


def test_what_cannot_be_exported_writes_nothing(tmp_path):
    with pytest.raises(OnnxExportError, match='DependsOnData'):
        export_onnx(DependsOnData(), torch.randn(1, 3, 8, 8), tmp_path / 'a.onnx')
    two_stage, batch = build('FasterRCNN')
    two_stage.roi_head = nn.Identity()
    with pytest.raises(OnnxExportError, match='Identity'):
        export_onnx(two_stage, batch, tmp_path / 'a.onnx')
    with pytest.raises(ValueError, match='training form'):
        export_onnx(MODELS.build(dict(type='OREPA', in_channels=3, out_channels=4, kernel_size=3)),
                    torch.randn(1, 3, 8, 8), tmp_path / 'a.onnx')
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('name', ['RetinaNet', 'FasterRCNN'])
def test_images_alone_are_too_little_for_a_detector(tmp_path, name):
    model, batch = build(name)
    path = tmp_path / 'a.onnx'
    for call in (lambda: export_onnx(model, batch['inputs'], path),
                 lambda: compare_onnx(model, batch['inputs'], path),
                 lambda: compare_onnx(model, [batch, batch['inputs']], path)):
        with pytest.raises(OnnxExportError, match=f'{name} selects boxes.* data_samples'):
            call()
    assert not list(tmp_path.iterdir())


def test_missing_packages_are_named(monkeypatch, tmp_path):
    require_onnx()
    monkeypatch.setitem(sys.modules, 'onnxruntime', None)
    monkeypatch.setitem(sys.modules, 'onnxscript', None)
    with pytest.raises(ImportError, match=r'onnxscript, onnxruntime.*pip install onnx onnxscript'):
        require_onnx()
    with pytest.raises(ImportError):
        export_onnx(nn.Conv2d(3, 4, 1), torch.randn(1, 3, 8, 8), tmp_path / 'a.onnx')


@pytest.mark.parametrize('size', [(1, 1), (5, 7), (6, 6), (13, 24), (64, 96)])
@pytest.mark.parametrize('bins', [(2, 2), (3, 3), (6, 6), (1, 4)])
def test_adaptive_pooling_is_the_stock_one(size, bins):
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    expected = nn.AdaptiveAvgPool2d(bins)(x)
    assert (DynamicAdaptiveAvgPool2d(bins)(x) - expected).abs().max() < 1e-12


def boxes(*rows):
    """Rows of (x1, score, label); every box is 10 wide and high."""
    rows = torch.tensor(rows, dtype=torch.float32).reshape(-1, 3)
    corners = torch.stack([rows[:, 0], rows[:, 0] * 0, rows[:, 0] + 10, rows[:, 0] * 0 + 10], 1)
    return InstanceData(bboxes=corners, scores=rows[:, 1], labels=rows[:, 2].long())


def compared(expected, found, score_thr=0.05, max_per_img=100):
    comparison = BoxComparison()
    comparison.add(boxes(*expected), boxes(*found), score_thr, max_per_img)
    return comparison


SAME = [(0, 0.9, 0), (0, 0.8, 1), (30, 0.5, 0)]


@pytest.mark.parametrize(('found', 'passed', 'matched', 'at_edge', 'unmatched'), [
    (SAME[::-1], True, 3, 0, 0),
    ([*SAME, (60, 0.0501, 0)], True, 3, 1, 0),     # at the threshold
    ([*SAME, (60, 0.2, 0)], False, 3, 0, 1),
    (SAME[:2], False, 2, 0, 1),
    ([], False, 0, 0, 3),
    ([(0, 0.9, 0), (0, 0.8, 0), (30, 0.5, 0)], False, 2, 0, 2),  # another label
    ([(0.5, 0.9, 0), *SAME[1:]], False, 2, 0, 2),  # moved
    ([(0, 0.91, 0), *SAME[1:]], False, 3, 0, 0),   # another score
    ([(0.05, 0.9005, 0), *SAME[1:]], True, 3, 0, 0),
])
def test_matching_of_boxes(found, passed, matched, at_edge, unmatched):
    comparison = compared(SAME, found)
    assert (comparison.passed, comparison.matched, comparison.at_edge, comparison.unmatched) == (
        passed, matched, at_edge, unmatched)


def test_the_last_of_too_many_boxes_may_be_another():
    other = [*SAME[:2], (60, 0.5, 0)]
    assert compared(SAME, other, max_per_img=3).at_edge == 2
    assert compared(SAME, other, max_per_img=3).passed
    assert not compared(SAME, other).passed
    assert compared([], []).passed


def test_masks_are_compared_by_their_probabilities():
    expected, found = boxes(*SAME), boxes(*SAME[::-1])
    expected.masks = torch.zeros(3, 40, 60, dtype=torch.uint8)
    expected.masks[:, :20] = torch.arange(60).add(98).byte()  # many at the threshold, 127.5
    found.masks = expected.masks.flip(0)
    found.masks[:, :20] += 1  # more than one pixel in a thousand is inside of one mask alone
    comparison = BoxComparison()
    comparison.add(expected, found, 0.05, 100)
    assert comparison.passed
    assert (comparison.mask_pixels, comparison.mask_flips) == (3 * 20 * 31, 0)
    assert comparison.mask_difference == pytest.approx(1 / 255)
    for pixels, passed in ((1, True), (2, False)):
        found.masks[0, 0, -pixels:] = 0
        comparison = BoxComparison()
        comparison.add(expected, found, 0.05, 100)
        assert (comparison.mask_flips, comparison.passed) == (pixels, passed)
    assert comparison.mask_difference > 0.3
