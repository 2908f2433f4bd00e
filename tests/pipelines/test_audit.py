"""verify finds every byte that is not as the index says; foreign tars get the index that ours have."""

import io
import json
import re
import shutil
import tarfile
from pathlib import Path

import pytest

from pipelines.audit import index_tars, verify
from pipelines.shards import INDEX, QUARANTINE, SUMMARY, Shards

pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture
def copy(stored: Shards, tmp_path: Path) -> Shards:
    """A set where a test may write."""
    return Shards(shutil.copytree(stored.folder, tmp_path / "copy"))


def test_a_whole_set_has_no_fault(stored: Shards):
    assert verify(stored.folder) == []


def test_a_flipped_bit_a_missing_and_a_strange_tar_are_found(copy: Shards):
    folder = Path(copy.folder)
    path = folder / copy.names[7]
    damaged = bytearray(path.read_bytes())
    damaged[copy.offsets[7] + 600] ^= 1
    path.write_bytes(damaged)
    (folder / "000003.tar").unlink()
    shutil.copy(folder / "000000.tar", folder / "extra.tar")
    with (folder / "000004.tar").open("ab") as tar:
        tar.write(b"x")
    found = verify(copy.folder)
    assert [re.sub(r"^.*/", "", line.split(":")[0]) for line in found] == [
        "extra.tar",
        copy.names[7],
        "000003.tar",
        "000004.tar",
    ]
    assert copy.keys[7] in found[1]


def test_a_summary_that_counts_otherwise_is_found(copy: Shards):
    path = Path(copy.folder) / SUMMARY
    path.write_text(json.dumps({**json.loads(path.read_text()), "kept": 21}))
    (found,) = verify(copy.folder)
    assert "says 21 samples were kept, the index has 22" in found


def test_foreign_tars_get_the_index_that_ours_have(stored: Shards, copy: Shards):
    for name in (INDEX, QUARANTINE, SUMMARY):
        (Path(copy.folder) / name).unlink()
    assert index_tars(copy.folder) == len(stored)
    again = Shards(copy.folder)
    assert (again.keys, again.names, again.sums) == (stored.keys, stored.names, stored.sums)
    assert (again.offsets == stored.offsets).all()
    assert (again.words == stored.words).all()
    assert (again.has_image == stored.has_image).all()
    assert verify(copy.folder) == []
    with pytest.raises(ValueError, match="has an index already"):
        index_tars(copy.folder)


@pytest.mark.parametrize("body", [b"no json", b"[]", b"{}"])
def test_a_sample_without_a_record_is_named(tmp_path: Path, body: bytes):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in ("x.jpg", "x.json"):
            member = tarfile.TarInfo(name)
            member.size = len(body)
            tar.addfile(member, io.BytesIO(body))
    with pytest.raises(Exception, match="sample x: no json with conversations"):
        index_tars(str(tmp_path))


def test_a_folder_without_tars_is_named(tmp_path: Path):
    with pytest.raises(ValueError, match="no tars here"):
        index_tars(str(tmp_path))
    with pytest.raises(ValueError, match="no shards here"):
        verify(str(tmp_path))
