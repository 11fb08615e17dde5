"""Squeezing against the branches computed one by one on the feature map, in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import randomize, relative_error

from orepa_mm.layers import OREPAConv1x1, OREPAConv2d, OREPAStemConv2d
from orepa_mm.layers.squeeze import frequency_prior

TOLERANCE = 1e-10


def orepa_on_feature_map(layer, x):
    """Six branches, each with real convolutions; padding is dilation * (k // 2)."""
    k, g, (stride, _), (dilation, _) = (layer.kernel_size[0], layer.groups, layer.stride,
                                        layer.dilation)
    o, spatial = layer.out_channels, dict(stride=stride, padding=dilation * (k // 2),
                                          dilation=dilation)
    average = torch.full((o, 1, k, k), 1 / k**2).to(x.dtype)  # float32, as the authors' is
    prior = frequency_prior(o, k).to(x.dtype)[:, None]
    identity = layer.id_tensor
    # the pointwise rows run with the group fastest: back to group by group
    pointwise = layer.weight_orepa_gconv_pw
    pointwise = torch.cat([pointwise[group::g] for group in range(g)])
    branches = [
        F.conv2d(x, layer.weight_orepa_origin, groups=g, **spatial),
        F.conv2d(F.conv2d(x, layer.weight_orepa_avg_conv, groups=g), average, groups=o,
                 **spatial),
        F.conv2d(F.conv2d(x, layer.weight_orepa_pfir_conv, groups=g), prior, groups=o,
                 **spatial),
        F.conv2d(F.conv2d(x, layer.weight_orepa_1x1_kxk_idconv1 + identity, groups=g),
                 layer.weight_orepa_1x1_kxk_conv2, groups=g, **spatial),
        F.conv2d(x, layer.weight_orepa_1x1, stride=stride, groups=g),
        F.conv2d(F.conv2d(x, layer.weight_orepa_gconv_dw, groups=x.shape[1], **spatial),
                 pointwise, groups=g),
    ]
    return sum(branch * scale[:, None, None] for branch, scale in zip(branches, layer.vector))


@pytest.mark.parametrize('kernel_size', [3, 5])
@pytest.mark.parametrize('dilation', [1, 2])
@pytest.mark.parametrize('stride', [1, 2])
@pytest.mark.parametrize(('in_channels', 'out_channels', 'groups'),
                         [(4, 6, 1), (6, 4, 2), (16, 16, 8)])
def test_orepa_equals_its_branches(in_channels, out_channels, groups, stride, dilation,
                                   kernel_size):
    layer = OREPAConv2d(in_channels, out_channels, kernel_size, stride,
                        dilation * (kernel_size // 2), dilation, groups, bias=False)
    randomize(layer.double())
    x = torch.randn(2, in_channels, 11, 9, dtype=torch.float64)
    assert relative_error(layer(x), orepa_on_feature_map(layer, x)) < TOLERANCE
    assert layer.weight.shape == (out_channels, in_channels // groups, kernel_size, kernel_size)


@pytest.mark.parametrize('stride', [1, 2])
@pytest.mark.parametrize(('in_channels', 'out_channels', 'groups'),
                         [(4, 6, 1), (6, 4, 1), (5, 5, 1), (4, 8, 2), (8, 4, 2)])
def test_orepa_1x1_equals_its_branches(in_channels, out_channels, groups, stride):
    layer = randomize(OREPAConv1x1(in_channels, out_channels, 1, stride, groups=groups,
                                   bias=False).double())
    x = torch.randn(2, in_channels, 6, 5, dtype=torch.float64)
    origin = F.conv2d(x, layer.weight_or1x1_origin, stride=stride, groups=groups)
    product = F.conv2d(F.conv2d(x, layer.weight_or1x1_l2i_conv1, stride=stride, groups=groups),
                       layer.weight_or1x1_l2i_conv2, groups=groups)
    expected = (origin * layer.vector[0][:, None, None]
                + product * layer.vector[1][:, None, None])
    assert relative_error(layer(x), expected) < TOLERANCE


@pytest.mark.parametrize('kernel_size', [5, 7])
def test_stem_kernel_is_the_written_out_composition(kernel_size):
    stem = randomize(OREPAStemConv2d(2, 3, kernel_size, bias=False).double())
    first, *others = (getattr(stem, f'weight{j}').squeeze() for j in range((kernel_size - 1) // 2))
    composed = {(o, i, y, x): first[o, i, y, x].item()
                for o in range(3) for i in range(2) for y in range(3) for x in range(3)}
    size = 3
    for kernel in others:
        size += 2
        # a cross-correlation with padding 2: no flip
        composed = {
            (o, i, y, x): sum(composed[m, i, y + u - 2, x + v - 2] * kernel[o, m, u, v].item()
                              for m in range(3) for u in range(3) for v in range(3)
                              if (m, i, y + u - 2, x + v - 2) in composed)
            for o in range(3) for i in range(2) for y in range(size) for x in range(size)}
    expected = torch.zeros(3, 2, kernel_size, kernel_size, dtype=torch.float64)
    for index, value in composed.items():
        expected[index] = value
    assert relative_error(stem.weight, expected) < TOLERANCE


@pytest.mark.parametrize('kernel_size', [3, 5])
def test_frequency_prior_formula(kernel_size):
    o = 8
    prior = frequency_prior(o, kernel_size)
    for c in range(o):
        for h in range(kernel_size):
            for w in range(kernel_size):
                expected = (math.cos(math.pi * (h + 0.5) * (c + 1) / kernel_size) if c < o / 2
                            else math.cos(math.pi * (w + 0.5) * (c + 1 - o / 2) / kernel_size))
                assert prior[c, h, w].item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize('layer', [
    OREPAConv2d(4, 6, 3, padding=1, groups=2), OREPAConv1x1(3, 6), OREPAConv1x1(6, 3),
    OREPAStemConv2d(2, 4, 5),
], ids=['kxk', '1x1 expand', '1x1 reduce', 'stem'])
def test_gradients_are_those_of_finite_differences(layer):
    layer = randomize(layer.double())
    x = torch.randn(1, layer.in_channels, 6, 6, dtype=torch.float64)
    names, parameters = zip(*layer.named_parameters())
    assert torch.autograd.gradcheck(
        lambda *values: torch.func.functional_call(layer, dict(zip(names, values)), x),
        parameters, fast_mode=True)
