"""Driver of one training stage: Ray Train workers, each a DeepSpeed rank, fed in order by Ray Data.

    checkpoints/STAGE/step-000100/   checkpoints to resume from (pipelines/training/checkpoint.py)
    checkpoints/STAGE/model/         the trained model, as save_pretrained writes it; its manifest ends the stage

The global batch size is configured. The number of micro-batches that each worker accumulates follows from the number of
workers. Order, loss and learning rate therefore do not depend on the number of workers. Workers that cannot share the
global batch evenly stay idle.

The workers stay for the next stages of the job, as long as these need the same number of them: new processes take many
seconds to import their libraries. Between two stages they wait while the driver exports the model. For the same reason
they can be started before the first stage, while its data is made.

Ray restarts all workers after every fault. It does not know about checkpoints: workers find the newest intact one in
storage, where a crash cannot lose it and another driver finds it.
"""

import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from contextlib import suppress
from itertools import takewhile
from pathlib import Path
from types import TracebackType
from typing import Any

import ray
import ray.train
import yaml
from ray import PlacementGroupID
from ray.util.placement_group import PlacementGroup
from tqdm import tqdm

from pipelines.core import cluster, failures, interrupts, storage
from pipelines.core.background import run_in_background
from pipelines.core.words import pluralize
from pipelines.data import ingest
from pipelines.training import export, launch, recorder, rendezvous
from pipelines.training.files import is_complete
from pipelines.training.plan import StagePlan, StageWork
from pipelines.training.recorder import RecorderClient
from pipelines.training.worker import GroupWork, HookFactory

MAX_RAY_RESTARTS = 1_000_000
"""Restarts that Ray allows, in effect unlimited. The recorder ends a run that makes no progress."""

WORKER_EXIT_S = 60
"""Seconds that workers get to end with a checkpoint after the run has failed."""

STOP_S = 10
"""Seconds that workers get to end if they have nothing to save."""

POLL_S = 0.2
"""Seconds between two looks at the progress of the workers."""

PLACEMENT_NOTICE_S = 10
"""Seconds without placed workers after which the driver reports the missing resources."""

StopCallback = Callable[[Path, str, int, int], bool]
"""Called a few times a second with (run folder, stage, last recorded step, number of steps); True stops the stage."""


class StoppedError(Exception):
    """Error of a stage that the stop callback has stopped."""


class WorkerGroup:
    """Workers that train the stages of a job one after the other. A context manager: leaving it ends the workers.

    Attributes:
        client: recorder of the workers; None without workers.
        future: result of Ray Train.
        upcoming: plans of the stages that the workers train next.
        started_for: plan of the stage for which workers were started early; None once they have work.
    """

    def __init__(self) -> None:
        self.client: RecorderClient | None = None
        self.future: Future[Any] = Future()
        self.upcoming: list[StagePlan] = []
        self.started_for: StagePlan | None = None
        self._run = Path()
        self._scratch: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> "WorkerGroup":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.end(waits=error is None)

    def expects(self, plan: StagePlan) -> bool:
        """Return True if workers wait for this stage."""
        return not self.future.done() and self.upcoming[:1] == [plan]

    def start_early(self, plan: StagePlan) -> None:
        """Start the workers of a stage before its data exists. They import their libraries and wait for the stage.

        Does nothing if its workers may take all CPUs, because the work before the stage needs one.
        """
        plan = _decide_workers(plan)
        assert plan.workers
        _, most = plan.workers
        resources = _worker_resources(plan)
        free_cpus = ray.cluster_resources().get("CPU", 0) - most * resources["CPU"]
        if free_cpus >= 1 and plan.leaves_cpus_to_readers("GPU" in resources):
            self._start(plan)
            self.started_for = plan

    def _start(self, plan: StagePlan) -> None:
        """Start the recorder and the workers of a stage."""
        # A driver that was killed may have left workers behind.
        remove_placement_group(plan.run)
        self.client = recorder.start_recorder()
        self._run = plan.run
        # Ray Train requires a storage folder. Nothing in it is needed later.
        self._scratch = tempfile.TemporaryDirectory()
        trainer = _make_trainer(plan, self.client, self._scratch.name)
        ingest.start_shared_actors()
        # The main thread receives signals and follows the recorder, while fit() runs in the thread. In the main thread,
        # fit() of Ray Train 2.60 takes Ctrl-C for itself and exits with code 0, and it never returns if Ray has ended.
        self.future = run_in_background(trainer.fit)

    def open_stage(
        self, work: StageWork, later: Sequence[StageWork], extra_hook_factories: Sequence[HookFactory]
    ) -> RecorderClient:
        """Let the waiting workers train a stage, or start new ones if these were not started for it.

        Args:
            work: the stage.
            later: stages after it that the same workers may train.
            extra_hook_factories: see `train_stage`.
        """
        settings = _recorder_settings(work)
        if self.client and self.expects(work.plan):
            self.upcoming = self.upcoming[1:]
            self.client.open_stage(settings)
            return self.client
        if self.client is None or self.started_for != work.plan or self.future.done():
            self.end()
            self._start(work.plan)
        assert self.client
        self.started_for = None
        self.upcoming = [following.plan for following in later]
        self.client.open_stage(settings, GroupWork((work, *later), tuple(extra_hook_factories)))
        return self.client

    def end(self, waits: bool = True) -> None:
        """End the workers and the recorder.

        Args:
            waits: give workers that wait for a stage the time to end by themselves.
        """
        if self.client is None:
            return
        # A second signal must not leave the actor or the workers behind.
        with interrupts.defer_signals():
            if waits and not self.future.done():
                # Workers that wait for a stage end at once.
                self.client.request_stop()
                wait([self.future], timeout=STOP_S)
            self.client.kill()
            remove_placement_group(self._run)
            assert self._scratch
            self._scratch.cleanup()
            self.client = self.started_for = None


def train_stage(
    plan: StagePlan,
    extra_hook_factories: Sequence[HookFactory] = (),
    should_stop: StopCallback | None = None,
    group: WorkerGroup | None = None,
    later: Sequence[StagePlan] = (),
) -> None:
    """Train a stage to its end, from its newest checkpoint if there is one. Does nothing if the model exists.

    SIGTERM and SIGINT make a checkpoint first, within recovery.grace_s seconds.

    Args:
        plan: plan of the stage.
        extra_hook_factories: make hooks that run after those of this package.
        should_stop: called in this process during training, and once after the last step.
        group: workers that stay for later stages. None ends the workers with the stage.
        later: plans of the stages after this one, if there is a group.

    Raises:
        ValueError: the user must change something, or workers failed recovery.restarts times without progress.
        StoppedError: `should_stop` returned True.
        KeyboardInterrupt: a signal stopped the command.
    """
    if is_complete(plan.result):
        return
    if group is None:
        with WorkerGroup() as group:
            train_stage(plan, extra_hook_factories, should_stop, group)
        return
    work = _prepare_stage(plan)
    _print_summary(work)
    _check_stage(work.plan)
    # The model of a later stage may exist already: it is skipped, and new workers train those after it.
    if group.expects(work.plan):
        prepared = list[StageWork]()
    else:
        unfinished = takewhile(lambda following: not is_complete(following.result), later)
        prepared = list(map(_prepare_stage, unfinished))
    next_stages = list(takewhile(lambda following: following.plan.workers == work.plan.workers, prepared))
    client = group.open_stage(work, next_stages, extra_hook_factories)
    try:
        _follow_workers(work, group, client, should_stop)
        export.export_result(work.plan, work.steps)
        _close_record(client, "end")
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt | StoppedError | ValueError | OSError):
            # On a full disk the record cannot be closed, either. The error that ended the stage is the one to report.
            with suppress(OSError):
                _close_record(client, "stop")
        group.end(waits=False)
        raise
    if not group.upcoming:
        group.end()


def _close_record(client: RecorderClient, event: str) -> None:
    """Close the record of a stage, and show its last messages, such as errors of trackers at their end."""
    for text in client.close(event):
        print(text, flush=True)


def _prepare_stage(plan: StagePlan) -> StageWork:
    """Decide the number of workers of a stage, and build its reader."""
    plan = _decide_workers(plan)
    reader = plan.build_reader()
    return StageWork(plan, reader, plan.count_steps(reader.order))


def _decide_workers(plan: StagePlan) -> StagePlan:
    """Return the plan with its number of workers. None configured means as many as the cluster can run."""
    return plan.with_workers(cluster.count_model_processes(plan.gpu_share))


def _check_stage(plan: StagePlan) -> None:
    """Check resources and storage before anything starts: better now than after the last step.

    Raises:
        ValueError: the cluster is too small, or no checkpoint can be written.
    """
    assert plan.workers
    resources = _worker_resources(plan)
    fewest, _ = plan.workers
    readers = 1 if plan.leaves_cpus_to_readers("GPU" in resources) else 0
    needed = {name: fewest * amount for name, amount in resources.items()}
    cluster.require_resources(
        {**needed, "CPU": needed["CPU"] + readers}, f"train.{plan.name} with num_workers = {fewest}"
    )
    check_writable(plan.folder)


def _recorder_settings(work: StageWork) -> recorder.RecorderSettings:
    """Return the settings of the recorder for a stage."""
    plan = work.plan
    return recorder.RecorderSettings(
        run=plan.run,
        stage=plan.name,
        job_name=plan.job_name,
        job=yaml.safe_load(plan.job) or {},
        trackers=plan.trackers,
        restarts=plan.recovery.restarts,
        max_replaced=plan.max_bad_fraction * work.steps * plan.stage.global_batch_size,
        max_skipped=plan.stage.max_nonfinite_steps,
    )


def _print_summary(work: StageWork) -> None:
    """Print steps, epochs, workers x micro-batch size x accumulation steps, and the device."""
    plan, steps, samples = work.plan, work.steps, sum(work.reader.order.samples)
    assert plan.workers
    fewest, most = plan.workers
    stage = plan.stage
    epochs = steps * stage.global_batch_size / samples
    workers = pluralize(most, "worker") if fewest == most else f"{fewest} to {most} workers"
    accumulation_steps = stage.count_accumulation_steps(stage.count_usable_workers(most))
    device = "GPUs" if "GPU" in _worker_resources(plan) else "CPUs"
    packing = f", packed in rows of up to {stage.packing.max_length} tokens" if stage.packing else ""
    print(
        f"{plan.name}: {steps} steps of {stage.global_batch_size} = {epochs:.4g} epochs of {samples} samples, "
        f"{workers} x {stage.micro_batch_size} x {accumulation_steps}, on {device}{packing}"
    )


def _make_trainer(plan: StagePlan, client: RecorderClient, scratch: str) -> launch.StageTrainer:
    """Make Ray Train's trainer for stages with the same number of workers.

    Args:
        plan: plan of the first stage.
        client: recorder of the stages.
        scratch: empty folder.
    """
    assert plan.workers
    fewest, most = plan.workers
    resources = _worker_resources(plan)
    return launch.StageTrainer(
        launch.run_worker,
        # Pickled to every worker. The recorder client contains the handle of the actor.
        train_loop_config={"recorder": client},
        scaling_config=ray.train.ScalingConfig(
            num_workers=(fewest, most) if plan.is_elastic else fewest,
            elastic_resize_monitor_interval_s=plan.recovery.resize_s,
            use_gpu="GPU" in resources,
            resources_per_worker=resources,
        ),
        backend_config=rendezvous.Rendezvous(),
        run_config=ray.train.RunConfig(
            name=plan.name,
            storage_path=scratch,
            failure_config=ray.train.FailureConfig(max_failures=MAX_RAY_RESTARTS),
            callbacks=[launch.FaultCallback(client)],
        ),
    )


def _follow_workers(
    work: StageWork, group: WorkerGroup, client: RecorderClient, should_stop: StopCallback | None
) -> None:
    """Show the progress of the workers until the last step of a stage.

    Args:
        work: the stage.
        group: its workers.
        client: recorder of the stage.
        should_stop: see `train_stage`.
    """
    plan, steps = work.plan, work.steps
    with tqdm(desc=plan.name, total=steps, unit="step") as bar:
        progress = StageProgress(client, bar)
        try:
            _show_until_done(
                progress, group, lambda step: bool(should_stop and should_stop(plan.run, plan.name, step, steps))
            )
        except (KeyboardInterrupt, StoppedError) as error:
            client.request_stop()
            progress.show()
            # Workers without a finished step have nothing to save and end with Ray. After a StoppedError this
            # process continues, and Ray with it, so wait for them in that case, too.
            if not progress.worker_phase or isinstance(error, StoppedError):
                hint = "; a second signal stops at once" if isinstance(error, KeyboardInterrupt) else ""
                bar.write(f"{plan.name}: stopping after a checkpoint{hint}")
                wait([group.future], timeout=plan.recovery.grace_s)
                progress.show()
            raise


def _worker_resources(plan: StagePlan) -> dict[str, float]:
    """Return the resources that one worker requests from Ray.

    A GPU, or a share of one, if the cluster has GPUs. Half a CPU if the other CPUs are left to readers. Otherwise a
    whole CPU, because Ray counts in whole CPUs how many workers of an elastic group fit.
    """
    if ray.cluster_resources().get("GPU", 0):
        return {"CPU": 0.5, "GPU": plan.gpu_share}
    return {"CPU": 0.5 if plan.leaves_cpus_to_readers(uses_gpus=False) else 1}


def _show_until_done(progress: "StageProgress", group: WorkerGroup, should_stop: Callable[[int], bool]) -> None:
    """Show the progress until the workers have finished the stage, and end them unless they wait for the next one.

    Raises:
        StoppedError: `should_stop` returned True for the last recorded step.
        ValueError: the recorder failed the run.
    """
    while not wait([group.future], timeout=POLL_S).done and not progress.is_finished:
        interrupts.raise_if_interrupted()
        if progress.show():
            # The run has failed. Give the workers time to end with a checkpoint.
            wait([group.future], timeout=WORKER_EXIT_S)
            break
        if should_stop(progress.bar.n):
            raise StoppedError
    failure_reason = progress.show()
    if failure_reason:
        raise ValueError(failure_reason)
    if not progress.is_waiting:
        # Wait in slices, because a signal must not wait for Ray.
        while not wait([group.future], timeout=POLL_S).done:
            interrupts.raise_if_interrupted()
        group.future.result()
        group.upcoming = []
    # Report the last step. The stage is done, so the answer does not matter.
    should_stop(progress.bar.n)


class StageProgress:
    """Progress bar of a stage, from the status of the recorder.

    Attributes:
        worker_phase: phase of workers without a finished step, otherwise "".
        is_finished, is_waiting: see `recorder.StageStatus`.
    """

    def __init__(self, client: RecorderClient, bar: tqdm) -> None:
        self.client, self.bar = client, bar
        self.starts = 0
        self.worker_phase = recorder.STARTING_WORKERS
        self.phase_since = time.monotonic()
        self.shortage = ""
        self.is_finished = self.is_waiting = False
        bar.set_postfix_str(self.worker_phase)

    def show(self) -> str:
        """Show messages, phase, loss and step. Returns the reason for which the run must end, or ""."""
        status = self.client.poll()
        self.is_finished, self.is_waiting = status.is_finished, status.is_waiting
        for text in status.messages:
            self.bar.write(text)
        # A new group of workers: the bar jumps back to the checkpoint.
        if status.starts != self.starts:
            self.starts = status.starts
            self._reset_bar(status.cursor)
        if status.worker_phase != self.worker_phase:
            self.worker_phase = status.worker_phase
            self.phase_since = time.monotonic()
            self.bar.set_postfix_str(status.worker_phase)
        if self.worker_phase == recorder.STARTING_WORKERS and time.monotonic() - self.phase_since > PLACEMENT_NOTICE_S:
            self._show_shortage()
        if status.loss is not None and not status.worker_phase:
            self.bar.set_postfix_str(f"loss {status.loss:.3f}", refresh=False)
        self.bar.update(status.step - self.bar.n)
        return status.failure_reason

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
