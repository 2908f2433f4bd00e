"""Training without Ray: real DeepSpeed ranks in processes of their own, batches made in each, so that tests are quick."""

import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.multiprocessing

from pipelines import train
from pipelines.ingest import Batch, Reader


def run(folder: Path, workers: int, work: Callable[..., Any], *args: Any) -> list[Any]:
    """What `work(*args)` returns on each of so many ranks."""
    context = torch.multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    store = folder / f"store-{len(list(folder.glob('store-*')))}"
    processes = [
        context.Process(target=_rank, args=(rank, workers, store, results, work, args)) for rank in range(workers)
    ]
    for process in processes:
        process.start()
    given = {}
    while len(given) < workers:
        rank, value, error = results.get()
        assert not error, f"rank {rank}: {error}"
        given[rank] = value
    for process in processes:
        process.join()
    return [given[rank] for rank in range(workers)]


def _rank(rank: int, workers: int, store: Path, results: Any, work: Callable[..., Any], args: tuple[Any, ...]) -> None:
    try:
        train._batches = read_here
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=workers)
        value = work(*args)
        dist.barrier()
        results.put((rank, value, ""))
    except BaseException:
        results.put((rank, None, traceback.format_exc()))


def read_here(trained: Any, reader: Reader, done: int, stop: int) -> Iterator[Batch]:
    """As `train._batches`, without Ray Data."""
    return (reader(turn * trained.dp_world_size + trained.global_rank) for turn in range(done, stop))
