"""Read checkpoints safely, and check that they are whole."""

from __future__ import annotations

import io
import pickle
import re
import warnings
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, shortened
from .forms import FOLDED, is_folded, module_notes, with_module_notes

#: How files of other kinds begin, and what they are.
_OTHER_KINDS = (
    (rb'\s*<(!doctype|html|\?xml)', 'a web page: download the file itself'),
    (rb'version https://git-lfs', 'a pointer of Git LFS: fetch the file itself with git lfs pull'),
    (rb'\x89HDF', 'an HDF5 file, as Keras writes them'),
    (rb'.{8}\s*\{', 'a safetensors file: load it with safetensors.torch.load_file and save what it '
     'holds with torch.save'),
    (rb'\x1f\x8b', 'a gzip archive: unpack it'),
    (rb'.{257}ustar', 'a tar archive: unpack it; if PyTorch wrote it before version 0.4, load it '
     'with a PyTorch of that time and save it anew'),
    (rb'\x89PNG|\xff\xd8\xff|GIF8', 'an image'),
    (rb'\x08[\x01-\x14]\x12', 'an ONNX file'),
)
#: What can be done about a file that is damaged.
_ANEW = 'copy or download it again'
#: Bytes that a packed part of an archive may have unpacked, for each that it has packed. Deflate
#: reaches 1032, weights about 1.1.
_LARGEST_RATIO = 200
_SMALL = 1 << 24


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint file without running code from it.

    Args:
        path: A local file written by `torch.save`; `~` is the home folder.

    Returns:
        The dictionary that it holds, on the CPU; see `read_file`.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If the file is damaged, holds anything but tensors and
            the plain data of a runner's checkpoint, or no weights with values; or
            if what is said under `meta` is not of the kind that a runner writes.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        raise FileNotFoundError(f'the checkpoint {path} is a folder: give a file in it')
    if not path.is_file():
        raise FileNotFoundError(f'there is no checkpoint {path}')
    checkpoint = read_file(path)
    if not isinstance(checkpoint, dict):
        raise CheckpointError(f'{path} holds an object of type {type(checkpoint).__name__}, not a '
                              'checkpoint: give a file with a state dict')
    try:
        state = model_state_dict(checkpoint)
        empty = [key for key, value in state.items() if value.is_meta]
        if empty:
            raise CheckpointError(f'{shortened(empty)} is no ordinary tensor with values, but one '
                                  'of the meta device: save the model with its values')
        if 'state_dict' in checkpoint:
            _require_sound_meta(checkpoint.get('meta'))
    except CheckpointError as error:
        raise CheckpointError(f'{path}: {error}') from error
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
        What it holds. A folded form of version 0.2.0 gets the key that tells it.

    Raises:
        CheckpointError: If the file is damaged, or holds anything but tensors
            and the plain data of a runner's checkpoint.
    """
    source = _verified(Path(path))
    try:
        with warnings.catch_warnings():
            # of a file that no torch.save wrote; it is refused anyway
            warnings.filterwarnings('ignore', message='Detected pickle protocol')
            content = torch.load(source, map_location=map_location, weights_only=weights_only)
    except pickle.UnpicklingError as error:
        _require_known_kind(path)
        raise CheckpointError(f'{path} was not loaded, because it is damaged or holds more than '
                              f'tensors and plain data: {_reason(error)}. {_ANEW.capitalize()}, or '
                              'let who made it save the weights alone, as a state_dict') from error
    except OSError:
        raise
    except Exception as error:  # an old file has no checksums: its damage may show as anything
        _require_known_kind(path)
        raise CheckpointError(f'{path} could not be read, it may be damaged or no PyTorch '
                              f'checkpoint: {type(error).__name__}: {error}; {_ANEW}') from error
    if isinstance(content, dict):
        meta, state = content.get('meta'), content.get('state_dict')
        if isinstance(state, Mapping):
            require_names(state, f'{path} cannot be used: ')
            if (isinstance(meta, Mapping) and meta.get('form') == 'folded'
                    and isinstance(state, dict) and not is_folded(state)):
                state[FOLDED] = torch.tensor(True)
    return content


def model_state_dict(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights in a checkpoint, whichever common form it has.

    Args:
        checkpoint: A state dict, or a dictionary with one under `state_dict`;
            every key may have the prefix `module.`.

    Returns:
        The state dict, without that prefix.

    Raises:
        CheckpointError: If there are no tensors in it, or a key is no name.
    """
    if not isinstance(checkpoint, Mapping):
        raise CheckpointError(f'this is a {type(checkpoint).__name__}, not a checkpoint')
    state = checkpoint.get('state_dict', checkpoint)
    if not isinstance(state, Mapping):
        raise CheckpointError('the checkpoint has no dictionary under state_dict')
    tensors = [key for key, value in state.items() if isinstance(value, Tensor)]
    if not tensors:
        named = ', '.join(str(key) for key in list(state)[:5])
        raise CheckpointError('the checkpoint holds no model weights'
                              + (f', only {named}' if named else ', nothing at all')
                              + ': give a state dict, or a dictionary with one under state_dict')
    require_names(state)
    wrapped = all(key.startswith('module.') for key in tensors)
    return below(state, 'module.' if wrapped else '')


def require_names(state_dict: Collection[Any], where: str = '') -> None:
    """Refuse a state dict with a key that is no name.

    Args:
        state_dict: Its keys are looked at.
        where: Begins the error.

    Raises:
        CheckpointError: If a key is no string; it is named.
    """
    wrong = [key for key in state_dict if not isinstance(key, str)]
    if wrong:
        raise CheckpointError(f'{where}the key {wrong[0]!r} is no name of a tensor, as all keys of '
                              'a state dict must be')


def below(state_dict: Mapping[str, Any], prefix: str) -> dict[str, Tensor]:
    """The tensors whose keys begin with a prefix, without it.

    Args:
        state_dict: It may hold more than tensors.
        prefix: Empty, or with a dot at its end.

    Returns:
        The state dict of that part of the model. It keeps the versions of the
        modules, by which their code knows the names of older files.
    """
    return with_module_notes(
        {key.removeprefix(prefix): value for key, value in state_dict.items()
         if isinstance(value, Tensor) and key.startswith(prefix)},
        {f'{name}.'.removeprefix(prefix).rstrip('.'): value
         for name, value in module_notes(state_dict).items()
         if not prefix or f'{name}.'.startswith(prefix)})


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
    if value.is_floating_point() and not is_finite(value):
        raise CheckpointError(f'{key} holds values that are not finite (NaN or Inf)')


def is_finite(value: Tensor) -> bool:
    """Whether all values are; without a tensor as large as this one, where PyTorch lets.

    Args:
        value: Of any shape, dense.
    """
    if value.numel() == 0:
        return True
    # what repeats values without holding them may be of any size
    value = value[tuple(slice(None if step else 1) for step in value.stride())]
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
            _require_reasonable_size(path, members)
            _require_pytorchs_archive(path, [member.filename for member in members])
            if len(members) == 1:  # torch.hub reads these, and so did MMEngine
                return io.BytesIO(archive.read(members[0]))
            damaged = archive.testzip() if any(member.CRC for member in members) else None
            # PyTorch's reader leaves out, silently, what is marked as a folder
            folders = [member.filename for member in members
                       if member.external_attr & 0x10 and not member.is_dir()]
    except CheckpointError:
        raise
    except Exception as error:  # zipfile raises many things of an archive that is not whole
        raise CheckpointError(f'{path} is damaged ({type(error).__name__}: {error}); {_ANEW}'
                              ) from error
    if damaged or folders:
        raise CheckpointError(f'{path} is damaged: in it {damaged or folders[0]} is not as it was '
                              f'written; {_ANEW}')
    return path


def _require_reasonable_size(path: Path, members: Collection[zipfile.ZipInfo]) -> None:
    """Refuse an archive that would fill the memory, before it is unpacked."""
    packed = sum(member.compress_size for member in members)
    unpacked = sum(member.file_size for member in members)
    if unpacked > max(_SMALL, _LARGEST_RATIO * packed):
        raise CheckpointError(f'{path} is not unpacked: {unpacked / 1e6:.0f} MB would come out of '
                              f'{packed / 1e6:.1f} MB, which weights never do')


def _require_pytorchs_archive(path: Path, names: Collection[str]) -> None:
    """Refuse zip archives of other kinds that are known."""
    if any(name.endswith('/constants.pkl') for name in names):
        raise CheckpointError(f'{path} is a TorchScript archive, which is code, not a checkpoint: '
                              'give the state dict of the model that was exported')
    if names and all(name.endswith('.npy') for name in names):
        raise CheckpointError(f'{path} is a file of NumPy (npz), not a checkpoint of PyTorch: save '
                              'what it holds with torch.save')


def _require_known_kind(path: str | Path) -> None:
    """Say of a file that PyTorch does not read what it is, if its first bytes tell."""
    with Path(path).open('rb') as file:
        head = file.read(512)
    if not head:
        raise CheckpointError(f'{path} is damaged: it is empty; {_ANEW}')
    kind = next((kind for pattern, kind in _OTHER_KINDS
                 if re.match(pattern, head, re.DOTALL | re.IGNORECASE)), None)
    if kind:
        raise CheckpointError(f'{path} is no checkpoint of PyTorch, but {kind}')


def _require_sound_meta(meta: Any) -> None:
    """Refuse what a runner never writes beside the weights, and what others would fail at."""
    known = (meta or {}).get('dataset_meta') if isinstance(meta, (Mapping, type(None))) else None
    for name, value in (('meta', meta), ('dataset_meta', known)):
        if value is not None and not (isinstance(value, Mapping)
                                      and all(isinstance(key, str) for key in value)):
            raise CheckpointError(f'it has under {name} {_described(value)}, where a dictionary '
                                  'with names is expected: save it without')
    classes = (known or {}).get('classes')
    if not (classes is None or (isinstance(classes, (list, tuple))
                                and all(isinstance(name, str) for name in classes))):
        raise CheckpointError(f'it has under dataset_meta.classes {_described(classes)}, where a '
                              'list of names is expected: correct it, or save it without')


def _described(value: Any) -> str:
    return f'{type(value).__name__} {str(value)[:40]!r}'


def _reason(error: pickle.UnpicklingError) -> str:
    """What PyTorch refused, without its advice to load the file unsafely."""
    reason = (str(error).rpartition('WeightsUnpickler error: ')[2]
              .partition('\n\nCheck the documentation')[0].partition(' Please use')[0])
    return reason.strip().rstrip('.')
