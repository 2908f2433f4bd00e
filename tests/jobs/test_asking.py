"""A finished run prints the command that asks it, with a question of its evaluation; a shell reads the words back."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs import schema
from jobs.asking import describe_asking
from jobs.cli.arguments import EXAMPLE_JOB
from pipelines.data import easy_vqa
from pipelines.report.next_steps import SampleQuestion
from redux.benchmarks.custom import read_questions

ROOT = Path(__file__).parents[2]


def load_job(folder: Path, evaluate: Any) -> schema.Job:
    job = {**yaml.safe_load((ROOT / EXAMPLE_JOB).read_text()), "evaluate": evaluate}
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(job, sort_keys=False))
    return schema.load(path)


def list_words(job: schema.Job, run: Path) -> list[str]:
    return shlex.split(describe_asking(job, run).removeprefix("ask it: "))


def test_the_question_is_the_first_of_the_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    redux, ask, run, image, question = list_words(
        load_job(tmp_path, {"tasks": {"easy_vqa": {}}}), tmp_path / "runs" / "a"
    )
    first = easy_vqa.load_test_questions()[0]
    assert (redux, ask, run) == ("redux", "ask", "runs/a")
    assert image == f"{easy_vqa.PACKAGE_IMAGES}/{first.image}"
    assert Path(image).is_file()
    assert question == first.prompt


def test_odd_names_are_quoted(tmp_path: Path) -> None:
    questions = tmp_path / "it's mine.jsonl"
    entry = {"image": "a b.png", "question": "what's $this?\nAnswer in a word.", "answer": "x"}
    questions.write_text(json.dumps(entry) + "\n")
    assert read_questions(str(questions), "exact")[0].prompt == entry["question"]
    job = load_job(tmp_path, {"tasks": {"mine": {"file": str(questions), "metric": "exact"}}})
    assert list_words(job, Path("/runs/a"))[2:] == ["/runs/a", f"{tmp_path}/a b.png", "what's $this?"]


def test_a_run_without_questions_has_placeholders(tmp_path: Path) -> None:
    assert list_words(load_job(tmp_path, None), Path("/runs/a"))[2:] == ["/runs/a", *SampleQuestion()]
    missing = {"tasks": {"mine": {"file": str(tmp_path / "gone.jsonl"), "metric": "exact"}}}
    assert list_words(load_job(tmp_path, missing), Path("/runs/a"))[2:] == ["/runs/a", *SampleQuestion()]
