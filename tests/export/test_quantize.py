"""Int8 graphs: compared with the same arithmetic written out in NumPy and PyTorch."""

import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch.nn import functional as F

from orepa_mm.export.onnx.quantize import (
    METHODS,
    calibrated_ranges,
    joint_ratio,
    layer_noise,
    quantizable_layers,
    quantized_graph,
    require_quantization,
    run_graph,
    signal_to_noise,
)

CHANNELS = 6


def arrays(spread=1):
    """Weights and biases of two convolutions; the channels of the first differ by a factor."""
    scales = np.geomspace(1, spread, CHANNELS)
    random = np.random.default_rng(0)
    first = random.normal(size=(CHANNELS, 3, 3, 3)) * scales[:, None, None, None]
    second = random.normal(size=(4, CHANNELS, 1, 1)) / scales[None, :, None, None]
    return {'one.weight': first, 'one.bias': random.normal(size=CHANNELS) * scales,
            'two.weight': second, 'two.bias': random.normal(size=4)}


def graph_of(weights, shared=False):
    """Convolution, ReLU, convolution; the second twice, with one weight, if it is shared."""
    nodes = [helper.make_node('Conv', ['inputs', 'one.weight', 'one.bias'], ['a'], 'a',
                              pads=[1, 1, 1, 1]),
             helper.make_node('Relu', ['a'], ['b'], 'b'),
             helper.make_node('Conv', ['b', 'two.weight', 'two.bias'], ['out_0'], 'c')]
    outputs = ['out_0']
    if shared:
        nodes += [helper.make_node('MaxPool', ['b'], ['d'], 'd', kernel_shape=[2, 2],
                                   strides=[2, 2]),
                  helper.make_node('Conv', ['d', 'two.weight', 'two.bias'], ['out_1'], 'e')]
        outputs.append('out_1')
    def value(name):
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, None)

    graph = helper.make_graph(
        nodes, 'net', [helper.make_tensor_value_info(
            'inputs', TensorProto.FLOAT, ['n', 3, 'h', 'w'])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ['n', 4, f'h{name}', f'w{name}'])
         for name in outputs],
        [numpy_helper.from_array(array.astype(np.float32), name)
         for name, array in weights.items()],
        value_info=[value(name) for name in ('a', 'b', 'd')[:3 if shared else 2]])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid('', 18)], ir_version=10)


def images(count, seed=1, size=(8, 10)):
    random = np.random.default_rng(seed)
    return [{'inputs': random.normal(size=(1, 3, *size)).astype(np.float32)}
            for _ in range(count)]


@pytest.fixture
def saved(tmp_path):
    def save(proto):
        onnx.save(proto, str(tmp_path / 'net.onnx'))
        return tmp_path / 'net.onnx'
    return save


def rounded(values, low, high):
    """Float values as uint8 of a range that has 0 in it."""
    low, high = min(low, 0), max(high, 0)
    scale = (high - low) / 255
    zero = round(-low / scale)
    return scale * (torch.clamp(torch.round(values / scale) + zero, 0, 255) - zero)


def rounded_weight(weight):
    scale = weight.abs().amax((1, 2, 3), keepdim=True) / 127
    return torch.round(weight / scale) * scale


def test_int8_is_the_arithmetic_that_it_is_said_to_be(saved):
    weights = {name: torch.tensor(array) for name, array in arrays().items()}
    proto, feeds = graph_of(arrays()), images(5)

    def network(x, weight, between):
        hidden = F.conv2d(between(x, 'inputs'), weight(weights['one.weight']),
                          weights['one.bias'], padding=1)
        hidden = between(hidden.relu(), 'b')
        return between(F.conv2d(hidden, weight(weights['two.weight']), weights['two.bias']), 'out')

    lows, highs = {}, {}

    def note(x, name):
        lows[name] = min(lows.get(name, 0), float(x.min()))
        highs[name] = max(highs.get(name, 0), float(x.max()))
        return x

    inputs = [torch.tensor(feed['inputs']).double() for feed in feeds]
    expected_float = [network(x, lambda w: w, note) for x in inputs]
    ranges = calibrated_ranges(saved(proto), feeds, ['min-max'])['min-max']
    for name, tensor in (('inputs', 'inputs'), ('b', 'b'), ('out', 'out_0')):
        found = np.ravel(ranges[tensor].range_value)
        assert np.allclose(found, (lows[name], highs[name]), atol=1e-4)

    quantized = quantized_graph(proto, ranges)
    found = run_graph(quantized, feeds)
    step = (highs['out'] - lows['out']) / 255
    for x, run, exact in zip(inputs, found, expected_float):
        expected = network(x, rounded_weight, lambda x, name: rounded(x, lows[name], highs[name]))
        difference = np.abs(run['out_0'] - expected.numpy())
        assert difference.max() < 2.01 * step  # where rounding is at its edge
        assert np.mean(difference > 0.5 * step) < 0.05
        assert np.abs(run['out_0'] - exact.numpy()).max() > step  # int8, and no float
    stored = {item.name: item.data_type for item in quantized.graph.initializer}
    assert stored['one.weight_quantized'] == TensorProto.INT8
    assert 'one.weight' not in stored
    types = [node.op_type for node in quantized.graph.node]
    assert types.count('Relu') == 0  # the range of uint8 does it
    onnx.checker.check_model(quantized)
    assert proto == graph_of(arrays())  # left as it was


def test_one_scale_for_each_channel_keeps_channels_of_other_size(saved):
    proto, feeds = graph_of(arrays(300)), images(4)
    ranges = calibrated_ranges(saved(proto), feeds, ['min-max'])['min-max']
    expected = run_graph(proto, feeds)

    def ratio(**options):
        return signal_to_noise(expected, run_graph(quantized_graph(
            proto, ranges, **options), feeds))['out_0']

    per_channel = ratio()
    assert ratio(per_channel=False) < per_channel - 3
    assert ratio(reduce_range=True) < per_channel


def test_layers_stay_in_float(saved):
    proto, feeds = graph_of(arrays(), shared=True), images(3)
    assert quantizable_layers(proto) == {'one': ['a'], 'two': ['c', 'e']}
    ranges = calibrated_ranges(saved(proto), feeds, ['min-max'])['min-max']
    for kept, other in (('one', 'two'), ('two', 'one')):
        graph = quantized_graph(proto, ranges, [kept]).graph
        stored = {item.name for item in graph.initializer}
        assert {f'{kept}.weight', f'{other}.weight_quantized'} < stored
        convolutions = [node for node in graph.node if node.op_type == 'Conv']
        assert sum(f'{kept}.weight' in node.input for node in convolutions) == {
            'one': 1, 'two': 2}[kept]
        assert ('Relu' in {node.op_type for node in graph.node}) == (kept == 'one')
    whole, exact = run_graph(quantized_graph(proto, ranges, ['one', 'two']), feeds), run_graph(
        proto, feeds)
    assert all(np.array_equal(one[name], other[name])
               for one, other in zip(whole, exact) for name in one)
    with pytest.raises(ValueError, match='no layer three; it has one, two'):
        quantized_graph(proto, ranges, ['three'])


def test_arithmetic_beside_the_layers_is_left_alone(saved):
    """A level of a pyramid, computed in float from the size of a box: as in RoI heads."""
    proto = graph_of(arrays())
    proto.graph.input.append(helper.make_tensor_value_info('box', TensorProto.FLOAT, ['r']))
    proto.graph.initializer.append(numpy_helper.from_array(np.float32(1e-6), 'tiny'))
    proto.graph.node.extend([helper.make_node('Add', ['box', 'tiny'], ['moved'], 'moved'),
                             helper.make_node('Relu', ['moved'], ['level'], 'level')])
    proto.graph.output.append(helper.make_tensor_value_info('level', TensorProto.FLOAT, ['r']))
    feeds = [{**feed, 'box': np.float32([1e-3, 2, 800.25])} for feed in images(2)]
    ranges = calibrated_ranges(saved(proto), feeds, ['min-max'])['min-max']
    found = run_graph(quantized_graph(proto, ranges), feeds)
    assert np.array_equal(found[0]['level'], feeds[0]['box'] + np.float32(1e-6))


@pytest.mark.parametrize('method', METHODS)
def test_methods_take_images_of_several_sizes(saved, method):
    proto = graph_of(arrays())
    feeds = images(3, size=(40, 44)) + images(2, 2, (48, 30))
    ranges = calibrated_ranges(saved(proto), feeds, [method])[method]
    hidden = np.concatenate([run['b'].ravel() for run in run_graph(proto, feeds, ['b'])])
    low, high = np.ravel(ranges['b'].range_value)
    assert low == 0
    assert high <= hidden.max() * 1.001
    assert high > np.quantile(hidden, 0.9)
    if method == 'percentile':
        assert np.mean(hidden <= high) == pytest.approx(0.9999, abs=5e-5)


def test_what_cannot_be_calibrated(saved):
    path = saved(graph_of(arrays()))
    with pytest.raises(ValueError, match='nothing to calibrate on'):
        calibrated_ranges(path, [])
    with (np.errstate(invalid='ignore'), pytest.raises(ValueError, match='not finite')):
        calibrated_ranges(saved(graph_of({**arrays(), 'one.bias': np.full(6, np.inf)})),
                          images(1), ['min-max'])


def test_ratios():
    expected = [{'x': np.float32([3, 0]), 'y': np.float32([10])},
                {'x': np.float32([0, 4]), 'y': np.float32([0])}]
    found = [{'x': np.float32([3, 0.5]), 'y': np.float32([9])},
             {'x': np.float32([0, 4]), 'y': np.float32([0])}]
    ratios = signal_to_noise(expected, found)
    assert ratios['x'] == pytest.approx(20)  # a norm of 5 over one of 0.5
    assert ratios['y'] == pytest.approx(20)
    assert joint_ratio({'x': 20, 'y': 20}) == pytest.approx(20)
    assert joint_ratio({'x': 20, 'y': 400}) == pytest.approx(23.01, abs=0.01)  # half of the noise
    assert joint_ratio({'x': 20, 'y': 0}) == pytest.approx(2.97, abs=0.01)


@pytest.mark.parametrize('layer', ['one', 'two'])
def test_the_layer_that_adds_most_noise_is_the_first(saved, layer):
    weights = arrays()
    weights[f'{layer}.weight'][0, 0, 0, 0] = 200  # one large value takes the steps of all others
    proto, feeds = graph_of(weights), images(3)
    ranges = calibrated_ranges(saved(proto), feeds, ['min-max'])['min-max']
    expected = run_graph(proto, feeds, ['b', 'out_0'])
    noise = layer_noise('network', proto, ranges, feeds, per_channel=False)
    assert {entry.layer for entry in noise} == {'one', 'two'}
    assert noise[0].layer == layer
    assert noise[0].alone < noise[1].alone
    by_name = {entry.layer: entry for entry in noise}
    whole = run_graph(quantized_graph(proto, ranges, per_channel=False), feeds)
    assert by_name['two'].here == pytest.approx(signal_to_noise(
        [{'out_0': run['out_0']} for run in expected], whole)['out_0'], abs=0.5)
    assert 10 < by_name['one'].here < 60  # of what the next layer gets: behind the ReLU
    assert noise[0].as_dict()['graph'] == 'network'


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, 'onnxruntime.quantization', None)
    monkeypatch.delattr(onnxruntime, 'quantization', raising=False)
    with pytest.raises(ImportError, match=r'pip install onnx onnxruntime sympy'):
        require_quantization()
