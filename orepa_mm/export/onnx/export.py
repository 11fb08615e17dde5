"""Write ONNX files of a deployed model."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import OnnxExportError
from ...files import written_whole
from ...reparam import is_training_form
from .graphs import (
    as_list,
    first_stage,
    graph_files,
    graph_inputs,
    inputs_and_samples,
    named_tensors,
    network_graphs,
    prepared,
    require_onnx,
)
from .traceable import TracedGraph, make_traceable

#: The opset in which PyTorch's exporter writes; a newer one would be a translation of it.
OPSET = 18
_MAX_BYTES = 2**31  # a protobuf message cannot be larger
#: Traced with images of another size than real ones, of which no feature map is 1 pixel wide.
_TRACED_SIZE = (192, 256)


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
    require_exportable(model)
    import onnx

    path = Path(path)
    model = prepared(model)
    if sum(p.nbytes for p in chain(model.parameters(), model.buffers())) >= _MAX_BYTES:
        raise OnnxExportError('the weights take more than 2 GB, the limit of a single ONNX file')
    meta = {**preprocessing_meta(model), **as_text(meta or {})}
    graphs = network_graphs(model, batch)
    make_traceable(model)
    shape, reason, protos = inputs_and_samples(batch)[0].shape, None, None
    if dynamic_size:
        try:
            protos = _traced(model, graphs, (2, shape[1], *_TRACED_SIZE), True)
        except OnnxExportError as error:
            reason = str(error)
    if protos is None:
        protos = _traced(model, graphs, (2, *shape[1:]), False)
    files = graph_files(path, graphs)
    with ExitStack() as stack:  # all of them or none
        for name, proto in protos.items():
            onnx.helper.set_model_props(proto, {**meta, 'graph': name})
            onnx.save(proto, str(stack.enter_context(written_whole(files[name]))))
    return OnnxExport(
        files, {name: named_shapes(proto.graph.input) for name, proto in protos.items()},
        {name: named_shapes(proto.graph.output) for name, proto in protos.items()},
        dynamic_size and reason is None, reason)


def _traced(model: nn.Module, graphs: Mapping[str, Callable], shape: Sequence[int],
            dynamic_size: bool) -> dict[str, Any]:
    """The ONNX graphs, for images of any number, and of any size or that of `shape` only.

    Raises:
        OnnxExportError: If PyTorch cannot export them so.
    """
    protos, inputs, names = {}, torch.zeros(*shape), graph_inputs('network')
    sizes: Any = {0: 'batch', **({2: 'height', 3: 'width'} if dynamic_size else {})}
    for graph, function in graphs.items():
        if graph == 'bbox':  # and mask, which takes the same
            features = first_stage(model, inputs)['features']
            names = graph_inputs(graph, len(features))
            sizes = [*({dim: f'{size}_{level}' if dim else size for dim, size in sizes.items()}
                       for level in range(len(features))), {0: 'rois'}]
            inputs = [*features, torch.tensor([[0., 0, 0, 50, 50], [1., 0, 0, 150, 150]])]
        what = f'the graph {graph} of {type(model).__name__}'
        with _explaining(what), torch.no_grad():
            outputs = list(named_tensors(function(model, inputs)))
        protos[graph] = exported_graph(TracedGraph(model, function), (inputs,), what, names,
                                       outputs, (sizes,))
        found = named_shapes(protos[graph].graph.input)
        fixed = [f'dimension {dim} of {name}' for name, dims in zip(names, as_list(sizes))
                 for dim in dims if isinstance(found[name][dim], int)]
        if fixed:
            raise OnnxExportError(f'the graph {graph} of {type(model).__name__} works for one size '
                                  f'only of {", ".join(fixed)}')
    return protos


def exported_graph(module: nn.Module, args: tuple, what: str, inputs: Sequence[str],
                   outputs: Sequence[str], dynamic_shapes: Any,
                   translations: Mapping[Callable, Callable] | None = None) -> Any:
    """The ONNX graph of a module, which PyTorch's exporter writes.

    Args:
        module: In eval mode; it returns tensors.
        args: What it is called with while it is traced.
        what: The graph, as messages call it.
        inputs: Names of its inputs.
        outputs: Names of its outputs.
        dynamic_shapes: As of `torch.onnx.export`.
        translations: Of operators that are not PyTorch's own.

    Raises:
        OnnxExportError: If PyTorch cannot export it.
    """
    with _explaining(what), torch.no_grad():
        program = torch.onnx.export(
            module, args, dynamo=True, opset_version=OPSET, input_names=inputs,
            output_names=outputs, dynamic_shapes=dynamic_shapes, verbose=False,
            custom_translation_table=translations)
    return _cleaned(program.model_proto)


@contextmanager
def _explaining(what: str) -> Iterator[None]:
    """Name the graph in the error, whatever a model's code raises while it is traced."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            yield
    except OnnxExportError:
        raise
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason = str(cause)[:500] or type(cause).__name__
        raise OnnxExportError(f'PyTorch cannot export {what}: {reason}') from error


def _cleaned(proto: Any) -> Any:
    """Leave out the exporter's notes, with paths of this machine; weights get their own names."""
    graph = proto.graph
    for item in chain([graph], graph.node, graph.input, graph.output, graph.value_info,
                      graph.initializer):
        item.ClearField('metadata_props')
    prefix = 'model.'  # of TracedGraph
    for item in chain(graph.initializer, graph.value_info):
        item.name = item.name.removeprefix(prefix)
    for node in graph.node:
        node.input[:] = [name.removeprefix(prefix) for name in node.input]
    return proto


def named_shapes(values: Any) -> dict[str, list[int | str]]:
    """Shapes of inputs or outputs of an ONNX graph by name; a name stands for a dynamic size.

    Args:
        values: Of the graph.
    """
    return {value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
            for value in values}


def require_exportable(model: nn.Module) -> None:
    """Refuse what cannot be exported, whatever it is exported to.

    Args:
        model: Of any toolbox.

    Raises:
        ImportError: See `require_onnx`.
        ValueError: If the model is in training form.
    """
    if is_training_form(model):
        raise ValueError('the model is in training form: re-parameterize it before exporting')
    require_onnx()


def as_text(meta: Mapping[str, Any]) -> dict[str, str]:
    """Metadata as a file holds them: what is not text becomes JSON.

    Args:
        meta: By name.
    """
    return {key: value if isinstance(value, str) else json.dumps(value, default=str)
            for key, value in meta.items()}


def preprocessing_meta(model: nn.Module) -> dict[str, str]:
    """What a model expects of its input and says about its classes, as text.

    Args:
        model: Of any toolbox.

    Returns:
        `mean`, `std`, `channel_order`, `pad_size_divisor`, `pad_value`, `classes`, `palette`, as
        far as they are known; lists are JSON.
    """
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
    if not isinstance(dataset_meta.get('palette') or '', str):  # 'random' is none
        found['palette'] = [list(map(int, colour)) for colour in dataset_meta['palette']]
    return {key: value if isinstance(value, str) else json.dumps(value)
            for key, value in found.items()}
