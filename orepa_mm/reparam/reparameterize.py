"""Re-parameterize a whole model: the stock network that computes the same."""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from mmengine.logging import print_log
from mmengine.model import is_model_wrapper
from torch import nn
from torch.distributed.fsdp import FSDPModule

from ..backbones import ReparamBackboneMixin
from ..errors import NothingToConvertError
from ..layers import ReparamConv2d, adjacent_children, reparam_layers, replace_with_conv2d
from ..layers.precision import has_float64
from .fold import fold_batch_norm, follows


def reparameterize(model: nn.Module, inplace: bool = False, fold_bn: bool = False) -> nn.Module:
    """Replace every layer that generates its kernel by the convolution it equals.

    Kernels are squeezed in float64. Blocks of other packages that know how to
    re-parameterize themselves (`switch_to_deploy`) do so as well. Dtype,
    device, memory format, training flag and `requires_grad` are kept. A model
    that is already in deploy form is returned as it is (folded, if that is asked
    for). Wrappers of `torch.compile` and of distributed training are taken off:
    they belong to the layers that are gone.

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
    model, done = converted(model, inplace, fold_bn)
    print_log(', '.join(done) or f'{type(model).__name__} was re-parameterized before: left as '
              'it is', logger='current', level=logging.INFO)
    return model


def converted(model: nn.Module, inplace: bool = False, fold_bn: bool = False
              ) -> tuple[nn.Module, list[str]]:
    """Re-parameterize without a word; see `reparameterize`.

    Args:
        model: See `reparameterize`.
        inplace: See `reparameterize`.
        fold_bn: See `reparameterize`.

    Returns:
        The model in deploy form, and what was done to it, a line each.
    """
    model = unwrapped(model)
    _refuse_sharded(model)
    counts = Counter(type(layer).__name__ for layer in reparam_layers(model))
    others = list(_foreign_blocks(model))
    if not counts and not others and not any(map(_is_converted, model.modules())):
        raise NothingToConvertError(
            f'{type(model).__name__} has no OREPA or DBB layer: there is nothing to '
            "re-parameterize. Was it built with conv_cfg=dict(type='OREPA') or an OREPA "
            'backbone?')
    if not inplace:
        model = _copy_without_branches(model)
    _unwrap_inside(model)
    if counts:
        for module in list(model.modules()):
            if isinstance(module, ReparamBackboneMixin):
                module.switch_to_deploy()  # it may have more to fuse than its layers
        model = replace_with_conv2d(model)
        _bias_into_norm(model)
    for block in list(_foreign_blocks(model)):
        _switch_foreign(block)
    folded = fold_batch_norm(model) if fold_bn else 0
    done = [f're-parameterized {n} {name}' for name, n in counts.items()]
    done += [f'{n} {name} by its own switch_to_deploy()' for name, n in Counter(
        type(block).__name__ for block in others).items()]
    if folded:
        done.append(f'folded {folded} BN')
    return model, done


def _copy_without_branches(model: nn.Module) -> nn.Module:
    """A deep copy with convolutions in place of layers, which saves memory and time.

    Layers of a block that re-parameterizes itself stay: it sums their kernels in float64.
    So do those whose convolution gains a bias, which a BN may take over.
    """
    of_blocks = {layer for block in model.modules() if hasattr(block, 'switch_to_deploy')
                 and not isinstance(block, (ReparamConv2d, ReparamBackboneMixin))
                 for layer in reparam_layers(block)}
    convs = {id(layer): layer.to_conv2d() for layer in reparam_layers(model)
             if layer not in of_blocks}
    return copy.deepcopy(model, {key: conv for key, conv in convs.items() if not conv.gained_bias})


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
            raise _sharded(model)
        if hasattr(model, '_orig_mod'):  # torch.compile
            model = model.get_submodule('_orig_mod')
        elif is_model_wrapper(model):
            model = model.get_submodule('module')
        else:
            return model


def _refuse_sharded(model: nn.Module) -> None:
    """Refuse a model of which any part went through `fully_shard`, before it is touched."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            raise _sharded(module)


def _sharded(module: nn.Module) -> ValueError:
    return ValueError(f'the parameters of a {type(module).__name__} are spread over processes: '
                      'load its full state dict into the bare model first')


def _foreign_blocks(model: nn.Module) -> Iterator[nn.Module]:
    """Modules of other packages that re-parameterize themselves and did not yet, inner ones first.

    A block inside has `requires_grad` of its own to keep.
    """
    if isinstance(model, ReparamConv2d):
        return
    for child in model.children():
        yield from _foreign_blocks(child)
    ours = type(model).__module__.partition('.')[0] == __name__.partition('.')[0]
    done = getattr(model, 'deploy', False) or getattr(model, '_is_switching', False)
    if callable(getattr(model, 'switch_to_deploy', None)) and not (ours or done):
        yield model


@torch.no_grad()
def _switch_foreign(block: Any) -> None:
    """Let a block re-parameterize itself, in float64; what it forgets is kept.

    The methods of OpenMMLab's blocks forget the training flag and `requires_grad`.
    """
    states = {parameter: parameter.requires_grad for parameter in block.parameters()}
    reference, training = next(iter(states), None), block.training
    dtype = reference.dtype if reference is not None and has_float64(reference.device) else None
    trainable = any(states.values())
    try:
        block._is_switching = True  # its method may call `reparameterize`
        if dtype is not None:
            block.double()
        block.switch_to_deploy()
    except AssertionError as error:  # of a norm that they do not know
        raise ValueError(f'{type(block).__name__} cannot re-parameterize itself: {error}'
                         ) from error
    finally:
        del block._is_switching
        if dtype is not None:
            block.to(dtype)
    for parameter in block.parameters():
        parameter.requires_grad_(states.get(parameter, trainable))
    block.train(training)


def _bias_into_norm(model: nn.Module) -> None:
    """Move a bias that a block brought along into the BN behind it, which the stock model has.

    A stock convolution before a BN has no bias. BN takes the mean away, so that
    a bias before it is one in its running mean.
    """
    uses = Counter(child for module in model.modules()
                   for child in module._modules.values() if child is not None)
    norms: dict[nn.Module, list[nn.Module]] = {}
    for parent, _, conv, _, norm in adjacent_children(model):
        if getattr(conv, 'gained_bias', False) and follows(parent, conv, norm):
            norms.setdefault(conv, []).append(norm)
    for conv, behind in norms.items():
        if conv.bias is not None and len(behind) == uses[conv]:  # else some use has no BN
            for norm in dict.fromkeys(behind):
                norm.get_buffer('running_mean').data.sub_(conv.get_parameter('bias').detach())
            conv.register_parameter('bias', None)


def _unwrap_inside(model: nn.Module) -> None:
    """Take wrappers off all children, and compiled methods off all modules, in place.

    A compiled method holds on to its module: in a copy it would go on calling the original.
    """
    for module in list(model.modules()):
        for name, child in list(module._modules.items()):
            if child is not None:
                module._modules[name] = unwrapped(child)
        for name, value in list(vars(module).items()):
            if hasattr(type(module), name) and hasattr(value, '_torchdynamo_orig_callable'):
                delattr(module, name)


def _is_converted(module: nn.Module) -> bool:
    """Whether this module came out of a re-parameterization or was built deployed."""
    if isinstance(module, ReparamBackboneMixin):
        return module.deploy
    return getattr(module, 'reparameterized', False)
