"""The report of a comparison: from the files of its runs to tables, figures and words."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from mmengine.config import Config
from mmengine.registry import DefaultScope

from ..analysis.comparison import (
    CONFIDENCE,
    METHOD,
    Comparison,
    Outcome,
    chosen_metric,
    compare,
    smaller_is_better,
)
from ..analysis.comparison_figure import draw_metric, draw_training
from ..analysis.conditions import conditions
from ..analysis.documents import around, fill_between, without_nan
from ..analysis.similarity import measure_checkpoint
from ..analysis.similarity_figure import draw_shares, draw_similarities
from ..errors import ConfigError, shortened
from ..files import written_whole
from .comparison import Run, planned_runs
from .comparison_page import METHOD_MARK, as_html, as_markdown
from .comparison_run import CONFIG, LOG, TRAINED
from .curves import final_loss, read_scalars
from .page import png_of

#: What the figures show, by the end of their names.
FIGURES = {'metric': 'The metric of every variant and seed',
           'training': 'Loss and metric while training'}

_HOW_MEASURED = (
    'Time: median of the training iterations that were logged, of these very runs; where runs or '
    'other programs shared the machine they slowed each other down.',
    'Peak memory: what PyTorch allocated on the GPU; without one, resident memory of the training '
    'process. Not known of runs that were resumed.',
    'Training loss: mean of what was logged in the last tenth of the training, of the training '
    'form, with augmentation. It says how well the training images are learned, not how good the '
    'network is on others.',
    'Step of the kernel: norm of the change of a kernel in one iteration over its norm, mean over '
    'the convolutions, over the iterations that were measured and over the seeds.')


def write_comparison(out: str | Path, metric: str | None = None, reference: str | None = None
                     ) -> Comparison:
    """Write `comparison.json`, `comparison.md` and `report.html` of the runs in a folder.

    All are written, or none. Runs that have not finished are named, and left out.
    The two figures of the report lie beside it as `comparison-*.png`.

    Args:
        out: Folder of the comparison; its runs are in `runs/VARIANT/seedN`.
        metric: To compare by; see `chosen_metric`.
        reference: The variant that the others are compared with; by default the
            first that has finished.

    Returns:
        What the report says.

    Raises:
        ConfigError: If nothing was planned there, no run has finished, or there is no
            such metric or reference.
    """
    out = Path(out)
    title, runs = planned_runs(out)
    results = {run: run.result for run in runs}
    finished = {run: result for run, result in results.items() if result is not None}
    lacking = [_why_unfinished(run) for run in runs if run not in finished]
    if not finished:
        raise ConfigError(f'{out} has no finished run, so there is nothing to compare'
                          + (': ' + shortened(lacking) if lacking else ''))
    cfg = Config.fromfile(next(iter(finished)).folder / CONFIG)
    measured: dict[str, float] = {}  # a detector that finds nothing has no AP
    for result in finished.values():
        measured = {**result['metrics']['deployed'], **measured}
    name = chosen_metric(cfg, measured, metric)
    outcomes = {run: _outcome(run, result, name) for run, result in finished.items()}
    comparison = compare([*outcomes.values()], name, reference, smaller_is_better(cfg, name))
    scalars, silent = _scalars(finished)
    losses = _compared_losses(outcomes, scalars, comparison.reference)
    curves: dict[str, list] = {run.variant.text: [] for run in finished}
    for run, logged in scalars.items():
        curves[run.variant.text].append(logged)
    notes = [*comparison.notes, *_of_the_runs(finished), *silent]
    step = ((cfg.get('default_hooks') or {}).get('logger') or {}).get('log_metric_by_epoch', True)
    pictures = {'metric': png_of(draw_metric(comparison)),
                'training': png_of(draw_training(curves, name,
                                                 'epoch' if step else 'iteration'))}
    further = {heading: png_of(figure) for heading, figure in _branches(finished).items()}
    machines = list({json.dumps(result['machine']): result['machine']
                     for result in finished.values()}.values())
    parts = {'title': title, 'lacking': lacking, 'notes': notes,
             'method': [METHOD, *what_is_equal(cfg), *_HOW_MEASURED],
             'machines': machines,
             'versions': conditions(torch.device('cpu'), cfg.get('default_scope'))['versions']}
    texts = {
        'comparison.json': _json(comparison, losses, finished, parts,
                                 {'metric': metric, 'reference': reference}),
        'comparison.md': as_markdown(comparison, losses, parts),
        'report.html': as_html(comparison, losses, parts, further=further, **pictures),
    }
    with ExitStack() as stack:
        new = {file: stack.enter_context(written_whole(out / file)) for file in texts}
        new |= {key: stack.enter_context(written_whole(out / f'comparison-{key}.png'))
                for key in pictures}
        for file, text in texts.items():
            new[file].write_text(text, encoding='utf-8')
        for key, png in pictures.items():
            new[key].write_bytes(png)
    return comparison


def fill_document(out: str | Path, document: str | Path) -> Path:
    """Write the tables of a comparison into a Markdown file, and its figures beside that.

    The text goes between the lines `<!-- comparison NAME: begin -->` and
    `<!-- comparison NAME: end -->`, where NAME is that of the folder; the figures
    become `NAME-metric.png` and `NAME-training.png`.

    Args:
        out: Folder of the comparison, with a report.
        document: The Markdown file.

    Returns:
        The document.

    Raises:
        ConfigError: If the document lacks one of the lines.
        FileNotFoundError: If there is no such document, or no report.
    """
    out, document = Path(out).resolve(), Path(document)
    tables, _, _ = (out / 'comparison.md').read_text('utf-8').partition(f'{METHOD_MARK}\n')
    pictures = {key: f'{out.name}-{key}.png' for key in FIGURES}
    shown = '\n'.join(f'![{title}]({pictures[key]})\n' for key, title in FIGURES.items())
    fill_between(document, *_place(out), f'{tables.rstrip()}\n\n{shown}')
    for key, name in pictures.items():
        with written_whole(document.parent / name) as path:
            path.write_bytes((out / f'comparison-{key}.png').read_bytes())
    return document


def require_place(out: str | Path, document: str | Path) -> None:
    """Look whether a document has the lines that `fill_document` writes between.

    Args, Raises:
        See `fill_document`.
    """
    around(document, *_place(Path(out).resolve()))


def _place(out: Path) -> tuple[str, str]:
    return f'<!-- comparison {out.name}: begin -->', f'<!-- comparison {out.name}: end -->'


def what_is_equal(cfg: Config) -> list[str]:
    """What is the same in all variants for the same seed, and what is not: three lines.

    Args:
        cfg: The training config.
    """
    loader = cfg.train_dataloader
    sampler = (loader.get('sampler') or {}).get('type', 'DefaultSampler')
    workers = loader.get('num_workers', 0)
    equal, differs = [], []
    # others may draw from the numbers that initial values use too
    order = f'the order of the data ({sampler} draws it'
    if sampler in ('DefaultSampler', 'InfiniteSampler'):
        equal.append(f'{order} from the seed alone)')
    else:
        differs.append(f'perhaps {order}; whether from the seed alone is not known here)')
    if loader.get('worker_init_fn') is not None:
        differs.append('perhaps augmentation (the config has its own worker_init_fn)')
    elif workers:
        equal.append(f'the augmentation of each image (drawn by num_workers={workers} data '
                     'workers, which MMEngine seeds by the seed and their number alone)')
    else:
        differs.append('augmentation (with num_workers=0 it is drawn by the training process, '
                       'which draws initial values and the model\'s numbers as well)')
    differs += ['initial values, unless two variants have the same layers (different layers draw '
                'different numbers)',
                'what the model draws while training (samplers of RPN and RoI heads, dropout, '
                'augmentation of whole batches such as Mixup)']
    lines = [f'The same in all variants for the same seed: {"; ".join(equal)}.'] if equal else []
    return [*lines, f'Not the same, or not surely, for the same seed: {"; ".join(differs)}.',
            'Learning rates are those of the config for every variant, unless the variant says '
            'otherwise: a comparison with one side untuned is worth nothing; compare '
            '`plain:lr=... orepa:lr=...`.']


def _why_unfinished(run: Run) -> str:
    if not (run.folder / LOG).is_file():
        return f'{run.name}: not begun'
    return (f'{run.name}: not finished, {run.fraction:.0%} trained; the last line of its log is: '
            f'{run.complaint}')


def _outcome(run: Run, result: dict[str, Any], metric: str) -> Outcome:
    forms = {form: values.get(metric, math.nan) for form, values in result['metrics'].items()}
    return Outcome(run.variant.text, run.seed, forms['deployed'], forms.get('training'),
                   result['seconds_per_iteration'], result['peak_bytes'], result['kernel_step'],
                   result['parameters'])


def _branches(finished: Mapping[Run, dict[str, Any]]) -> dict[str, Figure]:
    """What the branches of every variant do, by the title of the figure: of its first seed."""
    figures = {}
    for run in {run.variant: run for run in reversed(list(finished))}.values():
        result = finished[run]
        checkpoint = run.folder / result['checkpoint']
        # a network of one form has no branches; a checkpoint may have been tidied away
        if 'training' not in result['metrics'] or not checkpoint.is_file():
            continue
        cfg = Config.fromfile(run.folder / CONFIG)
        with DefaultScope.overwrite_default_scope(cfg.get('default_scope', 'mmengine')):
            layers = measure_checkpoint(cfg, checkpoint)
        figures[f'Shares of the branches: {run.name}'] = draw_shares(layers)
        figures[f'Similarity of the branches: {run.name}'] = draw_similarities(layers)
    return figures


def _scalars(finished: Mapping[Run, Any]) -> tuple[dict[Run, dict], list[str]]:
    """What the finished runs logged; and which of them cannot be read."""
    scalars: dict[Run, dict] = {}
    silent = []
    for run in finished:
        try:
            scalars[run] = read_scalars(run.folder / TRAINED)
        except (FileNotFoundError, ValueError) as error:
            silent.append(f'{run.name} is not in the curves: {error}')
    return scalars, silent


def _compared_losses(outcomes: Mapping[Run, Outcome], scalars: Mapping[Run, Any],
                     reference: str) -> Comparison | None:
    """The comparison of what the runs ended their training with, if the reference logged it."""
    losses = [replace(outcome, metric=loss, training_metric=None)
              for run, outcome in outcomes.items()
              if (loss := final_loss(scalars.get(run, {}))) is not None]
    if reference not in {outcome.variant for outcome in losses}:
        return None
    return compare(losses, 'training loss', reference, smaller_is_better=True)


def _of_the_runs(finished: Mapping[Run, dict[str, Any]]) -> list[str]:
    """What the runs have not in common."""
    notes = []
    iterations = {run.name: result['iterations'] for run, result in finished.items()}
    if len(set(iterations.values())) > 1:
        notes.append('THE RUNS ARE NOT EQUALLY LONG: ' + ', '.join(
            f'{name}: {count} iterations' for name, count in iterations.items()))
    if len({json.dumps(result['machine']) for result in finished.values()}) > 1:
        notes.append('The runs were made on different machines or with different numbers of '
                     'threads: compare no times.')
    resumed = [run.name for run in finished  # one file for each process that trained
               if len(list((run.folder / TRAINED).glob('*/vis_data/scalars.json'))) > 1]
    if resumed:
        notes.append('Interrupted and resumed, which starts random numbers anew: '
                     + '; '.join(resumed) + '.')
    return notes


def _json(comparison: Comparison, losses: Comparison | None, finished: Mapping[Run, dict[str, Any]],
          parts: Mapping[str, Any], options: dict[str, Any]) -> str:
    content = {
        **parts, 'metric': comparison.metric, 'percent': comparison.percent,
        'reference': comparison.reference, 'confidence': CONFIDENCE, 'options': options,
        'runs': [{'variant': run.variant.text, 'seed': run.seed, **result}
                 for run, result in finished.items()],
        **_numbers(comparison), 'training_loss': losses and _numbers(losses)}
    return json.dumps(without_nan(content), indent=1, allow_nan=False)


def _numbers(comparison: Comparison) -> dict[str, Any]:
    return {'variants': [asdict(spread) for spread in comparison.spreads],
            'pairs': [asdict(pair) for pair in comparison.pairs]}
