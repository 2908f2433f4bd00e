"""Ledger of a run: the account of its wall time across crashes and restarts, from an append-only log of events.

    ledger.jsonl   {"at": unix seconds, "event", "stage", ...}, one event per line:

    launch      the driver starts or resumes a stage
    fault       {}: Ray has found that workers failed
    start       {"workers", "cursor", "restore_s"}: a group of workers begins after global batch `cursor`; building the
                engine and loading the checkpoint took restore_s
    step        {"step", "data_s", "compute_s", "stall_s"}: global batch `step` is done; the three durations are the
                time since the previous event in which workers waited for data, computed, and paused for a checkpoint
    evaluate    {"wall_s"}: an evaluation that took wall_s is done
    end         the stage is done
    stop        the stage was stopped before its end; time until the next launch does not count, and events until then
                are ignored

`metrics.jsonl` has each step once, so it does not show work that a crash undid. The ledger keeps these steps, and a
`start` with a smaller cursor turns their time into lost time. Each interval between two events is divided when the
second event arrives. Time is counted in whole microseconds: subtracting it later leaves no rounding error, and the
parts add up exactly.

Clocks of different machines are not corrected: a negative interval counts as 0.

Cost: a step stays in memory as long as a restart could undo it, that is until the end, with 220 bytes. Writing a line
takes 10 µs, replaying it 6 µs.
"""

import json
import os
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pipelines.core import failures

LEDGER_FILE = "ledger.jsonl"

ACCOUNT_PARTS = ("productive", "evaluation", "data", "checkpoint", "startup", "other", "restart", "lost")
"""Parts of the wall time. They add up to the total."""

REMAINDER_PARTS = {"startup": "startup", "restart": "restart", "steps": "other", "between": "other"}
"""Part of the time of an interval that belongs neither to a step nor to an evaluation, by phase of the run."""


@dataclass(frozen=True, kw_only=True)
class Account:
    """Seconds of the wall time by part, and counts of restarts and lost steps.

    Args:
        productive: computing in steps that count.
        evaluation: validation and final evaluation.
        data: waiting for data in steps that count.
        checkpoint: pauses for checkpoints in steps that count.
        startup: from the first launch of a stage to its first step, including the wait for its first batch.
        other: everything else, such as writing records and the final model, and time between two stages.
        restart: from the last event before a later launch or group of workers to its first step; after an orderly
            stop, from the launch.
        lost: steps that were repeated.
        restarts: launches of a stage and starts of its workers after a fault.
        resumes: launches that resume a stage after an orderly stop.
        lost_steps: number of steps that were repeated.
    """

    productive: float
    evaluation: float
    data: float
    checkpoint: float
    startup: float
    other: float
    restart: float
    lost: float
    restarts: int
    resumes: int
    lost_steps: int

    @property
    def total(self) -> float:
        """Wall time in seconds."""
        return sum(getattr(self, part) for part in ACCOUNT_PARTS)

    @property
    def goodput(self) -> float:
        """Productive share of the total; 0 before any time has passed."""
        return self.productive / self.total if self.total else 0.0


class LoopTime(NamedTuple):
    """Seconds of the training loop of one stage, by the parts of the account with the same names."""

    productive: float
    data: float
    checkpoint: float

    @property
    def total(self) -> float:
        return sum(self)


class StepTime(NamedTuple):
    """Microseconds of one step by part of the account. Kept as long as a restart could undo the step."""

    number: int
    productive: int
    data: int
    checkpoint: int
    other: int

    def parts(self) -> Iterable[tuple[str, int]]:
        return zip(self._fields[1:], self[1:], strict=True)


class Ledger:
    """Account of the events added so far, in the order of the file. Adding an event is O(1), amortised."""

    def __init__(self) -> None:
        self._parts = dict.fromkeys(ACCOUNT_PARTS, 0)
        self._restarts = self._resumes = self._lost_steps = 0
        # "stopped", or a key of REMAINDER_PARTS.
        self._phase = "stopped"
        self._last_timestamp = 0
        self._launched = set[str]()
        # True if workers have begun since the last launch.
        self._has_started = False
        # Steps that count, by stage, in ascending order.
        self._steps = defaultdict[str, list[StepTime]](list)

    @property
    def account(self) -> Account:
        seconds = {part: microseconds / 1e6 for part, microseconds in self._parts.items()}
        return Account(**seconds, restarts=self._restarts, resumes=self._resumes, lost_steps=self._lost_steps)

    @property
    def loops(self) -> dict[str, LoopTime]:
        """Loop times by stage. Their sums are the account's productive, data and checkpoint."""
        return {
            stage: LoopTime(*(sum(getattr(step, part) for step in steps) / 1e6 for part in LoopTime._fields))
            for stage, steps in self._steps.items()
            if steps
        }

    def add(self, event: Mapping[str, Any]) -> None:
        """Divide the time since the previous event. An event of an unknown kind only passes time."""
        kind, stage = event["event"], event["stage"]
        timestamp = _to_microseconds(event["at"])
        if self._phase == "stopped" and kind != "launch":
            return
        interval = 0 if self._phase == "stopped" else max(timestamp - self._last_timestamp, 0)
        self._last_timestamp = timestamp
        match kind:
            case "launch":
                self._add_launch(stage, interval)
            case "start":
                self._add_start(interval)
                self._undo_steps(stage, after=event["cursor"])
            case "step":
                # Undo repeated steps also if the `start` that announces them is missing.
                self._undo_steps(stage, after=event["step"] - 1)
                self._add_step(event, interval)
            case "evaluate":
                evaluation = min(_to_microseconds(event["wall_s"]), interval)
                self._parts["evaluation"] += evaluation
                self._parts[REMAINDER_PARTS[self._phase]] += interval - evaluation
            case _:
                self._parts[REMAINDER_PARTS[self._phase]] += interval
                self._phase = {"end": "between", "stop": "stopped"}.get(kind, self._phase)

    def _add_launch(self, stage: str, interval: int) -> None:
        is_relaunch, was_stopped = stage in self._launched, self._phase == "stopped"
        self._parts["other" if self._phase == "between" and not is_relaunch else "restart"] += interval
        self._phase = "restart" if is_relaunch else "startup"
        if is_relaunch and was_stopped:
            self._resumes += 1
        elif is_relaunch:
            self._restarts += 1
        self._launched.add(stage)
        self._has_started = False

    def _add_start(self, interval: int) -> None:
        if self._has_started:
            self._phase = "restart"
            self._restarts += 1
        self._parts[REMAINDER_PARTS[self._phase]] += interval
        self._has_started = True

    def _add_step(self, event: Mapping[str, Any], interval: int) -> None:
        # If the durations exceed the interval, cut computing first, so that goodput is never too high.
        data = min(_to_microseconds(event["data_s"]), interval)
        stall = min(_to_microseconds(event["stall_s"]), interval - data)
        compute = min(_to_microseconds(event["compute_s"]), interval - data - stall)
        other = interval - data - stall - compute
        # Waiting for the first batch belongs to the start.
        if self._phase in ("startup", "restart"):
            self._parts[self._phase] += data + other
            data = other = 0
        self._phase = "steps"
        step = StepTime(event["step"], compute, data, stall, other)
        self._steps[event["stage"]].append(step)
        for part, microseconds in step.parts():
            self._parts[part] += microseconds

    def _undo_steps(self, stage: str, after: int) -> None:
        """Move the time of the stage's steps after this one to the lost time."""
        steps = self._steps[stage]
        while steps and steps[-1].number > after:
            step = steps.pop()
            self._lost_steps += 1
            for part, microseconds in step.parts():
                self._parts[part] -= microseconds
                self._parts["lost"] += microseconds


def read_ledger(run: Path) -> Ledger:
    """Replay the events of a run folder. Skips truncated lines; without a file, the ledger is empty."""
    ledger = Ledger()
    if (run / LEDGER_FILE).exists():
        with (run / LEDGER_FILE).open("rb") as file:
            for line in file:
                try:
                    event = json.loads(line)
                except ValueError:
                    continue
                ledger.add(event)
    return ledger


def append_event(run: Path, event: str, stage: str, **values: Any) -> dict[str, Any]:
    """Append an event with the current time and return it. Processes may append at the same time."""
    entry = {"at": time.time(), "event": event, "stage": stage, **values}
    line = json.dumps(entry).encode() + b"\n"
    file = os.open(run / LEDGER_FILE, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        # A crash left half a line, or another process is just writing one. The latter only adds an empty line.
        size = os.fstat(file).st_size
        is_truncated = size and os.pread(file, 1, size - 1) != b"\n"
        # A single write call: lines of two processes do not mix.
        with failures.locate_errors(run / LEDGER_FILE):
            os.write(file, b"\n" + line if is_truncated else line)
    finally:
        os.close(file)
    return entry


def compute_gauges(account: Account) -> dict[str, float]:
    """Compute the Prometheus gauges of an account, by name, such as `redux_seconds_lost`."""
    return {
        "redux_goodput": account.goodput,
        "redux_restarts": account.restarts,
        "redux_lost_steps": account.lost_steps,
    } | {f"redux_seconds_{part}": getattr(account, part) for part in ACCOUNT_PARTS}


def _to_microseconds(seconds: float) -> int:
    return max(round(seconds * 1e6), 0)
