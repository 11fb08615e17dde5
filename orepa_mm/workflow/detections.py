"""Detections of both forms of a detector, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import mmcv
import numpy as np
from matplotlib.figure import Figure
from torch import nn

#: Smaller images are enlarged to this width in pixels before boxes are drawn.
_DRAWN_WIDTH = 480


def draw_detections(models: Mapping[str, nn.Module], images: Sequence[str | Path],
                    score_threshold: float = 0.5) -> Figure:
    """Draw what each model finds: one row per model, one column per image.

    Args:
        models: From `mmdet.apis.init_detector`, by the name to print.
        images: Image files.
        score_threshold: Detections below it are not drawn.
    """
    figure = Figure(figsize=(3.2 * len(images), 3.4 * len(models)), layout='constrained')
    grid = figure.subplots(len(models), len(images), squeeze=False)
    for row, (name, model) in zip(grid, models.items()):
        for axes, image in zip(row, images):
            axes.imshow(_drawn(model, image, score_threshold))
            axes.set(xticks=[], yticks=[])
        row[0].set_ylabel(name)
    return figure


def load_forms(training: tuple[Path, Path], deployed: tuple[Path, Path]) -> dict[str, nn.Module]:
    """Build both forms of a detector on the CPU.

    Args:
        training: Config and checkpoint in training form.
        deployed: Config and checkpoint in deploy form.
    """
    from mmdet.apis import init_detector  # the package's other pictures do without MMDetection

    return {name: init_detector(str(config), str(checkpoint), palette='random', device='cpu')
            for name, (config, checkpoint) in (('training form', training),
                                               ('deployed', deployed))}


def _drawn(model: nn.Module, path: str | Path, score_threshold: float) -> np.ndarray:
    from mmdet.apis import inference_detector
    from mmdet.registry import VISUALIZERS

    image = mmcv.imread(str(path), channel_order='rgb')
    result = inference_detector(model, str(path))
    factor = _DRAWN_WIDTH / image.shape[1]
    if factor > 1 and 'masks' not in result.pred_instances:
        # the labels' size is fixed: on a small image they would hide the objects
        image = mmcv.imrescale(image, factor, interpolation='nearest')
        result.pred_instances.bboxes *= factor
    visualizer = VISUALIZERS.build(dict(
        type='DetLocalVisualizer', name=f'{id(model)}-{path}', line_width=4))
    visualizer.dataset_meta = model.dataset_meta
    visualizer.add_datasample('', image, result, draw_gt=False, pred_score_thr=score_threshold)
    return visualizer.get_image()
