"""Pictures: curves, detections of both forms, the report of a run."""

from .curves import draw_curves, read_scalars
from .detections import draw_detections, load_forms
from .report import write_report

__all__ = ['draw_curves', 'draw_detections', 'load_forms', 'read_scalars', 'write_report']
