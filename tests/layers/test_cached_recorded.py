"""Scopes in which a layer is squeezed once, where a compiler or a tracer records what runs."""

import torch
from helpers import LAYERS, randomize, relative_error
from mmengine.model import BaseModel
from test_cached import Levels, assert_same, gradients, unscoped
from torch import fx, nn

from orepa_mm.layers import cached


def test_recorded_models_squeeze_at_each_call(x):
    """Compiled as one graph, traced, and as a part of what fx traces."""
    model = Levels('kxk')
    expected = model(x)
    compiled = torch.compile(model, backend='aot_eager', fullgraph=True)
    traced = torch.jit.trace(model, x)
    graph = fx.symbolic_trace(nn.Sequential(model))
    for recorded in (compiled, traced, graph):
        assert relative_error(recorded(x), expected) < 1e-5
    loss = compiled(x)
    assert_same(gradients(model, loss), gradients(model, unscoped(model, x)), 1e-5)
    with cached():
        assert torch.equal(model(x), expected)
        assert relative_error(compiled(x), expected) < 1e-5
    with torch.no_grad():
        model.conv.vector.mul_(2)
    for recorded in (compiled, traced, graph):
        assert relative_error(recorded(x), model(x)) < 1e-5


def test_a_scope_inside_a_compiled_function(x):
    layer = randomize(LAYERS['kxk']())

    def twice(x):
        with cached():
            return layer(x).sum() + layer(x).square().sum()

    compiled = torch.compile(twice, backend='aot_eager', fullgraph=True)
    assert_same(gradients(layer, compiled(x)), gradients(layer, twice(x)), 1e-5)


def test_a_model_as_one_step_of_a_traced_graph(x):
    class Tracer(fx.Tracer):
        def is_leaf_module(self, module, name):
            return isinstance(module, BaseModel)

    graph = Tracer().trace(nn.Sequential(Levels()))
    assert [node.op for node in graph.nodes] == ['placeholder', 'call_module', 'output']
