"""How weights spread in every layer before and after re-parameterization."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from ..files import written_whole
from .benchmark import Benchmark
from .weight_ranges import WeightRange, write_weight_ranges

#: By form: label, and colours that the colour-blind tell apart as well.
_STYLES = {'training': ('training form: branches', '#999999'),
           'deployed': ('deployed: squeezed kernel', '#0072b2'),
           'folded': ('BN folded', '#d55e00')}
#: Deployed and folded often lie on each other: one is seen around the other.
_MARKERS = {'training': dict(marker='o', markersize=4),
            'deployed': dict(marker='s', markersize=6, fillstyle='none'),
            'folded': dict(marker='D', markersize=3)}


def draw_weight_ranges(ranges: Sequence[WeightRange], title: str = '') -> Figure:
    """Draw the spread of the weights of all layers: three measures, one above the other.

    Args:
        ranges: From `weight_ranges`.
        title: What stands above it, e.g. whose weights they are.
    """
    layers = {entry.layer: None for entry in ranges}
    position = {layer: number for number, layer in enumerate(layers)}
    figure = Figure(figsize=(max(8.0, 2.5 + 0.19 * len(layers)), 11), layout='constrained')
    spread, channels, noise = figure.subplots(3, 1, sharex=True)
    for number, (form, (label, colour)) in enumerate(_STYLES.items()):
        entries = [entry for entry in ranges if entry.form == form]
        x = [position[entry.layer] for entry in entries]
        spread.vlines([value + 0.27 * (number - 1) for value in x],
                      [entry.std for entry in entries], [entry.largest for entry in entries],
                      colour, linewidth=3)
        style = dict(color=colour, linestyle='none', **_MARKERS[form])
        channels.plot(x, [entry.channel_ratio_median for entry in entries], **style)
        noise.plot(x, [entry.sqnr_tensor_db for entry in entries], label=label, **style)
        if form == 'folded':
            noise.plot(x, [entry.sqnr_channel_db for entry in entries], color=colour,
                       linestyle='none', marker='_', markersize=9,
                       label='BN folded, one scale per output channel')
    spread.set_title('from the standard deviation to the largest absolute weight: a long bar '
                     'has outliers')
    channels.set_title('largest absolute weight of the widest output channel over that of the '
                       'median channel')
    noise.set_title('signal-to-quantization-noise ratio in dB of int8, one scale per tensor: '
                    '6 dB are one bit')
    noise.set_xticks(range(len(layers)), layers, rotation=90, fontsize=7)
    noise.set_xlim(-1, len(layers))
    for axes in (spread, channels):
        axes.set_yscale('log')
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter('{x:g}')
        axes.yaxis.set_minor_formatter(NullFormatter())
    for axes in (spread, channels, noise):
        axes.title.set_fontsize(10)
        axes.grid(alpha=0.3)
    figure.legend(*noise.get_legend_handles_labels(), loc='outside upper center', ncols=2,
                  fontsize=9, title=title)
    return figure


def write_benchmark(benchmark: Benchmark, folder: str | Path) -> list[Path]:
    """Write `benchmark.json`, `weight_ranges.csv` and `weight_ranges.png`, all or none.

    Args:
        benchmark: From `benchmark_config`.
        folder: Where to write; created if it is missing.

    Returns:
        Paths of the three files.
    """
    paths = [Path(folder) / name
             for name in ('benchmark.json', 'weight_ranges.csv', 'weight_ranges.png')]
    with ExitStack() as stack:
        costs, table, picture = (stack.enter_context(written_whole(path)) for path in paths)
        costs.write_text(json.dumps(benchmark.as_dict(), indent=1), encoding='utf-8')
        write_weight_ranges(benchmark.weight_ranges, table)
        title = f'weights: {Path(benchmark.conditions["weights"]).name}'
        draw_weight_ranges(benchmark.weight_ranges, title).savefig(picture, dpi=110)
    return paths
