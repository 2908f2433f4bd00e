"""A checkpoint is committed after its step, or its failure is reported and training continues.

The tests use one rank, real storage, and a list as recorder. test_faults.py has whole stages on Ray.
"""

import resource
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipelines.core import storage
from pipelines.data.consumed import ConsumedSamples
from pipelines.training import checkpoint, fragments
from pipelines.training.checkpoint import SavedCheckpoint
from pipelines.training.fragments import STATES, Fragment
from pipelines.training.hooks import CheckpointHook, StepResult
from pipelines.training.plan import StagePlan
from tests.pipelines import small

LAST = 6

pytestmark = pytest.mark.usefixtures("single_process_group")


@pytest.fixture
def messages() -> list[str]:
    return []


@pytest.fixture
def hook(messages: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CheckpointHook:
    """Build a hook that saves a state of 1 KB every two steps, and a recorder that collects messages."""
    recorder = SimpleNamespace(
        add_message=messages.append,
        sync=lambda: messages.append("synced"),
        record_checkpoint=lambda cursor: None,
    )
    fragment = Fragment("weight", 0, {kind: torch.arange(90.0) for kind in STATES})
    monkeypatch.setattr(fragments, "owned_fragments", lambda engine: [fragment])
    monkeypatch.setattr(fragments, "count_updates", lambda engine: 1)
    plan: Any = StagePlan(
        name="small",
        stage=replace(small.STAGE, save_steps=2, save_total_limit=9),
        model=None,
        seed=0,
        workers=(1, 1),
        run=tmp_path,
        checkpoints=str(tmp_path / "checkpoints"),
        sets={},
        max_bad_fraction=0,
        tokenizer=tmp_path,
        start=None,
        image_size=1,
        image_tokens=1,
    )
    return CheckpointHook(None, plan, recorder, {}, {})


def finish_steps(hook: CheckpointHook, *numbers: int, **flags: Any) -> None:
    """End these steps, with flags of their results."""
    for number in numbers:
        hook.on_step_end(
            StepResult(number, number == LAST, {"loss": float(number)}, ConsumedSamples({}, []), hook.vote(), **flags)
        )


def list_cursors(hook: CheckpointHook) -> list[int]:
    """List the steps of the complete checkpoints, and check that there are no others."""
    found = [
        saved.manifest.cursor
        for saved in checkpoint.list_newest_first(hook.plan.folder)
        if isinstance(saved, SavedCheckpoint)
    ]
    assert len(found) == len(list(Path(hook.plan.folder).glob("*"))), "an incomplete checkpoint is left"
    return found[::-1]


@contextmanager
def full_disk() -> Iterator[None]:
    """Limit files to a few bytes. Writes then fail like on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, hard))  # SIGXFSZ is ignored by Python
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_checkpoints_are_saved_at_their_steps_at_the_last_step_and_on_request(hook: CheckpointHook) -> None:
    finish_steps(hook, 1, 2)
    finish_steps(hook, 3, should_save=True)
    finish_steps(hook, 4, 5, 6)
    assert list_cursors(hook) == [2, 3, 4, 6]
    losses = {saved.manifest.cursor: saved.manifest.loss for saved in checkpoint.list_newest_first(hook.plan.folder)}
    assert losses == {2: 1.5, 3: 3.0, 4: 4.0, 6: 5.5}


def test_a_stop_saves_a_complete_checkpoint(hook: CheckpointHook) -> None:
    finish_steps(hook, 1, 2)
    finish_steps(hook, 3, should_stop=True)
    assert list_cursors(hook) == [2, 3]


def test_the_record_is_flushed_before_a_checkpoint_is_committed(
    hook: CheckpointHook, messages: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = checkpoint.commit
    monkeypatch.setattr(checkpoint, "commit", lambda *args: (messages.append("committed"), commit(*args)))
    finish_steps(hook, 1, 2, 3, 4, 5, 6)
    assert messages == ["synced", "committed"] * 3


def test_a_failed_checkpoint_is_reported_and_the_next_one_succeeds(hook: CheckpointHook, messages: list[str]) -> None:
    finish_steps(hook, 1, 2)
    hook.finish()
    with full_disk():
        finish_steps(hook, 3, 4)
        hook.finish()
        assert list_cursors(hook) == [2]
    finish_steps(hook, 5, 6)
    assert list_cursors(hook) == [2, 6]
    [message] = [text for text in messages if text != "synced"]
    assert message.startswith("small: no checkpoint after step 4: rank 0: ")
    assert "File too large" in message


def test_a_checkpoint_that_cannot_be_committed_is_removed(
    hook: CheckpointHook, messages: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write = storage.write

    def refuse(url: str, data: bytes) -> None:
        if url.endswith("step-000004/manifest.json"):
            raise OSError("no more room")
        write(url, data)

    monkeypatch.setattr(storage, "write", refuse)
    finish_steps(hook, 1, 2, 3, 4, 5)
    hook.finish()
    assert list_cursors(hook) == [2]
    assert messages[-1] == "small: no checkpoint after step 4: no more room"
    finish_steps(hook, 6)
    assert list_cursors(hook) == [2, 6]


def test_a_missing_checkpoint_after_the_last_step_is_an_error(hook: CheckpointHook) -> None:
    with full_disk(), pytest.raises(ValueError, match=r"no checkpoint after step 6: rank 0: .*File too large"):
        finish_steps(hook, 6)


def test_a_failed_removal_of_old_checkpoints_does_not_affect_the_new_one(
    hook: CheckpointHook, messages: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any) -> None:
        raise OSError("not now")

    monkeypatch.setattr(checkpoint, "prune", refuse)
    finish_steps(hook, 5, 6)
    assert list_cursors(hook) == [6]
    assert messages == ["synced", "small: checkpoints before step 6 stay for now: not now"]


def test_steps_do_not_wait_for_uploads(hook: CheckpointHook, monkeypatch: pytest.MonkeyPatch) -> None:
    write, free = storage.write, threading.Event()

    def write_late(url: str, data: bytes) -> None:
        free.wait()
        write(url, data)

    monkeypatch.setattr(storage, "write", write_late)
    finish_steps(hook, 1, 2, 3)
    assert list_cursors(hook) == []
    free.set()
    hook.finish()
    assert list_cursors(hook) == [2]


@pytest.mark.integration
def test_the_watchdog_ends_a_process_that_hangs_and_leaves_its_stacks(tmp_path: Path) -> None:
    program = (
        "import sys, threading; from pathlib import Path; from pipelines.training.hooks import Watchdog\n"
        "watchdog = Watchdog(0.5, Path(sys.argv[1]), 3)\n"
        "def stuck(): threading.Event().wait()\n"
        "stuck()"
    )
    ended = subprocess.run([sys.executable, "-c", program, str(tmp_path)], timeout=100)
    assert ended.returncode == 1
    assert "in stuck" in next(tmp_path.glob("rank-3-*.txt")).read_text()
