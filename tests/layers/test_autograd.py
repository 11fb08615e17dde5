"""How a layer calls its squeeze: gradients by hand, what the graph keeps, second derivatives,
how many operations, and the compiled form."""

import copy

import pytest
import torch
from helpers import LAYERS, randomize, relative_error
from mmcv.cnn import build_conv_layer
from torch import nn

from orepa_mm.analysis.measure import count_operations
from orepa_mm.layers import (
    OREPAConv1x1,
    OREPAConv2d,
    OREPARepVGGConv2d,
    OREPARepVGGOnlineConv2d,
    autograd,
)

BLOCKS = {
    **LAYERS,
    'kxk of eight groups': lambda **kw: OREPAConv2d(16, 32, 3, groups=8, **kw),
    '5x5': lambda **kw: OREPAConv2d(8, 4, 5, groups=2, **kw),
    'depthwise': lambda **kw: OREPAConv2d(6, 6, 3, groups=6, **kw),
    'kxk of one': lambda **kw: OREPAConv2d(6, 6, 1, groups=3, **kw),
    'one channel': lambda **kw: OREPAConv2d(1, 1, 3, **kw),
    'kxk of RepVGG, strided': lambda **kw: OREPARepVGGConv2d(4, 4, 3, 2, **kw),
    'kxk of RepVGG online': lambda **kw: OREPARepVGGOnlineConv2d(4, 4, 3, padding=1, **kw),
    'kxk of RepVGG online, grouped': lambda **kw: OREPARepVGGOnlineConv2d(
        4, 4, 3, padding=1, groups=2, **kw),
    'kxk of RepVGG online, depthwise': lambda **kw: OREPARepVGGOnlineConv2d(
        6, 6, 3, groups=6, **kw),
    'kxk of RepVGG online, strided': lambda **kw: OREPARepVGGOnlineConv2d(4, 4, 3, 2, **kw),
    '1x1 to more': lambda **kw: OREPAConv1x1(4, 12, groups=2, **kw),
    '1x1 to less': lambda **kw: OREPAConv1x1(12, 4, groups=2, **kw),
}


@pytest.fixture(params=BLOCKS)
def block(request):
    return randomize(BLOCKS[request.param]().double())


def gradients_of(layer, kernel, grad):
    return dict(zip(dict(layer.named_parameters()), torch.autograd.grad(
        kernel, list(layer.parameters()), grad, allow_unused=True)))


def by_the_operations(layer):
    """The kernel, differentiated by PyTorch's own rules."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(autograd, '_functorch_is_active', lambda: True)
        return layer.squeeze()


@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
def test_gradients_by_hand_are_those_of_autograd(block, layout):
    block = block.to(memory_format=layout)
    kernel = block.squeeze()
    grad = torch.randn_like(kernel)
    before = copy.deepcopy([*block.state_dict().values(), grad])
    found = gradients_of(block, kernel, grad)
    other = by_the_operations(block)
    assert relative_error(kernel, other) < 1e-14
    for name, expected in gradients_of(block, other, grad).items():
        if expected is None:
            assert found[name] is None, name
        else:
            assert relative_error(found[name], expected) < 1e-12, name
    # nothing was written into
    assert all(map(torch.equal, before, [*block.state_dict().values(), grad]))


def test_the_graph_keeps_nothing_but_the_branches(block):
    block = block.float()  # in which the windows are kept
    own = {tensor.untyped_storage().data_ptr()
           for tensor in (*block.parameters(), *block.buffers())}
    extra = []
    with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: extra.append(tensor.nbytes) if tensor.untyped_storage().data_ptr()
            not in own else None, lambda tensor: tensor):
        kernel = block.squeeze()
    assert not extra
    assert kernel.requires_grad


@pytest.mark.parametrize('name', ['kxk', 'kxk strided, grouped, dilated', 'kxk of RepVGG', '1x1',
                                  'kxk of RepVGG online, grouped'])
def test_second_derivatives(name):
    layer = randomize(BLOCKS[name]().double())
    names, parameters = zip(*((name, p) for name, p in layer.named_parameters() if name != 'bias'))
    assert torch.autograd.gradgradcheck(
        lambda *values: torch.func.functional_call(
            layer, dict(zip(names, values)), torch.ones(1, 4, 5, 5, dtype=torch.float64)),
        parameters, fast_mode=True)


@pytest.mark.parametrize('create_graph', [False, True])
def test_branches_that_depend_on_each_other(create_graph):
    """One tensor under two names, and one made of another: each use counts once."""
    layer = randomize(LAYERS['kxk']().double())
    value = torch.randn_like(layer.weight_orepa_1x1, requires_grad=True)

    def gradient():
        kernel = torch.func.functional_call(layer, {
            'weight_orepa_1x1': value, 'weight_orepa_avg_conv': 2 * value,
            'weight_orepa_pfir_conv': value}, torch.ones(1, 4, 5, 5, dtype=torch.float64))
        return torch.autograd.grad(kernel.sum(), value, create_graph=create_graph)[0]

    found = gradient()
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(autograd, '_functorch_is_active', lambda: True)
        assert relative_error(found, gradient()) < 1e-12


def test_batched_gradients_and_forward_mode(block):
    kernel = block.squeeze()
    parameter = next(p for p in block.parameters() if p.dim() == 2)
    batch = torch.randn(2, *kernel.shape, dtype=kernel.dtype)
    found, = torch.autograd.grad(kernel, parameter, batch, is_grads_batched=True,
                                 retain_graph=True)
    for one, grad in zip(found, batch):
        assert relative_error(one, torch.autograd.grad(kernel, parameter, grad,
                                                       retain_graph=True)[0]) < 1e-12
    name = next(name for name, p in block.named_parameters() if p is parameter)
    direction = torch.randn_like(parameter)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(parameter, direction)
        with torch.nn.utils.stateless._reparametrize_module(block, {name: dual}):
            tangent = torch.autograd.forward_ad.unpack_dual(block.squeeze()).tangent
    dot = (batch[0] * tangent).sum()
    assert relative_error(dot, (found[0] * direction).sum()) < 1e-10


def test_a_branch_that_is_frozen_gets_no_gradient(block):
    frozen = next(p for p in block.parameters() if p.dim() == 4)
    frozen.requires_grad_(False)
    block.squeeze().sum().backward()
    assert frozen.grad is None
    assert all(p.grad is not None for p in block.parameters() if p is not frozen and p.dim() == 4)


def test_gradients_on_the_meta_device(block):
    """Shapes only, as for counting memory."""
    block = block.to('meta')
    block.squeeze().sum().backward()
    assert all(p.grad.is_meta for p in block.parameters() if p.dim() == 4)


def test_backward_under_autocast_stays_in_float32():
    layer = randomize(LAYERS['kxk']())
    kernel = layer.squeeze()
    grad = torch.randn_like(kernel)
    expected = torch.autograd.grad(kernel, list(layer.parameters())[1:], grad)
    with torch.autocast('cpu', torch.bfloat16):
        found = torch.autograd.grad(layer.squeeze(), list(layer.parameters())[1:], grad)
    assert all(map(torch.equal, found, expected))


def test_gradients_lie_as_their_parameters(block):
    """Or each is copied on arrival."""
    kernel = block.squeeze()
    for name, grad in gradients_of(block, kernel, torch.randn_like(kernel)).items():
        assert grad is None or grad.is_contiguous(), name


#: Operations of one block: of the squeeze, and with its gradients. A GPU feels each.
BUDGET = {'kxk': (9, 32), '1x1': (3, 11), 'kxk of RepVGG': (9, 33),
          'kxk of RepVGG online': (10, 34)}


@pytest.mark.parametrize('name', BUDGET)
def test_the_number_of_operations(name):
    layer = randomize(BLOCKS[name]())
    grad = torch.randn_like(layer.squeeze())
    forward, both = BUDGET[name]
    with torch.no_grad():
        assert count_operations(layer.squeeze) <= forward
    assert count_operations(lambda: layer.squeeze().backward(grad)) <= both


# --- compiled ----------------------------------------------------------------------------------


@pytest.fixture
def compiler(monkeypatch):
    """A compiler that needs no C++; what was compiled."""
    compiled, real = [], torch.compile
    monkeypatch.setattr(autograd._Compiled, 'failed', False)
    autograd._runner.cache_clear()
    monkeypatch.setattr(torch, 'compile', lambda function, **options: compiled.append(
        function.__module__) or real(function, backend='aot_eager', **options))
    yield compiled
    autograd._runner.cache_clear()


def compiled_network():
    cfg = dict(type='OREPA', compile=True)
    return randomize(nn.Sequential(
        build_conv_layer(cfg, 3, 8, 7), build_conv_layer(cfg, 8, 8, 3),
        build_conv_layer(cfg, 8, 8, 3), build_conv_layer(cfg, 8, 4, 1)))


def step(model):
    # no constant image, on which windows that sum to zero have gradients of noise alone
    image = torch.rand(1, 3, 13, 13, generator=torch.Generator().manual_seed(0), device='cpu')
    model(image.to(next(model.parameters()).device)).square().sum().backward()
    return [p.grad for p in model.parameters()]


def test_the_compiled_squeeze_is_the_same(compiler):
    model = compiled_network()
    eager = copy.deepcopy(model)
    for module in eager.modules():
        if hasattr(module, 'compiled'):
            module.compiled = False
    for found, expected in zip(step(model), step(eager)):
        assert relative_error(found, expected) < 1e-5
    kinds = 3  # shapes of blocks; 3 to 8, 8 to 8 in stem and body, 8 to 4
    assert len(compiler) == 2 * kinds
    assert compiler.count('orepa_mm.layers.gradients') == kinds
    step(model)
    with torch.no_grad():
        model.eval()(torch.ones(1, 3, 13, 13))
    assert len(compiler) == 2 * kinds  # each once


def test_the_compiled_squeeze_with_an_identity(compiler):
    layer = randomize(BLOCKS['kxk of RepVGG online, grouped']())
    expected = [layer.squeeze(), *gradients_of(layer, layer.squeeze(), 1 + layer.weight).values()]
    layer.compiled = True
    kernel = layer.squeeze()
    found = [kernel, *gradients_of(layer, kernel, 1 + layer.weight).values()]
    assert compiler == ['orepa_mm.layers.squeeze', 'orepa_mm.layers.gradients']
    for one, other in zip(found, expected, strict=True):
        assert one is other is None or relative_error(one, other) < 1e-5


def test_many_shapes_are_compiled_each(compiler):
    """TorchDynamo by itself gives up after eight."""
    for channels in range(1, 12):
        layer = build_conv_layer(dict(type='OREPA', compile=True), channels, 4, 1)
        layer.squeeze().sum().backward()
    assert len(compiler) == 22


def test_without_a_compiler_it_runs_and_says_so_once(compiler, monkeypatch):
    said = []
    monkeypatch.setattr(autograd, 'log', lambda text, *args: said.append(text))

    def failing(function, **options):
        def run(*args, **kwargs):
            raise RuntimeError('no C++ compiler was found\nand much more')
        return run

    monkeypatch.setattr(torch, 'compile', failing)
    model = compiled_network()
    assert all(grad is not None for grad in step(model))
    step(model)
    assert said == ['the squeeze runs without torch.compile, which fails here: '
                    'no C++ compiler was found']


def test_an_ordinary_error_is_not_taken_for_a_missing_compiler(compiler):
    """One that the function itself raises as well."""
    layer = build_conv_layer(dict(type='OREPA', compile=True), 4, 4, 1)
    layer.weight_or1x1_origin = nn.Parameter(torch.ones(4, 5, 1, 1))
    with pytest.raises(RuntimeError):
        layer.squeeze()


def test_plain_pointwise_layers_take_the_option_too():
    assert type(build_conv_layer(dict(type='OREPA', compile=True, pointwise=False), 3, 4, 1)
                ) is nn.Conv2d
