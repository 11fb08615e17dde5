"""Any kernel can be put into a block; what stock code writes into `weight` gets there."""

import copy
import math

import pytest
import torch
from helpers import LAYERS, randomize, relative_error
from mmcv.cnn import ConvModule, build_conv_layer
from mmengine.model import BaseModule, ModuleList
from torch import nn

from orepa_mm.layers import OREPAConv1x1, OREPAConv2d, OREPAStemConv2d

WIDE_STEM = dict(in_channels=3, out_channels=24, kernel_size=7, padding=3)


def wide(case, **kwargs):
    """The layer of a case; the stem with channels enough for every 7 x 7 kernel."""
    return OREPAStemConv2d(**WIDE_STEM, **kwargs) if case == 'stem' else LAYERS[case](**kwargs)


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize('case', LAYERS)
def test_set_kernel_gives_exactly_that_kernel(case, dtype):
    layer = randomize(wide(case)).to(dtype)
    before = {name: p.clone() for name, p in layer.named_parameters()}
    kernel, bias = torch.randn(layer.weight.shape), torch.randn(layer.out_channels)
    missed = layer.set_kernel(kernel, bias)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
    assert missed < tolerance
    assert relative_error(layer.squeeze(torch.float64), kernel) < tolerance
    assert torch.equal(layer.bias, bias.to(dtype))
    changed = [name for name, p in layer.named_parameters() if not torch.equal(p, before[name])]
    assert len(changed) == 2, changed  # the origin branch and the bias


def test_a_small_scale_of_the_origin_is_enough():
    layer = OREPAConv2d(16, 16, 3, bias=False)
    nn.init.constant_(layer.vector[0].data, 1e-4)
    kernel = torch.randn(16, 16, 3, 3)
    layer.set_kernel(kernel)
    assert relative_error(layer.squeeze(torch.float64), kernel) < 1e-6


@pytest.mark.parametrize(('build', 'kernel', 'bias', 'message'), [
    (lambda: OREPAConv2d(4, 6, 3), (6, 4, 1, 1), None, r'of shape \(6, 4, 3, 3\)'),
    (lambda: OREPAConv2d(4, 6, 3, bias=False), (6, 4, 3, 3), 6, 'has no bias'),
    (lambda: OREPAConv2d(4, 6, 3), (6, 4, 3, 3), 5, r'bias of shape \(6,\)'),
    (lambda: OREPAStemConv2d(3, 8, 7), (8, 3, 7, 7), None, r'miss it by \d.*too narrow'),
])
def test_what_cannot_be_set_is_an_error_and_changes_nothing(build, kernel, bias, message):
    layer = build()
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(ValueError, match=message):
        layer.set_kernel(torch.randn(kernel), None if bias is None else torch.randn(bias))
    assert all(torch.equal(before[key], value) for key, value in layer.state_dict().items())


def test_zero_scales_and_values_that_are_not_finite():
    layer = OREPAConv2d(4, 6, 3)
    with torch.no_grad():
        layer.vector[0, 2] = 0
    with pytest.raises(ValueError, match='scale of its origin branch is zero'):
        layer.set_kernel(torch.randn(6, 4, 3, 3))
    kernel, before = torch.randn(6, 4, 3, 3), layer.weight[2].detach().clone()
    assert layer.set_kernel(kernel, strict=False) > 0.1
    assert torch.equal(layer.weight[2], before)  # that row alone stays
    assert relative_error(layer.weight[3:], kernel[3:]) < 1e-5
    layer.reset_parameters()
    with pytest.raises(ValueError, match='not finite'):
        layer.set_kernel(torch.full((6, 4, 3, 3), math.nan))


def test_a_narrow_stem_takes_the_nearest_kernel_that_it_can():
    layer, kernel = OREPAStemConv2d(3, 8, 7, bias=False), torch.randn(8, 3, 7, 7)
    missed = layer.set_kernel(kernel, strict=False)
    assert 0.05 < missed < 1
    error = (layer.weight - kernel).norm()
    with torch.no_grad():  # no small change of the last generator comes nearer
        for seed in range(20):
            other = copy.deepcopy(layer)
            step = torch.randn(8, 8, 3, 3, generator=torch.Generator().manual_seed(seed))
            other.weight2.weight_orepa_origin.add_(step * 1e-2)
            assert (other.weight - kernel).norm() > error


# --- what is written into `weight` --------------------------------------------------

WRITES = {
    'nn.init': lambda w: nn.init.constant_(w, 3.0),
    'nn.init that hands itself on': lambda w: nn.init.normal_(w, 1.0, 1e-9),
    'in place': lambda w: w.zero_().add_(1),
    '.data in place': lambda w: w.data.fill_(2),
    '.data an item': lambda w: w.data.__setitem__(slice(None), 2.0),
    '.data assigned': lambda w: setattr(w, 'data', torch.full(w.shape, 5.0)),
    'copy': lambda w: w.copy_(torch.arange(w.numel()).view(w.shape)),
    'out': lambda w: torch.ones(w.shape, out=w),
}


@pytest.mark.parametrize('mode', ['train', 'eval'])
@pytest.mark.parametrize('write', WRITES)
def test_a_write_reaches_the_branches(layer, write, mode):
    layer = getattr(layer, mode)()
    if isinstance(layer, OREPAStemConv2d):
        layer = randomize(OREPAStemConv2d(**WIDE_STEM))
    expected = nn.Parameter(torch.zeros(layer.weight.shape))
    with torch.no_grad():
        layer(torch.randn(1, layer.in_channels, 9, 9))  # in eval mode a kernel is kept
        WRITES[write](expected)
        WRITES[write](layer.weight)
    assert expected.abs().max() > 0.5
    assert relative_error(layer.weight, expected) < 1e-5
    assert relative_error(layer.to_conv2d().weight, expected) < 1e-5


PARTS = {
    'an index': lambda w: w[0].zero_(), 'an index of .data': lambda w: w.data[0].fill_(1),
    'a slice': lambda w: nn.init.ones_(w[:, :1]),
    'transposed': lambda w: w.transpose(2, 3).fill_(2),
    'a view as others': lambda w: nn.init.orthogonal_(w), 'flat': lambda w: w.flatten(1)[1].zero_(),
    'detached': lambda w: w.detach().mul_(3), 'unbind': lambda w: w.unbind()[1].zero_(),
    'chunk': lambda w: w.chunk(2)[1].fill_(2), 'iteration': lambda w: [r.fill_(4) for r in w],
    'foreach': lambda w: torch._foreach_mul_([w, torch.ones(1)], 2),
    'inplace=': lambda w: nn.functional.relu(w, inplace=True),
    'an operator': lambda w: torch.ops.aten.fill_.Scalar(w, 3.0),
    'a mask': lambda w: w.data.masked_fill_(w.data > 0, 1.0),
}


@pytest.mark.parametrize('write', PARTS)
def test_a_write_by_any_way_reaches_the_branches(write):
    """What a stock kernel would have become."""
    layer = randomize(OREPAConv2d(4, 6, 3))
    expected = nn.Parameter(layer.weight.detach().clone())
    with torch.no_grad():
        torch.manual_seed(1)
        PARTS[write](expected)
        torch.manual_seed(1)
        PARTS[write](layer.weight)
    assert relative_error(layer.weight, expected) < 1e-5


def test_memory_that_tells_of_no_write_is_read_only(layer):
    with pytest.raises(ValueError, match='read-only'):
        layer.weight.detach().numpy()[:] = 0


def test_a_parameter_is_made_of_a_copy(layer):
    with pytest.raises(TypeError, match=r'detach\(\)\.clone\(\)'):
        nn.Parameter(layer.weight.data)
    assert type(nn.Parameter(layer.weight.detach().clone())) is nn.Parameter
    assert type(copy.deepcopy(layer.weight.detach())) is torch.Tensor


def test_values_that_are_not_finite_on_the_way():
    """MMEngine's truncated normal passes through infinity, at random."""
    layer = OREPAConv1x1(8, 8, bias=False)
    before = layer.weight.detach().clone()
    with torch.no_grad():
        handed_out = layer.weight
        handed_out.fill_(math.inf)
        assert torch.equal(layer.weight, before)
        handed_out.clamp_(-2, 2)
    assert relative_error(layer.weight, torch.full((8, 8, 1, 1), 2.0)) < 1e-6


def test_the_generators_of_a_stem_are_out_of_reach():
    """A rule for a whole part of a model goes by `weight`, not by names of classes."""
    stem = randomize(OREPAStemConv2d(**WIDE_STEM))
    before = {key: value.clone() for key, value in stem.state_dict().items()}
    head = Head(dict(type='OREPA'), dict(type='Normal', layer='Linear', std=1.0, override=dict(
        type='Constant', name='part', val=0.5)))
    head.part = ConvModule(3, 24, 7, padding=3, conv_cfg=dict(type='OREPA'))
    head.part.conv.load_state_dict(before)
    head.init_weights()
    after = head.part.conv.state_dict()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == {'weight2.weight_orepa_origin', 'bias'}
    assert relative_error(head.part.conv.weight, torch.full((24, 3, 7, 7), 0.5)) < 1e-4


def test_reading_gives_plain_tensors_and_gradients(layer):
    for result in (layer.weight * 2, layer.weight.clone(), torch.zeros(1).add_(layer.weight.sum()),
                   layer.weight.sum(), torch.stack([layer.weight]), layer.weight.detach() + 1,
                   nn.functional.conv2d(torch.randn(1, layer.in_channels, 9, 9), layer.weight,
                                        groups=layer.groups)):
        assert type(result) is torch.Tensor
    (layer.weight * layer.weight.detach()).sum().backward()
    assert layer.get_parameter(
        'vector' if not isinstance(layer, OREPAStemConv2d) else 'weight0.vector').grad is not None
    assert layer.weight.dim() == 4
    assert layer.weight.requires_grad


def test_a_true_error_of_the_squeeze_shows(layer):
    layer = copy.deepcopy(layer)
    owner = layer.weight0 if isinstance(layer, OREPAStemConv2d) else layer
    del owner._parameters['vector']
    with pytest.raises(RuntimeError, match=r"(?s)cannot be generated.*vector"):
        _ = layer.weight


# --- rules of initialisation ----------------------------------------------------------


class Head(BaseModule):
    """Convolutions as heads and necks have them: in lists, in modules, as they are."""

    def __init__(self, conv_cfg, init_cfg):
        super().__init__(init_cfg)
        self.convs = nn.ModuleList([ConvModule(8, 8, 3, conv_cfg=conv_cfg)])
        self.module = ConvModule(8, 4, 1, conv_cfg=conv_cfg)
        self.bare = build_conv_layer(conv_cfg, 8, 8, 3)
        self.stem = build_conv_layer(conv_cfg, 3, 20, 7)
        self.list = ModuleList([build_conv_layer(conv_cfg, 8, 8, 5, groups=2)])

    def layers(self):
        return self.convs[0].conv, self.module.conv, self.bare, self.stem, self.list[0]


@pytest.mark.parametrize('layer_name', ['Conv2d', ['Conv2d', 'Linear'], 'OREPA'])
def test_a_rule_gives_the_generated_kernel_what_it_gives_a_stock_one(layer_name):
    if layer_name == 'OREPA':  # our own names work too
        layer_name = ['OREPAConv2d', 'OREPAConv1x1', 'OREPAStemConv2d']
    rule = dict(type='Normal', layer=layer_name, std=0.01, bias=0.25)
    head = Head(dict(type='OREPA'), rule)
    head.init_weights()
    for layer in head.layers():
        assert layer.weight.std().item() == pytest.approx(0.01, rel=0.25)
        assert layer.weight.abs().max() < 0.05
        if layer.bias is not None:
            assert layer.bias.eq(0.25).all()


@pytest.mark.parametrize('rule', [
    dict(type='Constant', layer='Conv2d', val=0.5), dict(type='Xavier', layer='Conv2d'),
    dict(type='Kaiming', layer='Conv2d'), dict(type='TruncNormal', layer='Conv2d', std=0.02),
    dict(type='Uniform', layer='Conv2d', a=-0.1, b=0.1), dict(type='Caffe2Xavier', layer='Conv2d')])
def test_every_rule_draws_what_it_draws_for_a_stock_layer(rule):
    """The same random numbers: the kernel is the one that the stock layer gets."""
    found = []
    for conv_cfg in (None, dict(type='OREPA')):
        head = Head(conv_cfg, rule)
        torch.manual_seed(0)
        head.init_weights()
        found.append([layer.weight.detach() for layer in head.layers()])
    for number, (stock, ours) in enumerate(zip(*found)):
        # MMCV's own default then takes the rule from a stock layer in a ConvModule without a list
        if number != 1:
            assert relative_error(ours, stock) < 1e-4


def test_without_a_rule_the_published_initialisation_stays():
    head = Head(dict(type='OREPA'), None)
    before = copy.deepcopy(head.state_dict())
    head.init_weights()
    assert all(torch.equal(before[key], value) for key, value in head.state_dict().items())
    assert isinstance(head.module.conv, OREPAConv1x1)
