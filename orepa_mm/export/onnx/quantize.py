"""Static int8 quantization of an ONNX graph, by ONNX Runtime.

Tensors between layers become uint8 with a range of their own, weights int8 with
a scale per output channel, biases int32. The graph stays one of float operators
with pairs of `QuantizeLinear` and `DequantizeLinear` between them (QDQ), which
each runtime fuses as it can.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .graphs import require_onnx

if TYPE_CHECKING:
    from onnx import ModelProto
    from onnxruntime.quantization import TensorsData

#: What a graph is fed: arrays by the names of its inputs.
Feed = Mapping[str, np.ndarray]
#: How ranges of tensors are found: ONNX Runtime's name, and its options. Entropy with its own
#: defaults, 128 bins and 128 levels, has one range to choose from, which is nearly min-max; its
#: time grows with the square of the bins.
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    'min-max': ('MinMax', {}),
    'entropy': ('Entropy', {'num_bins': 512, 'num_quantized_bins': 256}),
    'percentile': ('Percentile', {'percentile': 99.99}),
}
#: Operators with weights.
_LAYERS = ('Conv', 'Gemm', 'MatMul')
#: Operators behind a layer that are computed in integers with it. Sums and concatenations stay in
#: float: in int8 they were not faster in ONNX Runtime.
_BETWEEN = ('Relu', 'Clip', 'MaxPool')
_WEIGHT = '.weight'


@dataclass(frozen=True)
class LayerNoise:
    """What int8 does in one layer; signal-to-noise ratios in dB, 6 dB are one bit.

    Attributes:
        graph: `network`, `bbox` or `mask`.
        layer: Its name in the model, e.g. `backbone.conv1`.
        alone: Of the graph's outputs together if this layer alone is in int8, see `joint_ratio`.
        here: Of the layer's output if all are, so with the noise of the layers before it.
    """

    graph: str
    layer: str
    alone: float
    here: float

    def as_dict(self) -> dict[str, Any]:
        """Plain types only."""
        return asdict(self)


def require_quantization() -> None:
    """Check that what quantization needs is installed.

    Raises:
        ImportError: It says what is missing and how to install it.
    """
    require_onnx()
    try:
        import onnxruntime.quantization  # noqa: F401
    except ImportError as error:
        raise ImportError(f'int8 needs what ONNX Runtime quantizes with ({error}): '
                          'pip install onnx onnxruntime sympy') from error


def quantizable_layers(proto: ModelProto) -> dict[str, list[str]]:
    """Nodes that have weights, by layer, in the order of the graph.

    Args:
        proto: A graph that `export_onnx` wrote.

    Returns:
        Names of nodes by the layer's name. A layer that several feature maps
        pass has several.
    """
    weights = {item.name for item in proto.graph.initializer}
    layers: dict[str, list[str]] = {}
    for node in proto.graph.node:
        if node.op_type in _LAYERS and node.input[1] in weights:
            layers.setdefault(node.input[1].removesuffix(_WEIGHT), []).append(node.name)
    return layers


def calibrated_ranges(path: str | Path, feeds: Iterable[Feed],
                      methods: Sequence[str] = tuple(METHODS)) -> dict[str, TensorsData]:
    """Ranges of the tensors of a graph, by each method.

    Args:
        path: The ONNX file.
        feeds: What it is run on, one by one, so that the memory is that of one.
        methods: Of `METHODS`.

    Returns:
        ONNX Runtime's ranges by method.

    Raises:
        ImportError: See `require_quantization`.
        ValueError: If there are no feeds, or a tensor is not finite on them.
    """
    require_quantization()
    import onnx
    from onnxruntime.quantization import CalibrationMethod, create_calibrator

    operators = _quantized_operators(onnx.load(str(path)))
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        calibrators = {}
        for method in methods:
            name, options = METHODS[method]
            calibrators[method] = create_calibrator(
                Path(path), operators, str(Path(folder) / f'{method}.onnx'),
                CalibrationMethod[name], extra_options=dict(options))
        count = 0
        for count, feed in enumerate(feeds, 1):  # noqa: B007
            for calibrator in calibrators.values():
                calibrator.collect_data(_OneFeed(feed))
        if not count:
            raise ValueError('there is nothing to calibrate on')
        ranges = {method: calibrator.compute_data() for method, calibrator in calibrators.items()}
    for found in ranges.values():
        bad = [name for name, data in found.items() if not np.isfinite(data.range_value).all()]
        if bad:
            raise ValueError(f'the tensor {bad[0]} is not finite on the calibration images')
    return ranges


def quantized_graph(proto: ModelProto, ranges: TensorsData, float_layers: Collection[str] = (), *,
                    per_channel: bool = True, reduce_range: bool = False) -> ModelProto:
    """A graph in int8.

    Args:
        proto: The float graph; left as it is.
        ranges: Of its tensors, from `calibrated_ranges`.
        float_layers: Layers that stay in float, of `quantizable_layers`.
        per_channel: Whether weights have a scale per output channel, or one per tensor.
        reduce_range: Whether weights have 7 bits: without VNNI, processors with
            AVX2 or AVX-512 add up products of 8 bits in 16 bits, which overflow.

    Returns:
        The graph with pairs of `QuantizeLinear` and `DequantizeLinear`.

    Raises:
        ImportError: See `require_quantization`.
        ValueError: If there is no such layer.
    """
    require_quantization()
    import onnx
    from onnxruntime.quantization import QDQQuantizer, QuantType

    layers = quantizable_layers(proto)
    unknown = sorted(set(float_layers) - set(layers))
    if unknown:
        raise ValueError(f'the graph has no layer {unknown[0]}; it has {", ".join(layers)}')
    nodes = _nodes_in_int8(proto, [node for layer, names in layers.items()
                                   if layer not in float_layers for node in names])
    result = onnx.ModelProto()
    result.CopyFrom(proto)
    if not nodes:  # an empty list would mean: all
        return result
    quantizer = QDQQuantizer(result, per_channel, reduce_range, QuantType.QInt8, QuantType.QUInt8,
                             ranges, nodes, [], _quantized_operators(proto), {})
    quantizer.quantize_model()
    quantizer.model.topological_sort()  # what ONNX asks for, and ONNX Runtime does when it saves
    return quantizer.model.model


def run_graph(proto: ModelProto, feeds: Iterable[Feed], outputs: Sequence[str] | None = None
              ) -> list[dict[str, np.ndarray]]:
    """Run a graph in ONNX Runtime on the CPU.

    Args:
        proto: The graph.
        feeds: What it is run on.
        outputs: Names of tensors to return; those of the graph if left out.

    Returns:
        For each feed the arrays by name.
    """
    import onnx
    import onnxruntime
    import torch

    if outputs is not None:
        copied = onnx.ModelProto()
        copied.CopyFrom(proto)
        known = {value.name for value in copied.graph.output}
        copied.graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs
                                   if name not in known)
        proto = copied
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options,
                                           ['CPUExecutionProvider'])
    names = list(outputs or [value.name for value in session.get_outputs()])
    return [dict(zip(names, session.run(names, dict(feed)))) for feed in feeds]


def signal_to_noise(expected: Sequence[Feed], found: Sequence[Feed]) -> dict[str, float]:
    """Signal-to-noise ratio of each output in dB, over all runs together.

    Args:
        expected: Outputs of the float graph, from `run_graph`.
        found: Those of the int8 graph on the same feeds.
    """
    from onnxruntime.quantization.qdq_loss_debug import (
        compute_signal_to_quantization_noice_ratio as ratio,
    )
    return {name: float(ratio(*([run[name].ravel().astype(np.float64) for run in runs]
                                for runs in (expected, found))))
            for name in expected[0]}


def joint_ratio(ratios: Mapping[str, float]) -> float:
    """One ratio for several outputs in dB: that of the mean of their relative noise powers.

    Args:
        ratios: From `signal_to_noise`.
    """
    return float(-10 * np.log10(np.mean([10 ** (-ratio / 10) for ratio in ratios.values()])))


def layer_noise(graph: str, proto: ModelProto, ranges: TensorsData, feeds: Sequence[Feed],
                **options: bool) -> list[LayerNoise]:
    """How much noise int8 adds, layer by layer.

    Args:
        graph: What the graph is called.
        proto: The float graph.
        ranges: See `quantized_graph`.
        feeds: What to compare on; other images than those that were calibrated on.
        options: See `quantized_graph`.

    Returns:
        One entry for each layer, that with the most noise in the outputs first.
    """
    layers, expected = quantizable_layers(proto), run_graph(proto, feeds)
    whole = quantized_graph(proto, ranges, **options)
    tensors = {layer: _output_in_both(proto, whole, names[-1]) for layer, names in layers.items()}
    one, other = (list(dict.fromkeys(names)) for names in zip(*tensors.values()))
    here = signal_to_noise(run_graph(proto, feeds, one), [
        dict(zip(one, run.values())) for run in run_graph(whole, feeds, other)])
    found = []
    for layer in layers:
        alone = quantized_graph(proto, ranges, set(layers) - {layer}, **options)
        found.append(LayerNoise(
            graph, layer, joint_ratio(signal_to_noise(expected, run_graph(alone, feeds))),
            here[tensors[layer][0]]))
    return sorted(found, key=lambda noise: noise.alone)


class _OneFeed:
    """One feed as ONNX Runtime's calibrators read it."""

    def __init__(self, feed: Feed) -> None:
        self._left: list[Feed] = [feed]

    def get_next(self) -> Feed | None:
        return self._left.pop() if self._left else None


def _quantized_operators(proto: ModelProto) -> list[str]:
    """Types of the nodes that are quantized if all layers are."""
    nodes = set(_nodes_in_int8(proto, [name for names in quantizable_layers(proto).values()
                                       for name in names]))
    return sorted({node.op_type for node in proto.graph.node if node.name in nodes})


def _nodes_in_int8(proto: ModelProto, layers: Sequence[str]) -> list[str]:
    """The nodes of layers, and those between them that only get what such nodes give.

    Index arithmetic, which some graphs do in float, is never among them.
    """
    wanted, inside, nodes = set(layers), set(), []
    for node in proto.graph.node:  # in the order of execution
        if node.name in wanted or (node.op_type in _BETWEEN and node.input[0] in inside):
            nodes.append(node.name)
            inside.update(node.output)
    return nodes


def _output_in_both(proto: ModelProto, quantized: ModelProto, node_name: str) -> tuple[str, str]:
    """A layer's output in the float and in the int8 graph, as the next layer gets it.

    Quantization takes the ReLU behind a layer into it: its range has no negative values.
    """
    node = next(node for node in proto.graph.node if node.name == node_name)
    behind = [other.output[0] for other in proto.graph.node
              if other.op_type in ('Relu', 'Clip') and other.input[0] == node.output[0]]
    known = {name for node in quantized.graph.node for name in node.output}
    for name in (*behind, node.output[0]):
        for rounded in (f'{name}_DequantizeLinear_Output', name):
            if rounded in known:
                return name, rounded
    raise ValueError(f'the int8 graph has nothing of the output of {node_name}')
