"""Curves of a training run, from the scalars that the runner logged."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from pathlib import Path

from matplotlib.figure import Figure


def read_scalars(work_dir: str | Path) -> dict[str, dict[int, float]]:
    """Read what a run logged, resumed parts joined.

    Args:
        work_dir: The run's work folder.

    Returns:
        For every scalar, e.g. `loss` and `coco/bbox_mAP`, its values by
        iteration or epoch; where a resumed run logged a step again, the later one.

    Raises:
        FileNotFoundError: If nothing was logged there.
    """
    files = sorted(Path(work_dir).glob('*/vis_data/scalars.json'))
    if not files:
        raise FileNotFoundError(f'{work_dir} holds no log of a run (*/vis_data/scalars.json)')
    scalars: dict[str, dict[int, float]] = {}
    for file in files:
        lines = file.read_text().splitlines()
        for number, line in enumerate(lines, 1):
            try:
                entry = json.loads(line)
            except ValueError:
                if number < len(lines):
                    raise
                break  # a process was killed while it wrote
            for name, value in entry.items():
                if isinstance(value, (int, float)) and 'step' in entry:
                    scalars.setdefault(name, {})[entry['step']] = value
    return scalars


def final_loss(scalars: Mapping[str, Mapping[int, float]]) -> float | None:
    """The training loss that a run ended with.

    Args:
        scalars: From `read_scalars`.

    Returns:
        Mean of the losses that were logged in the last tenth of the training; None
        if there are none.
    """
    losses = scalars.get('loss')
    if not losses:
        return None
    begin = 0.9 * max(losses)
    return statistics.fmean(loss for step, loss in losses.items() if step > begin)


def draw_curves(scalars: Mapping[str, Mapping[int, float]]) -> Figure:
    """Draw the losses beside the average precisions.

    Args:
        scalars: From `read_scalars`.
    """
    figure = Figure(figsize=(11, 3.8), layout='constrained')
    losses, precisions = figure.subplots(1, 2)
    for name in sorted(scalars):
        steps, values = zip(*sorted(scalars[name].items()))
        if name == 'loss':
            losses.plot(steps, values, label='total', color='black', linewidth=2)
        elif name.startswith('loss'):
            losses.plot(steps, values, label=name.removeprefix('loss_'), linewidth=1)
        elif name in ('coco/bbox_mAP', 'coco/bbox_mAP_50'):
            precisions.plot(steps, values, marker='o',
                            label={'coco/bbox_mAP': 'box AP'}.get(name, 'box AP50'))
    losses.set(title='training loss', xlabel='step', ylabel='loss', ylim=(0, None))
    precisions.set(title='validation', xlabel='step', ylabel='average precision', ylim=(0, 1))
    for axes in (losses, precisions):
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    return figure
