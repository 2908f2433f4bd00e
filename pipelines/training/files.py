"""Files of finished runs, checkpoints and models: names and paths.  Does not import torch: verbs find models fast."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines.core import storage

MANIFEST = "manifest.json"
JOB_FILE = "job.yaml"
PROGRESS_FILE = "progress.jsonl"
"""Finished phases of a job, each with its seconds."""

METRICS_FILE = "metrics.jsonl"
"""Metrics of the training, a line for each step."""

RESULT_FILE = "metrics.json"
"""Scores and seconds of a finished run."""

SCORES_FILE = "scores.json"
ASSEMBLED_FOLDER = "assembled"
"""Pretrained parts and a new projector as one model, before training."""

STUDY_FILE = "study.yaml"
"""Study in the folder that has its runs."""

CONFIG_FILE = "config.json"
"""Configuration of a model, as transformers names it."""


def is_complete(url: str) -> bool:
    """Return True if a model was uploaded there completely."""
    return storage.exists(storage.join(url, MANIFEST))


def is_finished_run(folder: Path) -> bool:
    """Return True if a run in this folder has been evaluated or has ended."""
    return (folder / SCORES_FILE).exists() or (folder / RESULT_FILE).exists()


def locate_checkpoints(checkpoints: str | None, name: str, folder: Path) -> str:
    """Locate the folder or URL that holds one folder per stage.

    Args:
        checkpoints: `checkpoints` of the job.
        name: name of the job.
        folder: run folder.
    """
    return storage.join(checkpoints, name) if checkpoints else str(folder / "checkpoints")


def list_stage_models(job: Mapping[str, Any], folder: Path) -> list[str]:
    """List the folders or URLs of the models that a job's stages make, in order.

    Args:
        job: the job, as in job.yaml.
        folder: run folder.
    """
    root = locate_checkpoints(job.get("checkpoints"), job["name"], folder)
    return [storage.join(root, stage, "model") for stage in job.get("train") or {}]
