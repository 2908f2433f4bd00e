"""Tests of shards: WebDataset reads them, and the index finds every sample or names the error."""

import hashlib
import io
import itertools
import json
import pickle
import re
import shutil
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pytest
import webdataset
from PIL import Image

from pipelines.core import storage
from pipelines.data import index_file
from pipelines.data.index_file import INDEX_FILE, INDEX_SCHEMA, write_blocks, write_index
from pipelines.data.options import ShardOptions
from pipelines.data.records import RECORD_REASONS
from pipelines.data.shard_index import QUARANTINE_FILE, SUMMARY_FILE, Shards, read_summary
from pipelines.data.shard_writer import make_shards, to_ipc_bytes
from redux.image import load_pixels


def tars(stored: Shards) -> list[Path]:
    return sorted(Path(stored.folder).glob("*.tar"))


def rows(shards: Shards) -> list[dict[str, Any]]:
    return shards.read_rows(range(len(shards)))


def keys(shards: Shards) -> list[str]:
    return [row["key"] for row in rows(shards)]


def files(records: list[dict], pictures: Path) -> list[bytes]:
    return [(pictures / record["image"]).read_bytes() for record in records]


@pytest.fixture
def copy(stored: Shards, tmp_path: Path) -> Shards:
    """A copy of the set that a test may change."""
    return Shards(shutil.copytree(stored.folder, tmp_path / "copy"))


def test_webdataset_reads_every_sample_with_its_image_and_record(stored: Shards, records: list[dict], pictures: Path):
    read = list(webdataset.WebDataset([str(tar) for tar in tars(stored)], shardshuffle=False))
    assert [sample["__key__"] for sample in read] == [f"{number:09d}" for number in range(len(records))] == keys(stored)
    numbers = range(len(stored))
    for sample, ours, image, record in zip(
        read, stored.read_samples(numbers), files(records, pictures), records, strict=True
    ):
        assert sample["png"] == ours.image == image
        assert json.loads(sample["json"]) == ours.record == record
        assert ours.id == record["id"]


def test_ray_data_reads_every_sample_with_its_image_and_record(ray_cluster: Any, stored: Shards):
    rows = ray_cluster.data.read_webdataset([str(tar) for tar in tars(stored)], decoder=None).take_all()
    ours = {sample.key: sample for sample in stored.read_samples(range(len(stored)))}
    assert sorted(row["__key__"] for row in rows) == sorted(ours)
    for row in rows:
        assert row["png"] == ours[row["__key__"]].image
        assert json.loads(row["json"]) == ours[row["__key__"]].record


def test_samples_come_in_the_order_in_which_they_are_asked_for(stored: Shards, records: list[dict], pictures: Path):
    asked = np.random.default_rng(0).integers(0, len(records), 60)
    for number, sample in zip(asked, stored.read_samples(asked), strict=True):
        assert sample.id == records[number]["id"]
        assert sample.image == (pictures / records[number]["image"]).read_bytes()
        assert sample.record["conversations"] == records[number]["conversations"]
    assert stored.read_samples([]) == []


def test_shards_hold_as_many_samples_as_asked_and_the_last_one_the_rest(stored: Shards):
    held = [(name, len(list(group))) for name, group in itertools.groupby(row["shard"] for row in rows(stored))]
    assert held == list(zip(stored.shard_names, stored.shard_sizes, strict=True))
    assert held == [(f"{number:06d}.tar", 5) for number in range(4)] + [("000004.tar", 2)]
    assert [tar.name for tar in tars(stored)] == [name for name, _ in held]


def test_the_byte_ranges_of_the_index_are_whole_tar_members_and_leave_nothing_out(stored: Shards):
    for path in tars(stored):
        with tarfile.open(path) as tar:
            members = tar.getmembers()
        ends = [*(member.offset for member in members[1:]), members[-1].offset_data + -(-members[-1].size // 512) * 512]
        for place, row in enumerate(row for row in rows(stored) if row["shard"] == path.name):
            pair = members[2 * place : 2 * place + 2]
            assert {member.name for member in pair} == {f"{row['key']}.{suffix}" for suffix in ("png", "json")}
            assert row["offset"] == pair[0].offset
            assert row["offset"] + row["length"] == ends[2 * place + 1]
        assert not path.read_bytes()[ends[-1] :].strip(b"\0"), "nothing but the end of the archive"


@pytest.mark.parametrize("place", [0.0, 0.3, 0.6, 0.99])
def test_a_flipped_bit_anywhere_in_a_sample_is_an_error_that_names_tar_and_sample(copy: Shards, place: float):
    for number in (0, 7, 21):
        (row,) = copy.read_rows([number])
        path = Path(copy.folder) / row["shard"]
        whole = path.read_bytes()
        damaged = bytearray(whole)
        damaged[row["offset"] + int(row["length"] * place)] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=re.escape(f"{path}: sample {row['key']}: ")):
            copy.read_samples([number])
        others = [other for other in range(len(copy)) if other != number]
        assert [sample.key for sample in copy.read_samples(others)] == [row["key"] for row in copy.read_rows(others)]
        path.write_bytes(whole)


def test_a_tar_that_was_cut_short_is_an_error_that_names_the_tar(copy: Shards):
    (row,) = copy.read_rows([4])
    path = Path(copy.folder) / row["shard"]
    path.write_bytes(path.read_bytes()[: row["offset"] + 700])
    with pytest.raises(ValueError, match=re.escape(f"{path}: ") + ".*the file ends at"):
        copy.read_samples([4])
    assert copy.read_samples([3])[0].key == copy.read_rows([3])[0]["key"]


@pytest.mark.usefixtures("ray_cluster")
def test_shards_made_on_ray_have_the_bytes_of_those_made_in_one_process(
    stored: Shards, records: list[dict], pictures: Path, tmp_path: Path
):
    make_shards(records, str(pictures), str(tmp_path), ShardOptions(samples_per_shard=5))
    for tar in tars(stored):
        assert (tmp_path / tar.name).read_bytes() == tar.read_bytes()
    assert Shards(tmp_path).fingerprint == stored.fingerprint


def test_an_image_is_an_image_whatever_its_file_is_called(
    in_process: Callable[[], AbstractContextManager[None]], records: list[dict], pictures: Path, tmp_path: Path
):
    """A member .json would be the record, .pkl is never read, and .txt is not an image."""
    given = []
    for number, name in enumerate(["a.json", "b.pkl", "c.txt", "d.e.f", "g"]):
        (tmp_path / name).write_bytes((pictures / records[number]["image"]).read_bytes())
        given.append({**records[number], "image": name})
    with in_process():
        make_shards(given, str(tmp_path), str(tmp_path / "out"), ShardOptions())
    stored = Shards(tmp_path / "out").read_samples(range(5))
    assert [sample.image for sample in stored] == [(tmp_path / record["image"]).read_bytes() for record in given]
    assert [sample.record for sample in stored] == given


def test_a_member_has_the_suffix_of_its_images_format(
    in_process: Callable[[], AbstractContextManager[None]], records: list[dict], pictures: Path, tmp_path: Path
):
    for name in ("a.jpg", "b.JPEG", "c.txt"):
        (tmp_path / name).write_bytes((pictures / records[0]["image"]).read_bytes())
    given = [{**records[0], "image": name} for name in ("a.jpg", "b.JPEG", "c.txt")]
    with in_process():
        make_shards(given, str(tmp_path), str(tmp_path / "out"), ShardOptions())
    with tarfile.open(tmp_path / "out" / "000000.tar") as tar:
        assert [Path(name).suffix for name in tar.getnames() if not name.endswith(".json")] == [".png"] * 3


def test_records_that_all_fail_alike_are_of_another_form(
    in_process: Callable[[], AbstractContextManager[None]], records: list[dict], pictures: Path, tmp_path: Path
):
    turns = [{"from": "user", "value": "<image>"}, {"from": "assistant", "value": "A."}]
    given = [{**record, "conversations": turns} for record in records]
    with (
        in_process(),
        pytest.raises(
            ValueError, match=r'the form of the file is wrong.*got user: turns must alternate between "human'
        ),
    ):
        make_shards(given, str(pictures), str(tmp_path), ShardOptions())


def test_odd_values_leave_a_list_that_is_json_in_utf8(
    in_process: Callable[[], AbstractContextManager[None]], records: list[dict], pictures: Path, tmp_path: Path
):
    ids = ["\ud83d", 10**1000, float("nan"), {"a": ["\udc00"]}, "x" * 1000, None, True, 7]
    given = [{**records[0], "id": name, "image": "none\ud83d.png"} for name in ids]
    kept = [{**records[0], "id": name, "more\ud83d": float("inf")} for name in ids]
    with in_process():
        summary = make_shards([*given, *kept], str(pictures), str(tmp_path), ShardOptions(max_bad_fraction=0.5))
    assert (summary["samples"], summary["quarantined"]) == (len(ids), {"broken text": len(ids)})
    for line in (tmp_path / QUARANTINE_FILE).read_text("utf-8").splitlines():
        entry = json.loads(line, parse_constant=lambda name: pytest.fail(name))
        assert (entry["field"], entry["value"]) == ("image", "none\\ud83d.png")
        assert len(line) < 1000
    assert all(sample.id.encode() for sample in Shards(tmp_path).read_samples(range(len(ids))))


def test_files_that_are_no_shards_are_not_overwritten(
    in_process: Callable[[], AbstractContextManager[None]], records: list[dict], pictures: Path, tmp_path: Path
):
    for name, data in (("000000.tar", b"mine"), (SUMMARY_FILE, b"mine"), (SUMMARY_FILE, b"{}")):
        out = tmp_path / f"{name}{len(data)}"
        out.mkdir()
        (out / name).write_bytes(data)
        with in_process(), pytest.raises(ValueError, match=re.escape(str(out)) + ".*allowed: a"):
            make_shards(records, str(pictures), str(out), ShardOptions())
        assert {path.name: path.read_bytes() for path in out.iterdir()} == {name: data}


def test_a_summary_of_an_older_version_is_read_by_its_current_names(tmp_path: Path):
    assert read_summary(str(tmp_path)) is None
    former = {"asked": {"size": 32, "fit": "crop", "words": None}, "records": 3, "kept": 2, "quarantined": {"tags": 1}}
    (tmp_path / SUMMARY_FILE).write_text(json.dumps(former))
    settings = {"image_size": 32, "image_aspect_ratio": "crop", "max_words": None}
    assert read_summary(str(tmp_path)) == {
        "settings": settings, "records": 3, "samples": 2, "quarantined": {"tags": 1},
    }  # fmt: skip


def test_a_folder_without_an_index_is_no_set(tmp_path: Path):
    with pytest.raises(ValueError, match=f"{tmp_path}: no shards here, {INDEX_FILE} is missing"):
        Shards(tmp_path)


def test_the_index_says_of_each_sample_its_words_and_whether_it_has_an_image(stored: Shards, records: list[dict]):
    said = [" ".join(turn["value"] for turn in record["conversations"]) for record in records]
    assert stored.word_counts.tolist() == [len(text.replace("<image>", "").split()) for text in said]
    assert stored.has_image.tolist() == [True] * len(records)
    assert [stored.word_counts.dtype, stored.has_image.dtype, stored.shard_sizes.dtype] == [np.int32, bool, np.int64]


@pytest.mark.parametrize("number", [-1, 22])
def test_a_number_of_no_sample_is_an_error(stored: Shards, number: int):
    with pytest.raises(IndexError, match=f"got sample {number}, allowed: 0 to 21"):
        stored.read_samples([0, number])


def encode_index(rows: pa.Table) -> bytes:
    sink = io.BytesIO()
    write_blocks(sink, rows)
    return sink.getvalue()


def table(samples: int, each: int = 1000, word: int = 1) -> pa.Table:
    """Make an index of samples that do not exist."""
    number = np.arange(samples)
    shards = [f"{shard:06d}.tar" for shard in range(-(-samples // each))]
    columns = {
        "key": pa.array(number).cast(pa.large_string()),
        "shard": pa.DictionaryArray.from_arrays((number // each).astype(np.int32), shards),
        "offset": number % each * 1024,
        "length": np.full(samples, 1024),
        "sha256": pa.FixedSizeBinaryArray.from_buffers(
            pa.binary(32), samples, [None, pa.py_buffer(bytes(32) * samples)]
        ),
        "record_at": np.full(samples, 512),
        "record_size": np.full(samples, 512),
        "image_at": np.full(samples, 512),
        "image_size": (number % 3 > 0) * 512,
        "words": np.full(samples, word, np.int32),
    }
    return pa.table(columns, INDEX_SCHEMA)


def test_rows_are_those_that_were_written(tmp_path: Path):
    parts = [table(5), table(0), table(7)]
    parts[2] = parts[2].set_column(
        1, "shard", pa.array(["b.tar"] * 4 + ["c.tar"] * 3, INDEX_SCHEMA.field("shard").type)
    )
    write_index(str(tmp_path), pa.concat_tables(parts))
    shards = Shards(tmp_path)
    shards.validate()
    assert rows(shards) == [row for part in parts for row in part.to_pylist()]
    assert (shards.shard_names, shards.shard_sizes.tolist()) == (["000000.tar", "b.tar", "c.tar"], [5, 4, 3])
    assert shards.read_rows([7, 2]) == [rows(shards)[7], rows(shards)[2]]


@pytest.mark.parametrize("sizes", [[], [0], [1], [5, 0, 700, 1, 256], [300] * 4])
def test_an_index_from_parts_is_that_of_all_rows(tmp_path: Path, sizes: list[int]):
    """Bit for bit, since checkpoints have its fingerprint."""
    whole = table(sum(sizes), each=300)
    starts = np.cumsum([0, *sizes])
    parts = [whole.slice(start, size) for start, size in zip(starts, sizes, strict=False)]
    with index_file.IndexBuilder() as index:
        for number, part in enumerate(parts):
            # A slice has the whole dictionary; the part of a shard has its own name alone.
            own = pa.Table.from_pylist(part.to_pylist(), INDEX_SCHEMA)
            index.add(own if number % 2 else part)
        assert index.num_rows == len(whole)
        index.write(str(tmp_path))
    assert (tmp_path / INDEX_FILE).read_bytes() == encode_index(whole)
    assert rows(Shards(tmp_path)) == whole.to_pylist()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells a process's own memory there")
def test_memory_does_not_grow_with_the_set_that_is_made(tmp_path: Path):
    """Digests and rows of 300,000 records go to scratch files; in memory they took 0.5 kB each."""
    part = tmp_path / "part.arrow"
    part.write_bytes(to_ipc_bytes(table(1000)))
    program = f"""
import hashlib, re
from pathlib import Path
from pyarrow import ipc
from pipelines.data.digest_set import DigestSet
from pipelines.data.index_file import IndexBuilder
def own():
    return 1024 * int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
part = ipc.open_file({str(part)!r}).read_all()
def make(parts):
    with DigestSet() as seen, IndexBuilder() as index:
        for number in range(1000 * parts):
            assert seen.add(hashlib.md5(b"%d" % number).digest())
            if number % 1000 == 0:
                index.add(part)
        index.write({str(tmp_path)!r})
make(10)
before = own()
make(300)
print(own() - before)"""
    grown = int(subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, check=True).stdout)
    assert grown < 10e6 < 30e6 < (tmp_path / INDEX_FILE).stat().st_size


def test_a_set_without_samples_is_a_set(tmp_path: Path):
    write_index(str(tmp_path), table(0))
    shards = Shards(tmp_path)
    shards.validate()
    assert (len(shards), shards.shard_sizes.tolist(), shards.word_counts.tolist(), shards.read_samples([])) == (
        0,
        [],
        [],
        [],
    )


def test_shards_travel_as_the_name_of_their_folder(tmp_path: Path):
    write_index(str(tmp_path), table(100_000))
    shards = Shards(tmp_path)
    travelled = pickle.dumps(shards)
    assert len(travelled) < 400 + len(str(tmp_path))
    arrived = pickle.loads(travelled)
    assert (len(arrived), arrived.folder, arrived.fingerprint) == (len(shards), shards.folder, shards.fingerprint)
    assert arrived.read_rows([99_999]) == shards.read_rows([99_999])


def test_a_replaced_index_is_read_by_shards_constructed_later(tmp_path: Path):
    write_index(str(tmp_path), table(10))
    before = Shards(tmp_path)
    write_index(str(tmp_path), table(10, word=2))
    after = pickle.loads(pickle.dumps(Shards(tmp_path)))
    assert (before.word_counts.max(), after.word_counts.max()) == (1, 2)
    assert before.fingerprint != after.fingerprint


@pytest.mark.integration
def test_an_index_that_was_replaced_before_a_task_opens_it_is_an_error(tmp_path: Path):
    write_index(str(tmp_path), table(10))
    travelled = pickle.dumps(Shards(tmp_path))
    write_index(str(tmp_path), table(11))
    program = f"import pickle; pickle.loads({travelled!r}).word_counts"
    ended = subprocess.run([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True)
    assert f"ValueError: {tmp_path}: {INDEX_FILE} has 11 samples now, it had 10" in ended.stderr


@pytest.mark.integration
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells a process's own memory there")
def test_a_process_that_looks_up_few_samples_does_not_hold_the_index(tmp_path: Path):
    """Pages of a mapped file belong to the page cache, so the private memory of the process is measured."""
    write_index(str(tmp_path), table(1_000_000))
    program = f"""
import re
from pathlib import Path
import pandas  # pyarrow loads it on first use
from pipelines.data.shard_index import Shards
def own():
    return 1024 * int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
before = own()
shards = Shards({str(tmp_path)!r})
assert [row["key"] for row in shards.read_rows([999_999, 5])] == ["999999", "5"]
assert shards.shard_sizes.tolist() == [1000] * 1000 and shards.read_rows([999_998])[0]["words"] == 1
print(own() - before)"""
    grown = int(subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, check=True).stdout)
    assert grown < 5e6 < 50e6 < (tmp_path / INDEX_FILE).stat().st_size


def test_a_set_in_a_bucket_is_read_as_a_local_one(stored: Shards, monkeypatch: pytest.MonkeyPatch):
    memory = fsspec.filesystem("memory")
    memory.put(stored.folder, "/bucket/set", recursive=True)
    monkeypatch.setattr(storage, "MAX_BLOCK_BYTES", 1000)  # the index takes several ranges
    try:
        shards = Shards("memory://bucket/set")
        assert shards.fingerprint == stored.fingerprint
        assert shards.read_samples([21, 0]) == stored.read_samples([21, 0])
        assert shards.word_counts.tolist() == stored.word_counts.tolist()
        memory.rm(f"/bucket/set/{INDEX_FILE}")
        assert shards.read_rows([3]) == stored.read_rows([3]), "a block of the index is read once"
        with pytest.raises(ValueError, match="memory://bucket/set: no shards here"):
            Shards("memory://bucket/set")
    finally:
        memory.rm("/bucket", recursive=True)


@pytest.fixture
def bucket_index() -> Iterator[Callable[[bytes], str]]:
    """Function that writes an index into a bucket in memory, and returns the URL of its set."""
    memory = fsspec.filesystem("memory")

    def write(data: bytes) -> str:
        memory.pipe(f"/bucket/{INDEX_FILE}", data)
        return "memory://bucket"

    yield write
    memory.rm("/bucket", recursive=True)


def test_a_row_of_an_index_in_a_bucket_takes_the_footer_and_one_block(
    bucket_index: Callable[[bytes], str], monkeypatch: pytest.MonkeyPatch
):
    data = encode_index(table(100_000))
    shards = Shards(bucket_index(data))
    asked, read = [], storage.read_ranges

    def counted(ranges: Sequence[storage.ByteRange]) -> list[bytes]:
        asked.extend(ranges)
        return read(ranges)

    monkeypatch.setattr(storage, "read_ranges", counted)
    assert [row["key"] for row in Shards(shards.folder).read_rows([77_777, 77_778])] == ["77777", "77778"]
    assert len(asked) == 2
    assert sum(stop - start for _, start, stop in asked) < 100_000 < len(data) / 100


def test_blocks_that_were_not_used_lately_are_read_again(
    bucket_index: Callable[[bytes], str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(index_file, "MAX_CACHED_BLOCKS", 2)
    shards, asked, read = Shards(bucket_index(encode_index(table(2000)))), list[int](), storage.read_ranges

    def counted(ranges: Sequence[storage.ByteRange]) -> list[bytes]:
        asked.append(len(ranges))
        return read(ranges)

    monkeypatch.setattr(storage, "read_ranges", counted)
    for number in (0, 300, 1, 600, 2, 301):  # blocks 0, 1, 0, 2, 0, 1
        assert shards.read_rows([number])[0]["key"] == str(number)
    assert asked == [1, 1, 1, 1]  # blocks 0, 1, 2, 1
    assert [row["key"] for row in shards.read_rows([1999, 0, 999, 1])] == ["1999", "0", "999", "1"]


def test_blocks_of_two_indexes_are_not_mixed(bucket_index: Callable[[bytes], str]):
    shards = Shards(bucket_index(encode_index(table(1000))))
    assert shards.read_rows([0])
    bucket_index(encode_index(table(1000, word=2)))
    with pytest.raises(ValueError, match="block 3 is that of another index, or the set was replaced"):
        shards.read_rows([999])


def test_an_index_of_an_earlier_version_is_written_in_blocks(tmp_path: Path):
    former = to_ipc_bytes(table(1000))
    (tmp_path / INDEX_FILE).write_bytes(former)
    before = Shards(tmp_path)
    # Another version of Arrow may have written it, so the fingerprint is not computed again.
    assert index_file.rewrite_former(str(tmp_path))
    after = Shards(tmp_path)
    assert (tmp_path / INDEX_FILE).read_bytes() == encode_index(table(1000))
    assert (after.fingerprint, rows(after)) == (before.fingerprint, rows(before))
    assert not index_file.rewrite_former(str(tmp_path))
    assert not index_file.rewrite_former(str(tmp_path / "none"))


@pytest.mark.parametrize("samples", [0, 22, 1000])
def test_the_index_of_an_earlier_version_is_the_same_set(
    bucket_index: Callable[[bytes], str], tmp_path: Path, samples: int
):
    """It was one record batch; fingerprints are in checkpoints, so they stay those of that file."""
    former = to_ipc_bytes(table(samples))
    (tmp_path / INDEX_FILE).write_bytes(former)
    for opened in (Shards(tmp_path), Shards(bucket_index(former)), Shards(bucket_index(encode_index(table(samples))))):
        assert opened.fingerprint == hashlib.sha256(former).hexdigest()
        assert rows(opened) == table(samples).to_pylist()
        assert opened.shard_names == [f"{shard:06d}.tar" for shard in range(-(-samples // 1000))]
        assert opened.shard_sizes.sum() == samples
        assert (len(opened.word_counts), opened.has_image.sum()) == (samples, (np.arange(samples) % 3 > 0).sum())
        record_sizes, has_image = opened.read_sizes(np.arange(samples)[::-7])
        assert record_sizes.tolist() == [512] * len(record_sizes)
        assert has_image.tolist() == opened.has_image[::-7].tolist()
        opened.validate()


def test_an_index_of_something_else_is_named(tmp_path: Path):
    path = tmp_path / INDEX_FILE
    write_index(str(tmp_path), table(10).drop(["words"]))
    others = [path.read_bytes(), b"", b"PAR1" * 100]
    write_index(str(tmp_path), table(10).set_column(6, "words", pa.array([None] * 10, pa.int32())))
    for data in [*others, path.read_bytes()]:
        path.write_bytes(data)
        with pytest.raises(ValueError, match=f"{path}: not an index of shards, or damaged: "):
            Shards(tmp_path)


@pytest.mark.parametrize("encode", [encode_index, to_ipc_bytes], ids=["blocks", "earlier version"])
def test_a_damaged_index_is_an_error_or_other_rows_but_never_a_crash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encode: Callable[[pa.Table], bytes]
):
    """Arrow trusts offsets in an index; an offset outside of the file would crash the process."""
    monkeypatch.setattr(index_file, "ROWS_PER_BLOCK", 8)
    (tmp_path / INDEX_FILE).write_bytes(encode(table(22, each=5)))
    path, rng = tmp_path / INDEX_FILE, np.random.default_rng(0)
    whole = path.read_bytes()
    refused = []
    for _ in range(500):
        at, kind = int(rng.integers(len(whole))), rng.integers(3)
        other = bytes([int(rng.integers(256))])
        damaged = [whole[:at], whole[:at] + other + whole[at + 1 :], whole[:at] + bytes(64) + whole[at + 64 :]][kind]
        path.unlink()  # as a mapped file is replaced, not written to
        path.write_bytes(damaged)
        try:
            shards = Shards(tmp_path)
            assert [len(column) for column in (shards.word_counts, shards.has_image, rows(shards))] == [len(shards)] * 3
            assert len(shards.shard_sizes) == len(shards.shard_names)
            shards.validate()
        except ValueError as error:
            refused.append((kind, str(path) in str(error)))
    counts = Counter(refused)
    assert counts.keys() == {(0, True), (1, True), (2, True)}
    assert min(counts.values()) > 20


@pytest.mark.parametrize("names", [["a.tar", "b.tar", "a.tar"], ["a.tar", "c.tar", "b.tar"]])
def test_shards_that_do_not_stand_together_are_found(tmp_path: Path, names: list[str]):
    mixed = pa.DictionaryArray.from_arrays(
        pa.array([["a.tar", "b.tar", "c.tar"].index(name) for name in names], pa.int32()), ["a.tar", "b.tar", "c.tar"]
    )
    write_index(str(tmp_path), table(3).set_column(1, "shard", mixed))
    with pytest.raises(ValueError, match="samples of a shard do not stand together"):
        Shards(tmp_path).validate()


@pytest.mark.usefixtures("local_ray_data")
@pytest.mark.parametrize("image_aspect_ratio", ["pad", "crop"])
def test_prepared_shards_hold_the_pixels_of_the_originals(
    records: list[dict], pictures: Path, tmp_path: Path, image_aspect_ratio: Any
):
    making = ShardOptions(samples_per_shard=5, image_size=10, image_aspect_ratio=image_aspect_ratio)
    make_shards(records, str(pictures), str(tmp_path), making)
    shards = Shards(tmp_path)
    for sample, record, image in zip(
        shards.read_samples(range(len(shards))), records, files(records, pictures), strict=True
    ):
        assert sample.record == record
        assert sample.image.startswith(b"P6\n10 10\n255\n")
        assert (load_pixels(sample.image, 10) == load_pixels(image, 10, image_aspect_ratio)).all()
    read = list(webdataset.WebDataset([str(tar) for tar in tars(shards)], shardshuffle=False).decode("rgb8"))
    assert [sample["__key__"] for sample in read] == keys(shards)
    for sample, image in zip(read, files(records, pictures), strict=True):
        assert (sample["ppm"].transpose(2, 0, 1) == load_pixels(image, 10, image_aspect_ratio)).all()
    for other in (
        ShardOptions(samples_per_shard=5, image_size=12, image_aspect_ratio=image_aspect_ratio),
        ShardOptions(samples_per_shard=5),
    ):
        with pytest.raises(ValueError, match="contains shards of other records or settings"):
            make_shards(records, str(pictures), str(tmp_path), other)


@pytest.mark.usefixtures("local_ray_data")
def test_an_image_whose_square_would_be_too_large_is_broken(records: list[dict], pictures: Path, tmp_path: Path):
    Image.new("RGB", (14_000, 1)).save(pictures / "long.png")
    given = [{**records[0], "image": "long.png"}, records[1]]
    assert make_shards(given, str(pictures), str(tmp_path / "files"), ShardOptions())["samples"] == 2
    summary = make_shards(
        given, str(pictures), str(tmp_path / "prepared"), ShardOptions(image_size=8, max_bad_fraction=0.5)
    )
    assert (summary["samples"], summary["quarantined"]) == (1, {"broken image": 1})


def test_a_finished_set_has_no_other_files_than_these(stored: Shards):
    names = {path.name for path in Path(stored.folder).iterdir() if path.is_file()}
    assert names == {INDEX_FILE, QUARANTINE_FILE, SUMMARY_FILE, *stored.shard_names}
    assert not Path(f"{stored.folder}/unfinished").exists()


def damaged_records(records: list[dict], pictures: Path) -> tuple[list[Any], dict[int, str]]:
    """The records with some of them damaged, and the expected reason of each by number."""
    (pictures / "cut.png").write_bytes((pictures / "0.png").read_bytes()[:60])
    result, reasons = [dict(record) for record in records], {}
    for number, (changes, reason) in {
        1: ({"image": "none.png"}, "missing image"),
        11: ({"image": "caf\udce9.png"}, "broken text"),
        2: ({"image": "cut.png"}, "broken image"),
        5: ({"video": "gif.mp4"}, "video"),
        6: ({"image": "../images/0.png"}, "outside folder"),
        9: ({"conversations": []}, "turn order"),
        21: ({"conversations": None}, "wrong fields"),
    }.items():
        result[number] |= changes
        reasons[number] = reason
    result[14] = {
        "id": "test/14",
        "conversations": [
            {**turn, "value": turn["value"].removeprefix("<image>\n")} for turn in records[14]["conversations"]
        ],
    }
    result += [records[3], "no record"]
    return result, {**reasons, 22: "duplicate", 23: "wrong fields"}


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("size", [1, 5, 100])
def test_unusable_records_are_listed_with_their_reasons_and_the_others_are_kept(
    records: list[dict], pictures: Path, tmp_path: Path, size: int
):
    given, reasons = damaged_records(records, pictures)
    summary = make_shards(
        given, str(pictures), str(tmp_path), ShardOptions(samples_per_shard=size, max_bad_fraction=0.5)
    )
    listed = [json.loads(line) for line in (tmp_path / QUARANTINE_FILE).read_text().splitlines()]
    assert {entry["number"]: entry["reason"] for entry in listed} == reasons
    assert {(entry["field"], entry["value"]) for entry in listed} >= {
        ("image", "none.png"),
        ("image", "../images/0.png"),
        ("video", "gif.mp4"),
        ("conversations", "0 turns"),
        ("conversations", "null"),
        ("", "no record"),
    }
    assert all(entry["explanation"].startswith(RECORD_REASONS[entry["reason"]]) for entry in listed)
    assert set(reasons.values()) <= RECORD_REASONS.keys()
    assert summary["quarantined"] == Counter(reasons.values())
    assert summary["records"] == len(given) == summary["samples"] + sum(summary["quarantined"].values())
    kept = [number for number in range(len(given)) if number not in reasons]
    stored = Shards(tmp_path)
    assert keys(stored) == [f"{number:09d}" for number in kept]
    assert [sample.record for sample in stored.read_samples(range(len(stored)))] == [given[number] for number in kept]
    assert stored.has_image.tolist() == ["image" in given[number] for number in kept]
    assert stored.read_samples([kept.index(14)])[0].image == b""


@pytest.mark.usefixtures("local_ray_data")
def test_with_too_many_unusable_records_there_is_a_list_but_no_set(records: list[dict], pictures: Path, tmp_path: Path):
    given, reasons = damaged_records(records, pictures)
    with pytest.raises(ValueError, match=r"9 of 24 records cannot be used \(.*1 duplicate.*\), allowed: 30\.00%"):
        make_shards(given, str(pictures), str(tmp_path), ShardOptions(samples_per_shard=5, max_bad_fraction=0.3))
    assert len((tmp_path / QUARANTINE_FILE).read_text().splitlines()) == len(reasons)
    with pytest.raises(ValueError, match="no shards here"):
        Shards(tmp_path)
    make_shards(given, str(pictures), str(tmp_path), ShardOptions(samples_per_shard=5, max_bad_fraction=0.4))
    assert len(Shards(tmp_path)) == 15


@pytest.mark.usefixtures("local_ray_data")
def test_a_second_start_makes_only_missing_shards_and_a_third_none(
    stored: Shards, records: list[dict], pictures: Path, tmp_path: Path
):
    making = ShardOptions(samples_per_shard=5)
    missing = pictures / records[17]["image"]
    image = missing.read_bytes()
    missing.unlink()
    with pytest.raises(ValueError, match="1 missing image"):
        make_shards(records, str(pictures), str(tmp_path), making)
    first = tmp_path / "000000.tar"
    written = first.stat().st_mtime_ns
    missing.write_bytes(image)
    make_shards(records, str(pictures), str(tmp_path), making)
    assert first.stat().st_mtime_ns == written
    assert Shards(tmp_path).fingerprint == stored.fingerprint
    times = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    make_shards(records, str(pictures), str(tmp_path), making)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == times


@pytest.mark.usefixtures("local_ray_data")
def test_shards_of_other_records_or_settings_are_not_overwritten(records: list[dict], pictures: Path, tmp_path: Path):
    make_shards(records, str(pictures), str(tmp_path), ShardOptions(samples_per_shard=5))
    for given, making in (
        (records[1:], ShardOptions(samples_per_shard=5)),
        (records, ShardOptions(samples_per_shard=6)),
    ):
        with pytest.raises(ValueError, match=re.escape(f"{tmp_path}: contains shards of other records or settings")):
            make_shards(given, str(pictures), str(tmp_path), making)
    assert len(Shards(tmp_path)) == len(records)
