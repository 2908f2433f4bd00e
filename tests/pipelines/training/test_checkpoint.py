"""Of many checkpoints the newest whole one is restored, however the others were torn, and with its very bits.

Pieces are cut anywhere, as if by ranks of any layout; real layouts are in test_layouts.py.
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
from pipelines.training.checkpoint import JOB, MANIFEST, DamagedError, Manifest, RefusedError, Saved, Upload
from pipelines.training.fragments import STATES, Fragment
from tests.pipelines import ranks

SIZES = {"tower.weight": 211, "tower.bias": 7, "head.weight": 64}
State = dict[str, dict[str, Tensor]]
"""Flat tensors by parameter and state."""

pytestmark = pytest.mark.usefixtures("alone")  # `restore` is a collective


def state(seed: int) -> State:
    draw = torch.Generator().manual_seed(seed)
    return {name: {one: torch.randn(size, generator=draw) for one in STATES} for name, size in SIZES.items()}


def cut(whole: State, stops: dict[str, Sequence[int]]) -> list[Fragment]:
    """The whole in fragments that end at these places and at each parameter's end."""
    return [
        Fragment(name, start, {one: tensor[start:stop] for one, tensor in states.items()})
        for name, states in whole.items()
        for start, stop in zip([0, *stops[name]], [*stops[name], SIZES[name]], strict=True)
    ]


def uncut(whole: State) -> list[Fragment]:
    return cut(whole, dict.fromkeys(SIZES, ()))


def anywhere(chance: random.Random) -> dict[str, Sequence[int]]:
    return {name: sorted(chance.sample(range(1, size), chance.randrange(6))) for name, size in SIZES.items()}


def save(folder: str, cursor: int, loss: float = 0, whole: State | None = None, parts: int = 3) -> str:
    """A checkpoint as that many ranks leave it; its state is that of `state(cursor)`."""
    url = storage.join(folder, checkpoint.name(cursor))
    chance = random.Random(cursor)
    pieces = cut(whole or state(cursor), anywhere(chance))
    chance.shuffle(pieces)
    files = {}
    for rank in range(parts):
        files |= Upload(url, rank, pieces[rank::parts]).result()
    checkpoint.commit(url, Manifest(cursor, cursor, parts, loss, {"set": "print"}, {"size": 1}, files), "job")
    return url


def blank() -> State:
    return {name: {one: torch.full((size,), torch.nan) for one in STATES} for name, size in SIZES.items()}


def same(one: State, other: State) -> bool:
    return all(one[name][each].equal(other[name][each]) for name in SIZES for each in STATES)


def restored(folder: str) -> tuple[int | None, list[str]]:
    """The cursor that is restored, and why newer ones were not; what comes is what was saved there."""
    into = blank()
    try:
        manifest, passed = checkpoint.restore(folder, uncut(into), lambda url, manifest: None)
    except RefusedError as error:  # there are some, and none that can be loaded
        return None, [str(error)]
    assert same(into, state(manifest.cursor) if manifest else blank()) or not manifest
    return manifest and manifest.cursor, passed


def contents(folder: str) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def cursors(folder: str) -> list[int]:
    return [one.manifest.cursor for one in checkpoint.list_newest_first(folder) if isinstance(one, Saved)]


@pytest.fixture
def folder(tmp_path: Path) -> str:
    return str(tmp_path / "stage")


# What is restored


def test_of_many_the_newest_is_restored(folder: str) -> None:
    for cursor in (20, 1_000_000, 3, 999_999):
        save(folder, cursor)
    assert restored(folder) == (1_000_000, [])


def test_a_start_from_nothing_beside_damaged_ones_must_be_wanted(folder: str) -> None:
    flip(first_file(save(folder, 10)))
    with pytest.raises(RefusedError, match=r"none of its checkpoints can be loaded; .*checksum.*remove them"):
        checkpoint.restore(folder, uncut(blank()), lambda url, manifest: None)


def test_where_there_is_none_nothing_is_restored(folder: str) -> None:
    assert restored(folder) == (None, [])
    shutil.move(save(folder, 10), Path(folder) / "model")
    assert restored(folder) == (None, [])


def test_any_fragment_comes_from_pieces_cut_anywhere(folder: str) -> None:
    for seed in range(40):
        chance, whole = random.Random(seed), state(seed)
        saved = checkpoint.read(save(folder, seed, parts=chance.randrange(1, 5)))
        wanted = chance.sample(pieces := cut(whole, anywhere(chance)), chance.randint(1, len(pieces)))
        for fragment, loaded in zip(wanted, checkpoint.load(saved, wanted), strict=True):
            assert loaded.keys() == fragment.states.keys()
            assert all(loaded[one].equal(fragment.states[one]) for one in STATES)


def test_the_trained_weights_come_whole_and_in_their_shapes(folder: str) -> None:
    saved = checkpoint.read(save(folder, 1))
    shapes = {"head.weight": torch.Size((8, 8)), "tower.bias": torch.Size((7,))}
    weights = checkpoint.weights(saved, shapes)
    assert {name: one.shape for name, one in weights.items()} == shapes
    assert all(one.flatten().equal(state(1)[name]["weight"]) for name, one in weights.items())


def test_what_a_checkpoint_does_not_hold_is_not_made_up(folder: str) -> None:
    whole = state(1)
    del whole["tower.bias"]
    saved = checkpoint.read(save(folder, 1, whole=whole))
    with pytest.raises(DamagedError, match=r"step-000001: tower.bias is not there, or not all of it"):
        checkpoint.load(saved, uncut(state(1)))


def test_files_hold_at_most_so_many_bytes_of_tensors_but_for_a_larger_piece(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "MAX_FILE_BYTES", 600)
    files = checkpoint.read(save(folder, 1, parts=1)).manifest.files
    assert len(files) > 5
    for about in files.values():
        assert sum(4 * length for *_, length in about.pieces) <= 600 or len(about.pieces) == 1
    assert restored(folder) == (1, [])


def test_a_manifest_is_read_as_it_was_written() -> None:
    about = checkpoint.File(5, "e3", [("a.b", "weight", 0, 3), ("a.b", "exp_avg", 3, 9)])
    for loss in (0.1, 3.0, float("inf")):
        manifest = Manifest(12, 11, 4, loss, {"set": "é"}, {"a": {"b": [1, None]}}, {"x": about, "y": about})
        assert Manifest.from_json(manifest.to_json().encode()) == manifest


# What is passed over


def first_file(url: str) -> Path:
    return min(Path(url).glob("*.safetensors"))


def torn(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path, at: int = -1, bit: int = 1) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= bit
    path.write_bytes(data)


def another_step(url: str) -> None:
    shutil.copy(Path(save(str(Path(url).parent / "elsewhere"), 7)) / MANIFEST, Path(url) / MANIFEST)


DAMAGE: dict[str, tuple[Callable[[str], object], str]] = {
    "no manifest": (lambda url: (Path(url) / MANIFEST).unlink(), "no manifest.json"),
    "an empty manifest": (lambda url: (Path(url) / MANIFEST).write_text(""), "manifest.json cannot be read"),
    "a torn manifest": (lambda url: torn(Path(url) / MANIFEST), "manifest.json cannot be read"),
    "a manifest of nothing": (lambda url: (Path(url) / MANIFEST).write_text("[]"), "manifest.json cannot be read"),
    "a manifest of another step": (another_step, "manifest.json is that of step-000007"),
    "a missing file": (lambda url: first_file(url).unlink(), "rank-0000-00.safetensors: not found"),
    "a renamed file": (
        lambda url: first_file(url).rename(Path(url) / "rank-0009-00.safetensors"),
        "rank-0000-00.safetensors: not found",
    ),
    "a truncated file": (lambda url: torn(first_file(url)), r"rank-0000-00.safetensors: \d+ bytes"),
    "an empty file": (lambda url: first_file(url).write_bytes(b""), "rank-0000-00.safetensors: 0 bytes"),
    "a flipped bit": (lambda url: flip(first_file(url)), "rank-0000-00.safetensors: .* another checksum"),
    "nothing in it": (lambda url: (shutil.rmtree(url), Path(url).mkdir()), "no manifest.json"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_one_with_damage_is_passed_over_with_the_reason_and_left_as_it_is(folder: str, damage: str) -> None:
    work, reason = DAMAGE[damage]
    good, bad = save(folder, 10), save(folder, 20)
    work(bad)
    before = contents(folder)
    cursor, [why] = restored(folder)
    assert cursor == 10
    assert why.startswith(f"{bad}")
    assert re.search(reason, why), why
    work(good)
    cursor, whys = restored(folder)
    assert cursor is None
    assert all(good in why or bad in why for why in whys)
    assert before.items() >= {path: data for path, data in contents(folder).items() if bad in str(path)}.items()


def test_no_flipped_bit_of_weights_or_manifest_goes_unseen(folder: str) -> None:
    url, chance = save(folder, 10), random.Random(0)
    for path in Path(url).iterdir():
        if path.name == JOB:  # for people to read
            continue
        whole = path.read_bytes()
        for _ in range(60):
            flip(path, chance.randrange(len(whole)), 1 << chance.randrange(8))
            cursor, [why] = restored(folder)
            assert cursor is None
            assert path.name in why
            path.write_bytes(whole)
    assert restored(folder) == (10, [])


def test_files_that_the_manifest_does_not_name_change_nothing(folder: str) -> None:
    """They are those of a writing before, by more ranks, if this one ended between its manifest and their removal."""
    shutil.copy(first_file(url := save(folder, 10)), Path(url) / "rank-0077-00.safetensors")
    assert restored(folder) == (10, [])
    save(folder, 10)
    assert not (Path(url) / "rank-0077-00.safetensors").exists()


def one_sees_damage(folder: str) -> tuple[int | None, list[str], bool]:
    """On a rank, which wants one of the parameters."""
    into = blank()
    mine = [one for one in uncut(into) if one.name == ("tower.weight", "head.weight")[dist.get_rank()]]
    manifest, passed = checkpoint.restore(folder, mine, lambda url, manifest: None)
    assert manifest
    expected = state(manifest.cursor)
    return (
        manifest.cursor,
        passed,
        all(one.states[each].equal(expected[one.name][each]) for one in mine for each in STATES),
    )


def test_what_one_rank_finds_damaged_all_pass_over(folder: str, tmp_path: Path) -> None:
    for cursor in (10, 20, 30):
        url = storage.join(folder, checkpoint.name(cursor))
        files: dict[str, Any] = {}
        for number, fragment in enumerate(uncut(state(cursor))):
            files |= Upload(url, number, [fragment]).result()
        checkpoint.commit(url, Manifest(cursor, cursor, 3, 0, {}, {}, files), "job")
    flip(Path(folder) / "step-000030" / "rank-0000-00.safetensors")  # tower.weight
    flip(Path(folder) / "step-000020" / "rank-0002-00.safetensors")  # head.weight
    for cursor, passed, right in ranks.run(tmp_path, 2, one_sees_damage, folder):
        assert (cursor, right) == (10, True)
        assert ["rank-0000" in passed[0], "rank-0002" in passed[1]] == [True, True]
        assert len(passed) == 2


# Other data, another model


def test_other_data_or_another_model_is_refused_unless_it_is_meant() -> None:
    manifest = Manifest(1, 1, 1, 0, {"a": "one", "b": "two"}, {"config": {"size": 4, "heads": {"count": 2}}}, {})
    data, model = manifest.data, manifest.model
    checkpoint.agree("url", manifest, False, data, model)
    other = {"config": {"size": 4, "heads": {"count": 3}}}
    with pytest.raises(
        ValueError, match=r"^url: it was written with model.config.heads.count = 2, not 3; .*--allow-changes"
    ):
        checkpoint.agree("url", manifest, False, data, other)
    with pytest.raises(ValueError, match=r"^url: it was written with data.b = 'two', not 'three'"):
        checkpoint.agree("url", manifest, False, data | {"b": "three"}, model)
    with pytest.raises(ValueError, match=r"^url: it was written with data.c = None, not 'more'"):
        checkpoint.agree("url", manifest, False, data | {"c": "more"}, model)
    checkpoint.agree("url", manifest, True, data | {"b": "three"}, other)


def test_what_is_refused_is_not_loaded(folder: str) -> None:
    save(folder, 10)
    into = blank()

    def refuse(url: str, manifest: Manifest) -> None:
        raise ValueError(url)

    with pytest.raises(ValueError, match="step-000010"):
        checkpoint.restore(folder, uncut(into), refuse)
    assert all(tensor.isnan().all() for states in into.values() for tensor in states.values())


# What goes


@pytest.mark.parametrize(
    ("last", "best", "left"),
    [(1, 0, [50]), (3, 0, [50, 40, 30]), (1, 1, [50, 20]), (2, 3, [50, 40, 20, 10]), (9, 9, None)],
)
def test_the_newest_and_those_of_lowest_loss_stay(folder: str, last: int, best: int, left: list[int] | None) -> None:
    for cursor, loss in {10: 2.0, 20: 1.0, 30: 5.0, 40: 4.0, 50: 3.0}.items():
        save(folder, cursor, loss)
    checkpoint.prune(folder, 50, last, best)
    assert cursors(folder) == (left or [50, 40, 30, 20, 10])
    assert sorted(path.name for path in Path(folder).iterdir()) == sorted(map(checkpoint.name, cursors(folder)))


def test_one_that_is_being_written_stays_and_older_ones_that_never_were_go(folder: str) -> None:
    for cursor in (10, 20, 30, 40):
        save(folder, cursor)
    for cursor in (20, 40):
        (Path(folder) / checkpoint.name(cursor) / MANIFEST).unlink()
    checkpoint.prune(folder, 30, 2, 0)
    assert sorted(path.name for path in Path(folder).iterdir()) == ["step-000010", "step-000030", "step-000040"]


def test_a_newer_one_that_was_passed_over_takes_no_whole_one_s_place(folder: str) -> None:
    flip(first_file(save(folder, 40)))
    assert restored(folder)[0] is None
    for cursor in (10, 20):
        save(folder, cursor)
        checkpoint.prune(folder, cursor, 1, 1)
        assert restored(folder)[0] == cursor


def test_clearing_removes_what_has_no_manifest_and_nothing_else(folder: str) -> None:
    for cursor in (10, 20, 30):
        save(folder, cursor)
    (Path(folder) / "step-000020" / MANIFEST).unlink()
    (Path(folder) / "model").mkdir()
    torn(Path(folder) / "step-000030" / MANIFEST)
    flip(first_file(str(Path(folder) / "step-000010")))
    before = contents(folder)
    checkpoint.clear(folder)
    assert contents(folder) == {path: data for path, data in before.items() if "step-000020" not in str(path)}
    assert sorted(path.name for path in Path(folder).iterdir()) == ["model", "step-000010", "step-000030"]


# Storage at fault


PASSING = ("SlowDown", "InternalError", "stall", "drop")


@pytest.fixture
def impatient(fast: Retry, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stall costs less than half a second."""
    monkeypatch.setattr(storage, "RETRY", replace(fast, tries=20, read_timeout_s=0.4))


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("seed", [0, 1])
def test_through_faults_that_pass_a_checkpoint_is_whole_and_comes_back_bit_by_bit(
    proxy: Any, bucket: str, seed: int
) -> None:
    chance = random.Random(seed)

    def some(kinds: Sequence[str]) -> deque[str]:
        return deque(chance.sample(mixed := [*kinds, *kinds, ""] * 2, len(mixed)))

    save(bucket, 10)
    proxy.faults = some(PASSING)
    save(bucket, 20)
    assert cursors(bucket) == [20, 10]
    asked = len(proxy.asked)
    proxy.faults = some((*PASSING, "cut"))
    assert restored(bucket) == (20, [])
    assert len(proxy.asked) > asked
    proxy.clear()
    checkpoint.prune(bucket, 20, 1, 0)
    assert restored(bucket) == (20, [])
    assert storage.list_folders(bucket) == ["step-000020"]


@pytest.mark.usefixtures("fast")
def test_a_store_that_gives_up_anywhere_is_no_damage_and_the_next_try_restores(
    proxy: Any, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "RETRY", replace(storage.RETRY, tries=2))
    for cursor in (10, 20):
        save(bucket, cursor)
    proxy.asked.clear()
    assert restored(bucket) == (20, [])
    for served in range(len(proxy.asked)):
        proxy.faults, proxy.always = deque([""] * served), "SlowDown"
        with pytest.raises(OSError, match="given up after 2 tries"):
            restored(bucket)
        proxy.clear()
        assert restored(bucket) == (20, [])


@pytest.mark.usefixtures("fast")
def test_an_upload_that_storage_does_not_take_says_so_and_makes_no_checkpoint(proxy: Any, bucket: str) -> None:
    save(bucket, 10)
    proxy.always = "SlowDown"
    upload = Upload(storage.join(bucket, checkpoint.name(20)), 3, uncut(state(20)))
    assert upload.error().text.startswith(
        f"rank 3: {bucket}/step-000020/rank-0003-00.safetensors: given up after 8 tries"
    )
    assert upload.done
    assert upload.failed
    proxy.clear()
    assert restored(bucket) == (10, [])


def test_what_is_uploaded_is_the_state_when_it_began(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, url = state(10), storage.join(folder, checkpoint.name(10))
    write, changed = storage.write, threading.Event()

    def write_late(url: str, data: bytes) -> None:
        changed.wait()
        write(url, data)

    monkeypatch.setattr(storage, "write", write_late)
    upload = Upload(url, 0, uncut(whole))
    for states in whole.values():
        for tensor in states.values():
            tensor.zero_()
    changed.set()
    files = upload.result()
    checkpoint.commit(url, Manifest(10, 10, 1, 0, {}, {}, files), "job")
    assert json.loads((Path(url) / MANIFEST).read_text())["manifest"]["cursor"] == 10
    assert restored(folder) == (10, [])
