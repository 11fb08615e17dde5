"""What records a model: fx, TorchScript, compile, FLOP counters, conv-BN functions."""

import warnings

import pytest
import torch
from helpers import LAYERS, randomize, relative_error
from mmcv.cnn import ConvModule
from mmengine.analysis import get_model_complexity_info
from mmengine.model.efficient_conv_bn_eval import turn_on_efficient_conv_bn_eval
from torch import fx, nn

from orepa_mm.layers import OREPAConv1x1, OREPAConv2d, OREPAStemConv2d


def network(**stem):
    return randomize(nn.Sequential(
        OREPAStemConv2d(3, 6, 7, 2, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(),
        OREPAConv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(),
        OREPAConv1x1(6, 4, bias=False), nn.BatchNorm2d(4)))


@pytest.fixture
def images():
    return torch.randn(2, 3, 24, 20)


@pytest.mark.parametrize('mode', ['train', 'eval'])
def test_fx_takes_a_layer_as_one_step(images, mode):
    model = getattr(network(), mode)()
    traced = fx.symbolic_trace(model)
    assert [node.op for node in traced.graph.nodes].count('call_module') == len(model)
    assert not [node for node in traced.graph.nodes if node.op == 'get_attr']  # no frozen kernel
    with torch.no_grad():
        model[3].vector.mul_(2)
        assert relative_error(traced(images), model(images)) < 1e-6
    traced(images).sum().backward()
    assert model[3].vector.grad.abs().sum() > 0


def test_a_layer_alone_cannot_be_traced_by_fx():
    with pytest.raises(TypeError, match='a module that contains it'):
        fx.symbolic_trace(OREPAConv1x1(4, 4))


def test_efficient_conv_bn_eval_of_mmengine(images):
    model = network().eval()
    expected = model(images).detach()
    turn_on_efficient_conv_bn_eval(nn.ModuleDict({'model': model}), 'model')
    assert relative_error(model(images), expected) < 1e-5
    model(images).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_efficient_conv_bn_eval_of_mmcv(x):
    module = ConvModule(4, 6, 3, padding=1, conv_cfg=dict(type='OREPA'), norm_cfg=dict(type='BN'))
    randomize(module).eval()
    expected = module(x).detach()
    module.turn_on_efficient_conv_bn_eval()
    calls = []
    module.bn.register_forward_hook(lambda *args: calls.append(1))
    assert relative_error(module(x), expected) < 1e-5
    assert not calls  # it was on
    module(x).sum().backward()
    assert all(p.grad is not None for p in module.conv.parameters())


@pytest.mark.parametrize('mode', ['train', 'eval'])
@pytest.mark.parametrize('case', LAYERS)
def test_torchscript_tracing(case, x, mode):
    layer = getattr(randomize(LAYERS[case]()), mode)()
    with warnings.catch_warnings():
        warnings.simplefilter('error', torch.jit.TracerWarning)  # no value became a constant
        traced = torch.jit.trace(layer, x, check_trace=False)
    with torch.no_grad():
        next(p for p in layer.parameters() if p.dim() == 4).mul_(2)
        assert relative_error(traced(x), layer(x)) < 1e-5


def test_complexity_of_a_model_with_a_stem():
    info = get_model_complexity_info(network().eval(), (3, 24, 20), show_table=False,
                                     show_arch=False)
    assert info['params'] == sum(p.numel() for p in network().parameters())
    assert info['flops'] > 0


@pytest.mark.parametrize('mode', ['train', 'eval'])
def test_compiled_as_one_graph(images, mode):
    model = getattr(network(), mode)()
    compiled = torch.compile(model, backend='aot_eager', fullgraph=True)
    with torch.set_grad_enabled(mode == 'train'):
        assert relative_error(compiled(images), model(images)) < 1e-4
        with torch.no_grad():
            model[3].vector.mul_(2)
        assert relative_error(compiled(images), model(images)) < 1e-4


def test_exported_as_one_graph(images):
    model = network().eval()
    with torch.no_grad():
        exported = torch.export.export(model, (images,)).module()
        assert relative_error(exported(images), model(images)) < 1e-5
