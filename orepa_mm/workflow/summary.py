"""The table of a re-parameterization, before and after."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .quantization_report import quantization_table

#: The columns: what a number of the report is of.
FORMS = ('training', 'deployed')
#: What the largest differences are called.
_KINDS = {'float32': 'largest relative output difference, float32',
          'tensors': 'largest relative difference of a tensor, to the float64 squeeze',
          # of reports that version 0.2.0 wrote
          'float64': 'largest relative output difference, float64, kernels not rounded',
          'rounding': 'largest relative output difference, by rounding of the kernels'}


def print_report(report: dict[str, Any], folder: str | Path) -> None:
    """Print the table of both forms, and what was written where.

    Args:
        report: From `reparameterize_checkpoint`.
        folder: Where it wrote.
    """
    console, folder = Console(width=None if sys.stdout.isatty() else 100), Path(folder)
    table = Table(title='before and after re-parameterization')
    table.add_column('', no_wrap=True)
    for heading in ('training form', f'deployed ({report["form"]})'):
        table.add_column(heading, justify='right')
    for row in report_rows(report):
        table.add_row(*row)
    console.print(table)
    if report['problems']:
        console.print('SAVED UNVERIFIED, as asked for. The two forms differ:', style='bold red')
        print('\n'.join(report['problems']))
    if report['warnings']:
        console.print('a metric moved, though every raw output and every layer agrees: on a small '
                      'set one rank that flips does that', style='bold yellow')
        print('\n'.join(report['warnings']))
    for note in report['notes']:
        print(f'note: {note}')
    dropped = ', '.join(f'{key} ({size / 1e6:.1f} MB)'
                        for key, size in report['dropped_bytes'].items())
    if dropped:
        print(f'left out of the checkpoint: {dropped}')
    needs = ('the stock model, which tests without orepa_mm' if report['form'] == 'plain'
             else 'BN folded; testing it needs orepa_mm installed')
    command = ['mim', 'test', report['package'], str(folder / 'config.py'), '--checkpoint',
               str(folder / 'model.pth')]
    print(f'saved {folder / "model.pth"} and {folder / "config.py"}: {needs}:\n'
          f'  {shlex.join(command)}')
    if 'onnx' in report:
        files = ', '.join(str(folder / name) for name in report['onnx']['files'])
        print(f'saved {files}: preprocessed images to raw outputs, any number of images'
              + (' of any size' if report['onnx']['dynamic_size'] else ' of one size '
                 f'({report["onnx"]["reason"]})'))
    if 'end2end' in report:
        found = report['end2end']
        print(f'saved {folder / found["file"]}: any number of images of {found["resize_height"]} x '
              f'{found["resize_width"]} pixels (resize: {found["resize"]}) to '
              + ', '.join(found['outputs']))
    if 'int8' in report:
        print(f'\n{quantization_table(report["int8"])}\n\nsaved '
              + ', '.join(str(folder / name) for name in report['int8']['files']))


def report_rows(report: dict[str, Any]) -> list[tuple[str, str, str]]:
    """The table of both forms as text: (quantity, training form, deployed).

    Args:
        report: From `reparameterize_checkpoint`.
    """
    rows = []
    metrics = report.get('metrics', {form: {} for form in FORMS})
    for name in metrics['training']:
        if metrics['training'][name] != -1:  # COCO's mark for: no such object
            rows.append((name, *(f'{metrics[form][name]:.4f}' for form in FORMS)))
    for name, key, unit, digits in (('parameters (M)', 'parameters', 1e6, 2),
                                    ('multiply-adds (G)', 'multiply_adds', 1e9, 2),
                                    ('checkpoint file (MB)', 'file_bytes', 1e6, 1),
                                    ('latency, median (ms)', 'latency_ms', 1, 1)):
        if key in report:  # nothing runs without a test image
            rows.append((name, *(f'{report[key][form] / unit:.{digits}f}' for form in FORMS)))
    for kind, error in report['largest_difference'].items():
        rows.append((_KINDS[kind], '', f'{error:.1e}'))
    tensors = report['verification'].get('tensors') or report['verification']['layers']
    if tensors['compared']:
        agreed = tensors['compared'] - len(tensors['failed'])
        rows.append(('tensors that agree', '', f'{agreed} of {tensors["compared"]}'))
    if 'onnx' in report:
        rows.append(('the same of ONNX Runtime to PyTorch, float32', '',
                     f'{report["onnx"]["largest"]:.1e}'))
        boxes = report['onnx']['boxes']
        if boxes:
            rows.append(('final boxes that ONNX Runtime finds as well', '',
                         f'{boxes["matched"]} of {boxes["boxes"]}'))
    if 'end2end' in report:
        rows += _end2end_rows(report['end2end'])
    return rows


def _end2end_rows(found: dict[str, Any]) -> list[tuple[str, str, str]]:
    rows = [(f'end-to-end ONNX file: {name}', '', f'{value:.4f}')
            for name, value in found.get('metrics', {}).items() if value != -1]
    if found['boxes']:
        rows.append(('final boxes that the end-to-end ONNX file finds as well', '',
                     f'{found["boxes"]["matched"]} of {found["boxes"]["boxes"]}'))
    elif found['pixels']:
        rows.append(('pixels that the end-to-end ONNX file labels otherwise', '',
                     f'{found["pixel_flips"]} of {found["pixels"]}'))
    else:
        rows.append(('largest difference of a probability of the end-to-end ONNX file', '',
                     f'{found["probability_difference"]:.1e}'))
    return rows
