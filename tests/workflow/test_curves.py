"""Curves of a run that was resumed."""

import json

import pytest

from orepa_mm.workflow.curves import draw_curves, read_scalars


def log(folder, start, entries):
    path = folder / start / 'vis_data' / 'scalars.json'
    path.parent.mkdir(parents=True)
    path.write_text('\n'.join(json.dumps(entry) for entry in entries))


def test_resumed_parts_are_joined(tmp_path):
    log(tmp_path, '20260101_000000', [
        {'loss': 3.0, 'loss_cls': 2.0, 'lr': 0.1, 'step': 10}, {'loss': 2.5, 'step': 20},
        {'coco/bbox_mAP': 0.1, 'coco/bbox_mAP_50': 0.2, 'step': 20}])
    log(tmp_path, '20260101_010000', [{'loss': 2.0, 'step': 20}, {'loss': 1.0, 'step': 30}])
    scalars = read_scalars(tmp_path)
    assert scalars['loss'] == {10: 3.0, 20: 2.0, 30: 1.0}  # the later run's value at 20
    assert scalars['coco/bbox_mAP'] == {20: 0.1}
    losses, precisions = draw_curves(scalars).axes
    assert {line.get_label(): list(line.get_ydata()) for line in losses.lines} == {
        'total': [3.0, 2.0, 1.0], 'cls': [2.0]}
    assert {line.get_label() for line in precisions.lines} == {'box AP', 'box AP50'}


def test_nothing_logged(tmp_path):
    with pytest.raises(FileNotFoundError, match='no log of a run'):
        read_scalars(tmp_path)


def test_the_end_that_a_killed_process_did_not_write(tmp_path):
    log(tmp_path, '20260101_000000', [{'loss': 3.0, 'step': 10}])
    path = tmp_path / '20260101_000000' / 'vis_data' / 'scalars.json'
    whole = path.read_text()
    path.write_text(f'{whole}\n{{"loss": 2.0, "st')
    assert read_scalars(tmp_path) == {'loss': {10: 3.0}, 'step': {10: 10}}
    path.write_text(f'{{"loss": 2.0, "st\n{whole}')
    with pytest.raises(ValueError, match='Unterminated'):
        read_scalars(tmp_path)
