"""Re-parameterize a model, verify it, save it, export it, measure it."""

from .benchmark import Benchmark, benchmark_config
from .benchmark_table import print_benchmark
from .convert import CONVERTED_FORMS, Conversion, convert_checkpoint_file
from .export import DEPLOYED_FORMS, deploy_config, save_deployed
from .fold import fold_batch_norm
from .onnx import OnnxExport, OnnxExportError, OnnxReport, compare_onnx, export_onnx
from .pipeline import VerificationError, reparameterize_checkpoint
from .reparameterize import NothingToConvertError, is_training_form, reparameterize
from .summary import print_report, report_rows
from .verify import VerificationReport, verify

__all__ = ['CONVERTED_FORMS', 'DEPLOYED_FORMS', 'Benchmark', 'Conversion',
           'NothingToConvertError', 'OnnxExport', 'OnnxExportError', 'OnnxReport',
           'VerificationError', 'VerificationReport', 'benchmark_config', 'compare_onnx',
           'convert_checkpoint_file', 'deploy_config', 'export_onnx', 'fold_batch_norm',
           'is_training_form', 'print_benchmark', 'print_report', 'reparameterize',
           'reparameterize_checkpoint', 'report_rows', 'save_deployed', 'verify']
