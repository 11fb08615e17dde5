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
    """What came of one batch: tensors by name (`neck[0]`, `output[1]`), or what failed."""

    mode: str | None  # with which `mode` an OpenMMLab model was called
    selection: SameSelection
    outputs: dict[str, Tensor] = field(default_factory=dict)
    failure: str | None = None
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
            selected by score, proposals too. The scores are among the outputs.
    """
    modes = [before.mode] if before else ['tensor', 'predict'] if _takes_mode(model) else [None]
    device = next(model.parameters()).device
    runs = []
    for mode in modes:
        runs.append(found := Run(mode, SameSelection(before.selection if before else None)))
        parts: dict[str, Any] = {}
        with (_recorded(model, parts), _same_proposals(model, found, before), torch.no_grad(),
              torch.random.fork_rng([device] if device.type == 'cuda' else [])):
            torch.manual_seed(0)  # some heads draw in evaluation too (SegNeXt's)
            try:
                with found.selection:
                    parts['output'] = _called(model, batch, mode)
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


def _called(model: nn.Module, batch: Any, mode: str | None) -> Any:
    reference = next(model.parameters())
    # all that is no tensor is copied: a model writes into data samples
    batch = tree_map(lambda value: value.to(
        reference if value.is_floating_point() else reference.device)
        if isinstance(value, Tensor) else copy.deepcopy(value), batch)
    how = {} if mode is None else {'mode': mode}
    if not isinstance(batch, Mapping):
        return model(*batch, **how)
    return model(batch['inputs']) if mode is None and 'inputs' in batch else model(**batch, **how)


@contextlib.contextmanager
def _recorded(model: nn.Module, outputs: dict[str, Any]) -> Iterator[None]:
    """Note what each part of an OpenMMLab model gives, also of one inside of another."""
    calls: Counter[str] = Counter()

    def record(name: str, module: nn.Module, args: Any, output: Any) -> None:
        calls[name] += 1
        place = f'{name} (call {calls[name]})' if calls[name] > 1 else name
        # copies: the next layer may write into them
        outputs.update((name, tensor.clone()) for name, tensor in flattened(output, place))

    with contextlib.ExitStack() as hooks:
        for name, module in model.named_modules():
            for last, part in module.named_children() if _takes_mode(module) else ():
                if not _takes_mode(part):
                    hooks.callback(part.register_forward_hook(
                        functools.partial(record, f'{name}.{last}'.lstrip('.'))).remove)
        yield


@contextlib.contextmanager
def _same_proposals(model: nn.Module, found: Run, before: Run | None) -> Iterator[None]:
    """Note the proposals that a detector selects by score, or give it those of another run."""
    def shared(predict: Any, *args: Any, **kwargs: Any) -> Any:
        own, number = predict(*args, **kwargs), len(found.proposals)
        if before is not None and number < len(before.proposals):
            device = next(model.parameters()).device
            own = [proposals.to(device) for proposals in before.proposals[number]]
        found.proposals.append(copy.deepcopy(own))
        return own

    with contextlib.ExitStack() as stack:
        for head in [getattr(module, 'rpn_head', None) for module in model.modules()]:
            if hasattr(head, 'predict') and not hasattr(head, 'init_proposal_bboxes'):
                head.predict = functools.partial(shared, head.predict)
                stack.callback(delattr, head, 'predict')
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
    if expected.dtype == found.dtype and torch.equal(expected, found.to(expected.device)):
        return 0.0
    # on the CPU: not every device has float64
    one, other = (tensor.detach().cpu().to(torch.cdouble if tensor.is_complex() else torch.double)
                  .reshape(channels, -1) for tensor in (expected, found))
    same_infinity = one.isinf() & (one == other)
    difference, size = (tensor.abs().masked_fill(same_infinity, 0) for tensor in (one - other, one))
    if scale is not None:
        size = size.maximum(scale.cpu().double().reshape(channels, -1).abs())
    difference, size = difference.amax(1), size.amax(1)
    if not (difference.isfinite().all() and size.isfinite().all()):
        return math.inf
    if channels > 1:  # one that is next to nothing is what cancellation left, or below all rounding
        size = size.clamp(min=max(size.max().item() * 1e-6, torch.finfo(torch.float32).tiny))
    return torch.where(difference == 0, 0, difference / size).max().item()
