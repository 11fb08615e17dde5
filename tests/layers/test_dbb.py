"""The Diverse Branch Block against one convolution, and as a conv layer type."""

import copy

import pytest
import torch
from helpers import randomize, relative_error, train_one_step
from mmcv.cnn import ConvModule, build_conv_layer
from mmengine.model import initialize
from torch import nn

import orepa_mm  # noqa: F401  registers the conv layer type
from orepa_mm.layers import DBBConv2d
from orepa_mm.reparam import reparameterize

CASES = [
    dict(out_channels=8, padding=1), dict(out_channels=6, padding=1, stride=2),
    dict(out_channels=8, padding=3, dilation=3), dict(out_channels=8, padding='same'),
    dict(out_channels=8, padding=2, dilation=2, stride=2, groups=2),
    dict(out_channels=4, padding=1, groups=4, bias=False),
    dict(out_channels=8, padding=2, kernel_size=5, bias=False)]


@pytest.mark.parametrize('case', CASES)
def test_equals_one_convolution_in_eval_mode(case):
    layer = randomize(DBBConv2d(4, **{'kernel_size': 3, **case})).double().eval()
    x = torch.randn(2, 4, 13, 11, dtype=torch.float64)
    with torch.no_grad():
        expected = layer(x)
        conv = reparameterize(layer)
        assert type(conv) is nn.Conv2d
        assert relative_error(conv(x), expected) < 1e-10
        assert relative_error(layer.squeeze(), conv.weight) < 1e-10
        fused_anew = copy.deepcopy(layer)
        fused_anew.dbb_avg.avgbn.running_mean.add_(1)  # the border value must follow
        assert relative_error(reparameterize(fused_anew)(x), fused_anew(x)) < 1e-10


def test_train_mode_uses_the_statistics_of_the_batch():
    layer = randomize(DBBConv2d(4, 4, 3, padding=1, bias=False)).train()
    before = layer.dbb_origin.bn.running_mean.clone()
    train_one_step(layer)
    assert not torch.equal(layer.dbb_origin.bn.running_mean, before)
    assert all(p.grad is not None for p in layer.parameters())


def test_identity_based_branch_starts_at_the_identity():
    layer = DBBConv2d(4, 8, 3, padding=1)
    assert layer.dbb_1x1_kxk.idconv1.weight.abs().max() == 0
    before = copy.deepcopy(layer.state_dict())
    initialize(nn.Sequential(layer), dict(type='Constant', layer='Conv2d', val=7))
    layer.init_weights()
    assert all(torch.equal(before[key], value) for key, value in layer.state_dict().items())
    assert layer.dbb_origin.conv.weight.std() > 0


def test_built_on_the_meta_device_and_loaded(x):
    """The identity is not in the file: it is made where the parameters come."""
    source = randomize(DBBConv2d(4, 8, 3, padding=1)).eval()
    for assign in (True, False):
        layer = DBBConv2d(4, 8, 3, padding=1, device='meta').eval()
        layer = layer if assign else layer.to_empty(device=x.device)
        layer.load_state_dict(source.state_dict(), strict=True, assign=assign)
        assert torch.equal(layer(x), source(x))


def test_it_has_no_weight_that_could_be_read_without_its_bias_or_written():
    """Rules of initialisation go by `hasattr`; who reads a kernel without a bias is told."""
    layer = DBBConv2d(4, 8, 3, padding=1).eval()
    assert not hasattr(layer, 'weight')
    with pytest.raises(AttributeError, match='comes with a bias'):
        nn.init.zeros_(layer.weight)
    with pytest.raises(TypeError, match='no linear function'):
        layer.set_kernel(torch.zeros(8, 4, 3, 3))
    module = ConvModule(4, 8, 3, padding=1, conv_cfg=dict(type='DBB'), norm_cfg=dict(type='BN'),
                        efficient_conv_bn_eval=True)
    initialize(module, dict(type='Normal', layer='Linear', std=1.0, override=dict(
        type='Normal', name='conv', std=1.0)))  # skips it
    with pytest.raises(AttributeError, match='comes with a bias'):
        module.eval()(torch.randn(1, 4, 8, 8))


@pytest.mark.parametrize(('arguments', 'message'), [
    (dict(kernel_size=3, padding=0), 'padding=0'), (dict(kernel_size=1), 'larger than 1 x 1'),
    (dict(kernel_size=3, padding=1, dilation=2), 'dilation=2'),
    (dict(kernel_size=3, padding=1, padding_mode='reflect'), 'reflect'),
    (dict(kernel_size=3, padding=1, norm_layer=lambda n: nn.GroupNorm(1, n)), 'GroupNorm'),
    (dict(kernel_size=3, padding=1, norm_layer=lambda n: nn.BatchNorm2d(n, affine=False)),
     'affine=False'),
    (dict(kernel_size=3, padding=1,
          norm_layer=lambda n: nn.BatchNorm2d(n, track_running_stats=False)),
     'track_running_stats=False')])
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        DBBConv2d(4, 4, **arguments)


def test_as_a_conv_layer_type():
    cfg = dict(type='DBB', norm_cfg=dict(type='SyncBN', requires_grad=False))
    layer = build_conv_layer(cfg, 4, 8, 3, padding=1, bias=False)
    norms = [m for m in layer.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert len(norms) == 6
    assert all(isinstance(norm, nn.SyncBatchNorm) and not norm.weight.requires_grad
               for norm in norms)
    assert type(build_conv_layer(cfg, 4, 8, 1)) is nn.Conv2d
    assert type(build_conv_layer(cfg, 4, 8, 7, padding=3)) is nn.Conv2d
    module = ConvModule(4, 8, 3, padding=1, conv_cfg=dict(type='DBB'), act_cfg=None)
    randomize(module).eval()
    x = torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        assert relative_error(reparameterize(module)(x), module(x)) < 1e-5
