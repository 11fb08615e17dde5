"""Read checkpoints safely, and check that they are whole."""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from .forms import note, noted


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint file without running code from it.

    Args:
        path: A local file written by `torch.save`; `~` is the home folder.

    Returns:
        The dictionary that it holds, on the CPU; see `read_file`.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If the file is damaged, holds anything but tensors and
            the plain data of a runner's checkpoint, or is no dictionary.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f'there is no checkpoint {path}')
    checkpoint = read_file(path)
    if not isinstance(checkpoint, dict):
        raise CheckpointError(f'{path} holds a {type(checkpoint).__name__}, not a checkpoint')
    return checkpoint


def read_file(path: str | Path, map_location: Any = 'cpu', weights_only: bool | None = True) -> Any:
    """Read a file of `torch.save`, if its checksums are right.

    PyTorch itself does not compare them: a flipped bit would be another
    weight. Files of its old format (before 1.6, no zip archive) and files saved
    with `torch.serialization.set_crc32_options(False)` have no checksums: in
    these a changed value is not noticed.

    Args:
        path: The file.
        map_location: As of `torch.load`.
        weights_only: As of `torch.load`: None leaves it to PyTorch, which is
            safe unless the user sets `TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD`.

    Returns:
        What it holds. If that is a checkpoint whose `meta` names its form, the
        state dict carries it, see `noted`.

    Raises:
        CheckpointError: If the file is damaged, or holds anything but tensors
            and the plain data of a runner's checkpoint.
    """
    source = _verified(Path(path))
    try:
        content = torch.load(source, map_location=map_location, weights_only=weights_only)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f'{path} was not loaded, because it is damaged or holds more than '
                              f'tensors and plain data: {_reason(error)}') from error
    except OSError:
        raise
    except Exception as error:  # an old file has no checksums: its damage may show as anything
        raise CheckpointError(f'{path} could not be read, it may be damaged or no PyTorch '
                              f'checkpoint: {type(error).__name__}: {error}') from error
    if isinstance(content, dict):
        meta, state = content.get('meta'), content.get('state_dict')
        if isinstance(meta, Mapping) and meta.get('form') and isinstance(state, dict):
            content['state_dict'] = note(state, form=meta['form'])
    return content


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
    if not isinstance(checkpoint, Mapping):
        raise CheckpointError(f'this is a {type(checkpoint).__name__}, not a checkpoint')
    state = checkpoint.get('state_dict', checkpoint)
    if not isinstance(state, Mapping):
        raise CheckpointError('the checkpoint has no dictionary under state_dict')
    tensors = [key for key, value in state.items() if isinstance(value, Tensor)]
    if not tensors:
        raise CheckpointError('the checkpoint holds no model weights')
    wrapped = all(key.startswith('module.') for key in tensors)
    return below(state, 'module.' if wrapped else '')


def below(state_dict: Mapping[str, Any], prefix: str) -> dict[str, Tensor]:
    """The tensors whose keys begin with a prefix, without it.

    Args:
        state_dict: It may hold more than tensors.
        prefix: Empty, or with a dot at its end.

    Returns:
        The state dict of that part of the model. It keeps the versions of the
        modules, by which their code knows the names of older files, and the
        notes about the checkpoint.
    """
    part = OrderedDict((key.removeprefix(prefix), value) for key, value in state_dict.items()
                       if isinstance(value, Tensor) and key.startswith(prefix))
    versions = getattr(state_dict, '_metadata', None) or {}
    part._metadata = OrderedDict(
        (f'{name}.'.removeprefix(prefix).rstrip('.'), value) for name, value in versions.items()
        if not prefix or f'{name}.'.startswith(prefix))
    notes = {name: noted(state_dict, name) for name in ('form', 'source')}
    return note(part, **notes) if any(notes.values()) else part


def require_values(key: str, value: Tensor, own: Tensor | None, owner: str) -> None:
    """Refuse a tensor that is no weight.

    Args:
        key: What it is called.
        value: The tensor.
        own: The tensor of the model that it is for, whose type tells what is needed.
        owner: What to call the model.

    Raises:
        CheckpointError: If it is no ordinary tensor with values, not floating
            where the model's is, or not finite.
    """
    if value.layout is not torch.strided or value.is_quantized or value.is_meta:
        raise CheckpointError(f'{key} is no ordinary tensor with values')
    if own is not None and own.is_floating_point() and not value.is_floating_point():
        raise CheckpointError(f'{key} is of type {value.dtype}, where {owner} has {own.dtype}')
    if value.is_floating_point() and not _is_finite(value):
        raise CheckpointError(f'{key} holds values that are not finite (NaN or Inf)')


def _is_finite(value: Tensor) -> bool:
    """Whether all values are; without a tensor as large as this one, where PyTorch lets."""
    if value.numel() == 0:
        return True
    try:
        return all(bound.isfinite().item() for bound in value.aminmax())
    except (NotImplementedError, RuntimeError):  # 8 bits
        return bool(value.float().isfinite().all())


def _verified(path: Path) -> Path | io.BytesIO:
    """The file, if its checksums are right; the one file in it, if that was zipped by hand."""
    with path.open('rb') as file:
        if file.read(4) != b'PK\x03\x04':  # PyTorch's own test
            return path
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            if len(members) == 1:  # torch.hub reads these, and so did MMEngine
                return io.BytesIO(archive.read(members[0]))
            damaged = archive.testzip() if any(member.CRC for member in members) else None
            # PyTorch's reader leaves out, silently, what is marked as a folder
            folders = [member.filename for member in members
                       if member.external_attr & 0x10 and not member.is_dir()]
    except Exception as error:  # zipfile raises many things of an archive that is not whole
        raise CheckpointError(f'{path} is damaged: {type(error).__name__}: {error}') from error
    if damaged or folders:
        raise CheckpointError(f'{path} is damaged: in it {damaged or folders[0]} is not as it was '
                              'written')
    return path


def _reason(error: pickle.UnpicklingError) -> str:
    """What PyTorch refused, without its advice to load the file unsafely."""
    return (str(error).rpartition('WeightsUnpickler error: ')[2]
            .partition('\n\nCheck the documentation')[0].partition(' Please use')[0].strip())
