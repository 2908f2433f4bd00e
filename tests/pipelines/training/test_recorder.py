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
from pipelines.training import ledger, trackers
from pipelines.training.files import METRICS_FILE
from pipelines.training.recorder import NoStage, Recorder, RecorderSettings, StageStatus

ENTRY = {"set": "a", "index": 0, "scheduled": 1, "used": 2, "reason": "broken image"}
LOST_FAILURE = Failure(Kind.LOST, "OSError: away")


@pytest.fixture
def settings(tmp_path: Path) -> RecorderSettings:
    return RecorderSettings(
        run=tmp_path, stage="tower", job_name="job", job={}, trackers=(), restarts=2, max_replaced=3, max_skipped=1
    )


@pytest.fixture
def make_recorder(settings: RecorderSettings) -> Iterator[Callable[..., Recorder]]:
    recorders: list[Recorder] = []

    def make(**changes: Any) -> Recorder:
        recorders.append(Recorder(replace(settings, **changes)))
        return recorders[-1]

    yield make
    for recorder in recorders:
        recorder.close("stop")


def write_steps(recorder: Recorder, *steps: int, replaced: int = 0, **values: float) -> list[bool]:
    """Write steps and return the answers of the recorder."""
    defaults = {
        "loss": 1.0,
        "skipped": 0,
        "replaced": replaced,
        "data_s": 0.1,
        "compute_s": 0.2,
        "stall_s": 0.0,
    } | values
    used = ConsumedSamples({"a": [1]}, [ENTRY] * replaced)
    for name in ("learning_rate", "grad_norm", "samples", "tokens"):
        defaults.setdefault(name, 1)
    return [recorder.write_step(step, defaults, used) for step in steps]


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_late_steps_of_lost_workers_are_ignored(
    make_recorder: Callable[..., Recorder], settings: RecorderSettings
) -> None:
    recorder = make_recorder()
    recorder.begin(0, 2, 0, 1.0, [], "")
    write_steps(recorder, 1, 2, 3)
    recorder.begin(0, 2, 1, 1.0, [], "")
    write_steps(recorder, 4, loss=7.0)
    write_steps(recorder, 2, 3)
    recorder.close("end")
    steps = [(entry["step"], entry["loss"]) for entry in read_lines(settings.run / METRICS_FILE)]
    assert steps == [(1, 1.0), (2, 1.0), (3, 1.0)]


# Starts


def test_workers_that_start_early_wait_for_their_stage(settings: RecorderSettings) -> None:
    recorder = Recorder()
    assert recorder.find_stage(None) is NoStage.NOT_YET
    recorder.record_fault({0: LOST_FAILURE})
    assert recorder.poll() == StageStatus(0, None, [], "")
    recorder.open_stage(settings, "work")
    assert recorder.find_stage(None) == 0
    assert recorder.get_work() == "work"
    recorder.close("stop")


def test_consecutive_faults_without_progress_end_the_run(make_recorder: Callable[..., Recorder]) -> None:
    recorder = make_recorder()
    assert recorder.begin(0, 2, 0, 1.0, [], "") is not None
    write_steps(recorder, 1, 2, 3)
    for text in ("RuntimeError: out of luck", "OSError: away"):
        recorder.record_fault({1: Failure(Kind.LOST, text)})
        assert recorder.begin(0, 2, 2, 1.0, [], "") is not None
        write_steps(recorder, 3)
    recorder.record_fault({0: Failure(Kind.LOST, "OSError: away")})
    expected = (
        "train.tower: 3 faults in a row without a step beyond 3, allowed: 2, recovery.restarts; the last: "
        "rank 0: OSError: away; the checkpoint after step 2 is safe; the same command continues from there"
    )
    assert recorder.poll().failure_reason == expected
    assert recorder.find_stage(None) is NoStage.NO_MORE
    assert recorder.begin(0, 2, 2, 1.0, [], "") is None


def test_faults_before_the_first_start_end_the_run(make_recorder: Callable[..., Recorder]) -> None:
    """Workers that are killed while they build the model never begin."""
    recorder = make_recorder(restarts=1)
    recorder.record_fault({0: LOST_FAILURE})
    assert not recorder.poll().failure_reason
    recorder.record_fault({0: LOST_FAILURE})
    assert "without a step beyond 0" in recorder.poll().failure_reason


def test_progress_resets_the_count_of_faults(make_recorder: Callable[..., Recorder]) -> None:
    recorder = make_recorder()
    for step in range(1, 20):
        for _ in range(2):
            assert recorder.begin(0, 2, step - 1, 1.0, [], "") is not None
            recorder.record_fault({0: LOST_FAILURE})
        assert recorder.begin(0, 2, step - 1, 1.0, [], "") is not None
        write_steps(recorder, step)
    assert not recorder.poll().failure_reason


def test_a_permanent_failure_is_not_retried(make_recorder: Callable[..., Recorder]) -> None:
    """The reported rank has the cause; the others only lost their connection to it."""
    recorder = make_recorder(restarts=9)
    assert recorder.begin(0, 2, 0, 1.0, [], "") is not None
    write_steps(recorder, 1)
    recorder.record_checkpoint(1)
    recorder.record_fault({0: LOST_FAILURE, 1: Failure(Kind.PERMANENT, "/data: No space left on device")})
    status = recorder.poll()
    assert status.failure_reason == (
        "train.tower: rank 1: /data: No space left on device; "
        "the checkpoint after step 1 is safe; the same command continues from there"
    )
    assert status.messages == [], "the reason is not a message"


def test_the_same_error_at_the_same_step_is_tried_once_more(make_recorder: Callable[..., Recorder]) -> None:
    def fault(number: int) -> str:
        recorder.record_fault(
            {0: LOST_FAILURE, 1: Failure(Kind.RAISED, f"RuntimeError: {number}.5 GiB at 0x{number:x}")}
        )
        return recorder.poll().failure_reason

    recorder = make_recorder(restarts=9)
    recorder.begin(0, 2, 0, 1.0, [], "")
    write_steps(recorder, 1, 2, 3)
    assert not fault(1)
    recorder.begin(0, 2, 0, 1.0, [], "")
    write_steps(recorder, 1, 2)
    assert not fault(2), "at another step it may be a fault of the machine"
    recorder.begin(0, 2, 0, 1.0, [], "")
    write_steps(recorder, 1, 2)
    assert "the same fault twice after step 2: rank 1: RuntimeError: 3.5 GiB" in fault(3)


def test_other_errors_at_the_same_step_and_lost_workers_are_tried_again(make_recorder: Callable[..., Recorder]) -> None:
    recorder = make_recorder(restarts=9)
    recorder.begin(0, 2, 0, 1.0, [], "")
    for kind, text in [(Kind.RAISED, "a"), (Kind.RAISED, "b"), (Kind.LOST, "killed"), (Kind.LOST, "killed")]:
        recorder.record_fault({0: Failure(kind, text)})
        assert recorder.find_stage(None) == 0


def test_a_fault_is_reported_if_the_ledger_cannot_be_written(
    make_recorder: Callable[..., Recorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = make_recorder()

    def raise_disk_full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(ledger, "append_event", raise_disk_full)
        recorder.record_fault({0: Failure(Kind.PERMANENT, "disk full")})
    assert "disk full" in recorder.poll().failure_reason


def test_starts_without_a_fault_are_not_counted(make_recorder: Callable[..., Recorder]) -> None:
    """Joining and leaving machines also restart the workers."""
    recorder = make_recorder(restarts=0)
    for _ in range(9):
        assert recorder.begin(0, 2, 40, 1.0, [], "") is not None


def test_a_new_launch_does_not_reset_an_exceeded_limit(make_recorder: Callable[..., Recorder]) -> None:
    recorder = make_recorder()
    assert recorder.begin(0, 2, 0, 1.0, [], "") is not None
    assert write_steps(recorder, 1, replaced=4) == [True]
    recorder.close("stop")
    second = make_recorder()
    assert second.begin(0, 2, 1, 1.0, [], "") is None
    assert "4 samples were replaced" in second.poll().failure_reason


def test_after_a_failure_or_a_stop_no_workers_restart(make_recorder: Callable[..., Recorder]) -> None:
    for end in (lambda recorder: recorder.fail("a typo"), lambda recorder: recorder.request_stop()):
        recorder = make_recorder()
        assert recorder.begin(0, 2, 0, 1.0, [], "") is not None
        assert write_steps(recorder, 1) == [False]
        end(recorder)
        assert write_steps(recorder, 2) == [True], "workers that train stop, too"
        assert recorder.begin(0, 2, 2, 1.0, [], "") is None


def test_the_first_failure_is_reported(make_recorder: Callable[..., Recorder]) -> None:
    recorder = make_recorder()
    recorder.fail("a typo")
    recorder.fail("a consequence of it")
    assert recorder.poll().failure_reason == "a typo"


# Status and messages


def test_each_message_is_delivered_once(make_recorder: Callable[..., Recorder]) -> None:
    recorder = make_recorder()
    assert recorder.begin(0, 2, 0, 1.0, ["tower: skipped step-000004"], "") is not None
    recorder.add_message("one")
    status = recorder.poll()
    assert (status.step, status.loss, status.messages, status.failure_reason) == (
        0,
        None,
        ["tower: skipped step-000004", "one"],
        "",
    )
    write_steps(recorder, 1, loss=0.5)
    status = recorder.poll()
    assert (status.step, status.loss, status.messages) == (1, 0.5, [])
    assert recorder.begin(0, 1, 0, 1.0, [], "") is not None
    status = recorder.poll()
    assert (status.step, status.messages) == (0, ["tower: restarted with 1 worker after step 0"])
    assert recorder.poll().messages == []


# Records


def test_values_that_are_not_finite_are_null_in_the_record(
    make_recorder: Callable[..., Recorder], tmp_path: Path
) -> None:
    recorder = make_recorder()
    recorder.begin(0, 2, 0, 1.0, [], "")
    write_steps(recorder, 1, loss=math.nan, grad_norm=math.inf, skipped=1)
    recorder.sync()
    [line] = (tmp_path / METRICS_FILE).read_text().splitlines()
    entry = json.loads(line, parse_constant=lambda name: pytest.fail(name))
    assert (entry["loss"], entry["grad_norm"], entry["skipped"]) == (None, None, 1)
    status = recorder.poll()
    assert status.loss is None
    assert status.messages == ["tower: loss or gradient of step 1 was not finite: its update was skipped"]


def test_repeated_steps_are_recorded_once_and_count_as_lost(
    make_recorder: Callable[..., Recorder], tmp_path: Path
) -> None:
    recorder = make_recorder()
    recorder.begin(0, 2, 0, 1.0, [], "")
    write_steps(recorder, 1, 2, 3)
    recorder.begin(0, 2, 1, 1.0, [], "")
    write_steps(recorder, 2, 3, 4)
    recorder.sync()
    for file in (METRICS_FILE, consumed.CONSUMED_FILE):
        assert [entry["step"] for entry in read_lines(tmp_path / file)] == [1, 2, 3, 4]
    spent = ledger.read_ledger(tmp_path).account
    assert (spent.restarts, spent.lost_steps) == (1, 2)


def test_a_tracker_that_is_still_starting_at_the_end_of_a_stage_gets_its_steps(
    make_recorder: Callable[..., Recorder], monkeypatch: pytest.MonkeyPatch
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
    recorder = make_recorder(trackers=("tensorboard",))
    for cursor in (0, 1):
        assert recorder.begin(0, 2, cursor, 1.0, [], "") is not None
        write_steps(recorder, cursor + 1)
    assert calls == []
    recorder.poll()
    released.set()
    messages = recorder.close("end")
    assert calls == [1, "close", 2, "close"]
    assert messages == ["trackers: tensorboard left out of tower, it failed at its end: OSError: away"] * 2


# Limits


def test_too_many_replaced_samples_stop_the_workers_with_the_reason(
    make_recorder: Callable[..., Recorder], tmp_path: Path
) -> None:
    recorder = make_recorder()
    recorder.begin(0, 2, 0, 1.0, [], "")
    assert write_steps(recorder, 1, replaced=3) + write_steps(recorder, 2) == [False, False]
    assert write_steps(recorder, 3, replaced=1) + write_steps(recorder, 4) == [True, True]
    expected = (
        f"train.tower: 4 samples were replaced, allowed: 3 (data.max_bad_fraction); the last: broken image; "
        f"{tmp_path / consumed.CONSUMED_FILE} lists them"
    )
    assert recorder.poll().failure_reason == expected


def test_too_many_steps_that_are_not_finite_stop_the_workers_with_the_reason(
    make_recorder: Callable[..., Recorder], tmp_path: Path
) -> None:
    recorder = make_recorder()
    recorder.begin(0, 2, 0, 1.0, [], "")
    assert write_steps(recorder, 1, skipped=1) + write_steps(recorder, 2) == [False, False]
    assert write_steps(recorder, 3, skipped=1) == [True]
    expected = (
        "train.tower.max_nonfinite_steps: loss or gradient of 2 steps was not finite, the last at step 3, allowed: 1; "
        f"{tmp_path / consumed.CONSUMED_FILE} lists them"
    )
    assert recorder.poll().failure_reason == expected


def test_replacements_of_repeated_steps_count_once(make_recorder: Callable[..., Recorder]) -> None:
    recorder = make_recorder()
    recorder.begin(0, 2, 0, 1.0, [], "")
    write_steps(recorder, 1, replaced=2)
    write_steps(recorder, 2, replaced=1, skipped=1)
    recorder.begin(0, 2, 1, 1.0, [], "")
    assert write_steps(recorder, 2, replaced=1, skipped=1) == [False]
    assert write_steps(recorder, 3, replaced=1) == [True]
