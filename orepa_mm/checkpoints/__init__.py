"""Checkpoints: safe reading, strict loading, atomic writing, the authors' names."""

from .io import (
    CheckpointError,
    load_checkpoint,
    load_pretrained,
    load_weights,
    model_state_dict,
    written_whole,
)
from .official import convert_checkpoint_file, convert_official_block, convert_official_state_dict
from .safe_globals import allow_runner_checkpoints

__all__ = ['CheckpointError', 'allow_runner_checkpoints', 'convert_checkpoint_file',
           'convert_official_block', 'convert_official_state_dict', 'load_checkpoint',
           'load_pretrained', 'load_weights', 'model_state_dict', 'written_whole']

allow_runner_checkpoints()
