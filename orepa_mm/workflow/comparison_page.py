"""A comparison as Markdown and as a page: tables, sentences, figures."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from ..analysis.comparison import Comparison
from ..analysis.documents import markdown_table
from .page import html_page, html_picture, html_table

#: Headings and lines of a table, as text.
Table = tuple[list[str], list[list[str]]]

#: Stands between what is of one comparison and what is of all.
METHOD_MARK = 'How to read this:'


def as_markdown(comparison: Comparison, losses: Comparison | None, parts: Mapping[str, Any]) -> str:
    """For GitHub, under a heading of the third level; the method comes last, behind `METHOD_MARK`.

    Args:
        comparison: From `compare`.
        losses: The same of the training loss, where it was logged.
        parts: `title`, `lacking`, `notes` and `method` (lines), `machines`, `versions`.
    """
    blocks = [f'### {parts["title"]}', _markdown_list(_sentences(comparison, losses))]
    if parts['lacking']:
        blocks += ['Missing here:', _markdown_list(parts['lacking'])]
    blocks += [markdown_table(*table) for table in _tables(comparison, losses).values()]
    blocks += [_markdown_list([*parts['notes'], *_machine_lines(parts)]), METHOD_MARK,
               _markdown_list(parts['method'])]
    return '\n\n'.join(blocks) + '\n'


def as_html(comparison: Comparison, losses: Comparison | None, parts: Mapping[str, Any],
            metric: bytes, training: bytes, further: Mapping[str, bytes]) -> str:
    """A page that needs no other file.

    Args:
        comparison: From `compare`.
        losses: See `as_markdown`.
        parts: See `as_markdown`.
        metric: PNG of `draw_metric`.
        training: PNG of `draw_training`.
        further: PNGs for the end of the page, by their titles.
    """
    lacking = ([_heading('Missing here'), _html_list(parts['lacking'])] if parts['lacking']
               else [])
    tables = [text for title, table in _tables(comparison, losses).items()
              for text in (_heading(title), html_table(*table))]
    pictures = [text for title, png in further.items()
                for text in (_heading(title), html_picture(png, title))]
    return html_page(parts['title'], '\n'.join([
        _html_list(_sentences(comparison, losses)), *lacking,
        html_picture(metric, 'the metric of every variant and seed'), *tables,
        _heading('Training'), html_picture(training, 'loss and metric while training'),
        *pictures, _heading('How to read this'),
        _html_list([*parts['notes'], *_machine_lines(parts), *parts['method']])]))


def _tables(comparison: Comparison, losses: Comparison | None) -> dict[str, Table]:
    tables = {'Variants': _table_of_variants(comparison, losses)}
    if _has_one_seed(comparison):  # the other tables would say the same again
        return tables
    if comparison.pairs:
        tables['Paired differences'] = _table_of_pairs(comparison)
        if losses is not None:
            tables['Paired differences of the training loss'] = _table_of_pairs(losses)
    tables[f'{comparison.metric} of every seed'] = _table_of_seeds(comparison)
    return tables


def _table_of_variants(comparison: Comparison, losses: Comparison | None) -> Table:
    rows = []
    heads = ['', f'{comparison.metric}: mean ± sd (n)', 'training (ms/iteration)',
             f'time over {comparison.reference}', 'peak memory (MB)', 'relative step of the kernel',
             'parameters in training (M)']
    for spread in comparison.spreads:
        deviation = ('' if spread.deviation is None
                     else f' ± {comparison.text(spread.deviation)}')
        rows.append([
            spread.variant, f'{comparison.text(spread.mean)}{deviation} ({len(spread.values)})',
            f'{spread.seconds_per_iteration * 1000:.1f}',
            '-' if spread.time_ratio is None else f'{spread.time_ratio:.2f}',
            '-' if spread.peak_bytes is None else f'{spread.peak_bytes / 1e6:.0f}',
            '-' if spread.kernel_step is None else f'{spread.kernel_step:.2e}',
            f'{spread.parameters / 1e6:.2f}'])
    if losses is not None:
        means = {spread.variant: losses.text(spread.mean) for spread in losses.spreads}
        for row in rows:
            row.insert(2, means.get(row[0], '-'))
        heads.insert(2, 'training loss')
    return heads, rows


def _table_of_seeds(comparison: Comparison) -> Table:
    seeds = sorted({outcome.seed for outcome in comparison.outcomes})
    rows = []
    for spread in comparison.spreads:
        training = {outcome.seed: outcome.training_metric for outcome in comparison.outcomes
                    if outcome.variant == spread.variant and outcome.training_metric is not None}
        rows.append([spread.variant, *(comparison.text(spread.values.get(seed))
                                       for seed in seeds)])
        if training:
            rows.append([f'{spread.variant}, training form',
                         *(comparison.text(training.get(seed)) for seed in seeds)])
    return ['', *(f'seed {seed}' for seed in seeds)], rows


def _table_of_pairs(comparison: Comparison) -> Table:
    rows = []
    for pair in comparison.pairs:
        interval = ('none' if pair.interval is None else
                    ' to '.join(comparison.text(end, signed=True) for end in pair.interval))
        rows.append([f'{pair.variant} - {pair.reference}',
                     comparison.text(pair.mean, signed=True), interval,
                     str(len(pair.differences)),
                     ', '.join(comparison.text(value, signed=True)
                               for value in pair.differences.values())])
    unit = ' (points)' if comparison.percent else ''
    return ['', f'{comparison.metric}: mean difference{unit}', '95 % interval', 'seeds',
            'each seed'], rows


def _has_one_seed(comparison: Comparison) -> bool:
    return len({outcome.seed for outcome in comparison.outcomes}) == 1


def _sentences(comparison: Comparison, losses: Comparison | None) -> list[str]:
    if _has_one_seed(comparison) and len(comparison.pairs) > 1:
        return ['Each variant has one seed, which says nothing about chance.']
    pairs = losses.pairs if losses is not None and not _has_one_seed(losses) else ()
    return ([f'{pair.sentence}.' for pair in comparison.pairs]
            + [f'Training loss: {pair.sentence}.' for pair in pairs]
            or ['One variant has finished: nothing is compared.'])


def _machine_lines(parts: Mapping[str, Any]) -> list[str]:
    lines = [f'Trained on: {machine["device"]} ({machine["processor"]}), threads: '
             f'{machine["threads"]}, torch {machine["torch"]}.' for machine in parts['machines']]
    versions = ', '.join(f'{name} {version}' for name, version in parts['versions'].items())
    return [*lines, f'This report was made with {versions}.']


def _markdown_list(lines: Sequence[str]) -> str:
    return '\n'.join(f'- {line}' for line in lines)


def _heading(title: str) -> str:
    return f'<h2>{html.escape(title)}</h2>'


def _html_list(lines: Sequence[str]) -> str:
    return '<ul>\n' + '\n'.join(f'<li>{html.escape(line)}</li>' for line in lines) + '\n</ul>'
