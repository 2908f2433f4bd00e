"""Ray tasks over an iterator that does not fit into memory."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import ray

from pipelines.core import interrupts

MappedItem = TypeVar("MappedItem")
MappedResult = TypeVar("MappedResult")

POLL_SECONDS = 0.5


def map_bounded(task: Callable[..., MappedResult], items: Iterable[MappedItem], *args: Any) -> Iterator[MappedResult]:
    """Run `task(item, *args)` in a Ray task per item, and yield results as they come.

    At most one item per CPU of the cluster and one more are in progress, so that `items` may be a generator of any
    length.
    """
    # Arguments of all tasks are stored once.
    remote = ray.remote(num_cpus=1)(task)
    limit = max(int(ray.cluster_resources().get("CPU", 1)), 1) + 1
    shared = [ray.put(value) for value in args]
    pending: list[Any] = []
    try:
        for item in items:
            pending.append(remote.remote(item, *shared))
            while len(pending) >= limit:
                yield _take_result(pending)
        while pending:
            yield _take_result(pending)
    finally:
        # This also runs after an error in `items`, and if the caller stops.
        for task_ref in pending:
            ray.cancel(task_ref)


def _take_result(pending: list[Any]) -> Any:
    """Wait for a result, and remove its task from the list."""
    while True:
        # Wait in short intervals, since a signal's exception may be swallowed in a library.
        interrupts.raise_if_interrupted()
        finished_refs, pending_refs = ray.wait(pending, num_returns=1, timeout=POLL_SECONDS)
        if finished_refs:
            pending[:] = pending_refs
            return ray.get(finished_refs[0])
