"""Read checkpoints safely."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint file without running code from it.

    Args:
        path: A local file written by `torch.save`.

    Returns:
        The dictionary that it holds, on the CPU.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If the file is damaged, holds anything but tensors and
            the plain data of a runner's checkpoint, or is no dictionary.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f'there is no checkpoint {path}')
    try:
        checkpoint = torch.load(path, map_location='cpu', weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f'{path} was not loaded, because it is damaged or holds more than '
                              f'tensors and plain data: {error}') from error
    except (RuntimeError, EOFError) as error:
        raise CheckpointError(f'{path} is damaged, or no PyTorch checkpoint: {error}') from error
    if not isinstance(checkpoint, dict):
        raise CheckpointError(f'{path} holds a {type(checkpoint).__name__}, not a checkpoint')
    return checkpoint


def model_state_dict(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights in a checkpoint, whichever common form it has.

    Args:
        checkpoint: A state dict, or a dictionary with one under `state_dict`;
            every key may have the prefix `module.`.

    Returns:
        The state dict, without that prefix.

    Raises:
        CheckpointError: If there are no tensors in it.
    """
    state = checkpoint.get('state_dict', checkpoint)
    if not isinstance(state, Mapping):
        raise CheckpointError('the checkpoint has no dictionary under state_dict')
    state = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    if not state:
        raise CheckpointError('the checkpoint holds no model weights')
    if all(key.startswith('module.') for key in state):
        state = {key.removeprefix('module.'): value for key, value in state.items()}
    return state
