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


@pytest.fixture
def operator(monkeypatch: pytest.MonkeyPatch) -> PhysicalOperator:
    """The operator of a million items, before an operator that takes what the test tells it to take."""
    monkeypatch.setattr(ray, "put", lambda block: block)
    made = lazy_input._LazyInputOperator(CountedItems(1_000_000), DataContext.get_current())
    made._output_dependencies = [SimpleNamespace(metrics=SimpleNamespace(num_inputs_received=0))]
    return made


def test_items_are_made_when_they_are_due(operator: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lazy_input, "RefBundle", lambda entries, **_: entries)
    monkeypatch.setattr(lazy_input, "BlockEntry", lambda block, metadata: block.to_pylist())
    following, number = operator.output_dependencies[0].metrics, 0
    for taken in (0, 1, 1000):
        following.num_inputs_received = taken
        while operator.has_next():
            assert operator._get_next_inner() == [[{"number": number}]]
            number += 1
        assert number == operator._items.made == taken + lazy_input.MAX_WAITING_ITEMS


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
            for number in range(block["first"], block["end"], workers)
        ]
        assert dealt == [
            (segment, number)
            for segment, layout in enumerate(layouts)
            for number in range(layout.start + worker, layout.stop, workers)
        ]
    with pytest.raises(IndexError):
        BlockSequence(layouts)[len(blocks)]
