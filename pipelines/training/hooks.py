"""What happens beside the steps: each a hook that every rank calls after every step.

Hooks on all ranks must come to the same decision at the same step, or they would wait for each other without end.  So
what one rank alone knows (its upload is done, the driver wants a stop) it gives as a vote, and the votes travel as sums
in the one reduction that a step makes anyway.
"""

import faulthandler
import os
import sys
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import ray
import torch.distributed as dist
from ray.train.v2._internal.execution.context import get_train_context

from pipelines.core import failures, storage
from pipelines.core.failures import Failure, Kind
from pipelines.data.consumed import ConsumedSamples
from pipelines.training import checkpoint, fragments
from pipelines.training.checkpoint import File, Manifest, Upload
from pipelines.training.plan import Plan


@dataclass
class Step:
    """A global batch that was done.

    values: what it was like.  votes: sums over ranks, by name.
    stopping: this is the last one for now.  save: a checkpoint is asked for.
    """

    number: int
    last: bool
    values: dict[str, float]
    used: ConsumedSamples
    votes: dict[str, float]
    stopping: bool = False
    save: bool = False


class Hook:
    """Does nothing."""

    votes: ClassVar[Sequence[str]] = ()

    def vote(self) -> dict[str, float]:
        """This rank's votes, asked for before a step is summed up; 0 where nothing is said."""
        return {}

    def __call__(self, step: Step) -> None:
        """After a step."""

    def close(self) -> None:
        """After the last step; not where a fault ends the process."""


class Watchdog(Hook):
    """Ends this process where no step is finished in time, so that all workers are started again.

    A thread of the interpreter's C code, which also works while the hung code holds Python's lock.  The stacks of all
    threads are left in `folder`.
    """

    def __init__(self, seconds: float, folder: Path, rank: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.glob(f"rank-{rank}-*.txt"):
            if not path.stat().st_size:  # of a process that was killed otherwise
                path.unlink()
        self.seconds = seconds
        self.file = (folder / f"rank-{rank}-{os.getpid()}.txt").open("w")
        self._wait()

    def __call__(self, step: Step) -> None:
        self._wait()

    def close(self) -> None:
        faulthandler.cancel_dump_traceback_later()
        self.file.close()
        os.unlink(self.file.name)

    def _wait(self) -> None:
        faulthandler.dump_traceback_later(self.seconds, exit=True, file=self.file)


class Recording(Hook):
    """Rank 0 sends each step to the recorder, and passes on that the driver wants a stop."""

    votes = ("stop",)

    def __init__(self, recorder: Any, first: bool) -> None:
        self.recorder, self.first = recorder, first
        self.answer: Any = None

    def vote(self) -> dict[str, float]:
        return {"stop": float(self.answer is not None and ray.get(self.answer))}

    def __call__(self, step: Step) -> None:
        step.stopping = step.stopping or step.votes["stop"] > 0
        if self.first:
            self.answer = self.recorder.write.remote(step.number, step.values, step.used)

    def close(self) -> None:
        if self.answer is not None:
            ray.get(self.answer)


class Preemption(Hook):
    """Asks for a checkpoint when Ray says that a machine of the workers is about to go.

    What Ray told rank 0 counts.  `ray.train.get_preemption_info` would ask all workers, and wait without end for those
    that the global batch cannot be shared with.
    """

    votes = ("leaving",)

    def __init__(self, recorder: Any, first: bool) -> None:
        self.recorder, self.first = recorder, first
        self.told: dict[str, list[int]] = {}
        self.known: dict[str, list[int]] = {}

    def vote(self) -> dict[str, float]:
        info = get_train_context().preemption_context.preemption_info
        self.told = info.preempted_node_to_ranks if info else {}
        return {"leaving": float(self.first and self.told != self.known)}

    def __call__(self, step: Step) -> None:
        if not step.votes["leaving"]:
            return
        step.save = True
        self.known = self.told
        if self.first:
            ranks = sorted(rank for each in self.known.values() for rank in each)
            self.recorder.say.remote(f"ranks {ranks} will be preempted: a checkpoint after step {step.number}")


@dataclass
class Checkpoints(Hook):
    """Saves the engine now and then; its upload goes on beside the next steps, and is made a checkpoint at one of them.

    Storage that does not take one is no reason to stop training, but after the last step nothing else is left to do.
    """

    votes = ("stored", "unstored")

    engine: Any
    plan: Plan
    recorder: Any
    data: dict[str, str]
    model: dict[str, Any]
    upload: Upload | None = None
    saved: int = 0
    losses: list[float] = field(default_factory=list)
    _manifest: dict[str, Any] = field(default_factory=dict)
    _commit: Future[Failure | None] | None = None
    _pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))

    def vote(self) -> dict[str, float]:
        done = self.upload is not None and self.upload.done
        failed = done and self.upload is not None and self.upload.failed
        return {"stored": float(done and not failed), "unstored": float(failed)}

    def __call__(self, step: Step) -> None:
        self.losses.append(step.values["loss"])
        workers = dist.get_world_size()
        if self.upload and step.votes["stored"] + step.votes["unstored"] == workers:
            self._finish()
        due = step.number % self.plan.stage.save_steps == 0
        if (due or step.save or step.last or step.stopping) and step.number != self.saved:
            self._begin(step)
        if step.last or step.stopping:
            failed = self.finish()
            if failed and step.last:
                raise (ValueError if failed.kind == Kind.PERMANENT else OSError)(failed.text)

    def finish(self) -> Failure | None:
        """Wait until what is on its way is a checkpoint; returns why it is none.  All ranks call it together."""
        self._finish()
        return self._wait()

    def close(self) -> None:
        self._pool.shutdown(wait=False)

    def _begin(self, step: Step) -> None:
        self._finish()  # the one before, should storage be slower than training
        url = storage.join(self.plan.folder, checkpoint.name(step.number))
        finite = [loss for loss in self.losses if loss == loss]
        self._manifest = {
            "cursor": step.number,
            "updates": fragments.updates(self.engine),
            "workers": dist.get_world_size(),
            "loss": sum(finite) / len(finite) if finite else sys.float_info.max,
            "data": self.data,
            "model": self.model,
        }
        self.losses = []
        self.saved = step.number
        self.upload = Upload(url, dist.get_rank(), fragments.owned(self.engine))

    def _finish(self) -> None:
        """Wait for all ranks' uploads and make them a checkpoint; one that storage did not take is said, no more."""
        if self.upload is None:
            return
        upload, self.upload = self.upload, None
        error = upload.error()
        parts: list[tuple[Failure | None, dict[str, File]]] = [(None, {})] * dist.get_world_size()
        dist.all_gather_object(parts, (error, {} if error else upload.result()))
        if dist.get_rank():
            return
        self._wait()
        files = {name: file for _, each in parts for name, file in each.items()}
        manifest = Manifest(**self._manifest, files=files)
        self._commit = self._pool.submit(self._settle, upload.url, manifest, [error for error, _ in parts if error])

    def _settle(self, url: str, manifest: Manifest, errors: list[Failure]) -> Failure | None:
        """Make the checkpoint, or say why there is none; returns what was said."""
        of = self.plan
        failure = errors[0] if errors else self._make(url, manifest)
        if failure:
            message = f"{of.name}: no checkpoint after step {manifest.cursor}: {failure.text}"
            self.recorder.say.remote(message)
            with suppress(OSError, ValueError):  # a store that is away; what is left goes with the next that is made
                storage.remove_folder(url)
            return Failure(failure.kind, message)
        try:
            checkpoint.prune(of.folder, manifest.cursor, of.stage.save_total_limit, of.stage.save_best_limit)
        except (OSError, ValueError) as error:
            why = failures.classify_error(error).text
            self.recorder.say.remote(f"{of.name}: checkpoints before step {manifest.cursor} stay for now: {why}")
        return None

    def _make(self, url: str, manifest: Manifest) -> Failure | None:
        """Make the checkpoint; returns why storage did not take it."""
        try:
            ray.get(self.recorder.sync.remote())  # the record reaches the cursor
            checkpoint.commit(url, manifest, self.plan.job)
        except (OSError, ValueError) as error:
            return failures.classify_error(error)
        self.recorder.save.remote(manifest.cursor)
        return None

    def _wait(self) -> Failure | None:
        """For the commit before; returns why storage did not take it."""
        commit, self._commit = self._commit, None
        return commit.result() if commit else None
