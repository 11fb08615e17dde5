"""Run ONNX files in ONNX Runtime and compare them with PyTorch."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.config import ConfigDict
from mmengine.logging import print_log
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_flatten, tree_unflatten

from ...reparam.verify import scale_relative_error
from .graphs import (
    MASK_ROIS,
    graph_files,
    inputs_and_samples,
    named_tensors,
    network_graphs,
    prepared,
    require_onnx,
    require_samples,
    selecting_stages,
)
from .report import BoxComparison, GraphError, OnnxReport
from .session import Session


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
        OnnxExportError: If a batch of a detector is images alone.
    """
    require_onnx()
    model = with_mask_probabilities(prepared(model))
    batches = [batches] if isinstance(batches, (Tensor, Mapping)) else list(batches)
    if not batches:
        return OnnxReport(())
    require_samples(model, batches)
    graphs = network_graphs(model, batches[0])
    sessions = {name: Session(file) for name, file in graph_files(Path(path), graphs).items()}
    size = sessions['network'].size
    errors: list[GraphError] = []
    boxes = BoxComparison() if selecting_stages(model) else None
    pairs = [inputs_and_samples(batch) for batch in batches]
    pairs = [pair for pair in pairs if size in (None, pair[0].shape[2:])]
    with torch.no_grad():
        if boxes is not None and pairs:
            other = detector_of_sessions(model, sessions, graphs['network'](model, pairs[0][0]))
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


def _output_errors(model: nn.Module, graphs: Mapping[str, Callable],
                   sessions: Mapping[str, Session], inputs: Tensor, samples: list | None
                   ) -> Iterator[GraphError]:
    """The error of each output of each graph, on PyTorch's features and proposals."""
    shape, feed, outputs = tuple(inputs.shape), inputs, {}
    for graph, function in graphs.items():
        if graph == 'bbox':
            feed = roi_inputs(model, outputs, samples)
        elif graph == 'mask':
            feed = [*feed[:-1], feed[-1][:MASK_ROIS]]
        outputs = function(model, feed)
        expected, found = named_tensors(outputs), {}
        try:
            found = sessions[graph](feed)
        except Exception as error:  # of classes that ONNX Runtime does not publish
            print_log(f'ONNX Runtime failed in the graph {graph} on images {shape}: {error}',
                      'current', logging.WARNING)
        for name in sorted(expected.keys() | found.keys()):
            yield GraphError(graph, name, shape,
                             scale_relative_error(expected.get(name), found.get(name)))


def roi_inputs(model: nn.Module, outputs: dict[str, Any], samples: list) -> list[Tensor]:
    """Features and `rois (R, 5)`, selected by MMDetection from the outputs of the first stage."""
    from mmdet.structures.bbox import bbox2roi

    features, *head_outputs = outputs.values()
    rpn_head = shallow_copy(model.rpn_head)
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


def with_mask_probabilities(model: nn.Module) -> nn.Module:
    """Let a detector predict probabilities of masks, 0 to 255: they can be compared.

    Args:
        model: Changed in place, if it has masks.
    """
    roi_head = getattr(model, 'roi_head', None)
    if roi_head is not None and roi_head.with_mask:
        roi_head.test_cfg = ConfigDict({**roi_head.test_cfg, 'mask_thr_binary': -1})
    return model


def detector_of_sessions(model: nn.Module, sessions: Mapping[str, Session],
                         outputs: dict[str, Any]) -> nn.Module:
    """The detector with ONNX Runtime in place of its network: without its backbone and neck.

    `outputs` are any of its raw outputs: only their structure is taken.
    """
    detector = shallow_copy(model)
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
    head = detector._modules[name] = shallow_copy(getattr(model, name))
    head.forward = lambda x: tuple(latest.values())
    if 'bbox' in sessions:
        roi_head = detector._modules['roi_head'] = shallow_copy(model.roi_head)
        roi_head._bbox_forward = lambda x, rois: {'bbox_pred': None, **sessions['bbox']([*x, rois])}
        roi_head._mask_forward = lambda x, rois: sessions['mask']([*x, rois])
    return detector


def shallow_copy(module: nn.Module) -> nn.Module:
    """A copy that shares parameters and children, but may be given others."""
    module = copy.copy(module)
    module._modules = dict(module._modules)
    return module
