"""Room for the frames of Python, so that calls do not map memory.

CPython stores frames in chunks of 16 KB. A call that begins a chunk maps it, and its return unmaps it. A loop of such
calls, which depends on nothing but the depth of its caller, spends up to half of its time there.
"""

from collections.abc import Callable
from typing import Any


def call_with_room(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function whose frames and those below it are in one chunk: half a megabyte for some thousand frames."""
    return function(*args)


# The frame of `call_with_room` takes the first half of a chunk of a megabyte, which it never touches.
call_with_room.__code__ = call_with_room.__code__.replace(co_stacksize=66_000)
