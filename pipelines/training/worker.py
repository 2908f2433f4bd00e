"""Training loop of one rank, in a Ray Train worker: from the newest checkpoint to the last step of the stage.

`train_worker` is the entry point. It trains the stages of a job one after the other: new processes would import torch
and join their group again, for many seconds. `run_training_steps` is the loop; it gets its micro-batches as an
iterator, so tests and benchmarks run it without Ray.
"""

import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import takewhile
from typing import Any, NamedTuple

import numpy as np
import ray
import torch
import torch.distributed as dist
from jaxtyping import Int

from pipelines.data import consumed, ingest
from pipelines.training import checkpoint, fragments, hooks, metrics, rendezvous
from pipelines.training.engine import (
    DeepSpeedEngineProtocol,
    apply_update,
    build_engine,
    check_features,
    describe_model,
    free_engine,
    import_deepspeed,
    move_to_device,
    set_learning_rate,
)
from pipelines.training.feed import Feed
from pipelines.training.hooks import Hook, StepResult
from pipelines.training.plan import LearningRateSchedule, StagePlan, StageWork
from pipelines.training.recorder import NoStage, RecorderClient
from pipelines.training.validation import ValidationHook
from redux import kernels
from redux.conversation import IGNORE_INDEX
from redux.kernels import set_kernels

HookFactory = Callable[[DeepSpeedEngineProtocol, StagePlan], Hook]
"""Called on every rank with the engine and the plan; returns an additional hook."""

STAGE_POLL_S = 0.1
"""Seconds between two polls for the next stage."""


class NotFiniteError(Exception):
    """A loss or gradient that is not finite, in a step that must be repeated from the last checkpoint."""

    def __init__(self, step: int) -> None:
        super().__init__(step)  # unpickling calls __init__(*args)
        self.step = step

    def __str__(self) -> str:
        return f"loss or gradient of step {self.step} was not finite"


class ResumePoint(NamedTuple):
    """Start of the loop after a restore.

    Args:
        cursor: last finished global batch.
        rolled_back: steps that were rolled back once. If one of them is not finite again, its update is skipped.
    """

    cursor: int
    rolled_back: set[int]


class LocalUpdate(NamedTuple):
    """Result of one global batch on one rank.

    Args:
        loss: this rank's part of the loss; the sum over ranks is the loss of the global batch.
        forward_s: seconds in forward passes.
        was_applied: False if the gradient was not finite and the update was skipped. Equal on all ranks.
        grad_norm: norm of the gradient before clipping. Equal on all ranks.
    """

    loss: float
    forward_s: float
    was_applied: bool
    grad_norm: float


class GroupWork(NamedTuple):
    """Work of a group of workers.

    Args:
        stages: stages in their order. The driver may end the workers after any of them.
        extra_hook_factories: make hooks that run after those of this package.
    """

    stages: tuple[StageWork, ...]
    extra_hook_factories: tuple[HookFactory, ...]


def train_worker(recorder: RecorderClient) -> None:
    """Train one rank, stage after stage, from the stage that the driver has opened.

    Args:
        recorder: recorder of the stages.
    """
    # Import it while the driver may still make the data of the first stage.
    import_deepspeed()
    stage_index = _wait_for_stage(recorder, finished_stage=None)
    entry_time = time.monotonic()
    if stage_index is None:
        return
    stages, extra_hook_factories = recorder.get_work()
    # Stages that the same number of workers can share. A stage that needs another number gets new workers.
    workers = dist.get_world_size()
    used_workers = stages[stage_index].plan.stage.count_usable_workers(workers)
    remaining = list(
        takewhile(lambda work: work.plan.stage.count_usable_workers(workers) == used_workers, stages[stage_index:])
    )
    if not _join_used_workers(used_workers):
        return

    feed = Feed(remaining)
    while remaining:
        with _report_errors(recorder):
            is_finished = _train_stage(remaining[0], stage_index, feed, recorder, extra_hook_factories, entry_time)
        if not is_finished:
            return
        remaining = remaining[1:]
        # No rank leaves while another one still needs it.
        dist.barrier()
        if dist.get_rank() == 0:
            recorder.finish_stage(stage_index, is_waiting=bool(remaining))
        if remaining:
            stage_index = _wait_for_stage(recorder, finished_stage=stage_index)
            if stage_index is None:
                return
        entry_time = time.monotonic()


def _wait_for_stage(recorder: RecorderClient, finished_stage: int | None) -> int | None:
    """Wait until the driver opens a stage after the finished one. A collective.

    Returns:
        The index of the stage, or None if the workers must end.
    """
    while True:
        # Rank 0 alone asks, so that all ranks take the same decision. A broadcast has a time-out, so none is long.
        answer = checkpoint.broadcast_from_rank_0(lambda: recorder.find_stage(finished_stage))
        if answer is NoStage.NO_MORE:
            return None
        if isinstance(answer, int):
            return answer
        time.sleep(STAGE_POLL_S)


@contextmanager
def _report_errors(recorder: RecorderClient) -> Iterator[None]:
    """Tell the recorder about errors of a stage that it must handle, and raise them again."""
    try:
        yield
    except checkpoint.RefusedError as error:
        # The user must decide: the driver ends the run with this message instead of a restart.
        recorder.fail(str(error))
        raise
    except NotFiniteError as error:
        # Ray restarts the workers. The recorder remembers the step, so it is rolled back only once.
        recorder.mark_rolled_back(error.step)
        raise


def _train_stage(
    work: StageWork,
    stage_index: int,
    feed: Feed,
    recorder: RecorderClient,
    extra_hook_factories: Sequence[HookFactory],
    entry_time: float,
) -> bool:
    """Train one stage: build the engine, restore the newest checkpoint and run the remaining steps.

    Returns:
        False if training stopped before the last step, and the workers must end.
    """
    plan = work.plan
    # The watchdog starts first: building the model and restoring may hang, too.
    watchdog = hooks.Watchdog(plan.recovery.watchdog_s, plan.run / "stacks" / plan.name, dist.get_rank())
    is_first = dist.get_rank() == 0
    set_kernels(plan.kernels)
    if is_first:
        recorder.set_phase("loading model")
        forward_kernel_messages(recorder, plan.name)
    # Readers start while the model is built.
    feed.prepare(work)
    engine = build_engine(plan, dist.get_world_size())
    check_features(engine, plan, work.reader)
    # Fingerprints read the whole index of each set, so they are computed once.
    data = work.reader.fingerprint_sources()
    description = describe_model(engine)
    check = partial(checkpoint.check_compatible, allow_changes=plan.allow_changes, data=data, model=description)
    resume_point = _restore(engine, plan, stage_index, check, recorder, entry_time)

    is_finished = resume_point is not None
    if resume_point and resume_point.cursor < work.steps:
        closing_hooks = [
            *_build_hooks(engine, work, recorder, data, description),
            *(make(engine, plan) for make in extra_hook_factories),
        ]
        is_finished = _run_remaining_steps(engine, work, feed, resume_point, [watchdog, *closing_hooks])
        for hook in closing_hooks:
            hook.close()
    watchdog.close()
    # The next stage needs the memory.
    free_engine(engine)
    return is_finished


def _run_remaining_steps(
    engine: DeepSpeedEngineProtocol,
    work: StageWork,
    feed: Feed,
    resume_point: ResumePoint,
    all_hooks: Sequence[Hook],
) -> bool:
    """Run the steps after the resume point, with the hooks after each. Returns False if a hook stopped the training."""
    cursor, rolled_back = resume_point
    batches = feed.read(work, cursor)
    for step in run_training_steps(engine, work.plan, batches, cursor, work.steps, all_hooks, rolled_back):
        for hook in all_hooks:
            hook.on_step_end(step)
        if step.should_stop:
            return step.is_last
    return True


def _build_hooks(
    engine: DeepSpeedEngineProtocol,
    work: StageWork,
    recorder: RecorderClient,
    data: dict[str, str],
    description: dict[str, Any],
) -> list[hooks.Hook]:
    """Build the hooks of a stage, in the order in which they run after each step.

    Recording and Preemption set the flags of the step that the checkpoint hook reads, and the validation loss is part
    of the record.
    """
    plan, is_first = work.plan, dist.get_rank() == 0
    return [
        *([ValidationHook(engine, plan, work.reader)] if plan.hold_out else []),
        hooks.RecordingHook(recorder, is_first),
        hooks.PreemptionHook(recorder, is_first),
        hooks.CheckpointHook(engine, plan, recorder, data, description),
    ]


def forward_kernel_messages(recorder: RecorderClient, stage: str) -> None:
    """Show the user which kernels the model takes, as `redux.kernels` logs it once per process."""
    logger = logging.getLogger(kernels.__name__)
    # Messages name the current stage.
    for handler in [handler for handler in logger.handlers if isinstance(handler, KernelMessages)]:
        logger.removeHandler(handler)
    logger.addHandler(KernelMessages(recorder, stage))
    logger.setLevel(logging.INFO)


class KernelMessages(logging.Handler):
    """Log handler that sends messages to the recorder."""

    def __init__(self, recorder: RecorderClient, stage: str) -> None:
        super().__init__(logging.INFO)
        self.recorder = recorder
        self.stage = stage

    def emit(self, record: logging.LogRecord) -> None:
        self.recorder.add_message(f"{self.stage}: {record.getMessage()}")


def _join_used_workers(used_workers: int) -> bool:
    """Form a process group of the workers that share the global batch evenly. Returns False on the idle workers."""
    rank, workers = dist.get_rank(), dist.get_world_size()
    if used_workers == workers:
        return True

    # Rank 0 opens the store of the new group and sends its address through the old group.
    address = checkpoint.broadcast_from_rank_0(lambda: rendezvous.format_url(*rendezvous.open_store()))
    backend = dist.get_backend()

    # Nobody destroys the old group before all ranks have the address.
    dist.barrier()
    dist.destroy_process_group()
    if rank >= used_workers:
        return False
    # DeepSpeed reads the number of workers from the environment.
    os.environ["WORLD_SIZE"] = str(used_workers)
    dist.init_process_group(backend, init_method=address, rank=rank, world_size=used_workers)
    return True


def _restore(
    engine: DeepSpeedEngineProtocol,
    plan: StagePlan,
    stage_index: int,
    check: Callable[[str, checkpoint.Manifest], None],
    recorder: RecorderClient,
    entry_time: float,
) -> ResumePoint | None:
    """Load the newest intact checkpoint and report the start to the recorder. A collective.

    Args:
        engine: engine of this rank.
        plan: plan of the stage.
        stage_index: its index in the recorder.
        check: raises ValueError to refuse a checkpoint.
        recorder: gets the start, and decides if the workers may continue.
        entry_time: time.monotonic() at the entry into the train function.

    Returns:
        The start of the loop, or None if the workers must not continue.
    """
    local_fragments = fragments.local_fragments(engine)
    manifest, skipped = checkpoint.restore_newest(plan.folder, local_fragments, check)
    cursor = 0
    if manifest:
        fragments.copy_masters_to_model(engine, manifest.updates)
        cursor = manifest.cursor

    def begin() -> set[int] | None:
        checkpoint.remove_incomplete(plan.folder)
        messages = [f"{plan.name}: skipped {reason}" for reason in skipped]
        restore_s = time.monotonic() - entry_time
        placement_group = ray.util.get_current_placement_group().id.hex()
        return recorder.begin(stage_index, dist.get_world_size(), cursor, restore_s, messages, placement_group)

    # Rank 0 alone talks to the recorder; its answer goes to all ranks, so that all take the same decision.
    rolled_back = checkpoint.broadcast_from_rank_0(begin)
    return None if rolled_back is None else ResumePoint(cursor, rolled_back)


def run_training_steps(
    engine: DeepSpeedEngineProtocol,
    plan: StagePlan,
    batches: Iterator[ingest.Batch],
    cursor: int,
    steps: int,
    step_hooks: Sequence[Hook],
    rolled_back: set[int],
) -> Iterator[StepResult]:
    """Train on the global batches cursor+1..steps and yield the result of each. A collective.

    Args:
        engine: engine of this rank.
        plan: plan of the stage.
        batches: micro-batches of this rank, from the first one after the cursor.
        cursor: last finished global batch.
        steps: number of global batches of the stage.
        step_hooks: hooks whose votes are summed. The caller calls `on_step_end`.
        rolled_back: steps that were rolled back once. If one of them is not finite again, its update is skipped.

    Raises:
        NotFiniteError: loss or gradient was not finite, and on_nonfinite is "rollback".
    """
    workers = engine.dp_world_size
    accumulation_steps = plan.stage.count_accumulation_steps(workers)
    schedule = LearningRateSchedule(steps, plan.stage.warmup_ratio)
    vote_names = [name for hook in step_hooks for name in hook.votes]
    stall_s = 0.0
    for number in range(cursor + 1, steps + 1):
        learning_rate = set_learning_rate(engine, schedule, number)

        # Wait for the data: this rank's micro-batches of the global batch.
        wait_start = time.perf_counter()
        micro_batches = [next(batches) for _ in range(accumulation_steps)]
        compute_start = time.perf_counter()
        data_s = compute_start - wait_start

        # Forward, backward, update; then gather the samples that the step used, from all ranks.
        update = train_global_batch(engine, plan, micro_batches)
        used = consumed.gather_samples(micro_batches, list(plan.stage.mixture), engine.device)

        # Sum statistics and votes over ranks, in one all-reduce.
        votes = {name: value for hook in step_hooks for name, value in hook.vote().items()}
        compute_s = time.perf_counter() - compute_start
        local_stats = _collect_stats(engine, micro_batches, update, data_s, compute_s, stall_s)
        local_stats |= {name: votes.get(name, 0.0) for name in vote_names}
        stats = all_reduce_stats(local_stats, engine.device)

        # A rollback: the exception ends the workers, and Ray restarts them from the last checkpoint.
        if not update.was_applied and plan.stage.on_nonfinite == "rollback" and number not in rolled_back:
            raise NotFiniteError(number)

        # The caller runs the hooks while this generator waits. Their time is the stall of the next step.
        busy_s = [stats.pop(f"rank {rank}") for rank in range(workers)]
        vote_sums = {name: stats.pop(name) for name in vote_names}
        values = _compute_metrics(stats, update, learning_rate, len(used.replaced), busy_s)
        stall_start = time.perf_counter()
        yield StepResult(number, number == steps, values, used, vote_sums)
        stall_s = time.perf_counter() - stall_start


def _collect_stats(
    engine: DeepSpeedEngineProtocol,
    micro_batches: Sequence[ingest.Batch],
    update: LocalUpdate,
    data_s: float,
    compute_s: float,
    stall_s: float,
) -> dict[str, float]:
    """Return this rank's statistics of a step. Their sums over ranks are those of the step.

    Seconds are divided by the number of workers, so their sum is a mean. Each rank adds its busy time under a name of
    its own, so the sum keeps all of them.
    """
    workers = engine.dp_world_size
    return {
        "loss": update.loss,
        "samples": sum(len(batch["sample"]) for batch in micro_batches),
        "tokens": sum(int(batch["attention_mask"].sum()) for batch in micro_batches),
        "data_s": data_s / workers,
        "compute_s": compute_s / workers,
        "stall_s": stall_s / workers,
        "peak_bytes": metrics.measure_peak_bytes(),
        **{f"rank {rank}": 0.0 for rank in range(workers)},
        f"rank {engine.global_rank}": data_s + update.forward_s,
    }


def _compute_metrics(
    stats: dict[str, float], update: LocalUpdate, learning_rate: float, replaced: int, busy_s: Sequence[float]
) -> dict[str, float]:
    """Return the metrics of a step, as metrics.jsonl has them.

    Args:
        stats: sums over ranks.
        update: result on this rank.
        learning_rate: largest learning rate of the parts.
        replaced: number of replaced samples.
        busy_s: seconds of each rank in reading and forward passes, where ranks do not wait for each other.
    """
    return {
        **stats,
        "samples": int(stats["samples"]),
        "tokens": int(stats["tokens"]),
        "peak_bytes": int(stats["peak_bytes"]),
        "learning_rate": learning_rate,
        "grad_norm": update.grad_norm,
        "replaced": replaced,
        "skipped": int(not update.was_applied),
        "slowest_rank": max(range(len(busy_s)), key=busy_s.__getitem__),
        "slowest_s": max(busy_s) - sum(busy_s) / len(busy_s),
    }


def all_reduce_stats(local_stats: dict[str, float], device: torch.device) -> dict[str, float]:
    """Sum statistics over ranks, all of them in one all-reduce. All ranks must have the same names in the same order.

    float64 holds counts up to 2^53 exactly.
    """
    sums = torch.tensor(list(local_stats.values()), dtype=torch.float64, device=device)
    dist.all_reduce(sums)
    return dict(zip(local_stats, sums.tolist(), strict=True))


def train_global_batch(
    engine: DeepSpeedEngineProtocol, plan: StagePlan, micro_batches: Sequence[ingest.Batch]
) -> LocalUpdate:
    """Compute the gradients of this rank's part of a global batch, and update the weights. A collective."""
    # DeepSpeed averages gradients over micro-batches and workers, but the weights of the samples already sum to the
    # loss of the global batch. The factor undoes the average.
    factor = len(micro_batches) * engine.dp_world_size
    loss = forward_s = 0.0
    sample_weights = compute_sample_weights(micro_batches, plan, engine.device)
    for index, (batch, weight) in enumerate(zip(micro_batches, sample_weights, strict=True)):
        # DeepSpeed counts micro-batches by calls of step(). The last call, in apply_update, updates the weights.
        if index:
            engine.step()
        # Dropout depends on the number of the micro-batch, not on the rank that computes it.
        torch.manual_seed((plan.seed << 32) + int(batch["number"]))
        start = time.perf_counter()
        output = engine(**move_to_device(batch, engine), weight=weight)
        forward_s += time.perf_counter() - start
        engine.backward(output * factor)
        loss += output.item()
    was_applied, grad_norm = apply_update(engine)
    return LocalUpdate(loss, forward_s, was_applied, grad_norm)


def _count_labels(batch: ingest.Batch) -> Int[np.ndarray, " samples"]:
    """Count the labelled tokens of each sample. No logits predict the first token, so its label does not count."""
    is_labelled = batch["labels"][:, 1:] != IGNORE_INDEX
    # Packed rows have several samples each.
    if "sample_index" in batch:
        return np.bincount(batch["sample_index"][:, 1:][is_labelled], minlength=len(batch["sample"]))
    return is_labelled.sum(axis=1)


def compute_sample_weights(
    micro_batches: Sequence[ingest.Batch], plan: StagePlan, device: torch.device
) -> list[torch.Tensor]:
    """Compute the weights with which losses of samples sum to the loss of the global batch. A collective.

    With loss_reduction "token" a token weighs 1 / (labelled tokens of the global batch), with "sample" it weighs
    1 / (labelled tokens of its sample x samples of the global batch).

    Returns:
        For each micro-batch, the weight of each sample, which all its tokens have: shape (samples,).
    """
    stage = plan.stage
    if stage.objective == "contrastive":
        share = 1 / stage.global_batch_size
        return [torch.full((len(batch["input_ids"]),), share, device=device) for batch in micro_batches]

    counts = [torch.tensor(_count_labels(batch), device=device) for batch in micro_batches]
    if stage.loss_reduction == "sample":
        return [1 / (count.clamp(min=1) * stage.global_batch_size) for count in counts]

    # Only all ranks together know the number of labelled tokens of the global batch.
    total = torch.stack([count.sum() for count in counts]).sum()
    dist.all_reduce(total)
    return [1 / total.clamp(min=1).expand_as(count) for count in counts]
