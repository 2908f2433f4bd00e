"""`redux report`: it writes the page of any run folder again, finished or not, of this version or an earlier one."""

import json
from pathlib import Path

import pytest
import yaml

from jobs import schema
from tests.jobs.command_line import run_command

pytestmark = pytest.mark.integration

RECIPES = Path(__file__).parents[2] / "jobs/recipes"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Write a run that has answered questions of a user, and has no model any more."""
    folder = tmp_path / "runs" / "mine"
    (folder / "answers").mkdir(parents=True)
    questions = tmp_path / "mine.jsonl"
    questions.write_text(json.dumps({"question": "red?", "answer": "yes"}) + "\n")
    job = schema.load(
        RECIPES / "quickstart.yaml",
        ["name=mine", f"evaluate.tasks={{own: {{file: {questions}, metric: exact}}}}", "report.examples=3"],
    )
    (folder / "job.yaml").write_text(schema.dump(job))
    row = {"unit": "1", "prompt": "red?", "image": None, "answers": ["yes"], "type": "all", "metric": "exact"}
    lines = [json.dumps({"id": str(number), **row, "response": "yes"}) for number in range(9)]
    (folder / "answers/own.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def test_the_number_of_questions_is_that_of_the_job_or_of_the_command(run: Path) -> None:
    for words, shown in (([], 3), (["--examples", 5], 5), (["--examples", 0], 0)):
        written = run_command("report", run, *words)
        assert (written.code, written.out.strip()) == (0, str(run / "report.html")), written.err
        assert (run / "report.html").read_text().count("<article") == shown


def test_a_run_of_an_earlier_version_has_a_report(run: Path) -> None:
    job = yaml.safe_load((run / "job.yaml").read_text())
    (run / "job.yaml").write_text(yaml.safe_dump({**job, "workers": 2}))
    assert run_command("report", run).code == 0
    page = (run / "report.html").read_text()
    assert "own, accuracy" in page
    assert page.count("<article") == 9


def test_an_unfinished_job_and_one_that_only_evaluates_have_reports(run: Path) -> None:
    (run / "answers/own.jsonl").unlink()
    assert run_command("report", run).code == 0
    assert "not finished" in (run / "report.html").read_text()
    job = schema.load(
        RECIPES / "evaluate.yaml", ["name=asked", f"model.checkpoint={run}/gone", "evaluate.tasks={mme: {}}"]
    )
    (run / "job.yaml").write_text(schema.dump(job))
    assert run_command("report", run).code == 0


def test_other_folders_are_refused_in_a_line(tmp_path: Path) -> None:
    refused = run_command("report", tmp_path)
    assert refused.code == 2
    assert refused.err == f"redux: RUN: got {tmp_path}, which has no job.yaml, allowed: the folder of a run\n"
    (tmp_path / "study.yaml").touch()
    assert "redux tables compares the runs of a study" in run_command("report", tmp_path).err
