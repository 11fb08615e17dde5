"""Prove that two forms of a model compute the same function."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import NothingToConvertError
from ..layers import FoldedNorm, ReparamConv2d, cached, reparam_layers
from ..layers.precision import exact_float32
from .copies import own_copy
from .fold import fold_batch_norm
from .raw_outputs import run, scale_relative_error
from .reparameterize import converted, unwrapped
from .tree import differences
from .verification_report import OutputError, VerificationReport

#: Largest scale-relative error of a raw output in float32 that counts as equal: the two forms
#: round differently in every layer.
TOLERANCE = 1e-4
#: Units of rounding by which a stored tensor may be off, and by which kernels stored in half
#: precision may make outputs differ.
TENSOR_UNITS, OUTPUT_UNITS = 4, 8
#: Largest scale-relative error of the kernel of a stem whose chain was made to generate it.
CHAIN_TOLERANCE = 1e-5

Batch = Tensor | Mapping[str, Any] | Sequence[Any]


def verify(before: nn.Module, after: nn.Module, inputs: Batch | Sequence[Batch]
           ) -> VerificationReport:
    """Compare two forms of a model: the networks, every tensor, and raw outputs on real inputs.

    Three comparisons, on copies in eval mode:

    1. The model after is the same tree of modules as the model before
       re-parameterized: names, types, and the settings that count in eval mode,
       whatever holds them (`inplace`, the momentum of a BN and rates of dropout
       do not count).
    2. Each tensor that the model after holds is the one that is squeezed from the
       model before in float64.
    3. In float32 the raw outputs of both are the same.

    A detector with proposals gets the same proposals in both forms, those of
    the form before, and whatever else selects by score (the queries of a DETR in
    two stages) selects the same: a difference of rounding must not become one of
    selection. The scores are compared.

    Args:
        before: The model in training form.
        after: The model re-parameterized.
        inputs: One or several batches: tensors of shape `(N, 3, H, W)`, or
            what an OpenMMLab model's data preprocessor returns, a dictionary
            (`inputs` and `data_samples`), or a list of positional arguments.

    Returns:
        The errors of all of these, what did not run, and layers that were not converted.

    Raises:
        TypeError: If a model cannot be copied; it names the attribute.

    Example:
        >>> import torch
        >>> from orepa_mm.layers import OREPAConv2d
        >>> from orepa_mm.reparam import reparameterize
        >>> model = OREPAConv2d(3, 8, 3, padding=1)
        >>> verify(model, reparameterize(model), torch.rand(2, 3, 16, 16)).passed
        True
    """
    before, after = (own_copy(unwrapped(model)) for model in (before, after))
    for model in (before, after):
        model.eval()  # a statement of its own: not every train() returns itself
    unit = max(map(_unit, after.parameters()), default=0.0)
    errors: dict[str, float] = {}
    dead, skipped, layers = set(), set(), layers_with_branches(before)
    not_run = set(layers)
    with torch.no_grad(), exact_float32():
        expected = _re_parameterized(before, after)
        tensors = tuple(_tensor_errors(expected, after, layers))
        for model in (before, after):
            nn.Module.float(model)  # mmdet's models with a teacher take no dtype in `to`
        for name, layer in layers.items():
            layer.register_forward_hook(lambda *args, name=name: not_run.discard(name))
        with cached():
            for batch in [inputs] if isinstance(inputs, (Tensor, Mapping)) else inputs:
                batch = (batch,) if isinstance(batch, Tensor) else batch
                first = run(before, batch)
                second = run(after, batch, first)
                forms = {'training': first, 'deployed': second}
                skipped |= {f'the {form} form does not run: {of.failure}'
                            for form, of in forms.items() if of.failure}
                for name in first.outputs.keys() | second.outputs.keys():
                    one, other = first.outputs.get(name), second.outputs.get(name)
                    error = scale_relative_error(one, other)
                    if one is not None and error == 0 and not one.masked_fill(one.isinf(), 0).any():
                        dead.add(name)
                    else:
                        errors[name] = max(error, errors.get(name, 0.0))
        others = differences(expected, after, before)
    tolerance = max(TOLERANCE, OUTPUT_UNITS * unit)
    return VerificationReport(
        tuple(OutputError(name, 'float32', errors[name], tolerance) for name in sorted(errors)),
        tensors, others, tuple(layers_with_branches(after)),
        *map(tuple, map(sorted, (skipped, not_run, dead))))


def layers_with_branches(model: nn.Module) -> dict[str, ReparamConv2d]:
    """Every layer that generates its kernel, by name.

    Args:
        model: Any module.
    """
    layers = set(reparam_layers(model))
    return {name: module for name, module in model.named_modules() if module in layers}


def _re_parameterized(before: nn.Module, after: nn.Module) -> nn.Module:
    """What the model after should be."""
    folded = any(isinstance(module, FoldedNorm) for module in after.modules())
    try:
        return converted(before, fold_bn=folded)[0]
    except NothingToConvertError:  # both forms are plain, or differ by folding only
        expected = own_copy(before)
        if folded:
            fold_batch_norm(expected)
        return expected


def _tensor_errors(expected: nn.Module, after: nn.Module, layers: Mapping[str, Any]
                   ) -> Iterator[OutputError]:
    """How far each tensor is from the one expected, where both models have one.

    A kernel is no more certain than the branches that add up to it; those of a stem come from a
    chain, in which all channels have a part.
    """
    theirs, found = ({**dict(model.named_parameters()), **dict(model.named_buffers())}
                     for model in (expected, after))
    for name, tensor in theirs.items():
        if name in found and tensor.numel() and not name.endswith('num_batches_tracked'):
            other, layer = found[name], layers.get(name.rpartition('.')[0])
            tolerance = TENSOR_UNITS * max(map(_unit, (tensor, other)))
            channels = len(tensor) if tensor.dim() > 1 else 1
            error = scale_relative_error(tensor, other, channels)
            if layer is not None and error > tolerance and tensor.shape == layer.kernel_shape:
                branches: Any = getattr(layer, 'branch_kernels', dict)().values()
                if branches:
                    scale = torch.stack([*branches]).abs().sum(0)
                    error = scale_relative_error(tensor, other, channels, scale)
                else:
                    error = scale_relative_error(tensor, other)
                    tolerance = max(tolerance, CHAIN_TOLERANCE)
            yield OutputError(name, str(other.dtype).removeprefix('torch.'), error, tolerance)


def _unit(tensor: Tensor) -> float:
    return torch.finfo(tensor.dtype).eps if tensor.is_floating_point() else 0.0
