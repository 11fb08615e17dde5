"""The sub-commands of the benchmark at tiny sizes, and what they count, by hand."""

import json
import os
import runpy
import shlex
import statistics
import subprocess

import pytest
import torch
from helpers import ROOT, exit_code
from mmengine.config import Config
from mmengine.registry import init_default_scope
from torch import nn

from orepa_mm.analysis import networks, training_cost
from orepa_mm.analysis.cost_figure import draw_costs
from orepa_mm.analysis.cost_table import (
    BEGIN,
    END,
    Measurement,
    Row,
    fill_markdown,
    gather_tables,
    markdown,
    table_cells,
    write_measurement,
)
from orepa_mm.analysis.measure import count_operations, saved_bytes
from orepa_mm.analysis.training_cost import Settings, measure_squeeze, measure_step
from orepa_mm.errors import ConfigError

DETECTOR = 'configs/retinanet/retinanet_orepa-r18-light_fpn_400i_coco.py'
TINY = ('--shape', '2', '3', '32', '32', '--base-channels', '8')
ONCE = ('--rounds', '2', '--warmup', '0')


#: The detector above, with few channels.
NARROW = ('--cfg-options', 'model.backbone.base_channels=8', 'model.neck.in_channels=[8,16,32,64]',
          'model.neck.out_channels=16', 'model.bbox_head.in_channels=16',
          'model.bbox_head.feat_channels=16')


@pytest.fixture(autouse=True)
def _small_and_not_compiled(monkeypatch):
    """Compiling takes longer than all tests here; the row says that it is not available."""
    monkeypatch.setattr(networks, '_DEPTH', 18)
    monkeypatch.setattr(networks, 'missing_option', lambda name: 'not available: a test'
                        if name == networks.COMPILED else '')


def tool(monkeypatch, *arguments):
    monkeypatch.chdir(ROOT)
    return exit_code('tools/benchmark.py', *arguments)


def read(path):
    return json.loads(path.read_text())


def test_operations_by_hand():
    x = torch.ones(2, 3, requires_grad=True)

    def product():
        y = (x.t() @ x).view(9)[:3].unsqueeze(0)  # one that computes, and four views
        return y, torch.empty(3)

    assert count_operations(product) == 1
    # forward mul and sum; backward: ones_like; then mul by the expanded gradient
    assert count_operations(lambda: (x * 2).sum().backward()) == 4
    x.grad = None
    tensors = [torch.ones(2), torch.ones(3)]
    assert count_operations(lambda: torch._foreach_add_(tensors, 1)) == 1
    assert count_operations(lambda: [tensor.add_(1) for tensor in tensors]) == 2


def test_saved_bytes_by_hand():
    weight, x = nn.Parameter(torch.ones(10, 5)), torch.ones(4, 5, requires_grad=True)

    def forward():
        hidden = (x @ weight.t()).exp()  # x and weight for the product, hidden for exp and sin
        return hidden.sin()

    kept = 4 * 40
    assert saved_bytes(forward) == kept + weight.nbytes + x.nbytes
    assert saved_bytes(forward, [weight]) == kept + x.nbytes
    assert saved_bytes(forward, [weight.detach(), x[1:]]) == kept  # by memory, not by object
    assert saved_bytes(lambda: x.exp()) == 0  # what is returned is there anyway
    with torch.no_grad():
        assert saved_bytes(forward, [weight, x]) == kept  # gradients are switched on


def test_squeeze(monkeypatch, tmp_path, capsys):
    assert tool(monkeypatch, 'squeeze', *TINY, *ONCE, '--plot', '--out', tmp_path) == 0
    printed = capsys.readouterr().out
    for text in ('Squeezing all layers', 'rounds: 2', 'torch 2', 'saved '):
        assert text in printed
    content = read(tmp_path / 'squeeze.json')
    rows = {row['name']: row for row in content['rows']}
    assert list(rows) == [networks.PUBLISHED, networks.OURS, networks.COMPILED,
                          'its matrix products alone']
    assert rows[networks.COMPILED]['note'] == 'not available: a test'
    assert rows[networks.COMPILED]['times_ms'] == []
    published, ours = rows[networks.PUBLISHED], rows[networks.OURS]
    assert len(published['times_ms']) == len(ours['times_ms']) == 2
    assert published['operations'] > ours['operations'] > 0
    assert published['saved_bytes'] > ours['saved_bytes']
    assert published['over_reference'] == pytest.approx(statistics.median(
        one / other for one, other in zip(published['times_ms'], ours['times_ms'])))
    assert (tmp_path / 'squeeze.png').read_bytes().startswith(b'\x89PNG')
    assert '| OREPA, ours |' in (tmp_path / 'squeeze.md').read_text()


def test_step(tmp_path, monkeypatch):
    assert tool(monkeypatch, 'step', *TINY, *ONCE, '--out', tmp_path) == 0
    rows = {row['name']: row for row in read(tmp_path / 'step.json')['rows']}
    plain = rows[networks.PLAIN]
    assert plain['over_reference'] == rows[networks.REPVGG_PLAIN]['over_reference'] == 1
    for name in (networks.DBB, networks.PUBLISHED, networks.OURS):
        assert rows[name]['reference'] == networks.PLAIN
        for key in ('operations', 'saved_bytes', 'peak_bytes'):
            assert rows[name][key] > plain[key], (name, key)
    repvgg = rows[networks.REPVGG]
    assert repvgg['reference'] == networks.REPVGG_PLAIN
    assert repvgg['operations'] > rows[networks.REPVGG_PLAIN]['operations']


def test_launch_bound_runs_on_one_thread(monkeypatch):
    seen, before = [], torch.get_num_threads()
    monkeypatch.setattr(training_cost, '_measure',
                        lambda *args: seen.append(torch.get_num_threads()) or ())
    torch.set_num_threads(2)
    try:
        measurement = measure_step(Settings.launch_bound(1, 0))
        assert seen == [1]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert measurement.name == 'step-launch-bound'
    assert measurement.conditions['threads'] == 1
    assert measurement.conditions['input'] == [2, 3, 64, 64]
    assert measurement.conditions['base_channels'] == 8


def test_memory(monkeypatch, tmp_path):
    assert tool(monkeypatch, 'memory', *TINY, '--out', tmp_path) == 0
    content = read(tmp_path / 'memory.json')
    assert 'rounds' not in content['conditions']
    rows = {row['name']: row for row in content['rows']}
    assert not any(row['times_ms'] for row in rows.values())
    plain, ours = rows[networks.PLAIN], rows[networks.OURS]
    assert plain['extra']['over the floor'] == '+0.0 %'
    model = networks.resnet(networks.PLAIN, 8)
    parameters = sum(p.numel() for p in model.parameters())
    assert plain['extra']['parameters (M)'] == f'{parameters / 1e6:.2f}'
    training = networks.resnet(networks.OURS, 8)
    further = sum(p.numel() for p in training.parameters()) - parameters
    kernels = sum(p.numel() for p in model.parameters() if p.dim() == 4)
    assert float(ours['extra']['floor (MB)']) == pytest.approx(
        (plain['peak_bytes'] + 12 * further + 4 * kernels) / 1e6, abs=0.05)
    squeeze = measure_squeeze(Settings((2, 3, 32, 32), 8, 1, 0))
    assert ours['extra']['saved by squeezing (MB)'] == f'{squeeze.rows[1].saved_bytes / 1e6:.1f}'


def test_latency(monkeypatch, tmp_path):
    assert tool(monkeypatch, 'latency', *TINY, *ONCE, '--out', tmp_path) == 0
    rows = {row['name']: row for row in read(tmp_path / 'latency.json')['rows']}
    counts = {name: row['operations'] for name, row in rows.items()}
    assert counts[networks.PLAIN] == counts[networks.DEPLOYED]
    # every forward pass squeezes, in fewer operations than branch by branch
    assert counts[networks.PLAIN] < counts[networks.OURS] < counts[networks.PUBLISHED]
    assert counts[networks.PUBLISHED] > counts[networks.DBB] > counts[networks.PLAIN] or (
        counts[networks.DBB] >= counts[networks.PUBLISHED] > counts[networks.PLAIN])
    assert rows[networks.DEPLOYED]['over_reference'] == 1


def test_a_detector_in_two_stages_is_built_in_every_form(monkeypatch):
    """Its classes read their settings as attributes."""
    monkeypatch.setattr(networks, 'missing_option', lambda name: '')  # built, not run
    cfg = Config.fromfile(
        ROOT / 'configs' / 'faster_rcnn' / 'faster-rcnn_orepa-r18-light_fpn_400i_coco.py')
    init_default_scope('mmdet')
    built = {one.name: one.model for one in networks.config_networks(cfg, torch.device('cpu'))}
    layers = {name: [getattr(module, 'compiled', None) for module in model.modules()
                     if hasattr(module, 'compiled')] for name, model in built.items()}
    assert layers[networks.OURS]
    assert not any(layers[networks.OURS])
    assert all(layers[networks.COMPILED])
    assert len(layers[networks.COMPILED]) == len(layers[networks.OURS])


def test_config_step_convert_and_optimizer(monkeypatch, tmp_path):
    assert tool(monkeypatch, 'config-step', DETECTOR, '--shape', 1, 3, 64, 64, *ONCE,
                '--out', tmp_path, *NARROW) == 0
    name = 'retinanet_orepa-r18-light_fpn_400i_coco'
    rows = {row['name']: row for row in read(tmp_path / f'step-{name}.json')['rows']}
    assert list(rows) == [networks.PLAIN, networks.PUBLISHED, networks.OURS, networks.COMPILED]
    assert rows[networks.OURS]['operations'] > rows[networks.PLAIN]['operations']

    assert tool(monkeypatch, 'convert', DETECTOR, *ONCE, '--out', tmp_path, '--plot',
                *NARROW) == 0
    rows = {row['name']: row for row in read(tmp_path / f'convert-{name}.json')['rows']}
    assert list(rows) == ['load', 'squeeze', 'save', 'all three']
    assert rows['all three']['peak_bytes'] >= rows['squeeze']['peak_bytes'] > 0
    assert (tmp_path / f'convert-{name}.png').exists()

    assert tool(monkeypatch, 'optimizer', DETECTOR, *ONCE, '--out', tmp_path, *NARROW) == 0
    rows = {row['name']: row for row in read(tmp_path / f'optimizer-{name}.json')['rows']}
    for row in rows.values():
        assert 0 < row['extra']['groups'] <= row['extra']['parameter tensors']
        assert row['operations'] >= row['extra']['groups']


def test_a_network_of_which_nothing_is_trained():
    init_default_scope('mmpretrain')
    cfg = Config(dict(model=dict(type='ImageClassifier', backbone=dict(
        type='OREPAResNet', depth=18, base_channels=8, stem_channels=8, frozen_stages=4))))
    with pytest.raises(ConfigError, match=r'^no output of the network depends on a weight'):
        training_cost.measure_config_step(cfg, Settings((1, 3, 32, 32), rounds=1, warmup=0))


def test_a_compiled_row_says_if_it_was_not(monkeypatch):
    def row(graphs):
        monkeypatch.setattr(training_cost, 'counters', {'aot_autograd': {'ok': graphs}})
        subject = training_cost._Subject(networks.COMPILED, networks.OURS, lambda: x.exp())
        return training_cost._measure([subject], Settings(rounds=1, warmup=0), None)[0]

    x = torch.ones(3)
    assert row(0).note == 'not compiled: it ran eagerly'
    assert row(2).note.startswith('first call: ')
    assert row(2).operations is None  # generated code would not show


def test_where_the_layer_has_no_option(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(networks, 'build_orepa_conv', lambda *args, **kwargs: 1)
    assert networks.missing_option(networks.COMPILED) == ''
    monkeypatch.setattr(networks, 'build_orepa_conv', lambda channels, *args: 1)
    assert 'no option `compile`' in networks.missing_option(networks.COMPILED)


MEASUREMENT = Measurement('a', 'A title', 'What it means.', (
    Row('one', (10.0, 20.0, 40.0), 'two', 7, 2_000_000, 3_000_000, {'groups': 3}),
    Row('two', (10.0, 10.0, 10.0), 'two'), Row('three', note='not available')),
    {'device': 'CPU', 'processor': 'a processor', 'threads': 2, 'versions': {'torch': '2'},
     'rounds': 3})


def test_table_by_hand():
    headings, lines = table_cells(MEASUREMENT)
    assert headings == ['', 'time (ms)', 'quartiles (ms)', 'time over two', 'operations',
                        'saved (MB)', 'peak (MB)', 'groups', 'note']
    assert lines == [['one', '20', '15 to 30', '2.00', '7', '2.0', '3.0', '3', ''],
                     ['two', '10', '10 to 10', '1.00', '', '', '', '', ''],
                     ['three', '', '', '', '', '', '', '', 'not available']]
    text = markdown(MEASUREMENT)
    assert '| one | 20 | 15 to 30 | 2.00 | 7 | 2.0 | 3.0 | 3 |  |' in text
    assert 'CPU (a processor), threads: 2, torch 2.\nrounds: 3.' in text
    assert Measurement.from_dict(json.loads(json.dumps(MEASUREMENT.as_dict()))) == MEASUREMENT


def test_figure_holds_what_was_measured(tmp_path):
    left, right = draw_costs(MEASUREMENT).axes
    assert [bar.get_height() for bar in left.patches] == [20, 10]
    assert [bar.get_height() for bar in right.patches] == [3]
    assert [label.get_text() for label in left.get_xticklabels()] == ['one', 'two']
    nothing = Measurement('b', '', '', (Row('one'),), MEASUREMENT.conditions)
    assert draw_costs(nothing) is None
    assert [path.name for path in write_measurement(nothing, tmp_path, plot=True)] == [
        'b.json', 'b.md']


def test_files_are_written_all_or_none(tmp_path, monkeypatch):
    monkeypatch.setattr('orepa_mm.analysis.cost_table.markdown', None)
    with pytest.raises(TypeError):
        write_measurement(MEASUREMENT, tmp_path)
    assert not list(tmp_path.iterdir())


def test_all_tables_in_one_file(tmp_path):
    with pytest.raises(ConfigError, match='holds no measurement'):
        gather_tables(tmp_path)
    write_measurement(MEASUREMENT, tmp_path)
    (tmp_path / 'benchmark.json').write_text('{"forms": {}}')  # of a config alone: no such table
    assert markdown(MEASUREMENT) in gather_tables(tmp_path).read_text()
    document = tmp_path / 'text.md'
    document.write_text(f'before\n{BEGIN}\nold\n{END}\nafter\n')
    for _ in range(2):
        fill_markdown(tmp_path, document)
    text = document.read_text()
    assert text.startswith(f'before\n{BEGIN}\n\n### A title')
    assert text.endswith(f'{END}\nafter\n')
    assert 'old' not in text
    assert text.count('### A title') == 1
    document.write_text('no marks')
    with pytest.raises(ConfigError, match='no place for the tables'):
        fill_markdown(tmp_path, document)
    assert document.read_text() == 'no marks'


def test_marks_are_in_the_document():
    text = (ROOT / 'docs/performance.md').read_text()
    assert text.index(f'{BEGIN}\n') < text.index(END)


def test_a_command_or_a_config(monkeypatch, capsys):
    """A first argument that is no command is a config, as it has always been."""
    parse = runpy.run_path(str(ROOT / 'tools/benchmark.py'))['parse_args']
    args = parse(['a.py', 'b.pth', '--rounds', '3'])
    assert (args.config, args.checkpoint, args.rounds) == ('a.py', 'b.pth', 3)
    assert parse(['--rounds', '3', 'a.py']).config == 'a.py'
    assert parse(['step', '--launch-bound']).launch_bound
    for arguments, message in ((['step', '--rounds', '0'], 'must be 1 at least'),
                               ([], 'required: config')):
        with pytest.raises(SystemExit):
            parse(arguments)
        assert message in capsys.readouterr().err
    assert tool(monkeypatch, 'squeeze', '--out', ROOT / 'Makefile') == 1
    assert 'cannot be a folder' in capsys.readouterr().err
    assert tool(monkeypatch, 'tables', ROOT / 'docs') == 1
    assert 'error: ' in capsys.readouterr().err
    assert tool(monkeypatch, 'optimizer', 'missing.py') == 1
    assert 'there is no config file missing.py' in capsys.readouterr().err


def script(*arguments, **environment):
    return subprocess.run([ROOT / 'tools/benchmark_gpu.sh', *arguments], capture_output=True,
                          text=True, env={**os.environ, **environment})


def test_commands_of_the_gpu_script(tmp_path):
    """A dry run prints them; each is one that the tool understands, of a config that exists."""
    result = script('--dry-run', '--out', tmp_path, '--wheels', tmp_path, PYTHON='echo')
    assert result.returncode == 0, result.stderr
    assert '--no-index --find-links' in result.stdout
    assert 'FORCE_CUDA=1' in result.stdout
    assert 'pytest -q tests/layers tests/golden tests/reparam' in result.stdout
    parse = runpy.run_path(str(ROOT / 'tools/benchmark.py'))['parse_args']
    commands = [shlex.split(line.partition('tools/benchmark.py ')[2])
                for line in result.stdout.splitlines() if 'tools/benchmark.py ' in line]
    for command in commands:
        args = parse(command)
        assert (ROOT / getattr(args, 'config', 'tools')).exists()
    names = {command[0] for command in commands}
    assert names == {'theory', 'squeeze', 'step', 'memory', 'latency', 'optimizer', 'convert',
                     'config-step', 'tables'}
    without = script('--dry-run', '--without-detectors', '--out', tmp_path, PYTHON='echo').stdout
    assert 'FORCE_CUDA' not in without
    assert 'config-step' not in without
    assert 'mmcv-lite' in without


def test_gpu_script_says_what_is_wrong(tmp_path):
    for arguments, message in ((['--nonsense'], 'no option --nonsense'),
                               (['--out'], '--out needs a folder'),
                               (['--wheels', tmp_path / 'missing'], 'there is no folder')):
        result = script(*arguments)
        assert result.returncode == 2
        assert message in result.stderr
    assert script('--help').stdout.startswith('usage: ')
