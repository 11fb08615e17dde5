"""Verification of whole models of OpenMMLab: which outputs are compared, and how closely."""

import copy
from importlib import import_module

import pytest
import torch
from helpers import ROOT, randomize
from mmcv.ops import ModulatedDeformConv2d
from mmdet.registry import MODELS
from mmdet.testing import demo_mm_inputs
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.hub import get_config
from mmengine.model import BaseModel
from torch import nn
from torchvision.ops import deform_conv2d

from orepa_mm.export.stock import used_detector
from orepa_mm.layers import OREPAConv2d
from orepa_mm.reparam import expand, reparameterize, verify

LIGHT = ROOT / 'configs' / 'faster_rcnn' / 'faster-rcnn_orepa-r18-light_fpn_400i_coco.py'


def small_faster_rcnn():
    cfg = Config.fromfile(LIGHT).model
    cfg.backbone.base_channels, cfg.neck.in_channels = 8, [8, 16, 32, 64]
    return cfg


def built(cfg):
    """With values that tell branches and BN apart, and proposals."""
    register_all_modules(init_default_scope=True)
    torch.manual_seed(0)
    model = MODELS.build(copy.deepcopy(cfg))
    model.init_weights()  # not at random: there must be proposals
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.running_mean.normal_(0, 0.1)
        norm.running_var.uniform_(0.5, 1.5)
    return model


def batch_for(model):
    return model.data_preprocessor(demo_mm_inputs(2, [[3, 96, 128], [3, 128, 96]]), False)


def test_a_two_stage_detector_gets_the_same_proposals_in_both_forms():
    model = built(small_faster_rcnn())
    batch, deployed = batch_for(model), reparameterize(model)
    report = verify(model, deployed, [batch])
    assert report.complete, report.explain()
    # 4 levels of the backbone, 5 of the neck, of scores and of boxes, and two outputs at the end
    names = [error.name.split('[')[0] for error in report.errors]
    assert {name: names.count(name) for name in names} == {
        'backbone': 4, 'neck': 5, 'rpn_head': 10, 'output': 2}
    assert model.training
    assert not any('predict' in vars(module) for module in model.modules())

    with torch.no_grad():
        deployed.roi_head.bbox_head.fc_reg.weight.mul_(1.01)
    failed = {error.name for error in verify(model, deployed, [batch]).errors if not error.passed}
    assert failed == {'output[0][1]'}


def test_another_data_preprocessor_is_another_network():
    model = built(small_faster_rcnn())
    batch = batch_for(model)
    for change, name in (
            (lambda own: own.mean.add_(1), 'data_preprocessor.mean'),
            (lambda own: setattr(own, 'pad_size_divisor', 64), 'data_preprocessor'),
            (lambda own: setattr(own, '_channel_conversion', False), 'data_preprocessor')):
        deployed = reparameterize(model)
        change(deployed.data_preprocessor)
        report = verify(model, deployed, [batch])
        assert not report.passed
        assert name in {*report.differences,
                        *(error.name for error in report.tensors if not error.passed)}


def test_anchors_are_a_part_of_the_network():
    model = built(small_faster_rcnn())
    deployed = reparameterize(model)
    deployed.rpn_head.prior_generator.base_anchors[0] *= 1.01
    report = verify(model, deployed, [batch_for(model)])
    assert report.differences.keys() == {'rpn_head'}
    assert 'prior_generator' in report.differences['rpn_head']


# --- detectors that hold detectors --------------------------------------------------


def soft_teacher(predict_on='teacher'):
    model = get_config('mmdet::soft_teacher/soft-teacher_faster-rcnn_r50-caffe_fpn_180k_'
                       'semi-0.1-coco.py').model
    model.detector = small_faster_rcnn()
    model.detector.data_preprocessor = model.data_preprocessor.data_preprocessor
    model.semi_test_cfg.predict_on = predict_on
    return model


def test_a_teacher_and_a_student_are_compared_with_their_proposals():
    model = built(soft_teacher())
    report = verify(model, reparameterize(model), [batch_for(model)])
    assert report.passed, report.explain()
    assert max(error.error for error in report.errors) < 1e-5
    assert {error.name.split('[')[0] for error in report.errors} == {
        'teacher.backbone', 'teacher.neck', 'teacher.rpn_head', 'output'}
    assert all(name.startswith('student.') for name in report.not_run)


@pytest.mark.parametrize('predict_on', ['teacher', 'student'])
def test_the_detector_that_predicts_is_taken_out(predict_on):
    model = randomize(built(soft_teacher(predict_on)))
    used, batch = used_detector(model), batch_for(model)
    assert type(used).__name__ == 'FasterRCNN'
    assert used.backbone is getattr(model, predict_on).backbone
    assert used.data_preprocessor is model.data_preprocessor.data_preprocessor
    assert 'data_preprocessor.data_preprocessor' in dict(model.named_modules())  # left as it was
    report = verify(used, reparameterize(used), [batch])
    assert not report.skipped
    assert not report.not_run
    assert all(error.passed for error in report.tensors)


def test_another_of_the_two_detectors_is_not_the_same():
    model = built(soft_teacher())
    deployed = reparameterize(model)
    deployed.semi_test_cfg = {**model.semi_test_cfg, 'predict_on': 'student'}
    assert 'semi_test_cfg' in verify(model, deployed, [batch_for(model)]).differences['']


def distilled(name):
    cfg = get_config(f'mmdet::{name}').model
    sizes = dict(depth=18, base_channels=8, type='OREPAResNet', init_cfg=None)
    for prefix in ('', 'teacher_'):
        if f'{prefix}backbone' in cfg:
            cfg[f'{prefix}backbone'].update(sizes)
            cfg[f'{prefix}neck'].update(in_channels=[8, 16, 32, 64], out_channels=32)
            cfg[f'{prefix}bbox_head'].update(in_channels=32, feat_channels=32,
                                             stacked_convs=1,
                                             norm_cfg=dict(type='GN', num_groups=4))
    cfg.teacher_ckpt = None
    if 'teacher_config' in cfg:
        teacher = get_config('mmdet::gfl/gfl_r50_fpn_1x_coco.py')
        teacher.model.backbone.init_cfg = None
        cfg.teacher_config = teacher
    return cfg


DISTILLED = {'LD': 'ld/ld_r18-gflv1-r101_fpn_1x_coco.py',
             'LAD': 'lad/lad_r50-paa-r101_fpn_2xb8_coco_1x.py'}


@pytest.mark.parametrize('name', DISTILLED)
def test_a_student_of_a_teacher_is_compared_alone(name):
    model = built(distilled(DISTILLED[name]))
    batch, used = batch_for(model), used_detector(model)
    report = verify(model, reparameterize(model), [batch])
    assert report.complete, report.explain()
    assert type(used).__name__ == 'SingleStageDetector'
    assert not hasattr(used, 'teacher_model')
    report = verify(used, reparameterize(used), [batch])
    assert report.complete, report.explain()
    assert {error.name.split('[')[0] for error in report.errors} == {
        'backbone', 'neck', 'output'}
    assert hasattr(model, 'teacher_model')  # left as it was


# --- models that are no detector ----------------------------------------------------


class Tutorial(BaseModel):
    """As MMEngine's first steps: positional arguments, and nothing in the mode `tensor`."""

    def __init__(self, predicts=lambda x, labels: (x, labels)):
        super().__init__()
        self.net = nn.Sequential(OREPAConv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
                                 nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.predicts = predicts

    def forward(self, imgs, labels, mode):
        x = self.net(imgs)
        if mode == 'loss':
            return {'loss': nn.functional.cross_entropy(x, labels)}
        if mode == 'predict':
            return self.predicts(x, labels)


@pytest.mark.parametrize(('predicts', 'outputs'), [
    (lambda x, labels: (x, labels), {'net', 'output[0]'}),
    (lambda x, labels: [dict(label=one.argmax()) for one in x], {'net'})])
@pytest.mark.parametrize('batch', [
    [torch.rand(2, 3, 8, 8), torch.tensor([0, 1])],
    dict(imgs=torch.rand(2, 3, 8, 8), labels=torch.tensor([0, 1]))], ids=['a list', 'by name'])
def test_a_model_without_extract_feat(batch, predicts, outputs):
    before = randomize(Tutorial(predicts))
    after = reparameterize(before)
    report = verify(before, after, [batch])
    assert report.complete, report.explain()
    assert {error.name for error in report.errors} == outputs
    after.net[0].weight.data.mul_(1.01)
    report = verify(before, after, [batch])
    assert {error.name for error in report.errors if not error.passed} == outputs


def deformed(conv, x, offset, mask):
    """By torchvision's operator, which wants offsets of the size that comes out."""
    height, width = (-(-size // stride) for size, stride in zip(x.shape[2:], conv.stride))
    return deform_conv2d(x, offset[..., :height, :width], conv.weight, conv.bias, conv.stride,
                         conv.padding, conv.dilation, mask[..., :height, :width])


def test_dyhead_expanded_computes_what_it_computed(monkeypatch):
    """Offsets of zero, which a block generates from branches that cancel."""
    if hasattr(import_module('mmcv._ext'), 'OPERATORS'):  # this mmcv has no such operator
        monkeypatch.setattr(ModulatedDeformConv2d, 'forward', deformed)
    cfg = get_config('mmdet::dyhead/atss_r50_fpn_dyhead_1x_coco.py').model
    cfg.backbone.update(depth=18, base_channels=8, init_cfg=None)
    fpn, dyhead = cfg.neck
    fpn.update(in_channels=[8, 16, 32, 64], out_channels=32)
    dyhead.update(in_channels=32, out_channels=32, num_blocks=2)
    cfg.bbox_head.update(in_channels=32, feat_channels=32)
    plain = built(cfg)
    batch, expanded = batch_for(plain), expand(plain)
    assert 'neck.1.dyhead_blocks.0.spatial_conv_offset' in dict(expanded.named_modules())
    for one, other in ((expanded, plain), (expanded, reparameterize(expanded))):
        report = verify(one, other, [batch])
        assert report.complete, report.explain()
