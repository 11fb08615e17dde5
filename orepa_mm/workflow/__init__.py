"""Whole jobs, each one call: deploy a checkpoint, expand one, write the report of a run."""

from .deploy import reparameterize_checkpoint
from .expand import Expansion, expand_checkpoint
from .report import write_report
from .summary import print_report, report_rows

__all__ = ['Expansion', 'expand_checkpoint', 'print_report', 'reparameterize_checkpoint',
           'report_rows', 'write_report']
