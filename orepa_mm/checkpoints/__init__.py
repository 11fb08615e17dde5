"""Checkpoints: safe reading, strict loading, forms told apart, the authors' names."""

from .architectures import PUBLISHED, Architecture, recognize_architecture
from .expansion import expanded_state_dict
from .guard import require_same_form
from .io import load_checkpoint, model_state_dict
from .loading import load_pretrained, load_weights, pretrained_cfgs
from .official import convert_official_block, convert_official_state_dict, read_classifier
from .safe_globals import allow_runner_checkpoints

__all__ = ['PUBLISHED', 'Architecture', 'allow_runner_checkpoints',
           'convert_official_block', 'convert_official_state_dict', 'expanded_state_dict',
           'load_checkpoint', 'load_pretrained', 'load_weights',
           'model_state_dict', 'pretrained_cfgs', 'read_classifier', 'recognize_architecture',
           'require_same_form']

allow_runner_checkpoints()
