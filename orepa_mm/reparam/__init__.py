"""A model there and back: re-parameterize it, fold its BN, verify that nothing changed."""

from .fold import fold_batch_norm
from .reparameterize import is_training_form, reparameterize, unwrapped
from .verify import VerificationReport, verify

__all__ = ['VerificationReport', 'fold_batch_norm', 'is_training_form', 'reparameterize',
           'unwrapped', 'verify']
