"""Verification of whole detectors: which outputs are compared, and how closely."""

import pytest
import torch
from helpers import ROOT
from mmdet.registry import MODELS
from mmdet.testing import demo_mm_inputs
from mmdet.utils import register_all_modules
from mmengine.config import Config

from orepa_mm.reparam import reparameterize, verify

LIGHT = ROOT / 'configs' / 'faster_rcnn' / 'faster-rcnn_orepa-r18-light_fpn_400i_coco.py'


@pytest.fixture
def two_stage():
    register_all_modules(init_default_scope=True)
    cfg = Config.fromfile(LIGHT).model
    cfg.backbone.base_channels, cfg.neck.in_channels = 8, [8, 16, 32, 64]
    model = MODELS.build(cfg)
    model.init_weights()  # not at random: there must be proposals
    return model


def test_a_two_stage_detector_gets_the_same_proposals_in_both_forms(two_stage):
    batch = two_stage.data_preprocessor(demo_mm_inputs(2, [[3, 96, 128], [3, 128, 96]]), False)
    deployed = reparameterize(two_stage)
    report = verify(two_stage, deployed, [batch])
    assert report.passed
    # 5 levels of features, of scores and of boxes, and two outputs of the second stage
    names = {error.name for error in report.errors}
    assert {name.split('[')[0] for name in names} == {'features', 'rpn', 'roi'}
    assert len(names) == 17
    assert report.largest('float64').error < 1e-12
    assert report.complete, report.explain()
    assert report.dtypes() == dict.fromkeys(('features', 'rpn', 'roi'), ('float32', 'float64'))
    assert two_stage.training

    with torch.no_grad():
        deployed.roi_head.bbox_head.fc_reg.weight.mul_(1.01)
    failed = {error.name for error in verify(two_stage, deployed, [batch]).errors
              if not error.passed}
    assert failed == {'roi[1]'}
