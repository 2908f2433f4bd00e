"""Recorder of a group of workers: an actor that writes the record of their stages and passes messages to the driver.

The actor runs on the driver's machine, because the run folder is there; workers run anywhere and come and go. The
recorder outlives them. The driver opens one stage after the other, and the workers wait for the next one meanwhile,
and for the first one if they were started early.

The recorder knows how far the workers are, if they make progress, and if the driver requests a stop. Rank 0 sends each
step without waiting, and reads the answer to the previous step. The record therefore costs a step only the time to send
it.

The module does not import torch. Its import takes three seconds of CPU, which workers need that start at the same time.
"""

import math
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import Any

import ray
from ray.util.metrics import Gauge
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipelines.core import storage
from pipelines.core.failures import Failure, Kind
from pipelines.core.words import pluralize
from pipelines.data import consumed
from pipelines.data.consumed import ConsumedSamples
from pipelines.training import ledger
from pipelines.training.ledger import Ledger
from pipelines.training.metrics import VALIDATION_LOSS, MetricsWriter
from pipelines.training.trackers import TrackerGroup

STARTING_WORKERS = "starting workers"
"""Phase before a group of workers has begun."""


class NoStage(Enum):
    """Answers to workers that ask for a stage, in place of its index."""

    NOT_YET = "the driver has not yet opened the next stage"
    NO_MORE = "the workers must end"


PLACEMENT_GROUP_FILE = ".placement_group"
"""File in the run folder with the ID of the placement group of the current workers."""

TRACKED_METRICS = (
    "loss",
    VALIDATION_LOSS,
    "learning_rate",
    "grad_norm",
    "samples",
    "replaced",
    "skipped",
    "tokens",
    "data_s",
    "compute_s",
)
"""Metrics of a step that go to the trackers."""


@dataclass(frozen=True, kw_only=True)
class RecorderSettings:
    """Settings of the recorder of one stage.

    Args:
        run: run folder, on this machine.
        stage: name of the stage.
        job_name: name of the job.
        job: the resolved job, for the trackers.
        trackers: names of the trackers.
        restarts: allowed consecutive faults without a step beyond the furthest one.
        max_replaced: allowed replaced samples of the stage.
        max_skipped: allowed skipped updates of the stage.
    """

    run: Path
    stage: str
    job_name: str
    job: Mapping[str, Any]
    trackers: Sequence[str]
    restarts: int
    max_replaced: float
    max_skipped: int


@dataclass
class StageStatus:
    """Progress of a stage, for the driver's progress bar.

    Args:
        step: last finished step.
        loss: loss of that step; None if it is not finite or there is no step yet.
        messages: messages since the previous poll.
        failure_reason: reason for which the run must end, or "".
        worker_phase: current phase of workers without a finished step, which have nothing to save; otherwise "".
        starts: number of groups of workers that have begun so far.
        cursor: step after which the last group began.
        is_finished: all workers are past the last step, and their checkpoint is complete.
        is_waiting: the workers wait for the next stage. Otherwise they end with this stage.
    """

    step: int
    loss: float | None
    messages: list[str]
    failure_reason: str
    worker_phase: str = STARTING_WORKERS
    starts: int = 0
    cursor: int = 0
    is_finished: bool = False
    is_waiting: bool = False


@dataclass(kw_only=True)
class StageState:
    """State of the record of one stage, which only the recorder needs.

    Args:
        settings: settings of the recorder.
        ledger: account of the run's wall time, with the account of earlier launches.
        has_begun: a group of workers has begun.
        furthest_step: last step that any group of workers has finished.
        saved_cursor: step of the last committed checkpoint; 0 without one.
        num_faults: consecutive faults without a step beyond the furthest one.
        last_fault: step and pattern of the last fault.
        rolled_back: steps that were rolled back once.
    """

    settings: RecorderSettings
    ledger: Ledger
    has_begun: bool = False
    furthest_step: int = 0
    saved_cursor: int = 0
    num_faults: int = 0
    last_fault: tuple[int, str] | None = None
    rolled_back: set[int] = field(default_factory=set)


class Recorder:
    """Actor that records stages, one after the other. Start it with `start_recorder`, call it by `RecorderClient`."""

    def __init__(self, settings: RecorderSettings | None = None, environment: Mapping[str, str] | None = None) -> None:
        os.environ.update(environment or {})
        self.metrics: MetricsWriter | None = None
        self.trackers: TrackerGroup | None = None
        # Trackers may be slow; a thread keeps them away from the calls of workers. One thread keeps the order. It alone
        # uses `trackers`.
        self.pool = ThreadPoolExecutor(1)
        self.gauges: dict[str, Gauge] = {}
        self.stage_index: int | None = None
        self._stage_state: StageState | None = None
        self.work: Any = None
        self.status = StageStatus(0, None, [], "")
        self.stop_requested = False
        if settings:
            self.open_stage(settings)

    def open_stage(self, settings: RecorderSettings, work: Any = None) -> None:
        """Begin the record of the next stage. Its workers may then train it.

        Args:
            settings: settings of the stage.
            work: for the first stage of new workers, what `get_work` returns to them.
        """
        self.work = work or self.work
        self.stage_index = 0 if self.stage_index is None else self.stage_index + 1
        # A resumed stage continues the account of earlier launches.
        self._stage_state = StageState(settings=settings, ledger=ledger.read_ledger(settings.run))
        for name in ledger.compute_gauges(self.state.ledger.account):
            self.gauges.setdefault(name, Gauge(name, tag_keys=("run", "stage")))
        self.status = StageStatus(0, None, [], "")
        self.stop_requested = False
        self._add_event("launch")

    @property
    def state(self) -> StageState:
        """State of the open stage."""
        assert self._stage_state, "no stage is open"
        return self._stage_state

    def find_stage(self, finished_stage: int | None) -> int | NoStage:
        """Return the index of the stage that workers train next, counted from the first one of this recorder.

        Args:
            finished_stage: index of the stage that the workers have finished; None for new workers.
        """
        if self.status.failure_reason or self.stop_requested:
            return NoStage.NO_MORE
        if self.stage_index is None or (finished_stage is not None and self.stage_index <= finished_stage):
            return NoStage.NOT_YET
        return self.stage_index

    def get_work(self) -> Any:
        """Return the work of the workers, as `open_stage` got it."""
        return self.work

    def finish_stage(self, stage: int, is_waiting: bool) -> None:
        """Record that all workers are past the last step of a stage. They wait for the next one, or end."""
        if stage == self.stage_index:
            self.status.is_finished = True
            self.status.is_waiting = is_waiting

    def begin(
        self, stage: int, workers: int, cursor: int, restore_s: float, messages: Sequence[str], placement_group: str
    ) -> set[int] | None:
        """Record that a group of workers continues after a global batch.

        Args:
            stage: index of the stage. New workers may still begin a stage that is done, to find that out.
            workers: number of workers.
            cursor: last finished global batch.
            restore_s: seconds since the workers entered the train function.
            messages: messages for the user, such as skipped checkpoints.
            placement_group: hexadecimal ID of the placement group that holds the workers' resources.

        Returns:
            Steps that were rolled back once, or None if the workers must not continue. The driver then has the reason.
        """
        state, settings = self.state, self.state.settings
        # Written even if the workers must not continue: they hold resources that the driver frees later.
        storage.write(str(settings.run / PLACEMENT_GROUP_FILE), placement_group.encode())
        if stage != self.stage_index:
            return set()
        self.status.messages += messages
        state.furthest_step = max(state.furthest_step, cursor)
        state.saved_cursor = cursor
        if self.status.failure_reason or self.stop_requested:
            return None
        if state.has_begun:
            count = pluralize(workers, "worker")
            self.add_message(f"{settings.stage}: restarted with {count} after step {cursor}")
        state.has_begun = True

        # Reopen the files: steps after the cursor are cut off, because they are done again.
        self._close_files()
        self.metrics = MetricsWriter(settings.run, settings.stage, cursor)
        self.pool.submit(self._open_trackers, cursor)
        self.status.step = self.status.cursor = cursor
        self.status.starts += 1
        self.status.worker_phase = "first batch"
        self._add_event("start", workers=workers, cursor=cursor, restore_s=restore_s)
        # The record may already exceed a limit, also after a new launch.
        self.fail(self._check_limits(cursor))
        return None if self.status.failure_reason else state.rolled_back

    def write_step(self, step: int, values: dict[str, float], used: ConsumedSamples) -> bool:
        """Record one step.

        A step other than the next one comes late, from workers that are gone. It is ignored.

        Args:
            step: the step, counted from 1.
            values: its metrics.
            used: its samples.

        Returns:
            True if the workers must stop after a checkpoint, by request of the driver or because a limit is exceeded.
        """
        assert self.metrics
        if step != self.status.step + 1:
            return self.stop_requested or bool(self.status.failure_reason)

        state = self.state
        # metrics.jsonl, ledger.jsonl, and the trackers in their thread.
        # JSON has no NaN and no infinity.
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self.metrics.write(step, finite, used)
        if values["skipped"]:
            self.add_message(
                f"{state.settings.stage}: loss or gradient of step {step} was not finite: its update was skipped"
            )
        self._add_event("step", step=step, **{name: values[name] for name in ("data_s", "compute_s", "stall_s")})
        tracked = {name: value for name in TRACKED_METRICS if (value := finite.get(name)) is not None}
        goodput = state.ledger.account.goodput
        self.pool.submit(self._write_trackers, step, tracked | {"goodput": goodput})

        # A step beyond the furthest one is progress: faults before it no longer count.
        if step > state.furthest_step:
            state.furthest_step = step
            state.num_faults = 0
        self.status.step = step
        self.status.loss = finite["loss"]
        self.status.worker_phase = ""
        self.fail(self._check_limits(step, used.replaced[-1]["reason"] if used.replaced else ""))
        return self.stop_requested or bool(self.status.failure_reason)

    def record_fault(self, errors_by_rank: Mapping[int, Failure]) -> None:
        """Record that workers failed. Ray restarts all of them, unless the run fails.

        The run fails on an error that the user must fix, on the same error at the same step, and on too many
        consecutive faults without progress.
        """
        if self.stage_index is None:
            # Workers that were started early: Ray starts them again, and nothing is lost.
            return
        state, settings = self.state, self.state.settings
        # An error that explains the others has the lowest kind: lost workers are a consequence of it.
        rank, cause = min(errors_by_rank.items(), key=lambda item: (item[1].kind, item[0]))
        reason = f"rank {rank}: {cause.text}"
        where = f"train.{settings.stage}"
        fault = (self.status.step, cause.pattern)
        state.num_faults += 1
        if cause.kind == Kind.PERMANENT:
            self.fail(f"{where}: {reason}; {self._describe_resume()}")
        elif cause.kind == Kind.RAISED and fault == state.last_fault:
            self.fail(
                f"{where}: the same fault twice after step {self.status.step}: {reason}; {self._describe_resume()}"
            )
        elif state.num_faults > settings.restarts:
            self.fail(
                f"{where}: {state.num_faults} faults in a row without a step beyond {state.furthest_step}, "
                f"allowed: {settings.restarts}, recovery.restarts; the last: {reason}; {self._describe_resume()}"
            )
        if not self.status.failure_reason:
            self.status.worker_phase = STARTING_WORKERS
            self.status.messages += [f"rank {rank}: {failure.text}" for rank, failure in sorted(errors_by_rank.items())]
        state.last_fault = fault
        # A full disk may be the fault. Then the ledger cannot be written, either.
        with suppress(OSError):
            self._add_event("fault")

    def _describe_resume(self) -> str:
        """Describe the progress that is safe and the way to resume."""
        if self.state.saved_cursor:
            return f"the checkpoint after step {self.state.saved_cursor} is safe; the same command continues from there"
        return "there is no checkpoint yet; the same command starts this stage again"

    def record_checkpoint(self, cursor: int) -> None:
        """Record that a checkpoint after this step is committed."""
        self.state.saved_cursor = max(self.state.saved_cursor, cursor)

    def sync(self) -> None:
        """Flush the recorded steps to disk. Call it before a checkpoint is committed."""
        if self.metrics:
            self.metrics.sync()

    def set_phase(self, phase: str) -> None:
        """Set the phase of workers that have not begun."""
        self.status.worker_phase = phase

    def add_message(self, text: str) -> None:
        """Add a message for the user."""
        self.status.messages.append(text)

    def fail(self, text: str) -> None:
        """End the run with this reason, because a restart would not help. Ignores "" and all reasons but the first."""
        self.status.failure_reason = self.status.failure_reason or text

    def mark_rolled_back(self, step: int) -> None:
        """Record a rollback of a step that was not finite. If it repeats, the batch causes it and not the machine."""
        self.state.rolled_back.add(step)

    def request_stop(self) -> None:
        """Have the workers stop after a checkpoint, and prevent further starts."""
        self.stop_requested = True

    def poll(self) -> StageStatus:
        """Return the status, with the messages since the previous poll."""
        # The copy keeps the list of messages; the status gets a new one.
        status = replace(self.status)
        self.status.messages = []
        return status

    def close(self, event: str) -> list[str]:
        """End the record of the stage with an event of the ledger: "end" or "stop". Returns the last messages."""
        self._add_event(event)
        self._close_files().result()
        return self.poll().messages

    def _check_limits(self, step: int, reason: str = "") -> str:
        """Return an error if more samples were replaced or more updates skipped than the job allows, otherwise ""."""
        assert self.metrics
        settings = self.state.settings
        where = f"train.{settings.stage}"
        if self.metrics.replaced > settings.max_replaced:
            return (
                f"{where}: {self.metrics.replaced} samples were replaced, allowed: {settings.max_replaced:g} "
                f"(data.max_bad_fraction);{f' the last: {reason};' if reason else ''} "
                f"{settings.run / consumed.CONSUMED_FILE} lists them"
            )
        if self.metrics.skipped > settings.max_skipped:
            return (
                f"{where}.max_nonfinite_steps: loss or gradient of {self.metrics.skipped} steps was not finite, the "
                f"last at step {step}, allowed: {settings.max_skipped}; "
                f"{settings.run / consumed.CONSUMED_FILE} lists them"
            )
        return ""

    def _add_event(self, event: str, **values: Any) -> None:
        state, settings = self.state, self.state.settings
        state.ledger.add(ledger.append_event(settings.run, event, settings.stage, **values))
        tags = {"run": settings.job_name, "stage": settings.stage}
        for name, value in ledger.compute_gauges(state.ledger.account).items():
            self.gauges[name].set(value, tags)

    def _open_trackers(self, cursor: int) -> None:
        settings = self.state.settings
        try:
            self.trackers = TrackerGroup(
                settings.trackers,
                settings.run,
                settings.job_name,
                settings.stage,
                cursor,
                settings.job,
                self.add_message,
            )
        except ValueError as error:
            # The driver checked the trackers already, but possibly on another machine.
            self.add_message(str(error))

    def _write_trackers(self, step: int, values: dict[str, float]) -> None:
        if self.trackers:
            self.trackers.write(step, values)

    def _close_files(self) -> Future[None]:
        """Close the files of the record, and the trackers in their thread. Returns the end of the latter."""
        if self.metrics:
            self.metrics.close()
        self.metrics = None
        # The pool is in order: trackers close after all steps that were sent to them, even if they are still starting.
        return self.pool.submit(self._close_trackers)

    def _close_trackers(self) -> None:
        if self.trackers:
            self.trackers.close()
        self.trackers = None


class RecorderClient:
    """Typed calls of the recorder actor, for the driver and the workers. Pickles with the handle of the actor.

    Methods wait for the actor, unless they say otherwise. `Recorder` documents them.
    """

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def open_stage(self, settings: RecorderSettings, work: Any = None) -> None:
        # In a list, the actor passes a reference on. Alone, Ray would replace it by the object.
        ray.get(self._actor.open_stage.remote(settings, work and [ray.put(work)]))

    def get_work(self) -> Any:
        [reference] = ray.get(self._actor.get_work.remote())
        return ray.get(reference)

    def find_stage(self, finished_stage: int | None) -> int | NoStage:
        return ray.get(self._actor.find_stage.remote(finished_stage))

    def finish_stage(self, stage: int, is_waiting: bool) -> None:
        ray.get(self._actor.finish_stage.remote(stage, is_waiting))

    def begin(
        self, stage: int, workers: int, cursor: int, restore_s: float, messages: Sequence[str], placement_group: str
    ) -> set[int] | None:
        return ray.get(self._actor.begin.remote(stage, workers, cursor, restore_s, messages, placement_group))

    def write_step(self, step: int, values: dict[str, float], used: ConsumedSamples) -> ray.ObjectRef:
        """Send a step without waiting. Returns a reference to the answer: True if the workers must stop."""
        return self._actor.write_step.remote(step, values, used)

    def record_fault(self, errors_by_rank: Mapping[int, Failure]) -> None:
        ray.get(self._actor.record_fault.remote(errors_by_rank))

    def record_checkpoint(self, cursor: int) -> None:
        """Call `Recorder.record_checkpoint` without waiting."""
        self._actor.record_checkpoint.remote(cursor)

    def sync(self) -> None:
        ray.get(self._actor.sync.remote())

    def set_phase(self, phase: str) -> None:
        """Call `Recorder.set_phase` without waiting."""
        self._actor.set_phase.remote(phase)

    def add_message(self, text: str) -> None:
        """Call `Recorder.add_message` without waiting."""
        self._actor.add_message.remote(text)

    def fail(self, text: str) -> None:
        ray.get(self._actor.fail.remote(text))

    def mark_rolled_back(self, step: int) -> None:
        ray.get(self._actor.mark_rolled_back.remote(step))

    def request_stop(self) -> None:
        ray.get(self._actor.request_stop.remote())

    def poll(self) -> StageStatus:
        return ray.get(self._actor.poll.remote())

    def close(self, event: str) -> list[str]:
        return ray.get(self._actor.close.remote(event))

    def kill(self) -> None:
        """End the actor's process."""
        ray.kill(self._actor)


def start_recorder() -> RecorderClient:
    """Start the recorder actor on this machine. Workers wait until its first stage is opened."""
    this_node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    # Pass the keys of trackers as an argument: Ray logs everything in a runtime_env.
    environment = {name: value for name, value in os.environ.items() if name.startswith(("WANDB_", "MLFLOW_"))}
    options = {"num_cpus": 0, "scheduling_strategy": this_node}
    return RecorderClient(ray.remote(Recorder).options(**options).remote(environment=environment))
