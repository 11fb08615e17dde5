"""Copies of a model that are their own, and other modules in place of some of its modules."""

from __future__ import annotations

import copy
import functools
import operator
import types
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

#: What comes in place of a module.
_Other = Callable[[nn.Module], nn.Module]


def own_copy(model: nn.Module, others: Mapping[nn.Module, nn.Module] | None = None) -> nn.Module:
    """A deep copy that calls nothing of the original.

    `copy.deepcopy` takes functions as they are, so that a closure which hides a
    method (MMEngine's activation checkpointing puts one into `forward`) or a hook
    goes on calling the original. Here it gets a closure over the copy. Tensors
    that a graph computed are copied by value.

    Args:
        model: Any module.
        others: What comes in place of some modules, wherever they are held.

    Returns:
        The copy, or what comes in place of the model itself.

    Raises:
        TypeError: If a part of the model cannot be copied; it names the attribute.
    """
    memo: dict[int, Any] = {id(module): other for module, other in (others or {}).items()}
    for module in model.modules():
        for value in tree_leaves(vars(module)):
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    computed = dict(memo)
    try:
        copied = copy.deepcopy(model, memo)
    except Exception as error:  # whatever an attribute raises
        what = next((f'{name}.{key}'.lstrip('.') for name, module in model.named_modules()
                     for key, value in vars(module).items()
                     if key != '_modules' and not _can_be_copied(value, computed)), 'objects')
        raise TypeError(f'{type(model).__name__} cannot be copied, for its {what} ({error}): take '
                        'out what it holds besides its layers, or convert it with inplace=True'
                        ) from error

    def of_the_copy(module: nn.Module) -> nn.Module:
        if id(module) not in memo and any(id(part) in memo for part in module.modules()):
            return copy.deepcopy(module, memo)  # held by a closure alone
        return memo.get(id(module), module)

    _walk(copied, of_the_copy)
    return copied


def _can_be_copied(value: Any, memo: Mapping[int, Any]) -> bool:
    try:
        copy.deepcopy(value, dict(memo))
    except Exception:
        return False
    return True


def replaced(model: nn.Module, others: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """Put other modules in place of some, wherever the model holds them.

    That is: under each of their names, in plain lists, tuples and dictionaries,
    and in bound methods and closures.

    Args:
        model: Changed in place.
        others: What comes in place of which module.

    Returns:
        The model, or what comes in its own place.
    """
    if model in others:
        return others[model]
    if any(module is not other for module, other in others.items()):
        _walk(model, lambda module: others.get(module, module))
    return model


def occurrences(model: nn.Module) -> Counter[nn.Module]:
    """How often a model holds each of its modules, in plain lists and closures as well.

    Args:
        model: Any module.
    """
    counts: Counter[nn.Module] = Counter()

    def count(module: nn.Module) -> nn.Module:
        counts[module] += 1
        return module

    _walk(model, count)
    return counts


def _walk(model: nn.Module, other: _Other) -> None:
    """Call `other` with each module that is held anywhere in a model, and hold what it gives."""
    seen: dict[int, tuple[Any, Any]] = {}  # holds what it saw, so that no id is given out again

    def walk(value: Any, closed: bool = False) -> Any:
        """What comes in place of a value. What is closed over may belong to others as well."""
        if isinstance(value, nn.Module):
            value = other(value)
            if not closed and id(value) not in seen:
                seen[id(value)] = value, value
                walk(vars(value))
            return value
        if not isinstance(value, (dict, list, tuple, set, types.FunctionType, types.MethodType,
                                  functools.partial)):
            return value
        if id(value) not in seen:
            seen[id(value)] = value, value  # it may hold itself
            seen[id(value)] = value, _rebuilt(value, walk, closed)
        return seen[id(value)][1]

    walk(model)


def _rebuilt(value: Any, walk: Callable[[Any, bool], Any], closed: bool) -> Any:
    """A container of what comes in place of its items; itself where that can be."""
    if isinstance(value, dict):
        items = {walk(key, closed): walk(item, closed) for key, item in value.items()}
        if all(found is item for pair, other in zip(value.items(), items.items())
               for item, found in zip(pair, other)):
            return value
        if closed:
            return items
        if value.keys() != items.keys():
            value.clear()
        value.update(items)
        return value
    if isinstance(value, types.FunctionType):
        return _with_closure(value, walk)
    if isinstance(value, types.MethodType):
        held = walk(value.__self__, closed)
        return value if held is value.__self__ else types.MethodType(value.__func__, held)
    if isinstance(value, functools.partial):
        old = [value.func, *value.args, *value.keywords.values()]
        new = [walk(part, closed) for part in old]
        if all(map(operator.is_, old, new)):
            return value
        count = len(value.args) + 1
        return functools.partial(new[0], *new[1:count], **dict(zip(value.keywords, new[count:])))
    found = [walk(item, closed) for item in value]
    if all(map(operator.is_, value, found)):
        return value
    if isinstance(value, list) and not closed:
        value[:] = found
        return value
    return type(value)(*found) if hasattr(value, '_fields') else type(value)(found)


def _with_closure(function: types.FunctionType, walk: Callable[[Any, bool], Any]
                  ) -> types.FunctionType:
    """The function over what comes in place of the values that it closed over."""
    try:
        held = [cell.cell_contents for cell in function.__closure__ or ()]
    except ValueError:  # one is not filled yet
        return function
    held.append(function.__defaults__)
    found = [walk(value, True) for value in held]
    if all(map(operator.is_, held, found)):
        return function
    other = types.FunctionType(function.__code__, function.__globals__, function.__name__,
                               found.pop(), tuple(map(types.CellType, found)))
    for name in ('__doc__', '__kwdefaults__', '__module__', '__qualname__'):
        setattr(other, name, getattr(function, name))
    vars(other).update({key: walk(value, True) for key, value in vars(function).items()})
    return other
