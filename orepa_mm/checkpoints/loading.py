"""Load weights into models strictly: nothing stays at its random value."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmengine.logging import print_log
from mmengine.runner import CheckpointLoader
from torch import nn

from ..errors import CheckpointError
from .guard import require_same_form
from .io import load_checkpoint, model_state_dict


def load_weights(model: nn.Module, path: str | Path) -> dict[str, Any]:
    """Load a checkpoint into a model, strictly.

    Args:
        model: The model; nothing in it is left at its initial value.
        path: A local checkpoint file.

    Returns:
        The whole checkpoint, for its `meta`.

    Raises:
        CheckpointError: If a key is missing or unknown, a shape differs, or the
            checkpoint is of another form than the model, see `require_same_form`.
    """
    checkpoint = load_checkpoint(path)
    state = model_state_dict(checkpoint)
    _require_same_form(model, state, path)
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise CheckpointError(f'{path} does not belong to this model. {error}') from error
    return checkpoint


def load_pretrained(module: nn.Module, source: str, prefix: str | None = None) -> None:
    """Load pretrained weights into a part of a model; nothing may stay at its random value.

    MMEngine alone would only warn of missing or misshapen weights.

    Args:
        module: For example a backbone.
        source: As of `init_cfg=dict(type='Pretrained', checkpoint=...)`: a local
            file, or an address that MMEngine's loader knows.
        prefix: Only keys that begin with it are taken, without it.

    Raises:
        CheckpointError: If a key of the module is missing, a shape differs, or
            the weights are of another form, see `require_same_form`.
    """
    if '://' in source:
        checkpoint = CheckpointLoader.load_checkpoint(source, map_location='cpu')
    else:
        checkpoint = load_checkpoint(source)
    state = model_state_dict(checkpoint)
    if prefix:
        prefix = prefix.rstrip('.') + '.'
        state = {key.removeprefix(prefix): value for key, value in state.items()
                 if key.startswith(prefix)}
        if not state:
            raise CheckpointError(f'{source} has no key that begins with {prefix}')
    _require_same_form(module, state, source)
    try:
        result = module.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise CheckpointError(f'{source} does not fit {type(module).__name__}. {error}') from error
    if result.missing_keys:
        raise CheckpointError(
            f'{source} does not fit {type(module).__name__}: it has no '
            f'{", ".join(result.missing_keys[:5])} ({len(result.missing_keys)} keys in all)')
    if result.unexpected_keys:
        print_log(f'{source}: not used are {", ".join(result.unexpected_keys)}', 'current')


def _require_same_form(model: nn.Module, state: Mapping[str, Any], source: str | Path) -> None:
    try:
        require_same_form(model, state)
    except CheckpointError as error:
        raise CheckpointError(f'{source}: {error}') from error
