"""What a comparison says: spread per variant, paired differences, and no more than they allow."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mmengine.config import Config
from scipy.stats import ttest_1samp, ttest_rel

from ..engine.metrics import changed_metrics
from ..errors import ConfigError, shortened

#: Of every interval.
CONFIDENCE = 0.95
#: How the intervals are made.
METHOD = ('Paired t intervals of 95 % (scipy.stats.ttest_rel) over the seeds that both variants '
          'have; they assume that the differences are roughly normally distributed.')
#: Values that differ by less than this, relative to the largest, differ by rounding.
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Outcome:
    """What one run came to.

    Attributes:
        variant: What was trained.
        seed: Of the run.
        metric: Of the plain (deployed) form; NaN if it is not defined.
        training_metric: Of the training form; None for a network that has one form.
        seconds_per_iteration: Median while training.
        peak_bytes: Peak memory of the training; None if it is not known.
        kernel_step: Mean relative step of the kernels; NaN if it was not measured.
        parameters: While training.
    """

    variant: str
    seed: int
    metric: float
    training_metric: float | None
    seconds_per_iteration: float
    peak_bytes: int | None
    kernel_step: float
    parameters: int


@dataclass(frozen=True)
class Spread:
    """A variant over its seeds; what cannot be computed is None.

    Attributes:
        variant: What was trained.
        values: The metric by seed; seeds without a number are left out.
        mean: Of the values.
        deviation: Standard deviation (n - 1); from two seeds on.
        interval: Of the mean, t, 95 %; from two different values on.
        seconds_per_iteration: Mean over the runs.
        time_ratio: Mean of the ratios to the reference's run of the same seed.
        peak_bytes: The largest of the runs.
        kernel_step: Mean over the runs.
        parameters: While training.
    """

    variant: str
    values: dict[int, float]
    mean: float | None
    deviation: float | None
    interval: tuple[float, float] | None
    seconds_per_iteration: float
    time_ratio: float | None
    peak_bytes: int | None
    kernel_step: float | None
    parameters: int


@dataclass(frozen=True)
class Pair:
    """A variant minus the reference.

    Attributes:
        variant: What is compared.
        reference: What it is compared with.
        differences: By seed, where both have a number.
        mean: Of the differences; None without any.
        interval: Paired t interval, 95 %; None for one seed or differences without spread.
        sentence: What that says, in words.
    """

    variant: str
    reference: str
    differences: dict[int, float]
    mean: float | None
    interval: tuple[float, float] | None
    sentence: str


@dataclass(frozen=True)
class Comparison:
    """Variants of a training, over seeds.

    Attributes:
        metric: Its name.
        reference: The variant that the others are compared with.
        percent: Whether it is a percentage: differences are points then.
        outcomes: All runs.
        spreads: One for each variant, in the order of the outcomes.
        pairs: Every other variant minus the reference.
        notes: What has to be known to read the numbers.
    """

    metric: str
    reference: str
    percent: bool
    outcomes: tuple[Outcome, ...]
    spreads: tuple[Spread, ...]
    pairs: tuple[Pair, ...]
    notes: tuple[str, ...]

    def text(self, value: float | None, signed: bool = False) -> str:
        """A value of the metric with the digits that suit its unit.

        Args:
            value: The value, or a difference.
            signed: Whether to write a plus.
        """
        if value is None or not math.isfinite(value):
            return '-'
        return f'{value:{"+" if signed else ""}.{2 if self.percent else 4}f}'


def compare(outcomes: Sequence[Outcome], metric: str, reference: str | None = None,
            smaller_is_better: bool = False) -> Comparison:
    """Compare variants by a metric.

    Args:
        outcomes: At least one; no variant has a seed twice.
        metric: Name of the metric.
        reference: What the others are compared with; by default the first variant.
        smaller_is_better: Whether it is an error, not a quality.

    Raises:
        ConfigError: If there is no outcome, a seed comes twice, or no such reference.
    """
    if not outcomes:
        raise ConfigError('there is nothing to compare: no run has finished')
    by_variant: dict[str, dict[int, Outcome]] = {}
    for outcome in outcomes:
        of_variant = by_variant.setdefault(outcome.variant, {})
        if outcome.seed in of_variant:
            raise ConfigError(f'{outcome.variant} has seed {outcome.seed} twice')
        of_variant[outcome.seed] = outcome
    reference = next(iter(by_variant)) if reference is None else reference
    if reference not in by_variant:
        raise ConfigError(f'no run of the reference {reference} has finished; there are '
                          + ', '.join(by_variant))
    percent = not smaller_is_better and any(abs(outcome.metric) > 1 for outcome in outcomes
                                            if _is_number(outcome.metric))
    spreads = tuple(_spread(name, runs, by_variant[reference])
                    for name, runs in by_variant.items())
    base, = (spread for spread in spreads if spread.variant == reference)
    comparison = Comparison(metric, reference, percent, tuple(outcomes), spreads, (), ())
    pairs = tuple(_pair(spread, base, comparison, smaller_is_better) for spread in spreads
                  if spread is not base)
    return replace(comparison, pairs=pairs,
                   notes=tuple(_notes(comparison, pairs, smaller_is_better)))


def form_differences(outcome: Outcome, metric: str) -> list[str]:
    """Whether the metric of both forms differs by more than the tolerance: a line, or none.

    Args:
        outcome: Of one run.
        metric: Its name.
    """
    if outcome.training_metric is None:
        return []
    lines = changed_metrics({'training': {metric: outcome.training_metric},
                             'deployed': {metric: outcome.metric}})
    return [f'{outcome.variant}, seed {outcome.seed}: {line}' for line in lines]


def chosen_metric(cfg: Config, metrics: Mapping[str, Any], name: str | None = None) -> str:
    """The metric to compare by.

    Args:
        cfg: The training config.
        metrics: Of a tested network, by name.
        name: Of the metric, if it is to be a certain one.

    Returns:
        The given name; else what the config saves its best checkpoint by; else the
        first that is not of a single class. mIoU goes before aAcc, the share of
        pixels, which large classes decide.

    Raises:
        ConfigError: If there is no such metric, or none at all.
    """
    names = [key for key, value in metrics.items() if isinstance(value, (int, float))]
    if name is not None:
        if name not in names:
            raise ConfigError(f'there is no metric {name!r}; there are ' + ', '.join(names))
        return name
    best = _checkpoint_hook(cfg).get('save_best')
    for candidate in (best if isinstance(best, (list, tuple)) else [best]):
        if candidate in names:
            return candidate
    # MMDetection names the AP of a class `CLASS_precision`
    overall = [key for key in names if not key.endswith(('_precision', '_classwise'))]
    if not overall:
        raise ConfigError('the tests gave no metric of all classes; there are '
                          + (shortened(names) if names else 'none'))
    return 'mIoU' if 'mIoU' in overall else overall[0]


def smaller_is_better(cfg: Config, metric: str) -> bool:
    """Whether a metric is an error, by the rule that MMEngine saves the best by.

    Args:
        cfg: The training config.
        metric: Its name.
    """
    best, rules = ([value] if value is None or isinstance(value, str) else list(value)
                   for value in map(_checkpoint_hook(cfg).get, ('save_best', 'rule')))
    if len(rules) == 1:  # holds for all
        rules *= len(best)
    return 'loss' in metric.lower() or dict(zip(best, rules)).get(metric) == 'less'


def _checkpoint_hook(cfg: Config) -> Mapping[str, Any]:
    return (cfg.get('default_hooks') or {}).get('checkpoint') or {}


def _is_number(value: float | None) -> bool:
    return value is not None and math.isfinite(value) and value != -1  # COCO: no such object


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None and math.isfinite(value)]
    return statistics.fmean(known) if known else None


def _are_equal(values: Sequence[float]) -> bool:
    return max(values) - min(values) <= _ROUNDING * max(map(abs, values))


def _spread(variant: str, runs: Mapping[int, Outcome], base: Mapping[int, Outcome]) -> Spread:
    values = {seed: runs[seed].metric for seed in sorted(runs) if _is_number(runs[seed].metric)}
    numbers = list(values.values())
    interval = None
    if len(numbers) > 1 and not _are_equal(numbers):
        interval = tuple(map(float, ttest_1samp(numbers, 0).confidence_interval(CONFIDENCE)))
    peaks = [run.peak_bytes for run in runs.values() if run.peak_bytes is not None]
    return Spread(
        variant, values, _mean(numbers),
        statistics.stdev(numbers) if len(numbers) > 1 else None, interval,
        statistics.fmean(run.seconds_per_iteration for run in runs.values()),
        _mean(runs[seed].seconds_per_iteration / base[seed].seconds_per_iteration
              for seed in runs if seed in base),
        max(peaks, default=None), _mean(run.kernel_step for run in runs.values()),
        max(run.parameters for run in runs.values()))


def _pair(spread: Spread, base: Spread, comparison: Comparison, smaller: bool) -> Pair:
    seeds = [seed for seed in spread.values if seed in base.values]
    differences = {seed: spread.values[seed] - base.values[seed] for seed in seeds}
    interval = None
    # differences of numbers are as exact as the numbers are
    scale = max((abs(value) for part in (spread, base) for value in part.values.values()),
                default=0.0)
    numbers = list(differences.values())
    if len(seeds) > 1 and max(numbers) - min(numbers) > _ROUNDING * scale:
        test = ttest_rel([spread.values[seed] for seed in seeds],
                         [base.values[seed] for seed in seeds])
        interval = tuple(map(float, test.confidence_interval(CONFIDENCE)))
    pair = Pair(spread.variant, base.variant, differences, _mean(numbers), interval, '')
    return replace(pair, sentence=_sentence(pair, comparison, smaller))


def _sentence(pair: Pair, comparison: Comparison, smaller: bool) -> str:
    """What a pair says in words, and no more."""
    count, mean = len(pair.differences), pair.mean
    names = f'{pair.variant} and {pair.reference}'
    unit = ' points' if comparison.percent else ''
    if mean is None:
        return f'{names} have no seed in common with a number for both: nothing can be compared'
    difference = f'{comparison.text(mean, signed=True)}{unit}'
    if count == 1:
        return (f'{pair.variant} minus {pair.reference} is {difference}: one seed says nothing '
                'about chance')
    if pair.interval is None:
        return (f'{pair.variant} minus {pair.reference} is {difference} with each of {count} '
                'seeds: without spread there is no interval')
    low, high = (comparison.text(end, signed=True) for end in pair.interval)
    if pair.interval[0] <= 0 <= pair.interval[1]:
        return (f'no difference between {names} that these {count} seeds can tell from chance '
                f'(mean difference {difference}, 95 % interval {low} to {high})')
    word = 'better' if (mean > 0) != smaller else 'worse'
    return (f'{pair.variant} is {word} than {pair.reference} by '
            f'{comparison.text(abs(mean))}{unit} (95 % interval of the difference {low} to '
            f'{high}, {count} seeds)')


def _notes(comparison: Comparison, pairs: Sequence[Pair], smaller: bool) -> list[str]:
    notes = []
    unit = ('smaller is better' if smaller else 'in percent; differences are points'
            if comparison.percent else 'between 0 and 1')
    notes.append(f'Metric: {comparison.metric} of the plain form after the last '
                 f'iteration, {unit}.')
    if len(pairs) > 1:
        notes.append(
            f'{len(pairs)} comparisons are made with one reference, and their intervals are not '
            'corrected for it: were there no differences at all, chance alone would keep 0 out of '
            f'at least one interval in up to {min(100, 5 * len(pairs))} of 100 such reports.')
    every = {outcome.seed for outcome in comparison.outcomes}
    for spread in comparison.spreads:
        seeds = {outcome.seed for outcome in comparison.outcomes
                 if outcome.variant == spread.variant}
        undefined = sorted(seeds - set(spread.values))
        if undefined:
            notes.append(f'{spread.variant}: the metric is no number with {_seeds(undefined)}; '
                         'left out.')
        if every - seeds:
            notes.append(f'{spread.variant} has no result with {_seeds(sorted(every - seeds))}: '
                         'its mean is over other seeds than those of the rest. Differences are '
                         'over common seeds only.')
    for outcome in comparison.outcomes:
        notes += [f'THE TWO FORMS DIFFER: {line}'
                  for line in form_differences(outcome, comparison.metric)]
    return notes


def _seeds(seeds: Sequence[int]) -> str:
    return f'seed{"s" if len(seeds) > 1 else ""} {", ".join(map(str, seeds))}'
