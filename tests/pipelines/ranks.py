"""Training without Ray: DeepSpeed ranks in separate processes that read their micro-batches themselves."""

import os
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

from pipelines.data.ingest import Batch
from pipelines.training import checkpoint, fragments, worker
from pipelines.training.checkpoint import Manifest, Upload
from pipelines.training.hooks import Hook, StepResult
from pipelines.training.plan import StagePlan


def run_on_ranks(folder: Path, workers: int, work: Callable[..., Any], *args: Any) -> list[Any]:
    """Call `work(*args)` on so many ranks and return its results, by rank."""
    context = torch.multiprocessing.get_context("spawn")
    store = folder / f"store-{len(list(folder.glob('store-*')))}"
    results = [Path(f"{store}-{rank}.pt") for rank in range(workers)]
    processes = [
        context.Process(target=_run_rank, args=(rank, workers, store, results[rank], work, args))
        for rank in range(workers)
    ]
    for process in processes:
        process.start()
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
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(workers), "DS_ACCELERATOR": "cpu"}
    try:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=workers)
        torch.save(work(*args), result)
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


def run_steps(
    engine: Any, plan: StagePlan, cursor: int, stop: int, hooks: tuple[Hook, ...] = ()
) -> Iterator[StepResult]:
    batches = read_micro_batches(engine, plan, cursor, stop)
    return worker.run_training_steps(engine, plan, batches, cursor, stop, hooks, set())


def save_checkpoint(engine: Any, plan: StagePlan, cursor: int) -> None:
    """Write a checkpoint and wait for it."""
    url = f"{plan.folder}/{checkpoint.format_name(cursor)}"
    parts: list[Any] = [None] * count_workers()
    dist.all_gather_object(parts, Upload(url, dist.get_rank(), fragments.owned_fragments(engine)).result())
    if dist.get_rank() == 0:
        files = {name: entry for part in parts for name, entry in part.items()}
        updates = fragments.count_updates(engine)
        checkpoint.commit(url, Manifest(cursor, updates, count_workers(), 0.0, {}, {}, files), "job")
    dist.barrier()


def gather_state(engine: Any) -> dict[str, torch.Tensor]:
    """Gather every weight and moment from the fragments of all ranks, and check that each element occurs once."""
    local = [
        (fragment.name, fragment.start, {state: tensor.clone() for state, tensor in fragment.states.items()})
        for fragment in fragments.owned_fragments(engine)
    ]
    all_ranks: list[Any] = [None] * count_workers()
    dist.all_gather_object(all_ranks, local)
    pieces: dict[str, list[tuple[int, torch.Tensor]]] = {}
    for name, start, states in (piece for rank in all_ranks for piece in rank):
        for state, tensor in states.items():
            pieces.setdefault(f"{name}/{state}", []).append((start, tensor))
    gathered = {}
    for name, parts in pieces.items():
        parts.sort(key=lambda part: part[0])
        stop = 0
        for start, tensor in parts:
            assert start == stop, f"{name}: a gap or an overlap at {stop}"
            stop += len(tensor)
        gathered[name] = torch.cat([tensor for _, tensor in parts])
    return gathered
