"""Report of a run (`redux report`), also of one that is not finished or that an earlier version of Redux made."""

import functools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from jobs import document, schema
from jobs.layout import locate_model, locate_tasks, require_folder
from jobs.schema import Job
from pipelines.core import storage
from pipelines.evaluation import evaluate
from pipelines.evaluation.answer_files import ANSWERS_FOLDER, PROVENANCE_FILE
from pipelines.evaluation.evaluate import EvaluatedModel
from pipelines.report import run_report
from pipelines.report.run_report import Report, ReportedModel, WrittenReport
from pipelines.training import trackers
from pipelines.training.files import CONFIG_FILE, JOB_FILE, STUDY_FILE, list_stage_models
from redux import answering
from redux.pretrained import configure_checkpoint

TRACKER_STAGE = "evaluate"
"""Stage under which trackers show scores and pictures."""


def render_again(folder: Path, examples: int | None = None) -> Path:
    """Write the report of a run folder from what the folder has, and return its path.

    Args:
        folder: run folder.
        examples: questions of each task that are shown; None takes the setting of the job.

    Raises:
        ValueError: the folder is not that of a run, or a file in it cannot be read.
    """
    require_folder(folder, "RUN", "the folder of a run")
    if not (folder / JOB_FILE).exists():
        hint = "; redux tables compares the runs of a study" if (folder / STUDY_FILE).exists() else ""
        raise ValueError(f"RUN: got {folder}, which has no {JOB_FILE}, allowed: the folder of a run{hint}")
    folder = folder.resolve()
    try:
        job = schema.load(folder / JOB_FILE)
    except ValueError:  # Of an earlier version: its answers say which model gave them
        options = Report() if examples is None else Report(examples=examples)
        return run_report.write_run_report(folder, options, None, _describe_model(_read_evaluated(folder))).path
    options = job.report if examples is None else replace(job.report, examples=examples)
    return write_report(replace(job, report=options), folder).path


def write_report(job: Job, folder: Path) -> WrittenReport:
    """Write the report of a job that has run in a folder, as far as it has come."""
    described = _describe_model(choose_evaluated_model(job, folder))
    return run_report.write_run_report(folder, job.report, locate_tasks(job, folder), described)


def choose_evaluated_model(job: Job, folder: Path) -> EvaluatedModel:
    """Choose the model to evaluate: the result of the last stage, or model.checkpoint if there is no stage."""
    options: dict[str, Any] = {"kernels": job.model.kernels}
    if job.evaluate:
        options |= {name: getattr(job.evaluate, name) for name in ("template", "image_aspect_ratio", "allow_mismatch")}
    if job.train:
        return EvaluatedModel(model=locate_model(job, folder, list(job.train)[-1]), **options)
    return EvaluatedModel(model=str(job.model.checkpoint), methods=job.model.methods, **options)


def _read_evaluated(folder: Path) -> EvaluatedModel | None:
    """Read which model gave the answers in a folder, or find that of its last stage; None if there is none."""
    path = folder / ANSWERS_FOLDER / PROVENANCE_FILE
    provenance = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    job = yaml.safe_load((folder / JOB_FILE).read_text(encoding="utf-8"))
    stages = list_stage_models(job, folder) if isinstance(job, dict) else []
    models = [*stages[-1:], *([str(provenance["model"])] if "model" in provenance else [])]
    model_path = next((model for model in models if storage.exists(storage.join(model, CONFIG_FILE))), None)
    if model_path is None:
        return None
    return EvaluatedModel(
        model=model_path,
        template=provenance.get("template"),
        image_aspect_ratio=provenance.get("image_aspect_ratio"),
        allow_mismatch=True,
    )


def _describe_model(evaluated: EvaluatedModel | None) -> ReportedModel | None:
    """Describe a model for the report; None if it does not exist yet or cannot be read any more."""
    if evaluated is None:
        return None
    try:
        # A local folder that training has not made yet; a hub id or a URL is read.
        if Path(evaluated.model).is_absolute() and not (Path(evaluated.model) / CONFIG_FILE).exists():
            return None
        if not answering.is_llava(evaluated.model):
            return ReportedModel(path=evaluated.model)
        config = configure_checkpoint(evaluated.model, **evaluated.methods)
    except (OSError, TypeError, ValueError):
        return None
    return ReportedModel(
        path=evaluated.model, config=config, trace=functools.partial(evaluate.trace_compression, evaluated)
    )


def send_to_trackers(job: Job, folder: Path, scores: dict[str, float], report: WrittenReport) -> None:
    """Send the scores and some pictures to the trackers of a job."""
    try:
        group = trackers.TrackerGroup(
            job.trackers, folder, job.name, TRACKER_STAGE, 0, document.write_plain(job), print
        )
    except ValueError as error:  # The results are written, so a missing key of a tracker is not a failure
        print(error)
        return
    group.write(1, scores)
    for number, picture in enumerate(report.pictures, start=1):
        group.write_picture(1, f"{picture.task}/{number}", picture.image, picture.caption)
    group.close()
