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


class _State:
    """Signals of this process: how many came, and how many blocks that must not be interrupted are entered."""

    received = 0
    deferrals = 0


def _receive(signum: int, frame: FrameType | None) -> None:
    _State.received += 1
    if not _State.deferrals:
        raise KeyboardInterrupt


def received() -> bool:
    """Return whether a signal came since the handlers were installed."""
    return _State.received > 0


def check() -> None:
    """Raise KeyboardInterrupt if a signal came, also one whose exception was swallowed. For loops that do work."""
    if _State.received and not _State.deferrals:
        raise KeyboardInterrupt


@contextmanager
def handled() -> Iterator[None]:
    """Install the handlers. A signal that is ignored, as SIGHUP under nohup, stays ignored.

    After a signal the process is about to end, so further ones are ignored from here on: they could only spoil its
    exit code.
    """
    before = {number: signal.getsignal(number) for number in SIGNALS}
    handled_signals = [number for number, handler in before.items() if handler is not signal.SIG_IGN]
    _State.received = _State.deferrals = 0
    for number in handled_signals:
        signal.signal(number, _receive)
    try:
        yield
    finally:
        for number in handled_signals:
            signal.signal(number, signal.SIG_IGN if _State.received else before[number])


@contextmanager
def deferred() -> Iterator[None]:
    """Let the block end before a signal that comes during it raises KeyboardInterrupt."""
    if threading.current_thread() is not threading.main_thread():  # the others are never interrupted
        yield
        return
    count = _State.received
    _State.deferrals += 1
    try:
        yield
    finally:
        _State.deferrals -= 1
    if _State.received > count:
        check()
