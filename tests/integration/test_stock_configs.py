"""Stock configs of all three packages, expanded as they are: `type='Expanded'`, full width.

A few of them run with the suite. All of them, with a line of numbers each, a few minutes:

    python -m pytest -m long -s tests/integration/test_stock_configs.py | grep "^|"
"""

import copy

import pytest
import torch
from batches import tiny_batch
from mmengine.hub import get_config
from mmengine.logging import MessageHub
from mmengine.registry import MODELS, init_default_scope
from torch import nn

from orepa_mm import reparameterize, verify
from orepa_mm.layers import reparam_layers

#: Configs and the size of the images.
QUICK = {
    'mmdet::yolox/yolox_tiny_8xb8-300e_coco.py': 128,
    'mmseg::fastscnn/fast_scnn_8xb4-160k_cityscapes-512x1024.py': 64,
    'mmpretrain::mobilenet_v2/mobilenet-v2_8xb32_in1k.py': 64,
}
LONG = {
    'mmdet::rtmdet/rtmdet_tiny_8xb32-300e_coco.py': 128,
    'mmdet::rtmdet/rtmdet-ins_tiny_8xb32-300e_coco.py': 128,
    'mmdet::yolox/yolox_s_8xb8-300e_coco.py': 128,
    'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py': 128,
    'mmdet::cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco.py': 128,
    'mmdet::hrnet/faster-rcnn_hrnetv2p-w18-1x_coco.py': 128,
    'mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py': 320,  # 900 queries of as many places
    'mmdet::mask2former/mask2former_r50_8xb2-lsj-50e_coco.py': 128,
    'mmdet::fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py': 128,
    'mmdet::gfl/gfl_r50_fpn_1x_coco.py': 128,
    'mmdet::solov2/solov2_r50_fpn_1x_coco.py': 128,
    'mmdet::convnext/cascade-mask-rcnn_convnext-t-p4-w7_fpn_4conv1fc-giou_amp-ms-crop-3x_coco.py':
        128,
    'mmseg::bisenetv2/bisenetv2_fcn_4xb4-160k_cityscapes-1024x1024.py': 64,
    'mmseg::segnext/segnext_mscan-t_1xb16-adamw-160k_ade20k-512x512.py': 64,
    'mmseg::stdc/stdc1_4xb12-80k_cityscapes-512x1024.py': 128,
    'mmseg::convnext/convnext-tiny_upernet_8xb2-amp-160k_ade20k-512x512.py': 128,
    'mmseg::hrnet/fcn_hr18_4xb2-40k_cityscapes-512x1024.py': 64,
    'mmseg::deeplabv3plus/deeplabv3plus_r50-d8_4xb2-40k_cityscapes-512x1024.py': 64,
    'mmseg::mask2former/mask2former_r50_8xb2-90k_cityscapes-512x1024.py': 128,
    'mmpretrain::resnet/resnet50_8xb32_in1k.py': 64,
    'mmpretrain::convnext/convnext-tiny_32xb128_in1k.py': 64,
    'mmpretrain::efficientnet/efficientnet-b0_8xb32_in1k.py': 64,
    'mmpretrain::mobilenet_v3/mobilenet-v3-small_8xb128_in1k.py': 64,
    'mmpretrain::shufflenet_v2/shufflenet-v2-1x_16xb64_in1k.py': 64,
    'mmpretrain::resnext/resnext50-32x4d_8xb32_in1k.py': 64,
}


def without_downloads(cfg):
    """Leave out what would be downloaded, everywhere in a model's config."""
    if isinstance(cfg, dict):
        for key, value in cfg.items():
            if key == 'pretrained' or (
                    key == 'init_cfg' and isinstance(value, dict)
                    and value.get('type') == 'Pretrained'):
                cfg[key] = None
            without_downloads(value)
    elif isinstance(cfg, list | tuple):
        for value in cfg:
            without_downloads(value)


@pytest.fixture(autouse=True)
def device():
    """On the CPU alone: random numbers are compared."""


def build(cfg):
    torch.manual_seed(0)
    model = MODELS.build(copy.deepcopy(cfg))
    torch.manual_seed(1)
    model.init_weights()
    return model.train()


def loss_of(model, batch):
    """The training loss, with the same random numbers for each model."""
    torch.manual_seed(1)
    samples = copy.deepcopy(batch['data_samples'])  # some heads change them
    losses, _ = model.parse_losses(model.loss(batch['inputs'], samples))
    return losses.item()


def losses(batch, *models):
    return [loss_of(copy.deepcopy(model), batch) for model in models]


@pytest.mark.parametrize(('name', 'size'), [
    *QUICK.items(), *(pytest.param(*case, marks=pytest.mark.long) for case in LONG.items())])
def test_expanded_computes_what_the_stock_model_computes(name, size):
    cfg = get_config(name)
    scope = name.partition('::')[0]
    init_default_scope(scope)
    without_downloads(cfg.model)
    if scope == 'mmpretrain':  # beside the model
        cfg.model.data_preprocessor = {**cfg.data_preprocessor, 'type': 'ClsDataPreprocessor'}
    if cfg.model.get('rpn_head'):
        cfg.model.test_cfg.rpn.max_per_img = 20  # a thousand proposals in float64 take minutes
    stock = build(cfg.model)
    ours = build({**cfg.model, 'type': 'Expanded', 'model_type': cfg.model.type})
    back = reparameterize(ours)
    convs = [module for module in stock.modules() if isinstance(module, nn.Conv2d)]
    layers = list(reparam_layers(ours))
    assert type(ours) is type(stock)
    assert not list(reparam_layers(back))
    assert {k: v.shape for k, v in back.state_dict().items()} == {
        k: v.shape for k, v in stock.state_dict().items()}
    MessageHub.get_current_instance().update_info('iter', 0)  # YOLOX's preprocessor reads it
    batch = tiny_batch(scope, size)
    if scope == 'mmdet' and 'with_mask' not in str(cfg.train_pipeline):
        for sample in batch['data_samples']:
            del sample.gt_instances.masks
    batch = stock.data_preprocessor(batch, True)
    with torch.no_grad():
        stock_loss, expanded_loss, back_loss = losses(batch, stock, ours, back)
        report = verify(ours.eval(), back.eval(), batch)
    largest = report.largest('float32')
    print(f'| {name} | {len(layers)} of {len(convs)} | {stock_loss:.6g} | {expanded_loss:.6g} | '
          f'{back_loss:.6g} | {abs(expanded_loss / stock_loss - 1):.0e} | {largest.error:.1e} |')
    assert len(layers) > 0.3 * len(convs)
    assert report.passed, report.explain()
    for found in (expanded_loss, back_loss):
        assert found == pytest.approx(stock_loss, rel=1e-3)
