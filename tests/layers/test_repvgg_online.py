"""RepVGG's block as one generated kernel, branch by branch on the feature map."""

import pytest
import torch
import torch.nn.functional as F
from helpers import randomize, relative_error
from mmcv.cnn import build_conv_layer

from orepa_mm.layers import OREPAConv1x1, OREPARepVGGOnlineConv2d, OREPAStemConv2d, reparam_layers
from orepa_mm.layers.squeeze import frequency_prior

CASES = {
    'same': dict(out_channels=8, padding=1),
    'more channels': dict(out_channels=12, padding=1),
    'strided': dict(out_channels=8, padding=1, stride=2),
    'dilated': dict(out_channels=8, padding=2, dilation=2),
    'grouped': dict(out_channels=8, padding=1, groups=2),
    'grouped and dilated': dict(out_channels=8, padding=2, dilation=2, groups=4),
    'grouped, more channels, strided': dict(out_channels=16, padding=1, groups=2, stride=2),
    'depthwise': dict(out_channels=8, padding=1, groups=8),
    '5 x 5': dict(out_channels=8, padding=2, groups=2, kernel_size=5),
}
IDENTITY = ('same', 'dilated', 'grouped', 'grouped and dilated', 'depthwise', '5 x 5')


def layer_of(case):
    options = {'kernel_size': 3, **CASES[case]}
    return randomize(OREPARepVGGOnlineConv2d(8, bias=False, **options).double())


def branches_on_feature_map(layer, x):
    """What each branch makes of the feature map, without its scale, by stock convolutions."""
    g, o, k, where = layer.groups, layer.out_channels, layer.kernel_size[0], dict(
        stride=layer.stride, padding=layer.padding, dilation=layer.dilation)
    i = x.shape[1] // g
    w = {name.removeprefix('weight_online_'): tensor for name, tensor in layer.named_parameters()}

    def window(kernel, y):
        return F.conv2d(y, kernel.to(y).view(-1, 1, k, k), groups=o, **where)

    first = w['1x1_kxk_idconv1']
    first = first + torch.eye(i).to(x).repeat(len(first) // i, 1)[:, :, None, None]
    depthwise_map = F.conv2d(x, w['gconv_dw'], groups=x.shape[1], **where)
    # the outputs of this pointwise are numbered as (o/g, g)
    pointwise = w['gconv_pw'].view(o // g, g, -1, 1, 1).transpose(0, 1).reshape(o, -1, 1, 1)
    branches = {
        'origin': F.conv2d(x, w['origin'], groups=g, **where),
        'average': window(torch.full((o, k, k), 1 / k**2), F.conv2d(x, w['avg_conv'], groups=g)),
        'prior': window(frequency_prior(o, k), F.conv2d(x, w['pfir_conv'], groups=g)),
        '1x1-kxk': F.conv2d(F.conv2d(x, first, groups=g), w['1x1_kxk_conv2'], groups=g, **where),
        '1x1': F.conv2d(x, w['1x1'], stride=layer.stride, groups=g),
        'separable': F.conv2d(depthwise_map, pointwise, groups=g)}
    if o == x.shape[1] and layer.stride == (1, 1):
        branches['identity'] = x
    return branches


@torch.no_grad()
@pytest.mark.parametrize('case', CASES)
def test_sum_of_the_branches(case):
    layer = layer_of(case)
    x = torch.randn(2, 8, 9, 10, dtype=torch.float64)
    branches = branches_on_feature_map(layer, x)
    assert ('identity' in branches) == (case in IDENTITY)
    assert tuple(branches) == layer.branch_names
    assert len(layer.vector) == len(branches)
    expected = sum(branch * scale.view(-1, 1, 1)
                   for branch, scale in zip(branches.values(), layer.vector))
    assert relative_error(layer(x), expected) < 1e-10
    alone, where = layer.branch_kernels(scaled=False), dict(
        stride=layer.stride, padding=layer.padding, dilation=layer.dilation, groups=layer.groups)
    for name, expected in branches.items():
        assert relative_error(F.conv2d(x, alone[name], None, **where), expected) < 1e-10, name
    scaled = layer.branch_kernels()
    assert relative_error(sum(scaled.values()), layer.equivalent_kernel_bias()[0]) < 1e-12


def test_rows_and_initial_values():
    layer = OREPARepVGGOnlineConv2d(64, 64, 3, padding=1)
    assert layer.vector[:, 0].tolist() == [0.25, 0.25, 0.0, 0.5, 1.0, 0.5, 1.0]
    for other in (OREPARepVGGOnlineConv2d(16, 32, 3), OREPARepVGGOnlineConv2d(16, 16, 3, 2)):
        assert other.vector[:, 0].tolist() == [0.25, 0.25, 0.0, 0.5, 1.0, 0.5]
        assert 'identity' not in other.branch_names
    # Kaiming-uniform with a = 1: bound sqrt(3 / fan_in)
    for name, fan_in in (('origin', 576), ('1x1', 64), ('gconv_dw', 9)):
        bound = getattr(layer, f'weight_online_{name}').abs().max().item()
        assert bound == pytest.approx((3 / fan_in)**0.5, rel=0.05)
    assert layer.weight_online_1x1_kxk_idconv1.abs().max() == 0
    alone = OREPARepVGGOnlineConv2d(16, 16, 3, single_init=True)
    assert torch.equal(alone.weight, alone.weight_online_origin)


@pytest.mark.parametrize('case', ['same', 'grouped', 'strided'])
def test_gradients(case):
    layer = layer_of(case)
    names, values = zip(*layer.named_parameters())
    x = torch.randn(1, 8, 5, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *values: torch.func.functional_call(
        layer, dict(zip(names, values)), x), (x, *values), fast_mode=True)


@torch.no_grad()
@pytest.mark.parametrize('case', CASES)
def test_it_takes_any_kernel(case):
    layer = layer_of(case)
    kernel = torch.randn(layer.kernel_shape, dtype=torch.float64)
    others = {name: value.clone() for name, value in layer.named_parameters()
              if name != 'weight_online_origin'}
    assert layer.set_kernel(kernel) < 1e-12
    assert relative_error(layer.weight, kernel) < 1e-12
    assert all(torch.equal(value, layer.get_parameter(name)) for name, value in others.items())


def test_through_the_conv_layer_type():
    cfg = dict(type='OREPA', block='repvgg_online')
    assert type(build_conv_layer(cfg, 4, 4, 3, padding=1)) is OREPARepVGGOnlineConv2d
    assert type(build_conv_layer(cfg, 4, 4, 5)) is OREPARepVGGOnlineConv2d
    assert type(build_conv_layer(cfg, 4, 4, 1)) is OREPAConv1x1
    stem = build_conv_layer(cfg, 4, 4, 7)
    assert type(stem) is OREPAStemConv2d
    assert not any(isinstance(part, OREPARepVGGOnlineConv2d) for part in reparam_layers(stem))
    compiled = build_conv_layer({**cfg, 'compile': True}, 4, 4, 3)
    assert compiled.compiled
