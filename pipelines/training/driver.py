"""One training stage: Ray Train workers, each a DeepSpeed rank, fed in order by Ray Data.

    checkpoints/STAGE/step-000100/   to go on from (pipelines/training/checkpoint.py)
    checkpoints/STAGE/model/         what the stage made, as save_pretrained writes it; its manifest ends the stage

The global batch is what is configured; the number of micro-batches that each worker adds up to it is derived from the
number of workers, so order, loss and learning rate do not depend on how many there are.  Workers that the global batch
cannot be shared with stay idle.

Ray starts all workers again after any fault.  It knows of no checkpoint: which is the newest whole one is seen in
storage, where a crash cannot lose it, and where another driver finds it.
"""

import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
import torch.distributed as dist
import yaml
from ray import PlacementGroupID
from ray.train.torch import TorchTrainer
from ray.util.placement_group import PlacementGroup
from tqdm import tqdm

from pipelines.core import cluster, failures, interrupts, storage
from pipelines.data import consumed, ingest
from pipelines.training import checkpoint, engine, export, fragments, hooks, metrics, recorder, rendezvous
from pipelines.training.hooks import Hook, Step
from pipelines.training.plan import Plan, Schedule
from redux import model
from redux.conversation import IGNORE_INDEX

RESTARTS = 1_000_000
"""Of workers, as far as Ray counts: the recorder ends a run that gets no further."""

ENDING_S = 60
"""For workers to end by themselves, with a checkpoint, when the run must."""

PLACE_S = 10
"""For Ray to place workers, after which is said what they wait for."""

HookMaker = Callable[[Any, Plan], Hook]
"""From the engine and the plan to one more hook."""

Watch = Callable[[Path, str, int, int], bool]
"""Hears how a stage gets on: run folder, stage, the last step on record there, and how many there are; returns whether
the stage is to stop."""


class StoppedError(Exception):
    """Who watches the stage wants it to stop."""


class NotFiniteError(Exception):
    """A step's loss or gradient was not finite; it is to be done again from the last checkpoint."""

    def __init__(self, step: int) -> None:
        super().__init__(step)  # by which pickle makes it anew
        self.step = step

    def __str__(self) -> str:
        return f"loss or gradient of step {self.step} was not finite"


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
    readers = 1 if _spare(plan, "GPU" in worker) else 0
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
    return {"CPU": 0.5 if _spare(plan, gpus=False) else 1}


def _spare(plan: Plan, gpus: bool) -> bool:
    """Whether workers leave CPUs to readers: not if they take as many machines as come, and GPUs do not limit them."""
    return gpus or not plan.elastic


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


def train_worker(config: dict[str, Any]) -> None:
    """One rank, from the newest checkpoint to the end; what the user must decide is told to the recorder."""
    if ray.get(config["recorder"].has_failed.remote()):
        return
    try:
        _work(**config)
    except checkpoint.RefusedError as error:
        ray.get(config["recorder"].fail.remote(str(error)))
        raise
    except NotFiniteError as error:
        ray.get(config["recorder"].roll_back.remote(error.step))
        raise


def _work(plan: Plan, reader: ingest.Reader, steps: int, recorder: Any, more: Sequence[HookMaker]) -> None:
    entered = time.monotonic()
    if not _join(plan):
        return
    dog = hooks.Watchdog(plan.recovery.watchdog_s, plan.run / "stacks" / plan.name, dist.get_rank())
    if dist.get_rank() == 0:
        recorder.enter.remote("loading model")
    trained = engine.build(plan, dist.get_world_size())
    identity = engine.identity(trained)
    begun = _restore(trained, plan, identity, recorder, entered)
    if begun and begun[0] < steps:
        cursor, again = begun
        first = dist.get_rank() == 0
        beside = [
            hooks.Recording(recorder, first),
            hooks.Preemption(recorder, first),
            hooks.Checkpoints(trained, plan, recorder, plan.identity(), identity),
            *(make(trained, plan) for make in more),
        ]
        for step in training_steps(trained, plan, reader, cursor, steps, [dog, *beside], again):
            for hook in [dog, *beside]:
                hook(step)
            if step.stopping:
                break
        for hook in beside:
            hook.close()
    dog.close()
    dist.barrier()  # nobody leaves while another still needs it


def _join(plan: Plan) -> bool:
    """Leave those workers idle that the global batch cannot be shared with: False on these."""
    rank, workers = dist.get_rank(), dist.get_world_size()
    usable = plan.stage.usable(workers)
    if usable == workers:
        return True
    address = [rendezvous.url(*rendezvous.opened()) if rank == 0 else ""]
    dist.broadcast_object_list(address, src=0)
    backend = dist.get_backend()
    dist.barrier()
    dist.destroy_process_group()
    if rank >= usable:
        return False
    os.environ["WORLD_SIZE"] = str(usable)
    dist.init_process_group(backend, init_method=address[0], rank=rank, world_size=usable)
    return True


def _restore(
    trained: Any, plan: Plan, identity: dict[str, Any], recorder: Any, entered: float
) -> tuple[int, set[int]] | None:
    """Load the newest whole checkpoint; returns its cursor and the steps that were rolled back once, or None if the
    workers must not go on.
    """

    def check(url: str, manifest: checkpoint.Manifest) -> None:
        checkpoint.agree(url, manifest, plan.changed, plan.identity(), identity)

    manifest, passed = checkpoint.restore(plan.folder, fragments.held(trained), check)
    cursor = 0
    if manifest:
        fragments.refresh(trained, manifest.updates)
        cursor = manifest.cursor
    begun: list[set[int] | None] = [None]
    if dist.get_rank() == 0:
        checkpoint.clear(plan.folder)
        said = [f"{plan.name}: passed over {why}" for why in passed]
        restore_s = time.monotonic() - entered
        held = ray.util.get_current_placement_group().id.hex()
        begun = [ray.get(recorder.begin.remote(dist.get_world_size(), cursor, restore_s, said, held))]
    dist.broadcast_object_list(begun, src=0)
    return None if begun[0] is None else (cursor, begun[0])


def training_steps(
    trained: Any,
    plan: Plan,
    reader: ingest.Reader,
    cursor: int,
    steps: int,
    beside: Sequence[Hook],
    again: set[int],
) -> Iterator[Step]:
    """Do global batches cursor+1..steps.

    again: steps that were rolled back once; these are skipped if they are not finite.
    """
    rank, workers = trained.global_rank, trained.dp_world_size
    accumulation = plan.stage.accumulation(workers)
    spare = _spare(plan, gpus=trained.device.type != "cpu")
    batches = _batches(trained, reader, cursor * accumulation, steps * accumulation, spare)
    schedule = Schedule(steps, plan.stage.warmup_ratio)
    names = [name for hook in beside for name in hook.votes]
    stall_s = 0.0
    for number in range(cursor + 1, steps + 1):
        rate = engine.set_rate(trained, schedule, number)
        clock = time.perf_counter()
        mine = [next(batches) for _ in range(accumulation)]
        data_s = (started := time.perf_counter()) - clock
        loss, forward_s, applied, norm = _learn(trained, plan, mine)
        used = consumed.gather(mine, list(plan.stage.mixture), trained.device)
        votes = {name: value for hook in beside for name, value in hook.vote().items()}
        own = {
            "loss": loss,
            "samples": sum(len(batch["input_ids"]) for batch in mine),
            "tokens": sum(int(batch["attention_mask"].sum()) for batch in mine),
            "data_s": data_s / workers,
            "compute_s": (time.perf_counter() - started) / workers,
            "stall_s": stall_s / workers,
            "peak_bytes": metrics.peak_bytes(),
            **{name: votes.get(name, 0.0) for name in names},
            **{f"rank {each}": data_s + forward_s if each == rank else 0.0 for each in range(workers)},
        }
        summed = _summed(own, trained.device)
        if not applied and plan.stage.on_nonfinite == "rollback" and number not in again:
            raise NotFiniteError(number)
        busy = [summed.pop(f"rank {each}") for each in range(workers)]
        votes = {name: summed.pop(name) for name in names}
        values = {
            **summed,
            "samples": int(summed["samples"]),
            "tokens": int(summed["tokens"]),
            "peak_bytes": int(summed["peak_bytes"]),
            "learning_rate": rate,
            "grad_norm": norm,
            "replaced": len(used.replaced),
            "skipped": int(not applied),
            "slowest": max(range(workers), key=busy.__getitem__),
            "slowest_s": max(busy) - sum(busy) / workers,
        }
        clock = time.perf_counter()
        yield Step(number, number == steps, values, used, votes)
        stall_s = time.perf_counter() - clock


def _summed(own: dict[str, float], device: torch.device) -> dict[str, float]:
    """Sums over ranks: all that a step has to say, in one reduction."""
    sums = torch.tensor(list(own.values()), dtype=torch.float64, device=device)
    dist.all_reduce(sums)
    return dict(zip(own, sums.tolist(), strict=True))


def _learn(trained: Any, plan: Plan, mine: Sequence[ingest.Batch]) -> tuple[float, float, bool, float]:
    """This rank's part of a global batch: (its part of the loss, seconds forward, whether weights changed, norm)."""
    scale = len(mine) * trained.dp_world_size  # DeepSpeed takes the mean over both
    parts: list[tuple[float, float]] = []
    for batch, weight in zip(mine, _weights(mine, plan, trained.device), strict=True):
        if parts:
            trained.step()
        torch.manual_seed((plan.seed << 32) + int(batch["number"]))
        clock = time.perf_counter()
        output = trained(**_tensors(batch, trained), weight=weight)
        forward_s = time.perf_counter() - clock
        trained.backward(output * scale)
        parts.append((output.item(), forward_s))
    loss, seconds = map(sum, zip(*parts, strict=True))
    return loss, seconds, *engine.update(trained)


def _batches(trained: Any, reader: ingest.Reader, done: int, stop: int, spare: bool) -> Iterator[ingest.Batch]:
    """This rank's micro-batches from number `done` of each rank's up to `stop`, read by Ray Data's workers.

    Each is checked to be the one whose turn it is.  spare: whether the workers leave CPUs to the readers.
    """
    rank, workers = trained.global_rank, trained.dp_world_size
    splits: list[Any] = [None] * workers
    if rank == 0:
        splits = list(ingest.streams(reader, done * workers, stop * workers, workers, spare))
    own: list[Any] = [None]
    dist.scatter_object_list(own, splits, src=0)
    blocks = own[0].iter_batches(batch_size=None, prefetch_batches=2)
    for turn, batch in enumerate(ingest.micro_batches(blocks), start=done):
        due = turn * workers + rank
        if batch["number"] != due:
            raise RuntimeError(f"rank {rank}: got micro-batch {batch['number']}, due was {due}")
        yield batch


def _weights(mine: Sequence[ingest.Batch], plan: Plan, device: torch.device) -> list[torch.Tensor]:
    """For each micro-batch the weights of its samples, so that the weighted sum over the global batch is its loss.

    Of a token: one over all learned tokens of the global batch, or over those of its sample times all samples.
    """
    stage = plan.stage
    if stage.objective == "contrastive":
        share = 1 / stage.global_batch_size
        return [torch.full((len(batch["input_ids"]),), share, device=device) for batch in mine]
    counts = [torch.tensor((batch["labels"][:, 1:] != IGNORE_INDEX).sum(axis=1), device=device) for batch in mine]
    if stage.loss_reduction == "sample":
        return [1 / (count.clamp(min=1) * stage.global_batch_size) for count in counts]
    total = torch.stack([count.sum() for count in counts]).sum()
    dist.all_reduce(total)
    return [1 / total.clamp(min=1).expand_as(count) for count in counts]


def _tensors(batch: ingest.Batch, trained: Any) -> dict[str, torch.Tensor]:
    """A micro-batch on the rank's device."""
    names = ("pixel_values", "input_ids", "labels", "attention_mask")
    result = {name: torch.tensor(batch[name], device=trained.device) for name in names if name in batch}
    images = result["pixel_values"].movedim(-1, 1).contiguous()
    result["pixel_values"] = model.normalize_pixels(images).to(next(trained.module.parameters()).dtype)
    return result
