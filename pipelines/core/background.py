"""Work in a daemon thread."""

import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import TypeVar

WorkResult = TypeVar("WorkResult")
FetchedItem = TypeVar("FetchedItem")


def run_in_background(work: Callable[[], WorkResult]) -> Future[WorkResult]:
    """Run a function in a daemon thread, which ends with the process."""
    future: Future[WorkResult] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def read_ahead(items: Iterator[FetchedItem], count: int) -> Iterator[FetchedItem]:
    """Start a daemon thread that fetches items ahead, and return an iterator over them. Closing it ends the thread.

    Args:
        items: read in the thread, the first one at once.
        count: maximum number of items that wait, at least 1.
    """
    fetched: queue.SimpleQueue[Future[FetchedItem]] = queue.SimpleQueue()
    free_slots = threading.Semaphore(count)
    is_closed = False

    def fetch() -> None:
        # Closing releases a slot, so a thread that waits here wakes up and then sees `is_closed`.
        while free_slots.acquire() and not is_closed:
            item: Future[FetchedItem] = Future()
            try:
                item.set_result(next(items))
            except BaseException as error:  # StopIteration included
                item.set_exception(error)
            fetched.put(item)
            if item.exception():
                return

    def iterate() -> Iterator[FetchedItem]:
        nonlocal is_closed
        try:
            while True:
                item = fetched.get().result()
                free_slots.release()
                yield item
        except StopIteration:
            return
        finally:
            is_closed = True
            free_slots.release()

    threading.Thread(target=fetch, daemon=True).start()
    return iterate()
