"""Prove that two forms of a model compute the same function."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import NothingToConvertError
from ..layers.precision import exact_float32
from .fold import fold_batch_norm
from .layer_check import (
    errors_on_random_inputs,
    layers_with_branches,
    other_settings,
    stored_errors,
)
from .locate import first_differing_layer
from .raw_outputs import describe, frozen, own_proposals, raw_outputs, scale_relative_error
from .reparameterize import converted, unwrapped
from .selection import SameSelection
from .verification_report import OutputError, SkippedOutputs, VerificationReport

#: Largest scale-relative error of a raw output that counts as equal. In float32 the two forms
#: round differently in every layer. In float64 kernels are squeezed from float64, and what is
#: left are some hundred layers' units of rounding (2e-16), with a margin of 1e4.
TOLERANCES = {'float32': 1e-4, 'float64': 1e-9}
#: The same for what the rounding of stored float32 kernels (6e-8) does to a raw output: a
#: deep network multiplies it by a thousand. Wrong kernels are found one by one as well.
ROUNDING_TOLERANCE = 1e-3
#: Units of rounding by which a stored tensor may be off, and by which kernels stored in half
#: precision may make outputs differ, at least.
_UNITS_OF_ROUNDING = 8
#: How an entry of a layer that was run by itself is marked.
ALONE = ' (on a random input)'
#: Errors by (output, dtype).
_Errors = dict[tuple[str, str], float]


def verify(before: nn.Module, after: nn.Module,
           inputs: Tensor | dict[str, Any] | Sequence[Tensor | dict[str, Any]]
           ) -> VerificationReport:
    """Compare two forms of a model: their raw outputs on real inputs, and layer by layer.

    Four comparisons, all on copies in eval mode, of one dtype at a time:

    1. In float32 the raw outputs of both forms.
    2. In float64 those of the model before and of it re-parameterized in
       float64, which proves the algebra.
    3. In float64 those of the model before and of the model after with the
       kernels that it stores: what their rounding does.
    4. Each stored tensor and each layer with branches on its own: a layer that no
       signal reaches on these inputs shows in no output.

    A detector with proposals gets the same proposals in both forms, those of
    the form before, and whatever else selects by score (the queries of a DETR in
    two stages) selects the same: a difference of rounding must not become one of
    selection. The scores are compared.

    Args:
        before: The model in training form.
        after: The model re-parameterized.
        inputs: One or several batches: tensors of shape `(N, 3, H, W)`, or
            what an OpenMMLab model's data preprocessor returns, a dictionary
            with such `inputs` and `data_samples`.

    Returns:
        The errors of all of these, what did not run, layers that were not
        converted, and where a difference starts.

    Example:
        >>> import torch
        >>> from orepa_mm.layers import OREPAConv2d
        >>> from orepa_mm.reparam import reparameterize
        >>> model = OREPAConv2d(3, 8, 3, padding=1)
        >>> verify(model, reparameterize(model), torch.rand(2, 3, 16, 16)).passed
        True
    """
    before, after = unwrapped(before), unwrapped(after)
    batches = [{'inputs': batch} if isinstance(batch, Tensor) else batch
               for batch in ([inputs] if isinstance(inputs, (Tensor, Mapping)) else inputs)]
    found = _Findings(max((torch.finfo(p.dtype).eps for p in after.parameters()), default=0.0))
    with torch.no_grad(), exact_float32():
        proposals = _compare_in_float32(before, after, batches, found)
        _compare_in_float64(before, after, batches, proposals, found)
    return VerificationReport(
        errors=found.listed(found.errors), rounding=found.listed(found.rounding),
        layers=tuple(found.layers), skipped=tuple(found.skipped.values()),
        uncompared=tuple(found.uncompared), unmatched=tuple(found.unmatched),
        unconverted=tuple(layers_with_branches(after)),
        not_run=tuple(found.not_run), dead=tuple(sorted(found.dead)),
        first_difference=found.first_difference)


@dataclass
class _Findings:
    """What the comparisons found so far; errors are the largest of all batches."""

    unit: float  # of rounding, of the stored tensors
    errors: _Errors = field(default_factory=dict)
    rounding: _Errors = field(default_factory=dict)
    layers: list[OutputError] = field(default_factory=list)
    skipped: dict[tuple[str, str, str], SkippedOutputs] = field(default_factory=dict)
    uncompared: list[str] = field(default_factory=list)
    unmatched: list[str] = field(default_factory=list)
    not_run: list[str] = field(default_factory=list)
    dead: set[str] = field(default_factory=set)
    first_difference: str | None = None

    def tolerance(self, errors: _Errors, dtype: str) -> float:
        if errors is self.rounding:
            return max(ROUNDING_TOLERANCE, _UNITS_OF_ROUNDING * self.unit)
        if dtype == 'float64':  # there, nothing is stored
            return TOLERANCES[dtype]
        return max(TOLERANCES[dtype], _UNITS_OF_ROUNDING * self.unit)

    def outputs(self, model: nn.Module, form: str, dtype: str, batch: dict[str, Any],
                proposals: list[Any] | None, selection: SameSelection) -> dict[str, Tensor]:
        """Raw outputs; what does not run is noted."""
        failed: dict[str, str] = {}
        outputs = raw_outputs(model, batch, proposals, failed, selection)
        self.skip(form, dtype, failed)
        return outputs

    def skip(self, form: str, dtype: str, failed: Mapping[str, str]) -> None:
        for group, reason in failed.items():
            self.skipped.setdefault((group, form, dtype),
                                    SkippedOutputs(group, form, dtype, reason))

    def compare(self, errors: _Errors, dtype: str, expected: Mapping[str, Tensor],
                found: Mapping[str, Tensor]) -> bool:
        """Note the errors of one batch; whether all outputs agree."""
        agree = True
        for name in expected.keys() | found.keys():
            pair = expected.get(name), found.get(name)
            if all(tensor is not None and not tensor.any() for tensor in pair):
                self.dead.add(name)
                continue
            error = scale_relative_error(*pair)
            errors[name, dtype] = max(error, errors.get((name, dtype), 0.0))
            agree &= error <= self.tolerance(errors, dtype)
        return agree

    def listed(self, errors: _Errors) -> tuple[OutputError, ...]:
        return tuple(OutputError(name, dtype, error, self.tolerance(errors, dtype))
                     for (name, dtype), error in sorted(errors.items()))


def _compare_in_float32(before: nn.Module, after: nn.Module, batches: list[dict[str, Any]],
                        found: _Findings) -> list[list[Any] | None]:
    """Compare raw outputs; the proposals of each batch."""
    before, after = frozen(before, torch.float32), frozen(after, torch.float32)
    called: set[str] = set()
    layers = layers_with_branches(before)
    for name, layer in layers.items():
        layer.register_forward_hook(lambda module, args, output, name=name: called.add(name))
    proposals: list[list[Any] | None] = []
    for batch in batches:
        try:
            proposals.append(own_proposals(before, batch))
        except Exception as error:  # as of a head, see raw_outputs
            proposals.append(None)
            found.skip('training', 'float32', {'roi': describe(error)})
        own = SameSelection()
        expected = found.outputs(before, 'training', 'float32', batch, proposals[-1], own)
        found.compare(found.errors, 'float32', expected, found.outputs(
            after, 'deployed', 'float32', batch, proposals[-1], SameSelection(own)))
    found.not_run = sorted(layers.keys() - called)
    return proposals


def _compare_in_float64(before: nn.Module, after: nn.Module, batches: list[dict[str, Any]],
                        proposals: list[list[Any] | None], found: _Findings) -> None:
    """Compare raw outputs with exact and with stored kernels, and all layers."""
    before, stored = frozen(before, torch.float64), frozen(after, torch.float64)
    exact = _re_parameterized(before, folded=any(
        getattr(module, 'folded_norm', False) for module in after.modules()))
    _compare_layers(before, exact, after, stored, found)
    found.first_difference = next((_layer_of(error.name) for error in found.layers
                                   if not error.passed), None)
    for batch, own in zip(batches, proposals):
        selection = SameSelection()
        expected = found.outputs(before, 'training', 'float64', batch, own, selection)
        for errors, model in ((found.errors, exact), (found.rounding, stored)):
            agree = found.compare(errors, 'float64', expected, found.outputs(
                model, 'deployed', 'float64', batch, own, SameSelection(selection)))
            if not agree and found.first_difference is None:
                found.first_difference = first_differing_layer(
                    before, model, lambda model: raw_outputs(
                        model, batch, own, selection=SameSelection(selection)),  # noqa: B023
                    found.tolerance(errors, 'float64'))


def _compare_layers(before: nn.Module, exact: nn.Module, after: nn.Module, stored: nn.Module,
                    found: _Findings) -> None:
    stored_as = {name: tensor.dtype for name, tensor in after.state_dict().items()}
    errors, missed = stored_errors(exact, after)
    found.layers = [OutputError(name, str(stored_as[name]).removeprefix('torch.'), error,
                                _by_rounding(torch.finfo(stored_as[name]).eps))
                    for name, error in errors.items()]
    alone, layers = errors_on_random_inputs(before, stored)
    found.layers += [OutputError(name + ALONE, 'float64', error, _by_rounding(found.unit))
                     for name, error in alone.items()]
    found.uncompared = sorted(layers)
    found.unmatched = sorted(missed | other_settings(exact, after))


def _by_rounding(unit: float) -> float:
    """What a layer's rounding may do to it alone; stored in float64, what a sum may."""
    return max(TOLERANCES['float64'], _UNITS_OF_ROUNDING * unit)


def _layer_of(name: str) -> str:
    """The layer of an entry of `layers`."""
    layer = name.removesuffix(ALONE) if name.endswith(ALONE) else name.rpartition('.')[0]
    return layer or 'itself'


def _re_parameterized(model: nn.Module, folded: bool) -> nn.Module:
    try:
        return converted(model, fold_bn=folded)[0]
    except NothingToConvertError:  # both forms are plain, or differ by folding only
        model = frozen(model, torch.float64)
        if folded:
            fold_batch_norm(model)
        return model
