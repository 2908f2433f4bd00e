"""Commands that a user may want after a run, with the paths and names of this run."""

import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

MAX_QUESTION_LENGTH = 100


class NextStep(NamedTuple):
    """A command and its purpose."""

    purpose: str
    command: str


class SampleQuestion(NamedTuple):
    """A question about an image.

    Args:
        image: path or URL of the image.
        question: the question.
    """

    image: str = "photo.jpg"
    question: str = "What is in the image?"


def list_next_steps(
    run: Path,
    job: Mapping[str, Any],
    model: str | None,
    is_finished: bool,
    has_cmai: bool,
    has_method: bool,
    sample: SampleQuestion | None,
) -> list[NextStep]:
    """List the commands.

    Args:
        run: run folder.
        job: content of its job file.
        model: folder, hub id or URL of the model that was trained or evaluated; None if there is none yet.
        is_finished: the run is finished.
        has_cmai: the model inhibits attention.
        has_method: the model has VMTC, CMAI or another reduction.
        sample: a question about an image on this machine.
    """
    folder = shorten_path(run)
    steps = []
    if not is_finished:
        command = _join("redux", "run", f"{folder}/job.yaml", "--runs-dir", shorten_path(run.resolve().parent))
        steps.append(NextStep("Continue this run", command))
    # A model can be used before the run is finished.
    if model:
        sample = sample or SampleQuestion()
        steps += [
            NextStep("Ask one question about an image", write_ask_command(run, sample)),
            NextStep("Talk with the model in the terminal", _join("redux", "chat", folder, sample.image)),
            _serve_step(folder, has_method),
        ]
        # A job that only evaluates has no model of its own to export.
        if job.get("train"):
            export = _join("redux", "export", folder, "--to", "hf")
            steps.append(NextStep("Write a model folder for transformers, with a model card", export))
    if is_finished and job.get("evaluate"):
        if has_cmai and model:
            steps.append(NextStep("Evaluate it with CMAI off", _write_evaluation(run, job, model)))
        steps.append(
            NextStep(
                "Compare it with the other runs in its folder",
                _join("redux", "tables", shorten_path(run.resolve().parent), "--out", "tables"),
            )
        )
    steps.append(
        NextStep("Render this page again, with more questions", _join("redux", "report", folder, "--examples", "100"))
    )
    return steps


def _serve_step(folder: str, has_method: bool) -> NextStep:
    if not has_method:
        return NextStep("Serve it over HTTP, with a demo page", _join("redux", "serve", folder))
    title = "Serve it over HTTP, with a demo page that also shows the answers of plain LLaVA"
    return NextStep(title, _join("redux", "serve", folder, "--compare"))


def write_ask_command(run: Path, sample: SampleQuestion) -> str:
    """Write the command that asks the model of a run."""
    return _join("redux", "ask", shorten_path(run), *sample)


def _write_evaluation(run: Path, job: Mapping[str, Any], model: str) -> str:
    """Write the command that evaluates the model of a run without CMAI."""
    name = f"name={job.get('name', run.name)}-cmai-off"
    overrides = ["model.cmai=null"]
    if job.get("train"):
        overrides = ["train={}", f"model={{checkpoint: {shorten_path(model)}, cmai: null}}"]
    return _join(
        "redux", "run", f"{shorten_path(run)}/job.yaml", name, *overrides,
        "--runs-dir", shorten_path(run.resolve().parent),
    )  # fmt: skip


def shorten_path(path: str | Path) -> str:
    """Write an absolute path relative to the working folder if it lies inside; all else stays as it is."""
    text = str(path)
    return os.path.relpath(text) if Path(text).is_relative_to(Path.cwd()) else text


def make_sample(image: str, question: str) -> SampleQuestion | None:
    """Make a sample for a command; None if the image is not on this machine or the question is long."""
    is_short = len(question) <= MAX_QUESTION_LENGTH and question.isprintable()
    return SampleQuestion(image, question) if is_short and Path(image).is_file() else None


def _join(*words: str) -> str:
    return shlex.join(words)
