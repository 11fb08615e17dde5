"""The report of a run: pictures and a table in one file that needs nothing else."""

from __future__ import annotations

import html
import json
from pathlib import Path

from matplotlib.figure import Figure
from mmengine.config import Config
from mmengine.runner import find_latest_checkpoint

from ..files import written_whole
from .curves import draw_curves, read_scalars
from .detections import draw_detections, load_forms
from .page import html_page, html_picture, html_table, png_of
from .summary import report_rows

_BODY = '''<p>Trained with OREPA blocks, then re-parameterized into the stock network.</p>
<h2>Before and after</h2>
{table}
<p class="note">{note}</p>
<h2>Detections of both forms</h2>
{detections}
<h2>Training</h2>
{curves}'''
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
    """
    train_dir, deployed_dir, out = Path(train_dir), Path(deployed_dir), Path(out)
    checkpoint = find_latest_checkpoint(str(train_dir))
    configs = sorted(train_dir.glob('*.py'))
    if checkpoint is None or not configs:
        raise FileNotFoundError(f'{train_dir} holds no finished training run')
    if not (deployed_dir / 'report.json').is_file():
        raise FileNotFoundError(f'{deployed_dir} holds no report.json of a re-parameterization')
    results = json.loads((deployed_dir / 'report.json').read_text())
    dataset = Config.fromfile(configs[0]).val_dataloader.dataset
    folder = Path(dataset.data_root) / dataset.data_prefix.img
    images = sorted(path for path in folder.iterdir() if path.is_file())[:num_images]
    forms = load_forms((configs[0], Path(checkpoint)),
                       (deployed_dir / 'config.py', deployed_dir / 'model.pth'))
    pictures = {'detections': draw_detections(forms, images),
                'curves': draw_curves(read_scalars(train_dir))}
    encoded = {name: html_picture(_save(figure, out.with_name(f'{out.stem}-{name}.png')),
                                  _PICTURES[name]) for name, figure in pictures.items()}
    table = html_table(('', 'training form', 'deployed'), report_rows(results))
    machine = results['machine']
    note = (f'Measured on {machine["device"]} ({machine["processor"]}, {machine["threads"]} '
            f'threads), torch {machine["torch"]}, input {results["input_shape"]}. Multiply-adds '
            'of the training form include the squeezing of all kernels once.')
    with written_whole(out) as path:
        path.write_text(html_page(configs[0].stem, _BODY.format(
            table=table, note=html.escape(note), **encoded)), encoding='utf-8')
    return out


def _save(figure: Figure, path: Path) -> bytes:
    """Write a figure as PNG; returns what was written."""
    content = png_of(figure)
    with written_whole(path) as temporary:
        temporary.write_bytes(content)
    return content
