"""Verdicts on the claims of the paper: what was measured, its interval, and the run that would decide a claim.

A verdict follows from the 95 % interval of a difference over items and training seeds, by one rule for each kind of
claim. With s = half of the paper's smaller effect (0 if it prints none) and a margin of one point:

    gain    contradicted if the whole interval is below s (at most half of the paper's effect), else
            supported if it is above 0
    loss    the same with the sign of the difference reversed
    kept    supported if the whole interval is above -1 point, contradicted if it is below it

Anything else cannot be told. Neither can a difference with one seed of a model, which has no interval over trainings,
nor one of fewer than MIN_UNITS images or questions, for which a bootstrap gives intervals that are too narrow.

The cost of a claim is one bootstrap, see `pipelines.evaluation.statistics`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Literal, NamedTuple

from pipelines.evaluation import power, statistics
from pipelines.evaluation.statistics import Interval
from pipelines.report.paper_claims import CLAIMS, MARGIN, SOURCES_BY_MEASURE, PaperClaim
from pipelines.report.runs import ComparedModel, Family, select_changed_fields
from pipelines.report.table_rows import TableRow, matches, write_command
from redux.benchmarks import Metric

MIN_UNITS = 30
"""Smallest number of images or questions of a verdict."""

VerdictKind = Literal["supported", "contradicted", "cannot tell", "not measured"]


@dataclass(frozen=True)
class Verdict:
    """A claim with its measurement.

    Args:
        claim: the claim.
        outcome: what the measurement says.
        reason: reason of the outcome, in a sentence.
        interval: difference in points with its 95 % interval; None if it was not measured.
        about: metric, items and seeds of the measurement, "" if there is none.
        needed: runs, seeds or items that would decide the claim, "" if it is decided.
        command: the command that makes the missing run, "" if none is missing.
    """

    claim: PaperClaim
    outcome: VerdictKind
    reason: str
    interval: Interval | None = None
    about: str = ""
    needed: str = ""
    command: str = ""

    @property
    def drawing(self) -> "VerdictDrawing":
        """Positions of the interval, of 0 and of the paper's effects in a drawing, from 0 to 100."""
        assert self.interval
        # The drawing shows the paper's numbers beside the interval, so its range contains all of them.
        effects = tuple(self.claim.effects.values())
        numbers = (self.interval.low, self.interval.high, 0.0, *effects)
        low, high = min(numbers), max(numbers)
        margin = (high - low) * 0.06 or 1.0

        def position(number: float) -> float:
            return 100 * (number - low + margin) / (high - low + 2 * margin)

        return VerdictDrawing(
            position(0.0),
            position(self.interval.value),
            position(self.interval.low),
            position(self.interval.high),
            tuple(map(position, effects)),
        )


class VerdictDrawing(NamedTuple):
    """Positions from 0 to 100 in the drawing of a verdict."""

    zero: float
    value: float
    low: float
    high: float
    effects: tuple[float, ...]


@dataclass(frozen=True)
class FamilyVerdicts:
    """Verdicts of a family, those with a measurement first in `measured`."""

    label: str
    measured: tuple[Verdict, ...]
    missing: tuple[Verdict, ...]

    @property
    def missing_by_run(self) -> dict[str, list[Verdict]]:
        """Claims without a measurement by what would decide them, in the order of the claims."""
        result: dict[str, list[Verdict]] = {}
        for verdict in self.missing:
            result.setdefault(verdict.needed, []).append(verdict)
        return result


def judge_claims(families: Sequence[Family], samples: int = 10_000) -> list[FamilyVerdicts]:
    """Judge all claims in each family that can judge at least one.

    Args:
        families: the families.
        samples: draws of each bootstrap.
    """
    result = []
    for family in families:
        verdicts = [judge(claim, family, samples) for claim in CLAIMS]
        # A family without any pair of rows, such as runs of other settings, has no verdicts.
        measured = tuple(verdict for verdict in verdicts if verdict.interval)
        if measured:
            missing = tuple(verdict for verdict in verdicts if not verdict.interval)
            result.append(FamilyVerdicts(family.label, measured, missing))
    return result


def judge(claim: PaperClaim, family: Family, samples: int = 10_000) -> Verdict:
    """Judge a claim by the models of a family.

    Args:
        claim: the claim.
        family: the models.
        samples: draws of the bootstrap.
    """
    models = [find_model(family, row) for row in claim.rows]
    missing = [row for row, model in zip(claim.rows, models, strict=True) if model is None]
    ours, base = models
    # A missing row has a command, which the tables give as well.
    if ours is None or base is None:
        names = " and ".join(row.label for row in missing)
        command = write_command(missing[0], family)
        return Verdict(
            claim, "not measured", f"There is no run of {names}.", needed=f"a run of {names}", command=command
        )
    # The paper's benchmark comes first, that of small studies last.
    for source in SOURCES_BY_MEASURE[claim.measure]:
        metrics = ours.metrics(source), base.metrics(source)
        if all(metrics):
            return _judge_metrics(claim, source, *metrics, samples)
    tasks = " or ".join(source.partition(".")[0] for source in SOURCES_BY_MEASURE[claim.measure])
    return Verdict(claim, "not measured", "The runs lack its task.", needed=f"an evaluation on {tasks}")


def find_model(family: Family, row: TableRow) -> ComparedModel | None:
    """Find the model of a row; of several, that with the fewest options that are not at their defaults."""

    def count_changes(model: ComparedModel) -> int:
        return sum(len(select_changed_fields(part)) for part in model.methods.methods.values() if part)

    return min((model for model in family.models if matches(model, row)), key=count_changes, default=None)


def _judge_metrics(
    claim: PaperClaim, source: str, ours: Sequence[Metric], base: Sequence[Metric], samples: int
) -> Verdict:
    seeds = min(len(ours), len(base))
    try:
        # One seed has no spread over trainings, so its interval is over items alone.
        interval: Interval = (
            statistics.compare_over_seeds(ours, base)
            if seeds > 1
            else statistics.bootstrap_difference(ours, base, samples)
        ).scale(100)
    except ValueError:
        return Verdict(
            claim, "not measured", "The two models answered different questions.", needed="the same questions"
        )
    outcome, reason = decide(claim, interval, seeds, statistics.count_units(ours[0]))
    # What was measured, so that a reader can weigh the verdict.
    items = len(ours[0].outcomes)
    about = f"{source}; {items:,} items; {len(ours)} and {len(base)} seeds"
    needed = "" if outcome in ("supported", "contradicted") else describe_need(claim, ours, base)
    return Verdict(claim, outcome, reason, interval, about, needed)


def decide(claim: PaperClaim, interval: Interval, seeds: int, units: int) -> tuple[VerdictKind, str]:
    """Decide a claim by the rule of this module.

    Args:
        claim: the claim.
        interval: difference in points, with its interval over items and seeds.
        seeds: the smaller number of seeds of the two models.
        units: number of images or questions that succeed or fail on their own.

    Returns:
        The outcome, and its reason.
    """
    if seeds < 2:
        return "cannot tell", "One seed has no interval over trainings."
    if units < MIN_UNITS:
        return "cannot tell", f"The interval is over {units} images or questions, and needs {MIN_UNITS}."
    low, high = interval.low, interval.high
    # Understanding is kept, or not, by a margin in place of an effect.
    if claim.kind == "kept":
        if low > -MARGIN:
            return "supported", f"The loss is less than {MARGIN:g} point."
        if high < -MARGIN:
            return "contradicted", f"The loss is more than {MARGIN:g} point."
        return "cannot tell", f"The interval contains a loss of {MARGIN:g} point."
    # A loss is a gain with the other sign.
    if claim.kind == "loss":
        low, high = -high, -low
    least = claim.smallest_effect
    if high < 0:
        opposite = "loss" if claim.kind == "gain" else "gain"
        return "contradicted", f"The whole interval is a {opposite}."
    if high <= least:
        least_text = f"less than half of the paper's effect ({least:.1f} points)" if least else "none at all"
        return "contradicted", f"The {claim.kind} is {least_text}."
    if low > 0:
        return "supported", f"The whole interval is a {claim.kind}."
    return "cannot tell", "The interval contains 0 and half of the paper's effect."


def describe_need(claim: PaperClaim, ours: Sequence[Metric], base: Sequence[Metric]) -> str:
    """Describe the seeds and items that would show half of the paper's effect, or the margin, with a power of 80 %."""
    effect = MARGIN if claim.kind == "kept" else claim.smallest_effect
    if not effect:
        return "more seeds; the paper prints no effect"
    deviation = power.estimate_seed_deviation([ours, base])
    if deviation is None:
        return "at least 2 seeds of both models, which also show how many are needed"
    # The errors over items and over seeds add, so each gets half of the variance that the effect allows.
    items = power.count_items(effect / sqrt(2), 100 * power.estimate_item_deviation(ours, base))
    seeds = power.count_seeds(effect / sqrt(2), 100 * deviation)
    return (
        f"about {seeds:,} seeds of both models and {items:,} items for {effect:.1f} points "
        f"(trainings differ by {100 * deviation:.1f} points)"
    )


# --- power of the paper's own effects --------------------------------------------------------------------------------

PAPER_ITEMS = 16 * 218
"""Prompts of the paper's evaluation of instructions, see the notes of `paper.TABLE_1`."""

PAPER_SHARE = 0.4
"""Share of followed instructions of the paper's models, about the mean of Table 1."""


@dataclass(frozen=True)
class EffectPower:
    """Items that an effect of the paper needs.

    Args:
        claim: the claim, of instructions.
        effect: the smaller of its effects in points.
        items: prompts that show it with a power of 80 %, if all trainings gave the same model.
        seeds: seeds of both models that it needs besides, by standard deviation between trainings in points.
    """

    claim: PaperClaim
    effect: float
    items: int
    seeds: dict[float, int]


SEED_DEVIATIONS = (0.5, 1.0, 2.0, 5.0)
"""Assumed standard deviations of the share of followed instructions between trainings, in points."""


def analyse_power() -> list[EffectPower]:
    """Analyse the power for the paper's effects on instructions: prompts and seeds that each needs.

    Two models that follow a share p each, independently, differ on a prompt with a standard deviation of
    sqrt(2 p (1 - p)). Models that follow the same prompts need fewer.
    """
    deviation = 100 * sqrt(2 * PAPER_SHARE * (1 - PAPER_SHARE))
    return [
        EffectPower(
            claim,
            effect,
            power.count_items(effect, deviation),
            {spread: power.count_seeds(effect, spread) for spread in SEED_DEVIATIONS},
        )
        for claim, effect in _list_effects()
    ]


def find_smallest_paper_effect() -> float:
    """Find the smallest difference in points that the paper's number of prompts shows with a power of 80 %."""
    return power.find_smallest_effect(100 * sqrt(2 * PAPER_SHARE * (1 - PAPER_SHARE)), PAPER_ITEMS)


def _list_effects() -> Iterator[tuple[PaperClaim, float]]:
    for claim in CLAIMS:
        if claim.measure == "following" and claim.effects:
            yield claim, 2 * claim.smallest_effect
