"""From a folder with a folded ONNX network to the same in int8, measured against the float one."""

from __future__ import annotations

import json
import math
import platform
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.logging import print_log
from mmengine.runner import Runner

from ..analysis.comparison import chosen_metric, smaller_is_better
from ..analysis.documents import without_nan
from ..analysis.measure import measure_latency
from ..datasets.config_walk import spread
from ..engine import bare_model, build_test_runner
from ..engine.metrics import metrics_at_chance, tested_metrics
from ..errors import ConfigError, VerificationError
from ..export.onnx.graphs import graph_files, network_graphs, prepared
from ..export.onnx.quantize import (
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
from ..export.onnx.quantize_run import graph_feeds, model_of_files, run_of_files
from ..files import written_whole
from .evidence import config_of_files
from .loading import deployed_files
from .quantization_input import (
    batches_of_size,
    calibration_batches,
    require_folded,
    require_sense,
)
from .quantization_report import quantization_table

#: Training images that methods and layers are compared on; ranges are not taken from them.
_COMPARED = 4
#: Instructions that multiply 8-bit integers without overflow, as PyTorch names them.
_INT8_INSTRUCTIONS = ('avx512_vnni', 'avx_vnni', 'avx_vnni_int8', 'amx_int8')


def quantize_deployed(cfg: Config, folder: str | Path, *, calibration_images: int = 32,
                      max_drop: float | None = None, methods: Sequence[str] = tuple(METHODS),
                      per_channel: bool = True, float_layers: Sequence[str] = (),
                      latency_rounds: int = 20) -> dict[str, Any]:
    """Write the network of a deployed folder in int8, and measure what that costs.

    Static quantization by ONNX Runtime. Ranges of tensors are found on training
    images that pass the test pipeline, by each method; taken is the one with the
    best signal-to-noise ratio of a graph's outputs on other training images. Both
    networks are tested on the whole test set in ONNX Runtime; the rest of the
    model is PyTorch's.

    Writes `model_int8.onnx` beside `model.onnx`, and one file for each further
    graph; all of them or none.

    Args:
        cfg: The training config, from `orepa_mm.engine.load_config`; its
            training images are read.
        folder: With `config.py`, `model.pth` and `model.onnx` in folded form.
        calibration_images: How many, spread evenly over the training set.
        max_drop: Largest drop of the metric that is let pass, as a fraction of
            1 (0.005 is half a point of AP or mIoU). Layers that add most noise
            stay in float until it is reached, half of them at most. None: any drop.
        methods: To choose from, of `METHODS`.
        per_channel: Whether weights have a scale per output channel.
        float_layers: Layers that stay in float in any case.
        latency_rounds: Timed passes of each network.

    Returns:
        Plain types: `metrics`, `drop`, `latency_ms` and `file_bytes` of float and
        int8, `method` and `snr` of each graph, `layers` with their noise,
        `float_layers`, `search`, and what it was measured with.

    Raises:
        FileNotFoundError: If the folder lacks a file.
        ConfigError: If the network is not folded, an argument makes no sense, or
            the config has no training images of the network's size.
        VerificationError: If the drop is larger than `max_drop`; nothing is written then.
        OnnxExportError: If the model's metrics cannot be measured on ONNX outputs.
        ImportError: If what quantization needs is not installed.
    """
    folder = Path(folder).expanduser()
    require_quantization()
    require_sense(calibration_images, max_drop, methods)
    config, checkpoint = deployed_files(folder)
    require_folded(folder / 'model.onnx')
    runner = build_test_runner(_test_config(cfg, config), checkpoint)
    options = {'per_channel': per_channel, 'reduce_range': _overflows()}
    with tempfile.TemporaryDirectory() as temporary:
        job = _Quantization(cfg, folder, runner, Path(temporary), methods, float_layers, options)
        job.calibrate(calibration_images)
        report = without_nan({**job.search(max_drop), **job.costs(latency_rounds)})
        drop = report['drop']
        if max_drop is not None and (drop is None or drop > max_drop):
            raise VerificationError(
                f'int8 loses {"all" if drop is None else f"{drop:.4f}"} of {report["metric"]}, '
                f'allowed is {max_drop:g}, with {len(report["float_layers"])} of '
                f'{len(job.noise)} layers in float: nothing was written. Calibrate on more images '
                f'or allow more\n{quantization_table(report)}')
        job.write(report)
    return report


def int8_instructions() -> list[str]:
    """What the processor multiplies 8-bit integers with, as far as PyTorch tells."""
    known = getattr(torch.cpu, 'get_capabilities', dict)()  # PyTorch 2.9 or newer
    return [name for name in _INT8_INSTRUCTIONS if known.get(name)]


def _overflows() -> bool:
    """Whether ONNX Runtime may add up products in 16 bits here, in which they overflow."""
    return platform.machine().lower() in ('x86_64', 'amd64') and not int8_instructions()


class _Quantization:
    """The steps of `quantize_deployed`, and what each needs of those before."""

    def __init__(self, cfg: Config, folder: Path, runner: Runner, temporary: Path,
                 methods: Sequence[str], float_layers: Sequence[str], options: dict[str, bool]
                 ) -> None:
        self.cfg, self.folder, self.runner, self.temporary = cfg, folder, runner, temporary
        self.methods, self.kept, self.options = methods, list(float_layers), options
        self.model = prepared(bare_model(runner))

    def calibrate(self, number: int) -> None:
        """Choose a method for each graph, and find out how much noise each layer adds."""
        import onnx

        print_log(f'calibrating int8 on {number} training images', 'current')
        batches = batches_of_size(calibration_batches(self.cfg, self.model, number + _COMPARED),
                                  self.folder / 'model.onnx')
        compared = spread(len(batches), _COMPARED)
        self.compared = [batches[index] for index in compared]
        batches = [batch for index, batch in enumerate(batches)
                   if index not in compared][:number] or batches
        self.images = {'calibration': len(batches), 'compared': len(compared)}
        self.files = graph_files(self.folder / 'model.onnx',
                                 network_graphs(self.model, batches[0]))
        for path in self.files.values():
            if not path.is_file():
                raise FileNotFoundError(f'there is no {path}, which belongs to model.onnx: write '
                                        'the folder anew with `mim run orepa_mm reparam`')
        self.protos = {graph: onnx.load(str(path)) for graph, path in self.files.items()}
        self.layers = {graph: quantizable_layers(proto) for graph, proto in self.protos.items()}
        known = [layer for layers in self.layers.values() for layer in layers]
        for layer in self.kept:
            if layer not in known:
                raise ConfigError(f'the network has no layer {layer}; it has {", ".join(known)}')
        self.snr: dict[str, dict[str, float]] = {}
        self.feeds, self.method, self.ranges, self.noise = {}, {}, {}, []
        for graph, proto in self.protos.items():
            try:
                ranges = calibrated_ranges(self.files[graph],
                                           graph_feeds(self.model, graph, batches), self.methods)
            except ValueError as error:
                raise ConfigError(f'the graph {graph} cannot be calibrated: {error}') from error
            feeds = self.feeds[graph] = list(graph_feeds(self.model, graph, self.compared))
            if not feeds:
                raise ConfigError('the detector proposes nothing on the training images that int8 '
                                  'is compared on: train it longer')
            expected = run_graph(proto, feeds)
            self.snr[graph] = {method: joint_ratio(signal_to_noise(
                expected, run_graph(self._quantized(graph, found, self.kept), feeds)))
                for method, found in ranges.items()}
            self.method[graph] = max(self.snr[graph], key=self.snr[graph].get)
            self.ranges[graph] = ranges[self.method[graph]]
            self.noise += layer_noise(graph, proto, self.ranges[graph], feeds, **self.options)
        self.noise.sort(key=lambda noise: noise.alone)

    def search(self, max_drop: float | None) -> dict[str, Any]:
        """Test float and int8, and with as many layers in float as it takes; the report so far."""
        metrics = {'float': self._tested(self.files, 'float')}
        name = chosen_metric(self.cfg, metrics['float'])
        judged = [name, *([name.replace('bbox', 'segm')] if 'bbox' in name else [])]
        judged = [key for key in dict.fromkeys(judged) if key in metrics['float']]
        sign = -1 if smaller_is_better(self.cfg, name) else 1
        order = [noise.layer for noise in self.noise if noise.layer not in self.kept]
        tried: dict[int, tuple[float, dict[str, float]]] = {}

        def drop_with(count: int) -> float:
            if count not in tried:
                files = self._write_candidate([*self.kept, *order[:count]])
                found = self._tested(files, f'int8 with {count} more layers in float'
                                     if count else 'int8')
                drop = max(_drop(metrics['float'][key], found.get(key, math.nan), sign)
                           for key in judged)
                tried[count] = drop, found
            return tried[count][0]

        count = fewest(drop_with, max_drop, len(order) // 2)
        drop, metrics['int8'] = tried[count]
        kept = {*self.kept, *order[:count]}
        self.candidate = self._write_candidate(kept)
        return {
            'metric': ' and '.join(judged), 'metrics': metrics, 'drop': drop, 'max_drop': max_drop,
            'float_layers': [noise.layer for noise in self.noise if noise.layer in kept],
            'search': [{'float_layers': len(self.kept) + number, 'drop': found[0],
                        **{key: found[1].get(key) for key in judged}}
                       for number, found in sorted(tried.items())],
            'layers': [noise.as_dict() for noise in self.noise], 'snr': self.snr,
            'method': self.method, 'images': self.images, **self.options,
            'notes': self._notes(metrics['float']),
        }

    def costs(self, rounds: int) -> dict[str, Any]:
        """Size of the files, and latency of all graphs of both networks, in turns."""
        import onnxruntime

        feeds = {graph: feeds[0] for graph, feeds in self.feeds.items()}
        latency = measure_latency({kind: run_of_files(files, feeds) for kind, files in (
            ('float', self.files), ('int8', self.candidate))}, rounds)
        return {
            'latency_ms': latency,
            'input_shape': list(self.feeds['network'][0]['inputs'].shape),
            'file_bytes': {kind: sum(path.stat().st_size for path in files.values())
                           for kind, files in (('float', self.files), ('int8', self.candidate))},
            'machine': {'onnxruntime': onnxruntime.__version__,
                        'threads': torch.get_num_threads(), 'instructions': int8_instructions()},
            'files': [path.name for path in self._outputs().values()],
        }

    def write(self, report: Mapping[str, Any]) -> None:
        """Put the files in place, with what was done in their metadata."""
        import onnx

        with ExitStack() as stack:  # all of them or none
            for graph, path in self._outputs().items():
                proto = onnx.load(str(self.candidate[graph]))
                meta = {item.key: item.value for item in self.protos[graph].metadata_props}
                meta.pop('verified', None)  # that was said of the float network
                meta['quantization'] = json.dumps({
                    'weights': 'int8', 'activations': 'uint8', 'format': 'QDQ',
                    'method': self.method[graph], **self.options, 'images': self.images,
                    'float_layers': [layer for layer in report['float_layers']
                                     if layer in self.layers[graph]],
                    'onnxruntime': report['machine']['onnxruntime'],
                    'metric': report['metric'], 'drop': report['drop']})
                del proto.metadata_props[:]
                onnx.helper.set_model_props(proto, meta)
                onnx.save(proto, str(stack.enter_context(written_whole(path))))

    def _outputs(self) -> dict[str, Path]:
        return graph_files(self.folder / 'model_int8.onnx', self.files)

    def _quantized(self, graph: str, ranges: Any, kept: Sequence[str]) -> Any:
        return quantized_graph(self.protos[graph], ranges,
                               [layer for layer in kept if layer in self.layers[graph]],
                               **self.options)

    def _write_candidate(self, kept: Sequence[str]) -> dict[str, Path]:
        import onnx

        files = graph_files(self.temporary / 'model.onnx', self.files)
        for graph, path in files.items():
            onnx.save(self._quantized(graph, self.ranges[graph], kept), str(path))
        return files

    def _tested(self, files: Mapping[str, Path], what: str) -> dict[str, float]:
        print_log(f'testing {what} in ONNX Runtime', 'current')
        self.runner.model = model_of_files(self.model, files, self.compared[0])
        return tested_metrics(self.runner, self.temporary)

    def _notes(self, metrics: Mapping[str, float]) -> list[str]:
        notes = []
        classes = (getattr(self.model, 'dataset_meta', None) or {}).get('classes')
        if metrics_at_chance(metrics, classes and len(classes)):
            notes.append('a metric at chance proves nothing about int8')
        if self.options['reduce_range']:
            notes.append('no instructions for products of 8-bit integers were found: weights have '
                         '7 bits')
        return notes


def fewest(drop_with: Callable[[int], float], allowed: float | None, limit: int) -> int:
    """The fewest layers in float with which a drop is small enough, in few trials.

    The number is doubled until it is enough, and then halved back.

    Args:
        drop_with: The drop with so many layers in float.
        allowed: The largest that is small enough; None: any.
        limit: No more than these.

    Returns:
        The number; `limit` if that is not enough either. It was tried.
    """
    count, too_few = 0, -1
    while not _is_enough(drop_with(count), allowed):
        if count == limit:
            return limit
        too_few, count = count, min(max(1, 2 * count), limit)
    while count - too_few > 1:
        middle = (count + too_few) // 2
        if _is_enough(drop_with(middle), allowed):
            count = middle
        else:
            too_few = middle
    return count


def _is_enough(drop: float, allowed: float | None) -> bool:
    return allowed is None or drop <= allowed


def _drop(before: float, after: float, sign: int) -> float:
    """By how much a metric got worse, as a fraction of 1; infinite if it is no number."""
    unit = 100 if abs(before) > 1 else 1  # mIoU and accuracy are in percent
    return sign * (before - after) / unit if math.isfinite(after) else math.inf


def _test_config(cfg: Config, path: Path) -> Config:
    """The config of the deployed model, to test with; hooks of training would copy the network."""
    deployed = config_of_files(path, cfg, 'int8')
    deployed.launcher = 'none'
    deployed.custom_hooks = []
    return deployed
