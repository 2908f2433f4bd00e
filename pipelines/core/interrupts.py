"""Signals that stop a command: SIGINT (Ctrl-C), SIGTERM and SIGHUP, each raised as KeyboardInterrupt.

The main thread gets the exception wherever it is, so a library may swallow it or turn it into another one. Every
signal is therefore counted as well: loops that do the work ask for the count, and the command line trusts it for its
exit code.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class _SignalState:
    """Signals of this process: how many came, and how many blocks that must not be interrupted are entered."""

    received = 0
    deferrals = 0


def _handle_signal(signum: int, frame: FrameType | None) -> None:
    _SignalState.received += 1
    if not _SignalState.deferrals:
        raise KeyboardInterrupt


def was_interrupted() -> bool:
    """Return whether a signal came since the handlers were installed."""
    return _SignalState.received > 0


def raise_if_interrupted() -> None:
    """Raise KeyboardInterrupt if a signal came, also one whose exception was swallowed. For loops that do work."""
    if _SignalState.received and not _SignalState.deferrals:
        raise KeyboardInterrupt


@contextmanager
def handle_signals() -> Iterator[None]:
    """Install the handlers. A signal that is ignored, as SIGHUP under nohup, stays ignored.

    After a signal the process is about to end, so further ones are ignored from here on: they could only spoil its
    exit code.
    """
    before = {number: signal.getsignal(number) for number in SIGNALS}
    handled_signals = [number for number, handler in before.items() if handler is not signal.SIG_IGN]
    _SignalState.received = _SignalState.deferrals = 0
    for number in handled_signals:
        signal.signal(number, _handle_signal)
    try:
        yield
    finally:
        for number in handled_signals:
            signal.signal(number, signal.SIG_IGN if _SignalState.received else before[number])


@contextmanager
def defer_signals() -> Iterator[None]:
    """Let the block end before a signal that comes during it raises KeyboardInterrupt."""
    if threading.current_thread() is not threading.main_thread():  # the others are never interrupted
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
