"""What was measured, as a table: rich, Markdown, JSON."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..errors import ConfigError
from ..files import written_whole
from .documents import fill_between, markdown_table
from .measure import paired_ratio

#: Between these two lines of a Markdown file `fill_markdown` writes.
BEGIN, END = '<!-- measured: begin -->', '<!-- measured: end -->'


@dataclass(frozen=True)
class Row:
    """One line of a table; what was not measured is None or empty.

    Attributes:
        name: What was measured.
        times_ms: Durations in milliseconds, one per round; all rows in turns.
        reference: Name of the row that durations are compared with.
        operations: From `count_operations`.
        saved_bytes: From `saved_bytes`.
        peak_bytes: From `peak_allocation`.
        extra: Further columns, by heading: text or numbers.
        note: What there is to say, e.g. why nothing was measured.
    """

    name: str
    times_ms: tuple[float, ...] = ()
    reference: str | None = None
    operations: int | None = None
    saved_bytes: int | None = None
    peak_bytes: int | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    note: str = ''


@dataclass(frozen=True)
class Measurement:
    """A table and how it came about.

    Attributes:
        name: Name of its files, without suffix.
        title: What it shows.
        explanation: What the columns mean, in one or two sentences.
        rows: The lines.
        conditions: Where and how it was measured: plain types, from `conditions`
            and what was asked for.
    """

    name: str
    title: str
    explanation: str
    rows: tuple[Row, ...]
    conditions: dict[str, Any]

    def ratio(self, row: Row) -> float | None:
        """Duration of a row over that of its reference, see `paired_ratio`; None without one.

        Args:
            row: One of `rows`.
        """
        other = next((other for other in self.rows if other.name == row.reference), None)
        if other is None or not row.times_ms or not other.times_ms:
            return None
        return paired_ratio(row.times_ms, other.times_ms)

    def as_dict(self) -> dict[str, Any]:
        """Plain types only, for a file; `over_reference` of each row is from `ratio`."""
        rows = [{**asdict(row), 'over_reference': self.ratio(row)} for row in self.rows]
        return {**asdict(self), 'rows': rows}

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Measurement:
        """What `as_dict` wrote.

        Args:
            content: From a JSON file.
        """
        rows = tuple(Row(**{**{key: value for key, value in row.items()
                               if key != 'over_reference'}, 'times_ms': tuple(row['times_ms'])})
                     for row in content['rows'])
        return cls(**{**content, 'rows': rows})


def table_cells(measurement: Measurement) -> tuple[list[str], list[list[str]]]:
    """Headings and lines as text; columns that no row fills are left out.

    Args:
        measurement: What was measured.
    """
    columns: dict[str, list[str]] = {'': [row.name for row in measurement.rows]}

    def add(heading: str, cells: list[str]) -> None:
        if any(cells):
            columns[heading] = cells

    rows = measurement.rows
    add('time (ms)', [f'{statistics.median(row.times_ms):.4g}' if row.times_ms else ''
                      for row in rows])
    add('quartiles (ms)', [_quartiles(row.times_ms) for row in rows])
    ratios = [(measurement.ratio(row), row.reference) for row in rows]
    references = {reference for ratio, reference in ratios if ratio is not None}
    heading = f'time over {references.pop()}' if len(references) == 1 else 'time over reference'
    add(heading, ['' if ratio is None else f'{ratio:.2f}' for ratio, _ in ratios])
    add('operations', ['' if row.operations is None else str(row.operations) for row in rows])
    add('saved (MB)', [_megabytes(row.saved_bytes) for row in rows])
    add('peak (MB)', [_megabytes(row.peak_bytes) for row in rows])
    for heading in dict.fromkeys(key for row in rows for key in row.extra):
        add(heading, [_text(row.extra.get(heading)) for row in rows])
    add('note', [row.note for row in rows])
    return list(columns), [list(line) for line in zip(*columns.values())]


def print_measurement(measurement: Measurement) -> None:
    """Print the table and how it was measured.

    Args:
        measurement: What was measured.
    """
    console = Console(width=None if sys.stdout.isatty() else 140)
    headings, lines = table_cells(measurement)
    table = Table(title=measurement.title)
    for heading in headings:
        textual = heading in ('', 'note')
        table.add_column(heading, justify='left' if textual else 'right', no_wrap=heading == '')
    for line in lines:
        table.add_row(*line)
    console.print(table)
    print(measurement.explanation)
    print(conditions_text(measurement.conditions))


def markdown(measurement: Measurement) -> str:
    """The table as Markdown, with a heading, what it means and how it was measured.

    Args:
        measurement: What was measured.
    """
    headings, lines = table_cells(measurement)
    table = markdown_table(headings, lines, left=('', 'note'))
    return (f'### {measurement.title}\n\n{table}\n\n{measurement.explanation}\n\n'
            f'{conditions_text(measurement.conditions)}\n')


def conditions_text(where: dict[str, Any]) -> str:
    """Conditions in one or two lines.

    Args:
        where: `conditions` of a `Measurement`.
    """
    versions = ', '.join(f'{name} {version}' for name, version in where['versions'].items())
    others = '; '.join(f'{name.replace("_", " ")}: {_text(value)}' for name, value in where.items()
                       if name not in ('device', 'processor', 'threads', 'versions'))
    return (f'{where["device"]} ({where["processor"]}), threads: {where["threads"]}, {versions}.'
            + (f'\n{others}.' if others else ''))


def write_measurement(measurement: Measurement, folder: str | Path, plot: bool = False
                      ) -> list[Path]:
    """Write `NAME.json` and `NAME.md`, and on demand `NAME.png`, all or none.

    Args:
        measurement: What was measured.
        folder: Where to write; created if it is missing.
        plot: Whether to draw time and memory as bars, where there are any.

    Returns:
        Paths of the files.
    """
    figure = None
    if plot:
        from .cost_figure import draw_costs  # needs matplotlib

        figure = draw_costs(measurement)
    with ExitStack() as stack:
        paths = [Path(folder) / f'{measurement.name}{suffix}'
                 for suffix in ('.json', '.md', '.png')[:2 if figure is None else 3]]
        new = [stack.enter_context(written_whole(path)) for path in paths]
        new[0].write_text(json.dumps(measurement.as_dict(), indent=1), encoding='utf-8')
        new[1].write_text(markdown(measurement), encoding='utf-8')
        if figure is not None:
            figure.savefig(new[2], dpi=110)
    return paths


def gather_tables(folder: str | Path) -> Path:
    """Write `benchmark.md`: all tables of a folder, in the order of their names.

    Args:
        folder: Where `write_measurement` wrote.

    Returns:
        The file.

    Raises:
        ConfigError: If there is no measurement in the folder.
    """
    target = Path(folder) / 'benchmark.md'
    measurements = _measurements(folder)
    with written_whole(target) as path:
        path.write_text('# What it costs\n\n' + '\n'.join(map(markdown, measurements)),
                        encoding='utf-8')
    return target


def fill_markdown(folder: str | Path, document: str | Path) -> Path:
    """Write all tables of a folder between the lines `BEGIN` and `END` of a Markdown file.

    Args:
        folder: Where `write_measurement` wrote.
        document: The Markdown file.

    Returns:
        The file.

    Raises:
        ConfigError: If there is no measurement in the folder, or the document
            lacks one of the lines.
        FileNotFoundError: If there is no such document.
    """
    return fill_between(document, BEGIN, END, '\n'.join(map(markdown, _measurements(folder))))


def _measurements(folder: str | Path) -> Sequence[Measurement]:
    found = []
    for path in sorted(Path(folder).glob('*.json')):
        content = json.loads(path.read_text(encoding='utf-8'))
        if isinstance(content, dict) and 'explanation' in content:
            found.append(Measurement.from_dict(content))
    if not found:
        raise ConfigError(f'{folder} holds no measurement: run a sub-command with --out {folder}')
    return found


def _quartiles(times: Sequence[float]) -> str:
    if len(times) < 2:
        return ''
    low, _, high = statistics.quantiles(times, n=4, method='inclusive')
    return f'{low:.4g} to {high:.4g}'


def _megabytes(value: int | None) -> str:
    return '' if value is None else f'{value / 1e6:.1f}'


def _text(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ' x '.join(map(str, value))
    if isinstance(value, float):
        return f'{value:.3f}'
    return '' if value is None else str(value)
