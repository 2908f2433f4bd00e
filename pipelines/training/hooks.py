"""Hooks that every rank calls after every step.

Hooks must take the same decision at the same step on all ranks; otherwise ranks wait for each other forever. A fact
that one rank alone knows (its upload is done, the driver requests a stop) therefore becomes a vote. Votes are summed in
the one all-reduce that a step makes anyway.
"""

import faulthandler
import os
import sys
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import ray
import torch.distributed as dist
from ray.train.v2._internal.execution.context import get_train_context

from pipelines.core import failures, storage
from pipelines.core.failures import Failure, Kind
from pipelines.data.consumed import ConsumedSamples
from pipelines.training import checkpoint, fragments
from pipelines.training.checkpoint import FileEntry, Manifest, Upload
from pipelines.training.plan import StagePlan
from pipelines.training.recorder import RecorderClient

if TYPE_CHECKING:
    from pipelines.training.engine import DeepSpeedEngineProtocol


@dataclass
class StepResult:
    """Result of one global batch. Hooks set the last two flags.

    Args:
        number: step, counted from 1.
        is_last: True for the last step of the stage.
        values: metrics of the step, equal on all ranks.
        used: samples of the step.
        votes: sums over ranks, by name of the vote.
        should_stop: training stops after this step.
        should_save: a checkpoint is requested after this step.
    """

    number: int
    is_last: bool
    values: dict[str, float]
    used: ConsumedSamples
    votes: dict[str, float]
    should_stop: bool = False
    should_save: bool = False


class Hook:
    """Base class of hooks. Every method runs on every rank."""

    votes: ClassVar[Sequence[str]] = ()
    """Names of the votes of this hook."""

    def vote(self) -> dict[str, float]:
        """Return the votes of this rank before the all-reduce of a step. A missing vote counts as 0."""
        return {}

    def on_step_end(self, step: StepResult) -> None:
        """Handle a finished step."""

    def close(self) -> None:
        """Handle the end of the loop. Not called if a fault ends the process."""


class Watchdog(Hook):
    """Watchdog that ends this process if a step takes too long, so that Ray restarts all workers.

    The timer is a C thread of the interpreter. It also fires while the hung code holds the GIL. It writes the stacks
    of all threads into the folder.
    """

    def __init__(self, seconds: float, folder: Path, rank: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.glob(f"rank-{rank}-*.txt"):
            # An empty file belongs to a process that ended for another reason. A process that is just ending removes
            # its own file.
            with suppress(FileNotFoundError):
                if not path.stat().st_size:
                    path.unlink()
        self.seconds = seconds
        self.file = (folder / f"rank-{rank}-{os.getpid()}.txt").open("w")
        self._restart_timer()

    def on_step_end(self, step: StepResult) -> None:
        self._restart_timer()

    def close(self) -> None:
        faulthandler.cancel_dump_traceback_later()
        self.file.close()
        Path(self.file.name).unlink(missing_ok=True)

    def _restart_timer(self) -> None:
        faulthandler.dump_traceback_later(self.seconds, exit=True, file=self.file)


class RecordingHook(Hook):
    """Hook that sends each step to the recorder, on rank 0, and votes for a stop if the driver requests one."""

    votes = ("stop",)

    def __init__(self, recorder: RecorderClient, is_first: bool) -> None:
        self.recorder, self.is_first = recorder, is_first
        self.answer: ray.ObjectRef | None = None

    def vote(self) -> dict[str, float]:
        # The answer to the previous step has had a whole step to arrive, so this does not wait.
        return {"stop": float(self.answer is not None and ray.get(self.answer))}

    def on_step_end(self, step: StepResult) -> None:
        step.should_stop = step.should_stop or step.votes["stop"] > 0
        if self.is_first:
            self.answer = self.recorder.write_step(step.number, step.values, step.used)

    def close(self) -> None:
        if self.answer is not None:
            ray.get(self.answer)


class PreemptionHook(Hook):
    """Hook that requests a checkpoint when Ray announces that a machine of the workers will be preempted.

    The announcement to rank 0 counts. `ray.train.get_preemption_info` is a collective over all workers of Ray, and
    would wait forever for idle workers that do not share the global batch.
    """

    votes = ("preempted",)

    def __init__(self, recorder: RecorderClient, is_first: bool) -> None:
        self.recorder, self.is_first = recorder, is_first
        self.announced: dict[str, list[int]] = {}
        """Ranks by node that will be preempted, as Ray announces them now."""
        self.handled: dict[str, list[int]] = {}
        """The same, at the last requested checkpoint."""

    def vote(self) -> dict[str, float]:
        # Internal API of Ray 2.60: the state that Ray Train keeps for this worker, without asking the others.
        info = get_train_context().preemption_context.preemption_info
        self.announced = info.preempted_node_to_ranks if info else {}
        return {"preempted": float(self.is_first and self.announced != self.handled)}

    def on_step_end(self, step: StepResult) -> None:
        if not step.votes["preempted"]:
            return
        # All ranks set the flag, because all of them see the same sum of votes.
        step.should_save = True
        self.handled = self.announced
        if self.is_first:
            ranks = sorted(rank for node_ranks in self.handled.values() for rank in node_ranks)
            self.recorder.add_message(f"ranks {ranks} will be preempted: a checkpoint after step {step.number}")


@dataclass
class CheckpointHook(Hook):
    """Hook that saves checkpoints. Uploads run during the next steps; a later step commits the checkpoint.

    A checkpoint that storage refuses does not stop training, except after the last step.

    Args:
        engine: engine of this rank.
        plan: plan of the stage.
        recorder: gets messages and the cursors of checkpoints.
        data: fingerprint of each set, for the manifest.
        model: description of the model, for the manifest.
        upload: this rank's upload in progress.
        last_saved_step: step of the last checkpoint that was begun.
        losses: losses of the steps since then.
    """

    votes = ("upload_done",)

    engine: "DeepSpeedEngineProtocol"
    plan: StagePlan
    recorder: RecorderClient
    data: dict[str, str]
    model: dict[str, Any]
    upload: Upload | None = None
    last_saved_step: int = 0
    losses: list[float] = field(default_factory=list)
    _manifest: dict[str, Any] = field(default_factory=dict)
    _commit_future: Future[Failure | None] | None = None
    _pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))

    def vote(self) -> dict[str, float]:
        # Never wait here: the votes of a step must not delay it.
        return {"upload_done": float(self.upload is not None and self.upload.is_done)}

    def on_step_end(self, step: StepResult) -> None:
        self.losses.append(step.values["loss"])
        # The sum of the votes is equal on all ranks, so all ranks enter the collective at the same step.
        if self.upload and step.votes["upload_done"] == dist.get_world_size():
            self._gather_and_commit()
        is_due = step.number % self.plan.stage.save_steps == 0
        if (is_due or step.should_save or step.is_last or step.should_stop) and step.number != self.last_saved_step:
            self._begin_upload(step)
        if step.is_last or step.should_stop:
            failure = self.finish()
            if failure and step.is_last:
                error_class = ValueError if failure.kind == Kind.PERMANENT else OSError
                raise error_class(failure.text)

    def finish(self) -> Failure | None:
        """Wait until the checkpoint in progress is committed, and return its error if any. A collective."""
        self._gather_and_commit()
        return self._wait_for_commit()

    def close(self) -> None:
        self._pool.shutdown(wait=False)

    def _begin_upload(self, step: StepResult) -> None:
        """Copy the state and start the upload, after the previous checkpoint is complete."""
        # If storage is slower than training, wait for the previous upload here.
        self._gather_and_commit()
        url = storage.join(self.plan.folder, checkpoint.format_step_name(step.number))
        # NaN is the only value that differs from itself.
        finite = [loss for loss in self.losses if loss == loss]
        self._manifest = {
            "cursor": step.number,
            "updates": fragments.count_updates(self.engine),
            "workers": dist.get_world_size(),
            "loss": sum(finite) / len(finite) if finite else sys.float_info.max,
            "data": self.data,
            "model": self.model,
        }
        self.losses = []
        self.last_saved_step = step.number
        self.upload = Upload(url, dist.get_rank(), fragments.owned_fragments(self.engine))

    def _gather_and_commit(self) -> None:
        """Wait for the uploads of all ranks; rank 0 then commits the checkpoint in a thread. A collective."""
        if self.upload is None:
            return
        upload = self.upload
        self.upload = None
        error = upload.error()
        parts: list[tuple[Failure | None, dict[str, FileEntry]]] = [(None, {})] * dist.get_world_size()
        dist.all_gather_object(parts, (error, {} if error else upload.result()))
        if dist.get_rank():
            return
        # One commit at a time, so checkpoints become visible in order.
        self._wait_for_commit()
        files = {name: entry for _, entries in parts for name, entry in entries.items()}
        manifest = Manifest(**self._manifest, files=files)
        errors = [error for error, _ in parts if error]
        self._commit_future = self._pool.submit(self._commit_or_discard, upload.url, manifest, errors)

    def _commit_or_discard(self, url: str, manifest: Manifest, errors: list[Failure]) -> Failure | None:
        """Commit the checkpoint, or remove its files and report the reason. Runs in a thread of rank 0.

        Args:
            url: folder of the checkpoint.
            manifest: its contents.
            errors: errors of the uploads of all ranks.

        Returns:
            The error, with the reported message, or None.
        """
        name, stage = self.plan.name, self.plan.stage
        failure = errors[0] if errors else self._commit(url, manifest)
        if failure:
            message = f"{name}: no checkpoint after step {manifest.cursor}: {failure.text}"
            self.recorder.add_message(message)
            # An unreachable store also refuses the removal. The next checkpoint prunes what stays.
            with suppress(OSError, ValueError):
                storage.remove_folder(url)
            return Failure(failure.kind, message)
        try:
            checkpoint.prune(self.plan.folder, manifest.cursor, stage.save_total_limit, stage.save_best_limit)
        except (OSError, ValueError) as error:
            reason = failures.classify_error(error).text
            self.recorder.add_message(f"{name}: checkpoints before step {manifest.cursor} stay for now: {reason}")
        return None

    def _commit(self, url: str, manifest: Manifest) -> Failure | None:
        """Commit the checkpoint and return the error of the storage, if any."""
        try:
            # First flush metrics.jsonl, so that after a crash of the machine the record reaches the cursor.
            self.recorder.sync()
            checkpoint.commit(url, manifest, self.plan.job)
        except (OSError, ValueError) as error:
            return failures.classify_error(error)
        self.recorder.record_checkpoint(manifest.cursor)
        return None

    def _wait_for_commit(self) -> Failure | None:
        """Wait for the commit in progress and return its error, if any."""
        future = self._commit_future
        self._commit_future = None
        return future.result() if future else None
