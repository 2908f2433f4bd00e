"""Of many directories the newest complete checkpoint is found: incomplete and damaged ones do not exist."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipelines.checkpoint import MANIFEST, Saved, _listing, newest, restore


def build(folder: Path, cursor: int, workers: int = 2) -> Path:
    """A complete checkpoint as `save` leaves it."""
    path = folder / f"step-{cursor:06d}"
    (path / "engine").mkdir(parents=True)
    (path / "latest").write_text("engine")
    for rank in range(workers):
        (path / "engine" / f"rank{rank}.pt").write_bytes(bytes([rank, cursor % 256]) * 100)
    manifest = {"cursor": cursor, "workers": workers, "files": _listing(path)}
    (path / MANIFEST).write_text(json.dumps(manifest))
    return path


def damaged_byte(path: Path) -> None:
    file = path / "engine" / "rank1.pt"
    content = bytearray(file.read_bytes())
    content[57] ^= 1
    file.write_bytes(content)


def torn_manifest(path: Path) -> None:
    text = (path / MANIFEST).read_text()
    (path / MANIFEST).write_text(text[: len(text) // 2])


DAMAGE: dict[str, Callable[[Path], object]] = {
    "no manifest": lambda path: (path / MANIFEST).unlink(),
    "empty manifest": lambda path: (path / MANIFEST).write_text(""),
    "torn manifest": torn_manifest,
    "manifest of something else": lambda path: (path / MANIFEST).write_text("{}"),
    "damaged byte": damaged_byte,
    "file cut short": lambda path: (path / "engine" / "rank0.pt").write_bytes(b""),
    "missing file": lambda path: (path / "engine" / "rank1.pt").unlink(),
    "extra file": lambda path: (path / "engine" / "rank2.pt").write_bytes(b"more"),
    "renamed file": lambda path: (path / "engine" / "rank1.pt").rename(path / "engine" / "rank9.pt"),
    "nothing left": lambda path: (shutil.rmtree(path), path.mkdir()),
}


def test_the_highest_of_complete_checkpoints_is_the_newest(tmp_path: Path):
    for cursor in (20, 100, 3, 99):
        build(tmp_path, cursor, workers=cursor)
    assert newest(tmp_path) == Saved(tmp_path / "step-000100", cursor=100, workers=100)


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, damage: str):
    good, bad = build(tmp_path, 10), build(tmp_path, 20)
    assert newest(tmp_path) == Saved(bad, cursor=20, workers=2)
    DAMAGE[damage](bad)
    assert newest(tmp_path) == Saved(good, cursor=10, workers=2)
    DAMAGE[damage](good)
    assert newest(tmp_path) is None


def test_what_is_passed_over_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    build(tmp_path, 10)
    DAMAGE["damaged byte"](build(tmp_path, 20))
    newest(tmp_path)
    assert capsys.readouterr().out == f"checkpoint {tmp_path / 'step-000020'} is incomplete or damaged: passed over\n"


def test_other_directories_are_no_checkpoints(tmp_path: Path):
    assert newest(tmp_path) is None
    assert newest(tmp_path / "nothing here") is None
    shutil.move(build(tmp_path, 10), tmp_path / "model")
    assert newest(tmp_path) is None


def test_looking_for_the_newest_changes_nothing(tmp_path: Path):
    build(tmp_path, 10)
    torn_manifest(build(tmp_path, 20))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    newest(tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_another_number_of_workers_is_refused_with_the_one_that_would_do(tmp_path: Path):
    saved = Saved(build(tmp_path, 10, workers=4), cursor=10, workers=4)
    with pytest.raises(ValueError, match=f"workers: got 2, allowed: 4, as {saved.path} was written"):
        restore(SimpleNamespace(dp_world_size=2), saved)
