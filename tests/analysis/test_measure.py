"""What the forms of a model cost: counts by hand, durations from a clock that is not real."""

import copy
import json
from unittest import mock

import pytest
import torch
from export.test_stock import MODEL
from helpers import ROOT, exit_code, randomize, run
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config
from torch import nn

from orepa_mm.analysis import measure
from orepa_mm.analysis.benchmark import benchmark_config, network
from orepa_mm.analysis.benchmark_table import benchmark_rows, print_benchmark
from orepa_mm.analysis.measure import (
    Cost,
    Form,
    count_file_bytes,
    count_multiply_adds,
    count_parameters,
    count_tensor_bytes,
    measure_forms,
    measure_latency,
    paired_ratio,
    peak_allocation,
    time_calls,
)
from orepa_mm.errors import ConfigError
from orepa_mm.layers import OREPAConv2d

TWO_STAGE = 'configs/faster_rcnn/faster-rcnn_orepa-r18-light_fpn_400i_coco.py'


@pytest.mark.parametrize(('layer', 'shape', 'parameters', 'multiply_adds'), [
    (nn.Conv2d(3, 8, 3, stride=2, padding=1), (1, 3, 16, 16), 8 * 27 + 8, 8 * 8 * 8 * 27),
    (nn.Conv2d(4, 8, 3, padding=1, groups=2, bias=False), (2, 4, 5, 5), 8 * 18, 2 * 8 * 25 * 18),
    (nn.ConvTranspose2d(2, 3, 2, stride=2), (1, 2, 4, 4), 24 + 3, 2 * 3 * 4 * 16),
    (nn.Linear(10, 4), (3, 10), 44, 120),
])
def test_parameters_and_multiply_adds_by_hand(layer, shape, parameters, multiply_adds):
    assert count_parameters(layer) == parameters
    assert count_multiply_adds(lambda: layer(torch.ones(shape))) == multiply_adds


def test_bytes_of_tensors_and_file(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    assert count_tensor_bytes(model) == 4 * (216 + 8 + 4 * 8) + 8  # and the number of batches
    torch.save(model.state_dict(), tmp_path / 'model.pth')
    # the name of the file is stored inside of it, once for each of the tensors
    assert count_file_bytes(model) == pytest.approx((tmp_path / 'model.pth').stat().st_size, rel=.2)


def test_peak_memory_by_hand():
    x = torch.ones(1, 4, 8, 8)  # 1024 bytes

    def peak(inplace):
        return peak_allocation(lambda: nn.Sequential(
            nn.ConstantPad2d(4, 1.0), nn.ReLU(inplace), nn.AvgPool2d(2))(x))

    assert peak(inplace=False) == 4096 + 4096  # what goes into and comes out of the ReLU
    assert peak(inplace=True) == 4096 + 1024  # the same for the pooling

    def give_back():
        one = torch.ones(1000)
        two = torch.ones(3000)
        del one
        return two, torch.ones(500)

    assert peak_allocation(give_back) == 16000
    assert peak_allocation(lambda: None) == 0

    model = nn.Sequential(nn.ConstantPad2d(4, 1.0), nn.BatchNorm2d(4), nn.ReLU()).eval()
    cost = measure_forms({'a': Form(model)}, lambda form: form(x), x, rounds=1, warmup=0)['a']
    weights = 4 * 4 * 4 + 8
    assert weights + 1024 + 8192 <= cost.peak_bytes < weights + 1024 + 8192 + 128  # BN's own sums


class Clock:
    """Time passes only where a test says so."""

    def __init__(self, monkeypatch):
        self.seconds = 0.0
        self.calls = []
        monkeypatch.setattr(measure.time, 'perf_counter', lambda: self.seconds)

    def function(self, name, seconds):
        def call():
            self.calls.append(name)
            self.seconds += seconds(self.calls.count(name)) if callable(seconds) else seconds
        return call


def test_calls_in_turns_with_warm_up(monkeypatch):
    clock = Clock(monkeypatch)
    seen = []
    times = time_calls(
        {'a': clock.function('a', lambda number: number), 'b': clock.function('b', 5)}, rounds=3,
        warmup=2, prepare={'b': clock.function('prepare', 100)},
        progress=lambda *done: seen.append(done))
    assert times == {'a': [3000, 4000, 5000], 'b': [5000] * 3}  # ms, neither warm-up nor prepare
    assert clock.calls == ['a', 'prepare', 'b', 'prepare', 'b', 'a'] * 2 + ['a', 'prepare', 'b']
    assert seen == [(number, 5) for number in range(1, 6)]
    # the pipeline's: medians
    assert measure_latency({'c': clock.function('c', lambda number: number)}, repeats=3,
                           warmup=1) == {'c': 3000}


def test_median_percentile_and_ratio():
    cost = Cost(1, 1, 1, 1, (11.0, *map(float, range(1, 11))))
    assert cost.latency_ms == 6
    assert cost.latency_p90_ms == 10
    # where the machine slowed down between the two of a round, the other rounds decide
    assert paired_ratio([10, 20, 20], [10, 10, 20]) == 1


def test_every_call_squeezes():
    model = nn.Sequential(OREPAConv2d(2, 4, 3, padding=1, bias=False)).eval()
    x = torch.ones(1, 2, 8, 8)
    cost = measure_forms({'training': Form(model)}, lambda form: form(x), x, rounds=4,
                         warmup=2)['training']
    assert len(cost.latencies_ms) == 4
    assert cost.parameters == sum(p.numel() for p in model.parameters())
    assert cost.multiply_adds > 4 * 64 * 2 * 9  # of the convolution itself
    # weights, input, output, and the kernel at the least
    assert cost.peak_bytes >= count_tensor_bytes(model) + 4 * (2 * 64 + 4 * 64 + 4 * 18)


@pytest.fixture(scope='module')
def benchmark(tmp_path_factory):
    register_all_modules(init_default_scope=True)
    cfg = Config(dict(model=copy.deepcopy(MODEL), default_scope='mmdet'))
    checkpoint = tmp_path_factory.mktemp('checkpoint') / 'model.pth'
    model = randomize(MODELS.build(cfg.model))
    torch.save({'state_dict': model.state_dict()}, checkpoint)
    return model, benchmark_config(cfg, checkpoint, (1, 3, 64, 64), rounds=2, warmup=1)


def test_deployed_costs_what_stock_costs(benchmark):
    costs = benchmark[1].costs
    assert list(costs) == ['training', 'deployed', 'folded', 'stock']
    deployed, stock = costs['deployed'], costs['stock']
    assert deployed.parameters == stock.parameters
    assert deployed.multiply_adds == stock.multiply_adds
    assert deployed.file_bytes == pytest.approx(stock.file_bytes, abs=64)
    assert deployed.peak_bytes == pytest.approx(stock.peak_bytes, rel=0.01)
    for key in ('parameters', 'file_bytes', 'peak_bytes'):
        assert getattr(costs['folded'], key) < getattr(deployed, key) < getattr(
            costs['training'], key)
    assert costs['training'].multiply_adds > deployed.multiply_adds  # every call squeezes
    assert all(len(cost.latencies_ms) == 2 for cost in costs.values())
    assert {name: len(times) for name, times in benchmark[1].training_steps_ms.items()} == {
        'training': 2, 'stock': 2}


def test_weights_are_those_of_the_checkpoint(benchmark):
    model, result = benchmark
    entry = next(entry for entry in result.weight_ranges
                 if (entry.layer, entry.form) == ('bbox_head.retina_cls', 'training'))
    assert entry.minimum == pytest.approx(model.bbox_head.retina_cls.weight.min().item())
    assert result.conditions['weights'].endswith('model.pth')


def test_table_and_plain_data(benchmark, capsys):
    result = benchmark[1]
    rows = {row[0]: row[1:] for row in benchmark_rows(result)}
    assert rows['parameters (M)'][3] == f'{result.costs["stock"].parameters / 1e6:.2f}'
    assert rows['latency over stock'][3] == rows['step over stock'][3] == '1.00'
    assert all(len(row) == 4 for row in rows.values())
    data = json.loads(json.dumps(result.as_dict()))
    assert data['forms']['stock']['latency_over_stock'] == 1
    assert data['conditions']['input_shape'] == [1, 3, 64, 64]
    print_benchmark(result)
    printed = capsys.readouterr().out
    for text in ('peak memory (MB)', 'threads: ', 'torch 2', 'mmdet 3', 'Input: 1 x 3 x 64 x 64',
                 '2 rounds after 1 to warm up', 'backbone.'):
        assert text in printed


def test_proposals_are_fixed_boxes():
    """What a detector selects depends on its scores; what is timed must not."""
    register_all_modules(init_default_scope=True)
    cfg = Config.fromfile(ROOT / TWO_STAGE)
    cfg.model.backbone.deploy = True
    model = MODELS.build(cfg.model).eval()
    inputs = torch.ones(2, 3, 64, 96)
    with (mock.patch.object(model.rpn_head, 'predict', side_effect=AssertionError),
          mock.patch.object(model.roi_head, 'forward', return_value='roi') as heads,
          torch.no_grad()):
        rpn, roi = network(model, inputs)(model)
    assert roi == 'roi'
    assert rpn[0][0].shape[0] == 2
    proposals = heads.call_args.args[1]
    assert len(proposals) == 2
    boxes = proposals[0].bboxes
    assert len(boxes) == model.rpn_head.test_cfg.max_per_img == 100
    assert (boxes[:, 2:] > boxes[:, :2]).all()
    assert boxes.amin() >= 0
    assert (boxes[:, 2:].amax(0) <= torch.tensor([96, 64])).all()


def test_an_input_that_does_not_fit():
    register_all_modules(init_default_scope=True)
    cfg = Config(dict(model=copy.deepcopy(MODEL), default_scope='mmdet'))
    with pytest.raises(ConfigError, match='1 x 4 x 64 x 64'):
        benchmark_config(cfg, None, (1, 4, 64, 64), rounds=1, warmup=0)


def test_tool(tmp_path):
    output = run('tools/benchmark.py', TWO_STAGE, '--shape', 1, 3, 64, 64, '--rounds', 2,
                 '--warmup', 1, '--out', tmp_path)
    assert 'Weights: random' in output
    assert 'step over stock' in output
    assert {path.name for path in tmp_path.iterdir()} == {
        'benchmark.json', 'weight_ranges.csv', 'weight_ranges.png'}
    forms = json.loads((tmp_path / 'benchmark.json').read_text())['forms']
    assert forms['deployed']['parameters'] == forms['stock']['parameters']
    assert forms['deployed']['multiply_adds'] == forms['stock']['multiply_adds']


def test_tool_says_what_is_wrong(monkeypatch, capsys):
    for arguments, message in (
            ([TWO_STAGE, 'missing.pth'], 'there is no checkpoint missing.pth'),
            (['missing.py'], 'there is no config file missing.py'),
            ([TWO_STAGE, '--cfg-options', 'model.backbone.deploy=True'], 'in training form')):
        monkeypatch.chdir(ROOT)
        assert exit_code('tools/benchmark.py', *arguments) == 1
        error = capsys.readouterr().err
        assert error.startswith('error: ')
        assert message in error
