"""A run without progress ends with the reason; a run with progress continues; each message is delivered once.

The class runs in this process. In test_faults.py it runs as an actor.
"""

import json
import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipelines.core.failures import Failure, Kind
from pipelines.data import consumed
from pipelines.data.consumed import ConsumedSamples
from pipelines.training import ledger, metrics, trackers
from pipelines.training.recorder import WAIT, Recorder, RecorderSettings, StageStatus

ENTRY = {"set": "a", "index": 0, "scheduled": 1, "used": 2, "reason": "broken image"}
LOST_FAILURE = Failure(Kind.LOST, "OSError: away")


@pytest.fixture
def settings(tmp_path: Path) -> RecorderSettings:
    return RecorderSettings(
        run=tmp_path, stage="tower", job_name="job", job={}, trackers=(), restarts=2, max_replaced=3, max_skipped=1
    )


@pytest.fixture
def new(settings: RecorderSettings) -> Iterator[Callable[..., Recorder]]:
    made: list[Recorder] = []

    def make(**changes: Any) -> Recorder:
        made.append(Recorder(replace(settings, **changes)))
        return made[-1]

    yield make
    for recorder in made:
        recorder.close("stop")


def do(recorder: Recorder, *steps: int, replaced: int = 0, **values: float) -> list[bool]:
    """Write steps and return the answers of the recorder."""
    whole = {"loss": 1.0, "skipped": 0, "replaced": replaced, "data_s": 0.1, "compute_s": 0.2, "stall_s": 0.0} | values
    used = ConsumedSamples({"a": [1]}, [ENTRY] * replaced)
    for name in ("learning_rate", "grad_norm", "samples", "tokens"):
        whole.setdefault(name, 1)
    return [recorder.write_step(step, whole, used) for step in steps]


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_late_steps_of_lost_workers_are_ignored(new: Callable[..., Recorder], settings: RecorderSettings) -> None:
    recorder = new()
    recorder.begin(0, 2, 0, 1.0, [], "")
    do(recorder, 1, 2, 3)
    recorder.begin(0, 2, 1, 1.0, [], "")
    do(recorder, 4, loss=7.0)
    do(recorder, 2, 3)
    recorder.close("end")
    steps = [(entry["step"], entry["loss"]) for entry in lines(settings.run / metrics.METRICS_FILE)]
    assert steps == [(1, 1.0), (2, 1.0), (3, 1.0)]


# Starts


def test_workers_that_start_early_wait_for_their_stage(settings: RecorderSettings) -> None:
    recorder = Recorder()
    assert recorder.find_stage(-1) == WAIT
    recorder.record_fault({0: LOST_FAILURE})
    assert recorder.poll() == StageStatus(0, None, [], "")
    recorder.open_stage(settings, "work")
    assert recorder.find_stage(-1) == 0
    assert recorder.get_work() == "work"
    recorder.close("stop")


def test_consecutive_faults_without_progress_end_the_run(new: Callable[..., Recorder]) -> None:
    recorder = new()
    assert recorder.begin(0, 2, 0, 1.0, [], "") is not None
    do(recorder, 1, 2, 3)
    for why in ("RuntimeError: out of luck", "OSError: away"):
        recorder.record_fault({1: Failure(Kind.LOST, why)})
        assert recorder.begin(0, 2, 2, 1.0, [], "") is not None
        do(recorder, 3)
    recorder.record_fault({0: Failure(Kind.LOST, "OSError: away")})
    expected = (
        "train.tower: 3 faults in a row without a step beyond 3, allowed: 2, recovery.restarts; the last: "
        "rank 0: OSError: away; the checkpoint after step 2 is safe; the same command continues from there"
    )
    assert recorder.poll().failed == expected
    assert recorder.find_stage(-1) is None
    assert recorder.begin(0, 2, 2, 1.0, [], "") is None


def test_faults_before_any_start_end_the_run_too(new: Callable[..., Recorder]) -> None:
    """Workers that are killed while they build the model never begin."""
    recorder = new(restarts=1)
    recorder.record_fault({0: LOST_FAILURE})
    assert not recorder.poll().failed
    recorder.record_fault({0: LOST_FAILURE})
    assert "without a step beyond 0" in recorder.poll().failed


def test_progress_resets_the_count_of_faults(new: Callable[..., Recorder]) -> None:
    recorder = new()
    for step in range(1, 20):
        for _ in range(2):
            assert recorder.begin(0, 2, step - 1, 1.0, [], "") is not None
            recorder.record_fault({0: LOST_FAILURE})
        assert recorder.begin(0, 2, step - 1, 1.0, [], "") is not None
        do(recorder, step)
    assert not recorder.poll().failed


def test_a_permanent_failure_is_not_retried(new: Callable[..., Recorder]) -> None:
    """The reported rank has the cause; the others only lost their connection to it."""
    recorder = new(restarts=9)
    assert recorder.begin(0, 2, 0, 1.0, [], "") is not None
    do(recorder, 1)
    recorder.record_checkpoint(1)
    recorder.record_fault({0: LOST_FAILURE, 1: Failure(Kind.PERMANENT, "/data: No space left on device")})
    status = recorder.poll()
    assert status.failed == (
        "train.tower: rank 1: /data: No space left on device; "
        "the checkpoint after step 1 is safe; the same command continues from there"
    )
    assert status.messages == [], "it is not also a message"


def test_the_same_error_at_the_same_step_is_tried_once_more(new: Callable[..., Recorder]) -> None:
    def fault(number: int) -> str:
        recorder.record_fault(
            {0: LOST_FAILURE, 1: Failure(Kind.RAISED, f"RuntimeError: {number}.5 GiB at 0x{number:x}")}
        )
        return recorder.poll().failed

    recorder = new(restarts=9)
    recorder.begin(0, 2, 0, 1.0, [], "")
    do(recorder, 1, 2, 3)
    assert not fault(1)
    recorder.begin(0, 2, 0, 1.0, [], "")
    do(recorder, 1, 2)
    assert not fault(2), "at another step it may be a fault of a machine"
    recorder.begin(0, 2, 0, 1.0, [], "")
    do(recorder, 1, 2)
    assert "the same fault twice after step 2: rank 1: RuntimeError: 3.5 GiB" in fault(3)


def test_other_errors_at_the_same_step_and_lost_workers_are_tried_again(new: Callable[..., Recorder]) -> None:
    recorder = new(restarts=9)
    recorder.begin(0, 2, 0, 1.0, [], "")
    for kind, text in [(Kind.RAISED, "a"), (Kind.RAISED, "b"), (Kind.LOST, "killed"), (Kind.LOST, "killed")]:
        recorder.record_fault({0: Failure(kind, text)})
        assert recorder.find_stage(-1) is not None


def test_a_fault_is_reported_if_the_ledger_cannot_be_written(
    new: Callable[..., Recorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = new()

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(ledger, "append_event", full)
        recorder.record_fault({0: Failure(Kind.PERMANENT, "no room")})
    assert "no room" in recorder.poll().failed


def test_starts_without_a_fault_are_not_counted(new: Callable[..., Recorder]) -> None:
    """Joining and leaving machines also restart the workers."""
    recorder = new(restarts=0)
    for _ in range(9):
        assert recorder.begin(0, 2, 40, 1.0, [], "") is not None


def test_a_new_launch_does_not_reset_an_exceeded_limit(new: Callable[..., Recorder]) -> None:
    recorder = new()
    assert recorder.begin(0, 2, 0, 1.0, [], "") is not None
    assert do(recorder, 1, replaced=4) == [True]
    recorder.close("stop")
    again = new()
    assert again.begin(0, 2, 1, 1.0, [], "") is None
    assert "4 samples were replaced" in again.poll().failed


def test_after_a_failure_or_a_stop_no_workers_restart(new: Callable[..., Recorder]) -> None:
    for end in (lambda recorder: recorder.fail("a typo"), lambda recorder: recorder.request_stop()):
        recorder = new()
        assert recorder.begin(0, 2, 0, 1.0, [], "") is not None
        assert do(recorder, 1) == [False]
        end(recorder)
        assert do(recorder, 2) == [True], "those that train stop, too"
        assert recorder.begin(0, 2, 2, 1.0, [], "") is None


def test_the_first_failure_is_reported(new: Callable[..., Recorder]) -> None:
    recorder = new()
    recorder.fail("a typo")
    recorder.fail("what followed from it")
    assert recorder.poll().failed == "a typo"


# Status and messages


def test_each_message_is_delivered_once(new: Callable[..., Recorder]) -> None:
    recorder = new()
    assert recorder.begin(0, 2, 0, 1.0, ["tower: skipped step-000004"], "") is not None
    recorder.add_message("one")
    status = recorder.poll()
    assert (status.step, status.loss, status.messages, status.failed) == (
        0,
        None,
        ["tower: skipped step-000004", "one"],
        "",
    )
    do(recorder, 1, loss=0.5)
    status = recorder.poll()
    assert (status.step, status.loss, status.messages) == (1, 0.5, [])
    assert recorder.begin(0, 1, 0, 1.0, [], "") is not None
    status = recorder.poll()
    assert (status.step, status.messages) == (0, ["tower: restarted with 1 workers after step 0"])
    assert recorder.poll().messages == []


# Records


def test_numbers_that_are_not_finite_are_null_on_record(new: Callable[..., Recorder], tmp_path: Path) -> None:
    recorder = new()
    recorder.begin(0, 2, 0, 1.0, [], "")
    do(recorder, 1, loss=math.nan, grad_norm=math.inf, skipped=1)
    recorder.sync()
    [line] = (tmp_path / metrics.METRICS_FILE).read_text().splitlines()
    entry = json.loads(line, parse_constant=lambda name: pytest.fail(name))
    assert (entry["loss"], entry["grad_norm"], entry["skipped"]) == (None, None, 1)
    status = recorder.poll()
    assert status.loss is None
    assert status.messages == ["tower: loss or gradient of step 1 was not finite: its update was skipped"]


def test_steps_done_again_stand_once_on_record_and_count_as_lost(new: Callable[..., Recorder], tmp_path: Path) -> None:
    recorder = new()
    recorder.begin(0, 2, 0, 1.0, [], "")
    do(recorder, 1, 2, 3)
    recorder.begin(0, 2, 1, 1.0, [], "")
    do(recorder, 2, 3, 4)
    recorder.sync()
    for file in (metrics.METRICS_FILE, consumed.CONSUMED_FILE):
        assert [entry["step"] for entry in lines(tmp_path / file)] == [1, 2, 3, 4]
    spent = ledger.read_ledger(tmp_path).account
    assert (spent.restarts, spent.lost_steps) == (1, 2)


def test_a_tracker_that_is_still_starting_at_the_end_of_a_stage_gets_its_steps(
    new: Callable[..., Recorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A short stage may end before a tracker has started. The error of its end is a message, too."""
    released, calls = threading.Event(), list[Any]()

    class SlowTracker:
        def __init__(self, *_: object) -> None:
            assert released.wait(60)

        def write(self, step: int, values: object) -> None:
            calls.append(step)

        def close(self) -> None:
            calls.append("close")
            raise OSError("away")

    monkeypatch.setitem(trackers.TRACKERS, "tensorboard", SlowTracker)
    recorder = new(trackers=("tensorboard",))
    for cursor in (0, 1):
        assert recorder.begin(0, 2, cursor, 1.0, [], "") is not None
        do(recorder, cursor + 1)
    assert calls == []
    recorder.poll()
    released.set()
    messages = recorder.close("end")
    assert calls == [1, "close", 2, "close"]
    assert messages == ["trackers: tensorboard left out of tower, it failed at its end: OSError: away"] * 2


# Limits


def test_more_replaced_samples_than_tolerated_stop_the_workers_with_the_reason(
    new: Callable[..., Recorder], tmp_path: Path
) -> None:
    recorder = new()
    recorder.begin(0, 2, 0, 1.0, [], "")
    assert do(recorder, 1, replaced=3) + do(recorder, 2) == [False, False]
    assert do(recorder, 3, replaced=1) + do(recorder, 4) == [True, True]
    expected = (
        f"train.tower: 4 samples were replaced, allowed: 3 (data.max_bad_fraction); the last: broken image; "
        f"{tmp_path / consumed.CONSUMED_FILE} lists them"
    )
    assert recorder.poll().failed == expected


def test_more_steps_that_are_not_finite_than_tolerated_stop_the_workers_with_the_reason(
    new: Callable[..., Recorder], tmp_path: Path
) -> None:
    recorder = new()
    recorder.begin(0, 2, 0, 1.0, [], "")
    assert do(recorder, 1, skipped=1) + do(recorder, 2) == [False, False]
    assert do(recorder, 3, skipped=1) == [True]
    expected = (
        "train.tower.max_nonfinite_steps: loss or gradient of 2 steps was not finite, the last at step 3, allowed: 1; "
        f"{tmp_path / consumed.CONSUMED_FILE} lists them"
    )
    assert recorder.poll().failed == expected


def test_repeated_steps_count_once(new: Callable[..., Recorder]) -> None:
    recorder = new()
    recorder.begin(0, 2, 0, 1.0, [], "")
    do(recorder, 1, replaced=2)
    do(recorder, 2, replaced=1, skipped=1)
    recorder.begin(0, 2, 1, 1.0, [], "")
    assert do(recorder, 2, replaced=1, skipped=1) == [False]
    assert do(recorder, 3, replaced=1) == [True]
