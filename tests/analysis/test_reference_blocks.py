"""The authors' way of squeezing, written a second time, equals ours."""

import copy

import pytest
import torch
from helpers import LAYERS, randomize, relative_error
from mmdet.models.backbones import ResNet
from torch import nn

from orepa_mm.analysis.reference_blocks import ReferenceConv2d, as_published
from orepa_mm.layers import DBBConv2d, OREPAConv1x1, OREPAConv2d, reparam_layers

CASES = {**LAYERS,
         '1x1 grouped': lambda **kw: OREPAConv1x1(4, 8, 1, groups=2, **kw),
         '1x1 narrower': lambda **kw: OREPAConv1x1(4, 3, 1, **kw),
         '5x5': lambda **kw: OREPAConv2d(4, 6, 5, padding=2, **kw)}


@pytest.mark.parametrize('case', CASES)
def test_equals_our_layers(case):
    layer = randomize(CASES[case](dtype=torch.float64))
    reference = ReferenceConv2d(layer)
    x = torch.randn(2, 4, 12, 10, dtype=torch.float64, requires_grad=True)
    results = []
    for module in (layer, reference):
        y = module(x)
        upstream = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(1))
        gradients = torch.autograd.grad((y * upstream).sum(), [x, *layer.parameters()],
                                        allow_unused=True)
        results.append([y, *gradients])
    assert len(results[0]) == len(list(layer.parameters())) + 2
    for ours, theirs in zip(*results):
        assert relative_error(ours, theirs) < 1e-10


def test_more_groups_have_twice_the_hidden_channels():
    layer = randomize(OREPAConv2d(16, 16, 3, padding=1, groups=8, dtype=torch.float64))
    assert relative_error(layer.weight, ReferenceConv2d(layer).kernel()) < 1e-10


def test_a_whole_network():
    ours = randomize(ResNet(50, base_channels=8, conv_cfg=dict(type='OREPA'))).double()
    theirs = as_published(copy.deepcopy(ours))
    ours.eval(), theirs.eval()
    x = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    for one, other in zip(ours(x), theirs(x)):
        assert relative_error(one, other) < 1e-9


def test_what_is_no_orepa_block():
    with pytest.raises(TypeError, match='DBBConv2d is no OREPA block'):
        ReferenceConv2d(DBBConv2d(4, 6, 3, padding=1))
    with pytest.raises(ValueError, match='zeros'):
        ReferenceConv2d(OREPAConv2d(4, 6, 3, padding=1, padding_mode='reflect'))
    model = as_published(nn.Sequential(DBBConv2d(4, 6, 3, padding=1)))
    assert len(list(reparam_layers(model))) == 1
    assert isinstance(model[0], DBBConv2d)
