"""What a model computes before it selects anything, and how far two such outputs are apart."""

from __future__ import annotations

import contextlib
import copy
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..layers.precision import has_float64
from .selection import SameSelection


def raw_outputs(model: nn.Module, batch: dict[str, Any], proposals: list[Any] | None = None,
                failed: dict[str, str] | None = None,
                selection: SameSelection | None = None) -> dict[str, Tensor]:
    """What the network computes before any selection: features and head outputs.

    What draws random numbers gets the same at every call.

    Args:
        model: A detector, any other OpenMMLab model, or a plain module.
        batch: `inputs (N, 3, H, W)` and, of an OpenMMLab model, `data_samples`.
        proposals: Of a two-stage detector, one `InstanceData` per image.
        failed: Gets the reason of each group of outputs (`features`, `rpn`,
            `roi`, `output`) that does not run. Without it the error is raised.
        selection: Notes what the model selects by score on its way, or says it; the
            scores are among the outputs.

    Returns:
        Tensors by name, e.g. `features[0]`; empty ones, which prove nothing,
        are left out.
    """
    reference = next(model.parameters())
    inputs, samples = batch['inputs'].to(reference), batch.get('data_samples')
    outputs: dict[str, object] = {}
    selection = selection or SameSelection()

    def run(group: str, function: Callable[[], object]) -> None:
        try:
            with _same_random_numbers(reference.device), selection:
                outputs[group] = function()
        except Exception as error:  # whatever a head does with it: what failed is named
            if failed is None:
                raise
            failed[group] = describe(error)

    if samples is None:
        run('output', lambda: model(inputs))
    elif proposals is None:
        run('features', lambda: model.extract_feat(inputs))
        run('output', lambda: _tensor_mode(model, inputs, samples))
    else:
        run('features', lambda: model.extract_feat(inputs))
        for group, head in (
                ('rpn', lambda features: model.rpn_head(features)),
                ('roi', lambda features: model.roi_head.forward(
                    features, [p.to(reference) for p in proposals], samples))):
            if 'features' in outputs:
                run(group, functools.partial(head, outputs['features']))
            elif failed is not None:
                failed[group] = 'it needs the features'
    outputs['selected from'] = selection.scores
    return {name: tensor for name, tensor in flattened(outputs) if tensor.numel()}


@contextlib.contextmanager
def _same_random_numbers(device: torch.device) -> Iterator[None]:
    """Some heads draw some in evaluation too (SegNeXt's); afterwards all is as it was."""
    with torch.random.fork_rng([device] if device.type == 'cuda' else []):
        torch.manual_seed(0)
        yield


def _tensor_mode(model: nn.Module, inputs: Tensor, samples: list[Any]) -> object:
    """What a model gives as tensors; some segmentors of several heads can only predict."""
    try:
        return model(inputs, samples, mode='tensor')
    except Exception:
        if not hasattr(model, 'encode_decode'):
            raise
        return model.encode_decode(inputs, [sample.metainfo for sample in samples])


def own_proposals(model: nn.Module, batch: dict[str, Any]) -> list[Any] | None:
    """The proposals of a detector that selects them by score, None for every other model.

    Args:
        model: In eval mode, float32.
        batch: See `raw_outputs`.
    """
    if not (getattr(model, 'with_rpn', False) and getattr(model, 'with_roi_head', False)):
        return None
    if not hasattr(model.rpn_head, 'rpn_cls'):  # learned queries, not a selection
        return None
    features = model.extract_feat(batch['inputs'].float())
    return model.rpn_head.predict(features, batch['data_samples'], rescale=False)


def flattened(value: object, name: str = '') -> Iterator[tuple[str, Tensor]]:
    """Every tensor in nested dictionaries, lists and tuples, with its place.

    Args:
        value: A tensor, or what holds tensors; anything else is passed over.
        name: What the places begin with.
    """
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from flattened(item, f'{name}.{key}' if name else str(key))
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from flattened(item, f'{name}[{index}]')


def scale_relative_error(expected: Tensor | None, found: Tensor | None) -> float:
    """Largest absolute difference over the largest absolute expected value.

    Args:
        expected: Any shape, not empty.
        found: The same shape.

    Returns:
        The error, without unit; infinite if a value is not finite, or if one
        tensor is absent or of another shape.
    """
    if expected is None or found is None or expected.shape != found.shape:
        return math.inf
    if not (expected.isfinite().all() and found.isfinite().all()):
        return math.inf
    # on the CPU: not every device has float64
    expected, found = expected.cpu().double(), found.cpu().double()
    difference = (expected - found).abs().max().item()
    scale = expected.abs().max().item()
    return difference / scale if scale > 0 else (0.0 if difference == 0 else math.inf)


def frozen(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy in another dtype, in eval mode, on the CPU if its device has no such dtype.

    Args:
        model: Left as it is.
        dtype: Of its parameters and buffers.
    """
    model = copy.deepcopy(model)
    if dtype == torch.float64 and not has_float64(next(model.parameters()).device):
        model = model.cpu()
    model = model.to(dtype)
    model.eval()  # a statement of its own: not every backbone's train() returns itself
    return model


def describe(error: Exception) -> str:
    """One line on an error; some have no text but their type.

    Args:
        error: The error.
    """
    return (str(error).strip() or type(error).__name__).splitlines()[0]
