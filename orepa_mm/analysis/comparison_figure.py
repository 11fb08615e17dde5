"""A comparison as pictures: the metric of every seed, and the curves of loss and metric."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from .comparison import Comparison

#: Of Okabe and Ito: the colour-blind tell them apart as well. One for each variant.
_COLOURS = ('#000000', '#d55e00', '#0072b2', '#009e73', '#cc79a7', '#e69f00', '#56b4e9')
#: Where there are more variants than colours, the lines differ too.
_LINES = ('-', '--', ':')
#: A loss is averaged over this share of what was logged.
_SMOOTHED = 1 / 20

#: Scalars of every seed of a variant, from `read_scalars`: name, then step.
Scalars = Sequence[Mapping[str, Mapping[int, float]]]


def draw_metric(comparison: Comparison) -> Figure:
    """Draw the metric: every seed as a point, beside them the mean and its 95 % interval.

    Args:
        comparison: From `compare`.
    """
    spreads = comparison.spreads
    labels = [_in_lines(f'{spread.variant} (n = {len(spread.values)})') for spread in spreads]
    height = sum(max(0.5, 0.2 * (label.count('\n') + 1)) for label in labels)
    figure = Figure(figsize=(8, 1.5 + height), layout='constrained')
    axes = figure.subplots()
    for row, spread in enumerate(spreads):
        colour, _ = _style(row)
        axes.plot(list(spread.values.values()), [row + 0.13] * len(spread.values), 'o',
                  color=colour, markersize=5, alpha=0.55, markeredgewidth=0)
        if spread.mean is None:
            continue
        low, high = spread.interval or (spread.mean, spread.mean)
        axes.errorbar(spread.mean, row - 0.13, xerr=[[spread.mean - low], [high - spread.mean]],
                      fmt='D', color=colour, markersize=6, capsize=4)
    axes.set_yticks(range(len(spreads)), labels)
    axes.set_ylim(len(spreads) - 0.5, -0.5)
    axes.set(xlabel=comparison.metric + (' (%)' if comparison.percent else ''))
    figure.suptitle('points: seeds; diamond: their mean and its 95 % t interval (differences are '
                    'judged in pairs,\nnot by whether these intervals overlap)', fontsize=9)
    axes.grid(axis='x', alpha=0.3)
    return figure


def draw_training(scalars: Mapping[str, Scalars], metric: str, metric_step: str = 'iteration'
                  ) -> Figure:
    """Draw the loss and the metric while training: mean over the seeds, minimum to maximum.

    The loss is a running mean of what was logged. A step counts where every
    seed of the variant has it.

    Args:
        scalars: By variant, in the order of the colours.
        metric: Name of the metric.
        metric_step: What the metric was logged by, `iteration` or `epoch`.
    """
    figure = Figure(figsize=(11, 4.6), layout='constrained')
    losses, metrics = figure.subplots(1, 2)
    window = 1
    for number, (variant, seeds) in enumerate(scalars.items()):
        steps, values = _common(seeds, 'loss')
        width = max(1, round(len(steps) * _SMOOTHED))
        window = max(window, width)
        _band(losses, number, variant, *_smoothed(steps, values, width), marker=None)
        _band(metrics, number, variant, *_common(seeds, metric), marker='o')
    losses.set(title=f'training loss, running mean of {window} logged values',
               xlabel='iteration', ylabel='loss')
    if losses.lines and all((line.get_ydata() > 0).all() for line in losses.lines):
        losses.set_yscale('log')
        losses.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        losses.yaxis.set_major_formatter('{x:g}')
        losses.yaxis.set_minor_formatter(NullFormatter())
    metrics.set(title='validation', xlabel=metric_step, ylabel=metric)
    for axes in (losses, metrics):
        axes.grid(alpha=0.3, which='both')
        if not axes.lines:
            axes.text(0.5, 0.5, 'not logged', ha='center', transform=axes.transAxes)
    handles, labels = max((axes.get_legend_handles_labels() for axes in (losses, metrics)),
                          key=lambda found: len(found[1]))
    if labels:
        figure.legend(handles, labels, loc='outside lower center', ncols=3, fontsize=9,
                      title='mean over seeds; band: smallest to largest', title_fontsize=8)
    return figure


def _style(number: int) -> tuple[str, str]:
    """Colour and line of a variant."""
    return (_COLOURS[number % len(_COLOURS)], _LINES[number // len(_COLOURS) % len(_LINES)])


def _in_lines(variant: str, width: int = 34) -> str:
    """A name, broken behind commas and dots where it is long: options have long names."""
    lines = ['']
    for part in re.split('(?<=[.,])', variant):
        if lines[-1] and len(lines[-1] + part) > width:
            lines.append('')
        lines[-1] += part
    return '\n'.join(lines)


def _common(seeds: Scalars, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps (n,) that all seeds logged, and the values there, (seeds, n)."""
    logged = [scalars[name] for scalars in seeds if name in scalars]
    steps = sorted(set.intersection(*map(set, logged))) if logged else []
    return np.array(steps), np.array([[values[step] for step in steps] for values in logged])


def _smoothed(steps: np.ndarray, values: np.ndarray, width: int
              ) -> tuple[np.ndarray, np.ndarray]:
    """Means over `width` values, each at the last of its steps."""
    if not len(steps):
        return steps, values
    kernel = np.full(width, 1 / width)
    return steps[width - 1:], np.array([np.convolve(row, kernel, 'valid') for row in values])


def _band(axes: Axes, number: int, variant: str, steps: np.ndarray, values: np.ndarray,
          marker: str | None) -> None:
    if not len(steps):
        return
    colour, line = _style(number)
    axes.plot(steps, values.mean(0), line, color=colour, label=_in_lines(variant), marker=marker,
              markersize=3.5, linewidth=1.6)
    axes.fill_between(steps, values.min(0), values.max(0), color=colour, alpha=0.15, linewidth=0)
