"""What every benchmark is made of: questions, answered rows, and metrics that are weighted sums of means.

Scoring is a pure function of rows, so that answers are scored again, compared and resampled without a model.  A metric
keeps the outcomes behind its number, each with the unit that is independent of others: means over resampled units are
bootstrap confidence intervals, whatever the benchmark.

Scores of accuracy are shares from 0 to 1, as elsewhere here; MME's are its own points.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from redux.benchmarks.source import Source

SHORT_ANSWER_PROMPT = "\nAnswer the question using a single word or phrase."
"""How LLaVA-1.5 asks for short answers (haotian-liu/LLaVA, docs/Evaluation.md, commit c121f043)."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """One thing that a model is asked.

    id: unique within its benchmark.
    unit: what is independent of others: the image, or the question that is asked several times; bootstrap resamples
        these.
    image: path relative to the benchmark's image folder, or the encoded image itself; None for text alone.
    prompt: what the model is told beside the image, without any template.
    reference: JSON-able: all that scoring needs later.
    """

    id: str
    unit: str
    image: str | bytes | None
    prompt: str
    reference: dict[str, Any]


Row = Mapping[str, Any]
"""An answered question as a line of answers/TASK.jsonl: {"id", "unit", "prompt", "response", **reference}.

A response of None was never given, and is wrong.
"""


class Outcome(NamedTuple):
    """What a question, or several together, came to.

    group: means are taken within groups.  unit: as the question's.
    """

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
        """The number itself; 0.0 without outcomes."""
        groups = defaultdict(list)
        for outcome in self.outcomes:
            groups[outcome.group].append(outcome.value)
        return self.weight * sum(sum(values) / len(values) for values in groups.values())


def group_metrics(outcomes: Iterable[tuple[str, Outcome]]) -> dict[str, Metric]:
    """Metrics of (name, outcome) pairs, each of the outcomes under its name; names in the order of appearance."""
    named = defaultdict(list)
    for name, outcome in outcomes:
        named[name].append(outcome)
    return {name: Metric(found) for name, found in named.items()}


def compute_scores(metrics: Mapping[str, Metric], name: str) -> dict[str, float]:
    """Scores by name, of metrics by name.

    name: what was asked, for errors.
    ValueError where nothing was scored, or a score is no number.
    """
    found = {metric: each.score for metric, each in metrics.items() if each.outcomes}
    if not found:
        raise ValueError(
            f"{name}: got no question with a reference answer, allowed: at least one (test splits have none)"
        )
    if wrong := [metric for metric, score in found.items() if not math.isfinite(score)]:
        raise ValueError(f"{name}: got {found[wrong[0]]} for {wrong[0]}, allowed: a number")
    return found


class SubmittedAnswer(str):
    """An answer in the form that an official scorer takes, scored to the letter.

    A model's own response is first converted as LLaVA's scripts do before they hand it in.
    """


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """How a benchmark is asked and scored.

    title: its name in print.
    questions: of the official files, given as paths or URLs.  ValueError names what is wrong with them, and where.
    metrics: of rows by name, without the benchmark's own; none where the rows have no references (test splits).
    answers: {question id: response} of another system's file, in the official format of results, LLaVA's or ours; the
        questions say which ids there are.  ValueError names file and line, or number of the item.
    max_new_tokens: of a response, in LLaVA-1.5's evaluation.
    submission: of rows, what the official server takes, JSON-able; None where there is no such file.
    """

    title: str
    questions: Callable[..., list[Question]]
    metrics: Callable[[Sequence[Row]], dict[str, Metric]]
    answers: Callable[[Source, Sequence[Question]], dict[str, str]]
    max_new_tokens: int
    submission: Callable[[Sequence[Row]], list[dict[str, Any]]] | None = None
