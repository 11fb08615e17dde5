"""Detectors that hold detectors: loaded, validated, and deployed as the one that predicts."""

import copy

import pytest
import torch
from helpers import ROOT, vary_scales
from mmdet.registry import MODELS
from mmdet.testing import demo_mm_inputs
from mmdet.utils import register_all_modules
from mmengine import Config
from mmengine.hooks import CheckpointHook
from mmengine.hub import get_config
from mmengine.runner import load_checkpoint
from tiny_runs import config

from orepa_mm.checkpoints import load_weights
from orepa_mm.datasets import make_shapes_coco
from orepa_mm.engine import build_runner, reparam_test_hook
from orepa_mm.export import deploy_config, save_deployed
from orepa_mm.export.stock import used_detector
from orepa_mm.layers import reparam_layers
from orepa_mm.reparam import reparameterize, verify
from orepa_mm.workflow import expand_checkpoint, reparameterize_checkpoint

LIGHT = ROOT / 'configs' / 'retinanet' / 'retinanet_orepa-r18-light_fpn_400i_coco.py'
SEMI = 'soft_teacher/soft-teacher_faster-rcnn_r50-caffe_fpn_180k_semi-0.1-coco.py'
DISTILLED = {'LD': 'ld/ld_r18-gflv1-r101_fpn_1x_coco.py',
             'LAD': 'lad/lad_r50-paa-r101_fpn_2xb8_coco_1x.py'}
CONFIG = f'''
_base_ = '{LIGHT}'
detector = _base_.model
detector.backbone.base_channels = 32
detector.neck.update(in_channels=[32, 64, 128, 256], out_channels=16)
detector.bbox_head.update(in_channels=16, feat_channels=16, stacked_convs=1)
own = dict(type='DetDataPreprocessor', mean=[100.0] * 3, std=[50.0] * 3, pad_size_divisor=32)
model = dict(
    _delete_=True, type='SemiBaseDetector', detector=detector,
    data_preprocessor=dict(type='MultiBranchDataPreprocessor', data_preprocessor=own),
    semi_train_cfg=dict(freeze_teacher=True), semi_test_cfg=dict(predict_on='teacher'))
val_cfg = dict(type='TeacherStudentValLoop', _delete_=True)
val_dataloader = dict(num_workers=0, persistent_workers=False)
test_dataloader = dict(num_workers=0, persistent_workers=False)
custom_hooks = [dict(type='MeanTeacherHook'),
                dict(type='ReparamTestHook', stop_on_difference=True, verify_batches=2)]
'''


@pytest.fixture(autouse=True)
def _mmdet_scope():
    register_all_modules(init_default_scope=True)


def small(cfg, kind='OREPAResNet'):
    cfg.update(type=kind, depth=18, base_channels=32, init_cfg=None)
    return cfg


def soft_teacher(predict_on='teacher'):
    cfg = get_config(f'mmdet::{SEMI}')
    small(cfg.model.detector.backbone)
    cfg.model.detector.neck.update(in_channels=[32, 64, 128, 256], out_channels=16)
    cfg.model.detector.rpn_head.update(in_channels=16, feat_channels=16)
    cfg.model.detector.roi_head.bbox_head.update(in_channels=16, fc_out_channels=16)
    cfg.model.detector.roi_head.bbox_roi_extractor.out_channels = 16
    cfg.model.semi_test_cfg.predict_on = predict_on
    return cfg


def distilled(name):
    cfg = get_config(f'mmdet::{DISTILLED[name]}')
    for prefix in ('', 'teacher_'):
        if f'{prefix}backbone' in cfg.model:
            small(cfg.model[f'{prefix}backbone'])
            cfg.model[f'{prefix}neck'].in_channels = [32, 64, 128, 256]
    cfg.model.teacher_ckpt = None
    if 'teacher_config' in cfg.model:
        cfg.model.teacher_config = get_config('mmdet::gfl/gfl_r50_fpn_1x_coco.py')
        small(cfg.model.teacher_config.model.backbone).frozen_stages = -1
        cfg.model.teacher_config.model.neck.in_channels = [32, 64, 128, 256]
    return cfg


def trained(cfg):
    torch.manual_seed(0)
    model = MODELS.build(copy.deepcopy(cfg.model))
    model.init_weights()
    vary_scales(model)
    return model


@pytest.mark.parametrize(('made', 'kind'), [
    (lambda: soft_teacher(), 'FasterRCNN'), (lambda: soft_teacher('student'), 'FasterRCNN'),
    (lambda: distilled('LD'), 'SingleStageDetector'),
    (lambda: distilled('LAD'), 'SingleStageDetector')],
    ids=['teacher', 'student', 'LD', 'LAD'])
def test_the_deployed_config_is_that_of_the_one_detector(tmp_path, made, kind):
    """It names no teacher, no student and no checkpoint, and builds what is saved beside it."""
    cfg = made()
    model, stock = trained(cfg), deploy_config(cfg)
    assert stock.model.type == kind
    for word in ('teacher', 'student', 'Teacher', 'OREPA', 'http'):
        assert word not in str(stock.model)
        assert not [key for key in stock if word in key]
        assert word not in str([stock.get('custom_hooks'), stock.val_cfg, stock.train_dataloader
                                if 'train_dataloader' in stock else None])
    used = used_detector(model)
    weights, written = save_deployed(reparameterize(used), stock, tmp_path, {'form': 'plain'})
    built = MODELS.build(Config.fromfile(written).model)
    load_weights(built, weights)
    batch = used.data_preprocessor(demo_mm_inputs(1, [[3, 64, 64]]), False)
    report = verify(used, built, [batch])
    assert report.passed, report.explain()
    assert not report.not_run


@pytest.mark.parametrize('form', ['plain', 'training'])
def test_one_detector_is_loaded_as_teacher_and_as_student(tmp_path, form):
    """As MMDetection does with plain ones; what is plain is expanded."""
    cfg = soft_teacher()
    detector = copy.deepcopy(cfg.model.detector)
    if form == 'plain':
        small(detector.backbone, 'ResNet')
    source = trained(Config(dict(model=detector)))
    torch.save({'state_dict': source.state_dict(), 'meta': {}}, tmp_path / 'one.pth')
    model = trained(cfg)
    load_checkpoint(model, str(tmp_path / 'one.pth'), map_location='cpu')
    batch = model.data_preprocessor(demo_mm_inputs(1, [[3, 64, 64]]), False)
    for part in (model.teacher, model.student):
        assert len(list(reparam_layers(part))) == 17
        report = verify(part, reparameterize(source) if form == 'training' else source, [batch])
        assert report.passed, report.explain()


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A data set, the config of a teacher and a student, and a checkpoint of both."""
    folder = tmp_path_factory.mktemp('semi')
    make_shapes_coco(folder / 'data', 1, 4, 64)
    (folder / 'config.py').write_text(CONFIG)
    register_all_modules(init_default_scope=True)
    model = trained(config(folder))
    for part in (model.teacher, model.student):
        torch.nn.init.constant_(part.bbox_head.retina_cls.bias, -1.0)  # let there be detections
    torch.save({'state_dict': model.state_dict(), 'meta': {}}, folder / 'both.pth')
    return folder


def test_a_validation_of_teacher_and_student_is_no_false_alarm(folder, monkeypatch):
    """The loop switches who predicts, of the model that it is given: here of the deployed form."""
    reports = []
    monkeypatch.setattr(reparam_test_hook, 'verify',
                        lambda *args: reports.append(verify(*args)) or reports[-1])
    cfg = config(folder)
    cfg.load_from = str(folder / 'both.pth')
    runner = build_runner(cfg)
    runner._hooks = [hook for hook in runner.hooks if not isinstance(hook, CheckpointHook)]
    runner.val()  # stops on a difference
    assert len(reports) >= 2
    assert all(report.passed for report in reports)
    assert runner.model.semi_test_cfg['predict_on'] == 'teacher'


def test_the_whole_job_on_a_teacher_and_a_student(folder):
    report = reparameterize_checkpoint(config(folder), folder / 'both.pth', folder / 'deployed',
                                       num_images=2, latency_rounds=1)
    assert report['problems'] == report['warnings'] == []
    assert report['verification']['complete'], report['verification']['explanation']
    assert report['metrics']['training'] == report['metrics']['deployed']
    deployed = Config.fromfile(folder / 'deployed' / 'config.py')
    assert (deployed.model.type, deployed.val_cfg.type) == ('RetinaNet', 'ValLoop')
    assert deployed.model.data_preprocessor.std == [50.0] * 3

    # and back: the plain detector into both
    done = expand_checkpoint(config(folder), folder / 'deployed' / 'model.pth',
                             folder / 'expanded.pth', images=False)
    assert done.verification.passed
    model = MODELS.build(config(folder).model)
    load_weights(model, folder / 'expanded.pth')
