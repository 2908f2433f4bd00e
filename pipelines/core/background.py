"""Work in a daemon thread."""

import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import TypeVar

Result = TypeVar("Result")
Item = TypeVar("Item")


def run_in_background(work: Callable[[], Result]) -> Future[Result]:
    """Run a function in a daemon thread, which ends with the process."""
    future: Future[Result] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def read_ahead(items: Iterator[Item], count: int) -> Iterator[Item]:
    """Start a daemon thread that fetches items ahead, and return an iterator over them. Closing it ends the thread.

    Args:
        items: read in the thread, the first one at once.
        count: maximum number of items that wait, at least 1.
    """
    waiting: queue.SimpleQueue[Future[Item]] = queue.SimpleQueue()
    places = threading.Semaphore(count)
    is_closed = False

    def fetch() -> None:
        while places.acquire() and not is_closed:
            item: Future[Item] = Future()
            try:
                item.set_result(next(items))
            except BaseException as error:  # StopIteration included
                item.set_exception(error)
            waiting.put(item)
            if item.exception():
                return

    def iterate() -> Iterator[Item]:
        nonlocal is_closed
        try:
            while True:
                item = waiting.get().result()
                places.release()
                yield item
        except StopIteration:
            return
        finally:
            is_closed = True
            places.release()

    threading.Thread(target=fetch, daemon=True).start()
    return iterate()
