"""Signals that stop a command: SIGINT (Ctrl-C), SIGTERM and SIGHUP. Each raises KeyboardInterrupt.

The exception is raised at any line of the main thread, so a library may swallow it or replace it by another one.
Every signal is therefore counted as well. Loops that do the work check the count, and the command line uses it for its
exit code.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class _SignalState:
    """Number of signals that this process has received, and of `defer_signals` blocks that it is in."""

    received = 0
    deferrals = 0


def _handle_signal(signum: int, frame: FrameType | None) -> None:
    _SignalState.received += 1
    if not _SignalState.deferrals:
        raise KeyboardInterrupt


def was_interrupted() -> bool:
    """Return True if a signal has come since the handlers were installed."""
    return _SignalState.received > 0


def raise_if_interrupted() -> None:
    """Raise KeyboardInterrupt if a signal has come, even if its exception was swallowed. Call it in long loops."""
    if _SignalState.received and not _SignalState.deferrals:
        raise KeyboardInterrupt


@contextmanager
def handle_signals() -> Iterator[None]:
    """Install the handlers for the length of a with block.

    A signal that is ignored, such as SIGHUP under nohup, stays ignored. After a signal the process is about to end, so
    further signals are ignored from the end of the block on: they would only change its exit code.
    """
    previous = {number: signal.getsignal(number) for number in SIGNALS}
    handled_signals = [number for number, handler in previous.items() if handler is not signal.SIG_IGN]
    _SignalState.received = _SignalState.deferrals = 0
    for number in handled_signals:
        signal.signal(number, _handle_signal)
    try:
        yield
    finally:
        for number in handled_signals:
            signal.signal(number, signal.SIG_IGN if _SignalState.received else previous[number])


@contextmanager
def defer_signals() -> Iterator[None]:
    """Delay the KeyboardInterrupt of a signal until the block has ended."""
    if threading.current_thread() is not threading.main_thread():  # Python runs signal handlers in the main thread only
        yield
        return
    count = _SignalState.received
    _SignalState.deferrals += 1
    try:
        yield
    finally:
        _SignalState.deferrals -= 1
    if _SignalState.received > count:
        raise_if_interrupted()
