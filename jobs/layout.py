"""Locations inside a run folder that later runs read: sets of shards, checkpoints, and models of stages."""

from pathlib import Path

from jobs.schema import Job
from pipelines.core import storage


def locate_sets(job: Job, folder: Path) -> dict[str, str]:
    """Locate each set of shards, both those that the job makes and those that it names, in a run folder."""
    return {name: str(folder / "shards" / name) for name in job.generated_sets} | job.data.sets


def locate_checkpoints(job: Job, folder: Path) -> str:
    """Locate the folder or URL that holds one folder per stage."""
    return storage.join(job.checkpoints, job.name) if job.checkpoints else str(folder / "checkpoints")


def locate_model(job: Job, folder: Path, stage: str) -> str:
    """Locate the folder or URL of the model that a stage makes."""
    return storage.join(locate_checkpoints(job, folder), stage, "model")
