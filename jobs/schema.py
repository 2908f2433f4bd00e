"""What a job file may say: one tree of dataclasses, each defined beside the code that it configures.

Importing this module imports torch and Ray, since the owners do; so the command line imports it inside its verbs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from annotated_types import Ge, Lt, MinLen
from pydantic import StringConstraints

from jobs import document
from pipelines.easy_vqa import SETS
from pipelines.evaluate import Evaluate
from pipelines.report import Report
from pipelines.shards import Data
from pipelines.train import Stage
from redux.model import Model

OTHER_STEPS = ("shards", "evaluate", "report")
"""What a job does besides its stages: names that no stage may have."""

# the name of a job and those of its stages become names of folders, which must not lead out of the run's own
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run, from images to report."""

    name: Name
    seed: Annotated[int, Ge(0), Lt(2**32)] = 0
    workers: Annotated[int, Ge(1)] = 1  # training processes, each with a GPU where there are GPUs
    data: Data
    model: Model
    train: Annotated[dict[Name, Stage], MinLen(1)]  # in the order of the file
    evaluate: Evaluate
    report: Report

    def __post_init__(self) -> None:
        objectives = [stage.objective for stage in self.train.values()]
        if objectives != sorted(objectives) or objectives[-1] != "language":
            raise ValueError(
                f"train: got objectives {', '.join(objectives)}, allowed: any contrastive stages first, then at least "
                "one language stage"
            )
        if list(self.train.values())[-1].template == "plain":
            last = list(self.train)[-1]
            raise ValueError(
                f"train.{last}.template: got plain, allowed: a template with questions, as the last stage is asked some"
            )
        if taken := self.data.sets.keys() & SETS.keys():
            raise ValueError(f"data.sets: got {min(taken)}, allowed: other names than {', '.join(SETS)}")
        for name, stage in self.train.items():
            if unknown := stage.mixture.keys() - {*SETS, *self.data.sets}:
                allowed = ", ".join([*SETS, *self.data.sets])
                raise ValueError(f"train.{name}.data: got {min(unknown)}, allowed: {allowed}, those of data.sets")
            if name in OTHER_STEPS:
                raise ValueError(f"train: got a stage {name}, allowed: any other name than {', '.join(OTHER_STEPS)}")
            try:
                stage.accumulation(self.workers)
            except ValueError as error:
                raise ValueError(f"train.{name}.{error}") from None


def load(path: Path, overrides: Sequence[str] = ()) -> Job:
    """The job of a YAML file after `section.key=value` overrides. Raises ValueError with one clear line."""
    return document.read(path, overrides, Job)


def dump(job: Job) -> str:
    """The job as YAML with every default written out; `load` reads an equal job back."""
    return document.write(job)
