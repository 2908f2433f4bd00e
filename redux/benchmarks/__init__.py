"""What all benchmarks share: a question before it is asked, a row once it is answered, and the metrics of such rows.

Scoring is a pure function of rows: `metrics(rows: Sequence[Row]) -> dict[str, Metric]`, names dotted without the
benchmark's own name.  A metric keeps the outcomes that its score is made of, for whoever wants an interval.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question of a benchmark.

    id: unique within its benchmark.
    unit: what is independent of others: the image, or the question that is asked several times; a bootstrap resamples
        these.
    image: path relative to the benchmark's image folder, or the encoded image itself; None for text alone.
    prompt: what the model is told beside the image, without any template.
    reference: all that scoring needs later, fit for JSON.
    """

    id: str
    unit: str
    image: str | bytes | None
    prompt: str
    reference: dict[str, Any]


Row = Mapping[str, Any]
"""An answered question as a line of answers/TASK.jsonl: {"id", "unit", "prompt", "response", **reference}."""


class Outcome(NamedTuple):
    """What one question, or several together, came to; means are taken within groups."""

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
        groups: dict[str, list[float]] = {}
        for outcome in self.outcomes:
            groups.setdefault(outcome.group, []).append(outcome.value)
        return self.weight * sum(sum(values) / len(values) for values in groups.values())
