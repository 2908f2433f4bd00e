"""Tests of repairs and of the explanation of rejected records."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pipelines.data.options import ShardOptions
from pipelines.data.quarantine import REASON_ADVICE, QuarantineError
from pipelines.data.records import RECORD_REASONS, find_rejection
from pipelines.data.repairs import find_repair
from pipelines.data.shard_index import REPAIRED_FILE, Shards
from pipelines.data.shard_writer import make_shards
from pipelines.data.tars import TAR_REASONS

SYSTEM, ASK, SAY = ("system", "Be brief."), ("human", "<image>\nQ?"), ("gpt", "A.")
MORE = ("human", "And?")


def record_of(*turns: tuple[str, str], image: str | None = "a.jpg") -> dict[str, Any]:
    named = {"image": image} if image else {}
    return {**named, "conversations": [{"from": role, "value": value} for role, value in turns]}


@pytest.mark.parametrize(
    ("turns", "repaired", "description"),
    [
        ([ASK, SAY, MORE], [ASK, SAY], "leaves out the last turn, a question without an answer"),
        ([SAY, ASK, SAY], [ASK, SAY], "leaves out the first turn, of gpt"),
        ([SYSTEM, SAY, ASK, SAY], [SYSTEM, ASK, SAY], "leaves out the first turn, of gpt"),
        ([("human", "Q?"), SAY], [ASK, SAY], "puts <image> before the first question"),
        ([SYSTEM, ("human", "Q?"), SAY], [SYSTEM, ASK, SAY], "puts <image> before the first question"),
        ([("human", "<|image|>\nQ?"), SAY], [ASK, SAY], "replaces <|image|> by <image>"),
        ([("human", "<Image>\nQ?"), SAY], [ASK, SAY], "replaces <Image> by <image>"),
        ([ASK, SAY, ("human", "<image>\nAnd?"), SAY], [ASK, SAY, MORE, SAY],
         "keeps <image> in the first question alone"),
        ([ASK, SAY, MORE, ("gpt", " ")], [ASK, SAY], "leaves out the last round, which has an empty answer"),
        ([("human", "Q?"), SAY, MORE], [ASK, SAY],
         "leaves out the last turn, a question without an answer; puts <image> before the first question"),
    ],
)  # fmt: skip
def test_a_certain_repair_changes_nothing_else(
    turns: list[tuple[str, str]], repaired: list[tuple[str, str]], description: str
) -> None:
    record = {"id": "x", **record_of(*turns)}
    before = json.dumps(record)
    rejection = find_rejection(record, None)
    assert rejection
    repair = find_repair(record, rejection, None)
    assert repair == ({"id": "x", **record_of(*repaired)}, description)
    assert json.dumps(record) == before


@pytest.mark.parametrize(
    "record",
    [
        record_of(ASK, SAY, image=None),
        record_of(ASK, ("human", "And?"), SAY),
        record_of(ASK, ("gpt", "")),
        record_of(ASK, SAY, ("human", "<image> and <image>?"), SAY),
        record_of(ASK, SAY, ("human", "Q?"), SAY, ("human", "<image>?"), SAY),
        record_of(ASK, ("gpt", "a \ud83d")),
        record_of(("human", "<image_1> and <image_2>"), SAY),
        record_of(("human", "<video>\nQ?"), SAY),
        {**record_of(ASK, SAY), "image": ["a.jpg"]},
        {"id": "a"},
        "text",
        record_of(SAY, ASK, SAY, MORE),  # The roles may be exchanged
        record_of(MORE),
        record_of(SAY),
    ],
    ids=ascii,
)
def test_what_could_be_repaired_in_two_ways_is_not(record: Any) -> None:
    rejection = find_rejection(record, None)
    assert rejection
    assert find_repair(record, rejection, None) is None


def make_records(folder: Path) -> list[Any]:
    sink = io.BytesIO()
    Image.new("RGB", (8, 8)).save(sink, "PNG")
    (folder / "a.jpg").write_bytes(sink.getvalue())
    good = record_of(ASK, SAY)
    return [
        {"id": "0", **good},
        {"id": "1", **record_of(("human", "Q?"), SAY)},
        {"id": "2", **record_of(ASK, SAY, MORE)},
        {"id": "0", **good},
        *({"id": str(number), **record_of(("human", f"{number}?"), SAY)} for number in range(4, 8)),
        {"id": "8", **record_of(ASK, SAY, image="b.jpg")},
    ]


@pytest.mark.usefixtures("local_ray_data")
def test_fix_stores_repaired_records_and_lists_them(tmp_path: Path) -> None:
    records = make_records(tmp_path)
    out = tmp_path / "out"
    with pytest.raises(QuarantineError, match="8 of 9 records cannot be used") as error:
        make_shards(records, str(tmp_path), str(out), ShardOptions(samples_per_shard=4))
    assert not (out / REPAIRED_FILE).exists()
    lines = error.value.rejections.explain()
    assert lines[0] == f"         5 image without tag: {RECORD_REASONS['image without tag']}"
    assert lines[1] == "           record 1 (1): conversations[0].value: got Q?"
    assert len([line for line in lines if line.startswith("           record")]) == 3 + 3
    assert lines[4:6] == [
        f"           what to do: {REASON_ADVICE['image without tag']}",
        "           --fix repairs 5 of them: it puts <image> before the first question",
    ]
    assert "           record 8 (8): image: got b.jpg" in lines
    # Copies and the missing image stay out; copies are not counted as bad.
    options = ShardOptions(samples_per_shard=4, fix=True, max_bad_fraction=0.12)
    summary = make_shards(records, str(tmp_path), str(tmp_path / "fixed"), options)
    assert summary["samples"] == 7
    assert summary["repaired"] == {"image without tag": 5, "turn order": 1}
    assert summary["quarantined"] == {"duplicate": 1, "missing image": 1}
    listed = [json.loads(line) for line in (tmp_path / "fixed" / REPAIRED_FILE).read_text().splitlines()]
    assert [entry["number"] for entry in listed] == [1, 2, 4, 5, 6, 7]
    assert listed[1]["record"] == {"id": "2", **record_of(ASK, SAY)}
    assert listed[1]["repair"] == "leaves out the last turn, a question without an answer"
    stored = Shards(tmp_path / "fixed")
    samples = {int(sample.key): sample.record for sample in stored.read_samples(range(len(stored)))}
    assert {entry["number"]: entry["record"] for entry in listed}.items() <= samples.items()
    assert samples[0] == records[0]
    # The same command leaves the set as it is; without --fix it is another set.
    assert make_shards(records, str(tmp_path), str(tmp_path / "fixed"), options) == summary
    with pytest.raises(ValueError, match="contains shards of other records or settings"):
        make_shards(records, str(tmp_path), str(tmp_path / "fixed"), ShardOptions(samples_per_shard=4))


@pytest.mark.usefixtures("local_ray_data")
@pytest.mark.parametrize(
    ("folder", "path", "hint"),
    [
        ("images/coco", "coco/train/a.jpg", "train/a.jpg exists: the path has coco/ too much for this folder"),
        (
            "images/coco",
            "/data/coco/train/a.jpg",
            "train/a.jpg exists: the path has data/coco/ too much for this folder",
        ),
        ("images", "train/a.jpg", "it exists in coco/: choose that folder"),
        ("images", "train/b.jpg", ""),
    ],
)
def test_an_image_a_level_higher_or_lower_is_found(tmp_path: Path, folder: str, path: str, hint: str) -> None:
    (tmp_path / "images/coco/train").mkdir(parents=True)
    (tmp_path / "images/coco/train/a.jpg").write_bytes(b"x")
    record = record_of(ASK, SAY, image=path)
    with pytest.raises(QuarantineError) as error:
        make_shards([record], str(tmp_path / folder), str(tmp_path / "out"), ShardOptions())
    lines = error.value.rejections.explain()
    assert lines[1] == f"           record 0: image: got {path}" + (f": {hint}" if hint else "")


def test_each_reason_has_an_advice() -> None:
    assert REASON_ADVICE.keys() == RECORD_REASONS.keys() | TAR_REASONS.keys()
