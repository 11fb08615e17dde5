"""Metrics with all their digits: MMDetection's `CocoMetric` rounds to three."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

from mmengine.runner import Runner
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

#: Names that `CocoMetric` gives to the first entries of COCOeval's statistics.
_NAMES = ('mAP', 'mAP_50', 'mAP_75', 'mAP_s', 'mAP_m', 'mAP_l')


def tested_metrics(runner: Runner, folder: str | Path) -> dict[str, float]:
    """Test, with COCO's statistics unrounded.

    Args:
        runner: A runner with a loaded model.
        folder: Where the detections go, in COCO's result format.

    Returns:
        Metrics by name, as `runner.test()` gives them.
    """
    evaluators = [metric for metric in runner.test_evaluator.metrics
                  if type(metric).__name__ == 'CocoMetric']
    for number, evaluator in enumerate(evaluators):
        evaluator.outfile_prefix = str(Path(folder) / f'results{number}')
    metrics = dict(runner.test())
    for evaluator in evaluators:
        for kind in ('bbox', 'segm'):
            results = Path(f'{evaluator.outfile_prefix}.{kind}.json')
            names = [f'{evaluator.prefix}/{kind}_{name}' for name in _NAMES]
            if results.is_file() and all(name in metrics for name in names):
                exact = coco_statistics(evaluator._coco_api, results, kind, evaluator.cat_ids,
                                        evaluator.proposal_nums)
                metrics.update(zip(names, exact))
    return metrics


def coco_statistics(truth: COCO, results: str | Path, kind: str, category_ids: list[int],
                    max_detections: list[int]) -> list[float]:
    """COCO's twelve statistics of a result file, by pycocotools.

    Args:
        truth: The annotations.
        results: Result file in COCO format, not empty.
        kind: `bbox` or `segm`.
        category_ids: Categories to evaluate.
        max_detections: Three limits of detections per image.

    Returns:
        `COCOeval.stats`.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(truth, truth.loadRes(str(results)), kind)
        evaluation.params.catIds = category_ids
        evaluation.params.maxDets = list(max_detections)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return [float(value) for value in evaluation.stats]
