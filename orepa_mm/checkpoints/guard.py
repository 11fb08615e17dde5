"""A checkpoint of one form never loads into a model of another, anywhere in MMEngine.

MMEngine would warn of missing keys, leave random weights, and go on.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping
from typing import Any

import mmengine.runner
import mmengine.runner.checkpoint
from mmengine.model import BaseTTAModel, is_model_wrapper
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import CheckpointError
from ..layers import reparam_layers
from .forms import is_branch_key, is_in_authors_names

#: MMPretrain's RepVGG block: its one convolution when deployed, and what it is made from.
_REPVGG_DEPLOYED, _REPVGG_TRAINING = 'branch_reparam', 'branch_3x3'
_REPARAM = ('  mim run orepa_mm reparam TRAINING_CONFIG CHECKPOINT --out DIR{}\n'
            'and use DIR/config.py with DIR/model.pth')
#: What to do, by (form of the checkpoint, form of the model).
_FIXES = {
    ('training', 'plain'): 'Re-parameterize it with the config that it was trained with:\n'
                           + _REPARAM.format(''),
    ('training', 'folded'): 'Re-parameterize it with the config that it was trained with:\n'
                            + _REPARAM.format(' --form folded'),
    ('plain', 'training'):
        'The branches cannot be recovered from a kernel. Use the config that lies beside the '
        'checkpoint (or deploy=True in the backbone); to train on with OREPA, give the checkpoint '
        'in training form, or pretrained weights in training form:\n'
        '  mim run orepa_mm convert_checkpoint AUTHORS_FILE OUT',
    ('folded', 'plain'): 'Use the config that lies beside it, or write the plain form from the '
                         'checkpoint in training form:\n' + _REPARAM.format(''),
    ('plain', 'folded'): 'Use the config that lies beside it, or write the folded form from the '
                         'checkpoint in training form:\n' + _REPARAM.format(' --form folded'),
}


def require_same_form(model: nn.Module, state_dict: Mapping[str, Any]) -> None:
    """Refuse weights of another form than the model's.

    The forms: `training` (branches), `plain` (re-parameterized: the stock
    model) and `folded` (BN folded as well). Weights that have nothing to do
    with the model's re-parameterizable layers are none of this function's
    business, nor are missing keys of other parts.

    Args:
        model: The model, maybe wrapped.
        state_dict: What is to be loaded into it.

    Raises:
        CheckpointError: If the forms differ, or the names are those of the
            authors' code. It names both forms, a layer, and the command that
            mends it.
    """
    while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
        model = model.module
    keys = {key for key, value in state_dict.items() if isinstance(value, Tensor)}
    found = (_mismatch_of_branches(model, keys) or _mismatch_of_folding(model, keys))
    if found:
        theirs, ours, layer = found
        raise CheckpointError(
            f'the checkpoint is in {theirs} form, but the model is in {ours} form (at {layer}). '
            + _FIXES.get((theirs, ours), _FIXES['plain', 'training']))
    if is_in_authors_names(keys) and not keys & model.state_dict().keys():
        raise CheckpointError(
            "the checkpoint is in training form and in the names of the authors' code, which no "
            'model of OpenMMLab has. Convert it:\n'
            '  mim run orepa_mm convert_checkpoint CHECKPOINT CONVERTED')


def guard_mmengine() -> None:
    """Let MMEngine check the form wherever it loads weights: `load_from`, `init_cfg`, resume, EMA.

    It wraps the one function that all of these call. A second call does nothing.
    """
    load = mmengine.runner.checkpoint.load_state_dict
    if hasattr(load, 'checks_form'):
        return

    @functools.wraps(load)
    def checked(module: nn.Module, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        require_same_form(module, state_dict)
        return load(module, state_dict, *args, **kwargs)

    checked.checks_form = True
    mmengine.runner.checkpoint.load_state_dict = checked
    mmengine.runner.load_state_dict = checked


def _mismatch_of_branches(model: nn.Module, keys: Collection[str]) -> tuple[str, str, str] | None:
    """(form of the keys, form of the model, layer) if only one of them has branches."""
    with_branches = {prefix for key in keys if is_branch_key(key) for prefix in _prefixes(key)}
    layers = set(reparam_layers(model))
    inside = {module for layer in layers for module in layer.modules()}
    form = 'folded' if _folded_norms(model) else 'plain'
    for name, module in model.named_modules():
        parent, _, last = name.rpartition('.')
        if module in layers and name not in with_branches:
            block = parent.rpartition('.')[0] if parent.endswith(_REPVGG_TRAINING) else None
            if f'{name}.weight' in keys:
                return 'folded' if f'{name}.bias' in keys and module.bias is None else 'plain', \
                    'training', name
            if block is not None and f'{block}.{_REPVGG_DEPLOYED}.weight' in keys:
                return 'plain', 'training', name
        elif isinstance(module, nn.Conv2d) and module not in inside and (
                f'{name}.weight' not in keys) and with_branches:
            if name in with_branches:
                return 'training', form, name
            if last == _REPVGG_DEPLOYED and f'{parent}.{_REPVGG_TRAINING}' in with_branches:
                return 'training', form, name
    return None


def _mismatch_of_folding(model: nn.Module, keys: Collection[str]) -> tuple[str, str, str] | None:
    """(form of the keys, form of the model, layer) if only one of them has its BN folded."""
    for name in _folded_norms(model):
        if f'{name}.running_mean' in keys:
            return 'plain', 'folded', name
    if any(key.endswith('.running_mean') for key in keys):
        return None  # a stock model of which some convolutions have a bias, where ours have a BN
    missing = any(isinstance(module, _BatchNorm) for module in model.modules())
    extra = next((name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)
                  and module.bias is None and f'{name}.bias' in keys), None)
    return ('folded', 'plain', extra) if missing and extra is not None else None


def _folded_norms(model: nn.Module) -> list[str]:
    """Names of what `fold_batch_norm` put in place of a BN."""
    return [name for name, module in model.named_modules()
            if getattr(module, 'folded_norm', False)]


def _prefixes(key: str) -> list[str]:
    parts = key.split('.')
    return ['.'.join(parts[:length]) for length in range(1, len(parts))]
