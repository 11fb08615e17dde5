"""The report of a run: pictures and a table in one file that needs nothing else."""

from __future__ import annotations

import contextlib
import html
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from mmengine.config import Config

from ..engine import find_config, read_config
from ..engine.checkpoint_hook import LAST_CHECKPOINT
from ..errors import ConfigError, DamagedFileError, explained
from ..files import written_whole
from .curves import draw_curves, read_scalars
from .detections import draw_detections, load_forms
from .page import html_commands, html_page, html_picture, html_table, png_of
from .summary import report_rows

_BODY = '''<p>Trained with OREPA blocks, then re-parameterized into the stock network.</p>
<h2>Before and after</h2>
{table}
<p class="note">{note}</p>
<h2>Detections of both forms</h2>
{detections}
<h2>Training</h2>
{curves}
<h2>What next</h2>
{next_steps}'''
#: What each picture shows.
_PICTURES = {'detections': 'detections of both forms on validation images',
             'curves': 'loss and average precision over the iterations'}


def write_report(train_dir: str | Path, deployed_dir: str | Path, out: str | Path,
                 num_images: int = 4) -> Path:
    """Write the report of a run as one HTML file, and its pictures beside it.

    Args:
        train_dir: Work folder of the training run.
        deployed_dir: Output folder of the re-parameterization.
        out: The HTML file to write.
        num_images: Validation images to show.

    Returns:
        Path of the HTML file.

    Raises:
        FileNotFoundError: If the training or the re-parameterization left no results.
        DamagedFileError: If what they left is torn, or of another kind.
        ConfigError: If the config cannot be read, or is of no detector.
        CheckpointError: If a checkpoint is damaged, or not that of its config.
    """
    train_dir, deployed_dir, out = Path(train_dir), Path(deployed_dir), Path(out)
    pointer, configs = train_dir / LAST_CHECKPOINT, sorted(train_dir.glob('*.py'))
    if not pointer.is_file() or not configs:
        raise FileNotFoundError(f'{train_dir} holds no finished training run: give the work folder '
                                f'of one, with its config and {LAST_CHECKPOINT}')
    if not (deployed_dir / 'report.json').is_file():
        raise FileNotFoundError(f'{deployed_dir} holds no report.json of a re-parameterization: '
                                'give the folder that `mim run orepa_mm reparam` wrote')
    results, rows, note = _results(deployed_dir / 'report.json')
    images = _images(read_config(configs[0]), configs[0])[:num_images]
    with _damage_of(f'a log of {train_dir} (*/vis_data/scalars.json)'):
        curves = draw_curves(read_scalars(train_dir))
    trained = configs[0], Path(pointer.read_text(errors='replace').strip())
    deployed = deployed_dir / 'config.py', deployed_dir / 'model.pth'
    for config, checkpoint in (trained, deployed):
        if not read_config(config).get('model'):
            raise ConfigError(f'{config} names no model: let it be written anew')
        if not checkpoint.is_file():
            raise FileNotFoundError(f'there is no checkpoint {checkpoint}, that of {config}')
    forms = load_forms(trained, deployed)
    pictures = {'detections': draw_detections(forms, images), 'curves': curves}
    encoded = {name: html_picture(_save(figure, out.with_name(f'{out.stem}-{name}.png')),
                                  _PICTURES[name]) for name, figure in pictures.items()}
    table = html_table(('', 'training form', 'deployed'), rows)
    with written_whole(out) as path:
        path.write_text(html_page(configs[0].stem, _BODY.format(
            table=table, note=html.escape(note), **encoded,
            next_steps=html_commands(next_steps(configs[0], deployed_dir, results)))),
            encoding='utf-8')
    return out


def next_steps(config: Path, deployed_dir: Path, results: Mapping[str, Any]
               ) -> list[tuple[str, list[list[str]]]]:
    """What to do after a run: what it is, and its command lines as words.

    Args:
        config: The config that the run left in its work folder.
        deployed_dir: Output folder of the re-parameterization.
        results: Its `report.json`.
    """
    try:
        name = str(find_config(config.name).name)
    except FileNotFoundError:  # a config of the user's own
        name = str(config)
    tool, data = ['mim', 'run', 'orepa_mm'], ['--data-root', 'MY_DATA']
    train = ['mim', 'train', 'orepa_mm', name, *data]
    deployed = str(deployed_dir / 'config.py'), str(deployed_dir / 'model.pth')
    return [
        ('Data of your own, in the layout that the config reads: look through them, try a run '
         'in small, train.',
         [[*tool, 'check_data', name, *data], [*train, '--dry-run', '2'],
          [*train, '--work-dir', 'work_dirs/mine']]),
        ('Start from the weights of the same network without OREPA, trained before: they are '
         'expanded, and compute the same.',
         [[*tool, 'expand', name, 'PLAIN.pth', 'expanded.pth', *data],
          [*train, '--cfg-options', 'load_from=expanded.pth']]),
        ('Does OREPA gain anything on your data? Train both, over several seeds.',
         [[*tool, 'compare', name, *data, '--variants', 'plain', 'orepa', '--out', 'comparison']]),
        ('Use the deployed model: on images, and tested where this package is not installed.',
         [[*tool, 'predict', str(deployed_dir), 'IMAGES', '--out', 'predictions'],
          ['mim', 'test', str(results.get('package') or 'PACKAGE'), deployed[0], '--checkpoint',
           deployed[1]]]),
    ]


@contextlib.contextmanager
def _damage_of(what: str | Path) -> Iterator[None]:
    """Name what is torn, or of another kind, if reading it fails."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise DamagedFileError(f'{what} is damaged or of another kind ({type(error).__name__}: '
                               f'{explained(error)}): let it be written anew') from error


def _results(path: Path) -> tuple[dict[str, Any], list[tuple[str, str, str]], str]:
    """What `report.json` holds, the rows of its table, and the note below that."""
    with _damage_of(path):
        results = json.loads(path.read_text('utf-8'))
        machine = results['machine']
        note = (f'Measured on {machine["device"]} ({machine["processor"]}, {machine["threads"]} '
                f'threads), torch {machine["torch"]}, input {results["input_shape"]}. '
                'Multiply-adds of the training form include the squeezing of all kernels once.')
        return results, report_rows(results), note


def _images(cfg: Config, name: Path) -> list[Path]:
    """The validation images of a detector's config, by name."""
    dataset = (cfg.get('val_dataloader') or {}).get('dataset') or {}
    folder, annotations = (dataset.get('data_prefix') or {}).get('img'), dataset.get('ann_file')
    if folder is None or not annotations:
        raise ConfigError(f'{name} validates on no data set in the layout of COCO, whose '
                          'detections a report shows: give the run of a detector')
    root = Path(dataset.get('data_root') or '')
    with _damage_of(root / annotations):
        entries = json.loads((root / annotations).read_text('utf-8'))['images']
        return [root / folder / name for name in sorted(entry['file_name'] for entry in entries)]


def _save(figure: Figure, path: Path) -> bytes:
    """Write a figure as PNG; returns what was written."""
    content = png_of(figure)
    with written_whole(path) as temporary:
        temporary.write_bytes(content)
    return content
