"""Tests of the power analysis against simulated comparisons: numbers of items and seeds show the effect as promised."""

import numpy as np
import pytest

from pipelines.evaluation import power
from redux.benchmarks import Metric, Outcome

SIMULATED = 20_000


@pytest.mark.parametrize(("effect", "deviation"), [(0.5, 1.0), (2.0, 9.0), (1.0, 1.0)])
def test_so_many_items_show_the_effect_in_four_of_five_comparisons(effect: float, deviation: float) -> None:
    items = power.count_items(effect, deviation)
    random = np.random.default_rng(0)
    means = random.normal(effect, deviation, (SIMULATED, items)).mean(1)
    found = np.abs(means) > power.Z_LEVEL * deviation / np.sqrt(items)
    # One item fewer is not enough, so the count is the smallest.
    assert 0.79 < found.mean() < 0.8 + 1 / items
    assert power.find_smallest_effect(deviation, items) <= effect < power.find_smallest_effect(deviation, items - 1)


@pytest.mark.parametrize(("effect", "deviation"), [(1.0, 1.0), (3.9, 5.0), (2.0, 1.2)])
def test_so_many_seeds_show_the_effect_by_a_t_test(effect: float, deviation: float) -> None:
    seeds = power.count_seeds(effect, deviation)
    random = np.random.default_rng(0)

    def draw_statistics(shift: float) -> np.ndarray:
        ours = random.normal(shift, deviation, (SIMULATED, seeds))
        base = random.normal(0, deviation, (SIMULATED, seeds))
        error = np.sqrt((ours.var(1, ddof=1) + base.var(1, ddof=1)) / seeds)
        return np.abs(ours.mean(1) - base.mean(1)) / error

    # The critical value of the test is that of simulated models without a difference.
    critical = np.quantile(draw_statistics(0.0), 0.95)
    assert 0.77 < (draw_statistics(effect) > critical).mean() < 0.9


def make_metric(values: np.ndarray) -> Metric:
    return Metric([Outcome("", str(unit), float(value)) for unit, value in enumerate(values)])


def test_deviations_are_those_of_the_answers() -> None:
    random = np.random.default_rng(0)
    ours, base = ([make_metric(values) for values in random.normal(0, 1, (3, 400))] for _ in range(2))
    values = [
        np.mean([[outcome.value for outcome in metric.outcomes] for metric in model], 0) for model in (ours, base)
    ]
    assert power.estimate_item_deviation(ours, base) == pytest.approx(np.std(values[0] - values[1], ddof=1))
    scores = [[metric.score for metric in model] for model in (ours, base)]
    pooled = np.sqrt(np.mean([np.var(of_model, ddof=1) for of_model in scores]))
    assert power.estimate_seed_deviation([ours, base]) == pytest.approx(pooled)
    assert power.estimate_seed_deviation([ours[:1], base[:1]]) is None
    assert power.estimate_seed_deviation([ours, base[:1]]) == pytest.approx(np.std(scores[0], ddof=1))
