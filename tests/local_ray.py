"""The work of Ray Data and of Ray tasks in the process of the tests: starting a worker takes seconds."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray.data

from pipelines.core import parallel
from pipelines.data import lazy_input


class LocalDataset:
    """Dataset of items with the methods that pipelines call. It is computed at once, in order and in this process."""

    def __init__(self, items: list[dict[str, Any]], override_num_blocks: int) -> None:
        assert override_num_blocks == len(items)
        self.items = items
        self.context = SimpleNamespace(execution_options=SimpleNamespace(preserve_order=True))

    def map(self, task: Callable[..., dict[str, Any]], fn_args: tuple[Any, ...], num_cpus: int) -> "LocalDataset":
        return LocalDataset([task(item, *fn_args) for item in self.items], len(self.items))

    def iter_rows(self) -> Iterator[dict[str, Any]]:
        return iter(self.items)

    def map_batches(self, actor: Callable[..., Any], fn_constructor_args: tuple[Any, ...], **_: Any) -> "LocalBlocks":
        compute = actor(*fn_constructor_args)
        return LocalBlocks(compute({name: np.array([value]) for name, value in item.items()}) for item in self.items)


class LocalBlocks(list[dict[str, Any]]):
    """The blocks that an actor has returned."""

    def iter_batches(self, batch_size: None) -> Iterator[dict[str, np.ndarray]]:
        return ({name: np.asarray(column) for name, column in block.items()} for block in self)


def map_locally(task: Callable[..., Any], items: Iterable[Any], *args: Any) -> Iterator[Any]:
    return (task(item, *args) for item in items)


@contextmanager
def run_in_process() -> Iterator[None]:
    """Let this process do the work of Ray."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray.data, "from_items", LocalDataset)
        patch.setattr(lazy_input, "from_sequence", lambda items: LocalDataset(list(items), len(items)))
        patch.setattr(parallel, "map_bounded", map_locally)
        yield
