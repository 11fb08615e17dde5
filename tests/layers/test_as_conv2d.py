"""What stock code does to a convolution, done to ours: as it does to `nn.Conv2d`, or an error."""

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from helpers import LAYERS, randomize, relative_error
from mmcv.cnn import ConvModule, fuse_conv_bn
from mmengine.optim import DefaultOptimWrapperConstructor
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.fusion import fuse_conv_bn_eval

from orepa_mm.layers import (
    DBBConv2d,
    OREPAConv2d,
    OREPAStemConv2d,
    ReparamConv2d,
    build_orepa_conv,
)
from orepa_mm.layers.stem import Generator

#: Each for an input of (N, 4, H, W); the stem has channels enough for any kernel.
EVERY = {**LAYERS, 'stem': lambda **kw: OREPAStemConv2d(4, 32, 7, 2, 3, **kw)}


@pytest.fixture(params=EVERY)
def layer(request):
    return randomize(EVERY[request.param]())


def stock_like(layer):
    """A stock convolution with the same kernel and bias."""
    return layer.to_conv2d()


# --- assigned ---------------------------------------------------------------------------------

ASSIGNMENTS = {
    'a parameter': lambda conv, k: setattr(conv, 'weight', nn.Parameter(k)),
    'a frozen parameter': lambda conv, k: setattr(conv, 'weight', nn.Parameter(k, False)),
    'registered': lambda conv, k: conv.register_parameter('weight', nn.Parameter(k)),
    '.data': lambda conv, k: setattr(conv.weight, 'data', k),
    '.data.copy_': lambda conv, k: conv.weight.data.copy_(k),
    'copy_': lambda conv, k: conv.weight.copy_(k),
    'set_': lambda conv, k: conv.weight.detach().set_(k),
    'in place, then assigned': lambda conv, k: exec(
        'conv.weight -= conv.weight.clone(); conv.weight += k', {'conv': conv, 'k': k}),
    'double': lambda conv, k: setattr(conv, 'weight', nn.Parameter(k.double())),
}


@pytest.mark.parametrize('way', ASSIGNMENTS)
def test_a_kernel_that_is_assigned_is_the_one_that_is_generated(layer, way):
    kernel = torch.randn(layer.kernel_shape)
    keys = list(layer.state_dict())
    with torch.no_grad():
        ASSIGNMENTS[way](layer, kernel)
    assert relative_error(layer.weight, kernel) < 1e-5
    assert relative_error(layer.to_conv2d().weight, kernel) < 1e-5
    assert list(layer.state_dict()) == keys
    layer(torch.randn(1, 4, 9, 9)).sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())


@pytest.mark.parametrize('value', [None, 1.0, 'kernel'])
def test_what_is_no_kernel_is_refused(layer, value):
    with pytest.raises(TypeError, match='is generated'):
        layer.weight = value


def test_a_kernel_of_another_shape_or_out_of_reach_is_refused():
    layer = OREPAConv2d(4, 6, 3)
    with pytest.raises(ValueError, match=r'of shape \(6, 4, 3, 3\)'):
        layer.weight = nn.Parameter(torch.randn(6, 4, 1, 1))
    with pytest.raises(ValueError, match='too narrow'):
        OREPAStemConv2d(3, 8, 7).weight = nn.Parameter(torch.randn(8, 3, 7, 7))
    with pytest.raises(TypeError, match='cannot be set'):
        DBBConv2d(4, 6, 3, padding=1).weight = nn.Parameter(torch.randn(6, 4, 3, 3))


# --- handles -----------------------------------------------------------------------------------

HANDLES = {
    'weight': lambda layer: layer.weight, 'detached': lambda layer: layer.weight.detach(),
    '.data': lambda layer: layer.weight.data, 'a view': lambda layer: layer.weight.view(-1),
    'a row': lambda layer: layer.weight.detach()[0],
}
CHANGES = {
    'in place': lambda layer: [p.mul_(2) for p in layer.parameters()],
    'replaced': lambda layer: layer.load_state_dict(
        {key: 2 * value for key, value in layer.state_dict().items()}, assign=True),
    'a fused step': lambda layer: fused_step(layer),
    'another kernel': lambda layer: layer.set_kernel(torch.ones(layer.kernel_shape)),
}


def fused_step(layer):
    for parameter in layer.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD(layer.parameters(), lr=0.1, fused=True).step()


@pytest.mark.parametrize('change', CHANGES)
@pytest.mark.parametrize('handle', HANDLES)
def test_a_handle_from_before_a_change_takes_no_write(handle, change):
    """It would put the whole kernel of before back."""
    layer = randomize(OREPAConv2d(4, 6, 3))
    held = HANDLES[handle](layer)
    with torch.no_grad():
        CHANGES[change](layer)
        now = layer.weight.clone()
        with pytest.raises(RuntimeError, match=r'before the branches changed.*weight again'):
            held.mul_(1.0)
    assert torch.equal(layer.weight, now)


def test_one_handle_takes_several_writes_and_so_do_its_views():
    layer = randomize(OREPAConv2d(4, 6, 3))
    with torch.no_grad():
        held = layer.weight
        held.fill_(1)
        held[0].fill_(2)
        held.detach().view(6, -1)[1].mul_(3)
        held.add_(1)
    expected = torch.full((6, 4, 3, 3), 2.0)
    expected[0], expected[1] = 3, 4
    assert relative_error(layer.weight, expected) < 1e-6


@pytest.mark.parametrize('freeze', [lambda w, on: w.requires_grad_(on),
                                    lambda w, on: setattr(w, 'requires_grad', on)])
def test_freezing_the_weight_freezes_its_branches(layer, freeze):
    for on in (False, True):
        freeze(layer.weight, on)
        assert layer.weight.requires_grad is on
        assert all(p.requires_grad is on for name, p in layer.named_parameters()
                   if name != 'bias')
        assert layer.bias.requires_grad
    copied = layer.weight.detach().requires_grad_()  # a tensor of its own
    layer.weight.detach().requires_grad_(False)
    assert copied.requires_grad
    assert layer.weight.requires_grad


# --- fused with a BN ----------------------------------------------------------------------------


def with_norm(layer):
    return randomize(nn.Sequential(nn.Conv2d(4, 4, 1), layer, nn.BatchNorm2d(
        layer.out_channels))).eval()


def fused_by_torch(model):
    return nn.Sequential(model[0], fuse_conv_bn_eval(model[1], model[2]))


@pytest.mark.parametrize('fuse', [fuse_conv_bn, fused_by_torch])
@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('case', EVERY)
def test_a_bn_is_folded_into_the_layer_before_it(case, bias, fuse):
    model = with_norm(EVERY[case](bias=bias))
    x = torch.randn(2, 4, 12, 12)
    with torch.no_grad():
        expected = model(x)
        fused = fuse(copy.deepcopy(model))
        assert not isinstance(fused[-1], nn.BatchNorm2d)
        assert isinstance(fused[1], ReparamConv2d)
        assert relative_error(fused(x), expected) < 1e-5


def test_mmcv_leaves_the_inside_of_a_diverse_branch_block_alone():
    """Its BNs pad; a convolution that they are folded into does not."""
    model = randomize(nn.Sequential(nn.Conv2d(4, 4, 1), DBBConv2d(4, 6, 3, padding=1),
                                    nn.ReLU())).eval()
    x = torch.randn(2, 4, 12, 12)
    with torch.no_grad():
        assert relative_error(fuse_conv_bn(copy.deepcopy(model))(x), model(x)) < 1e-6
    with pytest.raises(AttributeError, match='comes with a bias'):
        fuse_conv_bn(nn.Sequential(DBBConv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6)).eval())


# --- what is put on a weight ------------------------------------------------------------------

ON_WEIGHT = {
    'prune': lambda conv: prune.l1_unstructured(conv, 'weight', 0.5),
    'prune, random': lambda conv: prune.random_structured(conv, 'weight', 0.5, 0),
    'prune, given': lambda conv: prune.custom_from_mask(conv, 'weight', torch.ones(6, 4, 3, 3)),
    'weight_norm, old': nn.utils.weight_norm, 'spectral_norm, old': nn.utils.spectral_norm,
    'weight_norm': parametrizations.weight_norm, 'spectral_norm': parametrizations.spectral_norm,
    'orthogonal': parametrizations.orthogonal,
}


@pytest.mark.filterwarnings('ignore:.*weight_norm')
@pytest.mark.parametrize('what', ON_WEIGHT)
def test_what_needs_a_parameter_says_so_and_leaves_the_layer_as_it_was(what):
    layer, x = randomize(OREPAConv2d(4, 6, 3)), torch.randn(1, 4, 9, 9)
    expected, keys = layer(x), list(layer.state_dict())
    with pytest.raises((TypeError, ValueError), match='parameter'):
        ON_WEIGHT[what](layer)
    assert list(layer.state_dict()) == keys
    assert torch.equal(layer(x), expected)


def test_the_error_names_a_tensor_that_can_be_taken():
    with pytest.raises(TypeError, match="name='weight_orepa_origin'"):
        ConvModule(4, 6, 3, conv_cfg=dict(type='OREPA'), with_spectral_norm=True)
    layer = OREPAConv2d(4, 6, 3)
    nn.utils.spectral_norm(layer, 'weight_orepa_origin')
    prune.l1_unstructured(layer, 'weight_orepa_gconv_pw', 0.5)
    x = torch.randn(1, 4, 9, 9)
    for _ in range(2):  # each draws its tensor anew before a call
        y = layer(x)
        assert relative_error(y, layer.eval().to_conv2d()(x)) < 1e-5
    y.sum().backward()


# --- walked over ------------------------------------------------------------------------------


@pytest.mark.parametrize('case', EVERY)
def test_walkers_see_one_convolution(case):
    """Loops over `nn.Conv2d` initialise the generated kernel, and nothing inside."""
    model = nn.Sequential(EVERY[case]())
    found = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert found == [model[0]]
    for module in found:
        nn.init.constant_(module.weight, 0.5)
        module.bias.data.zero_()
    assert relative_error(model[0].weight, torch.full(model[0].kernel_shape, 0.5)) < 1e-4


def test_a_rule_for_depthwise_convolutions_reaches_all_branches():
    model = nn.Sequential(build_orepa_conv(4, 4, 3, groups=4), nn.Conv2d(4, 4, 1))
    optimizer = DefaultOptimWrapperConstructor(
        dict(optimizer=dict(type='SGD', lr=0.1, weight_decay=0.01)),
        dict(dwconv_decay_mult=0.0))(model).optimizer
    decays = {group['params'][0]: group['weight_decay'] for group in optimizer.param_groups}
    branches = [p for name, p in model[0].named_parameters() if name != 'bias']
    assert [decays[p] for p in branches] == [0.0] * len(branches)
    assert decays[model[1].weight] == 0.01


# --- copied, moved, saved --------------------------------------------------------------------


def reload(layer):
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def assigned(layer):
    other = randomize(copy.deepcopy(layer), 1)
    other.load_state_dict(copy.deepcopy(layer.state_dict()), assign=True)
    return other


COPIES = {
    'deepcopy': copy.deepcopy, 'pickle': lambda layer: pickle.loads(pickle.dumps(layer)),
    'torch.save': reload, 'assign': assigned,
    'double and back': lambda layer: copy.deepcopy(layer).double().float(),
    'channels_last': lambda layer: copy.deepcopy(layer).to(memory_format=torch.channels_last),
    'shared memory': lambda layer: copy.deepcopy(layer).share_memory(),
}


@pytest.mark.parametrize('way', COPIES)
def test_copies_are_layers_of_their_own(layer, way):
    x = torch.randn(1, 4, 9, 9)
    expected = layer(x)
    other = COPIES[way](layer)
    assert type(other) is type(layer)
    assert relative_error(other(x), expected) < 1e-5
    other.weight = nn.Parameter(torch.zeros(other.kernel_shape))
    assert relative_error(layer(x), expected) < 1e-6
    assert other.weight.abs().max() < 1e-5


def test_a_kernel_loads_into_a_stock_convolution(layer):
    conv = nn.Conv2d(4, layer.out_channels, layer.kernel_size, layer.stride, layer.padding,
                     layer.dilation, layer.groups)
    conv.load_state_dict({'weight': layer.weight, 'bias': layer.bias})
    x = torch.randn(1, 4, 9, 9)
    assert relative_error(conv(x), layer(x)) < 1e-5
    assert type(layer.weight.shape) is torch.Size


def test_the_order_of_parameters_is_that_of_earlier_versions():
    """Optimizers' states are stored by number."""
    assert [name for name, _ in OREPAConv2d(4, 6, 3).named_parameters()] == [
        'bias', *(f'weight_orepa_{name}' for name in (
            'origin', 'avg_conv', 'pfir_conv', '1x1_kxk_idconv1', '1x1_kxk_conv2', 'gconv_dw',
            'gconv_pw')), 'vector', 'weight_orepa_1x1']
    assert [name for name, _ in LAYERS['kxk of RepVGG']().named_parameters()][-2:] == [
        'weight_rbr_gconv_pw', 'vector']
    assert [name for name, _ in LAYERS['1x1']().named_parameters()] == [
        'bias', 'weight_or1x1_origin', 'weight_or1x1_l2i_conv1', 'weight_or1x1_l2i_conv2',
        'vector']
    assert next(name for name, _ in LAYERS['stem']().named_parameters()) == 'bias'


def test_replicas_of_data_parallel_have_gradients(layer):
    """They have tensors for attributes, and no parameters."""
    def replicated(module):
        replica = module._replicate_for_data_parallel()
        for name, parameter in module._parameters.items():
            setattr(replica, name, parameter if parameter is None else parameter.clone())
        for name, child in module.named_children():
            setattr(replica, name, replicated(child))
        return replica

    replicated(layer)(torch.randn(1, 4, 9, 9)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())


def test_a_layer_and_its_kernels_go_when_they_are_not_used():
    """No cycle through the kernel that was handed out, no list of layers."""
    layer = OREPAConv2d(4, 6, 3)
    layer(torch.randn(1, 4, 9, 9)).sum().backward()
    layer.weight.data.mul_(2)
    gone = weakref.ref(layer)
    del layer
    gc.collect()
    assert gone() is None


def test_generators_of_a_stem_are_modules_that_give_a_kernel():
    stem = randomize(OREPAStemConv2d(4, 32, 7))
    for generator in stem.generators:
        assert type(generator) is Generator
        assert not isinstance(generator, nn.Conv2d)
        assert torch.equal(generator(), generator.squeeze())
