"""Run a model on a batch: what it computes before it selects, and how far two runs differ."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from .selection import SameSelection


@dataclass
class Run:
    """What came of one batch: tensors by name (`neck[0]`, `output[1]`), and what failed."""

    mode: str | None  # with which `mode` an OpenMMLab model was called
    outputs: dict[str, Tensor] = field(default_factory=dict)
    failure: str | None = None
    selection: SameSelection = field(default_factory=SameSelection)
    proposals: list[Any] = field(default_factory=list)


def run(model: nn.Module, batch: Any, before: Run | None = None) -> Run:
    """Run a model without gradients; what draws random numbers gets the same at every call.

    An OpenMMLab model (one whose `forward` has a `mode`) runs in the mode `tensor`, or `predict`
    if it has no tensors in that one, and what its parts give is noted as well.

    Args:
        model: In eval mode.
        batch: Positional arguments in a list or tuple, or named ones in a dictionary; of these a
            model that is none of OpenMMLab's gets `inputs`.
        before: A run of another form of the model: the mode is the same, and so is what is
            selected by score, proposals too. Differences of rounding must not become such of
            selection; the scores are among the outputs.
    """
    modes = [before.mode] if before else ['tensor', 'predict'] if _takes_mode(model) else [None]
    runs = []
    for mode in modes:
        runs.append(found := Run(mode, selection=SameSelection(before and before.selection)))
        parts: dict[str, Any] = {}
        with (_recorded(model, parts), _same_proposals(model, found, before),
              _same_random_numbers(model), torch.no_grad()):
            try:
                with found.selection:
                    parts['output'] = _call(model, _moved(batch, model), mode)
                parts['selected from'] = found.selection.scores
            except Exception as error:  # whatever a model does with it: what failed is named
                found.failure = (str(error).strip() or type(error).__name__).splitlines()[0]
        tensors = dict(flattened(parts))
        # labels flip by rounding: what they are made of tells
        found.outputs = {name: tensor for name, tensor in tensors.items()
                         if tensor.is_floating_point() or tensor.is_complex()} or tensors
        if found.failure is None and any(name.startswith('output') for name in tensors):
            return found
    return runs[0]


def _takes_mode(module: nn.Module) -> bool:
    return 'mode' in inspect.signature(module.forward).parameters


def _call(model: nn.Module, batch: Any, mode: str | None) -> Any:
    how = {} if mode is None else {'mode': mode}
    if not isinstance(batch, Mapping):
        return model(*batch, **how)
    if mode is None and 'inputs' in batch:
        return model(batch['inputs'])
    return model(**batch, **how)


def _moved(batch: Any, model: nn.Module) -> Any:
    """The batch where the model is, in its precision; a copy of all else, a model writes into it."""
    reference = next(model.parameters())
    return tree_map(lambda value: value.to(
        reference if value.is_floating_point() else reference.device)
        if isinstance(value, Tensor) else copy.deepcopy(value), batch)


@contextlib.contextmanager
def _recorded(model: nn.Module, outputs: dict[str, Any]) -> Iterator[None]:
    """Note what each part of an OpenMMLab model gives, also of one inside of another."""
    def record(name: str, module: nn.Module, args: Any, output: Any) -> None:
        calls[name] += 1
        if calls[name] > 1:
            name = f'{name} (call {calls[name]})'
        # copies: the next layer may write into them
        outputs.update((place, tensor.clone()) for place, tensor in flattened(output, name))

    calls: Counter[str] = Counter()
    hooks = [part.register_forward_hook(functools.partial(record, f'{name}.{last}'.lstrip('.')))
             for name, module in model.named_modules() if _takes_mode(module)
             for last, part in module.named_children() if not _takes_mode(part)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def _same_proposals(model: nn.Module, found: Run, before: Run | None) -> Iterator[None]:
    """Note the proposals that a detector selects by score, or give it those of another run."""
    heads = [head for head in (getattr(module, 'rpn_head', None) for module in model.modules())
             if hasattr(head, 'predict') and not hasattr(head, 'init_proposal_bboxes')]

    def shared(predict: Any, *args: Any, **kwargs: Any) -> Any:
        own, number = predict(*args, **kwargs), len(found.proposals)
        if before is not None and number < len(before.proposals):
            device = next(model.parameters()).device
            own = [proposals.to(device) for proposals in before.proposals[number]]
        found.proposals.append(copy.deepcopy(own))
        return own

    for head in heads:
        head.predict = functools.partial(shared, head.predict)
    try:
        yield
    finally:
        for head in heads:
            del head.predict


@contextlib.contextmanager
def _same_random_numbers(model: nn.Module) -> Iterator[None]:
    """Some heads draw some in evaluation too (SegNeXt's); afterwards all is as it was."""
    device = next(model.parameters()).device
    with torch.random.fork_rng([device] if device.type == 'cuda' else []):
        torch.manual_seed(0)
        yield


def flattened(value: Any, name: str = '') -> Iterator[tuple[str, Tensor]]:
    """Every tensor that is not empty, with its place.

    Args:
        value: What a model returns: a tensor, or dictionaries, lists, tuples, data classes and
            data samples that hold some. Anything else is passed over.
        name: What the places begin with.
    """
    if isinstance(value, Tensor):
        if value.numel():
            yield name, value
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from flattened(item, f'{name}[{index}]')
    elif is_dataclass(value) or callable(getattr(value, 'items', None)):
        for key, item in (vars(value) if is_dataclass(value) else value).items():
            yield from flattened(item, f'{name}.{key}'.lstrip('.'))


def scale_relative_error(expected: Tensor | None, found: Tensor | None, channels: int = 1,
                         scale: Tensor | None = None) -> float:
    """Largest absolute difference over the largest absolute expected value.

    Args:
        expected: Any shape, not empty.
        found: The same shape.
        channels: How many parts of the tensors, along their first dimension, each have a
            largest value of their own.
        scale: Of the same shape: values that are taken in place of smaller expected ones.

    Returns:
        The error, without unit. Infinities at the same places are equal. Infinite if they are
        not, if a value is not a number, or if one tensor is absent or of another shape.
    """
    if expected is None or found is None or expected.shape != found.shape:
        return math.inf
    # on the CPU: not every device has float64
    one, other = (tensor.detach().cpu().to(torch.cdouble if tensor.is_complex() else torch.double)
                  .reshape(channels, -1) for tensor in (expected, found))
    infinite = one.isinf() & (one == other)
    difference, size = ((tensor.abs().masked_fill(infinite, 0)) for tensor in (one - other, one))
    if scale is not None:
        size = size.maximum(scale.detach().cpu().double().reshape(channels, -1).abs())
    difference, size = difference.amax(1), size.amax(1)
    if not (difference.isfinite().all() and size.isfinite().all()):
        return math.inf
    # a channel that is next to nothing is what cancellation left; nor does rounding get smaller
    # than the smallest normal number
    smallest = max(size.max().item() * 1e-6, torch.finfo(torch.float32).tiny)
    if channels > 1:
        size = size.clamp(min=smallest)
    return torch.where(difference == 0, 0, difference / size).max().item()
