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
from redux.settings import Fit, TemplateName


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
        return obedience.questions(easy_vqa.asked())
    return [each for path in prompts for each in obedience.read(path)]


TASKS: dict[str, Task] = {
    "easy_vqa": Task(easy_vqa.questions, easy_vqa.metrics, 8, str(easy_vqa.FOLDER)),
    "instructions": Task(_instructions, obedience.metrics, 1024, str(easy_vqa.FOLDER)),
    **{name: Task(each.questions, each.metrics, each.max_new_tokens) for name, each in BENCHMARKS.items()},
}
Name = Literal["easy_vqa", "instructions", "vqav2", "gqa", "textvqa", "mme", "mmbench"]


@dataclass(frozen=True, kw_only=True)
class Asking:
    """How a task is asked.

    files: the benchmark's own, paths or URLs; easy_vqa needs none, and instructions are about its images unless a file
        is given that `redux instructions` froze.
    images: folder or URL of the images; null where they are within the files, or in the folder that is given.
    limit: ask only about so many images (or, where a question is asked several times, so many of these), evenly
        spread, but all about each: some scores need them together.
    without: leave those out that a limit of so many would ask about, as they were looked at when settings were chosen.
    max_new_tokens: of an answer; null is the benchmark's own.
    """

    files: tuple[str, ...] = ()
    images: str | None = None
    limit: Annotated[int, Ge(1)] | None = None
    without: Annotated[int, Ge(1)] | None = None
    max_new_tokens: Annotated[int, Ge(1)] | None = None

    def __post_init__(self) -> None:
        if self.limit and self.without:
            raise ValueError(f"without: got {self.without} besides limit, allowed: one of the two")


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Settings.

    tasks: what is asked.
    batch: questions answered at once.
    actors: models at work at a time; "auto" is one a GPU, without GPUs up to two.
    image: how the model knows it: "seen", or "described" by itself beforehand, the upper limit of Table 1.
    template, fit: of conversations and images; null is how the model was trained, and for a LLaVA that does not say,
        LLaVA-1.5's vicuna_v1 and pad.
    allow_mismatch: ask the model in another way than it was trained.
    """

    tasks: Annotated[Mapping[Name, Asking], MinLen(1)] = field(default_factory=lambda: {"easy_vqa": Asking()})
    batch: Annotated[int, Ge(1)] = 64
    actors: Annotated[int, Ge(1)] | Literal["auto"] = "auto"
    image: Literal["seen", "described"] = "seen"
    template: TemplateName | None = None
    fit: Fit | None = None
    allow_mismatch: bool = False


def questions(name: Name, asking: Asking) -> list[Question]:
    """What a task asks.  ValueError where its files cannot be read, are others than it needs, or an id comes twice."""
    try:
        found = TASKS[name].questions(*asking.files)
    except ValueError as error:
        raise ValueError(f"evaluate.tasks.{name}.files: {error}") from None
    if not found:
        raise ValueError(f"evaluate.tasks.{name}.files: no questions in {', '.join(asking.files)}, allowed: some")
    if asking.limit or asking.without:
        units = list(dict.fromkeys(each.unit for each in found))
        seen = {units[place] for place in spread(len(units), asking.limit or asking.without or 0)}
        found = [each for each in found if (each.unit in seen) == bool(asking.limit)]
        if not found:
            raise ValueError(f"evaluate.tasks.{name}.without: got {asking.without}, allowed: up to {len(units) - 1}")
    [(id, times)] = Counter(each.id for each in found).most_common(1)
    if times > 1:
        raise ValueError(f"evaluate.tasks.{name}.files: {times} questions with the id {id}, allowed: one")
    return found


def spread(length: int, count: int) -> list[int]:
    """At most `count` of `length` places, evenly spread."""
    count = min(length, count)
    return [place * length // count for place in range(count)]
