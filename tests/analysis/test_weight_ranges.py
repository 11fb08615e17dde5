"""Statistics of weights against NumPy and numbers worked out by hand."""

import copy
import csv
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from export.test_stock import MODEL, OTHERS
from helpers import randomize
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules

from orepa_mm.analysis import weight_range_figure as visualization
from orepa_mm.analysis.weight_ranges import (
    describe_weights,
    int8_sqnr,
    weight_ranges,
    worst_layers,
    write_weight_ranges,
)
from orepa_mm.reparam import reparameterize


@pytest.fixture(autouse=True)
def _mmdet_scope():
    register_all_modules(init_default_scope=True)


def forms_of(backbone=None):
    cfg = copy.deepcopy(MODEL)
    if backbone is not None:
        cfg['backbone'] = backbone
    model = randomize(MODELS.build(cfg)).eval()
    return model, reparameterize(model), reparameterize(model, fold_bn=True)


@pytest.fixture(scope='module')
def forms():
    register_all_modules(init_default_scope=True)
    return forms_of()


@pytest.fixture(scope='module')
def ranges(forms):
    return weight_ranges(*forms)


def numpy_sqnr(tensors, per_channel=False):
    signal = noise = 0.0
    for tensor in tensors:
        rows = tensor.detach().double().flatten(1).numpy()
        scale = np.abs(rows).max(axis=1 if per_channel else None, keepdims=True) / 127
        steps = np.clip(np.rint(rows / scale), -127, 127)
        signal += (rows**2).sum()
        noise += ((rows - steps * scale)**2).sum()
    return 10 * np.log10(signal / noise)


def test_by_hand():
    found = describe_weights([torch.tensor([[[[1., -1.]]], [[[4., 2.]]]]), torch.zeros(1, 1, 1, 2)])
    # values 1 -1 4 2 0 0: mean 1, mean square 22/6; channels 1, 4, 0
    assert found['count'] == 6
    assert (found['minimum'], found['maximum']) == (-1, 4)
    assert found['std'] == pytest.approx(math.sqrt(22 / 6 - 1))
    assert found['outlier_ratio'] == pytest.approx(4 / math.sqrt(22 / 6 - 1))
    assert found['channel_ratio_median'] == 4
    assert found['channel_ratio_smallest'] == math.inf


def test_int8_by_hand():
    # a scale of 1: 127 and 1 are steps, 0.25 is off by 0.25
    weight = torch.tensor([[127.], [1.], [0.25]]).view(3, 1, 1, 1)
    assert int8_sqnr([weight]) == pytest.approx(
        10 * math.log10((127**2 + 1 + 0.0625) / 0.0625), rel=1e-6)
    assert int8_sqnr([weight], per_channel=True) > 120  # one value per channel is always a step
    assert int8_sqnr([torch.zeros(2, 1, 1, 1)]) == math.inf
    assert int8_sqnr([torch.zeros(2, 1, 1, 1)], per_channel=True) == math.inf


@pytest.mark.parametrize('per_channel', [False, True])
def test_int8_against_numpy(per_channel):
    generator = torch.Generator().manual_seed(0)
    spread = torch.logspace(-1, 1, 16).view(-1, 1, 1, 1)
    tensors = [torch.randn(16, 8, 3, 3, generator=generator) * spread,
               torch.randn(16, 8, 1, 1, generator=generator)]
    assert int8_sqnr(tensors, per_channel) == pytest.approx(
        numpy_sqnr(tensors, per_channel), abs=0.01)
    assert int8_sqnr(tensors[:1], True) > int8_sqnr(tensors[:1]) + 3  # channels differ by 100


def test_every_layer_in_every_form(forms, ranges):
    training, deployed, _ = forms
    convs = [name for name, module in deployed.named_modules()
             if isinstance(module, torch.nn.Conv2d)]
    assert [(entry.layer, entry.form) for entry in ranges] == [
        (name, form) for name in convs for form in ('training', 'deployed', 'folded')]
    entries = {(entry.layer, entry.form): entry for entry in ranges}
    name = 'backbone.layer2.0.conv1'
    layer, bn = training.get_submodule(name), training.backbone.layer2[0].bn1
    branches = [p for key, p in layer.named_parameters() if key.startswith('weight_orepa')]
    values = np.concatenate([p.detach().double().numpy().ravel() for p in branches])
    kernel = deployed.get_submodule(name).weight.detach().double()
    scale = (bn.weight / torch.sqrt(bn.running_var + bn.eps)).detach().double()
    for form, array, tensors in (
            ('training', values, branches), ('deployed', kernel.numpy(), [kernel]),
            ('folded', (kernel * scale.view(-1, 1, 1, 1)).numpy(),
             [kernel * scale.view(-1, 1, 1, 1)])):
        entry = entries[name, form]
        assert entry.reparameterized
        assert entry.count == array.size
        assert (entry.minimum, entry.maximum, entry.std) == pytest.approx(
            (array.min(), array.max(), array.std()), rel=1e-5)
        assert entry.largest == pytest.approx(np.abs(array).max(), rel=1e-5)
        assert entry.sqnr_tensor_db == pytest.approx(numpy_sqnr(tensors), abs=0.05)
        assert entry.sqnr_channel_db == pytest.approx(numpy_sqnr(tensors, True), abs=0.05)
    channels = kernel.abs().flatten(1).amax(1).numpy()
    assert entries[name, 'deployed'].channel_ratio_median == pytest.approx(
        channels.max() / np.median(channels))
    assert entries[name, 'deployed'].channel_ratio_smallest == pytest.approx(
        channels.max() / channels.min())


def test_a_layer_without_branches_changes_by_folding_only():
    model = forms_of(OTHERS['dbb'])  # its stem stays a plain convolution
    plain, deployed, folded = weight_ranges(*model)[:3]
    assert plain.layer == 'backbone.conv1'
    assert not plain.reparameterized
    assert plain.std == deployed.std != folded.std


def test_a_block_that_becomes_one_layer():
    """RepVGG's 3 x 3 and 1 x 1 branches are no layers of the deployed model."""
    model, *others = forms_of(OTHERS['repvgg'])
    entry = next(entry for entry in weight_ranges(model, *others)
                 if entry.layer == 'backbone.stage_1.0.branch_reparam')
    assert entry.reparameterized
    block = model.backbone.stage_1[0]
    assert entry.count == sum(p.numel() for name in ('branch_3x3', 'branch_1x1')
                              for p in getattr(block, name).parameters() if p.dim() == 4)


def test_worst_first(ranges):
    folded = {entry.layer: entry.sqnr_tensor_db for entry in ranges if entry.form == 'folded'}
    worst = worst_layers(ranges, 3)
    assert [folded[layer] for layer in worst] == sorted(folded.values())[:3]


def test_csv_holds_everything(ranges, tmp_path):
    write_weight_ranges(ranges, tmp_path / 'ranges.csv')
    with (tmp_path / 'ranges.csv').open() as file:
        lines = list(csv.DictReader(file))
    assert [(line['layer'], line['form']) for line in lines] == [
        (entry.layer, entry.form) for entry in ranges]
    for line, entry in zip(lines, ranges):
        assert float(line['sqnr_tensor_db']) == entry.sqnr_tensor_db
        assert float(line['channel_ratio_smallest']) == entry.channel_ratio_smallest


def test_figure_shows_every_layer_and_form(ranges):
    figure = visualization.draw_weight_ranges(ranges, 'a title')
    layers = list(dict.fromkeys(entry.layer for entry in ranges))
    spread, channels, noise = figure.axes
    assert [label.get_text() for label in noise.get_xticklabels()] == layers
    assert [len(bars.get_segments()) for bars in spread.collections] == [len(layers)] * 3
    for axes, field, count in ((channels, 'channel_ratio_median', 3), (noise, 'sqnr_tensor_db', 4)):
        assert len(axes.lines) == count
        for line, form in zip(axes.lines, ('training', 'deployed', 'folded')):
            assert list(line.get_ydata()) == [
                getattr(entry, field) for entry in ranges if entry.form == form]


def test_all_files_or_none(ranges, tmp_path, monkeypatch):
    benchmark = SimpleNamespace(conditions={'weights': 'some/model.pth'}, weight_ranges=ranges,
                                as_dict=lambda: {'a': 1})
    paths = visualization.write_benchmark(benchmark, tmp_path / 'out')
    assert json.loads(paths[0].read_text()) == {'a': 1}
    assert paths[2].read_bytes().startswith(b'\x89PNG')
    assert sorted(path.name for path in (tmp_path / 'out').iterdir()) == [
        'benchmark.json', 'weight_ranges.csv', 'weight_ranges.png']

    monkeypatch.setattr(visualization, 'draw_weight_ranges', None)
    with pytest.raises(TypeError):
        visualization.write_benchmark(benchmark, tmp_path / 'none')
    assert not list((tmp_path / 'none').iterdir())
