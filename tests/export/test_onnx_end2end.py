"""One ONNX file from pixels to predictions: against the model's own `predict`."""

import copy

import mmcv
import numpy as np
import onnx
import pytest
import torch
from helpers import randomize
from mmcv.ops import batched_nms
from mmdet.structures import DetDataSample
from mmdet.utils import register_all_modules
from mmengine.config import ConfigDict
from mmengine.registry import MODELS
from test_onnx import build
from torch import nn

from orepa_mm.errors import OnnxExportError
from orepa_mm.export.onnx import BoxComparison, EndToEndModel, compare_end2end, export_end2end
from orepa_mm.export.onnx.end2end_file import EndToEndFile
from orepa_mm.export.onnx.selection import DROPPED, after_nms, dense_detections


def calm(name):
    """Logits so small that scores have no ties, whose order is anybody's; boxes of some size."""
    model, batch = build(name)
    with torch.no_grad():
        if name == 'RetinaNet':
            model.bbox_head.retina_cls.weight.mul_(0.1)
        elif name == 'MaskRCNN':
            model.rpn_head.rpn_cls.weight.mul_(0.1)
            model.rpn_head.rpn_reg.weight.mul_(0.1)
            model.rpn_head.rpn_reg.bias.zero_()
    return model, batch


#: What makes another file of each. RetinaNet is exported in tests/workflow/test_deploy.py.
BROKEN = {'MaskRCNN': 'roi_head.bbox_head.fc_reg',
          'PSPNet': 'decode_head.conv_seg', 'ImageClassifier': 'head.fc'}


@pytest.fixture(scope='module', params=BROKEN)
def exported(request, tmp_path_factory):
    model, batch = calm(request.param)
    path = tmp_path_factory.mktemp('end2end') / 'model_end2end.onnx'
    export = export_end2end(model, batch, path, meta={
        'resize': 'fit', 'resize_height': 96, 'resize_width': 128})
    assert not model.training
    return request.param, model, batch, export


def test_it_predicts_what_the_model_predicts(exported):
    name, model, batch, export = exported
    report = compare_end2end(model, [batch], export.file)
    assert report.passed, report.explain()
    assert report.images == 3  # two, and one alone
    if report.boxes:
        assert report.boxes.matched >= 40
        assert report.boxes.unmatched == 0
        # probabilities of random weights lie at the threshold, where rounding decides
        assert report.boxes.mask_pixels > 1000
        assert report.boxes.mask_flips == 0
    else:
        assert (report.pixels > 0) == (name == 'PSPNet')
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed.get_submodule(BROKEN[name]).weight[::2] *= -1.5
    report = compare_end2end(changed, [batch], export.file)
    assert not report.passed
    assert 'differ' in report.explain()
    assert not compare_end2end(model, [], export.file).passed


def test_what_is_in_the_file(exported):
    name, _, batch, export = exported
    proto = onnx.load(export.file)
    onnx.checker.check_model(proto, full_check=True)
    assert {node.domain for node in proto.graph.node} == {''}  # the standard
    assert list(export.file.parent.iterdir()) == [export.file]
    assert b'.py' not in export.file.read_bytes()
    meta = {item.key: item.value for item in proto.metadata_props}
    assert meta['classes'] == '["cat", "dog"]'
    assert (meta['resize'], meta['resize_height'], meta['graph']) == ('fit', '96', 'end2end')
    assert 'mean' not in meta  # it is in the graph
    height, width = batch['inputs'].shape[2:]
    assert export.inputs['images'] == ['batch', height, width, 3]
    assert list(export.outputs) == {
        'PSPNet': ['label_map'], 'ImageClassifier': ['probabilities']}.get(
            name, ['boxes', 'scores', 'labels', 'masks', 'count'])
    if export.task == 'detection':
        assert meta['mask_threshold'] == '0.5'
        assert export.outputs['boxes'] == ['batch', 100, 4]


def test_what_lies_beside_an_image_does_not_count(exported):
    name, model, batch, export = exported
    if name == 'ImageClassifier':
        pytest.skip('a classifier takes whole images')
    session = EndToEndModel(model, export.file).session
    height, width = batch['inputs'].shape[2:]
    images = torch.randint(0, 256, (1, height, width, 3), dtype=torch.uint8)
    other = images.clone()
    other[:, 60:] = 77
    sizes = torch.tensor([[60, width]])
    found = session([images, sizes])
    for key, value in session([other, sizes]).items():
        assert torch.equal(value, found[key]), key
    assert export.task != 'detection' or found['boxes'][..., 3].max() <= 60


def test_images_of_their_own_size(exported):
    """Against the model itself, given images that MMCV brought to the size of the input."""
    name, model, _, export = exported
    file = EndToEndFile(export.file)
    assert file.dataset_meta == {'classes': ['cat', 'dog']}
    if name != 'MaskRCNN':
        return
    small = np.random.default_rng(0).integers(0, 256, (48, 50, 3), np.uint8)
    sample = DetDataSample(metainfo={'img_path': 'a.png'})
    found, = file.test_step({'inputs': [torch.from_numpy(small).permute(2, 0, 1)],
                             'data_samples': [sample]})
    large = mmcv.imresize(small, (100, 96))
    canvas = torch.zeros(3, file.height, file.width, dtype=torch.uint8)
    canvas[:, :96, :100] = torch.from_numpy(large).permute(2, 0, 1)
    batch = model.data_preprocessor({'inputs': [canvas], 'data_samples': [DetDataSample(metainfo={
        'img_shape': (96, 100), 'ori_shape': (48, 50), 'scale_factor': (2.0, 2.0)})]}, False)
    # the preprocessor's own padding lies around the image
    batch['inputs'][..., 96:, :] = batch['inputs'][..., 100:] = 0
    with torch.no_grad():
        expected, = model.predict(batch['inputs'], batch['data_samples'])
    comparison = BoxComparison()
    instances = [sample.pred_instances for sample in (expected, found)]
    for one in instances:
        one.masks = one.masks.to(torch.uint8) * 255
    comparison.add(*instances, 0.0, 100)
    assert comparison.matched > 20
    assert comparison.unmatched <= 1
    assert comparison.mask_flips < 0.02 * comparison.mask_pixels  # at the threshold
    assert found.pred_instances.masks.shape[1:] == (48, 50)
    assert found.pred_instances.bboxes[:, 2].max() <= 50.01


FPN = dict(num_classes=3, in_channels=8, feat_channels=8, stacked_convs=1)
HEADS = {
    'RetinaHead': dict(bbox_coder=dict(type='DeltaXYWHBBoxCoder')),
    'FCOSHead': dict(strides=[8, 16, 32], norm_cfg=None, norm_on_bbox=True, centerness_on_reg=True),
    'ATSSHead': dict(anchor_generator=dict(
        type='AnchorGenerator', ratios=[1.0], octave_base_scale=8, scales_per_octave=1,
        strides=[8, 16, 32]), bbox_coder=dict(type='DeltaXYWHBBoxCoder'),
        norm_cfg=None),
    'RTMDetHead': dict(with_objectness=False, norm_cfg=dict(type='BN'), anchor_generator=dict(
        type='MlvlPointGenerator', offset=0, strides=[8, 16, 32]),
        bbox_coder=dict(type='DistancePointBBoxCoder')),
}
HEADS['RetinaHead']['anchor_generator'] = HEADS['ATSSHead']['anchor_generator']


@pytest.mark.parametrize('kind', HEADS)
def test_a_head_selects_what_mmdetection_selects(kind):
    register_all_modules(init_default_scope=True)
    head = randomize(MODELS.build(dict(type=kind, **FPN, **HEADS[kind], test_cfg=ConfigDict(
        nms_pre=150, min_bbox_size=0, score_thr=0.05, max_per_img=40,
        nms=dict(type='nms', iou_threshold=0.6))))).eval()
    features = [torch.randn(2, 8, 96 // stride, 128 // stride) for stride in (8, 16, 32)]
    sizes = torch.tensor([[90, 128], [96, 100]])
    with torch.no_grad():
        outputs = head(features)
        boxes, scores, labels = dense_detections(head, outputs, sizes)
        expected = head.predict_by_feat(*outputs, batch_img_metas=[
            {'img_shape': tuple(size)} for size in sizes.tolist()])
    for image, wanted in enumerate(expected):
        assert len(wanted) > 5
        found = scores[image] > 0
        torch.testing.assert_close(scores[image][found], wanted.scores)
        torch.testing.assert_close(boxes[image][found], wanted.bboxes)
        assert torch.equal(labels[image][found], wanted.labels)


def test_nms_is_that_of_mmcv():
    boxes = torch.rand(3, 200, 4) * 50
    boxes[..., 2:] += boxes[..., :2]
    scores = torch.randperm(600).view(3, 200) / 700 + 0.1
    scores[0, :50], scores[2] = DROPPED, DROPPED
    labels = torch.randint(0, 3, (3, 200))
    for agnostic in (False, True):
        found = after_nms(boxes, scores, labels, {'iou_threshold': 0.5, 'class_agnostic': agnostic},
                          30, min_size=5)
        for image in range(3):
            chosen = (scores[image] > 0) & (
                (boxes[image, :, 2:] - boxes[image, :, :2]) > 5).all(1)
            its_boxes, its_scores, its_labels = (
                value[image][chosen] for value in (boxes, scores, labels))
            expected, keep = batched_nms(its_boxes, its_scores, its_labels, {
                'type': 'nms', 'iou_threshold': 0.5}, agnostic) if len(its_boxes) else (
                    torch.zeros(0, 5), torch.zeros(0, dtype=torch.int64))
            count = min(30, len(keep))
            assert int((found[1][image] > 0).sum()) == count
            np.testing.assert_array_equal(found[0][image, :count], expected[:count, :4])
            np.testing.assert_array_equal(found[2][image, :count], its_labels[keep][:count])
            assert not found[0][image, count:].any()




def test_what_selects_otherwise_is_refused(tmp_path):
    model, batch = build('RetinaNet')
    path = tmp_path / 'a.onnx'
    soft = copy.deepcopy(model)
    soft.bbox_head.test_cfg.nms = {'type': 'soft_nms', 'iou_threshold': 0.5}
    with pytest.raises(OnnxExportError, match='soft_nms'):
        export_end2end(soft, batch, path)
    from mmdet.models.dense_heads import RetinaHead

    class OwnHead(RetinaHead):
        def _predict_by_feat_single(self, *args, **kwargs):
            raise NotImplementedError

    model.bbox_head.__class__ = OwnHead
    with pytest.raises(OnnxExportError, match=r'OwnHead selects boxes by code of its own '
                       r'\(_predict_by_feat_single\)'):
        export_end2end(model, batch, path)
    segmentor, batch = build('PSPNet')
    segmentor.test_cfg['mode'] = 'slide'
    with pytest.raises(OnnxExportError, match='sliding window'):
        export_end2end(segmentor, batch, path)
    with pytest.raises(OnnxExportError, match=r'Conv2d: .*detectors'):
        export_end2end(nn.Conv2d(3, 3, 1), batch, path)
    assert not list(tmp_path.iterdir())
