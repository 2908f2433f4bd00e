"""Tests of the bootstrap: equal to a slow loop, correct coverage, and no comparison of different items."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from pipelines.evaluation.statistics import (
    COUNTS_PER_CHUNK,
    Difference,
    _draw_counts,
    bootstrap_difference,
    bootstrap_interval,
    compare_over_seeds,
    estimate_over_seeds,
    permutation_p_value,
)
from redux.benchmarks import Metric, Outcome


def metric(random: np.random.Generator, units: int, weight: float = 0.5, shift: float = 0.0) -> Metric:
    """Make two groups; every third unit has no outcome in the second, and outcomes of a unit are correlated."""
    outcomes = []
    for unit in range(units):
        share = random.beta(1, 1)
        for group, times in (("a", 1 + unit % 2), ("b", unit % 3)):
            outcomes += [Outcome(group, f"u{unit}", float(random.random() < share + shift)) for _ in range(times)]
    return Metric(outcomes, weight)


def same_items(first: Metric, random: np.random.Generator) -> Metric:
    return replace(first, outcomes=[each._replace(value=float(random.random() < 0.5)) for each in first.outcomes])


def slow(metrics: Sequence[Metric], counts: Sequence[int], units: Sequence[str]) -> float:
    """Compute the mean score over seeds, with each unit repeated as often as it was drawn."""
    scores = []
    for each in metrics:
        drawn = [
            outcome
            for unit, count in zip(units, counts, strict=True)
            for outcome in each.outcomes
            if outcome.unit == unit
            for _ in range(count)
        ]
        scores.append(Metric(drawn, each.weight).score)
    return float(np.mean(scores))


def test_an_interval_equals_that_of_a_slow_loop_over_the_same_draws() -> None:
    random = np.random.default_rng(1)
    first = metric(random, 12)
    ours, base = [first, same_items(first, random)], [same_items(first, random)]
    units = list(dict.fromkeys(each.unit for each in first.outcomes))
    draws = _draw_counts(len(units), 300, 5, 0).astype(int)
    our_scores, other = ([slow(metrics, counts, units) for counts in draws] for metrics in (ours, base))
    result = bootstrap_interval(ours, samples=300, seed=5)
    assert result.value == pytest.approx(np.mean([each.score for each in ours]))
    assert (result.low, result.high) == pytest.approx(np.quantile(our_scores, [0.025, 0.975]))
    more = bootstrap_difference(ours, base, samples=300, seed=5)
    assert more.value == pytest.approx(result.value - base[0].score)
    assert (more.low, more.high) == pytest.approx(np.quantile(np.subtract(our_scores, other), [0.025, 0.975]))


def test_draws_are_multinomial() -> None:
    draws = _draw_counts(50, 4000, 0, 0).astype(float)
    assert (draws.sum(1) == 50).all()
    assert draws.mean(0) == pytest.approx(np.ones(50), abs=6 * (0.98 / 4000) ** 0.5)
    assert draws.var(0) == pytest.approx(np.full(50, 0.98), abs=0.2)


def test_draws_in_several_pieces_are_as_many_as_asked_and_all_different() -> None:
    random = np.random.default_rng(2)
    units = COUNTS_PER_CHUNK // 100
    wide = Metric([Outcome("a", str(unit), random.random()) for unit in range(units)])
    result = bootstrap_interval([wide], samples=250)
    spread = np.std([each.value for each in wide.outcomes]) / units**0.5
    assert result.high - result.low == pytest.approx(2 * 1.96 * spread, rel=0.2)


def test_the_interval_of_a_share_holds_the_truth_19_times_of_20() -> None:
    """Correlated clusters of four, 400 experiments: the standard error of the coverage is 1.1 points."""
    random, truth, covered, narrow = np.random.default_rng(3), 0.4, 0, 0
    for _ in range(400):
        # The share of each unit varies with mean 0.4.
        shares = random.beta(0.8, 1.2, size=80)
        outcomes = [
            Outcome("all", str(u), float(random.random() < share)) for u, share in enumerate(shares) for _ in "1234"
        ]
        result = bootstrap_interval([Metric(outcomes)], samples=400)
        covered += result.low <= truth <= result.high
        unclustered = bootstrap_interval(
            [Metric([each._replace(unit=str(n)) for n, each in enumerate(outcomes)])], samples=400
        )
        narrow += unclustered.low <= truth <= unclustered.high
    assert 0.91 <= covered / 400 <= 0.98
    assert narrow / 400 < 0.85, "as if answers to one image were independent"


def test_of_equal_models_one_difference_in_twenty_is_held_for_one() -> None:
    random, wrong, sure = np.random.default_rng(4), 0, 0
    for _ in range(300):
        shares = random.random(100)
        models = [
            Metric([Outcome("all", str(u), float(random.random() < share + lift)) for u, share in enumerate(shares)])
            for lift in (0, 0, 0.3)
        ]
        wrong += not bootstrap_difference(models[:1], models[1:2], samples=400).is_noise
        sure += not bootstrap_difference(models[2:], models[:1], samples=400).is_noise
    assert wrong / 300 <= 0.09
    assert sure / 300 >= 0.9, "the test would pass if everything were noise"


def test_a_difference_is_paired_by_unit() -> None:
    """One model is right wherever the other is, and on one more unit in ten."""
    base = Metric([Outcome("all", str(unit), float(unit % 2)) for unit in range(200)])
    ours = Metric(
        [each._replace(value=float(int(each.unit) % 2 or int(each.unit) % 10 == 0)) for each in base.outcomes]
    )
    result, unclustered = bootstrap_difference([ours], [base]), bootstrap_interval([ours])
    assert result.value == pytest.approx(0.1)
    assert not result.is_noise
    assert result.high - result.low < 0.7 * (unclustered.high - unclustered.low)


def test_seeds_that_do_not_agree_make_a_difference_noise() -> None:
    def share(right: int) -> Metric:
        return Metric([Outcome("all", str(unit), float(unit < right)) for unit in range(1000)])

    apart = bootstrap_difference([share(800), share(700)], [share(500), share(600)])
    crossed = bootstrap_difference([share(800), share(540)], [share(500), share(550)])
    assert (apart.seeds_agree, apart.is_noise) == (True, False)
    assert crossed.low > 0
    assert (crossed.seeds_agree, crossed.is_noise) == (False, True)


def test_a_difference_from_itself_is_noise() -> None:
    same = metric(np.random.default_rng(6), 40)
    assert bootstrap_difference([same], [same]) == Difference(0.0, 0.0, 0.0, seeds_agree=False, differing_units=0)
    assert bootstrap_difference([same], [same]).is_noise


@pytest.mark.parametrize("units", range(1, 9))
def test_a_difference_is_one_from_as_many_units_as_a_permutation_test_needs(units: int) -> None:
    """Every unit favours the same model, so the bootstrap has no variance."""
    right, wrong = (Metric([Outcome("all", str(unit), value) for unit in range(units)]) for value in (1.0, 0.0))
    result = bootstrap_difference([right], [wrong])
    assert (result.low, result.high) == (1, 1)
    assert result.is_noise == (2 / 2**units > 0.05)


def test_the_order_of_outcomes_means_nothing() -> None:
    random = np.random.default_rng(7)
    first = metric(random, 30)
    other = same_items(first, random)
    turned = replace(other, outcomes=other.outcomes[::-1])
    result, again = bootstrap_difference([first], [other]), bootstrap_difference([first], [turned])
    assert (result.value, result.low, result.high) == pytest.approx((again.value, again.low, again.high))


def test_the_same_call_gives_the_same_interval_and_another_seed_another() -> None:
    one = metric(np.random.default_rng(8), 30)
    assert bootstrap_interval([one]) == bootstrap_interval([one])
    assert bootstrap_interval([one], seed=1) != bootstrap_interval([one])


def test_a_group_that_a_draw_misses_keeps_its_mean() -> None:
    rare = Metric([Outcome("a", str(unit), float(unit % 2)) for unit in range(10)] + [Outcome("b", "0", 1.0)])
    result = bootstrap_interval([rare])
    assert np.isfinite([result.low, result.high]).all()
    assert result.low >= 1.0, "group b is 1.0 in every draw"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda all_: all_[:-1], "got 1 and 0 outcomes of unit 'u2' in group 'a'"),
        (lambda all_: [*all_, all_[0]], "got 1 and 2 outcomes of unit 'u0' in group 'a'"),
        (lambda all_: [all_[0]._replace(group="b"), *all_[1:]], "unit 'u0'"),
    ],
)
def test_other_items_are_refused_by_name(change, message: str) -> None:
    full = Metric([Outcome("a", f"u{unit}", 1.0) for unit in range(3)])
    other = Metric(change(full.outcomes))
    for call in (lambda: bootstrap_interval([full, other]), lambda: bootstrap_difference([full], [other])):
        with pytest.raises(ValueError, match="allowed: the same items") as error:
            call()
        assert message in str(error.value)


def test_nothing_to_draw_from_and_other_weights_are_refused() -> None:
    full = Metric([Outcome("a", "u", 1.0)])
    for metrics in ([], [Metric([])]):
        with pytest.raises(ValueError, match="allowed: at least one"):
            bootstrap_interval(metrics)
    with pytest.raises(ValueError, match=r"got weights 1.0 and 2.0"):
        bootstrap_interval([full, replace(full, weight=2.0)])


# --- over seeds, and labels exchanged --------------------------------------------------------------------------------


def train(random: np.random.Generator, items: np.ndarray, level: float, seeds: int, spread: float) -> list[Metric]:
    """Score training runs: each has a level of its own, and each item is easier or harder for all."""
    runs = []
    for _ in range(seeds):
        values = items + level + spread * random.standard_normal() + 0.2 * random.standard_normal(len(items))
        runs.append(Metric([Outcome("all", str(unit), float(value)) for unit, value in enumerate(values)]))
    return runs


@pytest.mark.parametrize(("seeds", "spread"), [(2, 0.05), (3, 0.05), (3, 0.0)])
def test_an_interval_over_seeds_holds_the_truth_19_times_of_20(seeds: int, spread: float) -> None:
    """300 experiments: the standard error of the coverage is 1.3 points; equal seeds are covered more often."""
    random, covered, by_items, apart = np.random.default_rng(7), 0, 0, 0
    for _ in range(300):
        items = 0.3 * random.standard_normal(40)
        ours, base = (train(random, items, level, seeds, spread) for level in (0.4, 0.5))
        result = estimate_over_seeds(ours, samples=400)
        covered += result.low <= 0.4 <= result.high
        alone = bootstrap_interval(ours, samples=400)
        by_items += alone.low <= 0.4 <= alone.high
        difference = compare_over_seeds(ours, base, samples=400)
        assert difference.value == pytest.approx(
            np.mean([each.score for each in ours]) - np.mean([each.score for each in base])
        )
        apart += difference.low <= -0.1 <= difference.high
    assert covered / 300 >= 0.92
    assert apart / 300 >= 0.92
    if spread:
        assert covered > by_items, "an interval over items alone is too narrow"


def test_an_interval_over_seeds_needs_two() -> None:
    one = [metric(np.random.default_rng(8), 20)]
    for compute in (estimate_over_seeds, lambda metrics: compare_over_seeds(metrics, metrics)):
        with pytest.raises(ValueError, match="metrics: got 1 seed, allowed: at least 2"):
            compute(one)


def test_equal_seeds_give_the_interval_over_items() -> None:
    same = metric(np.random.default_rng(9), 40)
    assert estimate_over_seeds([same, same]) == bootstrap_interval([same, same])


def exchange_labels(ours: Metric, base: Metric, random: np.random.Generator) -> tuple[Metric, Metric]:
    """Exchange the two models in half of the units, with all outcomes of a unit."""
    units = dict.fromkeys(outcome.unit for outcome in ours.outcomes)
    exchanged = {unit for unit in units if random.random() < 0.5}
    pairs = [
        pair[::-1] if pair[0].unit in exchanged else pair for pair in zip(ours.outcomes, base.outcomes, strict=True)
    ]
    return replace(ours, outcomes=[pair[0] for pair in pairs]), replace(base, outcomes=[pair[1] for pair in pairs])


def test_exchanged_labels_leave_no_effect() -> None:
    random, differs, significant, values = np.random.default_rng(10), 0, 0, []
    base = metric(random, 150)
    ours = replace(
        base, outcomes=[each._replace(value=max(each.value, float(random.random() < 0.4))) for each in base.outcomes]
    )
    assert not bootstrap_difference([ours], [base]).is_noise
    assert permutation_p_value([ours], [base]) < 0.001
    for _ in range(200):
        exchanged = exchange_labels(ours, base, random)
        result = bootstrap_difference([exchanged[0]], [exchanged[1]], samples=400)
        differs += not result.is_noise
        significant += permutation_p_value([exchanged[0]], [exchanged[1]], samples=400) < 0.05
        values.append(result.value)
    assert differs / 200 <= 0.1
    assert significant / 200 <= 0.1
    assert abs(np.mean(values)) < 0.2 * (ours.score - base.score)


def test_a_p_value_counts_every_exchange_of_few_units() -> None:
    """Two of the 32 exchanges of five units give a difference as large as that of all five."""
    ours = Metric([Outcome("all", str(unit), 1.0) for unit in range(5)])
    base = replace(ours, outcomes=[each._replace(value=0.0) for each in ours.outcomes])
    assert permutation_p_value([ours], [base], samples=20_000) == pytest.approx(2 / 32, abs=0.01)
    assert permutation_p_value([ours], [ours]) == 1.0
