"""Schema of a job file: one tree of dataclasses, each defined next to the code that it configures.

Importing this module loads neither torch nor Ray, so a wrong job file is reported at once.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt
from pydantic import StringConstraints

from jobs import document
from pipelines.data.easy_vqa import EASY_VQA_SETS
from pipelines.data.options import Data
from pipelines.evaluation.tasks import Evaluate, TaskName, TaskSettings
from pipelines.report.run_report import Report
from pipelines.training.stage import Recovery, Stage
from pipelines.training.trackers import TrackerName as Tracker
from redux.architecture import ModelSettings

OTHER_PHASES = ("shards", "questions", "assemble", "evaluate", "report")
"""Phases of a job besides its stages: names that no stage may have."""

# Names of jobs and stages become folders, so they must not lead out of the run folder.
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
Workers = Annotated[int, Ge(1)]
Auto = Literal["auto"]


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run, from images to report.

    Args:
        name: name of the run and of its folder.
        seed: seed of everything that is random.
        num_workers: number of training processes, or a range [fewest, most], or "auto". "auto" is one per GPU in the
            Ray cluster when a stage begins, or one per CPU without GPUs. If this number does not divide the global
            batch evenly, fewer are used. Each process has a GPU if there are GPUs.
        gpu_share: share of a GPU for the worker and for each evaluation actor. Less than 1 lets several runs share a
            GPU, and allows only one worker.
        checkpoints: folder or URL for checkpoints that every worker can reach. They are in a subfolder with the name of
            the job. null keeps them in the run folder.
        data: sources of the samples.
        model: parts of the model, or a checkpoint; its token compression and attention inhibition.
        train: the training stages by name, in order. With {}, the job only evaluates model.checkpoint.
        recovery: reaction to faults and stops.
        evaluate: evaluation after training. null skips it.
        report: the HTML report of the run.
        trackers: experiment trackers that get the metrics besides the run folder.
    """

    name: Name
    seed: Annotated[int, Ge(0), Lt(2**32)] = 0
    num_workers: Auto | Workers | tuple[Workers, Workers] = "auto"
    gpu_share: Annotated[float, Gt(0), Le(1)] = 1
    checkpoints: str | None = None
    data: Data
    model: ModelSettings
    train: dict[Name, Stage] = field(default_factory=dict)
    recovery: Recovery = Recovery()
    evaluate: Evaluate | None = None
    report: Report = Report()
    trackers: tuple[Tracker, ...] = ("tensorboard",)

    def __post_init__(self) -> None:
        fewest, most = self.worker_range or (1, 1)
        if fewest > most:
            raise ValueError(f"num_workers: got {[fewest, most]}, allowed: the fewest first")
        if self.gpu_share < 1 < most:
            raise ValueError(
                f"gpu_share: got {self.gpu_share}, allowed: 1 with several workers, because each needs a GPU"
            )
        if not self.train and not (self.model.checkpoint and self.evaluate):
            raise ValueError("train: got no stages, allowed: at least one, or none with model.checkpoint and evaluate")
        if self.data.source and (reserved := set(self.data.set_names) & set(EASY_VQA_SETS)):
            raise ValueError(f"data.sets: got {min(reserved)}, allowed: other names than {', '.join(EASY_VQA_SETS)}")
        # Each check sees the whole job: what a stage may be depends on the others and on the model.
        self._check_objectives()
        self._check_held_out()
        self._check_features()
        for name, stage in self.train.items():
            self._check_stage(name, stage)

    @property
    def worker_range(self) -> tuple[int, int] | None:
        """Fewest and most workers; None if that is decided when a stage begins."""
        if self.num_workers == "auto":
            return (1, 1) if self.gpu_share < 1 else None  # No two workers share a GPU
        return (self.num_workers, self.num_workers) if isinstance(self.num_workers, int) else self.num_workers

    @property
    def generated_sets(self) -> tuple[str, ...]:
        """Names of the sets that the job makes from its source: those that a stage trains on."""
        return tuple(name for name in EASY_VQA_SETS if name in self.trained_sets) if self.data.source else ()

    @property
    def trained_sets(self) -> set[str]:
        """Names of the sets on which stages train."""
        return {name for stage in self.train.values() for name in stage.mixture}

    @property
    def evaluation_tasks(self) -> Mapping[TaskName, TaskSettings]:
        """Tasks of the evaluation. If it names none: the held-out samples of the last stage, or easy_vqa."""
        if not self.evaluate or self.evaluate.tasks:
            return self.evaluate.tasks if self.evaluate else {}
        stages = list(self.train.values())
        sets = list(stages[-1].mixture if stages else self.data.set_names) if self.data.hold_out else []
        tasks = {_name_held_out_task(name): TaskSettings(held_out=name, metric="contains") for name in sets}
        return tasks or {"easy_vqa": TaskSettings()}

    def _check_held_out(self) -> None:
        """Check the sets whose held-out samples are questions."""
        sets = [*self.generated_sets, *self.data.set_names]
        for name, task in self.evaluate.tasks.items() if self.evaluate else ():
            key = f"evaluate.tasks.{name}.held_out"
            if task.held_out and task.held_out not in sets:
                allowed = f"sets of a stage or of data.sets: {', '.join(sets) or 'none'}"
                raise ValueError(f"{key}: got {task.held_out}, allowed: {allowed}")
            if task.held_out and not self.data.hold_out:
                raise ValueError(f"{key}: got {task.held_out} with data.hold_out: 0, allowed: a share above 0")

    def _check_features(self) -> None:
        """Check that stored features are those of known sets."""
        sets = [*self.generated_sets, *self.data.set_names]
        if unknown := self.data.features.keys() - set(sets):
            allowed = f"sets of a stage or of data.sets: {', '.join(sets) or 'none'}"
            raise ValueError(f"data.features: got {min(unknown)}, allowed: {allowed}")

    def _check_objectives(self) -> None:
        objectives = [stage.objective for stage in self.train.values()]
        if not objectives:
            return
        got = f"train: got objectives {', '.join(objectives)}"
        if self.model.is_pretrained and "contrastive" in objectives:
            raise ValueError(f"{got}, allowed: language alone, because model.tower is pretrained")
        if not self.model.is_pretrained and self.model.has_pretrained_language and "contrastive" not in objectives:
            raise ValueError(
                f"{got}, allowed: a contrastive stage first, which trains the tower before it is joined with "
                "model.language"
            )
        if objectives != sorted(objectives) or objectives[-1] != "language":
            raise ValueError(f"{got}, allowed: any contrastive stages first, then at least one language stage")
        last, stage = list(self.train.items())[-1]
        if self.evaluate and stage.template == "plain":
            raise ValueError(
                f"train.{last}.template: got plain, allowed: a template with questions, for the evaluation"
            )

    def _check_stage(self, name: str, stage: Stage) -> None:
        sets = [*(EASY_VQA_SETS if self.data.source else ()), *self.data.set_names]
        if unknown := stage.mixture.keys() - set(sets):
            raise ValueError(
                f"train.{name}.data: got {min(unknown)}, allowed: {', '.join(sets) or 'none'}, those of data.sets"
            )
        if stage.template == "chat" and not self.model.has_pretrained_language:
            raise ValueError(
                f"train.{name}.template: got chat, allowed for a model built from sizes: plain, vicuna_v1, "
                "vicuna_bare, because its tokenizer has no chat template"
            )
        if name in OTHER_PHASES:
            raise ValueError(f"train: got a stage {name}, allowed: any other name than {', '.join(OTHER_PHASES)}")
        # Of a range, a stage uses a number that divides the batch, see Stage.count_usable_workers.
        if isinstance(self.num_workers, int):
            try:
                stage.count_accumulation_steps(self.num_workers)
            except ValueError as error:
                raise ValueError(f"train.{name}.{error}") from None


def _name_held_out_task(name: str) -> TaskName:
    """Name the task of the held-out samples of a set, whose name may have characters that no task may have."""
    return "held_out_" + re.sub(r"[^A-Za-z0-9_-]", lambda match: f"-{ord(match[0]):x}-", name)


def load(path: Path, overrides: Sequence[str] = ()) -> Job:
    """Load the job of a YAML file after `section.key=value` overrides; ValueError if it is wrong."""
    return document.read(path, overrides, Job)


def dump(job: Job) -> str:
    """Write a job as YAML with all defaults; `load` reads an equal job back."""
    return document.write(job)
