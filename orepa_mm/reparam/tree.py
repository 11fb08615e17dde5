"""Whether two models are the same tree: modules, types, settings that count in eval mode."""

from __future__ import annotations

import functools
import re
import reprlib
import types
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from .fold import is_stock
from .raw_outputs import scale_relative_error

#: What no forward pass in eval mode reads: of training, of how a module was built, what a runner or
#: an inferencer notes on a model, marks of ours.
_NOT_COUNTED = {
    'inplace', 'momentum', 'norm_eval', 'frozen_stages', 'with_cp', 'use_checkpoint', 'train_cfg',
    'init_cfg', 'conv_cfg', 'norm_cfg', 'pretrained', '_is_init', '_params_init_info', '_device',
    'dataset_meta', '_dataset_meta', 'cfg', '_config', 'CLASSES', 'PALETTE', 'deploy',
    'reparameterized', 'gained_bias', 'folded_norm', *vars(nn.Module())}
_DROP_RATE = re.compile(r'(.*_)?drop(out|path|block)?(_?(p|path|prob|rate|ratio))*')
#: What is compared by its value, and what a function and its like consist of.
_VALUES = (str, bytes, int, float, complex, set, frozenset)
_PARTS: dict[type, tuple[str, ...]] = {
    types.FunctionType: ('__code__', '__defaults__', '__kwdefaults__', '__closure__'),
    types.MethodType: ('__func__', '__self__'), types.CellType: ('cell_contents',),
    functools.partial: ('func', 'args', 'keywords')}
#: Largest error of a tensor that an object holds, which a forward pass may have computed.
_TOLERANCE = 1e-4
_PACKAGE = __name__.partition('.')[0]


def differences(expected: nn.Module, found: nn.Module, before: nn.Module) -> dict[str, str]:
    """Where two models are not the same tree.

    Of the tensors that modules have by name it is only compared that they are there.

    Args:
        expected: The model before, re-parameterized.
        found: The model after.
        before: The model before. What it holds beside tensors is compared where nothing in it
            was converted: run on the same batches, both hold the same.

    Returns:
        By name of the module, what differs.
    """
    modules, others, origins = (dict(model.named_modules(remove_duplicate=False))
                                for model in (expected, found, before))
    inside = {id(module) for tree in (modules, others, origins) for module in tree.values()}
    result: dict[str, str] = {}
    for name in [*modules, *(others.keys() - modules.keys())]:
        parent = name.rpartition('.')[0]
        if name and (parent in result or not {parent} <= modules.keys() & others.keys()):
            continue  # said of the parent
        one, other = modules.get(name), others.get(name)
        if one is None or other is None:
            result[name] = f'only the {"deployed" if one is None else "training"} form has it'
        elif _kind(one) is not _kind(other):
            result[name] = f'{type(one).__name__} became {type(other).__name__}'
        elif changed := _change(one, other, origins.get(name), inside):
            result[name] = changed
    return result


def _change(expected: nn.Module, found: nn.Module, before: nn.Module | None, inside: set[int]
            ) -> str:
    """What differs between two modules of a kind, beside the values of tensors and the children."""
    names, others = ({name for name, tensor in {**module._parameters, **module._buffers}.items()
                      if tensor is not None} for module in (expected, found))
    if names != others:
        return f'only one form has {", ".join(sorted(names ^ others))}'
    if _kind(expected) is nn.Identity:
        return ''
    if type(before) is type(expected) and before._modules.keys() == expected._modules.keys():
        expected = before
    one, other = _counted(expected), _counted(found)
    same_type = type(expected) is type(found)  # else one of ours stands for the stock one
    for key in sorted(one.keys() | other.keys() if same_type else one.keys() & other.keys()):
        was, is_now = (getattr(module, key, '(absent)') for module in (expected, found))
        if not _same(was, is_now, inside, {}):
            return f'{key}: {reprlib.repr(was)} became {reprlib.repr(is_now)}'
    return ''


def _counted(holder: Any) -> dict[Any, Any]:
    """What counts of an object's attributes, or of a dictionary."""
    values = holder if isinstance(holder, Mapping) else vars(holder)
    return {key: value for key, value in values.items() if key not in _NOT_COUNTED and not (
        isinstance(value, (int, float)) and _DROP_RATE.fullmatch(str(key)))}


def _kind(module: nn.Module) -> type:
    """The class that says what a module computes in eval mode."""
    if isinstance(module, (nn.Identity, _DropoutNd)) or type(module).__name__ == 'DropPath':
        return nn.Identity
    if is_stock(module, _BatchNorm, nn.SyncBatchNorm):
        return _BatchNorm
    return nn.Conv2d if is_stock(module, nn.Conv2d) else _stock(type(module))


def _stock(kind: type) -> type:
    """A class of ours stands for the one that it is derived from."""
    return next(base for base in kind.__mro__ if base.__module__.partition('.')[0] != _PACKAGE)


def _same(one: Any, other: Any, inside: set[int], seen: dict[tuple[int, int], Any]) -> bool:
    """Whether two values are the same in effect; `inside` are modules that are compared by name."""
    same = functools.partial(_same, inside=inside, seen=seen)
    if one is other or (id(one), id(other)) in seen or {id(one), id(other)} <= inside:
        return True
    seen[id(one), id(other)] = one, other  # held: no other object gets their ids
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.numel() == other.numel() == 0 or scale_relative_error(one, other) <= _TOLERANCE
    if isinstance(one, type) and isinstance(other, type):
        return _stock(one) is _stock(other)
    if isinstance(one, nn.Module) and isinstance(other, nn.Module):
        return _kind(one) is _kind(other) and same(
            *({**_counted(module), **module._parameters, **module._buffers, **module._modules}
              for module in (one, other)))
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        one, other = _counted(one), _counted(other)
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, float) and one != one:
        return isinstance(other, float) and other != other
    if type(one) is type(other) and not isinstance(one, _VALUES):
        parts = _PARTS.get(type(one)) or (('__dict__',) if hasattr(one, '__dict__') else ())
        if parts:
            return all(same(getattr(one, part), getattr(other, part)) for part in parts)
        if type(one).__eq__ is object.__eq__:  # type: ignore[comparison-overlap]
            return True  # nothing can be seen of them
    try:
        equal = one == other
        return bool(equal.all() if hasattr(equal, 'all') else equal)
    except Exception:  # arrays of two shapes, or whatever an object does
        return False
