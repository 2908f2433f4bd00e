"""Tests of unusable samples: each is replaced by the same sample of its source and reported; all others stay.

A set without usable samples is an error, and so is a store that does not respond.
"""

import errno
import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipelines.core import storage
from pipelines.core.storage import Retry
from pipelines.data import tars
from pipelines.data.consumed import verify_coverage
from pipelines.data.index_file import INDEX_SCHEMA, write_index
from pipelines.data.ingest import Reader, iterate_micro_batches, make_conversation_encoder, make_dataset
from pipelines.data.options import ShardOptions
from pipelines.data.order import Order
from pipelines.data.shard_index import Shards
from pipelines.data.shard_writer import make_shards
from redux.conversation import TEMPLATES

SIDE = 16
GLOBAL_BATCH = 8
STEPS = 9
FLIPPED, BROKEN, REMOVED, CUT, LONG = 2, 3, range(5, 10), range(12, 15), 23
"""What is wrong with which samples: one byte; the image file; their tar; the rest of their tar; the conversation."""
BAD = {FLIPPED, BROKEN, *REMOVED, *CUT, LONG}


@pytest.fixture(scope="module")
def valid_set(
    in_process: Callable[[], AbstractContextManager[None]],
    records: list[dict],
    pictures: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Shards:
    """30 samples in shards of 5. One is longer than the tokenizer's maximum."""
    given = [{**records[number % 22], "id": number} for number in range(30)]
    turns = given[LONG]["conversations"]
    given[LONG]["conversations"] = turns + turns[-2:] * 40
    folder = tmp_path_factory.mktemp("valid_set")
    with in_process():
        make_shards(given, str(pictures), str(folder), ShardOptions(samples_per_shard=5))
    return Shards(folder)


@pytest.fixture(scope="module")
def small_set(
    in_process: Callable[[], AbstractContextManager[None]], valid_set: Shards, pictures: Path, tmp_path_factory: Any
) -> Shards:
    """13 of the samples in one shard. Number 6 is the long one."""
    folder = tmp_path_factory.mktemp("small_set")
    with in_process():
        records = [sample.record for sample in valid_set.read_samples(range(LONG - 6, 30))]
        make_shards(records, str(pictures), str(folder), ShardOptions())
    return Shards(folder)


@pytest.fixture(scope="module")
def damaged_set(valid_set: Shards, tmp_path_factory: pytest.TempPathFactory) -> Shards:
    """A copy in which the BAD samples are unusable."""
    folder = tmp_path_factory.mktemp("damaged_set") / "set"
    shutil.copytree(valid_set.folder, folder)
    truncate_images(folder, Shards(folder), [BROKEN])
    damage(folder, FLIPPED)
    (folder / valid_set.shard_names[1]).unlink()
    (row,) = valid_set.read_rows([CUT[0]])
    tar = folder / row["shard"]
    tar.write_bytes(tar.read_bytes()[: row["offset"] + 700])
    return Shards(folder)


def damage(folder: Path, number: int) -> None:
    """Flip a byte in the middle of the sample."""
    (row,) = Shards(folder).read_rows([number])
    data = bytearray((folder / row["shard"]).read_bytes())
    data[row["offset"] + row["length"] // 2] ^= 255
    (folder / row["shard"]).write_bytes(data)


def truncate_images(folder: Path, shards: Shards, numbers: Sequence[int]) -> None:
    """Truncate the samples' images in their tars, with an index that matches the damaged bytes."""
    rows, words = shards.read_rows(range(len(shards))), shards.word_counts.tolist()
    for number in numbers:
        row = rows[number]
        data = bytearray((folder / row["shard"]).read_bytes())
        start = row["offset"] + row["image_at"]
        data[start + 45 : start + row["image_size"]] = bytes(row["image_size"] - 45)
        (folder / row["shard"]).write_bytes(data)
    again = [row for name in shards.shard_names for row in index_all(folder / name)]
    said = [{**row, "words": count} for row, count in zip(again, words, strict=True)]
    write_index(str(folder), pa.Table.from_pylist(said, INDEX_SCHEMA))


def index_all(file: Path) -> list[dict[str, Any]]:
    """Make index rows of all samples of a tar, including rejected ones."""
    data = file.read_bytes()
    tar = tars.read_tar(data, file.name)
    for sample in tar.samples:
        sample.rejection_reason = None
    return tars.make_index_rows(tar, data, file.name)


def make_reader(tokenizer: Path, *sets: Shards) -> Reader:
    return Reader(
        sources={f"set {number}": shards for number, shards in enumerate(sets)},
        order=Order(samples=tuple(map(len, sets)), global_batch_size=GLOBAL_BATCH, seed=3),
        micro_batch_size=2,
        image_size=SIDE,
        tokenizer=tokenizer,
        encode=make_conversation_encoder(TEMPLATES["vicuna_bare"], 5),
    )


def flatten(batches: Sequence[dict[str, Any]]) -> tuple[list[tuple[int, int, bytes]], list[dict[str, Any]]]:
    """Return (source, used sample, its bytes in the batch) at each stream position, and the replacements."""
    rows, replaced = [], []
    for batch in batches:
        replaced += json.loads(batch["replaced"])
        columns = (batch[name] for name in ("source", "sample", "input_ids", "labels", "attention_mask"))
        for source, sample, ids, labels, mask, image in zip(*columns, batch["pixel_values"], strict=True):
            seen = b"".join(array.tobytes() for array in (ids[mask == 1], labels[mask == 1], image))
            rows.append((int(source), int(sample), seen))
    return rows, replaced


def whole(reader: Reader) -> tuple[list[tuple[int, int, bytes]], list[dict[str, Any]]]:
    """Flatten the first STEPS global batches."""
    return flatten([reader(number) for number in range(STEPS * GLOBAL_BATCH // reader.micro_batch_size)])


def test_bad_samples_are_replaced_and_named_and_others_are_as_before(
    valid_set: Shards, damaged_set: Shards, tokenizer: Path
):
    """Over two epochs, a replacement has the same bytes as where it is scheduled itself."""
    reader = make_reader(tokenizer, damaged_set)
    rows, replaced = whole(reader)
    due = np.concatenate([reader.order.get_batch(step)[1] for step in range(STEPS)]).tolist()
    assert {number for number in due if number in BAD} == BAD
    plain = replace(
        reader, sources={"set 0": valid_set}, order=replace(reader.order, shuffle="none"), micro_batch_size=1
    )
    seen = {number: flatten([plain(number)])[0][0][2] for number in range(len(valid_set)) if number != LONG}
    entries = {entry["position"]: entry for entry in replaced}
    assert len(entries) == len(replaced)
    assert [place for place, number in enumerate(due) if number in BAD] == [*entries]
    for place, (number, (_, sample, content)) in enumerate(zip(due, rows, strict=True)):
        assert content == seen[sample]
        if number in BAD:
            entry = entries[place]
            assert (entry["set"], entry["scheduled"], entry["used"]) == ("set 0", number, sample)
            assert sample not in BAD
        else:
            assert sample == number
    assert len({entry["used"] for entry in replaced}) > 5, "by chance, not always one"


@pytest.mark.parametrize(
    ("number", "why"),
    [
        (FLIPPED, "bytes differ from the index's checksum"),
        (BROKEN, "an image that Pillow cannot read: .*"),
        (REMOVED[1], "not found, .*"),
        (CUT[0], "bytes past its end were requested; .*"),
        (CUT[1], "bytes past its end were requested; .*"),
        (LONG, r"\d+ tokens, allowed: 96, .*"),
    ],
)
def test_the_reason_names_tar_and_sample(damaged_set: Shards, tokenizer: Path, number: int, why: str):
    _, replaced = whole(make_reader(tokenizer, damaged_set))
    [row] = damaged_set.read_rows([number])
    tar = f"{damaged_set.folder}/{row['shard']}"
    [reason] = {entry["reason"] for entry in replaced if entry["scheduled"] == number}
    assert re.fullmatch(f"{re.escape(tar)}: sample {row['key']}: {why}", reason)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (["what?", "a"], "image without tag"),
        (["<image>what?", "a", "<image>and?", "b"], "several tags"),
        (["<image>what?", ""], "empty turn"),
        (["<image>what?"], "turn order"),
        ([], "turn order"),
        (None, "wrong fields"),
    ],
)
def test_records_that_others_made_are_looked_at_when_they_are_read(
    pictures: Path, tokenizer: Path, tmp_path: Path, values: list[str] | None, reason: str
):
    """Otherwise images would be matched with texts of other samples, where images and tags disagree."""
    file = tmp_path / "a.tar"
    with tarfile.open(file, "w") as tar:
        for number in range(8):
            texts = values if number == 5 else ["<image>what?", "a"]
            turns = texts and [{"from": ("human", "gpt")[turn % 2], "value": text} for turn, text in enumerate(texts)]
            image = (pictures / f"{number}.png").read_bytes()
            for suffix, body in (("png", image), ("json", json.dumps({"conversations": turns}).encode())):
                member = tarfile.TarInfo(f"{number}.{suffix}")
                member.size = len(body)
                tar.addfile(member, io.BytesIO(body))
    rows = [{**row, "words": 2} for row in index_all(file)]
    write_index(str(tmp_path), pa.Table.from_pylist(rows, INDEX_SCHEMA))
    reader = replace(make_reader(tokenizer, Shards(tmp_path)), micro_batch_size=GLOBAL_BATCH)
    batch = reader(0)
    [entry] = json.loads(batch["replaced"])
    assert entry["scheduled"] == 5
    assert entry["reason"].startswith(f"{file}: sample 5: {reason}: ")
    assert len(batch["pixel_values"]) == GLOBAL_BATCH


@pytest.mark.parametrize("size", [1, 4, 8])
def test_replacements_do_not_depend_on_the_size_of_micro_batches(damaged_set: Shards, tokenizer: Path, size: int):
    reader = make_reader(tokenizer, damaged_set)
    assert whole(replace(reader, micro_batch_size=size)) == whole(reader)


def test_replacements_are_of_the_same_source(small_set: Shards, damaged_set: Shards, tokenizer: Path):
    """Both sets have bad samples, and the second has more."""
    rows, replaced = whole(make_reader(tokenizer, small_set, damaged_set))
    bad = {"set 0": {6}, "set 1": BAD}
    for entry in replaced:
        assert entry["scheduled"] in bad[entry["set"]]
        assert entry["used"] not in bad[entry["set"]]
        source, sample, _ = rows[entry["position"]]
        assert (f"set {source}", sample) == (entry["set"], entry["used"])
    assert {entry["set"] for entry in replaced} == {*bad}
    assert not any(sample in bad[f"set {source}"] for source, sample, _ in rows)
    seen = {row[:2]: row[2] for row in rows}
    assert all(seen[row[:2]] == row[2] for row in rows)
    assert all(
        seen.get((1, sample + 17), content) == content for (source, sample), content in seen.items() if not source
    )


@pytest.mark.parametrize(("start", "workers"), [(1, 1), (4, 2), (8, 4)])
def test_replacements_after_a_restart_are_those_from_the_start(
    in_process: Callable[[], AbstractContextManager[None]],
    small_set: Shards,
    damaged_set: Shards,
    tokenizer: Path,
    start: int,
    workers: int,
):
    first, turns = start * GLOBAL_BATCH, GLOBAL_BATCH // 2
    again = make_reader(tokenizer, Shards(small_set.folder), Shards(damaged_set.folder))
    with in_process():
        blocks = make_dataset(again, start * turns, STEPS * turns, workers)
    rows, replaced = flatten(sorted(iterate_micro_batches(blocks), key=lambda batch: batch["number"]))
    before, entries = whole(make_reader(tokenizer, small_set, damaged_set))
    assert rows == before[first:]
    assert replaced == [entry for entry in entries if entry["position"] >= first] != []


@pytest.mark.parametrize("why", ["not found", "an image that Pillow cannot read"])
def test_a_set_with_nothing_usable_is_one_error_that_names_folder_and_reason(
    valid_set: Shards, tokenizer: Path, tmp_path: Path, why: str
):
    folder = Path(shutil.copytree(valid_set.folder, tmp_path / "set"))
    if why == "not found":
        for name in valid_set.shard_names:
            (folder / name).unlink()
    else:
        truncate_images(folder, valid_set, range(len(valid_set)))
    with pytest.raises(ValueError, match=rf"^{folder}: sample \d+ and 19 replacements cannot be used: ") as caught:
        make_reader(tokenizer, Shards(folder))(0)
    assert re.search(rf"used: {folder}/00000\d\.tar: sample 0000000\d\d: {why}", str(caught.value))
    assert "\n" not in str(caught.value)
    assert caught.value.__context__ is None


def test_a_disk_that_does_not_answer_is_an_error(damaged_set: Shards, tokenizer: Path, monkeypatch: pytest.MonkeyPatch):
    """Any read may fail, including those of replacements."""
    read, reader = storage._LocalFiles.cat_file, make_reader(tokenizer, Shards(damaged_set.folder))
    expected, left = [reader(number) for number in range(8)], 0

    def cat_file(path: str, start: int = 0, end: int | None = None) -> bytes:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.EIO, "Input/output error", path)
        return read(path, start, end)

    monkeypatch.setattr(storage._LocalFiles, "cat_file", cat_file)
    for answers in range(16):
        left, got = answers, []
        with pytest.raises(OSError, match=f"Input/output error: '{damaged_set.folder}/00000"):
            got.extend(reader(number) for number in range(8))
        assert flatten(got) == flatten(expected[: len(got)])


@pytest.mark.parametrize("fault", ["SlowDown", "ExpiredToken"])
def test_a_bucket_that_does_not_answer_is_an_error(
    valid_set: Shards,
    tokenizer: Path,
    proxy: Any,
    bucket: str,
    fast: Retry,
    monkeypatch: pytest.MonkeyPatch,
    fault: str,
):
    monkeypatch.setattr(storage, "RETRY", replace(fast, tries=3))
    for name in storage.list_files(valid_set.folder):
        storage.write(storage.join(bucket, name), storage.read(storage.join(valid_set.folder, name)))
    reader = replace(make_reader(tokenizer, Shards(bucket)), micro_batch_size=1)
    assert reader(0)["replaced"] == "[]"
    proxy.always = fault
    with pytest.raises(OSError, match=f"^{bucket}/00000.*: given up after 3 tries"):
        reader(1)


# Gathered from real processes

RANK = """
import dataclasses, datetime, json, sys
import numpy as np
import torch
import torch.distributed as dist
from pipelines.data.consumed import gather_samples

folder, rank = sys.argv[1], int(sys.argv[2])
for world in (3, 2):
    if rank < world:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/meet{world}",
            rank=rank,
            world_size=world,
            timeout=datetime.timedelta(seconds=60),
        )
        with open(f"{folder}/given{world}.json") as file:
            steps = json.load(file)
        used = []
        for step in steps:
            mine = [{name: value if name == "replaced" else np.array(value) for name, value in one.items()}
                    for one in step[rank::world]]
            used.append(dataclasses.asdict(gather_samples(mine, ["set 0", "set 1"], torch.device("cpu"))))
        with open(f"{folder}/used{world}-{rank}.json", "w") as file:
            json.dump(used, file)
        dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def gathered(
    small_set: Shards, damaged_set: Shards, tokenizer: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[int, list[list[dict[str, Any]]]]:
    """ConsumedSamples of each worker and step, by number of workers. Each has two micro-batches of two."""
    folder = tmp_path_factory.mktemp("ranks")
    for world in (2, 3):
        reader = make_mixture(tokenizer, small_set, damaged_set, world)
        batches = [reader(number) for number in range(STEPS * 2 * world)]
        plain = [
            {**{name: batch[name].tolist() for name in ("position", "source", "sample")}, "replaced": batch["replaced"]}
            for batch in batches
        ]
        steps = [plain[first : first + 2 * world] for first in range(0, len(plain), 2 * world)]
        (folder / f"given{world}.json").write_text(json.dumps(steps))
    ranks = [subprocess.Popen([sys.executable, "-c", RANK, folder, str(rank)]) for rank in range(3)]
    assert [rank.wait() for rank in ranks] == [0] * 3
    return {
        world: [json.loads((folder / f"used{world}-{rank}.json").read_text()) for rank in range(world)]
        for world in (2, 3)
    }


def make_mixture(tokenizer: Path, small_set: Shards, damaged_set: Shards, world: int) -> Reader:
    reader = make_reader(tokenizer, small_set, damaged_set)
    return replace(reader, order=replace(reader.order, global_batch_size=4 * world))


@pytest.mark.integration
@pytest.mark.parametrize("world", [2, 3])
def test_every_rank_says_the_same_of_what_all_used(gathered: dict[int, list[list[dict[str, Any]]]], world: int):
    assert len(gathered[world]) == world
    assert all(one == gathered[world][0] for one in gathered[world])


@pytest.mark.integration
@pytest.mark.parametrize("world", [2, 3])
def test_what_all_ranks_used_is_the_global_batch_by_set_with_replaced_ones_in_their_places(
    gathered: dict[int, list[list[dict[str, Any]]]], small_set: Shards, damaged_set: Shards, tokenizer: Path, world: int
):
    reader = make_mixture(tokenizer, small_set, damaged_set, world)
    steps, replaced = gathered[world][0], 0
    for step, used in enumerate(steps):
        source, due = reader.order.get_batch(step)
        samples = {name: [*numbers] for name, numbers in used["samples"].items()}
        for entry in used["replaced"]:
            assert samples[entry["set"]][entry["index"]] == entry["used"] != entry["scheduled"]
            samples[entry["set"]][entry["index"]] = entry["scheduled"]
        assert samples == {f"set {one}": due[source == one].tolist() for one in range(2)}
        replaced += len(used["replaced"])
    assert replaced > 10
    log = [{"stage": "instruct", "step": step, **used} for step, used in enumerate(steps, start=1)]
    for name, shards in reader.sources.items():
        assert (
            verify_coverage([json.dumps(line).encode() + b"\n" for line in log], "consumed.jsonl", name, len(shards))[1]
            == []
        )
