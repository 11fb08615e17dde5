"""The layers as convolutions: interface, initialisation, precision, copies."""

import copy
import io
import math

import pytest
import torch
from helpers import LAYERS, expected_output, randomize, relative_error
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.parametrize import register_parametrization

from orepa_mm.errors import CheckpointError
from orepa_mm.layers import OREPAConv1x1, OREPAConv2d, OREPAStemConv2d

# --- interface ----------------------------------------------------------------


def test_reads_as_a_conv(layer):
    conv = layer.to_conv2d()
    for name in nn.Conv2d.__constants__:
        if name != 'in_channels':
            assert getattr(layer, name) == getattr(conv, name), name
    assert layer.in_channels == 4
    assert layer.weight.shape == conv.weight.shape
    assert layer.extra_repr() == conv.extra_repr()
    assert isinstance(layer, nn.Conv2d)
    # what MMEngine's rules ask
    assert 'Conv2d' in [base.__name__ for base in type(layer).__bases__]


@pytest.mark.parametrize('padding_mode', ['reflect', 'circular'])
def test_padding_mode(padding_mode, x):
    layer = randomize(OREPAConv2d(4, 6, 3, padding=1, padding_mode=padding_mode))
    assert relative_error(layer(x), expected_output(layer, x)) < 1e-5
    assert layer(x).shape[2:] == x.shape[2:]


def test_padding_by_name(x):
    layer = randomize(OREPAConv2d(4, 6, 3, padding='same'))
    assert relative_error(layer(x), expected_output(layer, x)) < 1e-5


@pytest.mark.parametrize(('build', 'message'), [
    (lambda: OREPAConv2d(4, 4, 2), 'odd square kernel'),
    (lambda: OREPAConv2d(4, 4, (1, 3)), 'odd square kernel'),
    (lambda: OREPAConv2d(4, 6, 3, groups=4), 'divisible by groups'),
    (lambda: OREPAConv1x1(4, 4, 3), '1 x 1'),
    (lambda: OREPAStemConv2d(4, 4, 3), 'larger than 3 x 3'),
    (lambda: OREPAStemConv2d(4, 4, 7, groups=2), 'more than one group'),
])
def test_bad_arguments_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize('cls', [OREPAConv2d, OREPAStemConv2d])
def test_every_argument_by_position(cls):
    """As nn.Conv2d: up to device and dtype."""
    arguments = (4, 6, 5, 2, 2, 1, 1, False, 'reflect', 'cpu', torch.float64)
    layer, conv = cls(*arguments), nn.Conv2d(*arguments)
    assert layer.extra_repr() == conv.extra_repr()
    assert layer.weight.dtype == torch.float64
    assert OREPAConv1x1(4, 6, 1, 2, 0, 1, 2, False, 'zeros', 'cpu', torch.float64).groups == 2


@pytest.mark.parametrize('options', [{}, {'groups': 2}])
def test_built_without_memory_then_reset(options, x):
    layer = OREPAConv2d(4, 8, 3, device='meta', **options).to_empty(device='cpu')
    for tensor in layer.parameters():
        nn.init.constant_(tensor, 7.0)
    layer.reset_parameters()
    fresh = OREPAConv2d(4, 8, 3, **options)
    for name, constant in fresh.named_buffers():
        assert torch.equal(layer.get_buffer(name), constant)
    assert isinstance(nn.utils.skip_init(OREPAConv2d, 3, 4, 3), OREPAConv2d)


def test_pruned_and_parametrized_branches(x):
    layer = randomize(LAYERS['kxk']())
    prune.l1_unstructured(layer, 'weight_orepa_origin', 0.5)
    register_parametrization(layer, 'vector', nn.Softplus())
    assert layer.weight_orepa_origin.eq(0).float().mean() == 0.5
    for mode in (True, False):
        layer.train(mode)
        with torch.no_grad():
            assert relative_error(layer(x), expected_output(layer, x)) < 1e-5
            layer.parametrizations.vector.original.add_(1)
            assert relative_error(layer(x), expected_output(layer, x)) < 1e-5


@pytest.mark.parametrize('shape', [(4, 9, 7), (0, 4, 9, 7)])
def test_unbatched_and_empty_input(layer, shape):
    x = torch.randn(shape)
    assert layer(x).shape == expected_output(layer, x).shape


# --- initialisation -------------------------------------------------------------


def test_initial_values_of_kxk():
    layer = OREPAConv2d(64, 64, 3)
    assert layer.vector[:, 0].tolist() == [0.25, 0.25, 0.0, 0.5, 1.0, 0.5]
    assert layer.weight_orepa_1x1_kxk_idconv1.abs().max() == 0
    # Kaiming-uniform with a = 0: bound sqrt(6 / fan_in)
    for name, fan_in in (('origin', 64 * 9), ('avg_conv', 64), ('1x1_kxk_conv2', 64 * 9),
                         ('gconv_dw', 9), ('gconv_pw', 512)):
        weight = getattr(layer, f'weight_orepa_{name}')
        assert weight.abs().max().item() == pytest.approx(math.sqrt(6 / fan_in), rel=0.02), name


def test_initial_values_of_1x1():
    for channels, identity in (((32, 64), 'conv1'), ((64, 32), 'conv2'), ((32, 32), 'conv2')):
        layer = OREPAConv1x1(*channels)
        assert layer.vector[:, 0].tolist() == [1.0, 0.5]
        square = getattr(layer, f'weight_or1x1_l2i_{identity}')[:, :, 0, 0]
        assert torch.equal(square, torch.eye(32))
        bound = math.sqrt(3 / channels[0])
        assert layer.weight_or1x1_origin.abs().max().item() == pytest.approx(bound, rel=0.02)


def test_init_options():
    single = OREPAConv2d(4, 4, 3, single_init=True)
    assert single.vector[0].eq(1).all()
    assert single.vector[1:].eq(0).all()
    torch.manual_seed(0)
    plain = OREPAConv2d(4, 4, 3)
    torch.manual_seed(0)
    hyper = OREPAConv2d(4, 4, 3, init_hyper_para=4.0, init_hyper_gamma=9.0)
    assert torch.allclose(hyper.vector, 3 * plain.vector)
    assert torch.allclose(hyper.weight_orepa_origin, 4 * plain.weight_orepa_origin)
    assert torch.allclose(hyper.weight_orepa_gconv_dw, 2 * plain.weight_orepa_gconv_dw)
    stem = OREPAStemConv2d(3, 4, 7, single_init=True)
    assert all(stem.get_submodule(f'weight{j}').vector[1:].eq(0).all() for j in range(3))


# --- precision, formats, copies -----------------------------------------------------


def test_autocast_squeezes_in_float32(layer, x, device):
    weight = layer.weight.detach()
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert torch.equal(layer.weight, weight)
        y = layer(x)
    assert y.dtype == torch.bfloat16
    with torch.autocast(device.type, dtype=torch.bfloat16):
        expected = layer.to_conv2d()(x)
    assert relative_error(y, expected) < 1e-2
    y.float().square().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.dtype == torch.float32
               for p in layer.parameters())


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision_is_one_rounding_of_the_exact_kernel(layer, x, dtype):
    """Of the same branches, squeezed in float64 by hand: not even the constants are rounded."""
    layer = layer.to(dtype)
    exact = copy.deepcopy(layer).double().squeeze()
    assert exact.dtype == torch.float64
    # half a unit in the last place, and what float32 sums lose where terms cancel
    unit, smallest = torch.finfo(dtype).eps, torch.finfo(dtype).tiny
    bound = exact.abs() * unit / 2 * 1.01 + exact.abs().max() * 1e-6 + smallest
    for kernel in (layer.weight, layer.to_conv2d().weight):
        assert kernel.dtype == dtype
        assert ((kernel.double() - exact).abs() <= bound).all()
    assert layer(x.to(dtype)).dtype == dtype


def test_channels_last(layer, x):
    """The generated kernel is the same, whichever way the branches lie in memory."""
    kernel = layer.weight.detach().clone()
    expected = layer(x).detach()
    layer(x).sum().backward()
    gradients = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    layer = layer.to(memory_format=torch.channels_last)
    assert layer.kernel_size == (1, 1) or any(not p.is_contiguous() for p in layer.parameters())
    assert relative_error(layer.weight, kernel) < 1e-6
    y = layer(x.to(memory_format=torch.channels_last))
    assert relative_error(y, expected) < 1e-5
    y.sum().backward()
    for p, gradient in zip(layer.parameters(), gradients):
        assert relative_error(p.grad, gradient) < 1e-4
    conv = layer.to_conv2d()
    if conv.weight.shape[1] > 1 and conv.kernel_size[0] > 1:
        assert conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert relative_error(conv(x), expected) < 1e-5


def test_gradients_of_a_shared_layer_are_those_of_the_stock_one(layer, x):
    """Used twice, its kernel gets the sum of both gradients, which then goes to the branches."""
    conv = layer.to_conv2d()
    pair = x, x.flip(-1)
    sum(conv(part).square().sum() * n for n, part in enumerate(pair, 1)).backward()
    sum(layer(part).square().sum() * n for n, part in enumerate(pair, 1)).backward()
    found = {name: p.grad.clone() for name, p in layer.named_parameters()}
    layer.zero_grad()
    layer.weight.backward(conv.weight.grad)  # the chain rule, from the stock kernel's gradient
    for name, p in layer.named_parameters():
        expected = conv.bias.grad if name == 'bias' else p.grad
        assert relative_error(found[name], expected) < 1e-4, name


def test_accumulated_gradients_are_those_of_the_joint_batch(layer, x):
    layer(x).square().sum().backward()
    expected = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    for part in x.split(1):
        layer(part).square().sum().backward()
    for p, gradient in zip(layer.parameters(), expected):
        assert relative_error(p.grad, gradient) < 1e-4


@pytest.mark.parametrize(('mode', 'backend'), [
    ('train', 'aot_eager'), ('eval', 'aot_eager'),
    pytest.param('train', 'inductor', marks=pytest.mark.long)])
def test_torch_compile(mode, backend, x):
    layers = nn.Sequential(*(randomize(LAYERS[name]()) for name in ('kxk', '1x1')))
    layers[1] = randomize(OREPAConv1x1(6, 4))
    getattr(layers, mode)()
    compiled = torch.compile(layers, backend=backend)
    with torch.set_grad_enabled(mode == 'train'):
        assert relative_error(compiled(x), layers(x)) < 1e-5
        with torch.no_grad():
            layers[0].vector.mul_(2)
        assert relative_error(compiled(x), layers(x)) < 1e-5
    if mode == 'train':
        compiled(x).square().sum().backward()
        found = [p.grad.clone() for p in layers.parameters()]
        layers.zero_grad()
        layers(x).square().sum().backward()
        for one, p in zip(found, layers.parameters()):
            assert relative_error(one, p.grad) < 1e-4


def test_deepcopy_and_pickle_in_the_middle_of_training(layer, x):
    y = layer(x)  # its graph is alive
    clone = copy.deepcopy(layer)
    assert torch.equal(clone(x), y)
    buffer = io.BytesIO()
    torch.save({'model': layer, 'state': layer.state_dict()}, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert relative_error(loaded['model'](x), y) < 1e-6
    fresh = copy.deepcopy(layer)
    nn.init.zeros_(next(p for p in fresh.parameters() if p.dim() == 4))
    fresh.load_state_dict(loaded['state'])
    assert relative_error(fresh(x), y) < 1e-6
    with torch.no_grad():  # a copy follows its own parameters
        next(p for p in clone.parameters() if p.dim() == 4).add_(1)
    assert not torch.allclose(clone(x), y)
    assert relative_error(layer(x), y) < 1e-6


def test_state_dict_holds_no_kernel(layer, x):
    names = set(layer.state_dict())
    layer.eval()
    with torch.no_grad():
        layer(x)
    assert set(layer.state_dict()) == names
    assert 'weight' not in names


def test_checkpoint_of_the_other_form_is_refused(layer):
    with pytest.raises(CheckpointError, match=r'in training form.*orepa_mm\.expand.*load_from'):
        layer.load_state_dict(layer.to_conv2d().state_dict(), strict=False)


def with_constants(layer):
    """What an older version, and the authors, saved: the constants as well."""
    return {**layer.state_dict(), **{name: b.clone() for name, b in layer.named_buffers()
                                     if not name.endswith('centre')}}


@pytest.mark.parametrize('assign', [False, True])
def test_files_that_hold_the_constants_load(layer, x, assign):
    state = with_constants(randomize(copy.deepcopy(layer), 1))
    expected = randomize(copy.deepcopy(layer), 1)(x)
    assert not any('prior' in name or 'id_tensor' in name for name in layer.state_dict())
    layer.load_state_dict(state, strict=True, assign=assign)
    assert torch.equal(layer(x), expected)


def test_constants_of_another_definition_are_refused(layer):
    for name, constant in layer.named_buffers():
        if not name.endswith('centre'):
            state = with_constants(layer)
            state[name] = constant + 0.1
            with pytest.raises(CheckpointError, match=f'{name} of the checkpoint is not'):
                layer.load_state_dict(state, strict=False)


@pytest.mark.parametrize('case', LAYERS)
def test_built_on_the_meta_device_and_loaded(case, x):
    """The constants are not in the file: they are made where the parameters come."""
    source = randomize(LAYERS[case]())
    layer = LAYERS[case](device='meta')
    layer.load_state_dict(source.state_dict(), strict=True, assign=True)
    assert torch.equal(layer(x), source(x))
    layer = LAYERS[case](device='meta').to_empty(device=x.device)
    layer.load_state_dict(source.state_dict(), strict=True)
    assert torch.equal(layer(x), source(x))
