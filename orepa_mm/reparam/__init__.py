"""A model there and back: re-parameterize it, fold its BN, verify that nothing changed."""

from .expand import expand
from .fold import fold_batch_norm
from .reparameterize import is_training_form, reparameterize, unwrapped
from .verification_report import VerificationReport
from .verify import verify

__all__ = ['VerificationReport', 'expand', 'fold_batch_norm', 'is_training_form',
           'reparameterize', 'unwrapped', 'verify']
