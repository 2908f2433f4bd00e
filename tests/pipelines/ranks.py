"""Training without Ray: real DeepSpeed ranks in processes of their own that make their batches themselves."""

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


def run(folder: Path, workers: int, work: Callable[..., Any], *args: Any) -> list[Any]:
    """What `work(*args)` returns on each of so many ranks."""
    context = torch.multiprocessing.get_context("spawn")
    store = folder / f"store-{len(list(folder.glob('store-*')))}"
    results = [Path(f"{store}-{rank}.pt") for rank in range(workers)]
    processes = [
        context.Process(target=_rank, args=(rank, workers, store, results[rank], work, args)) for rank in range(workers)
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


def _rank(rank: int, workers: int, store: Path, result: Path, work: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(workers), "DS_ACCELERATOR": "cpu"}
    try:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=workers)
        torch.save(work(*args), result)
        dist.barrier()
    except BaseException:
        traceback.print_exc()
        os._exit(1)  # the others are told by a broken connection


def read_here(trained: Any, plan: StagePlan, cursor: int, stop: int) -> Iterator[Batch]:
    """This rank's micro-batches, read in its own process without Ray Data."""
    reader, workers = plan.build_reader(), trained.dp_world_size
    accumulation = plan.stage.count_accumulation_steps(workers)
    for turn in range(cursor * accumulation, stop * accumulation):
        yield reader(turn * workers + trained.global_rank)


def workers() -> int:
    return dist.get_world_size()


def steps(trained: Any, plan: StagePlan, cursor: int, stop: int, hooks: tuple[Hook, ...] = ()) -> Iterator[StepResult]:
    batches = read_here(trained, plan, cursor, stop)
    return worker.run_training_steps(trained, plan, batches, cursor, stop, hooks, set())


def save(trained: Any, plan: StagePlan, cursor: int) -> None:
    """A checkpoint, waited for."""
    url = f"{plan.folder}/{checkpoint.format_name(cursor)}"
    parts: list[Any] = [None] * workers()
    dist.all_gather_object(parts, Upload(url, dist.get_rank(), fragments.owned_fragments(trained)).result())
    if dist.get_rank() == 0:
        files = {name: file for part in parts for name, file in part.items()}
        checkpoint.commit(url, Manifest(cursor, fragments.count_updates(trained), workers(), 0.0, {}, {}, files), "job")
    dist.barrier()


def state(trained: Any) -> dict[str, torch.Tensor]:
    """Every weight and moment whole, put together from all ranks' fragments; each element is there once."""
    mine = [
        (one.name, one.start, {name: each.clone() for name, each in one.states.items()})
        for one in fragments.owned_fragments(trained)
    ]
    all_ranks: list[Any] = [None] * workers()
    dist.all_gather_object(all_ranks, mine)
    pieces: dict[str, list[tuple[int, torch.Tensor]]] = {}
    for name, start, states in (piece for rank in all_ranks for piece in rank):
        for kind, tensor in states.items():
            pieces.setdefault(f"{name}/{kind}", []).append((start, tensor))
    whole = {}
    for name, parts in pieces.items():
        parts.sort(key=lambda part: part[0])
        reached = 0
        for start, tensor in parts:
            assert start == reached, f"{name}: a gap or an overlap at {reached}"
            reached += len(tensor)
        whole[name] = torch.cat([tensor for _, tensor in parts])
    return whole
