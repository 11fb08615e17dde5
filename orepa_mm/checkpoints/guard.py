"""A checkpoint of one form does not load into a model of another.

MMEngine would warn of missing keys, leave random weights, and go on.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import CheckpointError, shortened
from ..layers import reparam_layers
from .expansion import (
    folded_layers,
    has_plain_kernel,
    named_layers,
    without_wrappers,
)
from .forms import is_branch_key, is_folded, is_in_authors_names

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
        'To use the checkpoint as it is, take the config that lies beside it (or deploy=True in '
        'the backbone). To train on from it with OREPA, give it as load_from or in init_cfg: '
        'there it is expanded. A run cannot be resumed from it: the state of its optimizer is '
        'that of other parameters. DBB blocks and the blocks of a deployed RepVGG have a BN in '
        'each branch, which a kernel does not tell: they need a checkpoint in training form',
    ('folded', 'training'):
        'The BN cannot be told from folded weights. Use the config that lies beside the '
        'checkpoint; to train on with OREPA, give the plain form as load_from or in init_cfg, '
        'where it is expanded: the stock checkpoint, or what is written from a checkpoint in '
        'training form by\n' + _REPARAM.format(''),
    ('folded', 'plain'): 'Use the config that lies beside it, or write the plain form from the '
                         'checkpoint in training form:\n' + _REPARAM.format(''),
    ('plain', 'folded'): 'Use the config that lies beside it, or write the folded form from the '
                         'checkpoint in training form:\n' + _REPARAM.format(' --form folded'),
}


def require_same_form(model: nn.Module, state_dict: Mapping[str, Any]) -> None:
    """Refuse weights of another form than the model's, and half a re-parameterizable layer.

    The forms: `training` (branches), `plain` (re-parameterized: the stock
    model) and `folded` (BN folded as well). Weights that have nothing to do
    with the model's re-parameterizable layers are none of this function's
    business, nor are missing keys of other parts. A model without such layers
    and without folded BN may load whatever it likes, but for branches.

    Folded weights are known by the key that each folded BN leaves (`folded_norm`);
    in files of version 0.2.0 by what `meta` says of them.

    Args:
        model: The model, maybe wrapped.
        state_dict: What is to be loaded into it.

    Raises:
        CheckpointError: If the forms differ, the names are those of the
            authors' code, or a layer in training form would get some of its
            tensors but not all (missing, or of another shape), or a plain kernel
            beside them. It names the forms or the tensors, a layer, and what
            mends it.
    """
    model = without_wrappers(model)
    tensors = {key: value for key, value in state_dict.items() if isinstance(value, Tensor)}
    layers = set(reparam_layers(model))
    folded = _folded_norms(model)
    written_as_folded = is_folded(tensors)
    if not (layers or folded or written_as_folded or any(map(is_branch_key, tensors))):
        return
    found = (_mismatch_of_branches(model, layers, 'folded' if folded else 'plain', tensors)
             or _mismatch_of_folding(model, folded, written_as_folded, tensors))
    if found:
        theirs, ours, layer = found
        raise CheckpointError(
            f'the checkpoint is in {theirs} form, but the model is in {ours} form (at {layer}). '
            + _FIXES[theirs, ours])
    if is_in_authors_names(tensors) and not tensors.keys() & model.state_dict().keys():
        raise CheckpointError(
            "the checkpoint is in training form and in the names of the authors' code, which no "
            'model of OpenMMLab has. Convert it:\n'
            '  mim run orepa_mm convert_checkpoint CHECKPOINT CONVERTED')
    _require_whole_layers(model, tensors)


def _mismatch_of_branches(model: nn.Module, layers: Collection[nn.Module],
                          form: str, keys: Mapping[str, Tensor]) -> tuple[str, str, str] | None:
    """(form of the weights, form of the model, layer) if only one of them has branches.

    `form` is the model's where it has none.
    """
    folded = folded_layers(model, keys)
    with_branches = {prefix for key in keys if is_branch_key(key) for prefix in _prefixes(key)}
    inside = {module for layer in layers for module in layer.modules()}
    for name, module in model.named_modules():
        parent, _, last = name.rpartition('.')
        if module in layers and name not in with_branches:
            block = parent.rpartition('.')[0] if parent.endswith(_REPVGG_TRAINING) else None
            prefix = f'{name}.' if name else ''
            # one of another shape is that of another network
            if has_plain_kernel(module, prefix, keys):
                return 'folded' if prefix in folded else 'plain', 'training', name or 'the layer'
            if block is not None and f'{block}.{_REPVGG_DEPLOYED}.weight' in keys:
                return 'plain', 'training', name
        elif isinstance(module, nn.Conv2d) and module not in inside and (
                f'{name}.weight' not in keys) and with_branches:
            if name in with_branches:
                return 'training', form, name
            if last == _REPVGG_DEPLOYED and f'{parent}.{_REPVGG_TRAINING}' in with_branches:
                return 'training', form, name
    return None


def _mismatch_of_folding(model: nn.Module, folded: Collection[str], written_as_folded: bool,
                         keys: Collection[str]) -> tuple[str, str, str] | None:
    """(form of the keys, form of the model, layer) if only one of them has its BN folded."""
    for name in folded:
        if f'{name}.running_mean' in keys:
            return 'plain', 'folded', name
    if folded or not written_as_folded:
        return None
    modules = dict(model.named_modules())
    without_norm = any(isinstance(module, _BatchNorm) and f'{name}.running_mean' not in keys
                       for name, module in modules.items())
    extra = next((name for name, module in modules.items() if isinstance(module, nn.Conv2d)
                  and module.bias is None and f'{name}.bias' in keys), None)
    return ('folded', 'plain', extra) if without_norm and extra is not None else None


def _require_whole_layers(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Refuse a part of a layer's branches, the rest would stay at random; and a layer twice."""
    for prefix, layer in named_layers(model):
        name = prefix.rstrip('.') or 'the layer'
        # what a runner leaves at 0 where it is missing is no weight
        own = {key: tensor.shape for key, tensor in layer.state_dict(prefix=prefix).items()
               if not key.endswith('num_batches_tracked')}
        plain = f'{prefix}weight' in tensors
        if plain and not layer.branch_keys(prefix) & tensors.keys():
            continue  # of another shape, which MMEngine says
        missing = [key for key in own if key not in tensors]
        others = [key for key in own if key in tensors and tensors[key].shape != own[key]]
        if 0 < len(missing) + len(others) < len(own):
            raise CheckpointError(
                f'the checkpoint has only a part of {name}, which is in training '
                f'form ({type(layer).__name__}), and the rest would stay at its random value: '
                + '; '.join([f'there is no {shortened(missing)}'] * bool(missing)
                            + [f'size mismatch for {shortened(others)}'] * bool(others))
                + '. Give a whole checkpoint of this network, or leave the layer out of it')
        if plain and not missing:
            raise CheckpointError(f'the checkpoint has {name} twice: a plain kernel '
                                  f'({prefix}weight) and branches. Leave one of them out of it')


def _folded_norms(model: nn.Module) -> list[str]:
    """Names of what `fold_batch_norm` put in place of a BN."""
    return [name for name, module in model.named_modules()
            if getattr(module, 'folded_norm', False)]


def _prefixes(key: str) -> list[str]:
    parts = key.split('.')
    return ['.'.join(parts[:length]) for length in range(1, len(parts))]
