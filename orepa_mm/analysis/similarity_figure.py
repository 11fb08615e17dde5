"""What the branches do, as pictures: a heat map per layer, and shares through the network."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..files import written_whole
from .similarity import EXPLANATION, FORMS, LayerBranches, branch_markdown

#: Colours that the colour-blind tell apart as well (Okabe and Ito).
_COLOURS = ('#0072b2', '#e69f00', '#000000', '#009e73', '#d55e00', '#cc79a7', '#56b4e9', '#f0e442')
#: Layers beside each other.
_COLUMNS = 3
_FILES = ('branch_similarity.json', 'branch_similarity.md', 'similarity.png', 'shares.png')


def draw_similarities(layers: Sequence[LayerBranches], title: str = '') -> Figure:
    """Draw two heat maps per layer: with the scaling vectors and, beside it, without.

    A branch of zeros, which has no direction, is grey.

    Args:
        layers: From `measure_branches`; one at least.
        title: What stands above, e.g. whose branches these are.
    """
    columns = min(_COLUMNS, len(layers))
    rows = math.ceil(len(layers) / columns)
    figure = Figure(figsize=(0.8 + 4.0 * columns, 1.3 + 2.35 * rows), layout='constrained')
    places = figure.subplots(rows, 2 * columns, squeeze=False).reshape(-1, 2)
    colours = matplotlib.colormaps['RdBu_r'].with_extremes(bad='#bbbbbb')
    for entry, pair in zip(layers, places):
        for axes, (form, text) in zip(pair, FORMS.items()):
            matrix = np.array(entry.measures(form).similarities)
            image = axes.imshow(matrix, cmap=colours, vmin=-1, vmax=1)
            _write_values(axes, matrix)
            ticks = range(len(entry.names))
            axes.set_xticks(ticks, entry.names, rotation=90, fontsize=6)
            axes.set_yticks(ticks, entry.names if form == 'scaled' else [''] * len(ticks),
                            fontsize=6)
            axes.set_title(text, fontsize=7)
        pair[0].annotate(entry.layer, (0, 1), (0, 17), xycoords='axes fraction',
                         textcoords='offset points', fontsize=8, fontweight='bold')
    for axes in places[len(layers):].flat:
        axes.set_axis_off()
    bar = figure.colorbar(image, ax=places, location='bottom', shrink=0.5,
                          aspect=50, fraction=0.15 / rows, pad=0.01)
    bar.ax.tick_params(labelsize=8)
    bar.set_label('cosine similarity between the kernels of two branches; grey: a branch of zeros',
                  fontsize=8)
    figure.suptitle(title, fontsize=10)
    return figure


def draw_shares(layers: Sequence[LayerBranches], title: str = '') -> Figure:
    """Draw the shares of the branches in every layer as stacked bars, with scales and without.

    What works against the sum is stacked below zero.

    Args:
        layers: From `measure_branches`; one at least.
        title: What stands above, e.g. whose branches these are.
    """
    names = list(dict.fromkeys(name for entry in layers for name in entry.names))
    figure = Figure(figsize=(max(8.0, 2.5 + 0.25 * len(layers)), 8), layout='constrained')
    panels = figure.subplots(2, 1, sharex=True)
    for axes, (form, text) in zip(panels, FORMS.items()):
        values = np.array([[dict(zip(entry.names, entry.measures(form).shares)).get(name, 0.0)
                            for entry in layers] for name in names])  # (branches, layers)
        top, bottom = np.zeros(len(layers)), np.zeros(len(layers))
        for number, (name, heights) in enumerate(zip(names, np.nan_to_num(values))):
            axes.bar(range(len(layers)), heights, 0.8, np.where(heights < 0, bottom, top),
                     color=_COLOURS[number % len(_COLOURS)], label=name)
            top += heights.clip(min=0)
            bottom += heights.clip(max=0)
        for level in (0, 1):
            axes.axhline(level, color='black', linewidth=0.8)
        axes.set_title(text, fontsize=10)
        axes.set_ylabel('share in the kernel')
        axes.grid(axis='y', alpha=0.3)
        axes.set_axisbelow(True)
    panels[1].set_xticks(range(len(layers)), [entry.layer for entry in layers], rotation=90,
                         fontsize=7)
    panels[1].set_xlim(-1, len(layers))
    figure.legend(*panels[0].get_legend_handles_labels(), loc='outside upper center',
                  ncols=len(names), fontsize=9, title=title)
    return figure


def write_branches(layers: Sequence[LayerBranches], folder: str | Path, title: str) -> list[Path]:
    """Write `branch_similarity.json`, its tables as `.md`, `similarity.png` and `shares.png`.

    All or none.

    Args:
        layers: From `measure_branches`; one at least.
        folder: Where to write; created if it is missing.
        title: Whose branches these are.

    Returns:
        Paths of the four files.
    """
    paths = [Path(folder) / name for name in _FILES]
    with ExitStack() as stack:
        numbers, table, maps, bars = (stack.enter_context(written_whole(path)) for path in paths)
        numbers.write_text(json.dumps({
            'title': title, 'explanation': EXPLANATION,
            'layers': [entry.as_dict() for entry in layers]}, indent=1), encoding='utf-8')
        table.write_text(branch_markdown(layers, title), encoding='utf-8')
        draw_similarities(layers, title).savefig(maps, dpi=130)
        draw_shares(layers, title).savefig(bars, dpi=110)
    return paths


def _write_values(axes: Axes, matrix: np.ndarray) -> None:
    """The numbers of all pairs into their squares."""
    for (row, column), value in np.ndenumerate(matrix):
        if row != column and np.isfinite(value):
            text = f'{round(value, 2) + 0.0:.2f}'  # no negative zero
            axes.text(column, row, text, ha='center', va='center', fontsize=4.5,
                      color='white' if abs(value) > 0.6 else 'black')
