"""Metrics with all their digits.

MMDetection's `CocoMetric` rounds to three, MMSegmentation's `IoUMetric` to two
of a percentage.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.runner import Runner

#: Largest change of a metric (AP, mIoU, accuracy, as fractions of 1) that is let pass.
METRIC_TOLERANCE = 1e-4
#: Names that `CocoMetric` gives to the first entries of COCOeval's statistics.
_NAMES = ('mAP', 'mAP_50', 'mAP_75', 'mAP_s', 'mAP_m', 'mAP_l')


def tested_metrics(runner: Runner, folder: str | Path) -> dict[str, float]:
    """Test, with the statistics of COCO and the IoUs of segmentation unrounded.

    Args:
        runner: A runner with a loaded model.
        folder: Where detections go, in COCO's result format.

    Returns:
        Metrics by name, in the units of `runner.test()`: AP between 0 and 1,
        IoU and accuracy in percent.
    """
    detection, segmentation = ([metric for metric in runner.test_evaluator.metrics
                                if type(metric).__name__ == name]
                               for name in ('CocoMetric', 'IoUMetric'))
    for number, evaluator in enumerate(detection):
        evaluator.outfile_prefix = str(Path(folder) / f'results{number}')
    with contextlib.ExitStack() as stack:
        exact_ious = [stack.enter_context(_unrounded(metric)) for metric in segmentation]
        metrics = dict(runner.test())
    for exact in exact_ious:
        metrics.update({name: value for name, value in exact.items() if name in metrics})
    for evaluator in detection:
        for kind in ('bbox', 'segm'):
            results = Path(f'{evaluator.outfile_prefix}.{kind}.json')
            names = [f'{evaluator.prefix}/{kind}_{name}' for name in _NAMES]
            if results.is_file() and all(name in metrics for name in names):
                exact = coco_statistics(evaluator._coco_api, results, kind, evaluator.cat_ids,
                                        evaluator.proposal_nums)
                metrics.update(zip(names, exact))
    return metrics


def changed_metrics(metrics: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Metrics that moved by more than the tolerance.

    Args:
        metrics: Of both forms, under `training` and `deployed`, from
            `tested_metrics`.

    Returns:
        One line each: its name, both values, and by how much it moved.
    """
    moved = []
    for name, value in metrics['training'].items():
        deployed = metrics['deployed'].get(name, math.nan)
        unit = 100 if max(value, deployed) > 1 else 1  # mIoU and accuracy are in percent
        # NaN in both: MMDetection's mark for a class without objects
        if not (abs(value - deployed) <= METRIC_TOLERANCE * unit
                or (math.isnan(value) and math.isnan(deployed))):
            moved.append(f'{name} is {value:.5f} in training form but {deployed:.5f} deployed: it '
                         f'moved by {abs(value - deployed):.2e}, allowed is '
                         f'{METRIC_TOLERANCE * unit:.0e}')
    return moved


def metrics_at_chance(metrics: Mapping[str, float], classes: int | None) -> bool:
    """Whether metrics are so low that a network of random weights might reach them.

    Two forms that are equal then prove nothing.

    Args:
        metrics: Of one form, from `tested_metrics`.
        classes: Number of classes, if it is known.

    Returns:
        True if no AP or IoU is above 1 %, and no accuracy above 1 % and one and
        a half times what a guess among the classes gives.
    """
    for name, value in metrics.items():
        if not math.isfinite(value) or value < 0:  # marks of COCO: there is no such object
            continue
        percent = '/' not in name or name.startswith('accuracy')  # mIoU, aAcc, accuracy/top1
        is_accuracy = 'acc' in name.lower()
        guess = 1.5 / classes if classes and is_accuracy else 0.0
        if value / (100 if percent else 1) > max(0.01, guess):
            return False
    return True


@contextlib.contextmanager
def _unrounded(metric: Any) -> Iterator[dict[str, float]]:
    """Note what an `IoUMetric` computes before it rounds, under the names that it gives."""
    compute = metric.total_area_to_metrics
    exact: dict[str, float] = {}

    def compute_and_note(*args: Any, **kwargs: Any) -> dict:
        values = compute(*args, **kwargs)
        exact.update({name if name == 'aAcc' else f'm{name}': float(np.nanmean(value)) * 100
                      for name, value in values.items()})
        return values

    metric.total_area_to_metrics = compute_and_note
    try:
        yield exact
    finally:
        del metric.total_area_to_metrics  # the class's own appears again


def coco_statistics(truth: Any, results: str | Path, kind: str, category_ids: list[int],
                    max_detections: list[int]) -> list[float]:
    """COCO's twelve statistics of a result file, by pycocotools.

    Args:
        truth: The annotations, a `pycocotools.coco.COCO`.
        results: Result file in COCO format, not empty.
        kind: `bbox` or `segm`.
        category_ids: Categories to evaluate.
        max_detections: Three limits of detections per image.

    Returns:
        `COCOeval.stats`.
    """
    from pycocotools.cocoeval import COCOeval  # comes with MMDetection, which needs it

    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(truth, truth.loadRes(str(results)), kind)
        evaluation.params.catIds = category_ids
        evaluation.params.maxDets = list(max_detections)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return [float(value) for value in evaluation.stats]
