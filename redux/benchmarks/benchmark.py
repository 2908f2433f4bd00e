"""Parts of every benchmark: questions, answered rows, and metrics that are weighted sums of means.

Scoring is a pure function of rows, so answers can be scored again, compared and resampled without a model. A metric
keeps the outcomes behind its number, each with its independent unit. Means over resampled units give bootstrap
confidence intervals for any benchmark.

Accuracies are shares from 0 to 1; MME has its own points.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from redux.benchmarks.source import Source

SHORT_ANSWER_PROMPT = "\nAnswer the question using a single word or phrase."
"""LLaVA-1.5's request for a short answer (haotian-liu/LLaVA, docs/Evaluation.md, commit c121f043)."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question of a benchmark.

    Args:
        id: unique within the benchmark.
        unit: the independent unit that bootstrap resamples: the image, or the question that is asked several times.
        image: path relative to the benchmark's image folder, or the encoded image itself; None for text alone.
        prompt: text for the model, without any template.
        reference: JSON-able data that scoring needs.
    """

    id: str
    unit: str
    image: str | bytes | None
    prompt: str
    reference: dict[str, Any]


Row = Mapping[str, Any]
"""An answered question, a line of answers/TASK.jsonl: {"id", "unit", "prompt", "response", **reference}.

A response of None is missing, and counts as wrong.
"""


class Outcome(NamedTuple):
    """The score of one question, or of several together.

    Args:
        group: group within which the mean is computed.
        unit: unit of the question.
        value: score.
    """

    group: str
    unit: str
    value: float


@dataclass(frozen=True)
class Metric:
    """A metric: weight × the sum over groups of the mean of their outcomes."""

    outcomes: Sequence[Outcome]
    weight: float = 1.0

    @property
    def score(self) -> float:
        """Value of the metric; 0.0 without outcomes."""
        groups = defaultdict(list)
        for outcome in self.outcomes:
            groups[outcome.group].append(outcome.value)
        return self.weight * sum(sum(values) / len(values) for values in groups.values())


def group_metrics(outcomes: Iterable[tuple[str, Outcome]]) -> dict[str, Metric]:
    """Group pairs (name, outcome) into a metric for each name, in the order of first appearance."""
    outcomes_by_name = defaultdict(list)
    for name, outcome in outcomes:
        outcomes_by_name[name].append(outcome)
    return {name: Metric(outcomes) for name, outcomes in outcomes_by_name.items()}


def compute_scores(metrics: Mapping[str, Metric], name: str) -> dict[str, float]:
    """Compute the scores of metrics by name.

    Args:
        metrics: metrics; those without outcomes are left out.
        name: name of the benchmark or the option, for errors.

    Raises:
        ValueError: nothing was scored, or a score is not a number.
    """
    scores = {metric_name: metric.score for metric_name, metric in metrics.items() if metric.outcomes}
    if not scores:
        raise ValueError(
            f"{name}: got no question with a reference answer, allowed: at least one (test splits have none)"
        )
    if invalid := [metric_name for metric_name, score in scores.items() if not math.isfinite(score)]:
        raise ValueError(f"{name}: got {scores[invalid[0]]} for {invalid[0]}, allowed: a number")
    return scores


class SubmittedAnswer(str):
    """An answer in the form of an official scorer, which is scored unchanged.

    A response of a model is first converted as LLaVA's scripts convert it for submission.
    """


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """Questions and scorer of a benchmark.

    Args:
        read_questions: reads the official files, given as paths or URLs; a ValueError names the file and the location
            of an error.
        compute_metrics: computes metrics by name from rows, the main metric first; none if the rows have no
            references (test splits).
        read_answers: reads {question id: response} from another system's file, in the official format of results, that
            of LLaVA, or answers/TASK.jsonl; a ValueError names the file and the line or item of an error.
        max_new_tokens: limit of a response in LLaVA-1.5's evaluation.
        build_submission: builds JSON-able content for the official server from rows; None without such a server.
    """

    read_questions: Callable[..., list[Question]]
    compute_metrics: Callable[[Sequence[Row]], dict[str, Metric]]
    read_answers: Callable[[Source, Sequence[Question]], dict[str, str]]
    max_new_tokens: int
    build_submission: Callable[[Sequence[Row]], list[dict[str, Any]]] | None = None
