"""Re-parameterize a model, verify it, save it as the stock model."""

from .convert import CONVERTED_FORMS, Conversion, convert_checkpoint_file
from .export import deploy_config, save_deployed
from .measure import benchmark_backbone
from .pipeline import VerificationError, print_report, reparameterize_checkpoint, report_rows
from .reparameterize import NothingToConvertError, is_training_form, reparameterize
from .verify import VerificationReport, verify

__all__ = ['CONVERTED_FORMS', 'Conversion', 'NothingToConvertError', 'VerificationError',
           'VerificationReport', 'benchmark_backbone', 'convert_checkpoint_file',
           'deploy_config', 'is_training_form', 'print_report',
           'reparameterize', 'reparameterize_checkpoint', 'report_rows', 'save_deployed',
           'verify']
