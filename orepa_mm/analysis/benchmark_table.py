"""The tables of a benchmark, as text."""

from __future__ import annotations

import contextlib
import statistics
import sys
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.progress import Progress as ProgressBar
from rich.table import Table

from .benchmark import Benchmark
from .measure import Progress
from .weight_ranges import worst_layers

#: Headings of the table's columns.
_HEADINGS = {'training': 'training', 'deployed': 'deployed', 'folded': 'deployed,\nBN folded',
             'stock': 'stock'}


def benchmark_rows(benchmark: Benchmark) -> list[tuple[str, ...]]:
    """The table as text: a quantity, then its value in every form.

    Args:
        benchmark: From `benchmark_config`.
    """
    costs = benchmark.costs.values()
    rows = [(name, *(f'{getattr(cost, key) / unit:.{digits}f}' for cost in costs))
            for name, key, unit, digits in (
                ('parameters (M)', 'parameters', 1e6, 2),
                ('multiply-adds (G)', 'multiply_adds', 1e9, 2),
                ('checkpoint file (MB)', 'file_bytes', 1e6, 1),
                ('peak memory (MB)', 'peak_bytes', 1e6, 1),
                ('latency, median (ms)', 'latency_ms', 1, 1),
                ('latency, p90 (ms)', 'latency_p90_ms', 1, 1))]
    rows.append(('latency over stock', *(f'{ratio:.2f}'
                                         for ratio in benchmark.latency_ratios.values())))
    steps = benchmark.training_steps_ms
    if steps:
        rows.append(('training step (ms)', *(
            f'{statistics.median(steps[name]):.1f}' if name in steps else ''
            for name in benchmark.costs)))
        rows.append(('step over stock', f'{benchmark.training_step_ratio:.2f}',
                     *[''] * (len(costs) - 2), '1.00'))
    return rows


def print_benchmark(benchmark: Benchmark, layers: int = 5) -> None:
    """Print the table, how it was measured, and the layers that int8 hurts most.

    Args:
        benchmark: From `benchmark_config`.
        layers: How many layers.
    """
    console = Console(width=None if sys.stdout.isatty() else 100)
    table = Table(title='what each form costs')
    table.add_column('', no_wrap=True)
    for name in benchmark.costs:
        table.add_column(_HEADINGS[name], justify='right', overflow='fold')
    for row in benchmark_rows(benchmark):
        table.add_row(*row)
    console.print(table)
    where = benchmark.conditions
    versions = ', '.join(f'{name} {version}' for name, version in where['versions'].items())
    shape = ' x '.join(map(str, where['input_shape']))
    print(f'{where["device"]} ({where["processor"]}), threads: {where["threads"]}, {versions}.\n'
          f'Input: {shape}. Weights: {where["weights"]}.\n'
          f'{where["rounds"]} rounds after {where["warmup"]} to warm up, all forms in turns; '
          'ratios are medians over the rounds.\n'
          'Latency: raw outputs of the network; proposals are fixed boxes, nothing is selected.\n'
          'Peak memory: weights, input, and tensors that PyTorch allocates in a call.\n'
          'Training step: forward and backward of the backbone, frozen as the config says.')
    table = Table(title=f'the {layers} layers that lose most in int8: signal to noise (dB)')
    table.add_column('', no_wrap=True)
    for heading in ('branches', 'deployed', 'BN\nfolded', 'scale per\nchannel',
                    'widest /\nmedian'):
        table.add_column(heading, justify='right', overflow='fold')
    entries = {(entry.layer, entry.form): entry for entry in benchmark.weight_ranges}
    for layer in worst_layers(benchmark.weight_ranges, layers):
        forms = [entries[layer, form] for form in ('training', 'deployed', 'folded')]
        folded = forms[-1]
        table.add_row(layer, *(f'{entry.sqnr_tensor_db:.1f}' for entry in forms),
                      f'{folded.sqnr_channel_db:.1f}', f'{folded.channel_ratio_median:.1f}')
    console.print(table)
    print('One scale per tensor, but for the last two columns: BN folded, one scale per output '
          'channel;\nrange of the widest channel over that of the median one.')
    if where['weights'] == 'random':
        print('Random weights do not spread as trained ones do: give a checkpoint.')


@contextlib.contextmanager
def progress_bars() -> Iterator[Progress]:
    """Show on stderr how far a measurement is; drawn between calls, never while one is timed."""
    console = Console(stderr=True)
    with ProgressBar(console=console, auto_refresh=False, transient=True,
                     disable=not console.is_terminal) as bars:
        tasks: dict[str, Any] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done, refresh=True)
            if not console.is_terminal and done * 4 // total > (done - 1) * 4 // total:
                print(f'{what}: {done} of {total}', file=sys.stderr)  # a few lines for a log

        yield show
