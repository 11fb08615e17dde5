"""What the branches do, against numpy and against each branch convolving the feature map."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import randomize, relative_error
from test_squeeze import orepa_on_feature_map
from torch import nn

from orepa_mm.layers import (
    DBBConv2d,
    OREPAConv1x1,
    OREPAConv2d,
    OREPARepVGGConv2d,
    OREPAStemConv2d,
    branched_layers,
    mean_similarity,
    relative_norms,
    shares,
    similarities,
)

TOLERANCE = 1e-10


def double(*shape):
    return torch.randn(*shape, dtype=torch.float64)


@torch.no_grad()
def with_one_branch(layer, row, scaled):
    """A copy in which all scales but those of one branch are zero."""
    layer = copy.deepcopy(layer)
    scale = layer.vector[row].clone() if scaled else 1
    layer.vector.zero_()
    layer.vector[row] = scale
    return layer


@torch.no_grad()
@pytest.mark.parametrize('scaled', [True, False])
def test_branches_of_an_orepa_block_on_the_feature_map(scaled):
    layer = randomize(OREPAConv2d(4, 6, 3, 2, 2, 2, groups=2, bias=False).double())
    x, kernels = double(2, 4, 9, 8), layer.branch_kernels(scaled)
    assert tuple(kernels) == layer.branch_names
    for row, kernel in enumerate(kernels.values()):
        expected = orepa_on_feature_map(with_one_branch(layer, row, scaled), x)
        assert relative_error(F.conv2d(x, kernel, None, 2, 2, 2, 2), expected) < TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize('layer', [
    OREPAConv2d(4, 4, 3), OREPARepVGGConv2d(4, 4, 3), OREPARepVGGConv2d(4, 4, 3, groups=4),
    OREPAConv1x1(4, 6), DBBConv2d(4, 6, 3, padding=1), DBBConv2d(4, 4, 3, padding=1, groups=4)])
def test_branches_sum_to_the_kernel(layer):
    kernels = randomize(layer).branch_kernels()
    assert tuple(kernels) == layer.branch_names
    expected = layer.equivalent_kernel_bias()[0]
    assert relative_error(sum(kernels.values()), expected) < TOLERANCE
    assert shares(kernels).sum().item() == pytest.approx(1)


@torch.no_grad()
@pytest.mark.parametrize('options', [
    dict(out_channels=6, padding=1), dict(out_channels=4, padding=1, groups=4),
    dict(out_channels=8, padding=2, dilation=2, stride=2, groups=2)])
@pytest.mark.parametrize('scaled', [True, False])
def test_branches_of_a_diverse_branch_block_on_the_feature_map(options, scaled):
    layer = randomize(DBBConv2d(4, kernel_size=3, **options)).double().eval()
    kernels = layer.branch_kernels(scaled)
    if not scaled:
        for bn in layer.modules():
            if isinstance(bn, nn.BatchNorm2d):  # to do nothing
                bn.running_mean.zero_()
                bn.running_var.fill_(1 - bn.eps)
                bn.weight.fill_(1)
                bn.bias.zero_()
    outputs = {
        'origin': layer.dbb_origin, '1x1': layer.dbb_1x1, '1x1-kxk': layer.dbb_1x1_kxk,
        'average': lambda x: layer.dbb_avg.avgbn(
            layer._averaged(layer.dbb_avg.bn(layer.dbb_avg.conv(x))))}
    x = double(2, 4, 9, 8)
    assert kernels.keys() == outputs.keys()
    for name, kernel in kernels.items():
        without_bias = outputs[name](x) - outputs[name](torch.zeros_like(x))
        found = F.conv2d(x, kernel, None, layer.stride, layer.padding, layer.dilation, layer.groups)
        assert relative_error(found, without_bias) < TOLERANCE


def test_measures_against_numpy():
    branches = {name: double(3, 2, 3, 3) for name in 'abcd'}
    flat = [kernel.cpu().numpy().ravel() for kernel in branches.values()]
    expected = np.array([[np.dot(a, b) / np.sqrt(np.dot(a, a) * np.dot(b, b)) for b in flat]
                         for a in flat])
    found = similarities(branches)
    np.testing.assert_allclose(found.cpu().numpy(), expected, rtol=1e-12)
    pairs = [abs(expected[a, b]) for a in range(4) for b in range(a)]
    assert mean_similarity(found).item() == pytest.approx(np.mean(pairs))
    total = np.sum(flat, axis=0)
    np.testing.assert_allclose(shares(branches).cpu().numpy(), [
        np.dot(branch, total) / np.dot(total, total) for branch in flat], rtol=1e-12)
    np.testing.assert_allclose(relative_norms(branches).cpu().numpy(), [
        np.linalg.norm(branch) / np.linalg.norm(total) for branch in flat], rtol=1e-12)


def test_a_branch_that_works_against_the_sum():
    kernel = double(3, 2, 3, 3)
    branches = {'for': 3 * kernel, 'against': -2 * kernel}
    assert shares(branches).tolist() == pytest.approx([3, -2])
    assert relative_norms(branches).tolist() == pytest.approx([3, 2])
    assert similarities(branches).flatten().tolist() == pytest.approx([1, -1, -1, 1])
    assert mean_similarity(similarities(branches)).item() == pytest.approx(1)


def test_a_branch_of_zeros_has_no_direction():
    branches = {'a': double(3, 2, 3, 3), 'zero': torch.zeros(3, 2, 3, 3).double(),
                'b': double(3, 2, 3, 3)}
    found = similarities(branches)
    assert found.isnan().tolist() == [[False, True, False], [True] * 3, [False, True, False]]
    assert mean_similarity(found).item() == pytest.approx(abs(found[0, 2].item()))
    assert shares(branches)[1] == 0
    assert shares(branches).sum().item() == pytest.approx(1)
    assert mean_similarity(similarities({'a': branches['a']})).isnan()
    assert shares({'zero': branches['zero']}).isnan().all()


def test_the_prior_starts_at_zero_but_has_a_kernel_to_scale():
    layer = OREPAConv2d(4, 4, 3)
    assert layer.branch_kernels()['prior'].abs().max() == 0
    assert not similarities(layer.branch_kernels(scaled=False)).isnan().any()


def test_generators_stand_for_their_stem():
    shared = OREPAConv1x1(4, 4)
    model = nn.ModuleDict(dict(
        stem=OREPAStemConv2d(3, 4, 7), conv=nn.Conv2d(4, 4, 3), a=shared, again=shared,
        block=nn.Sequential(DBBConv2d(4, 4, 3, padding=1), OREPARepVGGConv2d(4, 4, 3))))
    assert [name for name, _ in branched_layers(model)] == [
        'stem.weight0', 'stem.weight1', 'stem.weight2', 'a', 'block.0', 'block.1']
    assert [name for name, _ in branched_layers(shared)] == ['']
