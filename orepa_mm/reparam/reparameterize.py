"""Re-parameterize a whole model: the stock network that computes the same."""

from __future__ import annotations

import copy
import functools
import logging
import weakref
from collections import Counter

from mmengine.logging import print_log
from mmengine.model import is_model_wrapper
from torch import nn

from ..backbones import ReparamBackboneMixin
from ..errors import NothingToConvertError
from ..layers import reparam_layers, replace_with_conv2d
from .fold import fold_batch_norm


def reparameterize(model: nn.Module, inplace: bool = False, fold_bn: bool = False) -> nn.Module:
    """Replace every layer that generates its kernel by the convolution it equals.

    Kernels are squeezed in float64. Dtype, device, memory format, training
    flag and `requires_grad` are kept. A model that is already in deploy form
    is returned as it is (folded, if that is asked for). Wrappers of
    `torch.compile` and of distributed training are taken off: they belong to
    the layers that are gone.

    Args:
        model: Any module; it may be such a layer itself, or wrapped.
        inplace: Change the given model. Otherwise a deep copy is changed.
        fold_bn: Fold every BN into the convolution before it as well, see
            `fold_batch_norm`.

    Returns:
        The model in deploy form. In place as well, use what is returned: a
        single layer cannot replace itself, nor a wrapper be taken off.

    Raises:
        NothingToConvertError: If there is nothing to convert and the model was
            not converted before either. It is a `ValueError`.
        ValueError: If the parameters are sharded (FSDP).

    Example:
        >>> from torch import nn
        >>> from orepa_mm.layers import OREPAConv2d
        >>> reparameterize(nn.Sequential(OREPAConv2d(3, 8, 3, padding=1)))[0]
        Conv2d(3, 8, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))
    """
    model = unwrapped(model)
    counts = Counter(type(layer).__name__ for layer in reparam_layers(model))
    if not counts and not any(_is_converted(module) for module in model.modules()):
        raise NothingToConvertError(
            f'{type(model).__name__} has no OREPA or DBB layer: there is nothing to '
            "re-parameterize. Was it built with conv_cfg=dict(type='OREPA') or an OREPA "
            'backbone?')
    if not inplace:
        model = copy.deepcopy(model)
    _unwrap_inside(model)
    if counts:
        for module in list(model.modules()):
            if isinstance(module, ReparamBackboneMixin):
                module.switch_to_deploy()  # it may have more to fuse than its layers
        model = replace_with_conv2d(model)
    folded = fold_batch_norm(model) if fold_bn else 0
    done = [f're-parameterized {n} {name}' for name, n in counts.items()]
    if folded:
        done.append(f'folded {folded} BN')
    print_log(', '.join(done) or f'{type(model).__name__} was re-parameterized before: left as '
              'it is', logger='current', level=logging.INFO)
    return model


def is_training_form(model: nn.Module) -> bool:
    """Whether any layer of the model still generates its kernel from branches.

    Args:
        model: Any module.
    """
    return next(reparam_layers(model), None) is not None


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside the wrappers of `torch.compile` and of distributed training.

    Args:
        model: Any module.

    Raises:
        ValueError: If the parameters are sharded (FSDP).
    """
    while True:
        if type(model).__name__.endswith(('FullyShardedDataParallel', 'FSDP')):
            raise ValueError(f'the parameters of a {type(model).__name__} are spread over '
                             'processes: load its full state dict into the bare model first')
        if hasattr(model, '_orig_mod'):  # torch.compile
            model = model._orig_mod
        elif is_model_wrapper(model):
            model = model.module
        else:
            return model


def _unwrap_inside(model: nn.Module) -> None:
    """Take wrappers off all children, and wrapped methods off all modules, in place.

    `torch.compile` and FairScale's activation checkpointing put a function
    that holds on to its module before the class's method: in a copy it would
    go on calling the original.
    """
    for module in list(model.modules()):
        for name, child in list(module._modules.items()):
            if child is not None:
                module._modules[name] = unwrapped(child)
        for name, value in list(vars(module).items()):
            if hasattr(type(module), name) and _holds_its_module(value):
                delattr(module, name)


def _holds_its_module(function: object) -> bool:
    return hasattr(function, '_torchdynamo_orig_callable') or (
        isinstance(function, functools.partial)
        and any(isinstance(argument, weakref.ref) for argument in function.args))


def _is_converted(module: nn.Module) -> bool:
    """Whether this module came out of a re-parameterization or was built deployed."""
    if isinstance(module, ReparamBackboneMixin):
        return module.deploy
    return getattr(module, 'reparameterized', False)
