"""How branches start around a given kernel: exactly it, and each with a gradient."""

import copy

import pytest
import torch
from helpers import LAYERS, randomize, relative_error
from torch import nn

from orepa_mm.layers import (
    OREPAConv1x1,
    OREPAConv2d,
    OREPARepVGGConv2d,
    OREPARepVGGOnlineConv2d,
    OREPAStemConv2d,
    build_orepa_conv,
)

BLOCKS = {
    **{name: build for name, build in LAYERS.items() if name != 'stem'},
    'kxk of eight groups': lambda **kw: OREPAConv2d(16, 32, 3, groups=8, **kw),
    '5 x 5': lambda **kw: OREPAConv2d(4, 6, 5, **kw),
    'depthwise': lambda **kw: OREPAConv2d(6, 6, 3, groups=6, **kw),
    'kxk of RepVGG, strided': lambda **kw: OREPARepVGGConv2d(4, 4, 3, 2, **kw),
    'online, grouped': lambda **kw: OREPARepVGGOnlineConv2d(4, 4, 3, groups=2, **kw),
    'online, strided': lambda **kw: OREPARepVGGOnlineConv2d(4, 4, 3, 2, **kw),
    '1x1 to more': lambda **kw: OREPAConv1x1(4, 12, groups=2, **kw),
    '1x1 to less': lambda **kw: OREPAConv1x1(12, 4, **kw),
}


def kernel_for(layer, dtype):
    """Of values between 1e-4 and 1e+4, with zeros and negative ones."""
    kernel = torch.randn(layer.kernel_shape) * 10 ** torch.empty(layer.kernel_shape).uniform_(-4, 4)
    kernel[0] = 0
    return kernel.to(dtype)


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('start', [None, 'zero', 'single'])
@pytest.mark.parametrize('case', BLOCKS)
def test_the_kernel_is_exactly_the_given_one(case, start, dtype):
    """Bit by bit, in half precision too."""
    layer = randomize(BLOCKS[case](start=start)).to(dtype)
    kernel, bias = kernel_for(layer, dtype), torch.randn(layer.out_channels).to(dtype)
    assert layer.start_from(kernel, bias) == 0
    assert torch.equal(layer.weight, kernel)
    assert torch.equal(layer.to_conv2d().weight, kernel)
    assert torch.equal(layer.bias, bias)


def step(layer):
    layer.zero_grad()
    layer.weight.backward(torch.randn(layer.kernel_shape, dtype=layer.vector.dtype))


@pytest.mark.parametrize('case', BLOCKS)
def test_every_branch_adds_nothing_and_has_a_gradient(case):
    layer = BLOCKS[case]().double()
    kernel = kernel_for(layer, torch.float64)
    layer.start_from(kernel)
    branches = layer.branch_kernels()
    assert torch.equal(branches.pop('origin'), kernel)
    assert all(branch.eq(0).all() for branch in branches.values())
    step(layer)
    moved = copy.deepcopy(layer)
    with torch.no_grad():
        for parameter, grad in zip(moved.parameters(), (p.grad for p in layer.parameters())):
            if grad is not None:
                parameter.sub_(grad)
    for name, branch in moved.branch_kernels().items():
        assert branch.abs().max() > 0, name


def test_the_zero_start_in_numbers():
    layer = OREPAConv2d(4, 6, 3, start='zero', init_hyper_gamma=4.0)
    assert layer.vector[:, 0].tolist() == [1.0, 0.5, 0.5, 1.0, 2.0, 1.0]  # the prior's is not 0
    zero = {name for name, p in layer.named_parameters() if p.eq(0).all()}
    assert zero == {f'weight_orepa_{name}' for name in (
        'avg_conv', 'pfir_conv', '1x1_kxk_idconv1', '1x1_kxk_conv2', 'gconv_pw', '1x1')}
    assert layer.weight_orepa_gconv_dw.std() > 0.1
    online = OREPARepVGGOnlineConv2d(4, 4, 3, start='zero')
    assert online.vector[:, 0].tolist() == [1.0, 0.25, 0.25, 0.5, 1.0, 0.5, 0.0]
    for channels in ((4, 8), (8, 4)):
        product = OREPAConv1x1(*channels, start='zero')
        assert product.vector[:, 0].tolist() == [1.0, 0.5]
        assert product.weight_or1x1_l2i_conv2.eq(0).all()
        assert product.weight_or1x1_l2i_conv1.abs().max() > 0


@pytest.mark.parametrize('case', LAYERS)
def test_from_scratch_the_start_is_the_published_one(case):
    torch.manual_seed(1)
    published = LAYERS[case](start='published').state_dict()
    torch.manual_seed(1)
    default = LAYERS[case]().state_dict()
    assert all(torch.equal(published[key], value) for key, value in default.items())


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32])
@pytest.mark.parametrize('case', BLOCKS)
def test_the_published_start_keeps_all_other_branches(case, dtype):
    torch.manual_seed(1)
    fresh = BLOCKS[case](start='published').to(dtype)
    layer = randomize(BLOCKS[case](start='published')).to(dtype)
    kernel = torch.randn(layer.kernel_shape)
    torch.manual_seed(1)
    layer.start_from(kernel)
    assert relative_error(layer.weight, kernel) < 8 * torch.finfo(dtype).eps + 1e-6 * (
        dtype != torch.float64)
    assert torch.equal(layer.vector, fresh.vector)


@pytest.mark.parametrize('start', [None, 'zero', 'published'])
def test_a_stem_keeps_its_chain(start):
    stem = randomize(OREPAStemConv2d(3, 24, 7, bias=False, start=start))
    kernel = torch.randn(24, 3, 7, 7)
    assert stem.start_from(kernel) < 1e-5
    assert relative_error(stem.weight, kernel) < 1e-5
    expected = [0.25, 0.25, 0.0, 0.5, 1.0, 0.5] if start == 'published' else [
        1.0, 0.25, 0.25, 0.5, 1.0, 0.5]
    for generator in stem.generators:
        assert generator.vector[:, 0].tolist() == expected
    stem.weight.sum().backward()
    assert all(p.grad.abs().max() > 0 for name, p in stem.named_parameters()
               if name.endswith(('origin', 'conv2', 'gconv_pw')))


@pytest.mark.parametrize(('build', 'kernel', 'message'), [
    (lambda: OREPAStemConv2d(3, 8, 7, bias=False), (8, 3, 7, 7), 'too narrow'),
    (lambda: OREPAConv2d(3, 8, 3), (8, 3, 1, 1), r'of shape \(8, 3, 3, 3\)')])
def test_what_cannot_be_a_start_changes_nothing(build, kernel, message):
    layer = randomize(build())
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(ValueError, match=message):
        layer.start_from(torch.randn(kernel))
    assert all(torch.equal(before[key], value) for key, value in layer.state_dict().items())


def test_options():
    assert build_orepa_conv(4, 4, 3, single_init=True).start == 'single'
    assert build_orepa_conv(4, 4, 7, start='zero').weight2.start == 'zero'
    assert type(build_orepa_conv(4, 4, 1, pointwise=False, start='zero')) is nn.Conv2d
    with pytest.raises(ValueError, match="no start 'zeros': choose one of 'zero', 'published'"):
        build_orepa_conv(4, 4, 3, start='zeros')
    with pytest.raises(ValueError, match="start='zero' is given"):
        OREPAConv1x1(4, 4, start='zero', single_init=True)


def test_set_kernel_leaves_the_other_branches_as_they_are():
    layer = randomize(OREPAConv2d(4, 6, 3))
    before = {name: p.clone() for name, p in layer.named_parameters()}
    layer.set_kernel(torch.randn(6, 4, 3, 3))
    changed = [name for name, p in layer.named_parameters() if not torch.equal(p, before[name])]
    assert changed == ['weight_orepa_origin']
