"""`conv_cfg=dict(type='OREPA')` on stock modules that nobody adapted."""

import pytest
import torch
from helpers import needs_compiled, randomize, relative_error, vary_scales
from mmengine.registry import MODELS
from torch import nn

from orepa_mm.layers import reparam_layers
from orepa_mm.reparam import reparameterize

OREPA = dict(type='OREPA')
HRNET = {f'stage{n}': dict(
    num_modules=1, num_branches=n, block='BOTTLENECK' if n == 1 else 'BASIC',
    num_blocks=(1,) * n, num_channels=tuple(8 * 2**i for i in range(n)) if n > 1 else (16,))
    for n in range(1, 5)}

BACKBONES = {
    'HRNet': dict(type='mmdet.HRNet', extra=HRNET),
    'RegNet': dict(type='mmdet.RegNet', arch=dict(
        w0=8, wa=12.0, wm=2.0, group_w=8, depth=6, bot_mul=1.0)),
    'Res2Net': dict(type='mmdet.Res2Net', depth=50, scales=4, base_width=4, base_channels=8,
                    stem_channels=8),
    'ResNet with dcn': dict(  # deformable stages refuse any conv_cfg in the stock class
        type='mmdet.OREPAResNet', depth=50, base_channels=8,
        dcn=dict(type='DCNv2', deform_groups=1, fallback_on_stride=False),
        stage_with_dcn=(False, False, True, True)),
    'ResNet with dcn in no stage': dict(type='mmdet.ResNet', depth=50, base_channels=8),
    'seg HRNet': dict(type='mmseg.HRNet', extra=HRNET),
    'VGG of mmpretrain': dict(type='mmpretrain.VGG', depth=11, norm_cfg=dict(type='BN')),
}


def train_one_step(model, forward):
    """Every branch of every OREPA layer gets a gradient, and the layer moves."""
    vary_scales(model)  # no layer is shut off by a scale of zero behind it
    model.double().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    sum(tensor.square().mean() for tensor in forward(model)).backward()
    layers = list(reparam_layers(model))
    assert layers
    for layer in layers:
        assert all(p.grad is not None for p in layer.parameters())
    before = [layer.weight.detach() for layer in layers]
    optimizer.step()
    for layer, old in zip(layers, before):
        assert not torch.equal(layer.weight, old)


def assert_deploys(model, forward):
    randomize(model).eval()
    deformable = [m for m in model.modules() if 'Deform' in type(m).__name__]
    with torch.no_grad():
        expected = forward(model)
        deployed = reparameterize(model)
        found = forward(deployed)
    assert not list(reparam_layers(deployed))
    assert len([m for m in deployed.modules() if 'Deform' in type(m).__name__]) == len(deformable)
    assert len(found) == len(expected)
    for one, other in zip(found, expected):
        assert relative_error(one, other) < 1e-8
    return deployed


@pytest.mark.parametrize('name', [
    pytest.param(name, marks=needs_compiled if 'dcn' in cfg else ())
    for name, cfg in BACKBONES.items()])
def test_backbone(name):
    cfg = BACKBONES[name]
    model = MODELS.build(cfg if 'OREPA' in cfg['type'] else {**cfg, 'conv_cfg': OREPA})
    model.init_weights()
    images = torch.randn(2, 3, 64, 64)

    def forward(backbone):
        return backbone(images.to(next(backbone.parameters())))

    train_one_step(model, forward)
    deployed = assert_deploys(model, forward)
    if 'OREPA' not in cfg['type']:
        stock = MODELS.build(cfg)
        stock.load_state_dict(deployed.state_dict(), strict=True)
        assert not any('Deform' in type(m).__name__ for m in stock.modules())
    elif 'dcn' in cfg:
        assert any('Deform' in type(m).__name__ for m in deployed.modules())


def test_deformable_stages_of_the_stock_class_refuse():
    with pytest.raises(AssertionError, match='conv_cfg must be None for DCN'):
        MODELS.build({**BACKBONES['ResNet with dcn'], 'type': 'mmdet.ResNet', 'conv_cfg': OREPA})


@pytest.mark.parametrize('options', [{}, dict(norm_cfg=dict(type='BN'))], ids=['bias', 'norm'])
def test_fpn(options):
    neck = MODELS.build(dict(type='mmdet.FPN', in_channels=[8, 16], out_channels=8, num_outs=3,
                             add_extra_convs='on_output', conv_cfg=OREPA, **options))
    neck.init_weights()
    features = [torch.randn(2, 8, 16, 16), torch.randn(2, 16, 8, 8)]

    def forward(neck):
        return neck([f.to(next(neck.parameters())) for f in features])

    train_one_step(neck, forward)
    assert_deploys(neck, forward)


@pytest.mark.parametrize('kind', ['RetinaHead', 'RetinaSepBNHead'])
def test_retina_head_shared_by_all_levels(kind):
    """RetinaHead runs on every level; RetinaSepBNHead shares convolutions under several names."""
    options = dict(num_ins=3) if kind == 'RetinaSepBNHead' else {}
    head = MODELS.build(dict(
        type=f'mmdet.{kind}', num_classes=3, in_channels=8, feat_channels=8, stacked_convs=2,
        conv_cfg=OREPA, norm_cfg=dict(type='BN'), **options))
    head.init_weights()
    features = [torch.randn(2, 8, size, size) for size in (16, 8, 4)]

    def forward(head):
        classes, boxes = head([f.to(next(head.parameters())) for f in features])
        return [*classes, *boxes]

    train_one_step(head, forward)
    deployed = assert_deploys(head, forward)
    if kind == 'RetinaSepBNHead':
        assert deployed.cls_convs[0][1].conv is deployed.cls_convs[2][1].conv
        assert type(deployed.cls_convs[0][1].conv) is nn.Conv2d
