"""Other people's conversions on our layers, and ours on other people's blocks."""

import copy

import pytest
import torch
import torch.distributed as dist
from helpers import randomize, relative_error
from mmcv.cnn import build_conv_layer
from mmdet.models.necks import FPN
from mmengine.registry import MODELS
from mmpretrain.models.backbones import MobileOne, RepVGG
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from orepa_mm.layers import OREPAConv1x1, OREPAConv2d
from orepa_mm.reparam import is_training_form, reparameterize

NARROW = dict(num_blocks=[1, 1, 1, 1], width_factor=[0.125] * 4, group_layer_map=None,
              se_cfg=None, stem_channels=8)
MOBILE = dict(num_blocks=[1, 1, 1, 1], width_factor=[0.125] * 4, num_conv_branches=[2] * 4,
              num_se_blocks=[0] * 4)


def networks(conv_cfg):
    return {'RepVGG': lambda: RepVGG(NARROW, conv_cfg=conv_cfg, out_indices=(0, 1, 2, 3)),
            'MobileOne': lambda: MobileOne(MOBILE, conv_cfg=conv_cfg, out_indices=(0, 1, 2, 3))}


def outputs(model, x):
    with torch.no_grad():
        y = model(x)
    return y if isinstance(y, tuple) else (y,)


@pytest.fixture
def images():
    return torch.randn(2, 3, 32, 32)


@pytest.mark.parametrize('name', ['RepVGG', 'MobileOne'])
def test_their_own_conversion_of_blocks_with_our_layers(name, images):
    """They write `conv.weight.data = kernel`, which must reach the branches."""
    model = randomize(networks(dict(type='OREPA'))[name]())
    model.eval()
    expected = outputs(model, images)
    model.switch_to_deploy()
    model.eval()
    for one, other in zip(outputs(model, images), expected):
        assert relative_error(one, other) < 1e-4
    assert is_training_form(model)  # they built layers of ours again
    for one, other in zip(outputs(reparameterize(model), images), expected):
        assert relative_error(one, other) < 1e-4


@pytest.mark.parametrize('conv_cfg', [None, dict(type='OREPA')])
@pytest.mark.parametrize('name', ['RepVGG', 'MobileOne'])
def test_blocks_that_re_parameterize_themselves(name, conv_cfg, images):
    """Plain ones beside our layers, and ones that hold our layers: one convolution each."""
    foreign = networks(conv_cfg)[name]()
    model = nn.Sequential(OREPAConv2d(3, 3, 3, padding=1), foreign)
    randomize(model)
    nn.Module.train(model, False)
    foreign.stage_1[0].requires_grad_(False) if name == 'RepVGG' else None
    expected = outputs(model, images)
    deployed = reparameterize(model)
    assert not is_training_form(deployed)
    assert not [m for m in deployed.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert not any(m.training for m in deployed.modules())
    assert all(p.dtype == torch.float32 for p in deployed.parameters())
    if name == 'RepVGG':
        assert not any(p.requires_grad for p in deployed[1].stage_1[0].parameters())
    last = deployed[1].stage_2 if name == 'RepVGG' else deployed[1].stage1
    assert all(p.requires_grad for p in last.parameters())
    if conv_cfg is None:  # summed in float64, rounded once
        exact = copy.deepcopy(foreign).double()
        exact.switch_to_deploy()
        assert all(torch.equal(deployed[1].state_dict()[key], value.float())
                   for key, value in exact.state_dict().items())
    for one, other in zip(outputs(deployed, images), expected):
        assert relative_error(one, other) < 1e-5
    for one, other in zip(outputs(reparameterize(deployed), images), expected):
        assert relative_error(one, other) < 1e-5


def reparameterize_as_timm(model):
    """The walk of timm's `reparameterize_model`, by its description."""
    for name, child in model.named_children():
        if hasattr(child, 'fuse'):
            setattr(model, name, child.fuse())
        elif hasattr(child, 'switch_to_deploy'):
            child.switch_to_deploy()
        reparameterize_as_timm(child)


def test_a_walker_that_asks_for_fuse(images):
    model = randomize(nn.Sequential(OREPAConv2d(3, 4, 3), nn.Sequential(OREPAConv1x1(4, 6)))).eval()
    expected = outputs(model, images)
    reparameterize_as_timm(model)
    assert not is_training_form(model)
    assert relative_error(outputs(model, images)[0], expected[0]) < 1e-5


def test_a_walker_that_only_calls_switch_to_deploy_is_told():
    model = nn.Sequential(OREPAConv2d(3, 4, 3))
    walked = [module for module in model.modules() if hasattr(module, 'switch_to_deploy')]
    assert walked == [model[0]]
    with pytest.raises(RuntimeError, match=r'orepa_mm\.reparameterize'):
        model[0].switch_to_deploy()


def test_dbb_before_a_norm_gives_the_stock_layers(images):
    """A block's bias goes into the BN behind it: the stock neck has none."""
    options = dict(in_channels=[3], out_channels=4, num_outs=1, norm_cfg=dict(type='BN'))
    neck = randomize(FPN(**options, conv_cfg=dict(type='DBB')))
    neck.eval()
    expected = neck([images])[0]
    deployed = reparameterize(neck)
    stock = FPN(**options)
    stock.load_state_dict(deployed.state_dict(), strict=True)
    stock.eval()
    assert relative_error(stock([images])[0], expected) < 1e-5


def test_dbb_shared_by_two_norms_and_by_none():
    """Each norm behind a shared block gets its bias; where one use has no norm, it stays."""
    class Heads(nn.Module):
        def __init__(self, second):
            super().__init__()
            conv = build_conv_layer(dict(type='DBB'), 4, 4, 3, padding=1, bias=False)
            self.one = nn.Sequential(conv, nn.BatchNorm2d(4))
            self.two = nn.Sequential(conv, second)

        def forward(self, x):
            return self.one(x), self.two(x)

    x = torch.randn(2, 4, 8, 8)
    for second in (nn.BatchNorm2d(4), nn.ReLU()):
        model = randomize(Heads(second)).eval()
        deployed = reparameterize(model)
        assert (deployed.one[0].bias is None) == isinstance(second, nn.BatchNorm2d)
        for one, other in zip(outputs(deployed, x), outputs(model, x)):
            assert relative_error(one, other) < 1e-5


def test_channels_last_blocks_stay_so():
    model = MODELS.build(dict(type='mmpretrain.OREPARepVGG', arch=NARROW))
    deployed = reparameterize(model.to(memory_format=torch.channels_last))
    for conv in deployed.modules():
        if isinstance(conv, nn.Conv2d):
            assert conv.weight.is_contiguous(memory_format=torch.channels_last)


def test_sharded_models_are_refused_untouched(tmp_path):
    """FSDP2 keeps the model's class: its parameters are DTensors."""
    dist.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    try:
        model = nn.Sequential(OREPAConv2d(3, 4, 3), nn.BatchNorm2d(4))
        fully_shard(model, mesh=init_device_mesh('cpu', (1,)))
        before = copy.copy(model._modules)
        with pytest.raises(ValueError, match='spread over processes'):
            reparameterize(model, inplace=True)
        assert model._modules == before
    finally:
        dist.destroy_process_group()
