"""Shards are tars that WebDataset's own readers open; the index finds every sample in them or says what is wrong."""

import io
import itertools
import json
import re
import shutil
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset

from pipelines import storage
from pipelines.records import REASONS
from pipelines.shards import INDEX, QUARANTINE, SUMMARY, Making, Shards, index, make


def tars(stored: Shards) -> list[Path]:
    return sorted(Path(stored.folder).glob("*.tar"))


def files(records: list[dict], pictures: Path) -> list[bytes]:
    return [(pictures / record["image"]).read_bytes() for record in records]


@pytest.fixture
def copy(stored: Shards, tmp_path: Path) -> Shards:
    """The same set where a test may write."""
    return Shards(shutil.copytree(stored.folder, tmp_path / "copy"))


def test_webdataset_reads_every_sample_with_its_image_and_record(stored: Shards, records: list[dict], pictures: Path):
    read = list(webdataset.WebDataset([str(tar) for tar in tars(stored)], shardshuffle=False))
    assert [sample["__key__"] for sample in read] == [f"{number:09d}" for number in range(len(records))] == stored.keys
    numbers = range(len(stored))
    for sample, ours, image, record in zip(read, stored.read(numbers), files(records, pictures), records, strict=True):
        assert sample["png"] == ours.image == image
        assert json.loads(sample["json"]) == ours.record == record
        assert ours.id == record["id"]


def test_ray_data_reads_every_sample_with_its_image_and_record(ray_cluster: Any, stored: Shards):
    rows = ray_cluster.data.read_webdataset([str(tar) for tar in tars(stored)], decoder=None).take_all()
    ours = {sample.key: sample for sample in stored.read(range(len(stored)))}
    assert sorted(row["__key__"] for row in rows) == sorted(ours)
    for row in rows:
        assert row["png"] == ours[row["__key__"]].image
        assert json.loads(row["json"]) == ours[row["__key__"]].record


def test_samples_come_in_the_order_in_which_they_are_asked_for(stored: Shards, records: list[dict], pictures: Path):
    asked = np.random.default_rng(0).integers(0, len(records), 60)
    for number, sample in zip(asked, stored.read(asked), strict=True):
        assert sample.id == records[number]["id"]
        assert sample.image == (pictures / records[number]["image"]).read_bytes()
        assert sample.record["conversations"] == records[number]["conversations"]
    assert stored.read([]) == []


def test_shards_hold_as_many_samples_as_asked_and_the_last_one_the_rest(stored: Shards):
    held = [(name, len(list(group))) for name, group in itertools.groupby(stored.names)]
    assert held == [(f"{number:06d}.tar", 5) for number in range(4)] + [("000004.tar", 2)]
    assert [tar.name for tar in tars(stored)] == [name for name, _ in held]


def test_the_byte_ranges_of_the_index_are_whole_tar_members_and_leave_nothing_out(stored: Shards):
    for path in tars(stored):
        with tarfile.open(path) as tar:
            members = tar.getmembers()
        ends = [*(member.offset for member in members[1:]), members[-1].offset_data + -(-members[-1].size // 512) * 512]
        mine = [number for number, name in enumerate(stored.names) if name == path.name]
        for place, number in enumerate(mine):
            pair = members[2 * place : 2 * place + 2]
            assert {member.name for member in pair} == {f"{stored.keys[number]}.{suffix}" for suffix in ("png", "json")}
            assert stored.offsets[number] == pair[0].offset
            assert stored.offsets[number] + stored.lengths[number] == ends[2 * place + 1]
        assert not path.read_bytes()[ends[-1] :].strip(b"\0"), "nothing but the end of the archive"


def test_a_foreign_tar_is_indexed_as_one_of_ours(tmp_path: Path):
    texts = {"a.json": b"{}", "a.jpg": b"x" * 512, "b/c.png": b"", "b/c.json": b'{"k": 1}', "d.txt": b"y" * 513}
    with tarfile.open(tmp_path / "foreign.tar", "w") as tar:
        for name, text in texts.items():
            member = tarfile.TarInfo(name)
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text))
    rows = list(index((tmp_path / "foreign.tar").read_bytes(), "foreign.tar"))
    assert [(row["key"], row["offset"], row["length"]) for row in rows] == [
        ("a", 0, 512 + 512 + 512 + 512),
        ("b/c", 2048, 512 + 512 + 512),
        ("d", 3584, 512 + 1024),
    ]


@pytest.mark.parametrize("place", [0.0, 0.3, 0.6, 0.99])
def test_a_flipped_bit_anywhere_in_a_sample_is_an_error_that_names_tar_and_sample(copy: Shards, place: float):
    for number in (0, 7, 21):
        path = Path(copy.folder) / copy.names[number]
        whole = path.read_bytes()
        damaged = bytearray(whole)
        damaged[copy.offsets[number] + int(copy.lengths[number] * place)] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=re.escape(f"{path}: sample {copy.keys[number]}: ")):
            copy.read([number])
        others = [other for other in range(len(copy)) if other != number]
        assert [sample.key for sample in copy.read(others)] == [copy.keys[other] for other in others]
        path.write_bytes(whole)


def test_a_tar_that_was_cut_short_is_an_error_that_names_the_tar(copy: Shards):
    path = Path(copy.folder) / copy.names[4]
    path.write_bytes(path.read_bytes()[: copy.offsets[4] + 700])
    with pytest.raises(ValueError, match=re.escape(f"{path}: ") + ".*the file ends at"):
        copy.read([4])
    assert copy.read([3])[0].key == copy.keys[3]


def test_a_member_that_only_unpickling_could_read_is_refused(tmp_path: Path):
    with tarfile.open(tmp_path / "foreign.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("a.pkl"))
    with pytest.raises(ValueError, match=r"foreign\.tar: member a\.pkl, allowed: what can be read without unpickling"):
        list(index((tmp_path / "foreign.tar").read_bytes(), "foreign.tar"))


@pytest.mark.usefixtures("ray_cluster")
def test_making_shards_twice_gives_equal_bytes(stored: Shards, records: list[dict], pictures: Path, tmp_path: Path):
    make(records, str(pictures), str(tmp_path), Making(samples_per_shard=5))
    for tar in tars(stored):
        assert (tmp_path / tar.name).read_bytes() == tar.read_bytes()
    again = Shards(tmp_path)
    assert (again.keys, again.sums) == (stored.keys, stored.sums)


def test_a_folder_without_an_index_is_no_set(tmp_path: Path):
    with pytest.raises(ValueError, match=f"{tmp_path}: no shards here, {INDEX} is missing"):
        Shards(tmp_path)


def test_a_finished_set_has_no_other_files_than_these(stored: Shards):
    names = {path.name for path in Path(stored.folder).iterdir() if path.is_file()}
    assert names == {INDEX, QUARANTINE, SUMMARY, *stored.names}
    assert not storage.names(f"{stored.folder}/unfinished")


def spoilt(records: list[dict], pictures: Path) -> tuple[list[Any], dict[int, str]]:
    """The records, some of them spoilt, and the reason of each of those by number."""
    (pictures / "cut.png").write_bytes((pictures / "0.png").read_bytes()[:60])
    (pictures / "gif.jpg").write_bytes((pictures / "0.png").read_bytes())
    result, reasons = [dict(record) for record in records], {}
    for number, (changes, reason) in {
        1: ({"image": "none.png"}, "missing image"),
        2: ({"image": "cut.png"}, "broken image"),
        5: ({"image": "gif.jpg"}, "mislabelled image"),
        6: ({"image": "../images/0.png"}, "outside"),
        9: ({"conversations": []}, "roles"),
        21: ({"id": None}, "malformed"),
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
    return result, {**reasons, 22: "duplicate", 23: "malformed"}


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("size", [1, 5, 100])
def test_what_cannot_be_used_is_listed_with_its_reason_and_the_rest_is_kept(
    records: list[dict], pictures: Path, tmp_path: Path, size: int
):
    given, reasons = spoilt(records, pictures)
    summary = make(given, str(pictures), str(tmp_path), Making(samples_per_shard=size, tolerance=0.5))
    listed = [json.loads(line) for line in (tmp_path / QUARANTINE).read_text().splitlines()]
    assert {entry["number"]: entry["reason"] for entry in listed} == reasons
    assert set(reasons.values()) <= REASONS.keys()
    assert summary["quarantined"] == Counter(reasons.values())
    assert summary["records"] == len(given) == summary["kept"] + sum(summary["quarantined"].values())
    kept = [number for number in range(len(given)) if number not in reasons]
    stored = Shards(tmp_path)
    assert stored.keys == [f"{number:09d}" for number in kept]
    assert [sample.record for sample in stored.read(range(len(stored)))] == [given[number] for number in kept]
    assert stored.has_image.tolist() == ["image" in given[number] for number in kept]
    assert stored.read([kept.index(14)])[0].image == b""


@pytest.mark.usefixtures("ray_cluster")
def test_past_the_tolerated_share_there_is_a_list_but_no_set(records: list[dict], pictures: Path, tmp_path: Path):
    given, reasons = spoilt(records, pictures)
    with pytest.raises(ValueError, match=r"8 of 24 records cannot be used \(.*1 duplicate.*\), allowed: 30\.00%"):
        make(given, str(pictures), str(tmp_path), Making(samples_per_shard=5, tolerance=0.3))
    assert len((tmp_path / QUARANTINE).read_text().splitlines()) == len(reasons)
    with pytest.raises(ValueError, match="no shards here"):
        Shards(tmp_path)
    make(given, str(pictures), str(tmp_path), Making(samples_per_shard=5, tolerance=0.4))
    assert len(Shards(tmp_path)) == 16


@pytest.mark.usefixtures("ray_cluster")
def test_a_second_start_makes_only_what_is_missing_and_a_third_nothing(
    stored: Shards, records: list[dict], pictures: Path, tmp_path: Path
):
    making = Making(samples_per_shard=5)
    missing = pictures / records[17]["image"]
    image = missing.read_bytes()
    missing.unlink()
    with pytest.raises(ValueError, match="1 missing image"):
        make(records, str(pictures), str(tmp_path), making)
    first = tmp_path / "000000.tar"
    written = first.stat().st_mtime_ns
    missing.write_bytes(image)
    make(records, str(pictures), str(tmp_path), making)
    assert first.stat().st_mtime_ns == written
    assert Shards(tmp_path).sums == stored.sums
    times = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    make(records, str(pictures), str(tmp_path), making)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == times


@pytest.mark.usefixtures("ray_cluster")
def test_shards_of_something_else_are_left_alone(records: list[dict], pictures: Path, tmp_path: Path):
    make(records, str(pictures), str(tmp_path), Making(samples_per_shard=5))
    for given, making in ((records[1:], Making(samples_per_shard=5)), (records, Making(samples_per_shard=6))):
        with pytest.raises(ValueError, match=re.escape(f"{tmp_path}: holds shards of other records or settings")):
            make(given, str(pictures), str(tmp_path), making)
    assert len(Shards(tmp_path)) == len(records)
