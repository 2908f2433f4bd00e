"""What every benchmark shares: a question, an answered one as a row, and a score that knows what it was made of.

A score is kept with the outcomes that it is a mean of, each with the unit that is independent of others, so that
intervals can be had for any metric by drawing units anew, and scoring is a pure function of rows: answers that were
kept are scored again at any time.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, NamedTuple


@dataclass(frozen=True, kw_only=True)
class Question:
    """One question of a benchmark, as a model is asked it.

    id: unique within its benchmark.
    unit: what is independent of others: the image, or the question that is asked several times.
    image: path relative to the benchmark's image folder, or the encoded image itself; None for text alone.
    prompt: what the model is told beside the image, without any template.
    reference: all that scoring needs later, as JSON has it.
    """

    id: str
    unit: str
    image: str | bytes | None
    prompt: str
    reference: dict[str, Any]


Row = Mapping[str, Any]
"""An answered question as a line of answers/TASK.jsonl: {"id", "unit", "prompt", "response", **reference}."""


class Outcome(NamedTuple):
    """A value, the group within which means are taken, and the unit it belongs to."""

    group: str
    unit: str
    value: float


@dataclass(frozen=True)
class Metric:
    """weight × the sum over groups of the mean of their outcomes."""

    outcomes: Sequence[Outcome]
    weight: float = 1.0

    @property
    def score(self) -> float:
        """0.0 without outcomes."""
        groups: dict[str, list[float]] = defaultdict(list)
        for outcome in self.outcomes:
            groups[outcome.group].append(outcome.value)
        return self.weight * sum(map(fmean, groups.values()))
