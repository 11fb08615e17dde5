"""Prove that two forms of a model compute the same function."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

#: Largest scale-relative error that counts as equal. In float32 the two forms
#: round differently in every layer; in float64 what is left is the rounding of
#: the deployed kernels to the float32 in which they are stored.
TOLERANCES = {'float32': 1e-4, 'float64': 1e-5}


@dataclass(frozen=True)
class OutputError:
    """The difference of one raw output.

    Attributes:
        name: Which output, e.g. `features[0]`, `rpn[1][2]`.
        dtype: `float32` or `float64`, in which both forms computed.
        error: Largest absolute difference over the largest absolute value of
            the output before; infinite where a value is not finite or the
            shapes differ.
    """

    name: str
    dtype: str
    error: float

    @property
    def passed(self) -> bool:
        """Whether the error is within the tolerance of its dtype."""
        return self.error <= TOLERANCES[self.dtype]


@dataclass(frozen=True)
class VerificationReport:
    """What `verify` measured: one entry per raw output and dtype."""

    errors: tuple[OutputError, ...]

    @property
    def passed(self) -> bool:
        """Whether every output agrees; false if there was none."""
        return bool(self.errors) and all(error.passed for error in self.errors)

    def largest(self, dtype: str) -> OutputError:
        """The entry with the largest error in `dtype`."""
        return max((e for e in self.errors if e.dtype == dtype), key=lambda e: e.error)

    def as_dict(self) -> dict[str, Any]:
        """Plain types only, for a file."""
        return {'passed': self.passed, 'tolerances': TOLERANCES,
                'errors': [asdict(error) for error in self.errors]}


def verify(before: nn.Module, after: nn.Module, batches: Sequence[dict]) -> VerificationReport:
    """Compare the raw outputs of two forms of a model on real inputs.

    Both are copied and compared in eval mode, whatever mode they are in.
    A detector with proposals gets the same proposals in both forms, those of
    the form before: a difference of rounding must not become one of selection.

    Args:
        before: The model in training form.
        after: The model re-parameterized.
        batches: What the model's data preprocessor returns: `inputs` of shape
            `(N, 3, H, W)` and, for OpenMMLab models, `data_samples`.

    Returns:
        The error of every raw output, in float32 and in float64.
    """
    errors: dict[tuple[str, str], float] = {}
    pairs = {'float32': (_frozen(before, torch.float32), _frozen(after, torch.float32))}
    pairs['float64'] = (_frozen(before, torch.float64), _frozen(after, torch.float64))
    with torch.no_grad(), exact_float32():
        for batch in batches:
            proposals = own_proposals(pairs['float32'][0], batch)
            for dtype, (one, other) in pairs.items():
                expected = raw_outputs(one, batch, proposals)
                found = raw_outputs(other, batch, proposals)
                for name in expected.keys() | found.keys():
                    error = scale_relative_error(expected.get(name), found.get(name))
                    errors[name, dtype] = max(error, errors.get((name, dtype), 0.0))
    return VerificationReport(tuple(OutputError(name, dtype, error)
                                    for (name, dtype), error in sorted(errors.items())))


@contextlib.contextmanager
def exact_float32() -> Iterator[None]:
    """Keep a GPU from computing float32 in TF32, whose noise would hide a difference."""
    backends = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [backend.allow_tf32 for backend in backends]
    try:
        for backend in backends:
            backend.allow_tf32 = False
        yield
    finally:
        for backend, value in zip(backends, before):
            backend.allow_tf32 = value


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
    difference = (expected.double() - found.double()).abs().max().item()
    scale = expected.double().abs().max().item()
    return difference / scale if scale > 0 else (0.0 if difference == 0 else math.inf)


def raw_outputs(model: nn.Module, batch: dict, proposals: list | None = None) -> dict[str, Tensor]:
    """What the network computes before any selection: features and head outputs.

    Heads that do not run like this, in float64 for example, are left out.

    Args:
        model: A detector, any other OpenMMLab model, or a plain module.
        batch: See `verify`.
        proposals: Of a two-stage detector, one `InstanceData` per image.

    Returns:
        Tensors by name, e.g. `features[0]`; empty ones, which prove nothing,
        are left out.
    """
    dtype = next(model.parameters()).dtype
    inputs, samples = batch['inputs'].to(dtype), batch.get('data_samples')
    if samples is None:
        return _named_tensors({'output': model(inputs)})
    outputs = {'features': model.extract_feat(inputs)}
    try:
        if proposals is not None:
            outputs['rpn'] = model.rpn_head(outputs['features'])
            outputs['roi'] = model.roi_head.forward(
                outputs['features'], [p.to(dtype) for p in proposals], samples)
        else:
            outputs['output'] = model(inputs, samples, mode='tensor')
    except (RuntimeError, TypeError):
        pass  # in one form only: the other's outputs then lack a counterpart, an error
    return _named_tensors(outputs)


def own_proposals(model: nn.Module, batch: dict) -> list | None:
    """The proposals of a detector that selects them by score, None for every other model.

    Args:
        model: In eval mode, float32.
        batch: See `verify`.
    """
    if not (getattr(model, 'with_rpn', False) and getattr(model, 'with_roi_head', False)):
        return None
    if not hasattr(model.rpn_head, 'rpn_cls'):  # learned queries, not a selection
        return None
    features = model.extract_feat(batch['inputs'].float())
    return model.rpn_head.predict(features, batch['data_samples'], rescale=False)


def _frozen(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    model = copy.deepcopy(model).to(dtype)
    model.eval()  # a statement of its own: not every backbone's train() returns itself
    return model


def _named_tensors(outputs: dict) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in _flatten(outputs) if tensor.numel()}


def _flatten(value: Any, name: str = '') -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _flatten(item, f'{name}.{key}' if name else str(key))
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _flatten(item, f'{name}[{index}]')
