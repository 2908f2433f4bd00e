"""Locations inside a run folder that later runs and other verbs read: sets of shards, checkpoints, and models."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from jobs import schema
from jobs.schema import Job
from pipelines.core import storage
from pipelines.evaluation.tasks import TaskName, TaskSettings
from pipelines.training import files
from pipelines.training.files import CONFIG_FILE, JOB_FILE, is_complete
from redux.hub import check_source, describe_missing

HELD_OUT_FOLDER = "held_out"
"""Folder of a run with the questions of held-out samples; each task has a folder in it."""

QUESTIONS_FILE = "questions.jsonl"

SHARDS_DIR = "shards"
"""Folder of the sets that a job makes, in its run folder."""

ADAPTER_FILE = "adapter_config.json"
"""Configuration of LoRA adapters, as PEFT names it."""


def locate_sets(job: Job, folder: Path) -> dict[str, str]:
    """Locate each set of shards, both those that the job makes and those that it names, in a run folder."""
    own_sets = {name: str(folder / SHARDS_DIR / name) for name in (*job.generated_sets, *job.data.make)}
    return own_sets | job.data.sets


def locate_tasks(job: Job, folder: Path) -> dict[TaskName, TaskSettings]:
    """Locate the questions of each task: held-out samples are a file of questions in the run folder."""
    return {
        name: replace(task, held_out=None, file=str(folder / HELD_OUT_FOLDER / name / QUESTIONS_FILE))
        if task.held_out
        else task
        for name, task in job.evaluation_tasks.items()
    }


def locate_job_checkpoints(job: Job, folder: Path) -> str:
    """Locate the folder or URL that holds one folder per stage."""
    return files.locate_checkpoints(job.checkpoints, job.name, folder)


def locate_model(job: Job, folder: Path, stage: str) -> str:
    """Locate the folder or URL of the model that a stage makes."""
    return storage.join(locate_job_checkpoints(job, folder), stage, "model")


def list_paths(job: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """List the keys of a job that name folders, files or URLs, with their values.

    A hub id of a model is not listed. A name such as `a/b` is a hub id unless this folder exists here.

    Args:
        job: the job as a tree, with or without its defaults.
    """
    data, model, evaluation = (job.get(section) or {} for section in ("data", "model", "evaluate"))
    pairs = [("checkpoints", job.get("checkpoints"))]
    pairs += [(f"data.sets.{name}", url) for name, url in (data.get("sets") or {}).items()]
    for name, source in (data.get("make") or {}).items():
        pairs += [(f"data.make.{name}.{key}", (source or {}).get(key)) for key in ("source", "images")]
    for part in ("tower", "language", "checkpoint"):
        text = model.get(part)
        if isinstance(text, str) and (text.startswith(("/", ".", "~", "file:")) or Path(text).is_dir()):
            pairs.append((f"model.{part}", text))
    for name, task in (evaluation.get("tasks") or {}).items():
        settings = task or {}
        pairs += [(f"evaluate.tasks.{name}.files", file) for file in settings.get("files") or ()]
        pairs += [(f"evaluate.tasks.{name}.{key}", settings.get(key)) for key in ("file", "images")]
    yield from ((key, value) for key, value in pairs if value)


def find_model(source: str) -> str:
    """Find the model that a user names, to ask, serve or export it.

    Args:
        source: folder of a run; or folder, hub id or URL of a model.

    Returns:
        For a run the model of its last stage, or the checkpoint that it evaluates; for a model the source itself.

    Raises:
        ValueError: the run has not made its model yet, or the folder has neither a run nor a model.
    """
    folder = Path(source)
    if (folder / JOB_FILE).exists():
        job = schema.load(folder / JOB_FILE)
        if not job.train:
            return str(job.model.checkpoint)
        model = locate_model(job, folder.resolve(), list(job.train)[-1])
        if not is_complete(model):
            raise ValueError(
                f"{source}: the run has no model yet, allowed: a run whose training is finished; redux export writes "
                "the model of a checkpoint"
            )
        return model
    if (folder / ADAPTER_FILE).exists():
        raise ValueError(
            f"{source}: the folder has LoRA adapters alone, allowed: a whole model; its README.md joins them with "
            "their base"
        )
    if folder.is_dir() and not (folder / CONFIG_FILE).exists():
        raise ValueError(f"{source}: no {JOB_FILE} or {CONFIG_FILE}, allowed: the folder of a run or of a model")
    check_source(source, "MODEL", "the folder of a run; or folder, hub id or URL of a model")
    return source


def require_folder(folder: Path, label: str, allowed: str) -> None:
    """Raise a ValueError if a local folder that the user names does not exist.

    Args:
        folder: the folder.
        label: name of the argument in the error.
        allowed: folders that are allowed, for the error.
    """
    if not folder.is_dir():
        raise ValueError(f"{label}: got {folder}, allowed: {allowed}; {describe_missing(folder)}")
