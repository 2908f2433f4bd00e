"""`redux init`: the dialog in a terminal, its explanations, and files that `redux run` accepts."""

import json
import os
import pty
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pytest
from PIL import Image

from jobs import schema
from jobs.first_job import InitAnswers, write_job
from jobs.init import DEFAULT_CHECKPOINT, Dialog, ask_all
from pipelines.training.stage import Lora
from redux.settings import CMAI, VMTC
from tests.jobs.command_line import run_command


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder with 12 records, one of them without its image, and 3 questions."""
    entries = [make_record(number) for number in range(12)]
    (tmp_path / "records.json").write_text(json.dumps(entries))
    (tmp_path / "images").mkdir()
    for number in range(11):
        Image.new("RGB", (8, 8)).save(tmp_path / "images" / f"{number}.png")
    questions = [{"image": f"{number}.png", "question": "is it?", "answer": "yes"} for number in range(3)]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    return tmp_path


def make_record(number: int) -> dict[str, Any]:
    turns = [{"from": "human", "value": "<image>\nis it?"}, {"from": "gpt", "value": "yes"}]
    return {"id": str(number), "image": f"{number}.png", "conversations": turns}


def write_and_load(answers: list[str], folder: Path) -> schema.Job:
    """Write the job of scripted answers, and load it."""
    lines: Iterator[str] = iter(answers)
    path = folder / "job.yaml"
    path.write_text(write_job(ask_all(Dialog(False, lambda prompt: next(lines)))))
    assert next(lines, None) is None, "every answer was asked for"
    return schema.load(path)


def test_defaults_without_a_gpu_are_the_small_model_on_easy_vqa(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.init.count_local_gpus", lambda: 0)
    written = run_command("init", tmp_path / "job.yaml", "--yes")
    assert written.code == 0, written.err
    commands = [line.split()[1] for line in written.out.splitlines() if line.startswith("    ")]
    assert commands == ["check", "run", "ask"]
    assert f"redux run {tmp_path / 'job.yaml'}" in written.out
    job = schema.load(tmp_path / "job.yaml")
    quickstart = schema.load(Path(__file__).parents[2] / "jobs/recipes/quickstart.yaml")
    assert list(job.train) == list(quickstart.train)
    assert [stage.learning_rate for stage in job.train.values()] == [
        stage.learning_rate for stage in quickstart.train.values()
    ]
    assert (job.model.vmtc, job.model.cmai) == (VMTC(ratio=0.5), CMAI())
    assert quickstart.evaluate
    assert job.evaluate == replace(quickstart.evaluate, tasks=quickstart.evaluation_tasks)


def test_own_records_questions_and_a_llava(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answers = [
        str(files / "records.json"), str(files / "images"), str(files / "questions.jsonl"), "exact", "4",
        "llava-hf/llava-1.5-7b-hf", "shapes",
    ]  # fmt: skip
    job = write_and_load(answers, files)
    assert "12 records, 12 of them checked: 1 rejected, 1 with missing image" in capsys.readouterr().out
    source = job.data.make["records"]
    assert (source.source, source.images) == (str(files / "records.json"), str(files / "images"))
    assert 1 / 12 <= source.max_bad_fraction < 0.1, "the record without an image does not stop the run"
    assert (job.name, job.num_workers, job.model.checkpoint) == ("shapes", 4, "llava-hf/llava-1.5-7b-hf")
    stage = job.train["instruct"]
    assert (stage.data, stage.lora, stage.precision) == ("records", Lora(), "bf16")
    assert stage.count_accumulation_steps(4) == 1
    assert job.evaluate
    task = job.evaluate.tasks["own"]
    assert (task.file, task.images, task.metric) == (
        str(files / "questions.jsonl"),
        str(files / "images"),
        "exact",
    )


def test_the_recipe_for_one_gpu_is_what_init_writes(tmp_path: Path) -> None:
    """Except the length of samples and the micro-batch, which a GPU of 24 GB limits."""
    answers = InitAnswers(
        name="one-gpu", data="records.json", images="images", num_records=50_000, gpus=1, model=DEFAULT_CHECKPOINT
    )
    (tmp_path / "job.yaml").write_text(write_job(answers))
    written = schema.load(
        tmp_path / "job.yaml", ["train.instruct.max_length=2048", "train.instruct.micro_batch_size=1"]
    )
    assert schema.load(Path(__file__).parents[2] / "jobs/recipes/one-gpu.yaml") == written


def test_data_in_a_bucket_keeps_its_url(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bucket = fsspec.filesystem("memory")
    bucket.put(str(files / "records.json"), "/bucket/records.json")
    bucket.put(str(files / "images"), "/bucket/images", recursive=True)
    job = write_and_load(["memory://bucket/records.json", "memory://bucket/images", "none", "0", "small", "m"], files)
    made = job.data.make["records"]
    assert (made.source, made.images) == ("memory://bucket/records.json", "memory://bucket/images")
    assert made.max_bad_fraction > 0
    assert "1 with missing image" in capsys.readouterr().out


def test_questions_may_have_images_of_their_own(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (files / "asked").mkdir()
    for number in range(3):
        (files / "images" / f"{number}.png").rename(files / "asked" / f"{number}.png")
    answers = [
        str(files / "records.json"), str(files / "images"), str(files / "questions.jsonl"), "exact",
        str(files / "images"), str(files / "asked"), "4", "llava-hf/llava-1.5-7b-hf", "shapes",
    ]  # fmt: skip
    job = write_and_load(answers, files)
    assert "images: 3 of 3 images are missing, allowed: the folder of all; the first: 0.png" in capsys.readouterr().out
    assert job.evaluate
    assert job.evaluate.tasks["own"].images == str(files / "asked")


@pytest.mark.parametrize("model", ["small", "7b", "13b", "openai/clip-vit-base-patch32 s3://bucket/language"])
@pytest.mark.parametrize("gpus", ["1", "3", "8"])
@pytest.mark.parametrize("data", ["easy-vqa", "own"])
def test_every_choice_gives_a_job_whose_batches_the_workers_share(
    files: Path, data: str, gpus: str, model: str
) -> None:
    own = [str(files / "records.json"), str(files / "images"), ""]
    job = write_and_load([*(own if data == "own" else ["easy-vqa"]), gpus, model, "run"], files)
    for stage in job.train.values():
        assert stage.count_accumulation_steps(int(gpus)) >= 1


def test_a_refused_default_is_not_offered_again(files: Path) -> None:
    """The images do not lie beside the records."""
    prompts: list[str] = []
    lines = iter([str(files / "records.json"), "", "", str(files / "images"), "", "0", "", "named"])

    def read(prompt: str) -> str:
        prompts.append(prompt)
        return next(lines)

    assert ask_all(Dialog(False, read)).images == str(files / "images")
    of_images = [prompt for prompt in prompts if prompt.startswith("Folder of the images")]
    assert of_images == [f"Folder of the images [{files}]: ", *(["Folder of the images: "] * 2)]


def test_the_suggested_name_has_no_run_folder(
    files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(files)
    for name in ("mine", "mine-2"):
        (files / "runs" / name).mkdir(parents=True)
    prompts: list[str] = []
    lines = iter([str(files / "records.json"), str(files / "images"), "", "0", "small", "mine", ""])

    def read(prompt: str) -> str:
        prompts.append(prompt)
        return next(lines)

    assert ask_all(Dialog(False, read)).name == "mine-3"
    assert prompts[-2:] == ["Name of the run [mine-3]: "] * 2
    assert "name: got mine, whose folder runs/mine exists" in capsys.readouterr().out


def test_wrong_answers_are_explained_and_asked_again(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, records = str(files), str(files / "records.json")
    (files / "broken.jsonl").write_text('{"image": "0.png"}\n')
    answers = [
        "nowhere", folder, str(files / "questions.jsonl"), str(files / "missing"), records,  # data
        "nowhere", folder, str(files / "images"),  # images
        "nowhere", str(files / "broken.jsonl"), str(files / "questions.jsonl"),  # questions
        "best", "vqa", "contains",  # metric
        "two", "-1", "0",  # GPUs
        "7b", "???", folder, "a/b c/d e/f", f"a/b {folder}", "small",  # model
        "../up", "run",  # name
    ]  # fmt: skip
    job = write_and_load(answers, files)
    assert job.name == "run"
    explained = re.findall(r"^  (.*)$", capsys.readouterr().out, re.M)
    # Seven answers are right; one line counts the records.
    assert len(explained) == len(answers) - 7 + 1
    assert [line for line in explained if "allowed" not in line and "checked: " not in line] == []


def test_an_existing_file_and_a_missing_terminal_are_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "job.yaml").write_text("name: kept\n")
    refused = run_command("init", tmp_path / "job.yaml", "--yes")
    assert (refused.code, refused.err) == (2, f"redux: {tmp_path / 'job.yaml'}: exists, allowed: a new file\n")
    assert (tmp_path / "job.yaml").read_text() == "name: kept\n"
    with open(os.devnull) as empty:
        monkeypatch.setattr(sys, "stdin", empty)
        piped = run_command("init", tmp_path / "new.yaml")
    assert piped.code == 2
    assert piped.err == (
        "redux: init: got an input that is not a terminal, allowed: a terminal, or --yes for all defaults\n"
    )
    assert not (tmp_path / "new.yaml").exists()


@pytest.mark.integration
def test_the_dialog_in_a_terminal(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(sys.executable, [sys.executable, "-m", "jobs.command", "init", str(path)])
    output = b""
    # Each answer is typed when its question is there.
    for question, answer in (
        (b"[easy-vqa]: ", b"nowhere\n"), (b"[easy-vqa]: ", b"\n"), (b"GPUs [", b"0\n"), (b"[small]: ", b"\n"),
        (b"[easy-vqa]: ", b"typed\n"),
    ):  # fmt: skip
        seen = len(output)
        while question not in output[seen:]:
            output += os.read(terminal, 4096)
        os.write(terminal, answer)
    while part := read_terminal(terminal):
        output += part
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, output
    assert b"nowhere: does not exist, allowed: easy-vqa" in output
    assert f"redux run {path}".encode() in output
    assert schema.load(path).name == "typed"


def read_terminal(terminal: int) -> bytes:
    """Read from a terminal; b"" after its program has ended."""
    try:
        return os.read(terminal, 4096)
    except OSError:
        return b""
