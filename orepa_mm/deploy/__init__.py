"""Re-parameterize a model, verify it, save it as the stock model."""

from .export import deploy_config, save_deployed
from .pipeline import (VerificationError, print_report, report_rows,
                       reparameterize_checkpoint)
from .reparameterize import is_training_form, reparameterize
from .verify import VerificationReport, verify

__all__ = ['VerificationError', 'VerificationReport', 'deploy_config', 'is_training_form',
           'print_report', 'report_rows', 'reparameterize', 'reparameterize_checkpoint',
           'save_deployed', 'verify']
