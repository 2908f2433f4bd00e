"""The one process that writes a stage's record, and through which its driver and its workers hear of each other.

An actor on the driver's machine, since the run folder is there, while workers come and go on any.  It outlives them: it
knows how far they got, whether they get any further, and what the driver wants.  Rank 0 sends each step without waiting
for it and looks at the answer to the one before, so the record costs a step nothing but the sending.

It does without torch, or it would take its three seconds of CPU from the workers that start beside it.
"""

import math
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
from ray.util.metrics import Gauge
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipelines.core.failures import Failure, Kind
from pipelines.data import consumed
from pipelines.data.consumed import ConsumedSamples
from pipelines.training import ledger
from pipelines.training.metrics import Metrics
from pipelines.training.trackers import Trackers

STARTING = "starting workers"
"""The phase before a group of workers has begun."""

HELD = ".held"
"""In the run folder, the placement group of the workers at work."""

SHOWN = ("loss", "learning_rate", "grad_norm", "samples", "replaced", "skipped", "tokens", "data_s", "compute_s")
"""Of a step, what trackers get."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a record is of.

    run: the run folder, on this machine.  title: the job's name.  job: all of it, which trackers show.
    restarts: of the workers in a row without a step further than before.
    max_replaced: samples of the stage.  max_skipped: steps of the stage.
    """

    run: Path
    stage: str
    title: str
    job: Mapping[str, Any]
    trackers: Sequence[str]
    restarts: int
    max_replaced: float
    max_skipped: int


@dataclass
class News:
    """What the driver shows: the last step and its loss, and what was said since it last asked.

    phase: of workers that have done no step since they were started, so that nothing is to be saved; "" of others.
    starts: groups of workers that have begun so far; cursor: the step after which the last of them did.
    """

    step: int
    loss: float | None
    said: list[str]
    failed: str
    phase: str = STARTING
    starts: int = 0
    cursor: int = 0


class Recorder:
    """An actor; see `start`."""

    def __init__(self, settings: Settings, environment: Mapping[str, str] | None = None) -> None:
        os.environ.update(environment or {})
        self.settings = settings
        self.metrics: Metrics | None = None
        self.trackers: Trackers | None = None
        self.pool = ThreadPoolExecutor(1)  # what shows numbers elsewhere may take its time
        self.ledger = ledger.read(settings.run)
        self.gauges = {name: Gauge(name, tag_keys=("run", "stage")) for name in ledger.gauges(self.ledger.account)}
        self.furthest = self.faults = self.saved = 0
        self.last_fault = (-1, "")
        self.begun = False
        self.news = News(0, None, [], "")
        self.stopping = False
        self.rolled_back = set[int]()
        self._note("launch")

    def begin(self, workers: int, cursor: int, restore_s: float, said: Sequence[str], held: str) -> set[int] | None:
        """A group of workers goes on after global batch `cursor`; returns steps that were rolled back, or None if they
        must not go on: the driver will say why.

        restore_s: since they entered the train function.
        held: the placement group with what they hold, in hexadecimal digits.
        """
        (self.settings.run / HELD).write_text(held)
        self.news.said += said
        self.furthest, self.saved = max(self.furthest, cursor), cursor
        if self.news.failed or self.stopping:
            return None
        if self.begun:
            self.news.said.append(f"{self.settings.stage}: started again, {workers} workers, after step {cursor}")
        self.begun = True
        self._close()
        settings = self.settings
        self.metrics = Metrics(settings.run, settings.stage, cursor)
        self.pool.submit(self._track, cursor)
        self.news.step = self.news.cursor = cursor
        self.news.starts += 1
        self.news.phase = "first batch"
        self._note("start", workers=workers, cursor=cursor, restore_s=restore_s)
        self.fail(self._excess(cursor))
        return None if self.news.failed else self.rolled_back

    def write(self, step: int, values: dict[str, float], used: ConsumedSamples) -> bool:
        """Record one step; returns whether the workers are to stop after a checkpoint: the driver wants it, or more
        went wrong than the job tolerates, which the driver will say.

        A step that is not the next one comes late, from workers that are gone; it is passed over.
        """
        assert self.metrics
        if step != self.news.step + 1:
            return self.stopping or bool(self.news.failed)
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self.metrics.write(step, finite, used)
        if values["skipped"]:
            self.say(f"{self.settings.stage}: loss or gradient of step {step} was not finite: its update was skipped")
        self._note("step", step=step, **{name: values[name] for name in ("data_s", "compute_s", "stall_s")})
        shown = {name: value for name in SHOWN if (value := finite[name]) is not None}
        goodput = self.ledger.account.goodput
        self.pool.submit(self._show, step, shown | {"goodput": goodput})
        if step > self.furthest:
            self.furthest, self.faults = step, 0
        self.news.step, self.news.loss, self.news.phase = step, finite["loss"], ""
        self.fail(self._excess(step, used.replaced[-1]["reason"] if used.replaced else ""))
        return self.stopping or bool(self.news.failed)

    def fault(self, failures: Mapping[int, Failure]) -> None:
        """Ray found that workers failed, and why, by rank; it will start all of them again.

        The driver ends the run for what the user must mend, for the same error at the same step, and for too many
        faults in a row without a step further than before.
        """
        rank, cause = min(failures.items(), key=lambda item: (item[1].kind, item[0]))
        reason, where = f"rank {rank}: {cause.text}", f"train.{self.settings.stage}"
        fault = (self.news.step, cause.pattern)
        self.faults += 1
        if cause.kind == Kind.PERMANENT:
            self.fail(f"{where}: {reason}; {self._outlook()}")
        elif cause.kind == Kind.RAISED and fault == self.last_fault:
            self.fail(f"{where}: the same fault twice after step {self.news.step}: {reason}; {self._outlook()}")
        elif self.faults > self.settings.restarts:
            self.fail(
                f"{where}: {self.faults} faults in a row without a step beyond {self.furthest}, "
                f"allowed: {self.settings.restarts}, recovery.restarts; at last: {reason}; {self._outlook()}"
            )
        if not self.news.failed:
            self.news.phase = STARTING
            self.news.said += [f"rank {one}: {failure.text}" for one, failure in sorted(failures.items())]
        self.last_fault = fault
        with suppress(OSError):  # a full disk may be the fault
            self._note("fault")

    def _outlook(self) -> str:
        """Describe what is safe, and how to continue."""
        safe = f"the checkpoint after step {self.saved} is safe" if self.saved else "there is no checkpoint yet"
        return f"{safe}; the same command goes on {'from there' if self.saved else 'with this stage'}"

    def save(self, cursor: int) -> None:
        """There is a checkpoint after this step."""
        self.saved = max(self.saved, cursor)

    def sync(self) -> None:
        """Steps written so far are on disk; a checkpoint may now say that they were done."""
        if self.metrics:
            self.metrics.sync()

    def enter(self, phase: str) -> None:
        """Workers that are about to begin have come so far."""
        self.news.phase = phase

    def say(self, text: str) -> None:
        """Something that the user should read."""
        self.news.said.append(text)

    def fail(self, text: str) -> None:
        """The run must end with this text, if it is one: starting again would not help."""
        self.news.failed = self.news.failed or text

    def has_failed(self) -> bool:
        """Tell if the run must end: workers that Ray starts all the same are not to begin."""
        return bool(self.news.failed)

    def roll_back(self, step: int) -> None:
        """The step was not finite; if that happens again, it is the batch's fault and not the machine's."""
        self.rolled_back.add(step)

    def stop(self) -> None:
        """Workers are to stop after a checkpoint, and not to start again."""
        self.stopping = True

    def hear(self) -> News:
        """What happened since the last time."""
        news = replace(self.news)
        self.news.said = []
        return news

    def close(self, event: str) -> None:
        """The stage is at its end, or was stopped: `event` of the ledger."""
        self._note(event)
        self._close()

    def _excess(self, step: int, reason: str = "") -> str:
        """What went wrong more often than the job tolerates, up to this step; "" for nothing."""
        assert self.metrics
        settings, where = self.settings, f"train.{self.settings.stage}"
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

    def _note(self, event: str, **values: Any) -> None:
        self.ledger.add(ledger.note(self.settings.run, event, self.settings.stage, **values))
        tags = {"run": self.settings.title, "stage": self.settings.stage}
        for name, value in ledger.gauges(self.ledger.account).items():
            self.gauges[name].set(value, tags)

    def _track(self, cursor: int) -> None:
        of = self.settings
        try:
            self.trackers = Trackers(of.trackers, of.run, of.title, of.stage, cursor, of.job, self.say)
        except ValueError as error:  # this machine is not the one where the driver looked
            self.say(str(error))

    def _show(self, step: int, values: dict[str, float]) -> None:
        if self.trackers:
            self.trackers.write(step, values)

    def _close(self) -> None:
        if self.metrics:
            self.metrics.close()
        if self.trackers:
            self.pool.submit(self.trackers.close).result()
        self.metrics = self.trackers = None


def start(settings: Settings) -> Any:
    """The actor's handle, on this machine; `ray.kill` ends it."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    # keys of trackers among them: Ray logs whatever is in a runtime_env
    told = {name: value for name, value in os.environ.items() if name.startswith(("WANDB_", "MLFLOW_"))}
    options = {"num_cpus": 0, "scheduling_strategy": here}
    return ray.remote(Recorder).options(**options).remote(settings, told)
