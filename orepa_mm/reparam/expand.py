"""From a plain model to one in training form that computes the same."""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from mmcv.cnn import build_conv_layer
from mmengine.logging import print_log
from torch import nn

from ..errors import NothingToConvertError, shortened
from ..layers import ReparamConv2d, reparam_layers
from .fold import computes_as_conv2d
from .reparameterize import unwrapped


def expand(model: nn.Module, conv_cfg: Mapping[str, Any] | None = None,
           include: Sequence[str] | str = ('*',), exclude: Sequence[str] | str = (),
           inplace: bool = False) -> nn.Module:
    """Replace plain convolutions by blocks that generate exactly their kernels.

    The counterpart of `reparameterize`: the model computes what it computed,
    and has branches to be trained on. Each kernel is put into a block through
    its origin branch, in float64 (`ReparamConv2d.set_kernel`); the other branches
    start as published. Dtype, device, memory format, training flag and
    `requires_grad` are kept; a frozen convolution stays frozen, a shared one
    shared.

    Left as they are: convolutions whose name does not match, those without a
    block (even or oblong kernels), and what is no stock convolution (transposed,
    deformable, parametrized or weight-standardised ones, other subclasses). The
    log names them.

    Args:
        model: Any module, whether it knows of `conv_cfg` or not; it may be a
            convolution itself.
        conv_cfg: Which blocks, with their options; `dict(type='OREPA')` by default.
        include: Patterns of names (`*`, `?`, `[...]`), or one; a convolution is
            expanded if one of them matches its name, e.g. `backbone.*`.
        exclude: Patterns of names that are not expanded, or one.
        inplace: Change the given model. Otherwise a deep copy is changed.

    Returns:
        The model in training form. In place as well, use what is returned.

    Raises:
        NothingToConvertError: If no convolution is expanded; it says why. It is
            a `ValueError`.
        TypeError: If blocks of this type cannot take a given kernel (DBB: the BN
            in its branches make that exact in eval mode only).

    Example:
        >>> from torch import nn
        >>> expand(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1)))[0]
        OREPAConv2d(3, 8, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))
    """
    conv_cfg = dict(conv_cfg or {'type': 'OREPA'})
    include, exclude = ([names] if isinstance(names, str) else names
                        for names in (include, exclude))
    model = unwrapped(model)
    if not inplace:
        model = copy.deepcopy(model)
    names: dict[nn.Module, list[str]] = {}
    for name, module in _named_modules(model):
        names.setdefault(module, []).append(name)
    blocks: dict[nn.Module, ReparamConv2d] = {}
    left: dict[str, list[str]] = {}
    for module, its_names in names.items():
        reason = _why_left(module, its_names, include, exclude)
        if reason is None:
            try:
                blocks[module] = _block_of(module, conv_cfg)  # type: ignore[arg-type]  # a Conv2d
                continue
            except ValueError as error:  # no block for this kernel, or it cannot generate it
                reason = str(error).partition('. ')[0]
        if reason:
            left.setdefault(reason, []).extend(its_names)
    if not blocks:
        found = '; '.join(f'{shortened(of)}: {reason}' for reason, of in left.items())
        raise NothingToConvertError(
            f'{type(model).__name__} has no convolution to expand'
            + (f' ({found})' if found else ': it has no plain 2-D convolution at all'))
    model = replaced(model, blocks)
    counts = Counter(type(block).__name__ for block in blocks.values())
    print_log('expanded ' + ', '.join(f'{n} {name}' for name, n in counts.items())
              + ''.join(f'; left {len(of)} ({shortened(of)}): {reason}'
                        for reason, of in left.items()), 'current', logging.INFO)
    return model


def _named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module outside of the layers that generate their kernel, under each of its names."""
    inside = {module for layer in reparam_layers(model) for module in layer.modules()}
    for name, module in model.named_modules(remove_duplicate=False):
        if module not in inside:
            yield name, module


def _why_left(module: nn.Module, names: Sequence[str], include: Sequence[str],
              exclude: Sequence[str]) -> str | None:
    """Why a module is not expanded: empty if it is no 2-D convolution; None if it is expanded."""
    if isinstance(module, nn.ConvTranspose2d):
        return 'transposed'
    if not isinstance(module, nn.Conv2d):
        return 'no stock convolution' if 'Conv2d' in type(module).__name__ and hasattr(
            module, 'kernel_size') and not isinstance(module, ReparamConv2d) else ''
    if not computes_as_conv2d(module):
        return 'it does more than a stock convolution'

    def matches(patterns: Sequence[str]) -> bool:
        return any(fnmatchcase(name, pattern) for name in names for pattern in patterns)

    return None if matches(include) and not matches(exclude) else 'by name'


def _block_of(conv: nn.Conv2d, conv_cfg: Mapping[str, Any]) -> ReparamConv2d:
    """A block that generates the kernel of a convolution.

    Raises:
        ValueError: If there is none, or it cannot.
    """
    block = build_conv_layer(
        dict(conv_cfg), conv.in_channels, conv.out_channels, conv.kernel_size, stride=conv.stride,
        padding=conv.padding, dilation=conv.dilation, groups=conv.groups,
        bias=conv.bias is not None, padding_mode=conv.padding_mode)
    if not isinstance(block, ReparamConv2d):
        raise ValueError('the type of block leaves such kernels plain')
    block = block.to(conv.weight.device, conv.weight.dtype)
    block.set_kernel(conv.weight, conv.bias)
    if conv.weight.is_contiguous(memory_format=torch.channels_last) and not (
            conv.weight.is_contiguous()):
        # not in PyTorch's stubs
        block = block.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    block.requires_grad_(conv.weight.requires_grad)
    if block.bias is not None and conv.bias is not None:
        block.bias.requires_grad_(conv.bias.requires_grad)
    return block.train(conv.training)


def replaced(model: nn.Module, others: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """Put other modules in place of some, under each of their names.

    Args:
        model: Changed in place.
        others: What comes in place of which module.

    Returns:
        The model, or what comes in its own place.
    """
    if model in others:
        return others[model]
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if child is not None and child in others:
                module._modules[name] = others[child]
    return model
