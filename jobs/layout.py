"""Where a run keeps what later runs read: its sets of shards, and the models of its stages."""

from pathlib import Path

from jobs.schema import Job
from pipelines.core import storage


def locate_sets(job: Job, folder: Path) -> dict[str, str]:
    """Return where each set of shards lies: those that the job makes, and those that it names.

    folder: of the run.
    """
    return {name: str(folder / "shards" / name) for name in job.made} | job.data.sets


def locate_checkpoints(job: Job, folder: Path) -> str:
    """Return the folder or URL in which each stage has a folder of its name."""
    return storage.join(job.checkpoints, job.name) if job.checkpoints else str(folder / "checkpoints")


def locate_model(job: Job, folder: Path, stage: str) -> str:
    """Return the folder or URL of the model that a stage makes."""
    return storage.join(locate_checkpoints(job, folder), stage, "model")
