"""Plain weights that meet a model in training form: expanded, layer by layer.

The model then computes what the plain one computes with these weights.
"""

from __future__ import annotations

import copy
import logging
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from mmengine.logging import print_log
from mmengine.model import BaseTTAModel, is_model_wrapper
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import CheckpointError
from ..layers import ReparamConv2d, adjacent_children, reparam_layers
from .forms import module_notes, with_module_notes
from .io import require_values


def expanded_state_dict(model: nn.Module, state_dict: Mapping[str, Any],
                        source: str = 'the checkpoint') -> Mapping[str, Any]:
    """Replace plain kernels by branches, for every layer of the model that generates its kernel.

    The layer then generates exactly the plain kernel; how the branches start
    around it is the block's option `start`, see `ReparamConv2d.start_from`. What is
    drawn at random depends on the name of the layer and the seed of the process
    alone, so that a moving average gets the branches that the model gets. Layer
    by layer: branches that the weights hold stay as they are. The model is not
    changed.

    Left as they are, for whoever loads them to judge: a kernel of another shape,
    one beside branches of the same layer, one with a BN folded into it, and
    those of layers that cannot take a given kernel (`DBBConv2d`).

    Args:
        model: In training form or not, maybe wrapped.
        state_dict: What is to be loaded into it; left as it is.
        source: What to call it in the log.

    Returns:
        The given state dict, if nothing is expanded; that of one detector for both in a
        model that has it as a teacher and as a student. Otherwise one with
        `{layer}.{branch}` in place of `{layer}.weight`, one line in the log, and
        the versions of the modules kept.

    Raises:
        CheckpointError: If a kernel or its bias is not finite or no floating
            tensor with values, or a layer cannot generate the kernel (a stem is
            too narrow); it names the tensor, or the layer and by how much the
            kernel is missed.
    """
    model = without_wrappers(model)
    layers = list(named_layers(model))
    if not layers:
        return state_dict
    state_dict = _for_teacher_and_student(model, state_dict)
    tensors = {key: value for key, value in state_dict.items() if isinstance(value, Tensor)}
    folded = folded_layers(model, tensors)
    branches = {f'{prefix}weight': _branches(layer, prefix, tensors) for prefix, layer in layers
                if prefix not in folded and has_plain_kernel(layer, prefix, tensors)}
    branches = {kernel: of for kernel, of in branches.items() if of}
    if not branches:
        return state_dict
    expanded: dict[str, Any] = {}
    for key, value in state_dict.items():
        expanded.update(branches.get(key, {key: value}))
    done = {layer for prefix, layer in layers if f'{prefix}weight' in branches}
    print_log(
        f'{source}: plain weights were expanded into {len(done)} of the '
        f'{len({layer for _, layer in layers})} layers of '
        f'{type(model).__name__} that are in training form. It computes what the plain model '
        'computes with them; the option start of conv_cfg says how the branches begin. '
        'Train on, then re-parameterize: the cost to run is that of the plain model',
        'current', logging.INFO)
    return with_module_notes(expanded, module_notes(state_dict))


def _for_teacher_and_student(model: nn.Module, state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
    """The weights of one detector, as MMDetection's semi-supervised ones name them to load both."""
    parts = ('teacher', 'student')
    if not (hasattr(model, 'semi_test_cfg') and all(hasattr(model, part) for part in parts)) or any(
            part in key for part in parts for key in state_dict):
        return state_dict
    notes = module_notes(state_dict)
    return with_module_notes(
        {f'{part}.{key}': value for part in parts for key, value in state_dict.items()},
        {**{f'{part}.{name}'.rstrip('.'): value for part in parts for name, value in notes.items()},
         '': notes.get('', {})})


def without_wrappers(model: nn.Module) -> nn.Module:
    """The model whose names the keys have, as MMEngine loads them.

    Args:
        model: Maybe wrapped for a distributed run or for test-time augmentation.
    """
    while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
        model = model.get_submodule('module')
    return model


def named_layers(model: nn.Module) -> Iterator[tuple[str, ReparamConv2d]]:
    """Every layer that generates its kernel, under each of its names.

    Args:
        model: Without wrappers.

    Yields:
        What the layer's keys begin with (with a dot at its end; empty if it is
        the model), and the layer.
    """
    layers = set(reparam_layers(model))
    for name, module in model.named_modules(remove_duplicate=False):
        if module in layers:
            yield f'{name}.' if name else '', module


def has_plain_kernel(layer: ReparamConv2d, prefix: str, tensors: Mapping[str, Tensor]) -> bool:
    """Whether weights hold a kernel of the layer's shape, and none of its branches.

    Args:
        layer: In training form.
        prefix: What its keys begin with.
        tensors: Of a state dict.
    """
    kernel = tensors.get(f'{prefix}weight')
    return kernel is not None and kernel.shape == layer.kernel_shape and not (
        layer.branch_keys(prefix) & tensors.keys())


def folded_layers(model: nn.Module, tensors: Mapping[str, Tensor]) -> set[str]:
    """Layers in training form for which there is a kernel with a BN folded into it.

    Such a kernel has a bias; and the BN that follows the layer has no tensor, or
    the layer has no bias and there is no BN either that would explain it.

    Args:
        model: Without wrappers.
        tensors: Of a state dict.

    Returns:
        What the keys of these layers begin with.
    """
    norms = {layer: norm for _, _, layer, _, norm in adjacent_children(model)
             if isinstance(layer, ReparamConv2d) and isinstance(norm, _BatchNorm)}
    names = {module: name for name, module in model.named_modules()}
    found = set()
    for prefix, layer in named_layers(model):
        if {f'{prefix}weight', f'{prefix}bias'} <= tensors.keys():
            norm = norms.get(layer)
            if layer.bias is None if norm is None else not (
                    norm.state_dict(prefix=f'{names[norm]}.').keys() & tensors.keys()):
                found.add(prefix)
    return found


def _branches(layer: ReparamConv2d, prefix: str, tensors: Mapping[str, Tensor]
              ) -> dict[str, Tensor] | None:
    """The branches that generate the kernel, by key; None if this layer cannot take one."""
    key, bias = f'{prefix}weight', f'{prefix}bias'
    for name in {key, bias} & tensors.keys():
        require_values(name, tensors[name], layer._reference(), type(layer).__name__)
    layer = copy.deepcopy(layer).cpu()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(torch.initial_seed() ^ zlib.crc32(prefix.encode()))
            layer.start_from(tensors[key])
    except TypeError:
        return None
    except ValueError as error:
        raise CheckpointError(
            f'the plain kernel {key} cannot be expanded: {error}. Leave this convolution plain in '
            'the config, or make the stem wider') from error
    own = layer.branch_keys(prefix)
    return {name: value for name, value in layer.state_dict(prefix=prefix).items() if name in own}
