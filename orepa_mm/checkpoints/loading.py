"""Load weights into models strictly: nothing stays at its random value.

Everything is checked before anything is written: a refused load leaves the
model as it was.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from mmengine.logging import print_log
from mmengine.model import PretrainedInit
from mmengine.runner import CheckpointLoader
from torch import Tensor, nn

from ..errors import CheckpointError, shortened
from .expansion import expanded_state_dict
from .forms import without_mark
from .guard import require_same_form
from .io import below, load_checkpoint, model_state_dict, require_values


def load_weights(model: nn.Module, path: str | Path) -> dict[str, Any]:
    """Load a checkpoint into a model, strictly.

    Args:
        model: The model; nothing in it is left at its initial value.
        path: A local checkpoint file.

    Returns:
        The whole checkpoint, for its `meta`.

    Raises:
        CheckpointError: If a key is missing or unknown, a shape differs, a
            tensor is not finite or not floating where the model's is, or the
            checkpoint is of another form than the model, see
            `require_same_form`: nothing is expanded here, where a model is
            tested or re-parameterized. The model is as it was.
    """
    checkpoint = load_checkpoint(path)
    state = model_state_dict(checkpoint)
    unused = _check(model, state, path)
    if unused:
        raise CheckpointError(f'{path} does not fit {type(model).__name__}, which has no '
                              f'{shortened(unused)}')
    model.load_state_dict(without_mark(state), strict=False)
    return checkpoint


def load_pretrained(module: nn.Module, source: str, prefix: str | None = None) -> None:
    """Load pretrained weights into a part of a model; nothing may stay at its random value.

    MMEngine alone would only warn of missing or misshapen weights. Weights that
    lie in no part of the module are left out, with a line in the log: the head
    of a classifier (`fc.*`), and whole stages if the module was built with fewer.
    Plain weights that meet a module in training form are expanded, see
    `expanded_state_dict`.

    Args:
        module: For example a backbone.
        source: As of `init_cfg=dict(type='Pretrained', checkpoint=...)`: a local
            file, or an address that MMEngine's loader knows.
        prefix: Only keys that begin with it are taken, without it.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If a key of the module is missing, a part of the module
            has not all the layers that the weights are for (those of a deeper
            network), a shape differs, a tensor is not finite or not floating
            where the module's is, the weights are of another form that is not
            expanded, see `require_same_form`, or a layer cannot generate its
            kernel, see `expanded_state_dict`. The module is as it was.
    """
    if '://' in source:
        checkpoint = CheckpointLoader.load_checkpoint(source, map_location='cpu')
    else:
        checkpoint = load_checkpoint(source)
    state: Mapping[str, Tensor] = model_state_dict(checkpoint)
    if prefix:
        prefix = prefix.rstrip('.') + '.'
        state = below(state, prefix)
        if not state:
            raise CheckpointError(f'{source} has no key that begins with {prefix}')
    with _named(source):
        state = expanded_state_dict(module, state, source)
    unused = _check(module, state, source)
    parts = {key.partition('.')[0] for key in module.state_dict()}
    of_other_layers = [key for key in unused if key.partition('.')[0] in parts]
    if of_other_layers:
        raise CheckpointError(f'{source} is of another network than {type(module).__name__}, '
                              f'which has no {shortened(of_other_layers)}')
    if unused:
        print_log(f'{source}: not used are {shortened(unused)}', 'current')
    module.load_state_dict(state, strict=False)


def pretrained_cfgs(init_cfg: Any) -> Iterator[Mapping[str, Any]]:
    """What an `init_cfg` loads, in whichever way a config says so.

    Args:
        init_cfg: As of MMEngine's modules: a dictionary, several, or None; its
            `type` a name, a name with its scope, or the class.

    Yields:
        The dictionaries of type `Pretrained`.
    """
    for cfg in [init_cfg] if isinstance(init_cfg, Mapping) else init_cfg or ():
        kind = cfg.get('type') if isinstance(cfg, Mapping) else None
        if (issubclass(kind, PretrainedInit) if isinstance(kind, type) else
                str(kind).rpartition('.')[2] in ('Pretrained', 'PretrainedInit')):
            yield cfg


def _check(module: nn.Module, state: Mapping[str, Tensor], source: str | Path) -> list[str]:
    """The keys that the module does not have; an error if what it has does not fit."""
    with _named(source):
        require_same_form(module, state)
    state = without_mark(state)
    twin = _without_memory(module)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings('ignore', message='.*copying from a non-meta parameter')
            result = twin.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise CheckpointError(f'{source} does not fit {type(module).__name__}. '
                              f'{_of_other_classes(module, state)}{error}') from error
    # as MMEngine: older files have no such counter, and it starts at 0
    missing = [key for key in result.missing_keys if not key.endswith('num_batches_tracked')]
    if missing:
        raise CheckpointError(
            f'{source} does not fit {type(module).__name__}: it has no {shortened(missing)}')
    _check_values(module, state, result.unexpected_keys, source)
    return list(result.unexpected_keys)


def _of_other_classes(module: nn.Module, state: Mapping[str, Tensor]) -> str:
    """A hint, where layers differ in nothing but their number of outputs."""
    own = module.state_dict()
    pairs = [(value.shape, own[key].shape) for key, value in state.items()
             if key in own and value.shape != own[key].shape]
    if not pairs or any(len(a) < 1 or a[1:] != b[1:] for a, b in pairs):
        return ''
    return ('It was trained with other classes than the config says: the number of outputs '
            'differs. A model that was trained on a folder of your own needs the same --data-root '
            'here; one of other classes needs its own config.\n')


def _without_memory(module: nn.Module) -> nn.Module:
    """A copy whose weights have shapes only: loading into it shows what fits, and writes nothing.

    The modules' own code, which knows the names of older files, has its say there.
    """
    def empty(tensor: Tensor) -> Tensor:
        shape = tensor.detach().to('meta')
        return nn.Parameter(shape, False) if isinstance(tensor, nn.Parameter) else shape

    weights = module.state_dict(keep_vars=True).values()
    return copy.deepcopy(module, {id(tensor): empty(tensor) for tensor in weights
                                  if isinstance(tensor, Tensor)})


def _check_values(module: nn.Module, state: Mapping[str, Tensor], unused: Collection[str],
                  source: str | Path) -> None:
    """Refuse tensors that are no weights, among those that would be written."""
    own = module.state_dict()
    unused = set(unused)
    for key, value in state.items():
        if key not in unused:
            with _named(source):
                require_values(key, value, own.get(key), type(module).__name__)


@contextlib.contextmanager
def _named(source: str | Path) -> Iterator[None]:
    """Let errors about weights begin with where they come from."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f'{source}: {error}') from error
