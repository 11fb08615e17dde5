"""Re-parameterize a whole model: the stock network that computes the same."""

from __future__ import annotations

import logging
import sys
from collections import Counter

from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DataParallel, DistributedDataParallel

from ..errors import NothingToConvertError, shortened
from ..layers import reparam_layers
from ..logs import log
from .convolutions import convolutions, layers_by_name, put_convolutions
from .copies import own_copy, replaced
from .fold import fold_batch_norm
from .foreign import convert, is_ours, protocol


def reparameterize(model: nn.Module, inplace: bool = False, fold_bn: bool = False) -> nn.Module:
    """Replace every layer that generates its kernel by the convolution it equals.

    Kernels are squeezed in float64. Dtype, device, memory format, training flag,
    `requires_grad` of kernel and bias, tied kernels, attributes that others set
    and hooks are kept; plain lists that hold a layer hold its convolution. A model
    that is already in deploy form is returned as it is (folded, if that is asked
    for). Wrappers of `torch.compile` and of distributed training are taken off:
    they belong to the layers that are gone.

    Blocks of other packages that know how to re-parameterize themselves do so as
    well (see `orepa_mm.reparam.foreign.PROTOCOLS`), the outer ones first. Each is
    run before and after on random input: one that would compute another function
    stays as it is, and the log names it.

    Args:
        model: Any module; it may be such a layer itself, or wrapped.
        inplace: Change the given model. Otherwise a copy is changed, which calls
            nothing of the model, in closures and hooks neither.
        fold_bn: Fold every BN into the convolution before it as well, see
            `fold_batch_norm`.

    Returns:
        The model in deploy form. In place as well, use what is returned: a
        single layer cannot replace itself, nor a wrapper be taken off.

    Raises:
        NothingToConvertError: If there is nothing to convert and the model was
            not converted before either. It is a `ValueError`.
        ValueError: If the parameters are sharded (FSDP), or a hook or a method of
            its own changes what a layer gives, which no convolution does. The
            model is left as it was.

    Example:
        >>> from torch import nn
        >>> from orepa_mm.layers import OREPAConv2d
        >>> reparameterize(nn.Sequential(OREPAConv2d(3, 8, 3, padding=1)))[0]
        Conv2d(3, 8, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))
    """
    model, done, left = converted(model, inplace, fold_bn)
    log(', '.join(done) or f'{type(model).__name__} was re-parameterized before: left as it is')
    for line in left:
        log(line, logging.WARNING)
    return model


def converted(model: nn.Module, inplace: bool = False, fold_bn: bool = False
              ) -> tuple[nn.Module, list[str], list[str]]:
    """Re-parameterize without a word; see `reparameterize`.

    Args:
        model: See `reparameterize`.
        inplace: See `reparameterize`.
        fold_bn: See `reparameterize`.

    Returns:
        The model in deploy form, what was done to it, and what was left or not
        proven, a line each.
    """
    model = unwrapped(model)
    _refuse_sharded(model)
    layers = layers_by_name(model)
    if not layers and not any(protocol(module) or _was_converted(module)
                              for module in model.modules()):
        raise NothingToConvertError(
            f'{type(model).__name__} has no OREPA or DBB layer: there is nothing to '
            "re-parameterize. Was it built with conv_cfg=dict(type='OREPA') or an OREPA "
            'backbone?')
    # what sums kernels itself does so in float64, from the branches; our backbones do not
    summed = {layer for block in model.modules()
              if protocol(block) and not hasattr(block, 'stock_type')
              for layer in reparam_layers(block)}
    if inplace:
        convolutions(layers)  # or it is refused, before anything is changed
        model = put_convolutions(model, but=summed)
    else:
        convs = convolutions(layers)
        model = own_copy(model, {layer: conv for layer, conv in convs.items()
                                 if layer not in summed})
    _unwrap_inside(model)
    model, blocks, left = _blocks_converted(model)
    model = put_convolutions(model)
    folded = fold_batch_norm(model) if fold_bn else 0
    done = [f're-parameterized {n} {name}' for name, n in Counter(
        type(layer).__name__ for layer in layers).items()]
    done += [f'{n} {name}()' for name, n in blocks.items()]
    if folded:
        done.append(f'folded {folded} BN')
    return model, done, left


def _blocks_converted(model: nn.Module) -> tuple[nn.Module, Counter[str], list[str]]:
    """Let all blocks convert themselves that know how, the outer ones first, in place.

    Returns:
        The model, or what comes in its own place; how many by which method; and which
        were left or not proven, with the reason, a line each.
    """
    done: Counter[str] = Counter()
    left: dict[str, list[str]] = {}
    others: dict[nn.Module, nn.Module] = {}

    def visit(block: nn.Module, name: str) -> nn.Module:
        if block in others:
            return others[block]
        others[block] = block
        kind, method = type(block).__name__, protocol(block)
        if method and is_ours(block):
            getattr(block, method)()
        elif method:
            after, why = convert(block)
            if why:
                state = 'stays as it is' if after is None else 'was converted, but not compared'
                left.setdefault(f'({kind}) {state}: {why}', []).append(name or 'itself')
            if after is not None:
                done[f'{kind} by its own {method}'] += 1
                others[block] = block = after
        for key, child in list(block._modules.items()):
            if child is not None:
                block._modules[key] = visit(child, f'{name}.{key}' if name else key)
        return block

    model = visit(model, '')
    model = replaced(model, others)  # in plain lists as well
    return model, done, [f'{shortened(names)} {why}' for why, names in left.items()]


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
        elif _is_wrapper(model):
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


def _is_wrapper(model: nn.Module) -> bool:
    """Whether a model is wrapped for distributed training, as PyTorch or MMEngine do."""
    engine = sys.modules.get('mmengine.model')
    return isinstance(model, (DataParallel, DistributedDataParallel)) or (
        engine is not None and engine.is_model_wrapper(model))


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


def _was_converted(module: nn.Module) -> bool:
    """Whether this module came out of a re-parameterization or was built deployed."""
    return getattr(module, 'reparameterized', False) or (
        hasattr(module, 'stock_type') and getattr(module, 'deploy', False) is True)
