"""What a deployment says and tests of its end-to-end ONNX file."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.runner import Runner
from torch import nn

from ..datasets.config_walk import find_datasets
from ..engine.metrics import tested_metrics
from ..export.onnx import EndToEndModel
from ..export.onnx.graphs import prepared

#: Largest change of a metric (as a fraction of 1): three decimals are equal.
END2END_TOLERANCE = 5e-4


def resizing(cfg: Config, batch: Mapping[str, Any]) -> tuple[dict[str, Any], list[float] | None]:
    """How images come to the size of the input, as the test pipeline does it.

    Args:
        cfg: With the test pipeline.
        batch: What the data preprocessor made of the first test images.

    Returns:
        For the metadata: `resize`, which is `fit` (largest that fits, ratio kept, at the top
        left), `stretch` or `crop` (short edge to `short_edge`, then the centre), and
        `resize_height` and `resize_width`. And the pixels of each channel that a `Pad` of the
        pipeline puts around, if there is one.
    """
    datasets = find_datasets(cfg, ['test'])
    steps = {str(step['type']).rpartition('.')[2]: step
             for step in (datasets[0].get('pipeline') if datasets else None) or ()}
    sample = batch['data_samples'][0]
    height, width = sample.metainfo.get('img_shape', batch['inputs'].shape[2:])[:2]
    found: dict[str, Any] = {'resize': 'fit', 'resize_height': int(height),
                             'resize_width': int(width)}
    if 'ResizeEdge' in steps and 'CenterCrop' in steps:
        found.update(resize='crop', short_edge=int(steps['ResizeEdge']['scale']))
    elif cfg.get('default_scope') == 'mmpretrain' or (
            'Resize' in steps and not steps['Resize'].get('keep_ratio', False)):
        found['resize'] = 'stretch'
    value = steps['Pad'].get('pad_val', 0) if 'Pad' in steps else None
    if isinstance(value, Mapping):
        value = value.get('img', 0)
    if isinstance(value, Real):
        value = [value] * 3
    return found, None if value is None else [float(number) for number in value]


def tested_end2end(runner: Runner, model: nn.Module, path: Path, expected: Mapping[str, float]
                   ) -> dict[str, Any]:
    """Test the file on the whole test set, with the evaluator of the config.

    Args:
        runner: Of the test; its model is another for so long.
        model: The deployed model.
        path: The file.
        expected: Metrics of the deployed model.

    Returns:
        `metrics`, `moved` (a line for each that differs in its third decimal), and
        `other_size`, the number of images that were not of the size of the input.
    """
    file, own = EndToEndModel(prepared(model), path), runner.model
    runner.model = file
    try:
        metrics = tested_metrics(runner, path.parent)
    finally:
        runner.model = own
    return {'metrics': metrics, 'moved': moved_metrics(expected, metrics),
            'other_size': file.other_size}


def moved_metrics(expected: Mapping[str, float], found: Mapping[str, float]) -> Sequence[str]:
    """Metrics of the file that differ in the third decimal; AP as a fraction of 1.

    Args:
        expected: Of the deployed model.
        found: Of the file.
    """
    lines = []
    for name, value in expected.items():
        other = found.get(name, math.nan)
        unit = 100 if max(value, other) > 1 else 1
        if not (abs(value - other) <= END2END_TOLERANCE * unit
                or (math.isnan(value) and math.isnan(other))):
            lines.append(f'{name} is {value:.4f} deployed but {other:.4f} by the end-to-end ONNX '
                         'file')
    return lines
