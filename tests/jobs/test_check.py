"""Tests of `redux check`: each planted fault has its line, and a clean job has none."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from jobs import model_parts
from pipelines.data import ingest, shard_writer
from pipelines.data.options import ShardOptions
from redux.conversation import IGNORE_INDEX
from tests.jobs.command_line import CommandResult, run_command
from tests.local_ray import run_in_process

COUNT = 40
COLOURS = ("red", "blue")
CUT_LENGTH = 150
"""Limit of tokens that cuts long answers."""


def make_record(name: str, number: int, image: str | None, rounds: int = 2) -> dict[str, Any]:
    """Make a record whose id is the name of its image."""
    turns = []
    for turn in range(rounds):
        question = f"Is there a {COLOURS[turn % 2]} shape?"
        turns += [("human", question), ("gpt", "yes" if (number + turn) % 2 else "no")]
    if image:
        turns[0] = ("human", f"<image>\n{turns[0][1]}")
    fields = {"image": image} if image else {}
    return {
        "id": f"{name}-{number:06d}",
        **fields,
        "conversations": [{"from": role, "value": text} for role, text in turns],
    }


@dataclass(frozen=True)
class Material:
    """Images of two sets in a folder, shards of sets, and a job that trains on them.

    Args:
        folder: folder with the images.
        parts: folders of the tower and the language model.
    """

    folder: Path
    parts: dict[str, str]

    def store(self, name: str, records: list[dict]) -> str:
        """Make shards of records, and return their folder."""
        out = self.folder / "shards" / name
        if not out.exists():
            with run_in_process():
                options = ShardOptions(samples_per_shard=20, max_bad_fraction=1)
                shard_writer.make_shards(records, str(self.folder), str(out), options)
        return str(out)

    def write_job(self, sets: dict[str, str], **changes: Any) -> Path:
        """Write a job with a stage of captions and a stage of conversations."""
        stage = {"objective": "language", "epochs": 1, "global_batch_size": 8, "micro_batch_size": 2}
        tree: dict[str, Any] = {
            "name": "small",
            "num_workers": 2,
            "data": {"source": None, "sets": sets},
            "model": {"tower": self.parts["tower"], "language": self.parts["language"]},
            "train": {
                "pretrain": {**stage, "data": "captions", "template": "plain", "learning_rate": {"projector": 1e-3}},
                "instruct": {
                    **stage,
                    "data": "chats",
                    "max_length": 200,
                    "learning_rate": {"projector": 1e-3, "language": 1e-3},
                },
            },
        }
        for key, value in changes.items():
            section: Any = tree
            *path, last = key.split("__")
            for part in path:
                section = section[part]
            section[last] = value
        file = self.folder / "job.yaml"
        file.write_text(yaml.safe_dump(tree, sort_keys=False))
        return file


@pytest.fixture(scope="module")
def material(parts: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Material:
    folder = tmp_path_factory.mktemp("material")
    noise = np.random.default_rng(0)
    for name in ("a", "b", "other"):
        (folder / name).mkdir()
        for number in range(COUNT):
            pixels = noise.integers(0, 256, (20, 28, 3), np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{name}-{number:06d}.png")
    return Material(folder, parts)


def list_records(name: str, images: str | None = None, rounds: int = 2) -> list[dict]:
    """List the records of a set; the images are those of another one if that is named."""
    images = images or name
    return [make_record(name, number, f"{images}/{images}-{number:06d}.png", rounds) for number in range(COUNT)]


@pytest.fixture(scope="module")
def sets(material: Material) -> dict[str, str]:
    """Folders of clean sets: captions of one round, and conversations."""
    texts = [make_record("text", number, None) for number in range(8)]
    return {
        "captions": material.store("captions", list_records("a", rounds=1)),
        "chats": material.store("chats", [*list_records("b"), *texts]),
    }


@pytest.fixture
def check(tmp_path: Path) -> Callable[..., CommandResult]:
    """Return a function that checks a job."""

    def run(job: Path, *words: object) -> CommandResult:
        return run_command("check", job, "--runs-dir", tmp_path, "--samples", 100, *words)

    return run


def write_questions(material: Material, name: str, records: list[dict]) -> dict[str, Any]:
    """Write the first questions of records as a task of the evaluation."""
    file = material.folder / f"{name}.jsonl"
    entries = [
        {
            "image": record.get("image"),
            "question": record["conversations"][0]["value"].removeprefix("<image>\n"),
            "answer": record["conversations"][1]["value"],
        }
        for record in records
    ]
    file.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return {"tasks": {name: {"file": str(file), "images": str(material.folder), "metric": "exact"}}}


def test_a_clean_job_has_no_problem(
    material: Material, sets: dict[str, str], check: Callable[..., CommandResult], tmp_path: Path
) -> None:
    evaluate = write_questions(material, "clean", list_records("other"))
    job = material.write_job(sets, evaluate=evaluate)
    checked = check(job, "--tokens-per-s", 1000, "--price", 2, "--gpu-memory", 1)
    assert (checked.code, checked.err) == (0, ""), checked.err
    lines = checked.out.splitlines()
    for expected in (
        "  captions: 40 samples, 40 drawn",
        "  chats: 48 samples, 48 drawn",
        "    text only    8 of 48",
        "no problems found",
    ):
        assert expected in lines
    assert "steps: 6 of 8 samples" in checked.out
    assert "at 2 per GPU-hour" in checked.out
    limit = "all 4 samples of a worker (global_batch_size / workers) fit into 1 GiB"
    assert checked.out.count(f"micro_batch_size: 2; {limit}") == 2
    assert (
        "overlap: 0 of 40 questions of clean are in chats (all samples compared, 40 of them also by thumbnails)"
        in lines
    )
    # Nothing was written.
    assert list(tmp_path.iterdir()) == []


def shift_labels(ids: np.ndarray, labels: np.ndarray) -> np.ndarray:
    return np.where(np.roll(labels != IGNORE_INDEX, 1), ids, IGNORE_INDEX)


def shift_twice(ids: np.ndarray, labels: np.ndarray) -> np.ndarray:
    return np.roll(labels, -1)


def lose_last_label(ids: np.ndarray, labels: np.ndarray) -> np.ndarray:
    last = np.flatnonzero(labels != IGNORE_INDEX)[-1]
    return np.where(np.arange(len(labels)) == last, IGNORE_INDEX, labels)


def shift_cut_ones(ids: np.ndarray, labels: np.ndarray) -> np.ndarray:
    is_cut = len(ids) == CUT_LENGTH
    return np.where(np.roll(labels != IGNORE_INDEX, -1), ids, IGNORE_INDEX) if is_cut else labels


def mask_all(ids: np.ndarray, labels: np.ndarray) -> np.ndarray:
    return np.full_like(labels, IGNORE_INDEX)


@pytest.mark.parametrize(
    ("fault", "line"),
    [
        (shift_labels, "train.instruct.data: chats: 48 of 48 samples: sample"),
        (shift_twice, "train.instruct.data: chats: 48 of 48 samples: sample"),
        (lose_last_label, "train.pretrain.data: captions: 40 of 40 samples: sample"),
        (mask_all, "no token has a label, allowed: at least one learned token in each sample"),
    ],
)
def test_faulty_labels(
    fault: Callable[..., np.ndarray],
    line: str,
    material: Material,
    sets: dict[str, str],
    check: Callable[..., CommandResult],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    encode = ingest.encode_conversation

    def encode_wrongly(*args: Any) -> tuple[np.ndarray, np.ndarray]:
        ids, labels = encode(*args)
        return ids, fault(ids, labels)

    monkeypatch.setattr(ingest, "encode_conversation", encode_wrongly)
    checked = check(material.write_job(sets))
    assert checked.code == 2
    assert line in checked.err
    assert all("train." in problem for problem in checked.err.splitlines())


def test_shifted_labels_of_samples_that_are_cut(
    material: Material,
    sets: dict[str, str],
    check: Callable[..., CommandResult],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    long = [make_record("text", number, None) for number in range(COUNT)]
    for record in long:
        record["conversations"][1]["value"] = " ".join(["yes one shape is red"] * 60)
    job = material.write_job({**sets, "chats": material.store("long", long)}, train__instruct__max_length=CUT_LENGTH)
    assert check(job).code == 0
    encode = ingest.encode_conversation

    def encode_wrongly(*args: Any) -> tuple[np.ndarray, np.ndarray]:
        ids, labels = encode(*args)
        return ids, shift_cut_ones(ids, labels)

    monkeypatch.setattr(ingest, "encode_conversation", encode_wrongly)
    checked = check(job)
    assert checked.code == 2
    assert "train.instruct.data: chats: 40 of 40 samples: sample" in checked.err
    assert "learned 'ASSISTANT: yes one shape" in checked.err


def test_image_tokens_other_than_the_towers(
    material: Material,
    sets: dict[str, str],
    check: Callable[..., CommandResult],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    measure = model_parts.measure_image
    monkeypatch.setattr(model_parts, "measure_image", lambda *args: (measure(*args)[0], measure(*args)[1] + 1))
    checked = check(material.write_job(sets))
    assert checked.code == 2
    assert "9 image tokens, the tower makes 8, allowed: as many image tokens as the tower makes" in checked.err


def test_answers_without_an_end_token(
    material: Material, sets: dict[str, str], check: Callable[..., CommandResult], tmp_path: Path
) -> None:
    # A tokenizer that takes "</s>" in a text apart.
    language = tmp_path / "language"
    language.mkdir()
    for file in Path(material.parts["language"]).iterdir():
        (language / file.name).write_bytes(file.read_bytes())
    settings = json.loads((language / "tokenizer_config.json").read_text())
    (language / "tokenizer_config.json").write_text(json.dumps({**settings, "split_special_tokens": True}))
    checked = check(material.write_job(sets, model__language=str(language)), "--runs-dir", tmp_path / "runs")
    assert checked.code == 2
    assert "chats: 48 of 48 samples" in checked.err
    assert "answers that end with the end token" in checked.err


def test_data_faults_are_listed_together(
    material: Material, sets: dict[str, str], check: Callable[..., CommandResult]
) -> None:
    """Wrong template, images of another set, evaluation questions in the training set, too short, too large."""
    marked = list_records("b")
    for record in marked:
        record["conversations"][0]["value"] = f"<image>\nUSER: {record['conversations'][0]['value'][8:]} ASSISTANT:"
    mixed = {
        **sets,
        "marked": material.store("marked", marked),
        "swapped": material.store("swapped", list_records("b", images="a")),
    }
    job = material.write_job(
        mixed,
        train__pretrain__data="chats",
        train__instruct__data={"marked": 1, "swapped": 1, "captions": 1},
        train__instruct__max_length=30,
        evaluate=write_questions(material, "seen", list_records("b")[:3]),
    )
    checked = check(job, "--gpu-memory", 0.0001)
    assert checked.code == 2
    problems = checked.err.splitlines()
    for expected in (
        "train.pretrain.template: got plain for chats, where 48 of 48 samples have several questions",
        "train.instruct.template: got vicuna_v1 for marked, where",
        "train.instruct.data: captions: 40 of 40 samples cannot be used (N tokens, cut off after N",
        "data.sets.swapped: the images of 40 of 40 records have the ids of records of captions",
        "evaluate.tasks.seen: 3 of its 3 questions are in the training set chats",
        "train.pretrain.micro_batch_size: got 2, which needs",
    ):
        assert any(expected in problem for problem in problems), (expected, problems)


@pytest.mark.parametrize(
    ("question", "answer", "mark"),
    [
        ("<｜User｜>{}", "{}<｜end▁of▁sentence｜>", "<｜User｜>"),
        ("{}<|end|>", "{}<|end|>", "<|end|>"),
        ("{}", "{}</s>", "</s>"),
        ("Human: {}\n\nAssistant:", "{}", "Human:"),
        ("{}<end_of_utterance>", "{}", "<end_of_utterance>"),
    ],
    ids=["deepseek", "phi", "vicuna's end", "roles", "idefics"],
)
def test_templates_of_other_models_in_some_turns(
    question: str, answer: str, mark: str, material: Material, sets: dict[str, str], check: Callable[..., CommandResult]
) -> None:
    records = list_records("b")
    for record in records[:4]:
        for number, turn in enumerate(record["conversations"]):
            tag, text = ("<image>\n", turn["value"][8:]) if number == 0 else ("", turn["value"])
            turn["value"] = tag + (answer if number % 2 else question).format(text)
    folder = material.store(f"marked-{len(question)}-{len(answer)}", records)
    checked = check(material.write_job({**sets, "chats": folder}))
    assert checked.code == 2
    [problem] = checked.err.splitlines()
    assert "train.instruct.template: got vicuna_v1 for chats, where 4 of 40 samples" in problem
    assert f"{mark!r} in the text of a turn" in problem


def test_images_that_some_records_exchanged(
    material: Material, sets: dict[str, str], check: Callable[..., CommandResult]
) -> None:
    def swap(count: int, name: str) -> CommandResult:
        records = list_records("b")
        images = [record["image"] for record in records[:count]]
        for record, image in zip(records[:count], [*images[1:], *images[:1]], strict=True):
            record["image"] = image
        return check(material.write_job({**sets, "chats": material.store(name, records)}))

    checked = swap(COUNT // 2, "half")
    assert checked.code == 2
    assert "data.sets.chats: 20 of 40 records have the image of another record, 20 their own one" in checked.err
    # Two records may be a coincidence.
    assert swap(2, "two").code == 0


def test_parts_and_copies_of_images_belong_to_their_records(
    material: Material, sets: dict[str, str], check: Callable[..., CommandResult]
) -> None:
    """Names of crops contain the id; other records have ids of their own, and images that have their own records."""
    records = list_records("b")
    for number, record in enumerate(records):
        if number % 4 == 1:
            record["id"], record["image"] = f"b-{number - 1:06d}", f"b/b-{number - 1:06d}.png"
            record["conversations"][1]["value"] = f"yes {number}"
        if number % 4 == 2:
            record["id"] = f"question-{number}"
    assert check(material.write_job({**sets, "chats": material.store("copies", records)})).code == 0


def test_missing_files_of_all_kinds_are_listed_together(
    material: Material, sets: dict[str, str], check: Callable[..., CommandResult], tmp_path: Path
) -> None:
    records = tmp_path / "records.json"
    records.write_text(json.dumps(list_records("a")))
    locked = tmp_path / "file"
    locked.write_text("no folder")
    job = material.write_job(
        {**sets, "captions": str(tmp_path / "nothing"), "made": str(tmp_path / "made")},
        data__make={"made": {"source": str(records), "images": str(tmp_path)}},
        checkpoints=str(locked / "checkpoints"),
        evaluate={"tasks": {"own": {"file": str(tmp_path / "none.jsonl"), "metric": "exact"}}},
    )
    checked = check(job, f"--runs-dir={tmp_path / 'runs'}")
    assert checked.code == 2
    problems = checked.err.splitlines()
    for expected in (
        "data.sets.captions: ",
        "data.make.made.images: 40 of 40 images are not in",
        f"{locked}/checkpoints/small: cannot be written",
        "evaluate.tasks.own.file: ",
    ):
        assert any(expected in problem for problem in problems), (expected, problems)
    # The other stage was checked all the same.
    assert "  chats: 48 samples, 48 drawn" in checked.out


def test_all_mistakes_of_the_file_are_listed(
    material: Material, sets: dict[str, str], check: Callable[..., CommandResult]
) -> None:
    checked = check(material.write_job(sets, num_workers="two", seed=-1))
    assert checked.code == 2
    assert len(checked.err.splitlines()) == 2


def test_a_missing_checkpoint_of_an_evaluation_has_its_key(
    material: Material, check: Callable[..., CommandResult], tmp_path: Path
) -> None:
    tree = {
        "name": "asked",
        "data": {"source": None},
        "model": {"checkpoint": str(tmp_path / "none")},
        "evaluate": write_questions(material, "any", list_records("b")),
    }
    job = tmp_path / "asked.yaml"
    job.write_text(yaml.safe_dump(tree))
    checked = check(job, f"--runs-dir={tmp_path / 'runs'}")
    assert checked.code == 2
    [problem] = checked.err.splitlines()
    assert problem.startswith(f"redux: model.checkpoint: got {tmp_path / 'none'}, allowed: ")
