"""verify finds every byte that is not as the index says; foreign tars get the index that ours have."""

import io
import json
import re
import shutil
import tarfile
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import ipc

from pipelines.audit import index_tars, verify
from pipelines.sets import Making
from pipelines.shards import INDEX, QUARANTINE, SUMMARY, Shards, ipc_file, make


@pytest.fixture
def copy(stored: Shards, tmp_path: Path) -> Shards:
    """A set where a test may write."""
    return Shards(shutil.copytree(stored.folder, tmp_path / "copy"))


@pytest.mark.usefixtures("ray_cluster")
def test_a_whole_set_has_no_fault(stored: Shards):
    assert verify(stored.folder) == []


@pytest.mark.usefixtures("ray_cluster")
def test_a_shard_of_which_nothing_was_kept_is_no_fault(records: list[dict], pictures: Path, tmp_path: Path):
    given = [{**record, "image": "none.png"} for record in records[:2]] + records[2:4]
    make(given, str(pictures), str(tmp_path), Making(samples_per_shard=2, tolerance=0.5))
    assert len(Shards(tmp_path)) == 2
    assert verify(str(tmp_path)) == []


@pytest.mark.usefixtures("ray_cluster")
def test_a_flipped_bit_a_missing_and_a_strange_tar_are_found(copy: Shards):
    folder = Path(copy.folder)
    (row,) = copy.rows([7])
    path = folder / row["shard"]
    damaged = bytearray(path.read_bytes())
    damaged[row["offset"] + 600] ^= 1
    path.write_bytes(damaged)
    (folder / "000003.tar").unlink()
    shutil.copy(folder / "000000.tar", folder / "extra.tar")
    with (folder / "000004.tar").open("ab") as tar:
        tar.write(b"x")
    found = verify(copy.folder)
    assert [re.sub(r"^.*/", "", line.split(":")[0]) for line in found] == [
        row["shard"],
        "000003.tar",
        "000004.tar",
        "extra.tar",
    ]
    assert row["key"] in found[0]
    assert [line.rpartition(": ")[2] for line in found[2:]] == [
        "goes on behind the last sample of the index",
        "is not in the index",
    ]


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("column", ["image_size", "words"])
def test_an_index_that_says_otherwise_of_a_sample_is_found(copy: Shards, column: str):
    path = Path(copy.folder) / INDEX
    table = ipc.open_file(path.read_bytes()).read_all()
    values = table[column].to_pylist()
    values[7] += 1
    place = table.schema.get_field_index(column)
    changed = table.set_column(place, column, pa.array(values, table.schema.field(column).type))
    path.unlink()
    path.write_bytes(ipc_file(changed))
    (found,) = verify(copy.folder)
    assert f"sample {copy.key(7)}: the index says otherwise" in found


@pytest.mark.usefixtures("ray_cluster")
def test_a_summary_that_counts_otherwise_is_found(copy: Shards):
    path = Path(copy.folder) / SUMMARY
    path.write_text(json.dumps({**json.loads(path.read_text()), "kept": 21}))
    (found,) = verify(copy.folder)
    assert "says 21 samples were kept, the index has 22" in found


@pytest.mark.usefixtures("ray_cluster")
def test_foreign_tars_get_the_index_that_ours_have(stored: Shards, copy: Shards):
    for name in (INDEX, QUARANTINE, SUMMARY):
        (Path(copy.folder) / name).unlink()
    assert index_tars(copy.folder) == len(stored)
    assert Shards(copy.folder).fingerprint == stored.fingerprint
    assert verify(copy.folder) == []
    with pytest.raises(ValueError, match="has an index already"):
        index_tars(copy.folder)


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("body", [b"no json", b"[]", b"{}", b'{"conversations": [1]}', b'{"conversations": [{}]}'])
def test_a_sample_without_a_record_is_named(tmp_path: Path, body: bytes):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in ("x.jpg", "x.json"):
            member = tarfile.TarInfo(name)
            member.size = len(body)
            tar.addfile(member, io.BytesIO(body))
    with pytest.raises(Exception, match="sample x: no json with conversations"):
        index_tars(str(tmp_path))


@pytest.mark.usefixtures("ray_cluster")
def test_a_set_without_samples_has_no_fault(tmp_path: Path):
    make([], ".", str(tmp_path), Making())
    assert verify(str(tmp_path)) == []


@pytest.mark.usefixtures("ray_cluster")
def test_a_folder_without_tars_is_named(tmp_path: Path):
    with pytest.raises(ValueError, match="no tars here"):
        index_tars(str(tmp_path))
    with pytest.raises(ValueError, match="no shards here"):
        verify(str(tmp_path))
