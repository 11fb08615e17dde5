"""What branches do in a whole model: numbers against numpy, tables, figures, the tool."""

import json
from unittest import mock

import numpy as np
import pytest
import torch
from helpers import ROOT, run, run_each, vary_scales
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from torch import nn

from orepa_mm.analysis import similarity_figure
from orepa_mm.analysis.similarity import FORMS, branch_cells, branch_markdown, measure_branches
from orepa_mm.analysis.similarity_figure import draw_shares, draw_similarities, write_branches
from orepa_mm.errors import NothingToConvertError
from orepa_mm.layers import DBBConv2d, OREPAConv1x1, OREPAConv2d, OREPAStemConv2d

CONFIG = ROOT / 'configs/imagenet/orepa-resnet18-light_300i_in1k.py'
FILES = {'branch_similarity.json', 'branch_similarity.md', 'similarity.png', 'shares.png'}


@pytest.fixture(scope='module')
def model():
    torch.manual_seed(0)
    model = nn.ModuleDict(dict(
        stem=OREPAStemConv2d(3, 4, 5), kxk=OREPAConv2d(4, 4, 3), start=OREPAConv1x1(
            4, 6, single_init=True), plain=nn.Conv2d(6, 4, 1), dbb=DBBConv2d(4, 4, 3, padding=1)))
    for name in ('stem', 'kxk', 'dbb'):
        vary_scales(model[name])
    kernels = model['kxk'].branch_kernels()
    others = sum(kernel for name, kernel in kernels.items() if name != 'origin')
    model['kxk'].set_kernel(0.7 * others)  # by an origin branch that works against them
    return model


@pytest.fixture(scope='module')
def layers(model):
    return measure_branches(model)


def test_against_numpy(model, layers):
    assert [(entry.layer, entry.kind) for entry in layers] == [
        ('stem.weight0', 'Generator'), ('stem.weight1', 'Generator'), ('kxk', 'OREPAConv2d'),
        ('start', 'OREPAConv1x1'), ('dbb', 'DBBConv2d')]
    for entry in layers:
        layer = model.get_submodule(entry.layer)
        assert entry.names == layer.branch_names
        for form, scaled in (('scaled', True), ('unscaled', False)):
            kernels = np.stack([kernel.numpy().ravel()
                                for kernel in layer.branch_kernels(scaled).values()])
            norms, total = np.linalg.norm(kernels, axis=1), kernels.sum(0)
            with np.errstate(invalid='ignore'):
                cosines = np.einsum('ai,bi->ab', kernels, kernels) / np.outer(norms, norms)
            found = entry.measures(form)
            np.testing.assert_allclose(found.similarities, cosines, atol=1e-12)
            np.testing.assert_allclose(found.shares, kernels @ total / np.sum(total**2))
            np.testing.assert_allclose(found.relative_norms, norms / np.sqrt(np.sum(total**2)))
            pairs = np.abs(cosines[np.tril_indices(len(kernels), -1)])
            pairs = pairs[~np.isnan(pairs)]
            assert found.mean_similarity == pytest.approx(pairs.mean() if pairs.size else np.nan,
                                                          nan_ok=True)


def test_a_plain_model_is_refused():
    with pytest.raises(NothingToConvertError, match='not in training form'):
        measure_branches(nn.Sequential(nn.Conv2d(3, 4, 3)))


@pytest.mark.parametrize('form', FORMS)
def test_table(layers, form):
    headings, lines = branch_cells(layers, form)
    assert headings == ['layer', 'origin', 'average', 'prior', '1x1-kxk', '1x1', 'separable',
                        'product', 'mean |similarity|']
    rows = {line[0]: dict(zip(headings[1:], line[1:])) for line in lines}
    by_layer = {entry.layer: entry for entry in layers}
    assert list(rows) == [*by_layer, 'mean']
    assert rows['kxk']['product'] == rows['dbb']['prior'] == ''
    start = form == 'scaled'
    assert (rows['start']['mean |similarity|'] == '-') is start
    assert (rows['start']['product'] == '0.000') is start
    share = dict(zip(by_layer['dbb'].names, by_layer['dbb'].measures(form).shares))['1x1-kxk']
    assert rows['dbb']['1x1-kxk'] == f'{share:.3f}'
    assert float(rows['mean']['average']) == pytest.approx(np.mean([
        dict(zip(entry.names, entry.measures(form).shares))['average'] for entry in layers
        if 'average' in entry.names]), abs=6e-4)
    assert float(rows['mean']['mean |similarity|']) == pytest.approx(np.nanmean([
        entry.measures(form).mean_similarity for entry in layers]), abs=6e-4)


def test_markdown_has_as_many_cells_in_every_line(layers):
    text = branch_markdown(layers, 'these')
    lines = [line for line in text.splitlines() if line.startswith('|')]
    assert len(lines) == 2 * (2 + len(layers) + 1)
    assert {line.replace('\\|', '').count('|') for line in lines} == {10}
    assert '### these' in text


def test_heat_maps_show_every_pair(layers):
    figure = draw_similarities(layers, 'these')
    maps = [axes for axes in figure.axes if axes.images]
    expected = [(entry, form) for entry in layers for form in FORMS]
    assert len(maps) == len(expected)
    for axes, (entry, form) in zip(maps, expected):
        image, = axes.images
        np.testing.assert_array_equal(image.get_array().filled(np.nan),
                                      entry.measures(form).similarities)
        assert image.get_clim() == (-1, 1)
        assert [label.get_text() for label in axes.get_xticklabels()] == list(entry.names)
        assert axes.get_title() == FORMS[form]
        for text in axes.texts:
            if text.get_text() != entry.layer:
                column, row = map(int, text.get_position())
                assert float(text.get_text()) == pytest.approx(
                    entry.measures(form).similarities[row][column], abs=6e-3)
    assert len(figure.axes) == 2 * 3 * 2 + 1  # the unused places, and one bar for all


def test_bars_reach_one_and_what_works_against_hangs_below(layers):
    figure = draw_shares(layers, 'these')
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert dict(zip(layers[2].names, layers[2].scaled.shares))['origin'] == pytest.approx(-3 / 7)
    for axes, form in zip(figure.axes, FORMS):
        for number, entry in enumerate(layers):
            shares = dict(zip(entry.names, entry.measures(form).shares))
            spans = {name: bars.patches[number].get_bbox().intervaly
                     for name, bars in zip(names, axes.containers)}
            for name, (low, high) in spans.items():
                assert high - low == pytest.approx(shares.get(name, 0))
            ends = np.ravel(list(spans.values()))
            assert ends.max() + ends.min() == pytest.approx(1)
            assert ends.min() == pytest.approx(sum(min(share, 0) for share in shares.values()))
    assert [label.get_text() for label in figure.axes[1].get_xticklabels()] == [
        entry.layer for entry in layers]


def test_files(layers, tmp_path):
    paths = write_branches(layers, tmp_path / 'out', 'these')
    assert {path.name for path in paths} == FILES == {
        path.name for path in (tmp_path / 'out').iterdir()}

    def refuse(constant):
        raise AssertionError(f'{constant} is not JSON')

    content = json.loads(paths[0].read_text(), parse_constant=refuse)
    start = content['layers'][3]
    assert start['names'] == ['origin', 'product']
    assert start['scaled']['shares'] == [1, 0]
    assert start['scaled']['mean_similarity'] is None
    assert start['scaled']['similarities'][1] == [None, None]
    assert content['layers'][2]['unscaled']['shares'] == list(layers[2].unscaled.shares)


def test_files_are_written_all_or_none(layers, tmp_path):
    with (mock.patch.object(similarity_figure, 'draw_shares', side_effect=OSError('full')),
          pytest.raises(OSError, match='full')):
        write_branches(layers, tmp_path, 'these')
    assert list(tmp_path.iterdir()) == []


def test_the_tool(tmp_path):
    cfg = Config.fromfile(CONFIG)
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        model = MODELS.build(cfg.model)
    vary_scales(model)
    torch.save({'state_dict': model.state_dict()}, tmp_path / 'model.pth')
    out = tmp_path / 'out'
    output = run('tools/branch_similarity.py', CONFIG, tmp_path / 'model.pth', '--out', out)
    assert {path.name for path in out.iterdir()} == FILES
    content = json.loads((out / 'branch_similarity.json').read_text())['layers']
    assert [entry['layer'] for entry in content] == [
        entry.layer for entry in measure_branches(model)]
    assert content[0]['scaled']['shares'] == pytest.approx(
        measure_branches(model)[0].scaled.shares)
    assert 'backbone.layer4.1.conv2' in output
    assert 'without scales' in output
    assert str(out / 'shares.png') in output


def test_the_tool_says_what_is_wrong(tmp_path):
    torch.save({'state_dict': {'weight': torch.zeros(1)}}, tmp_path / 'other.pth')
    tool = ROOT / 'tools/branch_similarity.py'
    plain = ('--cfg-options', 'model.backbone.deploy=True')
    results = run_each(
        [tool, CONFIG, tmp_path / 'none.pth'], [tool, CONFIG, tmp_path / 'other.pth'],
        [tool, CONFIG, tmp_path / 'other.pth', *plain], [tool, 'no_such_config.py', 'none.pth'],
        [tool, CONFIG, 'none.pth', '--out', tmp_path / 'other.pth'],
        [tool, CONFIG, 'none.pth', '--launcher', 'pytorch'], [tool, '-h'])
    for (code, output), (wanted, text) in zip(results, [
            (1, 'none.pth'), (1, 'other.pth'), (1, 'not in training form'),
            (1, 'no_such_config.py'), (1, 'cannot be a folder'), (2, '--launcher'), (0, 'usage')]):
        assert (code, 'Traceback' in output) == (wanted, False), output
        assert text in output
