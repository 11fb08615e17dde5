"""The report of a comparison, from a made-up folder of runs."""

import json
import math
import random
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.runner import Runner

from orepa_mm.analysis.variants import Variant
from orepa_mm.errors import ConfigError
from orepa_mm.workflow.comparison_report import (
    fill_document,
    require_place,
    what_is_equal,
    write_comparison,
)

CONFIG = '''
default_scope = 'mmdet'
train_cfg = dict(max_iters=40)
train_dataloader = dict(num_workers={workers}, sampler=dict(type='InfiniteSampler'))
default_hooks = dict(checkpoint=dict(save_best='coco/bbox_mAP'),
                     logger=dict(log_metric_by_epoch=False))
'''
VALUES = {'plain': (0.50, 0.52, 0.51), 'orepa': (0.53, 0.56, 0.54),
          'orepa:single_init,lr=5e-4': (0.49, 0.54, 0.50)}


def make_run(out, variant, seed, value, forms=('training', 'deployed'), **changes):
    """A finished run; `value` None: one that has only begun."""
    out = Path(out)
    folder = out / 'runs' / Variant.parse(variant).slug / f'seed{seed}'
    planned = json.loads((out / 'plan.json').read_text())['runs'] if out.is_dir() and (
        out / 'plan.json').is_file() else []
    logged = folder / 'train' / '1' / 'vis_data'
    logged.mkdir(parents=True)
    (out / 'plan.json').write_text(json.dumps({'title': 'cells',
                                               'runs': [*planned, (variant, seed)]}))
    (folder / 'config.py').write_text(CONFIG.format(workers=2))
    (folder / 'log.txt').write_text('iteration 20\nerror: out of memory <here>\n')
    steps = range(1, 41 if value is not None else 21)
    lower = 0.02 + 0.005 * seed if variant == 'orepa' else 0
    lines = [{'loss': 2 / step + 0.01 * seed - lower, 'iter': step, 'step': step} for step in steps]
    lines += [{'coco/bbox_mAP': value * share, 'step': round(40 * share)}
              for share in (0.5, 1) if value is not None]
    (logged / 'scalars.json').write_text('\n'.join(map(json.dumps, lines)))
    if value is None:
        return folder
    metrics = {'coco/car_precision': 0.9, 'coco/bbox_mAP': value, 'coco/bbox_mAP_50': 0.7}
    result = {'metrics': {form: dict(metrics) for form in forms}, 'largest_difference': {},
              'parameters': 1_000_000 * (1 + len(forms)), 'iterations': 40,
              'seconds_per_iteration': 0.1 * len(forms), 'peak_bytes': 2_000_000_000 + seed,
              'kernel_step': 0.001 if seed else math.nan, 'seconds': 9.0,
              'checkpoint': 'train/iter_40.pth',
              'machine': {'torch': '2.12.1', 'threads': 2, 'processor': 'x86_64',
                          'device': 'cpu'}}
    (folder / 'result.json').write_text(json.dumps({**result, **changes}))
    return folder


@pytest.fixture
def out(tmp_path):
    for variant, values in VALUES.items():
        for seed, value in enumerate(values):
            make_run(tmp_path / 'cells', variant, seed, value,
                     ('deployed',) if variant == 'plain' else ('training', 'deployed'))
    return tmp_path / 'cells'


def written(out, **options):
    """JSON, Markdown and HTML of a report."""
    write_comparison(out, **options)
    return (json.loads((out / 'comparison.json').read_text()),
            (out / 'comparison.md').read_text(), (out / 'report.html').read_text())


def row_of(markdown, name):
    row, = rows_of(markdown, name)
    return row


def rows_of(markdown, name):
    return [[cell.strip() for cell in line.strip('|').split('|')][1:]
            for line in markdown.splitlines() if line.startswith(f'| {name} |')]


def test_the_tables(out):
    _, markdown, _ = written(out)
    of_variant, of_seeds = rows_of(markdown, 'orepa')
    last = statistics.mean(2 / step for step in range(37, 41))
    assert of_variant == [f'{statistics.mean(VALUES["orepa"]):.4f} ± '
                          f'{statistics.stdev(VALUES["orepa"]):.4f} (3)',
                          f'{last + 0.01 - 0.025:.4f}', '200.0', '2.00', '2000', '1.00e-03', '3.00']
    assert of_seeds == ['0.5300', '0.5600', '0.5400']
    assert row_of(markdown, 'orepa, training form') == of_seeds
    (mean, interval, seeds, each), losses = rows_of(markdown, 'orepa - plain')
    assert (mean, seeds, each) == ('+0.0333', '3', '+0.0300, +0.0400, +0.0300')
    half = 4.302653 * statistics.stdev((0.03, 0.04, 0.03)) / math.sqrt(3)  # t table, 2 degrees
    assert interval == f'{0.1 / 3 - half:+.4f} to {0.1 / 3 + half:+.4f}'
    half = 4.302653 * 0.005 / math.sqrt(3)
    assert losses == ['-0.0250', f'{-0.025 - half:+.4f} to {-0.025 + half:+.4f}', '3',
                      '-0.0200, -0.0250, -0.0300']
    assert 'Training loss: orepa is better than plain by 0.0250' in markdown
    assert markdown.startswith('### cells\n')
    assert 'orepa is better than plain by 0.0333' in markdown
    assert ('no difference between orepa:single_init,lr=5e-4 and plain that these 3 seeds can tell '
            'from chance') in markdown
    assert 'plain, training form' not in markdown
    assert 'Missing here' not in markdown
    assert 'THE TWO FORMS DIFFER' not in markdown


def test_the_json_has_everything(out):
    content, _, _ = written(out, reference='plain')
    assert content['title'] == 'cells'
    assert (content['metric'], content['reference']) == ('coco/bbox_mAP', 'plain')
    assert content['options'] == {'metric': None, 'reference': 'plain'}
    assert [(run['variant'], run['seed'], run['metrics']['deployed']['coco/bbox_mAP'])
            for run in content['runs']] == [
        (name, seed, value) for name, values in VALUES.items() for seed, value in enumerate(values)]
    assert content['runs'][0]['kernel_step'] is None  # NaN is no JSON
    assert content['variants'][0]['mean'] == pytest.approx(0.51)
    assert content['pairs'][0]['interval'] == pytest.approx([0.01899, 0.04768], abs=1e-5)
    assert content['training_loss']['variants'][0]['mean'] == pytest.approx(
        statistics.mean(2 / step for step in range(37, 41)) + 0.01)
    assert [pair['mean'] for pair in content['training_loss']['pairs']] == pytest.approx(
        [-0.025, 0])
    assert content['machines'] == [{'torch': '2.12.1', 'threads': 2, 'processor': 'x86_64',
                                    'device': 'cpu'}]
    assert 'orepa_mm' in content['versions']
    assert content['lacking'] == []


def test_the_page_needs_no_other_file(out):
    plan = (out / 'plan.json').read_text()
    (out / 'plan.json').write_text(plan.replace('cells', 'a < b'))
    _, _, page = written(out)
    assert page.count('src="data:image/png;base64,') == page.count('<img') == 2
    assert '<title>a &lt; b</title>' in page
    assert 'http' not in page.partition('base64')[0]
    assert all((out / f'comparison-{name}.png').read_bytes().startswith(b'\x89PNG')
               for name in ('metric', 'training'))


def test_runs_that_logged_no_loss(out):
    """Of a variant: it has no loss. Of the reference: there is nothing to compare."""
    for log in out.glob('runs/orepa/*/train/1/vis_data/scalars.json'):
        log.write_text('{"coco/bbox_mAP": 0.5, "step": 40}')
    content, markdown, _ = written(out)
    assert rows_of(markdown, 'orepa')[0][1] == '-'
    assert [pair['variant'] for pair in content['training_loss']['pairs']] == [
        'orepa:single_init,lr=5e-4']
    for log in out.glob('runs/plain/*/train/1/vis_data/scalars.json'):
        log.unlink()
    content, markdown, _ = written(out)
    assert content['training_loss'] is None
    assert 'Training loss: orepa' not in markdown
    assert len(rows_of(markdown, 'orepa')[0]) == 6


def test_one_seed_each(tmp_path):
    for number, rate in enumerate(('1e-3', '2e-3', '4e-3')):
        make_run(tmp_path, f'plain:lr={rate}', 5, 0.5 + number / 10, ('deployed',))
    _, markdown, page = written(tmp_path)
    assert '- Each variant has one seed, which says nothing about chance.' in markdown
    assert row_of(markdown, 'plain:lr=4e-3')[0] == '0.7000 (1)'
    assert 'better' not in markdown
    assert '| seed 5 |' not in markdown
    assert 'Paired differences' not in page


def test_into_a_document(out, tmp_path):
    _, markdown, _ = written(out)
    document = tmp_path / 'docs' / 'results.md'
    document.parent.mkdir()
    begin, end = (f'<!-- comparison cells: {word} -->' for word in ('begin', 'end'))
    document.write_text(f'before\n{begin}\nold\n{end}\nafter\n')
    require_place(out, document)
    fill_document(out, document)
    text = document.read_text()
    tables, _, method = markdown.partition('\n\nHow to read this:\n')
    assert text.startswith(f'before\n{begin}\n\n{tables}\n')
    assert 'Paired t intervals' in method
    assert 'Paired t intervals' not in text
    assert text.endswith(f'{end}\nafter\n')
    assert 'old' not in text
    for name in ('cells-metric.png', 'cells-training.png'):
        assert f']({name})' in text
        assert (document.parent / name).read_bytes().startswith(b'\x89PNG')
    document.write_text('nothing')
    for use in (fill_document, require_place):
        with pytest.raises(ConfigError, match='has no place for the tables'):
            use(out, document)
    assert document.read_text() == 'nothing'


def test_what_is_missing_is_named(out):
    make_run(out, 'orepa', 3, None)
    make_run(out, 'plain', 3, 0.53, ('deployed',))
    folder = make_run(out, 'dbb', 0, None)
    (folder / 'log.txt').unlink()
    content, markdown, page = written(out)
    assert content['lacking'] == [
        'orepa, seed 3: not finished, 50% trained; the last line of its log is: error: out of '
        'memory <here>',
        'dbb, seed 0: not begun']
    assert '- dbb, seed 0: not begun' in markdown
    assert 'out of memory &lt;here&gt;' in page
    assert rows_of(markdown, 'orepa - plain')[0][2] == '3'
    assert 'orepa has no result with seed 3' in markdown
    assert row_of(markdown, 'orepa, training form')[-1] == '-'


def test_nothing_has_finished(tmp_path):
    with pytest.raises(ConfigError, match='no folder of a comparison'):
        write_comparison(tmp_path)
    make_run(tmp_path, 'plain', 0, None)
    with pytest.raises(ConfigError, match='plain, seed 0: not finished, 50% trained'):
        write_comparison(tmp_path)
    assert [path.name for path in tmp_path.glob('*.*')] == ['plan.json']


def test_a_metric_and_a_reference_by_name(out):
    content, markdown, _ = written(out, metric='coco/bbox_mAP_50', reference='orepa:single_init,'
                                   'lr=5e-4')
    assert content['metric'] == 'coco/bbox_mAP_50'
    assert content['reference'] == 'orepa:single_init,lr=5e-4'
    assert 'with each of 3 seeds: without spread there is no interval' in markdown
    before = (out / 'comparison.md').read_text()
    with pytest.raises(ConfigError, match=r"no metric 'AP'; there are .*coco/bbox_mAP"):
        write_comparison(out, metric='AP')
    with pytest.raises(ConfigError, match='no run of the reference dbb has finished; there are'):
        write_comparison(out, reference='dbb')
    make_run(out, 'dbb', 0, None)
    with pytest.raises(ConfigError, match='no run of the reference dbb has finished'):
        write_comparison(out, reference='dbb')
    assert (out / 'comparison.md').read_text() == before


def test_forms_that_differ_are_named(out):
    path = out / 'runs' / 'orepa' / 'seed1' / 'result.json'
    result = json.loads(path.read_text())
    result['metrics']['training']['coco/bbox_mAP'] += 3e-4
    path.write_text(json.dumps(result))
    _, markdown, page = written(out)
    line = ('THE TWO FORMS DIFFER: orepa, seed 1: coco/bbox_mAP is 0.56030 in training form but '
            '0.56000 deployed')
    assert line in markdown
    assert line in page


def test_runs_that_have_not_the_same_conditions(out):
    make_run(out, 'plain', 7, 0.5, ('deployed',), iterations=30, peak_bytes=None,
             machine={'torch': '2.12.1', 'threads': 8, 'processor': 'x86_64', 'device': 'A card'})
    second = out / 'runs' / 'plain' / 'seed7' / 'train' / '2' / 'vis_data'
    second.mkdir(parents=True)
    (second / 'scalars.json').write_text('{"loss": 1, "st')  # killed while it wrote
    _, markdown, _ = written(out)
    assert 'THE RUNS ARE NOT EQUALLY LONG' in markdown
    assert 'plain, seed 7: 30 iterations' in markdown
    assert 'compare no times' in markdown
    assert 'resumed, which starts random numbers anew: plain, seed 7.' in markdown
    assert 'without one, resident memory' in markdown


@pytest.mark.parametrize(('workers', 'sampler', 'same', 'differs'), [
    (2, 'InfiniteSampler', ['order of the data', 'augmentation of each image'], ['initial']),
    (0, 'DefaultSampler', ['order of the data'], ['num_workers=0', 'dropout']),
    (2, 'MySampler', ['augmentation of each image'], ['perhaps the order', 'MySampler']),
])
def test_what_is_equal_for_the_same_seed(workers, sampler, same, differs):
    cfg = Config({'train_dataloader': {'num_workers': workers, 'sampler': {'type': sampler}}})
    equal, other, rates = what_is_equal(cfg)
    assert all(word in equal for word in same)
    assert all(word in other for word in differs)
    assert not any(word in equal for word in differs)
    assert '`plain:lr=... orepa:lr=...`' in rates


class Drawing(torch.utils.data.Dataset):
    """What augmentation could draw from: one number of each generator, and the index."""

    def __len__(self):
        return 12

    def __getitem__(self, index):
        return (index, torch.rand(()).item(), float(np.random.rand()), random.random())


@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('sampler', ['DefaultSampler', 'InfiniteSampler'])
def test_mmengine_draws_as_the_report_says(workers, sampler):
    def batches(initial_values):
        random.seed(5), np.random.seed(5), torch.manual_seed(5)
        # layers draw from torch alone; the next one here stands for any other code
        torch.rand(initial_values), np.random.rand(initial_values)
        loader = Runner.build_dataloader(dict(
            dataset=Drawing(), batch_size=2, num_workers=workers,
            sampler=dict(type=sampler, shuffle=True)), seed=5)
        return [batch for _, batch in zip(range(6), loader)]

    first, second = batches(10), batches(99)
    assert [batch[0] for batch in first] == [batch[0] for batch in second]
    assert (first == second) is (workers > 0)


def test_neither_order_nor_augmentation_is_claimed_to_be_equal():
    cfg = Config({'train_dataloader': {'num_workers': 0, 'sampler': {'type': 'MySampler'}}})
    assert len(what_is_equal(cfg)) == 2
    cfg = Config({'train_dataloader': {'num_workers': 2, 'sampler': {'type': 'InfiniteSampler'},
                                       'worker_init_fn': {'type': 'mine'}}})
    assert 'augmentation' not in what_is_equal(cfg)[0]


def test_a_run_that_found_nothing_and_one_without_branches(tmp_path):
    """The first run has no metric; the other is called orepa, and built without blocks."""
    nothing = {'deployed': {}}
    make_run(tmp_path / 'cells', 'plain', 0, 0.0, metrics=nothing)
    folder = make_run(tmp_path / 'cells', 'orepa:model.backbone.deploy=True', 0, 0.25,
                      ('deployed',))
    (folder / 'train' / 'iter_40.pth').touch()
    content, markdown, _ = written(tmp_path / 'cells')
    assert content['metric'] == 'coco/bbox_mAP'
    assert 'plain: the metric is no number with seed 0; left out' in markdown
    assert 'no seed in common with a number for both' in markdown
