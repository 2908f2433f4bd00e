"""Tests of Ray tasks over an iterator: it is read as results come, and errors end it."""

from collections.abc import Iterator

import pytest
import ray

from pipelines.core.parallel import map_bounded

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("ray_cluster")]


def test_items_are_taken_as_results_come() -> None:
    taken = []

    def draw_items() -> Iterator[int]:
        for item in range(20):
            taken.append(item)
            yield item

    def multiply(item: int, factor: int) -> int:
        return item * factor

    limit = int(ray.cluster_resources()["CPU"]) + 1
    results = []
    for result in map_bounded(multiply, draw_items(), 3):
        results.append(result)
        assert len(taken) - len(results) < limit
    assert sorted(results) == [3 * item for item in range(20)]


def test_an_error_of_a_task_or_of_an_item_is_raised() -> None:
    def fail(item: int) -> None:
        raise ValueError(f"item {item}")

    def draw_items() -> Iterator[int]:
        yield 1
        raise OSError("no more items")

    with pytest.raises(ValueError, match=r"item [12]"):
        list(map_bounded(fail, [1, 2]))
    with pytest.raises(OSError, match="no more items"):
        list(map_bounded(lambda item: item, draw_items()))
