"""The command that asks a finished run, with a question of its evaluation."""

import os
import shlex
from pathlib import Path

from jobs.schema import Job
from pipelines.core import storage
from pipelines.evaluation import tasks

PLACEHOLDERS = ("photo.jpg", "What is in the image?")
"""Image and question if the run has no evaluation with image files."""


def describe_asking(job: Job, run: Path) -> str:
    """Describe in a line how to ask the model of a run."""
    words = [_shorten_path(run), *(find_question(job) or PLACEHOLDERS)]
    return f"ask it: redux ask {shlex.join(words)}"


def find_question(job: Job) -> tuple[str, str] | None:
    """Find the first question of the evaluation whose image is a file: (path or URL of the image, question)."""
    for name, task in job.evaluate.tasks.items() if job.evaluate else ():
        try:
            questions = tasks.load_questions(name, task)
            folder = tasks.find_image_folder(name, task)
        except (OSError, ValueError):  # the files of the evaluation are no longer there
            continue
        for question in questions:
            if isinstance(question.image, str):
                # benchmarks ask for a short answer in a second line
                return storage.join(folder, question.image), question.prompt.strip().splitlines()[0]
    return None


def _shorten_path(path: Path) -> str:
    """Return a path relative to the working directory if it lies in it."""
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)
