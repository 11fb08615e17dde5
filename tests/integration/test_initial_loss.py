"""Stock detectors with OREPA wherever it goes start where the stock ones start."""

import copy
import inspect
from pathlib import Path

import mmdet
import pytest
import torch
from batches import tiny_batch
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config

import orepa_mm  # noqa: F401  registers the conv layer type
from orepa_mm.layers import reparam_layers

CONFIGS = Path(mmdet.__file__).parent / '.mim' / 'configs'
SMALL = dict(backbone=dict(depth=18), neck=dict(in_channels=[64, 128, 256, 512]))
DETECTORS = {  # no norm in necks and heads, but for RTMDet
    'RetinaNet': ('retinanet/retinanet_r50_fpn_1x_coco.py', SMALL, 36),
    'Cascade R-CNN': ('cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco.py', SMALL, 28),
    'PAFPN': ('pafpn/faster-rcnn_r50_pafpn_1x_coco.py', SMALL, 34),
    'RTMDet': ('rtmdet/rtmdet_tiny_8xb32-300e_coco.py', {}, 57),
}


def put_orepa(cfg):
    """Give `conv_cfg` to every module of a model that takes one."""
    if isinstance(cfg, dict):
        found = MODELS.get(cfg['type']) if isinstance(cfg.get('type'), str) else None
        if inspect.isclass(found) and any(
                'conv_cfg' in inspect.signature(base.__init__).parameters
                for base in found.__mro__ if '__init__' in vars(base)):
            cfg['conv_cfg'] = dict(type='OREPA')
        for value in list(cfg.values()):
            put_orepa(value)
    elif isinstance(cfg, (list, tuple)):
        for value in cfg:
            put_orepa(value)


def initial_losses(cfg):
    torch.manual_seed(0)
    model = MODELS.build(cfg)
    model.init_weights()
    model.train()
    batch = tiny_batch('mmdet', 128)
    for sample in batch['data_samples']:
        del sample.gt_instances.masks
    batch = model.data_preprocessor(batch, True)
    with torch.no_grad():
        losses, _ = model.parse_losses(model.loss(batch['inputs'], batch['data_samples']))
    return losses.item(), len(list(reparam_layers(model)))


@pytest.fixture(autouse=True)
def _mmdet_scope():
    register_all_modules(init_default_scope=True)


@pytest.mark.parametrize('name', DETECTORS)
def test_initial_loss_is_that_of_the_stock_model(name):
    path, options, layers = DETECTORS[name]
    cfg = Config.fromfile(CONFIGS / path)
    cfg.merge_from_dict(dict(model=options))
    cfg.model.backbone.init_cfg = None
    ours = copy.deepcopy(cfg.model)
    put_orepa(ours)
    stock, none = initial_losses(cfg.model)
    found, count = initial_losses(ours)
    assert none == 0
    assert count == layers
    assert found == pytest.approx(stock, rel=0.2)
