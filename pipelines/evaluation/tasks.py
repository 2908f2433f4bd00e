"""What a model can be asked: the benchmarks of understanding, easy-VQA, and instructions to be followed.

Nothing here starts Ray, so that answers are scored without it.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal, NamedTuple

from annotated_types import Ge, MinLen

from pipelines.data import easy_vqa
from redux.benchmarks import BENCHMARKS, Metric, Question, Row
from redux.benchmarks import instructions as obedience
from redux.settings import ImageAspectRatio, TemplateName


class Task(NamedTuple):
    """What can be evaluated.

    questions: from the files that a job names to what is asked.  metrics: from answered questions to scores.
    images: folder of the images, where the job need not say.
    max_new_tokens: of an answer, where the job does not say.
    """

    questions: Callable[..., list[Question]]
    metrics: Callable[[Sequence[Row]], dict[str, Metric]]
    max_new_tokens: int
    images: str | None = None


def _instructions(*prompts: str) -> list[Question]:
    """Those of frozen files; without one about easy-VQA's images."""
    if not prompts:
        return obedience.build_questions(easy_vqa.asked())
    return [each for path in prompts for each in obedience.read_questions(path)]


TASKS: dict[str, Task] = {
    "easy_vqa": Task(easy_vqa.questions, easy_vqa.metrics, 8, str(easy_vqa.FOLDER)),
    "instructions": Task(_instructions, obedience.compute_metrics, 1024, str(easy_vqa.FOLDER)),
    **{name: Task(each.read_questions, each.compute_metrics, each.max_new_tokens) for name, each in BENCHMARKS.items()},
}
Name = Literal["easy_vqa", "instructions", "vqav2", "gqa", "textvqa", "mme", "mmbench"]


@dataclass(frozen=True, kw_only=True)
class Asking:
    """Settings of one evaluation task.

    Args:
        files: the files of the benchmark, paths or URLs. easy_vqa needs none. instructions uses the images of easy-VQA
            unless it gets a file that `redux instructions` wrote.
        images: folder or URL of the images. null if they are inside the files or in the folder of the benchmark.
        limit: number of images that are asked about, evenly spaced, with all questions about each of them. For a
            benchmark that asks each question several times: number of questions.
        exclude_first: leave out the images that a limit of this number would ask about. For results that must not use
            the images by which settings were chosen.
        max_new_tokens: maximum length of an answer in tokens. null is the benchmark's own.
    """

    files: tuple[str, ...] = ()
    images: str | None = None
    limit: Annotated[int, Ge(1)] | None = None
    exclude_first: Annotated[int, Ge(1)] | None = None
    max_new_tokens: Annotated[int, Ge(1)] | None = None

    def __post_init__(self) -> None:
        if self.limit and self.exclude_first:
            raise ValueError(f"exclude_first: got {self.exclude_first} besides limit, allowed: one of the two")


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Settings of the evaluation.

    Args:
        tasks: the benchmarks, by name, each with its settings.
        batch_size: questions answered at a time by one model.
        num_actors: number of models that answer in parallel. "auto" is one per GPU; without GPUs, at most two.
        image_input: "pixels" shows the image to the model; "caption" shows it a caption that it has written itself,
            the upper limit of the paper's Table 1.
        template: conversation template. null is the one the model was trained with; for a LLaVA that does not name it,
            vicuna_v1.
        image_aspect_ratio: "pad" or "crop". null is the one the model was trained with; for a LLaVA that does not name
            it, pad.
        allow_mismatch: allow a template or an image_aspect_ratio that differs from the training.
    """

    tasks: Annotated[Mapping[Name, Asking], MinLen(1)] = field(default_factory=lambda: {"easy_vqa": Asking()})
    batch_size: Annotated[int, Ge(1)] = 64
    num_actors: Annotated[int, Ge(1)] | Literal["auto"] = "auto"
    image_input: Literal["pixels", "caption"] = "pixels"
    template: TemplateName | None = None
    image_aspect_ratio: ImageAspectRatio | None = None
    allow_mismatch: bool = False


def questions(name: Name, asking: Asking) -> list[Question]:
    """What a task asks.  ValueError where its files cannot be read, are others than it needs, or an id comes twice."""
    try:
        found = TASKS[name].questions(*asking.files)
    except ValueError as error:
        raise ValueError(f"evaluate.tasks.{name}.files: {error}") from None
    if not found:
        raise ValueError(f"evaluate.tasks.{name}.files: no questions in {', '.join(asking.files)}, allowed: some")
    if asking.limit or asking.exclude_first:
        units = list(dict.fromkeys(each.unit for each in found))
        seen = {units[place] for place in spread(len(units), asking.limit or asking.exclude_first or 0)}
        found = [each for each in found if (each.unit in seen) == bool(asking.limit)]
        if not found:
            raise ValueError(
                f"evaluate.tasks.{name}.exclude_first: got {asking.exclude_first}, allowed: up to {len(units) - 1}"
            )
    [(id, times)] = Counter(each.id for each in found).most_common(1)
    if times > 1:
        raise ValueError(f"evaluate.tasks.{name}.files: {times} questions with the id {id}, allowed: one")
    return found


def spread(length: int, count: int) -> list[int]:
    """At most `count` of `length` places, evenly spread."""
    count = min(length, count)
    return [place * length // count for place in range(count)]
