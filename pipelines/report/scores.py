"""Scores of a run's answers: metrics with intervals, the score of each question, and confused answers.

Any task is read: a public benchmark, easy-VQA, instructions, or questions of a user. Its main metric is the first that
the metrics function of the task returns. The score of a question is that metric on its row alone, as a share of the
maximum.

A run that is not finished has answers too: they are in the task's partial file.

Cost: a bootstrap for each metric (`pipelines.evaluation.statistics`); and if the main metric has not one outcome for
each row, one call of the metrics function for each row.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any, NamedTuple

from pipelines.core import jsonl
from pipelines.core.words import pluralize
from pipelines.evaluation.answer_files import ANSWERS_FOLDER, find_partial_file
from pipelines.evaluation.statistics import Interval, bootstrap_interval
from pipelines.evaluation.tasks import RESERVED_NAMES, find_task
from pipelines.report.plots import shorten_label
from pipelines.report.runs import Scorer
from redux.benchmark_titles import BENCHMARK_TITLES
from redux.benchmarks import Metric, Row
from redux.benchmarks.custom import UNTYPED
from redux.benchmarks.instructions import ID_LIST, has_instructions
from redux.instructions import ALL_INSTRUCTIONS

MAX_REFERENCES = 20
"""Most different reference answers of a task that has a confusion matrix."""

MAX_CONFUSIONS = 8
ANSWER_LABEL_LENGTH = 40
"""Longest name of an answer, a type or a metric in a table, in characters."""

MAX_BOOTSTRAP_DRAWS = 10_000
MIN_DRAWS = 1_000
DRAWN_UNITS = 30_000_000
"""Units of all draws of a bootstrap together; tasks with more units get fewer draws."""

OTHER = "other"
"""Column of the responses that are not reference answers."""

TYPE_KEYS = ("type", "answer_type", "subtask", "structural", "l2-category", "category")
"""Keys of a row that have the type of its question, by preference."""

SCORED_TASK_TITLES = {
    "easy_vqa": "easy-VQA",
    "instructions": "Instructions",
    "instructions_held_out": "Held-out constraints",
    "instruction_pairs": "Two instructions",
    "instructions_without_image": "Instructions without image",
}
METRIC_TITLES = {
    "strict": "followed (strict)",
    "loose": "followed (loose)",
    "prompt_strict": "all of a prompt followed (strict)",
    "prompt_loose": "all of a prompt followed (loose)",
    "right": "answer correct",
    "both": "followed and correct",
    "words": "words per answer",
    "image_mass": "attention to image tokens",
    "dominance": "dominance index of text",
    "dominance.early": "dominance index, first two layers",
    "dominance.middle": "dominance index, middle two layers",
    "dominance.late": "dominance index, last two layers",
    "perception": "perception, points",
    "cognition": "cognition, points",
}
QUANTITIES = ("words", "dominance")
"""Metrics without a largest possible value, and those of their parts."""

LAYER_METRICS = "image_mass.layer_"
"""Beginning of the names of metrics by layer, which the lists of scores leave out."""


class ScoreLine(NamedTuple):
    """A metric with its 95 % interval.

    Args:
        title: name on the page.
        outcomes: number of its outcomes.
        interval: value and interval.
        maximum: largest possible value, 1 for a share; of a quantity, the largest of its outcomes.
        is_type: it is the main metric of one type of question.
        is_quantity: it has no largest possible value.
    """

    title: str
    outcomes: int
    interval: Interval
    maximum: float
    is_type: bool = False
    is_quantity: bool = False

    @property
    def is_share(self) -> bool:
        return abs(self.maximum - 1) < 1e-9 and not self.is_quantity


class JudgedRow(NamedTuple):
    """An answered question with its score.

    Args:
        row: the line of the file of answers.
        score: score as a share of the maximum; None without a reference.
        kind: type of the question.
        references: different reference answers, the most frequent first.
    """

    row: Mapping[str, Any]
    score: float | None
    kind: str
    references: tuple[str, ...]

    @property
    def is_wrong(self) -> bool:
        """True below the full score, so a partly right answer is wrong."""
        return self.score is not None and self.score < 1 - 1e-9

    @property
    def is_right(self) -> bool:
        return self.score is not None and not self.is_wrong


class Confusion(NamedTuple):
    """A wrong response, its count, and its share of the questions with the same reference answer."""

    answer: str
    response: str
    times: int
    share: float


class ConfusionMatrix(NamedTuple):
    """Counts of responses by reference answer.

    Args:
        references: reference answers, one for each row.
        responses: the same answers, and OTHER if a response is none of them, one for each column.
        counts: counts by row and column.
    """

    references: tuple[str, ...]
    responses: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class TaskResult:
    """Results of a task.

    Args:
        name: name of the task.
        title: its name on the page.
        main: the main metric; None if nothing can be scored.
        others: the other metrics.
        rows: all answered questions.
        is_complete: all questions are answered.
        problem: why nothing is scored, "" if something is.
    """

    name: str
    title: str
    main: ScoreLine | None
    others: tuple[ScoreLine, ...]
    rows: tuple[JudgedRow, ...]
    is_complete: bool
    problem: str = ""

    @property
    def has_instructions(self) -> bool:
        return any(has_instructions(judged.row) for judged in self.rows)


def read_results(run: Path) -> list[TaskResult]:
    """Read and score the answers of all tasks of a run, finished or not, in the order of their names."""
    folder = run / ANSWERS_FOLDER
    # An unfinished task has only its hidden partial file.
    names = {path.name.removeprefix(".").removesuffix(".jsonl") for path in folder.glob("*.jsonl")}
    results = (_read_result(folder, name) for name in sorted(names - set(RESERVED_NAMES)))
    return [result for result in results if result.rows]


def _read_result(folder: Path, name: str) -> TaskResult:
    partial = find_partial_file(folder, name)
    # Rows of the partial file are newer, so they come last.
    stored = [row for path in (folder / f"{name}.jsonl", partial) for row in jsonl.read(path)]
    rows = list({row.get("id", number): row for number, row in enumerate(stored)}.values())
    score = find_task(name).metrics
    metrics: dict[str, Metric] = {}
    problem = "The questions have no reference answers, so nothing is scored here."
    try:
        metrics = {metric_name: metric for metric_name, metric in score(rows).items() if metric.outcomes}
    except (LookupError, TypeError, ValueError) as error:
        # Rows of another version or of another program: the page still shows them.
        problem = f"The answers cannot be scored: {type(error).__name__}: {error}"
    # Tasks list their main metric first.
    main = next(iter(metrics), "")
    lines = [
        make_score_line(metric_name, metric, main)
        for metric_name, metric in metrics.items()
        if not metric_name.startswith(LAYER_METRICS)
    ]
    # Each question also gets a score of its own, for the gallery.
    judged = tuple(
        JudgedRow(row, row_score, _find_kind(row), _list_references(row))
        for row, row_score in zip(rows, _score_rows(score, rows, metrics.get(main)), strict=True)
    )
    return TaskResult(
        name=name,
        title=find_title(name),
        main=lines[0] if lines else None,
        others=tuple(lines[1:]),
        rows=judged,
        is_complete=not partial.exists(),
        problem="" if lines else problem,
    )


def describe_scores(run: Path) -> list[str]:
    """Describe the main score of each task with its 95 % interval, a line each; none without answers."""
    return [_describe_score(result) for result in read_results(run)]


def _describe_score(result: TaskResult) -> str:
    questions = pluralize(len(result.rows), "question", ",")
    if result.main is None:
        return f"{result.title}: no score of {questions}. {result.problem}"
    factor, unit = (100, " %") if result.main.is_share else (1, "")
    interval = result.main.interval.scale(factor)
    value, low, high = (f"{number:.1f}" for number in (interval.value, interval.low, interval.high))
    return f"{result.title}, {result.main.title}: {value}{unit} (95 % interval {low} to {high}{unit}), {questions}"


def find_title(name: str) -> str:
    """Return the name of a task on the page."""
    return BENCHMARK_TITLES.get(name) or SCORED_TASK_TITLES.get(name, name)


def make_score_line(name: str, metric: Metric, main: str) -> ScoreLine:
    """Make the line of a metric.

    Args:
        name: name of the metric.
        metric: the metric.
        main: name of the main metric; "MAIN.TYPE" gets the title TYPE.
    """
    is_quantity = name.partition(".")[0] in QUANTITIES
    if is_quantity:
        maximum = max(*(outcome.value for outcome in metric.outcomes), 1e-9)
        interval = bootstrap_interval([metric])
    else:
        # A mean is at most 1 in each group.
        maximum = metric.weight * len({outcome.group for outcome in metric.outcomes})
        interval = compute_interval(metric, maximum)
    title = name.removeprefix(f"{main}.")
    title = METRIC_TITLES.get(title, title)
    return ScoreLine(
        shorten_label(title, ANSWER_LABEL_LENGTH),
        len(metric.outcomes),
        interval,
        maximum,
        is_type=name.startswith(f"{main}."),
        is_quantity=is_quantity,
    )


def compute_interval(metric: Metric, maximum: float = 1.0) -> Interval:
    """Compute the interval of a metric by a bootstrap over units.

    If all draws are equal, as for 20 of 20 correct, it is Wilson's interval over units.

    Args:
        metric: the metric.
        maximum: its largest possible value.
    """
    units = len({outcome.unit for outcome in metric.outcomes})
    # Many questions need fewer draws for an interval of the same accuracy.
    draws = min(max(DRAWN_UNITS // units, MIN_DRAWS), MAX_BOOTSTRAP_DRAWS)
    interval = bootstrap_interval([metric], draws)
    if interval.high - interval.low > 1e-9 * maximum:
        return interval
    # A bootstrap of equal outcomes would give an interval of no length.
    low, high = wilson_interval(interval.value / maximum * units, units)
    return Interval(interval.value, low * maximum, high * maximum)


def wilson_interval(successes: float, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Compute the score interval of a share (E. B. Wilson 1927, JASA 22, p. 209-212).

    Unlike share ± z·sd, the interval stays within 0..1 and does not vanish for 0 or n successes. For n = 0 it is
    (0, 1).

    Args:
        successes: number of successes.
        n: number of trials.
        z: quantile of the normal distribution; 1.96 gives 95 %.
    """
    if not n:
        return 0.0, 1.0
    fraction = successes / n
    centre = fraction + z * z / (2 * n)
    half = z * sqrt(max(fraction * (1 - fraction), 0) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def _score_rows(score: Scorer, rows: Sequence[Row], main: Metric | None) -> list[float | None]:
    """Compute the first metric of each row alone, as a share of its maximum; None for a row that has none."""
    if main and [outcome.unit for outcome in main.outcomes] == [row.get("unit") for row in rows]:
        return [outcome.value for outcome in main.outcomes]  # It has one outcome for each row, in their order
    return [_score_row(score, row) for row in rows]


def _score_row(score: Scorer, row: Row) -> float | None:
    try:
        metric = next(iter(score([row]).values()), None)
    except (LookupError, TypeError, ValueError):
        return None
    if metric is None or not metric.outcomes:
        return None
    return metric.score / (metric.weight * len({outcome.group for outcome in metric.outcomes}))


def _find_kind(row: Mapping[str, Any]) -> str:
    """Find the type of a question, "" if it has none."""
    if has_instructions(row):
        ids = row[ID_LIST] if ID_LIST in row else [row["instruction_id"]]
        names = (ALL_INSTRUCTIONS[id].name if id in ALL_INSTRUCTIONS else str(id) for id in ids)
        return shorten_label(" + ".join(names), ANSWER_LABEL_LENGTH)
    # Benchmarks name the type of a question differently.
    kind = next((str(row[key]) for key in TYPE_KEYS if row.get(key)), "")
    return "" if kind == UNTYPED else shorten_label(kind, ANSWER_LABEL_LENGTH)


def _list_references(row: Mapping[str, Any]) -> tuple[str, ...]:
    answers = row.get("answers") or ([] if row.get("answer") is None else [row["answer"]])
    answers = [str(answer) for answer in (answers if isinstance(answers, list) else [answers])]
    # A letter alone means nothing to a reader.
    options = row.get("options")
    if isinstance(options, Mapping):
        answers = [f"{answer}. {options[answer]}" if answer in options else answer for answer in answers]
    return tuple(answer for answer, _ in Counter(answers).most_common())


def count_confusions(result: TaskResult) -> ConfusionMatrix | list[Confusion]:
    """Count confused answers: as a matrix for few reference answers, else the most frequent wrong responses.

    Questions with several reference answers count under the most frequent of them. Responses to instructions are texts,
    so they have neither.
    """
    judged = [row for row in result.rows if row.references and row.score is not None]
    if result.has_instructions:
        return []
    # Answers of one type are neighbours in the matrix.
    counts = Counter(_name_reference(row) for row in judged)
    kinds = {_name_reference(row): row.kind for row in judged}
    if 2 <= len(counts) <= MAX_REFERENCES:
        return _count_matrix(judged, sorted(counts, key=lambda answer: (kinds[answer], -counts[answer], answer)))
    # With more answers a matrix would be too wide for the page.
    wrong_pairs = Counter((_name_reference(row), _name_response(row)) for row in judged if row.is_wrong)
    return [
        Confusion(answer, response, times, times / counts[answer])
        for (answer, response), times in wrong_pairs.most_common(MAX_CONFUSIONS)
    ]


def _count_matrix(judged: Sequence[JudgedRow], references: Sequence[str]) -> ConfusionMatrix:
    references_by_text = {reference.casefold(): reference for reference in references}
    counts = Counter[tuple[str, str]]()
    for row in judged:
        reference = _name_reference(row)
        response = (
            reference if row.is_right else references_by_text.get(_name_response(row).rstrip(".").casefold(), OTHER)
        )
        # A wrong response that looks like its reference, such as one in upper case, is not on the diagonal.
        counts[reference, OTHER if response == reference and row.is_wrong else response] += 1
    has_other = any(response == OTHER for _, response in counts) and OTHER not in references
    columns = (*references, *([OTHER] if has_other else []))
    return ConfusionMatrix(
        tuple(references), columns, tuple(tuple(counts[row, column] for column in columns) for row in references)
    )


def _name_reference(judged: JudgedRow) -> str:
    return shorten_label(judged.references[0].strip(), ANSWER_LABEL_LENGTH)


def _name_response(judged: JudgedRow) -> str:
    return shorten_label(str(judged.row.get("response") or "").strip(), ANSWER_LABEL_LENGTH)
