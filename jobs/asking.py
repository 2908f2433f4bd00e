"""The command that asks a finished run, with a question of its evaluation."""

from pathlib import Path

from jobs.layout import locate_tasks
from jobs.schema import Job
from pipelines.core import storage
from pipelines.evaluation import tasks
from pipelines.report.next_steps import SampleQuestion, write_ask_command


def describe_asking(job: Job, run: Path) -> str:
    """Describe in a line how to ask the model of a run."""
    return f"ask it: {write_ask_command(run, find_question(job, run) or SampleQuestion())}"


def find_question(job: Job, run: Path) -> SampleQuestion | None:
    """Find the first question of the evaluation whose image is a file."""
    for name, task in locate_tasks(job, run).items():
        try:
            questions = tasks.load_questions(name, task)
            folder = tasks.find_image_folder(name, task)
        except (OSError, ValueError):  # The files of the evaluation are no longer there
            continue
        for question in questions:
            if isinstance(question.image, str):
                # Benchmarks ask for a short answer in a second line.
                return SampleQuestion(storage.join(folder, question.image), question.prompt.strip().splitlines()[0])
    return None
