"""Tasks of held-out samples in jobs: their defaults, their errors, and a run that asks them."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from jobs import schema, study
from jobs.layout import locate_tasks
from pipelines.data.held_out import select_held_out
from tests.jobs import chatty
from tests.jobs.command_line import run_command

QUICKSTART = Path(__file__).parents[2] / "jobs" / "recipes" / "quickstart.yaml"

MIXTURE = "train.instruct.data={conversations: 1, my.set: 1}"
SETS = "data.sets={my.set: /data/mine, unused: /data/unused}"


def load(*overrides: str) -> schema.Job:
    return schema.load(QUICKSTART, overrides)


def list_tasks(job: schema.Job) -> dict[str, tuple[str | None, str | None]]:
    return {name: (task.held_out, task.metric) for name, task in job.evaluation_tasks.items()}


def test_without_names_the_held_out_samples_of_the_last_stage_are_asked() -> None:
    held_out = ["data.hold_out=0.1", "evaluate={}", SETS, MIXTURE]
    expected = {
        "held_out_conversations": ("conversations", "contains"),
        "held_out_my-2e-set": ("my.set", "contains"),
    }
    assert list_tasks(load(*held_out)) == expected
    assert list_tasks(load(*held_out[1:])) == {"easy_vqa": (None, None)}
    assert list_tasks(load(*held_out, "evaluate={tasks: {easy_vqa: {}}}")) == {"easy_vqa": (None, None)}
    assert list_tasks(load(*held_out, "evaluate=null")) == {}


@pytest.mark.parametrize("stages", [["tower", "pretrain"], ["tower", "pretrain", "instruct"]])
def test_trials_after_shared_stages_are_asked_what_the_whole_job_is(stages: list[str]) -> None:
    whole = load("data.hold_out=0.1", "evaluate={batch_size: 8}")
    tree = {name: value for name, value in yaml.safe_load(schema.dump(whole)).items() if name != "name"}
    trial = study.build_job(study.continue_from(tree, stages, whole, Path("/shared")), {}, "trial", "job")
    assert list_tasks(trial) == list_tasks(whole) == {"held_out_conversations": ("conversations", "contains")}
    assert trial.data.sets["conversations"] == "/shared/shards/conversations"
    assert trial.evaluate
    assert trial.evaluate.batch_size == 8


def test_the_questions_are_located_in_the_run_folder() -> None:
    task = "{held_out: conversations, metric: anls, limit: 3}"
    job = load("data.hold_out=0.1", f"evaluate.tasks={{mine: {task}, easy_vqa: {{}}}}")
    found = locate_tasks(job, Path("/runs/a"))
    assert (found["mine"].file, found["mine"].metric, found["mine"].limit) == (
        "/runs/a/held_out/mine/questions.jsonl", "anls", 3,
    )  # fmt: skip
    assert found["easy_vqa"] == job.evaluation_tasks["easy_vqa"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "got conversations with data.hold_out: 0, allowed: a share above 0"),
        (
            ["data.hold_out=0.1", "evaluate.tasks.mine.held_out=formats"],
            "got formats, allowed: sets of a stage or of data.sets: captions, conversations",
        ),
    ],
)
def test_a_set_without_held_out_samples_is_refused(overrides: list[str], message: str) -> None:
    task = "evaluate.tasks={mine: {held_out: conversations, metric: exact}}"
    with pytest.raises(ValueError, match=re.escape(f"evaluate.tasks.mine.held_out: {message}")):
        load(task, *overrides)


@pytest.mark.usefixtures("ray_cluster")
def test_a_run_asks_the_held_out_samples_and_shows_them(tmp_path: Path) -> None:
    chatty.save_model(tmp_path / "m")
    records = []
    for number in range(10):
        Image.new("RGB", (8, 8), (25 * number, 0, 0)).save(tmp_path / f"{number}.png")
        turns = [{"from": "human", "value": f"<image>\nIs {number} red?"}, {"from": "gpt", "value": "yes"}]
        records.append({"image": f"{number}.png", "conversations": turns})
    (tmp_path / "records.json").write_text(json.dumps(records))
    job: dict[str, Any] = {
        "name": "asks",
        "data": {
            "source": None,
            "hold_out": 0.3,
            "sets": {"mine": str(tmp_path / "shards")},
            "make": {"mine": {"source": str(tmp_path / "records.json"), "images": str(tmp_path)}},
        },
        "model": {"checkpoint": str(tmp_path / "m")},
        "evaluate": {"tasks": {"chats": {"held_out": "mine", "metric": "contains", "max_new_tokens": 3}}},
        "trackers": [],
    }
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    words = ["run", tmp_path / "job.yaml", "--runs-dir", tmp_path / "runs"]
    result = run_command(*words)
    assert result.code == 0, result.err
    run = tmp_path / "runs" / "asks"
    rows = [json.loads(line) for line in (run / "answers" / "chats.jsonl").read_text().splitlines()]
    held_out = select_held_out(10, 0.3, "mine").tolist()
    assert [row["prompt"] for row in rows] == [f"Is {number} red?" for number in held_out]
    assert json.loads((run / "scores.json").read_text())["chats.questions"] == 3
    # The page shows the images of these questions, and the command asks the first.
    assert (run / "report.html").read_text().count("data:image") >= 3
    [command] = [line for line in result.out.splitlines() if line.startswith("ask it: ")]
    *_, image, question = shlex.split(command)
    assert question == rows[0]["prompt"]
    assert Path(image).read_bytes() == (tmp_path / f"{held_out[0]}.png").read_bytes()
    # The job in the run folder is the same job, and nothing is left to do.
    again = run_command("run", run / "job.yaml", "--runs-dir", tmp_path / "runs")
    assert (again.code, "asks is finished" in again.out) == (0, True), again.err
    assert "starting Ray" not in again.out
    # Another share asks other samples, and no answer is of another question.
    refused = run_command(*words, "data.hold_out=0.5")
    assert refused.code == 2
    assert "data.hold_out" in refused.err
