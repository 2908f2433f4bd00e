"""Waiting for something that no event announces."""

import threading
import time
from collections.abc import Callable
from typing import Any


def wait_until(condition: Callable[[], Any], seconds: float = 240) -> Any:
    """Wait until the condition returns a true value, and return it."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{condition} for {seconds} s")
        threading.Event().wait(0.02)
    return value
