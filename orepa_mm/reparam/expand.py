"""From a plain model to one in training form that computes the same."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from ..errors import ConfigError, NothingToConvertError, shortened
from ..layers import ReparamConv2d, build_dbb_conv, build_orepa_conv, reparam_layers
from ..logs import log
from .convolutions import carry_over
from .copies import own_copy, replaced
from .fold import is_stock
from .reparameterize import unwrapped

#: What builds a block, by the type in its config; others are for mmcv, where it is loaded.
_BUILDERS = {'OREPA': build_orepa_conv, 'DBB': build_dbb_conv}
#: A dtype of a larger unit of rounding cannot hold a sum of branches as a kernel needs it.
_HALF_PRECISION = 1e-4
#: What a stock convolution holds, and a mark of one that was re-parameterized.
_NAMES = frozenset((*vars(nn.Conv2d(1, 1, 1, device='meta')), 'reparameterized', 'gained_bias'))


def expand(model: nn.Module, conv_cfg: Mapping[str, Any] | None = None,
           include: Sequence[str] | str = ('*',), exclude: Sequence[str] | str = (),
           inplace: bool = False) -> nn.Module:
    """Replace plain convolutions by blocks that generate exactly their kernels.

    The counterpart of `reparameterize`: the model computes what it computed,
    and has branches to be trained on. Each kernel is put into a block through
    its origin branch, in float64; the other branches contribute nothing at first,
    and have a gradient (`ReparamConv2d.start_from`; option `start`). Dtype, device,
    memory format, training flag, `requires_grad` of weight and bias, hooks and
    attributes are kept; a shared convolution stays shared, convolutions whose
    weights are tied become blocks whose branches are, and plain lists that hold a
    convolution hold its block.

    Left as they are: convolutions whose name does not match, those without a
    block (even or oblong kernels), those that a block would miss by more than
    rounding (of a stem in half precision), what is no stock convolution (transposed,
    deformable, parametrized, pruned or weight-standardised ones, subclasses and
    instances with methods of their own), and what is tied to a tensor that has no
    block. The log names them.

    Args:
        model: Any module, whether it knows of `conv_cfg` or not; it may be a
            convolution itself.
        conv_cfg: Which blocks, with their options; `dict(type='OREPA')` by default.
        include: Patterns of names (`*`, `?`, `[...]`), or one; a convolution is
            expanded if one of them matches its name, e.g. `backbone.*`.
        exclude: Patterns of names that are not expanded, or one.
        inplace: Change the given model. Otherwise a copy is changed, which calls
            nothing of the model, in closures and hooks neither. An optimizer that was
            made before holds tensors that are gone.

    Returns:
        The model in training form. In place as well, use what is returned.

    Raises:
        NothingToConvertError: If no convolution is expanded; it says why. It is
            a `ValueError`.
        TypeError: If blocks of this type cannot take a given kernel (DBB: the BN
            in its branches make that exact in eval mode only), or the model cannot
            be copied.
        ConfigError: If there is no such type of block.

    Example:
        >>> from torch import nn
        >>> expand(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1)))[0]
        OREPAConv2d(3, 8, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))
    """
    conv_cfg = dict(conv_cfg or {'type': 'OREPA'})
    include, exclude = ([names] if isinstance(names, str) else names
                        for names in (include, exclude))
    model = unwrapped(model)
    names: dict[nn.Module, list[str]] = {}
    for name, module in _named_modules(model):
        names.setdefault(module, []).append(name)
    reasons = {module: _why_left(module, its_names, include, exclude)
               for module, its_names in names.items()}
    blocks: dict[nn.Module, nn.Module] = {}
    for module in [module for module, reason in reasons.items() if reason is None]:
        try:
            blocks[module] = _block_of(module, conv_cfg)  # type: ignore[arg-type]  # a Conv2d
        except ValueError as error:  # no block for this kernel, or it cannot generate it
            reasons[module] = str(error).partition('. ')[0]
    while lonely := _tie(model, blocks):
        for module in lonely:
            del blocks[module]
            reasons[module] = 'its weight is tied to one that has no such block'
    left: dict[str, list[str]] = {}
    for module, reason in reasons.items():
        if reason:
            left.setdefault(reason, []).extend(names[module])
    if not blocks:
        found = '; '.join(f'{shortened(of)}: {reason}' for reason, of in left.items())
        raise NothingToConvertError(
            f'{type(model).__name__} has no convolution to expand'
            + (f' ({found})' if found else ': it has no plain 2-D convolution at all'))
    model = replaced(model, blocks) if inplace else own_copy(model, blocks)
    counts = Counter(type(block).__name__ for block in blocks.values())
    log('expanded ' + ', '.join(f'{n} {name}' for name, n in counts.items())
        + ''.join(f'; left {len(of)} ({shortened(of)}): {reason}' for reason, of in left.items()))
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
    if not is_stock(module, nn.Conv2d) or not module.weight.is_floating_point():
        return 'it does more than a stock convolution'
    if (module._state_dict_hooks or module._state_dict_pre_hooks
            or module._load_state_dict_pre_hooks or any(
                tensor._backward_hooks for tensor in module.parameters())):
        return 'it has hooks on its tensors'

    def matches(patterns: Sequence[str]) -> bool:
        return any(fnmatchcase(name, pattern) for name in names for pattern in patterns)

    return None if matches(include) and not matches(exclude) else 'by name'


def _block_of(conv: nn.Conv2d, conv_cfg: Mapping[str, Any]) -> ReparamConv2d:
    """A block that generates the kernel of a convolution.

    Raises:
        ValueError: If there is none, or it cannot.
    """
    options = dict(conv_cfg)
    build = _BUILDERS.get(kind := options.pop('type'), kind)
    if not callable(build):
        mmcv = sys.modules.get('mmcv.cnn')
        if mmcv is None:
            raise ConfigError(f'conv_cfg has type {kind!r}: choose one of {", ".join(_BUILDERS)}')
        build, options = mmcv.build_conv_layer, {'cfg': dict(conv_cfg)}
    block = build(
        in_channels=conv.in_channels, out_channels=conv.out_channels,
        kernel_size=conv.kernel_size, stride=conv.stride, padding=conv.padding,
        dilation=conv.dilation, groups=conv.groups, bias=conv.bias is not None,
        padding_mode=conv.padding_mode, **options)
    if not isinstance(block, ReparamConv2d):
        raise ValueError('the type of block leaves such kernels plain')
    block = block.to(conv.weight.device, conv.weight.dtype)
    block.start_from(conv.weight, conv.bias)
    unit = torch.finfo(conv.weight.dtype).eps
    if unit > _HALF_PRECISION and not conv.weight.is_meta:
        with torch.no_grad():
            missed = (block.weight - conv.weight).double().abs().flatten(1).amax(1)
            missed /= conv.weight.double().abs().flatten(1).amax(1).clamp(min=unit ** 2)
        if not missed.max() <= unit:
            raise ValueError(f'in half precision the block would miss a channel by '
                             f'{missed.max():.1e} of its largest value')
    if conv.weight.is_contiguous(memory_format=torch.channels_last) and not (
            conv.weight.is_contiguous()):
        # not in PyTorch's stubs
        block = block.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    block.requires_grad_(conv.weight.requires_grad)
    if block.bias is not None and conv.bias is not None:
        block.bias.requires_grad_(conv.bias.requires_grad)
    carry_over(conv, block, _NAMES)
    return block.train(conv.training)


def _tie(model: nn.Module, blocks: Mapping[nn.Module, nn.Module]) -> list[nn.Module]:
    """Tie the branches of blocks whose convolutions have tied weights.

    Returns:
        Convolutions that cannot be expanded, since something else has their tensors.
    """
    holders: dict[nn.Parameter, list[nn.Module]] = {}
    for module in model.modules():
        for tensor in module._parameters.values():
            if tensor is not None:
                holders.setdefault(tensor, []).append(module)
    lonely = []
    for tensor, modules in holders.items():
        first = blocks.get(modules[0])
        for conv in modules[1:] if len(set(modules)) > 1 else ():
            block = blocks.get(conv)
            weights = [module._parameters.get('weight') is tensor for module in modules]
            if first is not None and block is not None and not any(weights):
                block.bias = first.bias
            elif (first is not None and all(weights) and type(first) is type(block)
                    and _shapes(first) == _shapes(block)):
                _share(first, block)
            else:
                lonely += [module for module in modules if module in blocks]
    return list(dict.fromkeys(lonely))


def _shapes(block: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in block.named_parameters() if name != 'bias'}


def _share(first: nn.Module, block: nn.Module) -> None:
    """Let a block have the branches of another one; its bias is its own."""
    for (_, source), (_, target) in zip(first.named_modules(), block.named_modules()):
        for name, tensor in source._parameters.items():
            if name != 'bias':
                target._parameters[name] = tensor
