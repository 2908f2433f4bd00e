"""Driver of one training stage: Ray Train workers, each a DeepSpeed rank, fed in order by Ray Data.

    checkpoints/STAGE/step-000100/   checkpoints to resume from (pipelines/training/checkpoint.py)
    checkpoints/STAGE/model/         the trained model, as save_pretrained writes it; its manifest ends the stage

The global batch size is configured. The number of micro-batches that each worker accumulates follows from the number of
workers. Order, loss and learning rate therefore do not depend on the number of workers. Workers that cannot share the
global batch evenly stay idle.

Ray restarts all workers after every fault. It does not know about checkpoints: workers find the newest intact one in
storage, where a crash cannot lose it and another driver finds it.
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
from pipelines.training.plan import StagePlan
from pipelines.training.recorder import RecorderClient
from pipelines.training.worker import HookFactory, train_worker

MAX_RAY_RESTARTS = 1_000_000
"""Restarts that Ray allows, in effect unlimited. The recorder ends a run that makes no progress."""

WORKER_EXIT_S = 60
"""Seconds that workers get to end with a checkpoint after the run has failed."""

PLACEMENT_NOTICE_S = 10
"""Seconds without placed workers after which the driver reports the missing resources."""

StopCallback = Callable[[Path, str, int, int], bool]
"""Called about twice a second with (run folder, stage, last recorded step, number of steps); True stops the stage."""


class StoppedError(Exception):
    """Raised after the stop callback has stopped a stage."""


def train_stage(
    plan: StagePlan, extra_hook_factories: Sequence[HookFactory] = (), should_stop: StopCallback | None = None
) -> None:
    """Train a stage to its end, from its newest checkpoint if there is one. Does nothing if the model exists.

    SIGTERM and SIGINT make a checkpoint first, within recovery.grace_s seconds.

    Args:
        plan: plan of the stage.
        extra_hook_factories: make hooks that run after those of this package.
        should_stop: called in this process during training, and once after the last step.

    Raises:
        ValueError: the user must change something, or workers failed recovery.restarts times without progress.
        StoppedError: `should_stop` returned True.
        KeyboardInterrupt: a signal stopped the command.
    """
    if export.is_complete(plan.result):
        return
    # Without a configured number, use as many workers as the cluster has places for.
    plan = plan.with_workers(cluster.count_model_processes(plan.gpu_share))
    assert plan.workers
    reader = plan.build_reader()
    steps = plan.count_steps(reader.order)
    _print_summary(plan, sum(reader.order.samples), steps)

    # Check resources and storage before anything starts: better now than after the last step.
    resources = _worker_resources(plan)
    fewest, _ = plan.workers
    readers = 1 if plan.leaves_cpus_to_readers("GPU" in resources) else 0
    needed = {name: fewest * amount for name, amount in resources.items()}
    cluster.require_resources(
        {**needed, "CPU": needed["CPU"] + readers}, f"train.{plan.name} with num_workers = {fewest}"
    )
    check_writable(plan.folder)

    # A driver that was killed may have left workers behind.
    remove_placement_group(plan.run)
    client = recorder.start_recorder(
        recorder.RecorderSettings(
            run=plan.run,
            stage=plan.name,
            job_name=plan.job_name,
            job=yaml.safe_load(plan.job) or {},
            trackers=plan.trackers,
            restarts=plan.recovery.restarts,
            max_replaced=plan.max_bad_fraction * steps * plan.stage.global_batch_size,
            max_skipped=plan.stage.max_nonfinite_steps,
        )
    )
    try:
        _run_workers(plan, reader, steps, client, extra_hook_factories, should_stop)
        export.export_result(plan, steps)
        client.close("end")
    except (KeyboardInterrupt, StoppedError, ValueError, OSError):
        # On a full disk the record cannot be closed, either. The error that ended the stage is the one to report.
        with suppress(OSError):
            client.close("stop")
        raise
    finally:
        # A second signal must not leave the actor or the workers behind.
        with interrupts.defer_signals():
            client.kill()
            remove_placement_group(plan.run)


def _print_summary(plan: StagePlan, samples: int, steps: int) -> None:
    """Print steps, epochs, workers x micro-batch size x accumulation steps, and the device."""
    assert plan.workers
    fewest, most = plan.workers
    stage = plan.stage
    epochs = steps * stage.global_batch_size / samples
    workers = f"{most} workers" if fewest == most else f"{fewest} to {most} workers"
    accumulation_steps = stage.count_accumulation_steps(stage.count_usable_workers(most))
    device = "GPUs" if "GPU" in _worker_resources(plan) else "CPUs"
    print(
        f"{plan.name}: {steps} steps of {stage.global_batch_size} = {epochs:.4g} epochs of {samples} samples, "
        f"{workers} x {stage.micro_batch_size} x {accumulation_steps}, on {device}"
    )


def _run_workers(
    plan: StagePlan,
    reader: ingest.Reader,
    steps: int,
    client: RecorderClient,
    extra_hook_factories: Sequence[HookFactory],
    should_stop: StopCallback | None,
) -> None:
    """Run the workers in Ray Train and show their progress until the last step.

    Args:
        plan: plan of the stage, with its number of workers.
        reader: reader of the micro-batches.
        steps: number of global batches.
        client: recorder of the stage.
        extra_hook_factories: see `train_stage`.
        should_stop: see `train_stage`.
    """
    assert plan.workers
    fewest, most = plan.workers
    resources = _worker_resources(plan)

    # Ray Train requires a storage folder. Nothing in it is needed later.
    with tempfile.TemporaryDirectory() as scratch:
        trainer = TorchTrainer(
            train_worker,
            # Pickled to every worker. The recorder client contains the handle of the actor.
            train_loop_config={
                "plan": plan,
                "reader": reader,
                "steps": steps,
                "recorder": client,
                "extra_hook_factories": tuple(extra_hook_factories),
            },
            scaling_config=ray.train.ScalingConfig(
                num_workers=(fewest, most) if plan.is_elastic else fewest,
                elastic_resize_monitor_interval_s=plan.recovery.resize_s,
                use_gpu="GPU" in resources,
                resources_per_worker=resources,
            ),
            torch_config=rendezvous.Rendezvous(),
            run_config=ray.train.RunConfig(
                name=plan.name,
                storage_path=scratch,
                failure_config=ray.train.FailureConfig(max_failures=MAX_RAY_RESTARTS),
                callbacks=[FaultCallback(client)],
            ),
        )
        # Follow the recorder in the main thread, which receives signals, while fit() runs in the thread.
        future = run_in_background(trainer.fit)
        with tqdm(desc=plan.name, total=steps, unit="step") as bar:
            progress = StageProgress(client, bar)
            try:
                _show_until_done(
                    progress, future, lambda step: bool(should_stop and should_stop(plan.run, plan.name, step, steps))
                )
            except (KeyboardInterrupt, StoppedError) as error:
                client.request_stop()
                progress.show()
                # Workers without a finished step have nothing to save and end with Ray. After a StoppedError this
                # process continues, and Ray with it, so wait for them in that case, too.
                if not progress.phase or isinstance(error, StoppedError):
                    hint = "; a second signal stops at once" if isinstance(error, KeyboardInterrupt) else ""
                    bar.write(f"{plan.name}: stopping after a checkpoint{hint}")
                    wait([future], timeout=plan.recovery.grace_s)
                    progress.show()
                raise


def run_in_background(work: Callable[[], Any]) -> Future[Any]:
    """Run a function in a daemon thread, which ends with the process.

    In the main thread, fit() of Ray Train 2.60 takes Ctrl-C for itself and exits with code 0, and it never returns if
    Ray itself has ended.
    """
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def _worker_resources(plan: StagePlan) -> dict[str, float]:
    """Return the resources that one worker requests from Ray.

    A GPU, or a share of one, if the cluster has GPUs. Half a CPU if the other CPUs are left to readers. Otherwise a
    whole CPU, because Ray counts in whole CPUs how many workers of an elastic group fit.
    """
    if ray.cluster_resources().get("GPU", 0):
        return {"CPU": 0.5, "GPU": plan.gpu_share}
    return {"CPU": 0.5 if plan.leaves_cpus_to_readers(uses_gpus=False) else 1}


def _show_until_done(progress: "StageProgress", future: Future[Any], should_stop: Callable[[int], bool]) -> None:
    """Show the progress until the workers end.

    Raises:
        StoppedError: `should_stop` returned True for the last recorded step.
        ValueError: the recorder failed the run.
    """
    while not wait([future], timeout=0.5).done:
        interrupts.raise_if_interrupted()
        if progress.show():
            # The run has failed. Give the workers time to end with a checkpoint.
            wait([future], timeout=WORKER_EXIT_S)
            break
        if should_stop(progress.bar.n):
            raise StoppedError
    failed = progress.show()
    if failed:
        raise ValueError(failed)
    future.result()
    # Report the last step. The stage is done, so the answer does not matter.
    should_stop(progress.bar.n)


class StageProgress:
    """Progress bar of a stage, from the status of the recorder.

    Attributes:
        phase: phase of workers without a finished step, otherwise "".
    """

    def __init__(self, client: RecorderClient, bar: tqdm) -> None:
        self.client, self.bar = client, bar
        self.starts = 0
        self.phase = recorder.STARTING_WORKERS
        self.phase_since = time.monotonic()
        self.shortage = ""
        bar.set_postfix_str(self.phase)

    def show(self) -> str:
        """Show messages, phase, loss and step. Returns the reason for which the run must end, or ""."""
        status = self.client.poll()
        for text in status.messages:
            self.bar.write(text)
        # A new group of workers: the bar jumps back to the checkpoint.
        if status.starts != self.starts:
            self.starts = status.starts
            self._reset_bar(status.cursor)
        if status.phase != self.phase:
            self.phase = status.phase
            self.phase_since = time.monotonic()
            self.bar.set_postfix_str(status.phase)
        if self.phase == recorder.STARTING_WORKERS and time.monotonic() - self.phase_since > PLACEMENT_NOTICE_S:
            self._show_shortage()
        if status.loss is not None and not status.phase:
            self.bar.set_postfix_str(f"loss {status.loss:.3f}", refresh=False)
        self.bar.update(status.step - self.bar.n)
        return status.failed

    def _show_shortage(self) -> None:
        """Show the resources that Ray cannot place, each time they change."""
        shortage = cluster.describe_shortage()
        if shortage and shortage != self.shortage:
            self.bar.write(f"{self.bar.desc.rstrip(': ')}: {shortage}")
        self.shortage = shortage

    def _reset_bar(self, cursor: int) -> None:
        """Count steps and time from the cursor on. Restored steps took no time and would distort the rate."""
        bar = self.bar
        bar.initial = bar.n = bar.last_print_n = cursor
        if not bar.disable:
            bar.start_t = bar.last_print_t = time.time()


def remove_placement_group(run: Path) -> None:
    """Free the resources of workers that nobody waited for, or whose driver was killed while Ray stayed.

    Ray Train leaves this to an actor that asks Ray's dashboard. A Ray that the command starts itself has no dashboard.
    """
    path = run / recorder.PLACEMENT_GROUP_FILE
    if path.exists():
        placement_group = PlacementGroup(PlacementGroupID(bytes.fromhex(path.read_text())))
        # Ray ignores a group that is already removed or belongs to another Ray.
        ray.util.remove_placement_group(placement_group)
        path.unlink()


def check_writable(folder: str) -> None:
    """Write and remove a file.

    Raises:
        ValueError: no checkpoint can be written in this folder.
    """
    path = storage.join(folder, ".probe")
    try:
        storage.write(path, b"")
        storage.remove(path)
    except OSError as error:
        raise ValueError(f"checkpoints: {failures.classify_error(error).text}") from None


class FaultCallback(ray.train.UserCallback):
    """Sends the errors of failed workers to the recorder. Runs in the process of Ray Train's controller."""

    def __init__(self, client: RecorderClient) -> None:
        self.client = client

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Called by Ray Train before it restarts the workers."""
        self.client.record_fault({rank: failures.classify_error(error) for rank, error in worker_exceptions.items()})
