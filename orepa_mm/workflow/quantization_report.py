"""What int8 costs and gains, as text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..analysis.documents import markdown_table

#: Layers that are named one by one.
_NAMED = 8


def quantization_rows(report: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """The table of both networks as text: (quantity, float, int8).

    Args:
        report: From `quantize_deployed`.
    """
    kinds, metrics = ('float', 'int8'), report['metrics']
    rows = [(name, *(_number(metrics[kind].get(name)) for kind in kinds))
            for name, value in metrics['float'].items() if value != -1]  # COCO: no such object
    rows += [(name, *(f'{report[key][kind] / unit:.{digits}f}' for kind in kinds))
             for name, key, unit, digits in (('ONNX files (MB)', 'file_bytes', 1e6, 2),
                                             ('latency, median (ms)', 'latency_ms', 1, 1))
             if key in report]
    return [*rows, ('layers in float', 'all',
                    f'{len(report["float_layers"])} of {len(report["layers"])}')]


def quantization_table(report: Mapping[str, Any]) -> str:
    """Both networks, the trials of the search, the methods, and the layers with most noise.

    Args:
        report: From `quantize_deployed`.

    Returns:
        Markdown.
    """
    judged = report['metric'].split(' and ')
    parts = [markdown_table(['', 'float', 'int8'], quantization_rows(report)),
             markdown_table(['layers in float', 'drop', *judged], [
                 (str(trial['float_layers']), _number(trial['drop']),
                  *(_number(trial[name]) for name in judged)) for trial in report['search']]),
             markdown_table(['outputs of', *next(iter(report['snr'].values()))], [
                 (graph, *(f'{ratio:.1f} dB' for ratio in ratios.values()))
                 for graph, ratios in report['snr'].items()], left=['outputs of']),
             markdown_table(['layer', 'alone', 'here', 'in'], [
                 (noise['layer'], f'{noise["alone"]:.1f} dB', f'{noise["here"]:.1f} dB',
                  'float' if noise['layer'] in report['float_layers'] else 'int8')
                 for noise in report['layers'][:_NAMED]], left=['layer'])]
    return '\n\n'.join([*parts, *(f'note: {note}' for note in report['notes'])])


def _number(value: float | None) -> str:
    return '' if value is None else f'{value:.4f}'
