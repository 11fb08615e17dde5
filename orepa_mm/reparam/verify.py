"""Prove that two forms of a model compute the same function."""

from __future__ import annotations

import contextlib
import copy
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from ..layers import ReparamConv2d, reparam_layers
from .reparameterize import unwrapped

#: Largest scale-relative error that counts as equal. In float32 the two forms
#: round differently in every layer; in float64 what is left is the rounding of
#: the deployed kernels to the float32 in which they are stored.
TOLERANCES = {'float32': 1e-4, 'float64': 1e-5}
#: Kernels stored in half precision are off by its unit of rounding, and layers add up:
#: the tolerance is at least this many units.
_UNITS_OF_ROUNDING = 8


@dataclass(frozen=True)
class OutputError:
    """The difference of one raw output.

    Attributes:
        name: Which output, e.g. `features[0]`, `rpn[1][2]`.
        dtype: `float32` or `float64`, in which both forms computed.
        error: Largest absolute difference over the largest absolute value of
            the output before; infinite where a value is not finite or the
            shapes differ.
        tolerance: Largest error that counts as equal.
    """

    name: str
    dtype: str
    error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether the error is within the tolerance."""
        return self.error <= self.tolerance


@dataclass(frozen=True)
class VerificationReport:
    """What `verify` measured.

    Attributes:
        errors: One entry per raw output and dtype.
        unconverted: Layers of the model after that still generate their kernel.
        first_difference: Where outputs differ: the first layer, in the order of
            execution, whose output does, e.g. `backbone.layer1.0.conv2`. None
            where they agree, or where no layer that both forms have differs.
        failure: What the model after failed with, where it did not run at all.
        not_run: Layers with branches that no raw output depends on, e.g. of an
            auxiliary head: nothing is proven of them.
    """

    errors: tuple[OutputError, ...]
    unconverted: tuple[str, ...] = ()
    first_difference: str | None = None
    failure: str | None = None
    not_run: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether every output agrees and every layer is converted; false without outputs."""
        return (bool(self.errors) and not self.unconverted
                and all(error.passed for error in self.errors))

    def largest(self, dtype: str) -> OutputError:
        """The entry with the largest error in `dtype`."""
        return max((e for e in self.errors if e.dtype == dtype), key=lambda e: e.error)

    def explain(self) -> str:
        """What failed, how much and where; or that all is equal."""
        lines = []
        if not self.errors:
            lines.append('there was no input to compare the two forms on, or no tensor came out of '
                         'it that is not zero')
        if self.unconverted:
            lines.append(f'not converted: {", ".join(self.unconverted)}')
        if self.failure:
            lines.append(f'the re-parameterized model does not run: {self.failure}')
        failed = sorted((e for e in self.errors if not e.passed), key=lambda e: -e.error)
        if failed:
            lines.append('scale-relative errors of the raw outputs (infinite: not a finite '
                         'number, or another shape):')
            lines += [f'  {e.name} in {e.dtype}: {e.error:.2e}, allowed {e.tolerance:.0e}'
                      for e in failed[:8]]
            if len(failed) > 8:
                lines.append(f'  and {len(failed) - 8} more')
            lines.append(f'the difference starts in the layer {self.first_difference}'
                         if self.first_difference else
                         'no layer that both forms have differs by itself')
        if not lines:
            lines.append('the raw outputs of both forms agree')
        if self.not_run:
            lines.append(f'no raw output depends on: {", ".join(self.not_run)}')
        return '\n'.join(lines)

    def as_dict(self) -> dict[str, Any]:
        """Plain types only, for a file."""
        return {'passed': self.passed, 'unconverted': list(self.unconverted),
                'first_difference': self.first_difference, 'failure': self.failure,
                'not_run': list(self.not_run),
                'errors': [asdict(error) for error in self.errors]}


def verify(before: nn.Module, after: nn.Module,
           inputs: Tensor | dict | Sequence[Tensor | dict]) -> VerificationReport:
    """Compare the raw outputs of two forms of a model on real inputs.

    Both are copied and compared in eval mode, whatever mode they are in.
    A detector with proposals gets the same proposals in both forms, those of
    the form before: a difference of rounding must not become one of selection.

    Args:
        before: The model in training form.
        after: The model re-parameterized.
        inputs: One or several batches: tensors of shape `(N, 3, H, W)`, or
            what an OpenMMLab model's data preprocessor returns, a dictionary
            with such `inputs` and `data_samples`.

    Returns:
        The error of every raw output, in float32 and in float64, layers that
        were not converted, and where a difference starts.
    """
    before, after = unwrapped(before), unwrapped(after)
    errors: dict[tuple[str, str], float] = {}
    pairs = {'float32': (_frozen(before, torch.float32), _frozen(after, torch.float32))}
    pairs['float64'] = (_frozen(before, torch.float64), _frozen(after, torch.float64))
    tolerances = _tolerances(after)
    first_difference = failure = None
    idle = set(_layers_with_branches(before))
    for name in idle:
        pairs['float32'][0].get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: called.add(name))
    called: set[str] = set()
    with torch.no_grad(), exact_float32():
        for batch in _batches(inputs):
            proposals = own_proposals(pairs['float32'][0], batch)
            failed = False
            for dtype, (one, other) in pairs.items():
                expected = raw_outputs(one, batch, proposals)
                try:
                    found = raw_outputs(other, batch, proposals)
                except Exception as error:  # a shape that does not fit, for example
                    found, failure = {}, str(error) or type(error).__name__
                for name in expected.keys() | found.keys():
                    if _is_zero(expected.get(name)) and _is_zero(found.get(name)):
                        continue  # dead in both: proves nothing
                    error = scale_relative_error(expected.get(name), found.get(name))
                    errors[name, dtype] = max(error, errors.get((name, dtype), 0.0))
                    failed |= not error <= tolerances[dtype]
            if failed and first_difference is None:
                first_difference = first_differing_layer(
                    *pairs['float64'], lambda model: raw_outputs(model, batch, proposals),  # noqa: B023
                    tolerances['float64'])
    unconverted = tuple(_layers_with_branches(after))
    return VerificationReport(
        tuple(OutputError(name, dtype, error, tolerances[dtype])
              for (name, dtype), error in sorted(errors.items())),
        unconverted, first_difference, failure, tuple(sorted(idle - called)))


def first_differing_layer(before: nn.Module, after: nn.Module, run: Callable[[nn.Module], object],
                          tolerance: float) -> str | None:
    """Find the first layer, in the order of execution, whose output differs.

    Compared are the outputs of the innermost modules that both forms have
    under the same name. A convolution that took over the bias of the BN behind
    it, or gave its own away, is compared together with that BN.

    Args:
        before: In eval mode.
        after: In eval mode, of the same dtype.
        run: Runs a model on the input that shows the difference.
        tolerance: Largest scale-relative error that counts as equal.

    Returns:
        The layer's name, or None if no such layer differs.
    """
    names = dict(before.named_modules()).keys() & dict(after.named_modules()).keys()
    outer = {'.'.join(name.split('.')[:length]) for name in names if name
             for length in range(name.count('.') + 1)}
    units = names - outer
    expected, found = (_recorded(model, units, run) for model in (before, after))
    pending = None
    for call, output in expected.items():
        if call not in found:
            continue
        name = call[0]
        if _has_bias(before.get_submodule(name)) != _has_bias(after.get_submodule(name)):
            pending = name
            continue
        error = max((scale_relative_error(one, other)
                     for one, other in zip_longest(output, found[call])), default=0.0)
        if not error <= tolerance:
            return (name if pending is None else pending) or 'itself'
        pending = None
    return None


def _recorded(model: nn.Module, names: Collection[str], run: Callable[[nn.Module], object]
              ) -> dict[tuple[str, int], list[Tensor]]:
    """Outputs of modules by (name, number of the call), in the order of execution."""
    outputs: dict[tuple[str, int], list[Tensor]] = {}
    calls: Counter[str] = Counter()

    def record(name: str, output: object) -> None:
        # a copy: the next layer may write into it; in float32, half the memory
        outputs[name, calls[name]] = [tensor.float().clone() for _, tensor in _flatten(output)]
        calls[name] += 1

    hooks = [model.get_submodule(name).register_forward_hook(
        lambda module, args, output, name=name: record(name, output)) for name in names]
    try:
        run(model)
    except Exception:
        pass  # what ran until then says where it starts
    finally:
        for hook in hooks:
            hook.remove()
    return outputs


def _layers_with_branches(model: nn.Module) -> list[str]:
    layers = set(reparam_layers(model))
    return [name for name, module in model.named_modules() if module in layers]


def _is_zero(output: Tensor | None) -> bool:
    return output is not None and not output.any()


def _has_bias(layer: nn.Module) -> bool:
    """Whether the convolution that this is, or equals, has a bias."""
    if isinstance(layer, ReparamConv2d):
        return layer.equivalent_kernel_bias()[1] is not None
    return isinstance(layer, nn.Conv2d) and layer.bias is not None


def _batches(inputs: Tensor | dict | Sequence[Tensor | dict]) -> Iterator[dict]:
    for batch in [inputs] if isinstance(inputs, (Tensor, Mapping)) else inputs:
        yield {'inputs': batch} if isinstance(batch, Tensor) else batch


def _tolerances(after: nn.Module) -> dict[str, float]:
    """The tolerance in each dtype, for the precision in which the model's kernels are stored."""
    rounding = max((torch.finfo(p.dtype).eps for p in after.parameters()), default=0.0)
    return {dtype: max(tolerance, _UNITS_OF_ROUNDING * rounding)
            for dtype, tolerance in TOLERANCES.items()}


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
