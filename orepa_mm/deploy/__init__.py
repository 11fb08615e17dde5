"""Re-parameterize a model, verify it, save it as the stock model."""

from .convert import CONVERTED_FORMS, Conversion, convert_checkpoint_file
from .export import DEPLOYED_FORMS, deploy_config, save_deployed
from .fold import fold_batch_norm
from .pipeline import VerificationError, reparameterize_checkpoint
from .reparameterize import NothingToConvertError, is_training_form, reparameterize
from .summary import print_report, report_rows
from .verify import VerificationReport, verify

__all__ = ['CONVERTED_FORMS', 'DEPLOYED_FORMS', 'Conversion', 'NothingToConvertError',
           'VerificationError', 'VerificationReport',
           'convert_checkpoint_file', 'deploy_config', 'fold_batch_norm', 'is_training_form',
           'print_report', 'reparameterize', 'reparameterize_checkpoint', 'report_rows',
           'save_deployed', 'verify']
