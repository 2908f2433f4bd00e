"""Work in daemon threads."""

import queue
import threading
from collections.abc import Iterator

import pytest

from pipelines.core.background import read_ahead


class CountedItems:
    """Iterator over 0, 1, 2, ... that counts its items and signals the last one that is asked for."""

    def __init__(self, stop: int, last: int) -> None:
        self.stop, self.last = stop, last
        self.made = 0
        self.reached = threading.Event()

    def __iter__(self) -> Iterator[int]:
        return self

    def __next__(self) -> int:
        if self.made == self.stop:
            raise StopIteration
        self.made += 1
        if self.made == self.last:
            self.reached.set()
        return self.made - 1


@pytest.mark.parametrize("count", [1, 3, 100])
def test_items_are_read_ahead_in_order(count: int) -> None:
    assert list(read_ahead(CountedItems(50, 50), count)) == list(range(50))


def test_first_item_does_not_wait_for_the_second() -> None:
    source = queue.SimpleQueue[int]()
    items = read_ahead(iter(source.get, None), 4)
    source.put(7)
    assert next(items) == 7


@pytest.mark.parametrize("count", [1, 3])
def test_number_of_waiting_items_is_limited(count: int) -> None:
    source = CountedItems(50, count)
    items = read_ahead(source, count)
    assert source.reached.wait(60)
    # The thread could go on here; it does not before an item is taken.
    assert source.made == count
    assert next(items) == 0


def test_error_comes_after_the_items_before_it() -> None:
    def fail() -> Iterator[int]:
        yield 1
        raise ValueError("broken")

    items = read_ahead(fail(), 4)
    assert next(items) == 1
    with pytest.raises(ValueError, match="broken"):
        next(items)


def test_closed_iterator_ends_its_thread() -> None:
    before = set(threading.enumerate())
    items = read_ahead(CountedItems(50, 1), 1)
    [thread] = set(threading.enumerate()) - before
    assert next(items) == 0
    items.close()
    thread.join(60)
    assert not thread.is_alive()
