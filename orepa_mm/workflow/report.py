"""The report of a run: pictures and a table in one file that needs nothing else."""

from __future__ import annotations

import base64
import html
import io
import json
from pathlib import Path

from matplotlib.figure import Figure
from mmengine.config import Config
from mmengine.runner import find_latest_checkpoint

from ..files import written_whole
from .curves import draw_curves, read_scalars
from .detections import draw_detections, load_forms
from .summary import report_rows

_PAGE = '''<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font: 16px/1.5 sans-serif; max-width: 1080px; margin: 2em auto; padding: 0 1em }}
table {{ border-collapse: collapse }} td, th {{ padding: .25em 1em; border-bottom: 1px solid #ccc }}
td + td, th + th {{ text-align: right }} img {{ max-width: 100% }} .note {{ color: #555 }}
</style>
<h1>{title}</h1>
<p>Trained with OREPA blocks, then re-parameterized into the stock network.</p>
<h2>Before and after</h2>
<table><tr><th></th><th>training form</th><th>deployed</th></tr>
{rows}
</table>
<p class="note">{note}</p>
<h2>Detections of both forms</h2>
<img alt="detections of both forms on validation images" src="{detections}">
<h2>Training</h2>
<img alt="loss and average precision over the iterations" src="{curves}">
</html>
'''


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
    encoded = {name: _save(figure, out.with_name(f'{out.stem}-{name}.png'))
               for name, figure in pictures.items()}
    rows = '\n'.join('<tr>' + ''.join(f'<td>{html.escape(cell)}</td>' for cell in row) + '</tr>'
                     for row in report_rows(results))
    machine = results['machine']
    note = (f'Measured on {machine["device"]} ({machine["processor"]}, {machine["threads"]} '
            f'threads), torch {machine["torch"]}, input {results["input_shape"]}. Multiply-adds '
            'of the training form include the squeezing of all kernels once.')
    with written_whole(out) as path:
        path.write_text(_PAGE.format(title=html.escape(configs[0].stem), rows=rows,
                                     note=html.escape(note), **encoded), encoding='utf-8')
    return out


def _save(figure: Figure, path: Path) -> str:
    """Write a figure as PNG; returns it as a data URL."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format='png', dpi=100)
    with written_whole(path) as temporary:
        temporary.write_bytes(buffer.getvalue())
    return 'data:image/png;base64,' + base64.b64encode(buffer.getvalue()).decode()
