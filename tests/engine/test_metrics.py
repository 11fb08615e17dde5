"""COCO's statistics with all their digits, where the answer is known."""

import json
import math

import pytest
from pycocotools.coco import COCO

from orepa_mm.engine.metrics import changed_metrics, coco_statistics, metrics_at_chance


def test_half_of_the_objects_found(tmp_path):
    box = [10.0, 10.0, 50.0, 50.0]
    (tmp_path / 'truth.json').write_text(json.dumps({
        'images': [{'id': i, 'height': 100, 'width': 100, 'file_name': f'{i}.png'}
                   for i in (1, 2)],
        'categories': [{'id': 7, 'name': 'thing'}],
        'annotations': [{'id': i, 'image_id': i, 'category_id': 7, 'bbox': box, 'area': 2500,
                         'iscrowd': 0} for i in (1, 2)]}))
    (tmp_path / 'results.json').write_text(json.dumps([
        {'image_id': 1, 'category_id': 7, 'bbox': box, 'score': 0.9}]))
    statistics = coco_statistics(COCO(tmp_path / 'truth.json'), tmp_path / 'results.json', 'bbox',
                                 [7], [100, 300, 1000])
    # precision 1 up to a recall of 0.5: 51 of COCO's 101 recall points
    assert statistics[0] == pytest.approx(51 / 101, abs=1e-12)
    assert statistics[1] == pytest.approx(51 / 101, abs=1e-12)
    assert statistics[6] == pytest.approx(0.5)


@pytest.mark.parametrize(('training', 'deployed', 'equal'), [
    (0.5, 0.5, True), (0.5, 0.50009, True), (0.5, 0.5002, False), (0.5, 0.4998, False),
    (math.nan, math.nan, True), (0.5, math.nan, False), (math.nan, 0.5, False),
    (75.0, 75.009, True), (75.0, 75.02, False), (75.0, 74.98, False)])  # in percent
def test_a_metric_may_move_by_a_ten_thousandth(training, deployed, equal):
    moved = changed_metrics({'training': {'AP': training}, 'deployed': {'AP': deployed}})
    assert moved == [] if equal else moved[0].startswith('AP is ')


@pytest.mark.parametrize(('metrics', 'classes', 'at_chance'), [
    ({'coco/bbox_mAP': 0.0, 'coco/bbox_mAP_s': -1.0}, 80, True),
    ({'coco/bbox_mAP': 0.002, 'coco/bbox_mAP_50': 0.009}, 80, True),
    ({'coco/bbox_mAP': 0.002, 'coco/bbox_mAP_50': 0.02}, 80, False),
    ({'accuracy/top1': 0.12}, 1000, True), ({'accuracy/top1': 12.0}, 10, True),
    ({'accuracy/top1': 12.0}, 1000, False), ({'accuracy/top1': 60.0}, 10, False),
    ({'accuracy/top1': 60.0}, None, False),
    ({'mIoU': 0.7, 'aAcc': 4.0, 'mAcc': math.nan}, 19, True),
    ({'mIoU': 20.0, 'aAcc': 4.0}, 19, False), ({}, None, True)])
def test_a_metric_at_chance(metrics, classes, at_chance):
    assert metrics_at_chance(metrics, classes) is at_chance
