"""The newest intact checkpoint is restored bit for bit, whatever damage the others have.

Pieces are cut at random positions, like those of ranks of any layout. test_layouts.py has real layouts.
"""

import json
import random
import re
import shutil
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from pipelines.core import storage
from pipelines.core.storage import Retry
from pipelines.training import checkpoint
from pipelines.training.checkpoint import (
    JOB_FILE,
    MANIFEST,
    DamagedError,
    Manifest,
    RefusedError,
    SavedCheckpoint,
    Upload,
)
from pipelines.training.fragments import STATES, Fragment
from tests.pipelines import ranks

SIZES = {"tower.weight": 211, "tower.bias": 7, "head.weight": 64}
State = dict[str, dict[str, Tensor]]
"""Flat tensors by parameter and state."""

pytestmark = pytest.mark.usefixtures("single_process_group")  # `restore` is a collective


def make_state(seed: int) -> State:
    draw = torch.Generator().manual_seed(seed)
    return {name: {kind: torch.randn(size, generator=draw) for kind in STATES} for name, size in SIZES.items()}


def cut_state(whole: State, stops: dict[str, Sequence[int]]) -> list[Fragment]:
    """Cut the state into fragments that end at these positions and at the end of each parameter."""
    return [
        Fragment(name, start, {kind: tensor[start:stop] for kind, tensor in states.items()})
        for name, states in whole.items()
        for start, stop in zip([0, *stops[name]], [*stops[name], SIZES[name]], strict=True)
    ]


def whole_fragments(whole: State) -> list[Fragment]:
    return cut_state(whole, dict.fromkeys(SIZES, ()))


def draw_cuts(rng: random.Random) -> dict[str, Sequence[int]]:
    return {name: sorted(rng.sample(range(1, size), rng.randrange(6))) for name, size in SIZES.items()}


def save(folder: str, cursor: int, loss: float = 0, whole: State | None = None, parts: int = 3) -> str:
    """Write a checkpoint of `make_state(cursor)` as so many ranks do, and return its URL."""
    url = storage.join(folder, checkpoint.format_step_name(cursor))
    rng = random.Random(cursor)
    pieces = cut_state(whole or make_state(cursor), draw_cuts(rng))
    rng.shuffle(pieces)
    files = {}
    for rank in range(parts):
        files |= Upload(url, rank, pieces[rank::parts]).result()
    checkpoint.commit(url, Manifest(cursor, cursor, parts, loss, {"set": "print"}, {"size": 1}, files), "job")
    return url


def blank_state() -> State:
    return {name: {kind: torch.full((size,), torch.nan) for kind in STATES} for name, size in SIZES.items()}


def are_equal(left: State, right: State) -> bool:
    return all(left[name][kind].equal(right[name][kind]) for name in SIZES for kind in STATES)


def restore(folder: str) -> tuple[int | None, list[str]]:
    """Restore, check the loaded state, and return the cursor and the reasons for which checkpoints were skipped."""
    into = blank_state()
    try:
        manifest, skipped = checkpoint.restore_newest(folder, whole_fragments(into), lambda url, manifest: None)
    except RefusedError as error:  # there are checkpoints, but none can be loaded
        return None, [str(error)]
    assert are_equal(into, make_state(manifest.cursor) if manifest else blank_state()) or not manifest
    return manifest and manifest.cursor, skipped


def read_contents(folder: str) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def list_cursors(folder: str) -> list[int]:
    return [
        saved.manifest.cursor for saved in checkpoint.list_newest_first(folder) if isinstance(saved, SavedCheckpoint)
    ]


@pytest.fixture
def folder(tmp_path: Path) -> str:
    return str(tmp_path / "stage")


# Restore


def test_the_newest_is_restored(folder: str) -> None:
    for cursor in (20, 1_000_000, 3, 999_999):
        save(folder, cursor)
    assert restore(folder) == (1_000_000, [])


def test_a_restart_from_step_0_is_refused_if_all_checkpoints_are_damaged(folder: str) -> None:
    flip_bit(first_file(save(folder, 10)))
    with pytest.raises(RefusedError, match=r"none of its checkpoints can be loaded; .*checksum.*remove them"):
        checkpoint.restore_newest(folder, whole_fragments(blank_state()), lambda url, manifest: None)


def test_without_checkpoints_nothing_is_restored(folder: str) -> None:
    assert restore(folder) == (None, [])
    shutil.move(save(folder, 10), Path(folder) / "model")
    assert restore(folder) == (None, [])


def test_any_fragment_is_assembled_from_pieces_cut_anywhere(folder: str) -> None:
    for seed in range(40):
        rng, whole = random.Random(seed), make_state(seed)
        saved = checkpoint.read_checkpoint(save(folder, seed, parts=rng.randrange(1, 5)))
        wanted = rng.sample(pieces := cut_state(whole, draw_cuts(rng)), rng.randint(1, len(pieces)))
        for fragment, loaded in zip(wanted, checkpoint.load_fragments(saved, wanted), strict=True):
            assert loaded.keys() == fragment.states.keys()
            assert all(loaded[kind].equal(fragment.states[kind]) for kind in STATES)


def test_whole_weights_are_loaded_in_their_shapes(folder: str) -> None:
    saved = checkpoint.read_checkpoint(save(folder, 1))
    shapes = {"head.weight": torch.Size((8, 8)), "tower.bias": torch.Size((7,))}
    weights = checkpoint.load_weights(saved, shapes)
    assert {name: weight.shape for name, weight in weights.items()} == shapes
    assert all(weight.flatten().equal(make_state(1)[name]["weight"]) for name, weight in weights.items())


def test_a_parameter_that_is_not_stored_is_an_error(folder: str) -> None:
    whole = make_state(1)
    del whole["tower.bias"]
    saved = checkpoint.read_checkpoint(save(folder, 1, whole=whole))
    with pytest.raises(DamagedError, match=r"step-000001: tower.bias is missing or incomplete"):
        checkpoint.load_fragments(saved, whole_fragments(make_state(1)))


def test_files_have_at_most_max_file_bytes_except_for_a_larger_piece(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "MAX_FILE_BYTES", 600)
    files = checkpoint.read_checkpoint(save(folder, 1, parts=1)).manifest.files
    assert len(files) > 5
    for entry in files.values():
        assert sum(4 * length for *_, length in entry.pieces) <= 600 or len(entry.pieces) == 1
    assert restore(folder) == (1, [])


def test_a_manifest_equals_itself_after_a_round_trip() -> None:
    entry = checkpoint.FileEntry(5, "e3", [("a.b", "weight", 0, 3), ("a.b", "exp_avg", 3, 9)])
    for loss in (0.1, 3.0, float("inf")):
        manifest = Manifest(12, 11, 4, loss, {"set": "é"}, {"a": {"b": [1, None]}}, {"x": entry, "y": entry})
        assert Manifest.from_json(manifest.to_json().encode()) == manifest


# Damage


def first_file(url: str) -> Path:
    return min(Path(url).glob("*.safetensors"))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_bit(path: Path, at: int = -1, bit: int = 1) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= bit
    path.write_bytes(data)


def copy_other_manifest(url: str) -> None:
    shutil.copy(Path(save(str(Path(url).parent / "elsewhere"), 7)) / MANIFEST, Path(url) / MANIFEST)


DAMAGE: dict[str, tuple[Callable[[str], object], str]] = {
    "no manifest": (lambda url: (Path(url) / MANIFEST).unlink(), "no manifest.json"),
    "an empty manifest": (lambda url: (Path(url) / MANIFEST).write_text(""), "manifest.json cannot be read"),
    "a truncated manifest": (lambda url: truncate(Path(url) / MANIFEST), "manifest.json cannot be read"),
    "a manifest without fields": (lambda url: (Path(url) / MANIFEST).write_text("[]"), "manifest.json cannot be read"),
    "a manifest of another step": (copy_other_manifest, "manifest.json is that of step-000007"),
    "a missing file": (lambda url: first_file(url).unlink(), "rank-0000-00.safetensors is missing"),
    "a renamed file": (
        lambda url: first_file(url).rename(Path(url) / "rank-0009-00.safetensors"),
        "rank-0000-00.safetensors is missing",
    ),
    "a truncated file": (lambda url: truncate(first_file(url)), r"rank-0000-00.safetensors: \d+ bytes"),
    "an empty file": (lambda url: first_file(url).write_bytes(b""), "rank-0000-00.safetensors: 0 bytes"),
    "a flipped bit": (lambda url: flip_bit(first_file(url)), "rank-0000-00.safetensors: its checksum differs"),
    "an empty folder": (lambda url: (shutil.rmtree(url), Path(url).mkdir()), "no manifest.json"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_skipped_with_the_reason_and_left_unchanged(folder: str, damage: str) -> None:
    work, reason = DAMAGE[damage]
    good, bad = save(folder, 10), save(folder, 20)
    work(bad)
    before = read_contents(folder)
    cursor, [message] = restore(folder)
    assert cursor == 10
    assert message.startswith(f"{bad}")
    assert re.search(reason, message), message
    work(good)
    cursor, messages = restore(folder)
    assert cursor is None
    assert all(good in message or bad in message for message in messages)
    assert before.items() >= {path: data for path, data in read_contents(folder).items() if bad in str(path)}.items()


def test_every_flipped_bit_of_weights_or_manifest_is_found(folder: str) -> None:
    url, rng = save(folder, 10), random.Random(0)
    for path in Path(url).iterdir():
        if path.name == JOB_FILE:  # for people to read
            continue
        whole = path.read_bytes()
        for _ in range(60):
            flip_bit(path, rng.randrange(len(whole)), 1 << rng.randrange(8))
            cursor, [message] = restore(folder)
            assert cursor is None
            assert path.name in message
            path.write_bytes(whole)
    assert restore(folder) == (10, [])


def test_files_that_are_not_in_the_manifest_are_ignored(folder: str) -> None:
    """Leftovers of an earlier write by more ranks, after an interruption between manifest and removal."""
    shutil.copy(first_file(url := save(folder, 10)), Path(url) / "rank-0077-00.safetensors")
    assert restore(folder) == (10, [])
    save(folder, 10)
    assert not (Path(url) / "rank-0077-00.safetensors").exists()


def restore_one_parameter(folder: str) -> tuple[int | None, list[str], bool]:
    """Restore on this rank, which needs only one of the parameters."""
    into = blank_state()
    local = [part for part in whole_fragments(into) if part.name == ("tower.weight", "head.weight")[dist.get_rank()]]
    manifest, skipped = checkpoint.restore_newest(folder, local, lambda url, manifest: None)
    assert manifest
    expected = make_state(manifest.cursor)
    return (
        manifest.cursor,
        skipped,
        all(part.states[kind].equal(expected[part.name][kind]) for part in local for kind in STATES),
    )


@pytest.mark.integration
def test_a_checkpoint_that_one_rank_finds_damaged_is_skipped_by_all(folder: str, tmp_path: Path) -> None:
    for cursor in (10, 20, 30):
        url = storage.join(folder, checkpoint.format_step_name(cursor))
        files: dict[str, Any] = {}
        for number, fragment in enumerate(whole_fragments(make_state(cursor))):
            files |= Upload(url, number, [fragment]).result()
        checkpoint.commit(url, Manifest(cursor, cursor, 3, 0, {}, {}, files), "job")
    flip_bit(Path(folder) / "step-000030" / "rank-0000-00.safetensors")  # tower.weight
    flip_bit(Path(folder) / "step-000020" / "rank-0002-00.safetensors")  # head.weight
    for cursor, skipped, is_equal in ranks.run_on_ranks(tmp_path, 2, restore_one_parameter, folder):
        assert (cursor, is_equal) == (10, True)
        assert ["rank-0000" in skipped[0], "rank-0002" in skipped[1]] == [True, True]
        assert len(skipped) == 2


# Other data, another model


def test_other_data_or_another_model_is_refused_unless_allowed() -> None:
    manifest = Manifest(1, 1, 1, 0, {"a": "one", "b": "two"}, {"config": {"size": 4, "heads": {"count": 2}}}, {})
    data, model = manifest.data, manifest.model
    checkpoint.check_compatible("url", manifest, False, data, model)
    other = {"config": {"size": 4, "heads": {"count": 3}}}
    with pytest.raises(
        ValueError, match=r"^url: it was written with model.config.heads.count = 2, not 3; .*--allow-changes"
    ):
        checkpoint.check_compatible("url", manifest, False, data, other)
    with pytest.raises(ValueError, match=r"^url: it was written with data.b = 'two', not 'three'"):
        checkpoint.check_compatible("url", manifest, False, data | {"b": "three"}, model)
    with pytest.raises(ValueError, match=r"^url: it was written with data.c = None, not 'more'"):
        checkpoint.check_compatible("url", manifest, False, data | {"c": "more"}, model)
    checkpoint.check_compatible("url", manifest, True, data | {"b": "three"}, other)


def test_a_refused_checkpoint_is_not_loaded(folder: str) -> None:
    save(folder, 10)
    into = blank_state()

    def refuse(url: str, manifest: Manifest) -> None:
        raise ValueError(url)

    with pytest.raises(ValueError, match="step-000010"):
        checkpoint.restore_newest(folder, whole_fragments(into), refuse)
    assert all(tensor.isnan().all() for states in into.values() for tensor in states.values())


# Pruning


@pytest.mark.parametrize(
    ("last", "best", "remaining"),
    [(1, 0, [50]), (3, 0, [50, 40, 30]), (1, 1, [50, 20]), (2, 3, [50, 40, 20, 10]), (9, 9, None)],
)
def test_pruning_keeps_the_newest_and_those_with_the_lowest_loss(
    folder: str, last: int, best: int, remaining: list[int] | None
) -> None:
    for cursor, loss in {10: 2.0, 20: 1.0, 30: 5.0, 40: 4.0, 50: 3.0}.items():
        save(folder, cursor, loss)
    checkpoint.prune(folder, 50, last, best)
    assert list_cursors(folder) == (remaining or [50, 40, 30, 20, 10])
    assert sorted(path.name for path in Path(folder).iterdir()) == sorted(
        map(checkpoint.format_step_name, list_cursors(folder))
    )


def test_pruning_keeps_newer_folders_and_removes_older_incomplete_ones(folder: str) -> None:
    for cursor in (10, 20, 30, 40):
        save(folder, cursor)
    for cursor in (20, 40):
        (Path(folder) / checkpoint.format_step_name(cursor) / MANIFEST).unlink()
    checkpoint.prune(folder, 30, 2, 0)
    assert sorted(path.name for path in Path(folder).iterdir()) == ["step-000010", "step-000030", "step-000040"]


def test_a_newer_damaged_checkpoint_does_not_count_as_kept(folder: str) -> None:
    flip_bit(first_file(save(folder, 40)))
    assert restore(folder)[0] is None
    for cursor in (10, 20):
        save(folder, cursor)
        checkpoint.prune(folder, cursor, 1, 1)
        assert restore(folder)[0] == cursor


def test_only_folders_without_a_manifest_are_removed_as_incomplete(folder: str) -> None:
    for cursor in (10, 20, 30):
        save(folder, cursor)
    (Path(folder) / "step-000020" / MANIFEST).unlink()
    (Path(folder) / "model").mkdir()
    truncate(Path(folder) / "step-000030" / MANIFEST)
    flip_bit(first_file(str(Path(folder) / "step-000010")))
    before = read_contents(folder)
    checkpoint.remove_incomplete(folder)
    assert read_contents(folder) == {path: data for path, data in before.items() if "step-000020" not in str(path)}
    assert sorted(path.name for path in Path(folder).iterdir()) == ["model", "step-000010", "step-000030"]


# Faults of the storage


PASSING = ("SlowDown", "InternalError", "stall", "drop")


@pytest.fixture
def short_read_timeout(fast: Retry, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten the read timeout, so that a stall costs less than half a second."""
    monkeypatch.setattr(storage, "RETRY", replace(fast, tries=20, read_timeout_s=0.4))


@pytest.mark.usefixtures("short_read_timeout")
@pytest.mark.parametrize("seed", [0, 1])
def test_transient_faults_do_not_change_a_saved_or_restored_checkpoint(proxy: Any, bucket: str, seed: int) -> None:
    rng = random.Random(seed)

    def mix_faults(kinds: Sequence[str]) -> deque[str]:
        return deque(rng.sample(faults := [*kinds, *kinds, ""] * 2, len(faults)))

    save(bucket, 10)
    proxy.faults = mix_faults(PASSING)
    save(bucket, 20)
    assert list_cursors(bucket) == [20, 10]
    before = len(proxy.asked)
    proxy.faults = mix_faults((*PASSING, "cut"))
    assert restore(bucket) == (20, [])
    assert len(proxy.asked) > before
    proxy.clear()
    checkpoint.prune(bucket, 20, 1, 0)
    assert restore(bucket) == (20, [])
    assert storage.list_folders(bucket) == ["step-000020"]


@pytest.mark.usefixtures("fast")
def test_an_unreachable_store_is_an_error_and_not_damage(
    proxy: Any, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "RETRY", replace(storage.RETRY, tries=2))
    for cursor in (10, 20):
        save(bucket, cursor)
    proxy.asked.clear()
    assert restore(bucket) == (20, [])
    for served in range(len(proxy.asked)):
        proxy.faults, proxy.always = deque([""] * served), "SlowDown"
        with pytest.raises(OSError, match="given up after 2 tries"):
            restore(bucket)
        proxy.clear()
        assert restore(bucket) == (20, [])


@pytest.mark.usefixtures("fast")
def test_a_failed_upload_reports_its_error_and_makes_no_checkpoint(proxy: Any, bucket: str) -> None:
    save(bucket, 10)
    proxy.always = "SlowDown"
    upload = Upload(storage.join(bucket, checkpoint.format_step_name(20)), 3, whole_fragments(make_state(20)))
    assert upload.error().text.startswith(
        f"rank 3: {bucket}/step-000020/rank-0003-00.safetensors: given up after 8 tries"
    )
    assert upload.is_done
    proxy.clear()
    assert restore(bucket) == (10, [])


def test_an_upload_contains_the_state_at_its_start(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, url = make_state(10), storage.join(folder, checkpoint.format_step_name(10))
    write, changed = storage.write, threading.Event()

    def write_late(url: str, data: bytes) -> None:
        changed.wait()
        write(url, data)

    monkeypatch.setattr(storage, "write", write_late)
    upload = Upload(url, 0, whole_fragments(whole))
    for states in whole.values():
        for tensor in states.values():
            tensor.zero_()
    changed.set()
    files = upload.result()
    checkpoint.commit(url, Manifest(10, 10, 1, 0, {}, {}, files), "job")
    assert json.loads((Path(url) / MANIFEST).read_text())["manifest"]["cursor"] == 10
    assert restore(folder) == (10, [])
