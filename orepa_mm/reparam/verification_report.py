"""What a verification found."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class OutputError:
    """The difference of one raw output, or of one stored tensor.

    Attributes:
        name: Which, e.g. `neck[0]`, `output[1][2]`, `backbone.conv1.weight`.
        dtype: `float32`, in which both forms computed; of a stored tensor its type.
        error: Largest absolute difference over the largest absolute value expected;
            infinite where a value is not a number, only one is infinite, or the shapes
            differ.
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
        errors: One entry per raw output, computed in float32.
        tensors: One entry per tensor that the model after holds, to the one that was
            squeezed in float64 from the model before.
        differences: By name of the module, where the model after is another network:
            modules that only one form has, other types, other settings.
        unconverted: Layers of the model after that still generate their kernel.
        skipped: What did not run, and why.
        not_run: Layers with branches that no signal reached on these inputs, e.g. of an
            auxiliary head: of these only `tensors` tells.
        dead: Raw outputs that are zero in both forms, which proves nothing.
    """

    errors: tuple[OutputError, ...]
    tensors: tuple[OutputError, ...] = ()
    differences: Mapping[str, str] = field(default_factory=dict)
    unconverted: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    not_run: tuple[str, ...] = ()
    dead: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether both forms ran, are one network, and all that was compared agrees."""
        return (bool(self.errors)
                and not (self.differences or self.unconverted or self.skipped)
                and all(error.passed for error in (*self.errors, *self.tensors)))

    @property
    def complete(self) -> bool:
        """Whether it passed, with nothing left out that the raw outputs could have shown."""
        return self.passed and not (self.not_run or self.dead)

    @property
    def first_difference(self) -> str | None:
        """The first layer with another tensor, or else the first that is set up otherwise."""
        layers = [*(error.name.rpartition('.')[0] for error in self.tensors if not error.passed),
                  *self.differences]
        return (layers[0] or 'itself') if layers else None

    def largest(self, dtype: str = 'float32') -> OutputError:
        """The raw output with the largest error.

        Args:
            dtype: In which it was computed.

        Raises:
            ValueError: If no output was compared.
        """
        return max((e for e in self.errors if e.dtype == dtype), key=lambda e: e.error)

    def explain(self) -> str:
        """What failed, how much and where, or that all is equal; and what was not compared."""
        return '\n'.join(self._lines())

    def as_dict(self) -> dict[str, Any]:
        """Plain types only, for a file; of `tensors` the largest error and the failed ones."""
        largest = max(self.tensors, key=lambda e: e.error / (e.tolerance or 1), default=None)
        return {**asdict(self), 'passed': self.passed, 'complete': self.complete,
                'explanation': self.explain(), 'first_difference': self.first_difference,
                'tensors': {'compared': len(self.tensors), 'largest': largest and asdict(largest),
                            'failed': [asdict(e) for e in self.tensors if not e.passed]}}

    def _lines(self) -> Iterator[str]:
        if self.passed:
            yield 'the raw outputs and all tensors of both forms agree'
        elif not (self.errors or self.skipped):
            yield ('there was no input to compare the two forms on, or no tensor came out of it '
                   'that is not zero')
        outputs, tensors = map(_failed, (self.errors, self.tensors))
        others = [f'{name or "the model"}: {text}' for name, text in self.differences.items()]
        for title, lines in (
                ('not compared, for it failed', self.skipped),
                ('not converted', self.unconverted), ('another network', others),
                ('scale-relative errors of the raw outputs (infinite: not a number, infinite in '
                 'one form, or another shape)', outputs),
                ('stored tensors that are not those of the model before', tensors),
                ('no raw output depends on', self.not_run),
                ('zero in both forms, which proves nothing', self.dead)):
            if lines:
                more = f'\n  and {len(lines) - 8} more' if len(lines) > 8 else ''
                yield f'{title}:\n  ' + '\n  '.join(lines[:8]) + more
        if self.first_difference:
            yield f'the difference starts in the layer {self.first_difference}'
        elif outputs:
            yield ('every tensor and every setting agrees: something else acts on the outputs (a '
                   'hook, a method that was replaced), or the model amplifies the rounding of '
                   'float32, by which its own outputs are uncertain')


def _failed(errors: Sequence[OutputError]) -> list[str]:
    return [f'{e.name} in {e.dtype}: {e.error:.2e}, allowed {e.tolerance:.0e}'
            for e in sorted(errors, key=lambda e: -e.error) if not e.passed]
