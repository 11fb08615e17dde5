"""What the graphs of a model are fed with, and the model with other graphs in place of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...errors import OnnxExportError
from .compare import detector_of_sessions, roi_inputs, shallow_copy
from .graphs import (
    MASK_ROIS,
    as_list,
    graph_inputs,
    inputs_and_samples,
    network_graphs,
    selecting_stages,
)
from .session import Session


@torch.no_grad()
def graph_feeds(model: nn.Module, graph: str, batches: Iterable[Tensor | Mapping[str, Any]]
                ) -> Iterator[dict[str, np.ndarray]]:
    """What a graph is fed in the course of predictions, with PyTorch's features and proposals.

    Args:
        model: A deployed model in float32, on the CPU and in eval mode.
        graph: `network`, `bbox` or `mask`.
        batches: See `export_onnx`.

    Yields:
        Arrays by the names of the graph's inputs; nothing for a batch without proposals.
    """
    for batch in batches:
        inputs, samples = inputs_and_samples(batch)
        feed: Any = inputs
        if graph != 'network':
            network = network_graphs(model, batch)['network']
            *features, rois = roi_inputs(model, network(model, inputs), samples)
            feed = [*features, rois[:MASK_ROIS] if graph == 'mask' else rois]
            if not len(rois):
                continue
        feed = as_list(feed)
        yield {name: tensor.numpy()
               for name, tensor in zip(graph_inputs(graph, len(feed) - 1), feed)}


@torch.no_grad()
def model_of_files(model: nn.Module, files: Mapping[str, Path], batch: Mapping[str, Any]
                   ) -> nn.Module:
    """A model that predicts with ONNX Runtime in place of its network.

    Preprocessing, and what makes boxes, label maps or classes of the network's
    outputs, stay the model's own.

    Args:
        model: A detector, segmentor or classifier in float32, on the CPU; left as it is.
        files: The ONNX file of each graph, as of `OnnxExport`.
        batch: What the model's data preprocessor returns; its network is run on it once.

    Returns:
        A model for prediction alone, which shares parameters with the given one.

    Raises:
        FileNotFoundError: If there is no such file.
        OnnxExportError: If nothing of the model can be run on outputs of a graph.
    """
    sessions = {name: Session(path) for name, path in files.items()}
    if selecting_stages(model):
        outputs = network_graphs(model, batch)['network'](model, inputs_and_samples(batch)[0])
        return detector_of_sessions(model, sessions, outputs)
    name = next((name for name in ('decode_head', 'head')
                 if isinstance(getattr(model, name, None), nn.Module)
                 and hasattr(getattr(model, name), 'predict')), None)
    if name is None:
        raise OnnxExportError(f'{type(model).__name__} has no head that predicts from the outputs '
                              'of an ONNX graph: its metrics in int8 cannot be measured')
    other = shallow_copy(model)
    for part in ('backbone', 'neck'):
        other._modules.pop(part, None)
    other.extract_feat = lambda images, *_, **__: sessions['network'](images)['output']
    head = other._modules[name] = shallow_copy(getattr(model, name))
    head.forward = lambda outputs: outputs
    return other


def run_of_files(files: Mapping[str, Path], feeds: Mapping[str, Mapping[str, np.ndarray]]
                 ) -> Callable[[], None]:
    """A call that runs all graphs once, to be timed.

    Args:
        files: The ONNX file of each graph.
        feeds: What each graph is run on.
    """
    sessions = {graph: Session(path).session for graph, path in files.items()}

    def run() -> None:
        for graph, session in sessions.items():
            session.run(None, dict(feeds[graph]))

    return run
