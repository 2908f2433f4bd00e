"""Tests of audit: verify finds every wrong byte, and foreign tars get the same index as our shards."""

import json
import re
import shutil
from pathlib import Path

import pyarrow as pa
import pytest

from pipelines.data.audit import index_tars, verify_set
from pipelines.data.index_file import INDEX_FILE, INDEX_SCHEMA, write_index
from pipelines.data.options import ShardOptions
from pipelines.data.shard_index import QUARANTINE_FILE, SUMMARY_FILE, UNFINISHED_DIR, Shards
from pipelines.data.shard_writer import make_shards
from tests.pipelines.odd_tars import pack, picture, record


@pytest.fixture
def copy(stored: Shards, tmp_path: Path) -> Shards:
    """A copy of the set that a test may change."""
    return Shards(shutil.copytree(stored.folder, tmp_path / "copy"))


@pytest.mark.usefixtures("local_ray_data")
def test_a_complete_set_has_no_fault(stored: Shards):
    assert verify_set(stored.folder) == []


@pytest.mark.usefixtures("local_ray_data")
def test_a_shard_of_which_nothing_was_kept_is_no_fault(records: list[dict], pictures: Path, tmp_path: Path):
    given = [{**record, "image": "none.png"} for record in records[:2]] + records[2:4]
    make_shards(given, str(pictures), str(tmp_path), ShardOptions(samples_per_shard=2, max_bad_fraction=0.5))
    assert len(Shards(tmp_path)) == 2
    assert verify_set(str(tmp_path)) == []


@pytest.mark.usefixtures("ray_cluster")
def test_a_flipped_bit_a_missing_and_a_strange_tar_are_found(copy: Shards):
    folder = Path(copy.folder)
    (row,) = copy.read_rows([7])
    path = folder / row["shard"]
    damaged = bytearray(path.read_bytes())
    damaged[row["offset"] + 600] ^= 1
    path.write_bytes(damaged)
    (folder / "000003.tar").unlink()
    shutil.copy(folder / "000000.tar", folder / "extra.tar")
    with (folder / "000004.tar").open("ab") as tar:
        tar.write(b"x")
    found = verify_set(copy.folder)
    assert [re.sub(r"^.*/", "", line.split(":")[0]) for line in found] == [
        row["shard"],
        "000003.tar",
        "000004.tar",
        "extra.tar",
    ]
    assert row["key"] in found[0]
    assert "there is more from byte" in found[2]
    assert found[3].endswith(": is not in the index")


@pytest.mark.usefixtures("local_ray_data")
@pytest.mark.parametrize("column", ["image_size", "words"])
def test_an_index_that_differs_from_a_sample_is_found(copy: Shards, column: str):
    path = Path(copy.folder) / INDEX_FILE
    rows = copy.read_rows(range(len(copy)))
    rows[7][column] += 1
    path.unlink()
    write_index(str(path.parent), pa.Table.from_pylist(rows, INDEX_SCHEMA))
    (found,) = verify_set(copy.folder)
    assert f"sample {rows[7]['key']}: its row of the index differs from the tar" in found


@pytest.mark.usefixtures("local_ray_data")
def test_a_summary_with_a_wrong_count_is_found(copy: Shards):
    path = Path(copy.folder) / SUMMARY_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), "samples": 21}))
    (found,) = verify_set(copy.folder)
    assert "says 21 samples were kept, the index has 22" in found


@pytest.mark.usefixtures("ray_cluster")
def test_indexing_foreign_tars_gives_the_index_of_our_shards(stored: Shards, copy: Shards):
    for name in (INDEX_FILE, QUARANTINE_FILE, SUMMARY_FILE):
        (Path(copy.folder) / name).unlink()
    found = index_tars(copy.folder)
    assert (found.tars, found.samples, found.members) == (5, len(stored), 2 * len(stored))
    assert found.used == {"png": len(stored), "json": len(stored)}
    assert (found.ignored.total(), found.rejected, found.notes) == (0, 0, [])
    assert Shards(copy.folder).fingerprint == stored.fingerprint
    assert verify_set(copy.folder) == []
    with pytest.raises(ValueError, match="has an index already"):
        index_tars(copy.folder)


@pytest.mark.usefixtures("local_ray_data")
def test_unusable_samples_are_listed_and_counted_or_the_set_is_refused(tmp_path: Path):
    bodies = [record(0), b"no json", b"[]", b"{}", b'{"conversations": [1]}', b'{"conversations": [{}]}']
    entries = [(f"{n}.{kind}", part) for n, body in enumerate(bodies) for kind, part in _members(body)]
    (tmp_path / "a.tar").write_bytes(pack(entries))
    (tmp_path / "b.tar").write_bytes(pack([]))
    counts = r"5 of 6 samples cannot be used \(1 not JSON, 4 wrong fields; first 1 of a\.tar: .*10.00%"
    with pytest.raises(ValueError, match=counts):
        index_tars(str(tmp_path), max_bad_fraction=0.1)
    assert not (tmp_path / INDEX_FILE).exists()
    found = index_tars(str(tmp_path), max_bad_fraction=0.9)
    assert (found.samples, dict(found.rejections.counts)) == (1, {"not JSON": 1, "wrong fields": 4})
    assert (found.members, found.used, found.ignored, found.rejected) == (18, {"json": 1, "jpg": 1}, {"txt": 1}, 15)
    listed = [json.loads(line) for line in (tmp_path / QUARANTINE_FILE).read_text().splitlines()]
    assert [(entry["shard"], entry["key"], entry["reason"]) for entry in listed] == [
        ("a.tar", str(n), "not JSON" if n == 1 else "wrong fields") for n in range(1, 6)
    ]
    assert verify_set(str(tmp_path)) == []


def _members(body: bytes, image: bytes = picture()) -> list[tuple[str, bytes]]:
    return [("jpg", image), ("json", body), ("txt", b"a thing")]


@pytest.mark.usefixtures("local_ray_data")
def test_images_are_decoded_on_request(tmp_path: Path):
    images = [picture(), picture()[:-200], b"<html>404</html>"]
    entries = [(f"{n}.{kind}", part) for n, image in enumerate(images) for kind, part in _members(record(n), image)]
    (tmp_path / "a.tar").write_bytes(pack(entries))
    index_tars(str(tmp_path))
    assert verify_set(str(tmp_path)) == []
    found = verify_set(str(tmp_path), decode=True)
    assert [line.split(": ")[:3] for line in found] == [
        [str(tmp_path / "a.tar"), f"sample {n}", "broken image"] for n in (1, 2)
    ]


@pytest.mark.usefixtures("local_ray_data")
def test_damaged_tars_are_refused_in_one_line(tmp_path: Path):
    (tmp_path / "a.tar").write_bytes(pack([("0.json", record(0, image=False))]))
    for name in ("b.tar", "c.tar"):
        (tmp_path / name).write_bytes(b"no tar")
    with pytest.raises(ValueError, match=r"^[^\n]*b\.tar: cut, damaged or no tar [^\n]*; and 1 more tars$"):
        index_tars(str(tmp_path))


def test_tars_that_are_not_indexed_are_named(tmp_path: Path):
    (tmp_path / "a.tar").write_bytes(pack([]))
    (tmp_path / "b.tar.gz").write_bytes(b"")
    with pytest.raises(ValueError, match=r"b\.tar\.gz: compressed, allowed: plain tars"):
        index_tars(str(tmp_path))
    (tmp_path / "b.tar.gz").unlink()
    (tmp_path / "a.tar").unlink()
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "a.tar").write_bytes(pack([]))
    with pytest.raises(ValueError, match=r"no tars here, .*; folders below have some, each is a separate set: train"):
        index_tars(str(tmp_path))
    (tmp_path / UNFINISHED_DIR).mkdir()
    (tmp_path / UNFINISHED_DIR / "000000.arrow").write_bytes(b"")
    with pytest.raises(ValueError, match="an interrupted `redux shards make` is here"):
        index_tars(str(tmp_path))


@pytest.mark.usefixtures("local_ray_data")
def test_tars_without_a_sample_are_no_set(tmp_path: Path):
    (tmp_path / "a.tar").write_bytes(pack([]))
    with pytest.raises(ValueError, match="no samples in 1 tars, allowed: at least one"):
        index_tars(str(tmp_path))


@pytest.mark.usefixtures("local_ray_data")
def test_a_set_without_samples_has_no_fault(tmp_path: Path):
    make_shards([], ".", str(tmp_path), ShardOptions())
    assert verify_set(str(tmp_path)) == []


@pytest.mark.usefixtures("local_ray_data")
def test_a_folder_without_tars_is_named(tmp_path: Path):
    with pytest.raises(ValueError, match="no tars here"):
        index_tars(str(tmp_path))
    with pytest.raises(ValueError, match="no shards here"):
        verify_set(str(tmp_path))
