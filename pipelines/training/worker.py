"""One rank of a training stage, in a worker of Ray Train: from the newest checkpoint through the steps to the end."""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ray
import torch
import torch.distributed as dist

from pipelines.data import consumed, ingest
from pipelines.training import checkpoint, engine, fragments, hooks, metrics, rendezvous
from pipelines.training.hooks import Hook, Step
from pipelines.training.plan import Plan, Schedule
from redux import model
from redux.conversation import IGNORE

HookMaker = Callable[[Any, Plan], Hook]
"""From the engine and the plan to one more hook."""


class NotFiniteError(Exception):
    """A step's loss or gradient was not finite; it is to be done again from the last checkpoint."""

    def __init__(self, step: int) -> None:
        super().__init__(step)  # by which pickle makes it anew
        self.step = step

    def __str__(self) -> str:
        return f"loss or gradient of step {self.step} was not finite"


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
        batches = micro_batches(trained, plan, reader, cursor, steps)
        for step in training_steps(trained, plan, batches, cursor, steps, [dog, *beside], again):
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
    batches: Iterator[ingest.Batch],
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


def micro_batches(trained: Any, plan: Plan, reader: ingest.Reader, cursor: int, steps: int) -> Iterator[ingest.Batch]:
    """This rank's micro-batches of the global batches cursor+1..steps, read by Ray Data's workers.

    Each is checked to be the one whose turn it is.
    """
    rank, workers = trained.global_rank, trained.dp_world_size
    accumulation = plan.stage.accumulation(workers)
    done, stop = cursor * accumulation, steps * accumulation
    spare = plan.leaves_cpus_to_readers(gpus=trained.device.type != "cpu")
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
    counts = [torch.tensor((batch["labels"][:, 1:] != IGNORE).sum(axis=1), device=device) for batch in mine]
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
    result["pixel_values"] = model.normalise(images).to(next(trained.module.parameters()).dtype)
    return result
