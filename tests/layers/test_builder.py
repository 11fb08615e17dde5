"""`conv_cfg=dict(type='OREPA')` as OpenMMLab modules use it."""

import pytest
import torch
from helpers import randomize, relative_error
from mmcv.cnn import ConvModule, build_conv_layer
from torch import nn

import orepa_mm  # noqa: F401  registers the conv layer type
from orepa_mm.layers import OREPAConv1x1, OREPAConv2d, OREPAStemConv2d, build_orepa_conv
from orepa_mm.reparam import reparameterize


@pytest.mark.parametrize(('kernel_size', 'groups', 'kind'), [
    (1, 1, OREPAConv1x1), (3, 1, OREPAConv2d), (5, 1, OREPAConv2d), (7, 1, OREPAStemConv2d),
    (9, 1, OREPAStemConv2d), (1, 2, OREPAConv1x1), (7, 4, OREPAConv2d),
])
def test_block_by_kernel_size(kernel_size, groups, kind):
    layer = build_conv_layer(dict(type='OREPA', single_init=True), 4, 8, kernel_size, stride=2,
                             padding=kernel_size // 2, groups=groups, bias=False)
    assert type(layer) is kind
    assert (layer.stride, layer.padding, layer.groups) == (
        (2, 2), (kernel_size // 2,) * 2, groups)
    assert layer.bias is None
    vector = layer.weight0.vector if kind is OREPAStemConv2d else layer.vector
    assert vector[0].eq(1).all()
    assert vector[1:].eq(0).all()


def test_groups_by_position():
    assert type(build_orepa_conv(8, 8, 7, 1, 3, 1, 4)) is OREPAConv2d


def test_pointwise_can_be_left_plain():
    layer = build_conv_layer(dict(type='OREPA', pointwise=False, single_init=True), 4, 8, 1)
    assert type(layer) is nn.Conv2d
    layer = build_conv_layer(dict(type='OREPA', pointwise=False), 4, 8, 3)
    assert type(layer) is OREPAConv2d


@pytest.mark.parametrize('kernel_size', [2, (1, 7)])
def test_kernel_without_a_block_is_an_error(kernel_size):
    with pytest.raises(ValueError, match='odd square kernels'):
        build_conv_layer(dict(type='OREPA'), 4, 8, kernel_size)


def test_conv_module_trains_and_converts():
    torch.manual_seed(0)
    module = ConvModule(4, 8, 3, padding=1, conv_cfg=dict(type='OREPA'), norm_cfg=dict(type='BN'))
    assert isinstance(module.conv, OREPAConv2d)
    # an init rule for Conv2d must not have reached the branches
    assert module.conv.vector[:, 0].tolist() == [0.25, 0.25, 0.0, 0.5, 1.0, 0.5]
    x = torch.randn(2, 4, 8, 8)
    module(x).square().mean().backward()
    assert all(p.grad is not None for p in module.parameters())
    randomize(module).eval()
    deployed = reparameterize(module)
    assert type(deployed.conv) is nn.Conv2d
    assert relative_error(deployed(x), module(x)) < 1e-5
