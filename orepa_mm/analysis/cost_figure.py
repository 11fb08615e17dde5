"""The training cost as grouped bars: time and memory of every row of a table."""

from __future__ import annotations

import statistics

from matplotlib.figure import Figure

from .cost_table import Measurement, conditions_text

#: Label, colour that the colour-blind tell apart as well.
_TIME, _MEMORY = ('time (ms), median', '#0072b2'), ('peak memory (MB)', '#d55e00')
_WIDTH = 0.38


def draw_costs(measurement: Measurement) -> Figure | None:
    """Draw time and peak memory as two bars per row, each with an axis of its own.

    Args:
        measurement: Rows without time and memory are left out.

    Returns:
        The figure; None if no row has any.
    """
    rows = [row for row in measurement.rows if row.times_ms or row.peak_bytes is not None]
    if not rows:
        return None
    figure = Figure(figsize=(max(5.0, 2.0 + 1.1 * len(rows)), 4.5), layout='constrained')
    left = figure.subplots()
    right = left.twinx()
    times = [statistics.median(row.times_ms) if row.times_ms else None for row in rows]
    peaks = [None if row.peak_bytes is None else row.peak_bytes / 1e6 for row in rows]
    for axes, values, (label, colour), shift in ((left, times, _TIME, -_WIDTH / 2),
                                                 (right, peaks, _MEMORY, _WIDTH / 2)):
        drawn = [(number + shift, value) for number, value in enumerate(values)
                 if value is not None]
        if not drawn:
            axes.set_yticks([])
            continue
        bars = axes.bar([x for x, _ in drawn], [value for _, value in drawn], _WIDTH,
                        color=colour, label=label)
        axes.bar_label(bars, fmt=lambda value: f'{value:.{0 if value >= 100 else 1}f}', fontsize=7)
        axes.set_ylabel(label, color=colour)
        axes.margins(y=0.12)
    left.set_xticks(range(len(rows)), [row.name.replace(', ', ',\n') for row in rows], fontsize=8)
    left.set_title(measurement.title, fontsize=10)
    figure.supxlabel(conditions_text(measurement.conditions), fontsize=6)
    return figure
