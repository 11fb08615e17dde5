"""ONNX files of a deployed model, and proof in ONNX Runtime that they compute the same.

The files hold the whole network, RoIAlign included, but no selection: anchors, decoding of
boxes, NMS and pasting of masks stay the code of MMDetection.
"""

from __future__ import annotations

import copy
import inspect
import json
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from mmengine.logging import print_log
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import keystr, tree_flatten, tree_flatten_with_path, tree_unflatten

from ..checkpoints import written_whole
from .reparameterize import is_training_form, unwrapped
from .verify import TOLERANCES, scale_relative_error

#: The opset in which PyTorch's exporter writes; a newer one would be a translation of it.
OPSET = 18
#: A final box whose corners lie further away, in pixels (beyond 1000 pixels: in thousandths
#: of the coordinate), is not the same one.
BOX_TOLERANCE = 0.1
#: Largest difference of the scores of the same box.
SCORE_TOLERANCE = 1e-3
#: Share of final boxes that may be another selection, and of mask pixels that may flip:
#: rounding decides where an overlap or a rank is at a threshold.
UNMATCHED_TOLERANCE, MASK_TOLERANCE = 0.01, 1e-3
_MAX_BYTES = 2**31  # a protobuf message cannot be larger
#: Traced with images of another size than real ones, of which no feature map is 1 pixel wide.
_TRACED_SIZE = (192, 256)


class OnnxExportError(RuntimeError):
    """A model has no ONNX form; the message says why."""


@dataclass(frozen=True)
class OnnxExport:
    """What `export_onnx` wrote.

    Attributes:
        files: By graph: `network`, of a two-stage detector also `bbox` and `mask`.
        inputs: Names and shapes of each graph's inputs; a name stands for a dynamic size.
        outputs: Names and shapes of each graph's outputs, likewise.
        dynamic_size: Whether height and width of the images are dynamic.
        reason: Why they are not, if that was asked for.
    """

    files: dict[str, Path]
    inputs: dict[str, dict[str, list[int | str]]]
    outputs: dict[str, dict[str, list[int | str]]]
    dynamic_size: bool
    reason: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain types only, files by their names."""
        return {**asdict(self), 'files': [path.name for path in self.files.values()]}


@dataclass(frozen=True)
class GraphError:
    """The difference of one output of one graph on one input.

    Attributes:
        graph: `network`, `bbox` or `mask`.
        output: The output's name in the file, e.g. `cls_scores_0`.
        shape: Shape of the images `(N, 3, H, W)`.
        error: Scale-relative, see `scale_relative_error`.
        tolerance: Largest error that counts as equal.
    """

    graph: str
    output: str
    shape: tuple[int, ...]
    error: float
    tolerance: float = TOLERANCES['float32']

    @property
    def passed(self) -> bool:
        """Whether the error is within the tolerance."""
        return self.error <= self.tolerance


@dataclass
class BoxComparison:
    """Final boxes of MMDetection's post-processing on the outputs of PyTorch and ONNX Runtime.

    Attributes:
        boxes: Number of boxes by PyTorch.
        matched: How many have a counterpart: same label, corners within `BOX_TOLERANCE`.
        at_edge: Boxes of either side without one, whose score lies where `score_thr` or
            `max_per_img` cuts.
        unmatched: Other boxes of either side without one.
        coordinate_difference: Largest difference of a matched box's coordinate, in pixels.
        score_difference: Largest difference of a matched box's score.
        mask_pixels: Number of pixels of all matched masks.
        mask_flips: How many of these only one side has.
    """

    boxes: int = 0
    matched: int = 0
    at_edge: int = 0
    unmatched: int = 0
    coordinate_difference: float = 0.0
    score_difference: float = 0.0
    mask_pixels: int = 0
    mask_flips: int = 0

    @property
    def passed(self) -> bool:
        """Whether all differences are within their tolerances."""
        return (self.unmatched <= UNMATCHED_TOLERANCE * self.boxes
                and self.score_difference <= SCORE_TOLERANCE
                and self.mask_flips <= MASK_TOLERANCE * self.mask_pixels)

    def as_dict(self) -> dict[str, Any]:
        """Plain types only."""
        return {'passed': self.passed, **asdict(self)}

    def add(self, expected: Any, found: Any, score_thr: float, max_per_img: int) -> None:
        """Match the boxes of one image.

        Args:
            expected: `InstanceData` with `bboxes (n, 4)`, `scores (n,)`, `labels (n,)`.
            found: The same, by ONNX Runtime.
            score_thr: Lower scores were dropped.
            max_per_img: No more boxes were kept.
        """
        distance = (expected.bboxes[:, None] - found.bboxes[None]).abs().amax(-1)
        # float32 has but seven digits for coordinates far outside of an image
        distance /= expected.bboxes.abs().amax(-1, keepdim=True).div(1000).clamp(min=1)
        distance[expected.labels[:, None] != found.labels[None]] = torch.inf
        pairs = []
        for index, row in enumerate(distance):
            if row.numel() and row.min() <= BOX_TOLERANCE:
                pairs.append((index, int(row.argmin())))
                distance[:, pairs[-1][1]] = torch.inf  # each box once
        left, right = ([pair[side] for pair in pairs] for side in (0, 1))
        self.boxes += len(expected)
        self.matched += len(pairs)
        for index, other in pairs:
            self.coordinate_difference = max(self.coordinate_difference, float(
                (expected.bboxes[index] - found.bboxes[other]).abs().max()))
            self.score_difference = max(self.score_difference, float(
                (expected.scores[index] - found.scores[other]).abs()))
        edge = score_thr
        for kept in (expected, found):
            if len(kept) >= max_per_img > 0:
                edge = max(edge, float(kept.scores.min()))
        for kept, used in ((expected, left), (found, right)):
            alone = [i for i in range(len(kept)) if i not in set(used)]
            at_edge = int((kept.scores[alone] <= edge + SCORE_TOLERANCE).sum())
            self.at_edge += at_edge
            self.unmatched += len(alone) - at_edge
        if 'masks' in expected and 'masks' in found:
            one, other = expected.masks[left], found.masks[right]
            self.mask_pixels += int((one | other).sum())
            self.mask_flips += int((one ^ other).sum())


@dataclass(frozen=True)
class OnnxReport:
    """What `compare_onnx` measured.

    Attributes:
        errors: One entry per graph, output and shape of the images.
        boxes: Final boxes of a detector; None if the model is none, or one whose
            post-processing cannot be run on the outputs.
    """

    errors: tuple[GraphError, ...]
    boxes: BoxComparison | None = None

    @property
    def passed(self) -> bool:
        """Whether all is within tolerance; false if nothing was compared."""
        return (bool(self.errors) and all(error.passed for error in self.errors)
                and (self.boxes is None or self.boxes.passed))

    @property
    def largest(self) -> float:
        """The largest error of all outputs."""
        return max((error.error for error in self.errors), default=float('inf'))

    def explain(self) -> str:
        """What failed and how much; or that all is equal."""
        if not self.errors:
            return 'there was no input to compare ONNX Runtime and PyTorch on'
        worst: dict[tuple[str, str], GraphError] = {}  # of the shapes of images
        for error in sorted(self.errors, key=lambda e: e.error):
            worst[error.graph, error.output] = error
        failed = sorted((e for e in worst.values() if not e.passed), key=lambda e: -e.error)
        lines = [f'  {e.output} of the graph {e.graph}, images {"x".join(map(str, e.shape))}: '
                 f'{e.error:.2e}, allowed {e.tolerance:.0e}' for e in failed[:8]]
        if failed:
            lines.insert(0, 'scale-relative errors of ONNX Runtime (infinite: not a finite '
                            'number, or another shape):')
        if len(failed) > 8:
            lines.append(f'  and {len(failed) - 8} more')
        if self.boxes is not None and not self.boxes.passed:
            lines.append('the final boxes differ: ' + ', '.join(
                f'{key} {value}' for key, value in self.boxes.as_dict().items()))
        if self.boxes is not None and not self.boxes.boxes:
            lines.append('there were no final boxes to compare')
        return '\n'.join(lines) or 'ONNX Runtime computes what PyTorch computes'

    def as_dict(self) -> dict[str, Any]:
        """Plain types only, for a file."""
        return {'passed': self.passed, 'errors': [asdict(error) for error in self.errors],
                'boxes': self.boxes and self.boxes.as_dict()}


def require_onnx() -> None:
    """Check that what export and comparison need is installed.

    Raises:
        ImportError: It says what is missing and how to install it.
    """
    missing = []
    for name in ('onnx', 'onnxscript', 'onnxruntime'):
        try:
            __import__(name)
        except ImportError:
            missing.append(name)
    if missing:
        raise ImportError(f'ONNX export needs {", ".join(missing)}: '
                          'pip install onnx onnxscript onnxruntime')


def export_onnx(model: nn.Module, batch: Tensor | Mapping[str, Any], path: str | Path, *,
                meta: Mapping[str, Any] | None = None, dynamic_size: bool = True) -> OnnxExport:
    """Write a deployed model as ONNX: preprocessed images to raw outputs.

    The number of images is dynamic. The model is exported as it computes in
    float32 and in eval mode; it is left as it is.

    A two-stage detector becomes several graphs, because selecting proposals is
    code that depends on data: `path` from images to `features_*` (those that
    the RoI head takes) and to the outputs of the RPN; `<stem>_bbox` from these
    features and from `rois (R, 5)`, the number of the image and x1, y1, x2, y2
    in pixels of the preprocessed image, to `cls_score` and `bbox_pred`; and
    `<stem>_mask`, to `mask_preds`.

    The file's metadata say how images are preprocessed: `mean` and `std` of
    the channels in `channel_order`, `pad_size_divisor`, `pad_value` (after
    normalization), and the `classes`; lists are JSON.

    Args:
        model: A detector, segmentor or classifier of OpenMMLab, or any module
            with one input `(N, C, H, W)`; re-parameterized.
        batch: What the model's data preprocessor returns, or a tensor
            `(N, C, H, W)` for a plain module. Only its shape is used.
        path: The file to write, `.onnx`; further graphs lie beside it.
        meta: Stored in the metadata as well; what is not text becomes JSON.
        dynamic_size: Export with dynamic height and width if PyTorch can;
            else, and where it cannot, those of `batch` are the only ones.

    Returns:
        Files, inputs and outputs.

    Raises:
        ImportError: See `require_onnx`.
        ValueError: If the model is in training form.
        OnnxExportError: If the model cannot be exported; nothing is written then.
    """
    if is_training_form(model):
        raise ValueError('the model is in training form: re-parameterize it before exporting')
    require_onnx()
    import onnx

    path = Path(path)
    model = _prepared(model)
    if sum(p.nbytes for p in chain(model.parameters(), model.buffers())) >= _MAX_BYTES:
        raise OnnxExportError('the weights take more than 2 GB, the limit of a single ONNX file')
    meta = {**_preprocessing(model), **{
        key: value if isinstance(value, str) else json.dumps(value, default=str)
        for key, value in (meta or {}).items()}}
    graphs = _graphs(model, batch)
    _make_traceable(model)
    shape, reason, protos = _inputs_samples(batch)[0].shape, None, None
    if dynamic_size:
        try:
            protos = _traced(model, graphs, (2, shape[1], *_TRACED_SIZE), True)
        except OnnxExportError as error:
            reason = str(error)
    if protos is None:
        protos = _traced(model, graphs, (2, *shape[1:]), False)
    files = _files(path, graphs)
    with ExitStack() as stack:  # all of them or none
        for name, proto in protos.items():
            onnx.helper.set_model_props(proto, {**meta, 'graph': name})
            onnx.save(proto, str(stack.enter_context(written_whole(files[name]))))
    return OnnxExport(
        files, {name: _shapes(proto.graph.input) for name, proto in protos.items()},
        {name: _shapes(proto.graph.output) for name, proto in protos.items()},
        dynamic_size and reason is None, reason)


def compare_onnx(model: nn.Module, batches: Tensor | Mapping[str, Any] | Sequence,
                 path: str | Path) -> OnnxReport:
    """Compare what ONNX Runtime computes on the CPU with what PyTorch computes.

    Every output of every graph, each on PyTorch's inputs and proposals; of the
    first batch also another number of images, and if the size is dynamic, a
    larger one. Of a detector the final boxes as well: MMDetection's own
    `predict`, whose network is ONNX Runtime.

    Args:
        model: The model that was exported; left as it is.
        batches: One or several, see `export_onnx`. Batches of a size that the
            file does not take are left out.
        path: The file that `export_onnx` wrote.

    Returns:
        The error of each output, and how final boxes differ.

    Raises:
        ImportError: See `require_onnx`.
        FileNotFoundError: If there is no such file.
    """
    require_onnx()
    model = _prepared(model)
    batches = [batches] if isinstance(batches, (Tensor, Mapping)) else list(batches)
    if not batches:
        return OnnxReport(())
    graphs = _graphs(model, batches[0])
    sessions = {name: _Session(file) for name, file in _files(Path(path), graphs).items()}
    size = sessions['network'].size
    errors: list[GraphError] = []
    boxes = BoxComparison() if _stages(model) else None
    pairs = [_inputs_samples(batch) for batch in batches]
    pairs = [pair for pair in pairs if size in (None, pair[0].shape[2:])]
    with torch.no_grad():
        if boxes is not None and pairs:
            other = _detector_of_sessions(model, sessions, graphs['network'](model, pairs[0][0]))
        for inputs, samples in pairs:
            errors += _output_errors(model, graphs, sessions, inputs, samples)
            if boxes is not None:
                _compare_boxes(boxes, model, other, inputs, samples)
        for inputs, samples in pairs[:1]:
            one, its_sample = inputs[:1], samples and samples[:1]
            other_number = one if len(inputs) > 1 else torch.cat([one, one.flip(-1)])
            errors += _output_errors(model, graphs, sessions, other_number,
                                     samples and its_sample * len(other_number))
            if size is None:
                errors += _output_errors(model, graphs, sessions, F.pad(one, (0, 64, 0, 32)),
                                         its_sample)
    return OnnxReport(tuple(errors), boxes)


def _prepared(model: nn.Module) -> nn.Module:
    """A copy for float32 on the CPU, in eval mode."""
    model = copy.deepcopy(unwrapped(model)).float().cpu()
    model.eval()  # a statement of its own: not every backbone's train() returns itself
    return model


def _inputs_samples(batch: Tensor | Mapping[str, Any]) -> tuple[Tensor, list | None]:
    batch = {'inputs': batch} if isinstance(batch, Tensor) else batch
    return batch['inputs'].float().cpu(), batch.get('data_samples')


def _files(path: Path, graphs: Mapping[str, Any]) -> dict[str, Path]:
    return {name: path if name == 'network' else path.with_name(f'{path.stem}_{name}{path.suffix}')
            for name in graphs}


def _stages(model: nn.Module) -> int:
    """Of a detector whose selection can be run apart from its network, how often it selects."""
    if not (hasattr(model, 'bbox_head') or hasattr(model, 'roi_head')):
        return 0
    try:
        from mmdet.models.detectors import SingleStageDetector, TwoStageDetector
        from mmdet.models.roi_heads import StandardRoIHead
    except ImportError:
        return 0
    if isinstance(model, TwoStageDetector):
        if not (model.with_rpn and isinstance(model.roi_head, StandardRoIHead)):
            raise OnnxExportError(f'{type(model).__name__} with {type(model.roi_head).__name__}: '
                                  'only two stages can be exported, an RPN and a StandardRoIHead')
        return 2
    return int(isinstance(model, SingleStageDetector))


def _graphs(model: nn.Module, batch: Tensor | Mapping[str, Any]) -> dict[str, Callable]:
    """Functions of (model, inputs) that return outputs in a dictionary, by graph."""
    if _inputs_samples(batch)[1] is None:
        return {'network': lambda model, inputs: {'output': model(inputs)}}
    stages = _stages(model)
    if stages == 0:
        return {'network': lambda model, inputs: {'output': model(inputs, None, mode='tensor')}}
    if stages == 1:
        return {'network': lambda model, inputs: _head_outputs(
            model.bbox_head, model.extract_feat(inputs))}
    graphs = {'network': _first_stage, 'bbox': _bbox_stage}
    if model.roi_head.with_mask:
        graphs['mask'] = _mask_stage
    return graphs


def _first_stage(model: nn.Module, inputs: Tensor) -> dict[str, Any]:
    features, roi_head = model.extract_feat(inputs), model.roi_head
    extractors = [roi_head.bbox_roi_extractor, *(
        [roi_head.mask_roi_extractor] if roi_head.with_mask else [])]
    count = max(extractor.num_inputs for extractor in extractors)
    return {'features': list(features[:count]),
            **_head_outputs(model.rpn_head, features, prefix='rpn_')}


def _bbox_stage(model: nn.Module, inputs: list[Tensor]) -> dict[str, Any]:
    results = model.roi_head._bbox_forward(tuple(inputs[:-1]), inputs[-1])
    return {name: results[name] for name in ('cls_score', 'bbox_pred')}


def _mask_stage(model: nn.Module, inputs: list[Tensor]) -> dict[str, Any]:
    return {'mask_preds': model.roi_head._mask_forward(
        tuple(inputs[:-1]), inputs[-1])['mask_preds']}


def _head_outputs(head: nn.Module, features: Sequence[Tensor], prefix: str = '') -> dict[str, Any]:
    """A dense head's outputs, named as the parameters of its loss that take them."""
    outputs = head(features)
    names = [name for name, p in inspect.signature(head.loss_by_feat).parameters.items()
             if p.kind is p.POSITIONAL_OR_KEYWORD and not name.startswith('batch_')]
    names += [f'output_{index}' for index in range(len(names), len(outputs))]
    return {prefix + name: output for name, output in zip(names, outputs)}


def _named(outputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Tensors by names that ONNX tools take, e.g. `cls_scores_0`."""
    return {re.sub(r'\W+', '_', keystr(path)).strip('_'): leaf
            for path, leaf in tree_flatten_with_path(outputs)[0] if isinstance(leaf, Tensor)}


class _Graph(nn.Module):
    """A module of one function of a model, which returns nothing but tensors."""

    def __init__(self, model: nn.Module, function: Callable) -> None:
        super().__init__()
        self.model, self.function = model, function

    def forward(self, inputs: Tensor | list[Tensor]) -> tuple[Tensor, ...]:
        return tuple(_named(self.function(self.model, inputs)).values())


class _AdaptiveAvgPool2d(nn.Module):
    """The stock layer as two matrix products.

    PyTorch exports the stock layer for the traced size of its input only: a
    graph of dynamic size would be wrong for all others, without an error.
    """

    def __init__(self, output_size: tuple[int, int]) -> None:
        super().__init__()
        self.output_size = output_size

    def forward(self, x: Tensor) -> Tensor:
        height, width = self.output_size
        return self._averages(x, 2, height) @ x @ self._averages(x, 3, width).T

    @staticmethod
    def _averages(x: Tensor, dim: int, bins: int) -> Tensor:
        """The matrix `(bins, length)` that averages: bins may overlap by one, as in PyTorch."""
        length = x.shape[dim]
        index = torch.arange(bins, device=x.device)[:, None]
        position = torch.arange(length, device=x.device)[None]
        inside = (position >= index * length // bins) & (
            position < ((index + 1) * length + bins - 1) // bins)
        inside = inside.to(x.dtype)
        return inside / inside.sum(1, keepdim=True)


def _make_traceable(model: nn.Module) -> None:
    """Replace, in place, what the exporter cannot trace by what computes the same."""
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if type(child) is nn.AdaptiveAvgPool2d:
                size = child.output_size
                size = (size, size) if isinstance(size, int) else tuple(size)
                if None not in size and size != (1, 1):
                    module._modules[name] = _AdaptiveAvgPool2d(size)
    if not hasattr(model, 'roi_head'):
        return
    from mmcv.ops import RoIAlign
    from mmdet.models.roi_heads.roi_extractors import SingleRoIExtractor
    for module in model.modules():
        if isinstance(module, RoIAlign) and module.pool_mode == 'avg':
            module.use_torchvision = True  # the same function, with an ONNX counterpart
        elif type(module) is SingleRoIExtractor:
            module.forward = MethodType(_extract_rois, module)


def _extract_rois(self: Any, feats: Sequence[Tensor], rois: Tensor,
                  roi_scale_factor: float | None = None) -> Tensor:
    """`SingleRoIExtractor.forward` without asking whether a level has any RoI."""
    levels = self.map_roi_levels(rois, len(feats))
    if roi_scale_factor is not None:
        rois = self.roi_rescale(rois, roi_scale_factor)
    pooled = feats[0].new_zeros(len(rois), self.out_channels, *self.roi_layers[0].output_size)
    for level, (layer, features) in enumerate(zip(self.roi_layers, feats)):
        index = (levels == level).nonzero().squeeze(1)
        pooled = pooled.index_copy(0, index, layer(features, rois[index]))
    return pooled


def _traced(model: nn.Module, graphs: Mapping[str, Callable], shape: Sequence[int],
            dynamic_size: bool) -> dict[str, Any]:
    """The ONNX graphs, for images of any number, and of any size or that of `shape` only.

    Raises:
        OnnxExportError: If PyTorch cannot export them so.
    """
    protos, inputs, names = {}, torch.zeros(*shape), ['inputs']
    sizes: Any = {0: 'batch', **({2: 'height', 3: 'width'} if dynamic_size else {})}
    for graph, function in graphs.items():
        if graph == 'bbox':  # and mask, which takes the same
            features = _first_stage(model, inputs)['features']
            names = [*(f'features_{level}' for level in range(len(features))), 'rois']
            sizes = [*({dim: f'{size}_{level}' if dim else size for dim, size in sizes.items()}
                       for level in range(len(features))), {0: 'rois'}]
            inputs = [*features, torch.tensor([[0., 0, 0, 50, 50], [1., 0, 0, 150, 150]])]
        try:
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter('ignore')
                outputs = list(_named(function(model, inputs)))
                program = torch.onnx.export(
                    _Graph(model, function), (inputs,), dynamo=True, opset_version=OPSET,
                    input_names=names, output_names=outputs, dynamic_shapes=(sizes,), verbose=False)
        except Exception as error:  # whatever a model's code raises while it is traced
            cause: BaseException = error
            while cause.__cause__ is not None:
                cause = cause.__cause__
            reason = str(cause)[:500] or type(cause).__name__
            raise OnnxExportError(f'PyTorch cannot export the graph {graph} of '
                                  f'{type(model).__name__}: {reason}') from error
        protos[graph] = _cleaned(program.model_proto)
        found = _shapes(protos[graph].graph.input)
        fixed = [f'dimension {dim} of {name}' for name, dims in zip(names, _as_list(sizes))
                 for dim in dims if isinstance(found[name][dim], int)]
        if fixed:
            raise OnnxExportError(f'the graph {graph} of {type(model).__name__} works for one size '
                                  f'only of {", ".join(fixed)}')
    return protos


def _as_list(value: Any) -> list:
    return value if isinstance(value, list) else [value]


def _cleaned(proto: Any) -> Any:
    """Leave out the exporter's notes, with paths of this machine; weights get their own names."""
    graph = proto.graph
    for item in chain([graph], graph.node, graph.input, graph.output, graph.value_info,
                      graph.initializer):
        item.ClearField('metadata_props')
    prefix = 'model.'  # of _Graph
    for item in chain(graph.initializer, graph.value_info):
        item.name = item.name.removeprefix(prefix)
    for node in graph.node:
        node.input[:] = [name.removeprefix(prefix) for name in node.input]
    return proto


def _shapes(values: Any) -> dict[str, list[int | str]]:
    return {value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
            for value in values}


def _preprocessing(model: nn.Module) -> dict[str, str]:
    """What the model expects of its input and says about its classes, as text."""
    found: dict[str, Any] = {}
    preprocessor = getattr(model, 'data_preprocessor', None)
    if getattr(preprocessor, '_enable_normalize', False):
        for name in ('mean', 'std'):  # without the noise of float32
            found[name] = [float(f'{value:.6g}') for value in getattr(preprocessor, name).view(-1)]
    if preprocessor is not None:
        # MMDetection, MMSegmentation and MMPretrain each have their own name for it
        swapped = any(getattr(preprocessor, name, False)
                      for name in ('_channel_conversion', 'channel_conversion', 'to_rgb'))
        found['channel_order'] = 'rgb' if swapped else 'bgr'  # MMCV loads BGR
        tested = getattr(preprocessor, 'test_cfg', None) or {}
        found['pad_size_divisor'] = (tested.get('size_divisor')
                                     or getattr(preprocessor, 'pad_size_divisor', None) or 1)
        found['pad_value'] = getattr(preprocessor, 'pad_value', getattr(preprocessor, 'pad_val', 0))
    dataset_meta = getattr(model, 'dataset_meta', None) or {}
    classes = dataset_meta.get('classes', dataset_meta.get('CLASSES'))
    if classes is not None:
        found['classes'] = list(classes)
    return {key: value if isinstance(value, str) else json.dumps(value)
            for key, value in found.items()}


class _Session:
    """A file in ONNX Runtime: tensors in, tensors by name out."""

    def __init__(self, path: Path) -> None:
        import onnxruntime

        if not path.is_file():
            raise FileNotFoundError(f'there is no ONNX file {path}')
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        self.session = onnxruntime.InferenceSession(str(path), options, ['CPUExecutionProvider'])
        size = tuple(self.session.get_inputs()[0].shape[2:])
        self.size = size if all(isinstance(length, int) for length in size) else None

    def __call__(self, inputs: Tensor | list[Tensor]) -> dict[str, Tensor]:
        names = [value.name for value in self.session.get_inputs()]
        found = self.session.run(None, {
            name: tensor.numpy() for name, tensor in zip(names, _as_list(inputs))})
        return {value.name: torch.from_numpy(array)
                for value, array in zip(self.session.get_outputs(), found)}


def _output_errors(model: nn.Module, graphs: Mapping[str, Callable],
                   sessions: Mapping[str, _Session], inputs: Tensor, samples: list | None
                   ) -> Iterator[GraphError]:
    """The error of each output of each graph, on PyTorch's features and proposals."""
    shape, feed, outputs = tuple(inputs.shape), inputs, {}
    for graph, function in graphs.items():
        if graph == 'bbox':
            feed = _roi_inputs(model, outputs, samples)
        elif graph == 'mask':
            feed = [*feed[:-1], feed[-1][:100]]  # as StandardRoIHead.forward does
        outputs = function(model, feed)
        expected, found = _named(outputs), {}
        try:
            found = sessions[graph](feed)
        except Exception as error:  # of classes that ONNX Runtime does not publish
            print_log(f'ONNX Runtime failed in the graph {graph} on images {shape}: {error}',
                      'current', logging.WARNING)
        for name in sorted(expected.keys() | found.keys()):
            yield GraphError(graph, name, shape,
                             scale_relative_error(expected.get(name), found.get(name)))


def _roi_inputs(model: nn.Module, outputs: dict[str, Any], samples: list) -> list[Tensor]:
    """Features and `rois (R, 5)`, selected by MMDetection from the outputs of the first stage."""
    from mmdet.structures.bbox import bbox2roi

    features, *head_outputs = outputs.values()
    rpn_head = _shallow(model.rpn_head)
    rpn_head.forward = lambda x: tuple(head_outputs)
    proposals = rpn_head.predict(features, samples, rescale=False)
    return [*features, bbox2roi([image.bboxes for image in proposals])]


def _compare_boxes(boxes: BoxComparison, model: nn.Module, other: nn.Module, inputs: Tensor,
                   samples: list) -> None:
    """Add the final boxes of one batch to the comparison."""
    expected, found = (detector.predict(inputs, copy.deepcopy(samples))
                       for detector in (model, other))
    cfg = (getattr(model, 'roi_head', None) or model.bbox_head).test_cfg or {}
    for one, two in zip(expected, found):
        boxes.add(one.pred_instances, two.pred_instances, cfg.get('score_thr', 0.0),
                  cfg.get('max_per_img', 0))


def _detector_of_sessions(model: nn.Module, sessions: Mapping[str, _Session],
                          outputs: dict[str, Any]) -> nn.Module:
    """The detector with ONNX Runtime in place of its network: without its backbone and neck.

    `outputs` are any of its raw outputs: only their structure is taken.
    """
    detector = _shallow(model)
    leaves, spec = tree_flatten(outputs)
    latest: dict[str, Any] = {}

    def extract_feat(images: Tensor) -> Sequence[Tensor]:
        found = iter(sessions['network'](images).values())
        latest.update(tree_unflatten(
            [next(found) if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec))
        return latest.pop('features', ())

    for part in ('backbone', 'neck'):
        detector._modules.pop(part, None)
    detector.extract_feat = extract_feat
    name = 'rpn_head' if 'bbox' in sessions else 'bbox_head'
    head = detector._modules[name] = _shallow(getattr(model, name))
    head.forward = lambda x: tuple(latest.values())
    if 'bbox' in sessions:
        roi_head = detector._modules['roi_head'] = _shallow(model.roi_head)
        roi_head._bbox_forward = lambda x, rois: {'bbox_pred': None, **sessions['bbox']([*x, rois])}
        roi_head._mask_forward = lambda x, rois: sessions['mask']([*x, rois])
    return detector


def _shallow(module: nn.Module) -> nn.Module:
    """A copy that shares parameters and children, but may be given others."""
    module = copy.copy(module)
    module._modules = dict(module._modules)
    return module
