"""Training without Ray: DeepSpeed ranks in separate processes that read their micro-batches themselves.

Ranks are forks of the fork server of tests/forks.py.
"""

import gc
import os
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pipelines.data.ingest import Batch
from pipelines.training import checkpoint, export, fragments, worker
from pipelines.training.checkpoint import Manifest, Upload
from pipelines.training.engine import build_engine
from pipelines.training.hooks import CheckpointHook, Hook, StepResult
from pipelines.training.metrics import MetricsWriter
from pipelines.training.plan import StagePlan
from tests import forks
from tests.call_stack import call_with_room


def run_on_ranks(folder: Path, workers: int, work: Callable[..., Any], *args: Any) -> list[Any]:
    """Call `work(*args)` on so many ranks and return its results, by rank."""
    store = folder / f"store-{len(list(folder.glob('store-*')))}"
    results = [Path(f"{store}-{rank}.pt") for rank in range(workers)]
    processes = [
        forks.start_fork(_run_rank, rank, workers, store, results[rank], work, args) for rank in range(workers)
    ]
    for process in processes:
        process.join()
    values = []
    for process, result in zip(processes, results, strict=True):
        assert process.exitcode == 0, f"{result.name}: exit code {process.exitcode}"
        values.append(torch.load(result, weights_only=False))
    return values


def _run_rank(
    rank: int, workers: int, store: Path, result: Path, work: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    # DeepSpeed collects garbage for each engine. The objects of the fork server would be looked at, and so copied.
    gc.freeze()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(workers)}
    try:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=workers)
        torch.save(call_with_room(work, *args), result)
        dist.barrier()
    except BaseException:
        traceback.print_exc()
        # A normal exit would wait for the other ranks; now they see a broken connection.
        os._exit(1)


def read_micro_batches(engine: Any, plan: StagePlan, cursor: int, stop: int) -> Iterator[Batch]:
    """Read this rank's micro-batches of the global batches cursor+1..stop in its own process, without Ray Data."""
    reader, workers = plan.build_reader(), engine.dp_world_size
    accumulation_steps = plan.stage.count_accumulation_steps(workers)
    for turn in range(cursor * accumulation_steps, stop * accumulation_steps):
        yield reader(turn * workers + engine.global_rank)


def count_workers() -> int:
    return dist.get_world_size()


def run_steps(engine: Any, plan: StagePlan, cursor: int, stop: int, hooks: Sequence[Hook] = ()) -> Iterator[StepResult]:
    batches = read_micro_batches(engine, plan, cursor, stop)
    return worker.run_training_steps(engine, plan, batches, cursor, stop, hooks, set())


def save_checkpoint(engine: Any, plan: StagePlan, cursor: int) -> None:
    """Write a checkpoint and wait for it."""
    url = f"{plan.folder}/{checkpoint.format_step_name(cursor)}"
    parts: list[Any] = [None] * count_workers()
    dist.all_gather_object(parts, Upload(url, dist.get_rank(), fragments.owned_fragments(engine)).result())
    if dist.get_rank() == 0:
        files = {name: entry for part in parts for name, entry in part.items()}
        updates = fragments.count_updates(engine)
        checkpoint.commit(url, Manifest(cursor, updates, count_workers(), 0.0, {}, {}, files), "job")
    dist.barrier()


class ListRecorder:
    """Recorder that keeps the messages."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def add_message(self, text: str) -> None:
        self.messages.append(text)

    def sync(self) -> None: ...

    def record_checkpoint(self, cursor: int) -> None: ...


def make_checkpoint_hook(engine: Any, plan: StagePlan) -> tuple[CheckpointHook, list[str]]:
    """Make the hook that saves checkpoints, and the list of its messages."""
    recorder: Any = ListRecorder()
    return CheckpointHook(engine, plan, recorder, {}, {}), recorder.messages


def train_with_checkpoints(plan: StagePlan) -> list[StepResult]:
    """Train a stage on this rank, with its checkpoints."""
    engine = build_engine(plan, count_workers())
    hook, _ = make_checkpoint_hook(engine, plan)
    assert plan.stage.steps
    steps = []
    for step in run_steps(engine, plan, 0, plan.stage.steps, [hook]):
        hook.on_step_end(step)
        steps.append(step)
    hook.close()
    return steps


def train_without_ray(plan: StagePlan, folder: Path) -> StagePlan:
    """Train a stage to its end, with the record and the model that the driver would write. Returns the plan."""
    assert plan.workers
    steps = run_on_ranks(folder, plan.workers[0], train_with_checkpoints, plan)[0]
    writer = MetricsWriter(plan.run, plan.name, 0)
    for step in steps:
        writer.write(step.number, step.values, step.used)
    writer.close()
    export.export_result(plan, len(steps))
    return plan


def gather_state(engine: Any) -> dict[str, torch.Tensor]:
    """Gather every weight and moment from the fragments of all ranks, and check that each element occurs once."""
    names, starts, tensors = [], [], []
    for fragment in fragments.owned_fragments(engine):
        for state, tensor in fragment.states.items():
            names.append(f"{fragment.name}/{state}")
            starts.append((fragment.start, len(tensor)))
            tensors.append(tensor)
    # One tensor for each rank: to pickle thousands of small ones would take most of the time of a test.
    all_ranks: list[Any] = [None] * count_workers()
    dist.all_gather_object(all_ranks, (names, starts, torch.cat(tensors)))
    pieces: dict[str, list[tuple[int, torch.Tensor]]] = {}
    for rank_names, rank_starts, values in all_ranks:
        parts = values.split([size for _, size in rank_starts])
        for name, (start, _), part in zip(rank_names, rank_starts, parts, strict=True):
            pieces.setdefault(name, []).append((start, part))
    gathered = {}
    for name, parts in pieces.items():
        parts.sort(key=lambda part: part[0])
        stop = 0
        for start, tensor in parts:
            assert start == stop, f"{name}: a gap or an overlap at {stop}"
            stop += len(tensor)
        gathered[name] = torch.cat([tensor for _, tensor in parts])
    return gathered
