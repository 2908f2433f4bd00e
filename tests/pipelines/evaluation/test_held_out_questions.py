"""Held-out samples become the questions that the same records would be as a user's file."""

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from pipelines.data import shard_writer
from pipelines.data.held_out import select_held_out
from pipelines.data.options import ShardOptions
from pipelines.data.shard_index import Shards
from pipelines.evaluation.held_out_questions import write_held_out_questions
from pipelines.evaluation.tasks import TaskSettings, load_questions
from redux.benchmarks import Question

InProcess = Callable[[], AbstractContextManager[None]]


def load(file: Path, **changes: Any) -> list[Question]:
    return load_questions("mine", TaskSettings(**{"file": str(file), "metric": "contains", **changes}))


def test_the_questions_are_those_of_the_records_and_the_images_are_as_stored(
    stored: Shards, records: list[dict], pictures: Path, tmp_path: Path
) -> None:
    file = tmp_path / "run" / "questions.jsonl"
    write_held_out_questions(stored.folder, 0.4, "set", file)
    held_out = select_held_out(22, 0.4, "set").tolist()
    (tmp_path / "records.json").write_text(json.dumps([records[number] for number in held_out]))
    expected = load(tmp_path / "records.json", images=str(pictures))
    found = load(file)
    assert [question.id for question in found] == list(map(str, held_out))
    assert len(held_out) == 9
    for question, same in zip(found, expected, strict=True):
        assert question.prompt == same.prompt
        assert "<image>" not in question.prompt
        assert question.reference["answers"] == same.reference["answers"] == ["yes"]
        assert (file.parent / str(question.image)).read_bytes() == (pictures / str(same.image)).read_bytes()
    # Another call writes the same, and leaves nothing of another share.
    before = {path.name: path.read_bytes() for path in file.parent.iterdir()}
    write_held_out_questions(stored.folder, 0.8, "set", file)
    assert len(load(file)) == 18
    write_held_out_questions(stored.folder, 0.4, "set", file)
    assert {path.name: path.read_bytes() for path in file.parent.iterdir()} == before


def test_samples_that_are_no_questions_are_left_out(
    in_process: InProcess, records: list[dict], pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ten samples are held out: one has no words, one no image, one damaged bytes, and two the same image."""
    held_out = select_held_out(20, 0.5, "odd").tolist()
    odd = [dict(record) for record in records[:20]]
    caption, text, damaged, first, second, *_ = held_out
    odd[caption]["conversations"] = make_turns("<image>", "a red shape")
    odd[text] = {"conversations": make_turns("is red a colour?", "yes"), "type": "colours"}
    odd[second]["image"] = odd[first]["image"]
    url = str(tmp_path / "odd")
    with in_process():
        shard_writer.make_shards(odd, str(pictures), url, ShardOptions(samples_per_shard=20))
    [row] = Shards(url).read_rows([damaged])
    with (tmp_path / "odd" / row["shard"]).open("r+b") as tar:
        tar.seek(row["offset"] + row["image_at"])
        tar.write(b"?")
    file = tmp_path / "questions.jsonl" / "questions.jsonl"
    write_held_out_questions(url, 0.5, "odd", file)
    questions = load(file)
    assert [int(question.id) for question in questions] == [text, first, second, *held_out[5:]]
    assert "odd: 2 of 10 held-out samples have no question in words, or cannot be used" in capsys.readouterr().out
    assert questions[0].image is None
    assert questions[0].reference["type"] == "colours"
    assert questions[1].unit == questions[2].unit, "questions about one image are one unit"
    assert len({question.unit for question in questions}) == 7


def test_a_set_without_questions_is_refused(in_process: InProcess, pictures: Path, tmp_path: Path) -> None:
    captions = [
        {"image": f"{number}.png", "conversations": make_turns("<image>", f"shape {number}")} for number in range(4)
    ]
    url, file = str(tmp_path / "captions"), tmp_path / "questions" / "questions.jsonl"
    with in_process():
        shard_writer.make_shards(captions, str(pictures), url, ShardOptions())
    with pytest.raises(ValueError, match="got no question among the 2 held-out samples of captions, allowed: "):
        write_held_out_questions(url, 0.5, "captions", file)
    assert not file.exists()


def make_turns(question: str, answer: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
