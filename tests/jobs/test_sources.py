"""Tests of data in other forms than shards: named in a job, and on the command line."""

import contextlib
import io
import json
from pathlib import Path

import pytest
from PIL import Image

from jobs import schema
from jobs.layout import locate_sets
from jobs.resolve import resolve_job
from pipelines.core import cluster
from pipelines.data.options import SetSource
from pipelines.data.shard_index import Shards
from tests.jobs.command_line import run_command

FOLDER = Path(__file__).parents[2] / "jobs" / "recipes"


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    """A file of messages; one of them names an image that does not exist."""
    sink = io.BytesIO()
    Image.new("RGB", (8, 8)).save(sink, "PNG")
    (tmp_path / "photos").mkdir()
    for number in range(4):
        (tmp_path / "photos" / f"{number}.png").write_bytes(sink.getvalue())
    rows = []
    for number in range(5):
        image = {"type": "image", "path": f"photos/{number}.png"}
        question = {"role": "user", "content": [image, {"type": "text", "text": f"Which number, {number}?"}]}
        rows.append({"messages": [question, {"role": "assistant", "content": str(number)}]})
    rows[3]["messages"].append({"role": "user", "content": "And then?"})
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def _local(local_ray_data: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make shards in this process, without Ray."""
    monkeypatch.setattr(cluster, "open_session", contextlib.nullcontext)


@pytest.mark.usefixtures("_local")
def test_make_explains_rejected_records_and_fix_repairs_them(chats: Path, tmp_path: Path) -> None:
    make = ("shards", "make", "--source", chats)
    refused = run_command(*make, "--out", tmp_path / "a")
    assert refused.code == 2
    assert len(refused.err.strip().splitlines()[-1:]) == 1
    assert "2 of 5 records cannot be used (1 missing image, 1 turn order), allowed: 0.00%" in refused.err
    assert "record 4 (chats.jsonl: line 5): messages[0].content[0]: got photos/4.png" in refused.out
    assert "what to do: check --images: the path must exist below it" in refused.out
    assert "--fix repairs 1 of them: it leaves out the last turn, a question without an answer" in refused.out
    kept = run_command(*make, "--out", tmp_path / "b", "--fix", "--max-bad-fraction", "0.2")
    assert (kept.code, "4 of 5 records kept" in kept.out, "1 repaired, turn order" in kept.out) == (0, True, True)
    assert "1 missing image" in kept.out
    assert len(Shards(tmp_path / "b")) == 4


@pytest.mark.usefixtures("_local")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--columns", "what=x"), "--columns: got what, allowed: conversations, question"),
        (("--columns", "x"), "got x, allowed: COLUMN=NAME"),
    ],
)
def test_a_wrong_column_map_is_refused(chats: Path, tmp_path: Path, options: tuple[str, ...], message: str) -> None:
    ended = run_command("shards", "make", "--source", chats, "--out", tmp_path / "a", *options)
    assert ended.code == 2
    assert message in ended.err


@pytest.mark.usefixtures("_local")
def test_the_former_option_names_its_successor(chats: Path, tmp_path: Path) -> None:
    ended = run_command("shards", "make", "--json", chats, "--out", tmp_path / "a")
    assert ended.code == 2
    assert "--source" in ended.err


def load_job(*overrides: str) -> schema.Job:
    return schema.load(FOLDER / "quickstart.yaml", ["data.source=null", "evaluate=null", *overrides])


def use_set(name: str) -> list[str]:
    stages = schema.load(FOLDER / "quickstart.yaml").train
    return [f"train.{stage}.data={name}" for stage in stages]


def test_a_set_may_be_a_file_of_another_form(chats: Path, tmp_path: Path) -> None:
    job = load_job(f"data.sets.mine={chats}", *use_set("mine"))
    run = tmp_path / "run"
    resolved = resolve_job(job, run)
    assert resolved.data.make == {"mine": SetSource(source=str(chats))}
    assert locate_sets(resolved, run) == resolved.data.sets == {"mine": str(run / "shards" / "mine")}
    # The resolved job is a job, and resolves to itself.
    (tmp_path / "job.yaml").write_text(schema.dump(resolved))
    assert resolve_job(schema.load(tmp_path / "job.yaml"), run) == resolved


def test_a_set_that_the_job_makes_needs_no_folder(chats: Path, tmp_path: Path) -> None:
    make = f"data.make.mine={{source: {chats}, images: {tmp_path}, fix: true, columns: {{image: photo}}}}"
    job = load_job(make, *use_set("mine"))
    resolved = resolve_job(job, tmp_path / "run")
    assert resolved.data.sets == {"mine": str(tmp_path / "run" / "shards" / "mine")}
    assert resolved.data.make["mine"] == SetSource(
        source=str(chats), images=str(tmp_path), fix=True, columns={"image": "photo"}
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "data.sets.mine=FOLDER/none",
            "data.sets.mine: no shards here, index.arrow is missing; .*/none: does not exist",
        ),
        ("data.make.mine={source: FOLDER/none}", "data.make.mine.source: .*/none: does not exist, allowed: a JSON"),
        ("data.make.mine={json: a}", "data.make.mine.json: this key is now source"),
        (
            "data.make.mine={source: a, columns: {what: b}}",
            "data.make.mine.columns.what: key 'what', allowed",
        ),
    ],
)
def test_a_set_of_no_form_is_refused(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve_job(load_job(override.replace("FOLDER", str(tmp_path)), *use_set("mine")), tmp_path / "run")
