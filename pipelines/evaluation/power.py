"""Power of a comparison of two models: how many items and training seeds it needs, and the smallest effect it can show.

The normal approximation: a difference with standard error e is found with the probability `power`, by a test at the 5 %
level, if it is at least (z_0.975 + z_power) e. Items and seeds are independent sources of error. Over items, the error
is that of the mean of paired differences. Over seeds, it is that of two means of independent trainings, with a
correction for few seeds (W. C. Guenther 1981, The American Statistician 35, p. 243-244).
"""

from collections.abc import Sequence
from math import ceil, sqrt
from statistics import NormalDist, variance

from redux.benchmarks import Metric

POWER = 0.8
Z_LEVEL = NormalDist().inv_cdf(0.975)
Z_SUM = Z_LEVEL + NormalDist().inv_cdf(POWER)


def count_items(effect: float, deviation: float) -> int:
    """Count the items that a paired comparison needs.

    Args:
        effect: true difference of the means, above 0.
        deviation: standard deviation of an item's difference, in the unit of `effect`.
    """
    return max(ceil((Z_SUM * deviation / effect) ** 2), 1)


def count_seeds(effect: float, deviation: float) -> int:
    """Count the training seeds that each of two models needs, with any number of items; at least 2.

    Args:
        effect: true difference of the means over trainings, above 0.
        deviation: standard deviation of the score of a training, in the unit of `effect`.
    """
    return max(ceil(2 * (Z_SUM * deviation / effect) ** 2 + Z_LEVEL**2 / 4), 2)


def find_smallest_effect(deviation: float, items: int) -> float:
    """Find the smallest effect that a paired comparison of so many items shows.

    Args:
        deviation: standard deviation of an item's difference.
        items: number of items.
    """
    return Z_SUM * deviation / sqrt(items)


def estimate_item_deviation(ours: Sequence[Metric], base: Sequence[Metric]) -> float:
    """Estimate the standard deviation of the difference of an item between two models, each as a mean over its seeds.

    Args:
        ours, base: one metric for each training seed, with the same items.
    """
    # Each item's difference is a mean over seeds, as in the paired comparison.
    differences: dict[tuple[str, str], float] = {}
    for sign, metrics in ((1, ours), (-1, base)):
        for metric in metrics:
            for outcome in metric.outcomes:
                item = (outcome.group, outcome.unit)
                differences[item] = differences.get(item, 0.0) + sign * outcome.value / len(metrics)
    return sqrt(variance(differences.values())) if len(differences) > 1 else 0.0


def estimate_seed_deviation(models: Sequence[Sequence[Metric]]) -> float | None:
    """Estimate the standard deviation of the score of a training, pooled over models; None without two seeds of any.

    The scores contain the error over items too, which all seeds of a model share.

    Args:
        models: for each model one metric for each training seed.
    """
    # A single seed shows no spread.
    repeated = [[metric.score for metric in metrics] for metrics in models if len(metrics) > 1]
    freedom = sum(len(scores) - 1 for scores in repeated)
    if not freedom:
        return None
    return sqrt(sum((len(scores) - 1) * variance(scores) for scores in repeated) / freedom)
