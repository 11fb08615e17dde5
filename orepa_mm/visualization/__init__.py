"""Pictures: curves, detections of both forms, ranges of weights, the report of a run."""

from .curves import draw_curves, read_scalars
from .detections import draw_detections, load_forms
from .report import write_report
from .weight_ranges import draw_weight_ranges, write_benchmark

__all__ = ['draw_curves', 'draw_detections', 'draw_weight_ranges', 'load_forms', 'read_scalars',
           'write_benchmark', 'write_report']
