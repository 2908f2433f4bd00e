"""Tests of the input of Ray Data that is made while it is used."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.data import DataContext
from ray.data._internal.execution.interfaces import PhysicalOperator

from pipelines.data import lazy_input
from pipelines.data.ingest import BlockLayout, BlockSequence


class CountedItems(Sequence[dict[str, int]]):
    """Items 0, 1, ..., which count how many were made."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.made = 0

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, number: Any) -> Any:
        self.made += 1
        return {"number": number}


class ActorPool:
    """Numbers of the actors of an operator, as Ray Data's pool gives them, and the requests to change them."""

    def __init__(self) -> None:
        self.idle, self.restarting, self.pending = 2, 0, 0
        self.requests: list[int] = []

    def current_size(self) -> int:
        return self.idle + self.restarting + self.pending

    def num_restarting_actors(self) -> int:
        return self.restarting

    def num_pending_actors(self) -> int:
        return self.pending

    def scale(self, request: Any) -> int:
        """Release pending actors first, then idle ones, as Ray Data 2.60 does."""
        self.requests.append(request.delta)
        released = min(-request.delta, self.pending + self.idle)
        self.idle -= released - min(released, self.pending)
        self.pending -= min(released, self.pending)
        return -released


@pytest.fixture
def pool() -> ActorPool:
    return ActorPool()


@pytest.fixture
def operator(pool: ActorPool, monkeypatch: pytest.MonkeyPatch) -> PhysicalOperator:
    """The operator of a million items, before an operator of two actors whose results the test counts."""
    monkeypatch.setattr(ray, "put", lambda block: block)
    made = lazy_input._LazyInputOperator(CountedItems(1_000_000), DataContext.get_current())
    following = SimpleNamespace(
        metrics=SimpleNamespace(num_outputs_taken=0), get_autoscaling_actor_pools=lambda: [pool]
    )
    made._output_dependencies = [following]
    return made


def test_items_are_made_when_they_are_due(operator: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lazy_input, "RefBundle", lambda entries, **_: entries)
    monkeypatch.setattr(lazy_input, "BlockEntry", lambda block, metadata: block.to_pylist())
    following, number = operator.output_dependencies[0].metrics, 0
    for taken in (0, 1, 1000):
        following.num_outputs_taken = taken
        while operator.has_next():
            assert operator._get_next_inner() == [[{"number": number}]]
            number += 1
        assert number == operator._items.made == taken + 2 * lazy_input.MAX_ITEMS_AHEAD


def test_an_idle_actor_ends_for_each_that_starts_again(operator: Any, pool: ActorPool) -> None:
    operator.has_next()
    assert pool.requests == []
    # One actor was lost with its node, and a pending one would take the CPU that it needs.
    pool.idle, pool.restarting, pool.pending = 3, 1, 1
    for _ in range(3):
        operator.has_next()
    assert (pool.idle, pool.pending) == (2, 0)
    pool.restarting = 2
    operator.has_next()
    assert pool.idle == 1
    # All have started again: the next loss counts from zero.
    pool.idle, pool.restarting = 3, 0
    operator.has_next()
    pool.restarting = 1
    operator.has_next()
    assert pool.idle == 2


def test_ray_reserves_no_resources_for_items_and_waits_for_the_last(operator: Any) -> None:
    """A share of the CPUs for this operator would leave too few for the readers."""
    assert operator.throttling_disabled()
    assert not operator.has_execution_finished()
    operator._made = len(operator._items)
    assert operator.has_execution_finished()
    assert not operator.has_next()


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 4, 64])
@pytest.mark.parametrize("turns", [0, 1, 2, 5, 64, 65, 200])
def test_blocks_deal_each_micro_batch_to_its_worker_in_order(workers: int, size: int, turns: int) -> None:
    layouts = [BlockLayout(5, 5 + turns * workers, size, workers), BlockLayout(0, 3 * workers, size, workers)]
    blocks = list(BlockSequence(layouts))
    assert len(blocks) == len(BlockSequence(layouts))
    for worker in range(workers):
        dealt = [
            (block["segment"], number)
            for block in blocks[worker::workers]
            for number in range(block["start"], block["stop"], workers)
        ]
        assert dealt == [
            (segment, number)
            for segment, layout in enumerate(layouts)
            for number in range(layout.start + worker, layout.stop, workers)
        ]
    with pytest.raises(IndexError):
        BlockSequence(layouts)[len(blocks)]
