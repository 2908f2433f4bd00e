"""Shards are tars that WebDataset's own readers open; the index finds every sample in them or says what is wrong."""

import io
import itertools
import json
import re
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset

from pipelines.shards import INDEX, Shards, index, make


def tars(stored: Shards) -> list[Path]:
    return sorted(stored.folder.glob("*.tar"))


def images(records: list[dict]) -> dict[str, bytes]:
    return {record["id"]: Path(record["image"]).read_bytes() for record in records}


@pytest.fixture
def copy(stored: Shards, tmp_path: Path) -> Shards:
    """The same set where a test may write."""
    return Shards(shutil.copytree(stored.folder, tmp_path / "copy"))


def test_webdataset_reads_every_sample_with_its_image_and_record(stored: Shards, records: list[dict]):
    read = list(webdataset.WebDataset([str(tar) for tar in tars(stored)], shardshuffle=False))
    assert [sample["__key__"] for sample in read] == [record["id"] for record in records] == stored.keys
    for sample, ours in zip(read, stored.read(range(len(stored))), strict=True):
        assert sample["png"] == ours.image == images(records)[ours.key]
        assert json.loads(sample["json"]) == ours.record


def test_ray_data_reads_every_sample_with_its_image_and_record(ray_cluster: Any, stored: Shards):
    rows = ray_cluster.data.read_webdataset([str(tar) for tar in tars(stored)], decoder=None).take_all()
    ours = {sample.key: sample for sample in stored.read(range(len(stored)))}
    assert sorted(row["__key__"] for row in rows) == sorted(ours)
    for row in rows:
        assert row["png"] == ours[row["__key__"]].image
        assert json.loads(row["json"]) == ours[row["__key__"]].record


def test_samples_come_in_the_order_in_which_they_are_asked_for(stored: Shards, records: list[dict]):
    asked = np.random.default_rng(0).integers(0, len(records), 60)
    for number, sample in zip(asked, stored.read(asked), strict=True):
        assert sample.key == records[number]["id"]
        assert sample.image == Path(records[number]["image"]).read_bytes()
        assert sample.record["conversations"] == records[number]["conversations"]
    assert stored.read([]) == []


def test_a_record_is_kept_but_for_its_image_which_gets_the_name_it_has_in_the_tar(stored: Shards, records: list[dict]):
    for before, sample in zip(records, stored.read(range(len(records))), strict=True):
        assert sample.record == {**before, "image": f"{before['id']}.png"}


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
    rows = list(index(tmp_path / "foreign.tar"))
    assert [(row["key"], row["offset"], row["length"]) for row in rows] == [
        ("a", 0, 512 + 512 + 512 + 512),
        ("b/c", 2048, 512 + 512 + 512),
        ("d", 3584, 512 + 1024),
    ]


@pytest.mark.parametrize("place", [0.0, 0.3, 0.6, 0.99])
def test_a_flipped_bit_anywhere_in_a_sample_is_an_error_that_names_tar_and_sample(copy: Shards, place: float):
    for number in (0, 7, 21):
        path = copy.folder / copy.names[number]
        whole = path.read_bytes()
        damaged = bytearray(whole)
        damaged[copy.offsets[number] + int(copy.lengths[number] * place)] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=re.escape(f"{path}: sample {copy.keys[number]}: ")):
            copy.read([number])
        others = [other for other in range(len(copy)) if other != number]
        assert [sample.key for sample in copy.read(others)] == [copy.keys[other] for other in others]
        path.write_bytes(whole)


def test_a_tar_that_was_cut_short_is_an_error_that_names_tar_and_sample(copy: Shards):
    path = copy.folder / copy.names[4]
    path.write_bytes(path.read_bytes()[: copy.offsets[4] + 700])
    with pytest.raises(ValueError, match=re.escape(f"{path}: sample {copy.keys[4]}: ")):
        copy.read([4])
    assert copy.read([3])[0].key == copy.keys[3]


def test_making_shards_twice_gives_equal_bytes(stored: Shards, records: list[dict], tmp_path: Path):
    make(records, tmp_path, samples_per_shard=5)
    for tar in tars(stored):
        assert (tmp_path / tar.name).read_bytes() == tar.read_bytes()
    again = Shards(tmp_path)
    assert (again.keys, again.sums) == (stored.keys, stored.sums)


@pytest.mark.parametrize("missing", [0, 7, 21])
def test_a_missing_image_names_record_and_path_and_leaves_no_set(records: list[dict], tmp_path: Path, missing: int):
    path = tmp_path / "none.png"
    broken = [{**record, "image": str(path)} if n == missing else record for n, record in enumerate(records)]
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=f"record test/{missing}: image {path}: No such file"):
        make(broken, out, samples_per_shard=5)
    with pytest.raises(ValueError, match=f"{out}: no shards here, {INDEX} is missing"):
        Shards(out)
    make(records, out, samples_per_shard=5)
    assert len(Shards(out)) == len(records)


def test_a_folder_without_an_index_is_no_set(tmp_path: Path):
    with pytest.raises(ValueError, match=f"{tmp_path}: no shards here, {INDEX} is missing"):
        Shards(tmp_path)


def test_a_finished_set_has_no_other_files_than_tars_and_index(stored: Shards):
    assert {path.name for path in stored.folder.iterdir()} == {INDEX, *stored.names}


def test_an_id_that_comes_twice_is_refused_before_anything_is_written(records: list[dict], tmp_path: Path):
    with pytest.raises(ValueError, match=re.escape(f"record {records[1]['id']!r} comes 2 times")):
        make([*records, records[1]], tmp_path / "out", 3)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["a.b", 7])
def test_an_id_that_webdataset_would_split_or_not_take_is_refused(records: list[dict], tmp_path: Path, name: Any):
    with pytest.raises(ValueError, match=re.escape(repr(name))):
        make([{**records[0], "id": name}], tmp_path, 3)


def test_making_again_leaves_nothing_of_what_was_there(records: list[dict], tmp_path: Path):
    make(records, tmp_path, 1)
    make(records[:1], tmp_path, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000000.tar", INDEX]
    with pytest.raises(ValueError, match="image"):
        make([{**records[0], "image": "nowhere.png"}], tmp_path, 1)
    with pytest.raises(ValueError, match=INDEX):
        Shards(tmp_path)
