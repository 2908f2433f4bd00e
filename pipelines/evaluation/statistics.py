"""Confidence intervals of scores: cluster bootstrap with percentiles, for one model and for the difference of two.

Questions about one image, or one question with sixteen instructions, succeed and fail together. The bootstrap therefore
resamples units: all outcomes that share an image or a question, in all groups and of all training seeds (Davison &
Hinkley 1997, Bootstrap Methods and their Application, section 3.8). Two models that answered the same items are
compared unit by unit. An item that is hard for both cancels out, so the interval of the difference is far narrower than
two separate intervals suggest.

These intervals are over items, not over training seeds. They predict the scores of the same models on other questions.
Two or three seeds say little about another training run, so a difference also counts as noise if its seeds disagree on
the sign.

`estimate_over_seeds` and `compare_over_seeds` are over items and seeds: they predict the scores of other training runs
on other questions. To each draw over items they add a deviation of the seeds' mean, the standard error times a draw
from Student's t. With three seeds that makes them much wider, and with one seed there is none.

`permutation_p_value` asks how often labels of the models, exchanged at random within units, give a difference as large.

If all units have the same outcome, the bootstrap has no variance: for 0 of 218 correct the interval is 0 to 0, which is
too narrow. The same holds for the difference of two models that differ alike in a few units. So a difference counts as
noise if the models differ in fewer than six units: five that all favour the same model are no rare accident.

Cost: a draw is a row of counts, one per unit. Its score is a row of a matrix product with the sums of the units. 10,000
draws of 3,488 units take 0.6 s on one core, of 218 units 0.1 s. Counts are cached for the next metric with as many
units, which then takes a sixth of the time. The cache has at most 160 MiB.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from redux.benchmarks import Metric

CONFIDENCE_LEVEL = 0.95
MIN_DIFFERING_UNITS = 6
"""Smallest number of units for which a sign test can reach 5 %: all six favour one model with probability 2 / 2^6."""

COUNTS_PER_CHUNK = 2**22
"""Number of counts (draws x units) that are in memory at a time."""


@dataclass(frozen=True)
class Interval:
    """A score and its 95 % interval."""

    value: float
    low: float
    high: float

    def scale(self, factor: float) -> "Interval":
        return Interval(self.value * factor, self.low * factor, self.high * factor)


@dataclass(frozen=True)
class Difference(Interval):
    """Score of one model minus the score of another, with its 95 % interval.

    Args:
        seeds_agree: every seed of one model is better than every seed of the other.
        differing_units: number of units in which the models differ, as means over seeds.
    """

    seeds_agree: bool
    differing_units: int

    @property
    def is_noise(self) -> bool:
        """True if the interval contains 0, the seeds disagree on the sign, or too few units differ.

        The interval is over items, not over training seeds. Agreement of two seeds each is weak evidence: equally good
        models agree in one of three cases.
        """
        few_differ = self.differing_units < MIN_DIFFERING_UNITS
        return self.low <= 0 <= self.high or not self.seeds_agree or few_differ

    def scale(self, factor: float) -> "Difference":
        return replace(self, value=self.value * factor, low=self.low * factor, high=self.high * factor)


def count_units(metric: Metric) -> int:
    """Count the images or questions whose outcomes succeed and fail together."""
    return len({outcome.unit for outcome in metric.outcomes})


def bootstrap_interval(metrics: Sequence[Metric], samples: int = 10_000, seed: int = 0) -> Interval:
    """Compute the mean score of a model over its training seeds, with its interval.

    A group without any unit in a draw keeps its mean over all units.

    Args:
        metrics: one metric per training seed, all of the same items.
        samples: number of draws. With fewer than 1,000 the ends of the interval are uncertain.
        seed: seed of the draws.

    Raises:
        ValueError: there are no outcomes, or the seeds have different items; the message names one.
    """
    scores = _resample_scores(_UnitSums([metrics]), samples, seed)[:, 0]
    return Interval(float(np.mean([metric.score for metric in metrics])), *_percentiles(scores))


def bootstrap_difference(
    ours: Sequence[Metric], base: Sequence[Metric], samples: int = 10_000, seed: int = 0
) -> Difference:
    """Compute the mean score of `ours` minus that of `base`, with an interval from paired draws.

    Args:
        ours: one metric per training seed of the first model.
        base: one metric per training seed of the second model; the number of seeds may differ.
        samples: number of draws.
        seed: seed of the draws.

    Raises:
        ValueError: there are no outcomes, or the models have different items; the message names one.
    """
    items = _UnitSums([ours, base])
    scores = _resample_scores(items, samples, seed)
    our_scores = [metric.score for metric in ours]
    base_scores = [metric.score for metric in base]
    # The whole ranges must not overlap: the order of seeds means nothing.
    seeds_agree = min(our_scores) > max(base_scores) or max(our_scores) < min(base_scores)
    mean = float(np.mean(our_scores) - np.mean(base_scores))
    return Difference(mean, *_percentiles(scores[:, 0] - scores[:, 1]), seeds_agree, items.count_differing())


def estimate_over_seeds(metrics: Sequence[Metric], samples: int = 10_000, seed: int = 0) -> Interval:
    """Compute the mean score over training seeds, with its interval over items and seeds.

    The seeds' variance includes some of the items', which the bootstrap counts as well: the interval is rather too wide
    than too narrow.

    Arguments are those of `bootstrap_interval`.

    Raises:
        ValueError: as `bootstrap_interval`; or there is one seed.
    """
    scores = _resample_scores(_UnitSums([metrics]), samples, seed)[:, 0] + _draw_deviations(metrics, samples, seed)
    return Interval(float(np.mean([metric.score for metric in metrics])), *_percentiles(scores))


def compare_over_seeds(
    ours: Sequence[Metric], base: Sequence[Metric], samples: int = 10_000, seed: int = 0
) -> Interval:
    """Compute the mean score of `ours` minus that of `base`, with its interval over items and seeds.

    Items are paired, seeds are not: two models of one seed are different training runs.

    Arguments are those of `bootstrap_difference`.

    Raises:
        ValueError: as `bootstrap_difference`; or one of the models has one seed.
    """
    scores = _resample_scores(_UnitSums([ours, base]), samples, seed)
    difference = scores[:, 0] - scores[:, 1]
    # Two streams of draws, because the seeds of the models are independent.
    difference += _draw_deviations(ours, samples, seed) - _draw_deviations(base, samples, seed + 1)
    mean = np.mean([metric.score for metric in ours]) - np.mean([metric.score for metric in base])
    return Interval(float(mean), *_percentiles(difference))


def permutation_p_value(ours: Sequence[Metric], base: Sequence[Metric], samples: int = 10_000, seed: int = 0) -> float:
    """Compute the p-value of a difference by exchanging the labels of two models within units, two-sided.

    If the labels mean nothing, both are equally likely in each unit. Seeds are averaged first.

    Arguments and errors are those of `bootstrap_difference`.
    """
    items = _UnitSums([ours, base])
    # Each unit adds this much to the difference of the scores, and its negative with exchanged labels.
    parts = items.weight * ((items.sums[0] - items.sums[1]) / items.counts.sum(0)).sum(1)
    random = np.random.default_rng(seed)
    chunk = max(COUNTS_PER_CHUNK // len(parts), 1)
    as_large = 0
    for start in range(0, samples, chunk):
        signs = random.choice((-1.0, 1.0), size=(min(chunk, samples - start), len(parts)))
        # Rounding must not tell the observed labels from equal ones.
        as_large += int((np.abs(signs @ parts) >= abs(parts.sum()) - 1e-12).sum())
    return (1 + as_large) / (1 + samples)


def _draw_deviations(metrics: Sequence[Metric], samples: int, seed: int) -> np.ndarray:
    """Draw deviations of the mean over seeds from its expectation: the standard error times Student's t."""
    scores = [metric.score for metric in metrics]
    if len(scores) < 2:
        raise ValueError(f"metrics: got {len(scores)} seed, allowed: at least 2 for an interval over seeds")
    error = np.std(scores, ddof=1) / len(scores) ** 0.5
    return error * np.random.default_rng([seed, len(scores)]).standard_t(len(scores) - 1, samples)


class _UnitSums:
    """Outcomes summed by unit and group.

    counts: number of outcomes, shape (units, groups). sums: sum of the outcomes, shape (models, units, groups), as the
    mean over the seeds of each model.
    """

    def __init__(self, models: Sequence[Sequence[Metric]]) -> None:
        if not all(models) or not all(metric.outcomes for metrics in models for metric in metrics):
            raise ValueError("metrics: got none, or one without outcomes, allowed: at least one, each with outcomes")
        # Unpaired items would make the difference of two models meaningless.
        reference = models[0][0]
        for metrics in models:
            for metric in metrics:
                _require_same_items(reference, metric)
        unit_ids = dict.fromkeys(outcome.unit for outcome in reference.outcomes)
        group_ids = dict.fromkeys(outcome.group for outcome in reference.outcomes)
        # dict.fromkeys has a fixed order, unlike a set, so the same seed gives the same draws.
        units = {unit: index for index, unit in enumerate(unit_ids)}
        groups = {group: index for index, group in enumerate(group_ids)}
        self.weight = reference.weight
        self.counts = np.zeros((len(units), len(groups)))
        self.sums = np.zeros((len(models), *self.counts.shape))
        # All metrics have the same items, so one has the counts of all.
        for group, unit, _ in reference.outcomes:
            self.counts[units[unit], groups[group]] += 1
        for sums, metrics in zip(self.sums, models, strict=True):
            for metric in metrics:
                for group, unit, value in metric.outcomes:
                    sums[units[unit], groups[group]] += value / len(metrics)

    def count_differing(self) -> int:
        """Count the units in which the first two models have different sums."""
        return int((~np.isclose(self.sums[0], self.sums[1])).any(axis=1).sum())


def _require_same_items(first: Metric, other: Metric) -> None:
    """Raise ValueError that names an item of only one of two metrics, or their different weights."""
    if first.weight != other.weight:
        raise ValueError(f"metrics: got weights {first.weight} and {other.weight}, allowed: the same metric of all")
    first_items = Counter((outcome.group, outcome.unit) for outcome in first.outcomes)
    other_items = Counter((outcome.group, outcome.unit) for outcome in other.outcomes)
    if first_items == other_items:
        return
    for group, unit in first_items.keys() | other_items.keys():
        counts = first_items[group, unit], other_items[group, unit]
        if counts[0] != counts[1]:
            raise ValueError(
                f"metrics: got {counts[0]} and {counts[1]} outcomes of unit {unit!r} in group {group!r}, "
                "allowed: the same items of every model and seed"
            )


def _resample_scores(items: _UnitSums, samples: int, seed: int) -> np.ndarray:
    """Compute the scores of all draws, shape (samples, models)."""
    units = len(items.counts)
    means = items.sums.sum(1) / items.counts.sum(0)
    # One matrix product per chunk gives the counts and the sums of every model.
    flat = np.concatenate([items.counts, *items.sums], axis=1, dtype=np.float32)
    chunk = max(COUNTS_PER_CHUNK // units, 1)
    scores = []
    for start in range(0, samples, chunk):
        totals = _draw_counts(units, min(chunk, samples - start), seed, start) @ flat
        count, *sums = np.split(totals, len(items.sums) + 1, 1)
        # A group without a unit in a draw keeps its mean.
        shares = [
            np.divide(total, count, out=np.broadcast_to(mean, total.shape).copy(), where=count > 0)
            for total, mean in zip(sums, means, strict=True)
        ]
        scores.append(items.weight * np.stack(shares, axis=-1).sum(1))
    return np.concatenate(scores)


@lru_cache(maxsize=10)
def _draw_counts(units: int, samples: int, seed: int, start: int) -> np.ndarray:
    """Count how often each unit is drawn, shape (samples, units); as many draws as units, with replacement."""
    random = np.random.default_rng([seed, start])
    draws = random.integers(units, size=(samples, units), dtype=np.int32)
    # A different offset per sample lets one bincount count all samples.
    draws += np.arange(samples, dtype=np.int32)[:, None] * units
    counts = np.bincount(draws.ravel(), minlength=samples * units)
    return counts.reshape(samples, units).astype(np.float32)


def _percentiles(scores: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(scores, [(1 - CONFIDENCE_LEVEL) / 2, (1 + CONFIDENCE_LEVEL) / 2])
    return float(low), float(high)
