"""Every registered backbone deploys to the stock network, with every option of it."""

import copy
import logging

import pytest
import torch
from helpers import needs_compiled, randomize, relative_error, vary_scales
from mmengine.registry import MODELS
from mmengine.runner import checkpoint as mmengine_checkpoint
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from orepa_mm.backbones import mixin
from orepa_mm.backbones.registration import PACKAGES
from orepa_mm.errors import CheckpointError
from orepa_mm.layers import reparam_layers
from orepa_mm.reparam import reparameterize, verify

NARROW = dict(depth=18, base_channels=8)
BOTTLENECK = dict(depth=50, base_channels=8)
DILATED = dict(strides=(1, 2, 1, 1), dilations=(1, 1, 2, 4))
DCN = dict(type='DCNv2', deform_groups=1, fallback_on_stride=False)
MMPRETRAIN = dict(out_indices=(0, 1, 2, 3))


def narrow_repvgg(width=0.125, **arch):
    return dict(type='OREPARepVGG', out_indices=(0, 1, 2, 3), arch={
        'num_blocks': [1, 2, 2, 1], 'width_factor': [width] * 4, 'group_layer_map': None,
        'se_cfg': None, **arch})


def online_repvgg(**arch):
    """With one BN per block."""
    return {**narrow_repvgg(**arch), 'conv_cfg': dict(type='OREPA', block='repvgg_online')}


CASES = {
    'r18': dict(type='mmdet.OREPAResNet', **NARROW),
    'r50': dict(type='mmdet.OREPAResNet', **BOTTLENECK),
    'resnext50': dict(type='mmdet.OREPAResNeXt', depth=50, base_channels=16, groups=4,
                      base_width=2),
    'dilated': dict(type='mmdet.OREPAResNet', **BOTTLENECK, **DILATED),
    'two stages': dict(type='mmdet.OREPAResNet', **NARROW, num_stages=2, strides=(1, 2),
                       dilations=(1, 1), out_indices=(0, 1)),
    'deep stem': dict(type='mmdet.OREPAResNet', **NARROW, deep_stem=True, avg_down=True),
    'deformable': dict(type='mmdet.OREPAResNet', **BOTTLENECK, dcn=DCN,
                       stage_with_dcn=(False, True, True, True)),
    'deformable resnext': dict(type='mmdet.OREPAResNeXt', depth=50, base_channels=16, groups=4,
                               base_width=2, stage_with_dcn=(False, False, False, True), dcn=DCN),
    'caffe style': dict(type='mmdet.OREPAResNet', **BOTTLENECK, style='caffe'),
    'dbb r18': dict(type='mmdet.DBBResNet', **NARROW),
    'dbb r50': dict(type='mmdet.DBBResNet', **BOTTLENECK, norm_eval=True),
    'dbb deformable': dict(type='mmdet.DBBResNet', **BOTTLENECK, dcn=DCN,
                           stage_with_dcn=(False, True, True, True)),
    'seg r18': dict(type='mmseg.OREPAResNet', **NARROW),
    'seg v1c r50 d8': dict(type='mmseg.OREPAResNetV1c', **BOTTLENECK, **DILATED,
                           contract_dilation=True, norm_cfg=dict(type='SyncBN')),
    'seg v1c r18 multi grid': dict(type='mmseg.OREPAResNetV1c', **NARROW, **DILATED,
                                   multi_grid=(1, 2)),
    'seg resnext50': dict(type='mmseg.OREPAResNeXt', depth=50, base_channels=16, groups=4,
                          base_width=2),
    'seg dbb r50 d8': dict(type='mmseg.DBBResNet', **BOTTLENECK, **DILATED,
                           contract_dilation=True, norm_cfg=dict(type='SyncBN')),
    'seg dbb v1c r18': dict(type='mmseg.DBBResNetV1c', **NARROW),
    'cls r18': dict(type='mmpretrain.OREPAResNet', **NARROW, **MMPRETRAIN, stem_channels=16),
    'cls r50': dict(type='mmpretrain.OREPAResNet', **BOTTLENECK, **MMPRETRAIN, stem_channels=8,
                    drop_path_rate=0.1),
    'cls cifar r18': dict(type='mmpretrain.OREPAResNet_CIFAR', **NARROW, **MMPRETRAIN),
    'cls cifar r50': dict(type='mmpretrain.OREPAResNet_CIFAR', **BOTTLENECK, **MMPRETRAIN),
    'cls v1c': dict(type='mmpretrain.OREPAResNetV1c', **BOTTLENECK, **MMPRETRAIN),
    'cls resnext50': dict(type='mmpretrain.OREPAResNeXt', depth=50, base_channels=16, groups=4,
                          width_per_group=2, **MMPRETRAIN),
    'cls dbb r18': dict(type='mmpretrain.DBBResNet', **NARROW, **MMPRETRAIN),
    'cls dbb cifar r18': dict(type='mmpretrain.DBBResNet_CIFAR', **NARROW, **MMPRETRAIN),
    'cls dbb deep stem': dict(type='mmpretrain.DBBResNet', **NARROW, **MMPRETRAIN,
                              deep_stem=True),
    'repvgg': narrow_repvgg(),
    'repvgg dilated': dict(**narrow_repvgg(), strides=(2, 2, 1, 1), dilations=(1, 1, 2, 4)),
    'repvgg grouped': narrow_repvgg(group_layer_map={2: 2, 4: 4}),
    'repvgg sync bn': dict(**narrow_repvgg(), norm_cfg=dict(type='SyncBN')),
    'repvgg pooling': dict(**narrow_repvgg(0.25), add_ppf=True),
    'repvgg online': online_repvgg(),
    'repvgg online dilated': dict(**online_repvgg(), strides=(2, 2, 1, 1), dilations=(1, 1, 2, 4)),
    'repvgg online grouped': online_repvgg(group_layer_map={2: 2, 4: 4}),
    'repvgg online sync bn': dict(**online_repvgg(), norm_cfg=dict(type='SyncBN')),
}


def case(name, *more):
    """As parameters; deformable convolutions are mmcv's own."""
    return pytest.param(name, *more, marks=needs_compiled if 'dcn' in CASES[name] else ())


def state(model):
    return {key: value.shape for key, value in model.state_dict().items()}


def stock_of(backbone, cfg):
    """The stock network, by the name that an exported config gives it."""
    stock = type(backbone).stock_cfg({key: cfg[key] for key in cfg if key != 'conv_cfg'})
    if '.' not in stock['type']:
        stock['type'] = f"{cfg['type'].partition('.')[0]}.{stock['type']}"
    return MODELS.build(stock)


def twin_of(backbone, cfg):
    """The stock network that people train, whose weights they have."""
    return MODELS.build({**cfg, 'type': 'mmpretrain.RepVGG'}) if 'RepVGG' in cfg['type'] else (
        stock_of(backbone, cfg))


SE = dict(se_cfg=dict(ratio=4, divisor=1))
EXCITED = {'repvgg squeeze and excite': narrow_repvgg(**SE),
           'repvgg online squeeze and excite': online_repvgg(**SE)}


def test_every_registered_backbone_is_a_case():
    cases = {cfg['type'] for cfg in CASES.values()}
    for package, (_, _, names) in PACKAGES.items():
        for name in names:
            assert name in cases or f'{package}.{name}' in cases


@pytest.mark.parametrize('name', map(case, CASES))
def test_deployed_form_is_the_stock_network(name):
    cfg = CASES[name]
    backbone = randomize(MODELS.build(cfg)).eval().double()
    stock = stock_of(backbone, cfg).double()
    stock.eval()
    assert isinstance(backbone, type(stock))
    deployed = reparameterize(backbone)
    assert not list(reparam_layers(deployed))
    assert state(deployed) == state(stock) == state(MODELS.build({**cfg, 'deploy': True}))
    stock.load_state_dict(deployed.state_dict(), strict=True)
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        expected = backbone(images)
        for found in (deployed(images), stock(images)):
            assert len(found) == len(expected)
            for one, other in zip(found, expected):
                assert relative_error(one, other) < 1e-8


@pytest.mark.parametrize('name', [
    case(name) for name, cfg in CASES.items() if 'DBB' not in cfg['type'] and 'online' not in name])
def test_it_starts_from_the_weights_of_its_stock_twin(name):
    """Plain weights, as `init_cfg` and `load_from` load them: stage by stage the same."""
    cfg = CASES[name]
    if 'ResNet' in cfg['type'] or 'ResNeXt' in cfg['type']:
        cfg = {**cfg, 'stem_channels': 24}  # a narrower 7 x 7 stem cannot generate every kernel
    backbone = MODELS.build(cfg)
    stock = randomize(twin_of(backbone, cfg)).double()
    backbone.double()
    stock.eval()
    backbone.eval()
    mmengine_checkpoint.load_state_dict(backbone, stock.state_dict(), strict=True)
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        for found, expected in zip(backbone(images), stock(images), strict=True):
            assert relative_error(found, expected) < 1e-8


#: Largest scale-relative difference of a whole backbone that computes in this type.
TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 0.06}


#: Every network computes in float32. The precision is a matter of its layers: one of each sort.
PRECISE = ['r18', 'resnext50', 'deformable', 'dbb r18', 'seg v1c r18 multi grid', 'cls r18',
           'repvgg', 'repvgg grouped', 'repvgg online', 'repvgg online grouped']


@pytest.mark.parametrize(('name', 'dtype'), [
    case(name, dtype)
    for dtype in TOLERANCES for name in (CASES if dtype == torch.float32 else PRECISE)])
def test_every_form_in_every_precision(name, dtype):
    """Plain and folded, computed as they are, and verified with what is stored of them."""
    torch.manual_seed(0)
    cfg = CASES[name]
    backbone = MODELS.build(cfg)
    backbone.init_weights()
    vary_scales(backbone)
    backbone.to(dtype).eval()
    images = torch.randn(2, 3, 64, 64, dtype=dtype)
    for fold_bn in (False, True) if name in PRECISE else (True,):  # plain as above
        deployed = reparameterize(backbone, fold_bn=fold_bn)
        assert all(p.dtype == dtype for p in deployed.parameters())
        assert not any(module.training for module in deployed.modules())
        left = [type(m) for m in deployed.modules() if isinstance(m, _BatchNorm)]
        if fold_bn and 'dcn' not in cfg:
            assert not left
        report = verify(backbone, deployed, images)
        assert report.passed, report.explain()
        if dtype == torch.bfloat16 and 'dcn' in cfg:
            continue  # mmcv has no deformable convolution in bfloat16 on a CPU
        with torch.no_grad():
            for one, other in zip(deployed(images), backbone(images), strict=True):
                assert relative_error(one, other) < TOLERANCES[dtype]


@pytest.mark.parametrize('name', ['r18', 'dbb r18', 'seg dbb r50 d8', 'repvgg',
                                  'cls dbb deep stem', 'repvgg online', *EXCITED])
def test_switch_to_deploy_keeps_flags_and_can_be_called_twice(name):
    cfg = {**CASES, **EXCITED}[name]
    backbone = randomize(MODELS.build(cfg)).eval().double()
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        expected = backbone(images)
        backbone.switch_to_deploy()
        backbone.switch_to_deploy()
        for one, other in zip(backbone(images), expected):
            assert relative_error(one, other) < 1e-10
    assert backbone.deploy
    assert not any(module.training for module in backbone.modules())
    assert all(p.requires_grad and p.dtype == torch.float64 for p in backbone.parameters())
    assert backbone.train().training
    again = MODELS.build({**cfg, 'deploy': True}).double().eval()
    again.load_state_dict(backbone.state_dict(), strict=True)
    with torch.no_grad():
        for one, other in zip(again(images), expected):
            assert relative_error(one, other) < 1e-10
    reparameterize(nn.Sequential(backbone))  # converted before: no error


@pytest.mark.parametrize('name', ['repvgg', 'repvgg online'])
def test_repvgg_is_fused_in_float64(name):
    """Each float32 kernel is the exact one, rounded once."""
    backbone = randomize(MODELS.build(CASES[name])).eval()
    exact = reparameterize(copy.deepcopy(backbone).double()).state_dict()
    for key, value in reparameterize(backbone).state_dict().items():
        assert torch.equal(value, exact[key].float()), key


def test_squeeze_and_excite_is_not_exported_without_it():
    """MMPretrain's deployed block leaves it out; what it computes is something else."""
    cfg = EXCITED['repvgg squeeze and excite']
    backbone = MODELS.build(cfg)
    with pytest.raises(ValueError, match='squeeze-and-excitation'):
        type(backbone).stock_cfg(cfg)
    with pytest.raises(ValueError, match='squeeze-and-excitation'):
        type(backbone).stock_cfg(dict(type='OREPARepVGG', arch='D2se'))


@pytest.mark.parametrize('name', ['dbb r18', *EXCITED])
def test_frozen_layers_stay_frozen(name):
    backbone = MODELS.build({**CASES, **EXCITED}[name])
    backbone.requires_grad_(False)
    assert not any(p.requires_grad for p in reparameterize(backbone).parameters())


def test_dbb_has_no_norm_behind_its_blocks():
    backbone = MODELS.build(CASES['dbb r50'])
    block = backbone.layer1[0]
    assert type(block.bn2) is nn.Identity
    assert isinstance(block.bn1, nn.BatchNorm2d)  # behind a plain 1 x 1
    assert isinstance(backbone.bn1, nn.BatchNorm2d)  # behind the plain stem
    norms = [m for m in backbone.train().modules() if isinstance(m, nn.BatchNorm2d)]
    assert not any(norm.training for norm in norms)  # norm_eval reaches the branches


@pytest.mark.parametrize('name', ['r18', 'dbb r18', 'repvgg', 'repvgg online'])
def test_checkpoint_of_the_other_form_is_refused(name):
    training = MODELS.build(CASES[name])
    deployed = MODELS.build({**CASES[name], 'deploy': True})
    with pytest.raises(CheckpointError, match='deploy form'):
        deployed.load_state_dict(training.state_dict(), strict=False)
    if 'repvgg' not in name:  # whose plain 3 x 3 has another name
        with pytest.raises(CheckpointError, match=r'training form.*plain convolution'):
            training.load_state_dict(deployed.state_dict(), strict=False)


@pytest.mark.parametrize('name', ['r18', 'dbb r18', 'repvgg', 'repvgg online', 'seg r18',
                                  'cls r18'])
def test_training_the_deployed_form_from_scratch_is_warned_of(name, monkeypatch):
    said = []
    monkeypatch.setattr(mixin, 'print_log', lambda *args: said.append(args))
    MODELS.build(CASES[name]).init_weights()
    assert not said
    MODELS.build({**CASES[name], 'deploy': True}).init_weights()
    (text, _, level), = said
    assert 'OREPA has no part in its training' in text
    assert level == logging.WARNING
