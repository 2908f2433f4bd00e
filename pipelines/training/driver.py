"""One training stage: Ray Train workers, each a DeepSpeed rank, fed in order by Ray Data.

    checkpoints/STAGE/step-000100/   to go on from (pipelines/training/checkpoint.py)
    checkpoints/STAGE/model/         what the stage made, as save_pretrained writes it; its manifest ends the stage

The global batch is what is configured; the number of micro-batches that each worker adds up to it is derived from the
number of workers, so order, loss and learning rate do not depend on how many there are.  Workers that the global batch
cannot be shared with stay idle.

Ray starts all workers again after any fault.  It knows of no checkpoint: which is the newest whole one is seen in
storage, where a crash cannot lose it, and where another driver finds it.
"""

import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
import ray.train
import yaml
from ray import PlacementGroupID
from ray.train.torch import TorchTrainer
from ray.util.placement_group import PlacementGroup
from tqdm import tqdm

from pipelines.core import cluster, failures, interrupts, storage
from pipelines.data import ingest
from pipelines.training import export, recorder, rendezvous
from pipelines.training.plan import Plan
from pipelines.training.worker import HookMaker, train_worker

RESTARTS = 1_000_000
"""Of workers, as far as Ray counts: the recorder ends a run that gets no further."""

ENDING_S = 60
"""For workers to end by themselves, with a checkpoint, when the run must."""

PLACE_S = 10
"""For Ray to place workers, after which is said what they wait for."""

Watch = Callable[[Path, str, int, int], bool]
"""Hears how a stage gets on: run folder, stage, the last step on record there, and how many there are; returns whether
the stage is to stop."""


class StoppedError(Exception):
    """Who watches the stage wants it to stop."""


def train_stage(plan: Plan, more: Sequence[HookMaker] = (), watch: Watch | None = None) -> None:
    """Train the stage to its end, from its newest checkpoint if there is one; with a model it is at its end.

    more: hooks after each step, besides the stage's own.
    watch: called here, every now and then; the last step is among what it hears of.  StoppedError when it wants so.
    Raises ValueError for what the user must change, and after recovery.restarts starts that came no further.
    A signal that stops the command makes a checkpoint first, for which there are recovery.grace_s seconds.
    """
    if export.finished(plan.result):
        return
    plan = plan.with_workers(cluster.count_places(plan.gpu_share))
    assert plan.workers
    reader = plan.reader()
    samples, steps = sum(reader.order.samples), plan.steps(reader.order)
    fewest, most = plan.workers
    print(
        f"{plan.name}: {steps} steps of {plan.stage.global_batch_size} = "
        f"{steps * plan.stage.global_batch_size / samples:.4g} epochs of {samples} samples, "
        + (f"{most} workers" if fewest == most else f"{fewest} to {most} workers")
        + f" x {plan.stage.micro_batch_size} x {plan.stage.accumulation(plan.stage.usable(most))}"
        + f", on {'GPUs' if 'GPU' in _resources(plan) else 'CPUs'}"
    )
    worker = _resources(plan)
    readers = 1 if plan.leaves_cpus_to_readers("GPU" in worker) else 0
    needed = {name: fewest * each for name, each in worker.items()}
    cluster.require({**needed, "CPU": needed["CPU"] + readers}, f"train.{plan.name} with workers = {fewest}")
    probe(plan.folder)
    release(plan.run)
    actor = recorder.start(
        recorder.Settings(
            run=plan.run,
            stage=plan.name,
            title=plan.title,
            job=yaml.safe_load(plan.job) or {},
            trackers=plan.trackers,
            restarts=plan.recovery.restarts,
            max_replaced=plan.tolerance * steps * plan.stage.global_batch_size,
            max_skipped=plan.stage.max_nonfinite_steps,
        )
    )
    try:
        _train(plan, reader, steps, actor, more, watch)
        export.model(plan, steps)
        ray.get(actor.close.remote("end"))
    except (KeyboardInterrupt, StoppedError, ValueError, OSError):
        with suppress(OSError):  # of a full disk; the error that ended the stage is the one to tell
            ray.get(actor.close.remote("stop"))
        raise
    finally:
        with interrupts.deferred():
            ray.kill(actor)
            release(plan.run)


def _train(
    plan: Plan, reader: ingest.Reader, steps: int, actor: Any, more: Sequence[HookMaker], watch: Watch | None
) -> None:
    """Have Ray's workers do the steps, and show how it goes."""
    assert plan.workers
    fewest, most = plan.workers
    resources = _resources(plan)
    with tempfile.TemporaryDirectory() as scratch:  # Ray Train wants a folder, of which nothing is needed later
        trainer = TorchTrainer(
            train_worker,
            train_loop_config={"plan": plan, "reader": reader, "steps": steps, "recorder": actor, "more": tuple(more)},
            scaling_config=ray.train.ScalingConfig(
                num_workers=(fewest, most) if plan.elastic else fewest,
                elastic_resize_monitor_interval_s=plan.recovery.resize_s,
                use_gpu="GPU" in resources,
                resources_per_worker=resources,
            ),
            torch_config=rendezvous.Rendezvous(),
            run_config=ray.train.RunConfig(
                name=plan.name,
                storage_path=scratch,
                failure_config=ray.train.FailureConfig(max_failures=RESTARTS),
                callbacks=[Faults(actor)],
            ),
        )
        future = aside(trainer.fit)
        with tqdm(desc=plan.name, total=steps, unit="step") as bar:
            progress = Progress(actor, bar)
            try:
                _follow(progress, future, lambda step: bool(watch and watch(plan.run, plan.name, step, steps)))
            except (KeyboardInterrupt, StoppedError) as why:
                ray.get(actor.stop.remote())
                progress.show()
                # workers that have done no step have nothing to save, and end with Ray; only where the process goes on,
                # and Ray with it, they are waited for
                if not progress.phase or isinstance(why, StoppedError):
                    again = "; a second signal stops at once" if isinstance(why, KeyboardInterrupt) else ""
                    bar.write(f"{plan.name}: stopping after a checkpoint{again}")
                    wait([future], timeout=plan.recovery.grace_s)
                    progress.show()
                raise


def aside(work: Callable[[], Any]) -> Future[Any]:
    """Do it in a thread of its own, which ends with the process.

    Ray Train's fit() in the main thread takes Ctrl-C for itself and exits with 0, and has no end where Ray has ended.
    """
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def _resources(plan: Plan) -> dict[str, float]:
    """What a worker asks of Ray.

    A GPU, or its share of one, where there are any.  Half a CPU, where it leaves the others to readers; Ray can only
    tell how many workers fit by whole ones.
    """
    if ray.cluster_resources().get("GPU", 0):
        return {"CPU": 0.5, "GPU": plan.gpu_share}
    return {"CPU": 0.5 if plan.leaves_cpus_to_readers(gpus=False) else 1}


def _follow(progress: "Progress", future: Future[Any], stop: Callable[[int], bool]) -> None:
    """Show how it goes until it ends."""
    while not wait([future], timeout=0.5).done:
        interrupts.check()
        if progress.show():
            wait([future], timeout=ENDING_S)
            break
        if stop(progress.bar.n):
            raise StoppedError
    if failed := progress.show():
        raise ValueError(failed)
    future.result()
    stop(progress.bar.n)  # of a stage that is done nothing is left to stop


class Progress:
    """The bar of a stage, as the recorder knows it. phase: before the first step of its workers."""

    def __init__(self, actor: Any, bar: tqdm) -> None:
        self.recorder, self.bar = actor, bar
        self.starts, self.phase = 0, recorder.STARTING
        self.since, self.shortage = time.monotonic(), ""
        bar.set_postfix_str(self.phase)

    def show(self) -> str:
        """Show what is new; returns why the run must end, "" while it need not."""
        news: recorder.News = ray.get(self.recorder.hear.remote())
        for text in news.said:
            self.bar.write(text)
        if news.starts != self.starts:
            self.starts = news.starts
            self._begin(news.cursor)
        if news.phase != self.phase:
            self.phase, self.since = news.phase, time.monotonic()
            self.bar.set_postfix_str(news.phase)
        if self.phase == recorder.STARTING and time.monotonic() - self.since > PLACE_S:
            self._show_shortage()
        if news.loss is not None and not news.phase:
            self.bar.set_postfix_str(f"loss {news.loss:.3f}", refresh=False)
        self.bar.update(news.step - self.bar.n)
        return news.failed

    def _show_shortage(self) -> None:
        """Say, once for each, what workers wait for that Ray cannot place."""
        shortage = cluster.describe_shortage()
        if shortage and shortage != self.shortage:
            self.bar.write(f"{self.bar.desc.rstrip(': ')}: {shortage}")
        self.shortage = shortage

    def _begin(self, cursor: int) -> None:
        """Count steps, and the time that they take, from here on: else rate and time left would be far too good."""
        bar = self.bar
        bar.initial = bar.n = bar.last_print_n = cursor
        if not bar.disable:
            bar.start_t = bar.last_print_t = time.time()


def release(run: Path) -> None:
    """Give back what workers still hold that were not waited for, or whose driver was killed, where Ray itself goes on.

    Ray Train leaves that to an actor which asks Ray's dashboard, and a Ray of one's own has none.
    """
    path = run / recorder.HELD
    if path.exists():
        held = PlacementGroup(PlacementGroupID(bytes.fromhex(path.read_text())))
        ray.util.remove_placement_group(held)  # of one that is gone, or of another Ray, nothing comes
        path.unlink()


def probe(folder: str) -> None:
    """ValueError where no checkpoint can be written: better now than after the last step."""
    path = storage.join(folder, ".probe")
    try:
        storage.write(path, b"")
        storage.remove(path)
    except OSError as error:
        raise ValueError(f"checkpoints: {failures.describe(error).text}") from None


class Faults(ray.train.UserCallback):
    """Tells the recorder why workers will be started again."""

    def __init__(self, recorder: Any) -> None:
        self.recorder = recorder

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Called by Ray Train's controller."""
        described = {rank: failures.describe(error) for rank, error in worker_exceptions.items()}
        ray.get(self.recorder.fault.remote(described))
