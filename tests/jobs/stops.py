"""The command itself, stopped at an event: how it ended, and what it left."""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import psutil

MARK = "REDUX_TEST_COMMAND"
"""In the environment of a command and of all that it starts."""

ENDING_S = 120

Receiver = Literal["command", "group", "all"]


@dataclass(kw_only=True)
class Stopped:
    """code: of the exit. seconds: from the first signal to the end. shown: what the command wrote.

    processes, files: left behind, files among those for temporary ones.
    """

    code: int
    seconds: float
    shown: str
    processes: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)


class Command:
    """A running `redux`, the leader of its process group, as a shell or `timeout` starts one."""

    def __init__(self, words: Sequence[str], environment: dict[str, str], reset: Callable[[], None] | None) -> None:
        self.mark = uuid.uuid4().hex
        # Ray's sockets lie in it, whose paths have at most 107 characters
        self.scratch = Path(tempfile.mkdtemp(prefix="s", dir="/tmp"))
        own = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "RAY_TMPDIR")}
        places = {"TMPDIR": str(self.scratch), "RAY_TMPDIR": str(self.scratch)}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "jobs.command", *words],
            env={**own, "TQDM_MININTERVAL": "0.1", **places, MARK: self.mark, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=reset,
        )
        self.shown = ""

    def wait_for(self, event: str) -> re.Match[str]:
        """Read what it writes until this is in it."""
        assert self.process.stdout
        while not (found := re.search(event, self.shown)):
            part = os.read(self.process.stdout.fileno(), 4096)
            assert part, f"ended before {event!r}, with {self.process.wait()}:\n{self.shown}"
            self.shown += part.decode(errors="replace")
        return found

    def send(self, number: signal.Signals, to: Receiver = "command") -> None:
        """A signal to it, to its process group, or to all that it has started, the command last."""
        if to == "group":
            os.killpg(self.process.pid, number)
            return
        for process in [*self.processes()] if to == "all" else []:
            if process.pid != self.process.pid:
                process.send_signal(number)
        self.process.send_signal(number)

    def end(self) -> Stopped:
        """Wait for its end."""
        clock = time.monotonic()
        output, _ = self.process.communicate(timeout=ENDING_S)
        seconds = time.monotonic() - clock
        self.shown += output.decode(errors="replace")
        left = [f"{process.name()} {process.pid}" for process in self.processes()]
        files = [str(path.relative_to(self.scratch)) for path in self.scratch.rglob("*")]
        return Stopped(code=self.process.returncode, seconds=seconds, shown=self.shown, processes=left, files=files)

    def processes(self) -> Iterator[psutil.Process]:
        """What it has started, in whatever session and group."""
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    yield process
            except psutil.Error:
                continue


@contextmanager
def started(
    words: Sequence[str], environment: dict[str, str] | None = None, reset: Callable[[], None] | None = None
) -> Iterator[Command]:
    """A command; what is left of it is removed."""
    command = Command(words, environment or {}, reset)
    try:
        yield command
    finally:
        for process in [*command.processes()]:
            process.kill()
        command.process.wait()
        shutil.rmtree(command.scratch, ignore_errors=True)
