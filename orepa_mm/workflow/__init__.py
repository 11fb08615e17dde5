"""Whole jobs, each one call: deploy or expand a checkpoint, predict, write the report of a run."""

from .deploy import reparameterize_checkpoint
from .dry_run import DryRunStep, dry_run
from .expand import Expansion, expand_checkpoint
from .loading import load, load_model, split_model_arguments
from .onnx_model import load_onnx
from .predict import Predictions, predict
from .quantization import quantize_deployed
from .report import write_report
from .summary import print_report, report_rows

__all__ = ['DryRunStep', 'Expansion', 'Predictions', 'dry_run', 'expand_checkpoint', 'load',
           'load_model', 'load_onnx', 'predict', 'print_report', 'quantize_deployed',
           'reparameterize_checkpoint', 'report_rows', 'split_model_arguments', 'write_report']
