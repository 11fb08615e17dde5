"""What a verification found."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import shortened

#: How many lines of a kind are printed.
_LINES = 8


@dataclass(frozen=True)
class OutputError:
    """The difference of one raw output, or of one layer on its own.

    Attributes:
        name: Which, e.g. `features[0]`, `rpn[1][2]`, `backbone.conv1.weight`.
        dtype: `float32` or `float64`, in which both forms computed; of a stored
            tensor the type in which it is stored.
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
class SkippedOutputs:
    """A group of raw outputs that did not run.

    Attributes:
        group: `features`, `rpn`, `roi` or `output`.
        form: `training` or `deployed`.
        dtype: `float32` or `float64`.
        reason: What it failed with.
    """

    group: str
    form: str
    dtype: str
    reason: str


@dataclass(frozen=True)
class VerificationReport:
    """What `verify` measured.

    Attributes:
        errors: One entry per raw output and dtype. In float64 the model after
            has kernels that were squeezed from the float64 model before: what is
            compared there is the algebra.
        rounding: One entry per raw output: the model after with the kernels that
            it stores, computed in float64, to the model before.
        layers: One entry per tensor that the model after stores, to the one
            that was squeezed in float64; and one per layer with branches, run
            on a random input of its own.
        skipped: What did not run, and why.
        uncompared: Layers with branches that could not be compared on their own:
            they have no counterpart of the same name.
        unmatched: Tensors that only one form has, and layers that are set up
            differently (stride, eps): the model after is another network.
        unconverted: Layers of the model after that still generate their kernel.
        not_run: Layers with branches that no raw output depends on, e.g. of an
            auxiliary head: of these only `layers` tells.
        dead: Raw outputs that are zero in both forms, which proves nothing.
        first_difference: Where something differs: the first layer that does on
            its own, in the order in which the model lists them; if none does, the
            first in the order of execution whose output does, e.g.
            `backbone.layer1.0.conv2`. None where all agree, or where no layer
            that both forms have differs.
    """

    errors: tuple[OutputError, ...]
    rounding: tuple[OutputError, ...] = ()
    layers: tuple[OutputError, ...] = ()
    skipped: tuple[SkippedOutputs, ...] = ()
    uncompared: tuple[str, ...] = ()
    unmatched: tuple[str, ...] = ()
    unconverted: tuple[str, ...] = ()
    not_run: tuple[str, ...] = ()
    dead: tuple[str, ...] = ()
    first_difference: str | None = None

    @property
    def passed(self) -> bool:
        """Whether all that was compared agrees, and every group of outputs ran in float32.

        False without outputs, where a layer was not converted, and where the
        model after is another network.
        """
        return (bool(self.errors) and not self.unconverted and not self.unmatched
                and not any(skipped.dtype == 'float32' for skipped in self.skipped)
                and all(error.passed for error in (*self.errors, *self.rounding, *self.layers)))

    @property
    def complete(self) -> bool:
        """Whether it passed, with nothing left out that the raw outputs could have shown."""
        return self.passed and not (self.skipped or self.not_run or self.dead)

    def largest(self, dtype: str) -> OutputError:
        """The raw output with the largest error.

        Args:
            dtype: `float32` or `float64`, of the comparison.

        Raises:
            ValueError: If no output was compared in this dtype.
        """
        return max((e for e in self.errors if e.dtype == dtype), key=lambda e: e.error)

    def dtypes(self) -> dict[str, tuple[str, ...]]:
        """The dtypes in which each group of outputs was compared."""
        found: dict[str, set[str]] = {}
        for error in self.errors:
            found.setdefault(re.split(r'[.\[]', error.name)[0], set()).add(error.dtype)
        return {group: tuple(sorted(dtypes)) for group, dtypes in found.items()}

    def explain(self) -> str:
        """What failed, how much and where, or that all is equal; and what was not compared."""
        return '\n'.join([*self._failures(), *self._remarks()])

    def as_dict(self) -> dict[str, Any]:
        """Plain types only, for a file; of `layers` the largest and the failed ones."""
        largest = max(self.layers, key=lambda e: e.error / e.tolerance, default=None)
        return {'passed': self.passed, 'complete': self.complete, 'explanation': self.explain(),
                'dtypes': {group: list(dtypes) for group, dtypes in self.dtypes().items()},
                'skipped': [asdict(skipped) for skipped in self.skipped],
                **{name: list(getattr(self, name))
                   for name in ('unconverted', 'unmatched', 'not_run', 'dead', 'uncompared')},
                'first_difference': self.first_difference,
                'layers': {'compared': len(self.layers), 'largest': largest and asdict(largest),
                           'failed': [asdict(e) for e in self.layers if not e.passed]},
                'errors': [asdict(error) for error in self.errors],
                'rounding': [asdict(error) for error in self.rounding]}

    def _failures(self) -> Iterator[str]:
        if self.passed:
            yield 'the raw outputs of both forms agree'
            return
        if not self.errors:
            yield ('there was no input to compare the two forms on, or no tensor came out of it '
                   'that is not zero')
        if self.unconverted:
            yield f'not converted: {", ".join(self.unconverted)}'
        if self.unmatched:
            yield ('another network, only one form has or is set up so: '
                   f'{shortened(self.unmatched)}')
        differ = False
        for title, errors in (
                ('scale-relative errors of the raw outputs (infinite: not a finite number, or '
                 'another shape)', self.errors),
                ('the same of the kernels as they are stored', self.rounding),
                ('layers that differ on their own', self.layers)):
            failed = sorted((e for e in errors if not e.passed), key=lambda e: -e.error)
            if failed:
                differ = True
                yield f'{title}:'
                yield from (f'  {e.name} in {e.dtype}: {e.error:.2e}, allowed {e.tolerance:.0e}'
                            for e in failed[:_LINES])
            if len(failed) > _LINES:
                yield f'  and {len(failed) - _LINES} more'
        if differ:
            yield (f'the difference starts in the layer {self.first_difference}'
                   if self.first_difference else
                   'no layer that both forms have differs by itself')

    def _remarks(self) -> Iterator[str]:
        exact = (*self.rounding, *self.layers, *(e for e in self.errors if e.dtype == 'float64'))
        if (self.rounding and all(error.passed for error in exact)
                and not all(error.passed for error in self.errors)):
            yield ('in float64 and layer by layer the two forms agree: the model amplifies the '
                   'rounding of float32, by which its own outputs are uncertain')
        for skipped in self.skipped:
            yield (f'{skipped.group} of the {skipped.form} form does not run in {skipped.dtype}: '
                   f'{skipped.reason}')
        if self.errors and self.skipped:
            yield 'compared: ' + '; '.join(f'{group} in {" and ".join(dtypes)}'
                                           for group, dtypes in self.dtypes().items())
        for title, names in (('no raw output depends on', self.not_run),
                             ('zero in both forms, which proves nothing', self.dead),
                             ('not compared on their own, for want of a counterpart of the same '
                              'name', self.uncompared)):
            if names:
                more = f' and {len(names) - _LINES} more' if len(names) > _LINES else ''
                yield f'{title}: {", ".join(names[:_LINES])}{more}'
