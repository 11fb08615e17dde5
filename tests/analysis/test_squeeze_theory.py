"""What squeezing must compute, against PyTorch's own counter and numbers worked out by hand."""

import pytest
import torch
import torch.nn.functional as F
from mmdet.models.backbones import ResNet
from torch.utils.flop_counter import FlopCounterMode

from orepa_mm.analysis.measure import count_multiply_adds
from orepa_mm.analysis.run_cost import squeeze_theory
from orepa_mm.analysis.squeeze_theory import (
    FORMULAS,
    conv_multiply_adds,
    memory_floor,
    products,
    products_alone,
    squeeze_costs,
)
from orepa_mm.layers import (
    DBBConv2d,
    OREPAConv1x1,
    OREPAConv2d,
    OREPARepVGGConv2d,
    OREPAStemConv2d,
)


def multiply_adds(layer):
    found = products(layer)
    assert {product.name for product in found} <= FORMULAS.keys()
    return {name: sum(p.multiply_adds for p in found if p.name == name)
            for name in {p.name for p in found}}


def test_by_hand():
    # o = 6, i = 4, k = 3
    assert multiply_adds(OREPAConv2d(4, 6, 3)) == {
        'windows': 3 * 6 * 4 * 9, 'sequential': 4 * 6 * 4 * 9, 'separable': 8 * 6 * 4 * 9}
    assert multiply_adds(OREPARepVGGConv2d(4, 6, 3))['windows'] == 2 * 6 * 4 * 9
    # 16 channels in 8 groups: i = 2, t/g = 4
    assert multiply_adds(OREPAConv2d(16, 16, 3, groups=8)) == {
        'windows': 3 * 16 * 2 * 9, 'sequential': 4 * 16 * 2 * 9, 'separable': 8 * 16 * 2 * 9}
    assert multiply_adds(OREPAConv1x1(4, 6, 1)) == {'pointwise': 6 * 4 * 4}
    assert multiply_adds(OREPAConv1x1(6, 4, 1)) == {'pointwise': 4 * 6 * 4}
    assert multiply_adds(OREPAConv1x1(8, 8, 1, groups=2)) == {'pointwise': 8 * 4 * 4}
    with pytest.raises(TypeError, match='no OREPA block'):
        products(DBBConv2d(4, 6, 3, padding=1))


def test_products_against_the_counter():
    """The same sums written as `einsum` and `conv2d`, whose multiply-adds PyTorch counts."""
    first, second = torch.randn(4, 4), torch.randn(6, 4, 3, 3)
    counted = {
        'sequential': lambda: torch.einsum('ti,othw->oihw', first, second),
        'separable': lambda: torch.einsum('iehw,oie->oihw', torch.randn(4, 8, 3, 3),
                                          torch.randn(6, 4, 8)),
        'windows': lambda: torch.einsum('oin,onhw->oihw', torch.randn(6, 4, 3),
                                        torch.randn(6, 3, 3, 3))}
    found = multiply_adds(OREPAConv2d(4, 6, 3))
    for name, function in counted.items():
        assert found[name] == count_multiply_adds(function), name
    kernels = torch.randn(4, 6, 3, 3), torch.randn(6, 6, 3, 3), torch.randn(6, 6, 3, 3)
    chain = multiply_adds(OREPAStemConv2d(4, 6, 7))['chain']
    assert chain == count_multiply_adds(lambda: F.conv2d(
        F.conv2d(kernels[0], kernels[1], padding=2), kernels[2], padding=2))


def test_products_alone_run_what_is_counted():
    layers = [OREPAConv2d(8, 8, 3, groups=2), OREPAConv1x1(4, 6, 1), OREPAStemConv2d(3, 4, 7)]
    run = products_alone(layers, torch.device('cpu'))
    with FlopCounterMode(display=False) as counter:
        run()
    forward = sum(product.multiply_adds for layer in layers for product in products(layer))
    assert counter.get_total_flops() == 2 * 3 * forward


def test_costs_of_a_model():
    model = torch.nn.ModuleList([OREPAConv1x1(4, 6, 1, bias=False),
                                 OREPAConv1x1(4, 6, 1, bias=False)])
    cost, = squeeze_costs(model)
    parameters = 2 * (24 + 16 + 24 + 12)  # origin, two factors, two rows of scales
    assert (cost.kind, cost.layers, cost.parameters, cost.kernel_values) == (
        '1 x 1', 2, parameters, 48)
    assert (cost.forward, cost.step) == (2 * 96, 6 * 96)
    assert cost.forward_bytes == 4 * (parameters + 48)
    assert cost.step_bytes == cost.forward_bytes + 4 * (2 * parameters + 48)
    assert memory_floor(10, 3) == {'parameters': 40, 'gradients': 40, 'momentum': 40,
                                   'kernels': 12}


def test_convolutions_against_the_counter():
    with torch.device('meta'):
        stock = ResNet(50, base_channels=8, norm_eval=False)
    found = conv_multiply_adds(stock, (2, 3, 64, 64))
    model, x = ResNet(50, base_channels=8, norm_eval=False), torch.randn(2, 3, 64, 64)
    assert found['forward'] == count_multiply_adds(lambda: model(x))
    with FlopCounterMode(display=False) as counter:
        sum(y.sum() for y in model(x)).backward()
    assert found['step'] == counter.get_total_flops() // 2


def test_the_table():
    rows = {row.name: row.extra for row in squeeze_theory().rows}
    # the products of a ResNet-50: 66 GFLOP forward and backward
    assert rows['squeeze: all']['forward + backward (G)'] == '32.98'
    assert rows['squeeze: all']['layers'] == 53
    small, large = (rows[f'convolutions at {size}'] for size in (
        '2 x 3 x 416 x 544', '2 x 3 x 800 x 1333'))
    assert float(small['squeeze / convolutions'][:-1]) > float(large['squeeze / convolutions'][:-1])
