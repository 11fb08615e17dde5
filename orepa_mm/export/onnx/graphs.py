"""Which graphs a model becomes, what goes into each and what comes out."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import keystr, tree_flatten_with_path

from ...errors import OnnxExportError
from ...reparam import unwrapped

#: RoIs of one image that masks are predicted for, as `StandardRoIHead.forward` does.
MASK_ROIS = 100


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


def prepared(model: nn.Module) -> nn.Module:
    """A copy for float32 on the CPU, in eval mode."""
    model = copy.deepcopy(unwrapped(model)).float().cpu()
    model.eval()  # a statement of its own: not every backbone's train() returns itself
    return model


def inputs_and_samples(batch: Tensor | Mapping[str, Any]) -> tuple[Tensor, list | None]:
    """Images in float32 on the CPU, and the data samples of an OpenMMLab model.

    Args:
        batch: What a data preprocessor returns, or images `(N, C, H, W)`.
    """
    batch = {'inputs': batch} if isinstance(batch, Tensor) else batch
    return batch['inputs'].float().cpu(), batch.get('data_samples')


def graph_files(path: Path, graphs: Mapping[str, Any]) -> dict[str, Path]:
    """The file of each graph: `path`, and `<stem>_<graph>` beside it.

    Args:
        path: Of the graph `network`.
        graphs: By name.
    """
    return {name: path if name == 'network' else path.with_name(f'{path.stem}_{name}{path.suffix}')
            for name in graphs}


def graph_inputs(graph: str, levels: int = 0) -> list[str]:
    """Names of the inputs of a graph.

    Args:
        graph: `network`, `bbox` or `mask`.
        levels: How many feature maps the two latter take.
    """
    return ['inputs'] if graph == 'network' else [
        *(f'features_{level}' for level in range(levels)), 'rois']


def selecting_stages(model: nn.Module) -> int:
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


def require_samples(model: nn.Module, batches: Sequence[Tensor | Mapping[str, Any]]) -> None:
    """Refuse images without data samples where boxes are selected, in the size of an image.

    Args:
        model: Any.
        batches: See `export_onnx`.

    Raises:
        OnnxExportError: If there are such, and the model is a detector that selects.
    """
    if selecting_stages(model) and any(inputs_and_samples(batch)[1] is None for batch in batches):
        raise OnnxExportError(f'{type(model).__name__} selects boxes, for which images alone do '
                              'not do: give what its data preprocessor returns, with data_samples')


def network_graphs(model: nn.Module, batch: Tensor | Mapping[str, Any]) -> dict[str, Callable]:
    """Functions of (model, inputs) that return outputs in a dictionary, by graph."""
    require_samples(model, [batch])
    if inputs_and_samples(batch)[1] is None:
        return {'network': lambda model, inputs: {'output': model(inputs)}}
    stages = selecting_stages(model)
    if stages == 0:
        return {'network': lambda model, inputs: {'output': model(inputs, None, mode='tensor')}}
    if stages == 1:
        return {'network': lambda model, inputs: _head_outputs(
            model.bbox_head, model.extract_feat(inputs))}
    graphs = {'network': first_stage, 'bbox': _bbox_stage}
    if model.roi_head.with_mask:
        graphs['mask'] = _mask_stage
    return graphs


def first_stage(model: nn.Module, inputs: Tensor) -> dict[str, Any]:
    """The features that the RoI head of a detector takes, and the outputs of its RPN.

    Args:
        model: A two-stage detector.
        inputs: Images `(N, 3, H, W)`.
    """
    features = model.extract_feat(inputs)
    return {'features': roi_features(model, features),
            **_head_outputs(model.rpn_head, features, prefix='rpn_')}


def roi_features(model: nn.Module, features: Sequence[Tensor]) -> list[Tensor]:
    """Those features that the RoI head takes.

    Args:
        model: A two-stage detector.
        features: By level, the finest first.
    """
    roi_head = model.roi_head
    extractors = [roi_head.bbox_roi_extractor, *(
        [roi_head.mask_roi_extractor] if roi_head.with_mask else [])]
    return list(features[:max(extractor.num_inputs for extractor in extractors)])


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


def named_tensors(outputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Tensors by names that ONNX tools take, e.g. `cls_scores_0`."""
    return {re.sub(r'\W+', '_', keystr(path)).strip('_'): leaf
            for path, leaf in tree_flatten_with_path(outputs)[0] if isinstance(leaf, Tensor)}


def as_list(value: Any) -> list:
    """The value, or a list of it if it is none."""
    return value if isinstance(value, list) else [value]
