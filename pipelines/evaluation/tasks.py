"""Evaluation tasks and their settings: public benchmarks, easy-VQA, instruction following, and questions of users.

This module does not import Ray, so answers can be scored without it.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Literal, NamedTuple

from annotated_types import Ge
from pydantic import StringConstraints

from pipelines.core import storage
from pipelines.data import easy_vqa
from pipelines.data.images import ImageFolder
from redux.benchmarks import BENCHMARKS, Metric, Question, Row, custom
from redux.benchmarks import instructions as instruction_following
from redux.benchmarks.custom import AnswerMetric
from redux.held_out_instructions import HELD_OUT_INSTRUCTIONS
from redux.instructions import INSTRUCTIONS
from redux.settings import ImageAspectRatio, TemplateName


class Task(NamedTuple):
    """One evaluation task.

    Args:
        questions: function from the files that a job names to the questions.
        metrics: function from answered questions to scores by name.
        max_new_tokens: default of TaskSettings.max_new_tokens.
        images: default of TaskSettings.images.
    """

    questions: Callable[..., list[Question]]
    metrics: Callable[[Sequence[Row]], dict[str, Metric]]
    max_new_tokens: int
    images: str | None = None


def _load_instructions(*prompts: str, instruction_ids: Iterable[str] = tuple(INSTRUCTIONS)) -> list[Question]:
    """Load prompts with instructions from frozen files; without files, make them from the images of easy-VQA."""
    if not prompts:
        return instruction_following.build_questions(easy_vqa.draw_questions(), instruction_ids=instruction_ids)
    return [question for path in prompts for question in instruction_following.read_questions(path)]


def _load_held_out_instructions(*prompts: str) -> list[Question]:
    """Load prompts as `_load_instructions`, with the held-out constraints."""
    return _load_instructions(*prompts, instruction_ids=HELD_OUT_INSTRUCTIONS)


def _load_instruction_pairs(*prompts: str) -> list[Question]:
    """Load prompts as `_load_instructions`, with two of the sixteen instructions each."""
    if not prompts:
        return instruction_following.build_pair_questions(easy_vqa.draw_questions())
    return _load_instructions(*prompts)


def _load_instructions_without_image(*prompts: str) -> list[Question]:
    """Load the prompts of the task "instructions" as text alone."""
    return instruction_following.without_images(_load_instructions(*prompts))


EVALUATION_TASKS: dict[str, Task] = {
    "easy_vqa": Task(easy_vqa.load_test_questions, easy_vqa.compute_metrics, 8, str(easy_vqa.PACKAGE_IMAGES)),
    "instructions": Task(_load_instructions, instruction_following.compute_metrics, 1024, str(easy_vqa.PACKAGE_IMAGES)),
    "instructions_held_out": Task(
        _load_held_out_instructions, instruction_following.compute_metrics, 1024, str(easy_vqa.PACKAGE_IMAGES)
    ),
    "instruction_pairs": Task(
        _load_instruction_pairs, instruction_following.compute_metrics, 1024, str(easy_vqa.PACKAGE_IMAGES)
    ),
    "instructions_without_image": Task(_load_instructions_without_image, instruction_following.compute_metrics, 1024),
    **{
        name: Task(benchmark.read_questions, benchmark.compute_metrics, benchmark.max_new_tokens)
        for name, benchmark in BENCHMARKS.items()
    },
}

CUSTOM_TOKENS = 128
"""Default of TaskSettings.max_new_tokens for questions of users."""

# The name of a task becomes that of the file of its answers.
TaskName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]

RESERVED_NAMES = ("speed",)
"""Names that no task may have, because files of answers and metrics use them."""

HELD_OUT_METRICS = ("exact", "contains", "anls")
"""Metrics for one answer in free form."""


@dataclass(frozen=True, kw_only=True)
class TaskSettings:
    """Settings of one evaluation task.

    Args:
        files: the files of the benchmark, paths or URLs. easy_vqa needs none. instructions, instructions_held_out,
            instruction_pairs and instructions_without_image use the images of easy-VQA unless they get files that
            `redux instructions` wrote.
        file: questions of your own, path or URL: JSON lines or a JSON list of {image, question, answer or answers}, and
            if wanted type, id and options; or LLaVA records. The task may then have any name.
        held_out: set of shards. The questions are the first ones of the samples that data.hold_out keeps out of its
            training, with their images as stored. The task may then have any name.
        metric: score of a response to questions of `file` or `held_out`. "exact": equal to an answer; "contains": an
            answer occurs in it as whole words; "vqa": VQAv2's accuracy over the answers of several people; "anls":
            similarity of the text; "choice": names the right option; "instructions": for a file that
            `redux instructions` wrote.
        images: folder or URL of the images. null if they are inside the files, in the folder of the benchmark or in
            that of `file`.
        limit: evaluate on this many images, evenly spaced, each with all its questions. For a benchmark that asks each
            question several times, it is the number of questions.
        exclude_first: skip the images that `limit` with the same number selects. Use it after a search that chose
            settings on those images.
        max_new_tokens: maximum length of an answer in tokens. null is the default of the benchmark.
    """

    files: tuple[str, ...] = ()
    file: str | None = None
    held_out: str | None = None
    metric: AnswerMetric | None = None
    images: str | None = None
    limit: Annotated[int, Ge(1)] | None = None
    exclude_first: Annotated[int, Ge(1)] | None = None
    max_new_tokens: Annotated[int, Ge(1)] | None = None

    def __post_init__(self) -> None:
        if self.limit and self.exclude_first:
            raise ValueError(f"exclude_first: got {self.exclude_first} besides limit, allowed: one of the two")
        sources = {"file": self.file, "held_out": self.held_out, "files": self.files}
        source, *further_sources = [name for name, value in sources.items() if value] or [""]
        if further_sources:
            raise ValueError(f"{source}: got {sources[source]} besides {further_sources[0]}, allowed: one of the two")
        if self.is_custom != (self.metric is not None):
            set_key, null_key = (source, "metric") if self.is_custom else ("metric", "file")
            raise ValueError(
                f"{null_key}: got null besides {set_key}, allowed: file and metric, or held_out and metric"
            )
        if self.held_out:
            self._check_held_out()

    @property
    def is_custom(self) -> bool:
        """True for questions of the user, which may have any name."""
        return bool(self.file or self.held_out)

    def _check_held_out(self) -> None:
        if self.metric not in HELD_OUT_METRICS:
            raise ValueError(
                f"metric: got {self.metric} with held_out, allowed: {', '.join(HELD_OUT_METRICS)}, because a sample "
                "has one answer in free form"
            )
        if self.images:
            raise ValueError(
                f"images: got {self.images} besides held_out, allowed: null, because samples have their images"
            )


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Settings of the evaluation.

    Args:
        tasks: the benchmarks and your own questions, by name, each with its settings. {} asks the held-out samples of
            the sets of the last stage, with metric contains; without data.hold_out it is easy_vqa.
        batch_size: questions that one copy of the model answers at a time.
        num_actors: number of copies of the model that answer in parallel. "auto" is one per GPU; without GPUs, at most
            two.
        image_input: "pixels" shows the image to the model. "caption" shows it the model's own caption instead (upper
            limit in the paper's Table 1).
        attention: number of questions with images, in each task, whose answers a LLaVA reads again to measure its
            attention to the image by layer. One forward pass each.
        template: conversation template. null is that of the training, or vicuna_v1 for a LLaVA that does not name it.
        image_aspect_ratio: "pad" or "crop". null is that of the training, or pad for a LLaVA that does not name it.
        allow_mismatch: allow a template or an image_aspect_ratio that differs from the training.
    """

    tasks: Mapping[TaskName, TaskSettings] = field(default_factory=dict)
    batch_size: Annotated[int, Ge(1)] = 64
    num_actors: Annotated[int, Ge(1)] | Literal["auto"] = "auto"
    image_input: Literal["pixels", "caption"] = "pixels"
    attention: Annotated[int, Ge(0)] = 0
    template: TemplateName | None = None
    image_aspect_ratio: ImageAspectRatio | None = None
    allow_mismatch: bool = False

    def __post_init__(self) -> None:
        for name, task in self.tasks.items():
            if name in RESERVED_NAMES or (name in EVALUATION_TASKS) == task.is_custom:
                known = ", ".join(EVALUATION_TASKS)
                source = "held_out" if task.held_out else "file"
                got = f"the name {name} with {source}" if task.is_custom else f"a task {name} without file or held_out"
                raise ValueError(
                    f"tasks: got {got}, allowed: {known} without them, or another name with one of them and metric"
                )


def find_task(name: TaskName) -> Task:
    """Return the task of a name; any name but those of EVALUATION_TASKS is a user's."""
    return EVALUATION_TASKS.get(name, CUSTOM_TASK)


def find_image_folder(name: TaskName, task: TaskSettings) -> str:
    """Return the folder or URL of the images of a task."""
    if task.images:
        return task.images
    return storage.find_parent(task.file) if task.file else find_task(name).images or "".join(task.files[:1])


def count_new_tokens(name: TaskName, task: TaskSettings) -> int:
    """Return the maximum length of an answer in tokens."""
    is_instructions = task.metric == "instructions"
    return task.max_new_tokens or find_task("instructions" if is_instructions else name).max_new_tokens


def compute_custom_metrics(rows: Sequence[Row]) -> dict[str, Metric]:
    """Compute the metrics of questions of users, whose rows say how they are scored."""
    has_instructions = bool(rows) and instruction_following.has_instructions(rows[0])
    return (instruction_following.compute_metrics if has_instructions else custom.compute_metrics)(rows)


def _load_custom(file: str, metric: AnswerMetric, images: str) -> list[Question]:
    if metric == "instructions":
        return instruction_following.read_questions(file)
    return custom.read_questions(file, metric, partial(_resolve_image, ImageFolder(images)))


def _resolve_image(folder: ImageFolder, path: str) -> str:
    """Return the path of an image in its folder, from a path as a file names it; ValueError if it leads outside.

    The file may have absolute paths below the folder, and backslashes.
    """
    candidates, _ = folder.list_candidates(path)
    if not candidates:
        raise ValueError(f"got image {path!r}, which leads out of {folder.url}, allowed: a path below this folder")
    existing = (name for name in candidates if folder.is_local and os.path.isfile(os.path.join(folder.roots[0], name)))
    return next(existing, candidates[0])


CUSTOM_TASK = Task(_load_custom, compute_custom_metrics, CUSTOM_TOKENS)
"""Questions of users: `questions` takes the file, the metric and the folder of the images."""


def load_questions(name: TaskName, task: TaskSettings) -> list[Question]:
    """Load the questions of a task, after `limit` or `exclude_first`.

    Raises:
        ValueError: a file cannot be read, is not of this task, or has an id twice; or no question is left.
    """
    key = f"evaluate.tasks.{name}.{'file' if task.file else 'files'}"
    arguments = (task.file, task.metric, find_image_folder(name, task)) if task.file else task.files
    try:
        questions = find_task(name).questions(*arguments)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None
    if not questions:
        raise ValueError(f"{key}: no questions in {task.file or ', '.join(task.files)}, allowed: some")
    if task.limit or task.exclude_first:
        # Select whole units, so that all questions about an image are kept or left out together.
        units = list(dict.fromkeys(question.unit for question in questions))
        count = task.limit or task.exclude_first or 0
        selected = {units[index] for index in spread_evenly(len(units), count)}
        questions = [question for question in questions if (question.unit in selected) == bool(task.limit)]
        if not questions:
            raise ValueError(
                f"evaluate.tasks.{name}.exclude_first: got {task.exclude_first}, allowed: up to {len(units) - 1}"
            )
    # Answers are stored by id, so a second question with the same id would take the first answer.
    [(id, times)] = Counter(question.id for question in questions).most_common(1)
    if times > 1:
        raise ValueError(f"{key}: {times} questions with the id {id}, allowed: one")
    return questions


def spread_evenly(length: int, count: int) -> list[int]:
    """Select at most `count` of `length` indices, at equal distances.

    >>> spread_evenly(10, 3)
    [0, 3, 6]
    """
    count = min(length, count)
    return [index * length // count for index in range(count)]
