"""The command itself, stopped at an event: its exit code, and processes and files that it leaves."""

import os
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import psutil

from tests.forks import ForkedCommand

MARK = "REDUX_TEST_COMMAND"
"""Environment variable of a command and of all its descendants."""

ENDING_S = 120
"""Limit of the time between a signal and the end."""

Receiver = Literal["command", "group", "all"]


@dataclass(kw_only=True)
class StoppedCommand:
    """A command that has ended.

    Args:
        code: exit code.
        output: standard output and errors.
        processes: processes that it has left.
        files: temporary files that it has left.
    """

    code: int
    output: str
    processes: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)


class Command:
    """A running `redux`, the leader of its process group, as a shell or `timeout` starts one.

    Args:
        words: the words after `redux`.
        environment: variables besides those of this process.
        with_forks: the command and the workers of its Ray are forks, which start faster.
    """

    def __init__(self, words: Sequence[str], environment: dict[str, str], with_forks: bool) -> None:
        self.mark = uuid.uuid4().hex
        # Ray's sockets lie in it, whose paths have at most 107 characters.
        self.scratch = Path(tempfile.mkdtemp(prefix="s", dir="/tmp"))
        inherited = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "RAY_TMPDIR")}
        folders = {"TMPDIR": str(self.scratch), "RAY_TMPDIR": str(self.scratch)}
        environment = {**inherited, "TQDM_MININTERVAL": "0.1", **folders, MARK: self.mark, **environment}
        self.reader, writer = os.pipe()
        self.process: subprocess.Popen[bytes] | ForkedCommand
        if with_forks:
            self.process = ForkedCommand("jobs.command", words, environment, writer)
        else:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "jobs.command", *words],
                env=environment,
                stdout=writer,
                stderr=writer,
                start_new_session=True,
                preexec_fn=reset_signals,
            )
        os.close(writer)
        self.output = ""

    def wait_for(self, event: str) -> re.Match[str]:
        """Read the output until it matches a pattern."""
        while not (found := re.search(event, self.output)):
            assert self._read(), f"ended before {event!r}, with {self.process.wait()}:\n{self.output}"
        return found

    def _read(self) -> bool:
        """Wait for more output. Return False at its end."""
        part = os.read(self.reader, 4096)
        self.output += part.decode(errors="replace")
        return bool(part)

    def send(self, number: signal.Signals, to: Receiver = "command") -> None:
        """Send a signal to the command, to its process group, or to all its processes, the command last."""
        if to == "group":
            os.killpg(self.process.pid, number)
            return
        for process in [*self.iterate_processes()] if to == "all" else []:
            if process.pid != self.process.pid:
                process.send_signal(number)
        os.kill(self.process.pid, number)

    def wait_for_end(self) -> StoppedCommand:
        """Wait for the end, and list what is left."""
        deadline = time.monotonic() + ENDING_S
        while select.select([self.reader], [], [], max(0, deadline - time.monotonic()))[0] and self._read():
            pass
        code = self.process.wait(max(1, deadline - time.monotonic()))
        processes = [f"{process.name()} {process.pid}" for process in self.iterate_processes()]
        files = [str(path.relative_to(self.scratch)) for path in self.scratch.rglob("*")]
        return StoppedCommand(code=code, output=self.output, processes=processes, files=files)

    def iterate_processes(self) -> Iterator[psutil.Process]:
        """Iterate over the processes of the command, in all sessions and groups.

        Forks are those of its session, since they have no environment of their own that others can see.
        """
        for process in psutil.process_iter():
            try:
                is_own = process.environ().get(MARK) == self.mark or os.getsid(process.pid) == self.process.pid
                if is_own and process.status() != psutil.STATUS_ZOMBIE:
                    yield process
            except (psutil.Error, ProcessLookupError):
                continue


def reset_signals() -> None:
    """Reset ignored signals: tests in the background pass ignored SIGINT on, and nohup SIGHUP."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


@contextmanager
def start_command(
    words: Sequence[str], environment: dict[str, str] | None = None, with_forks: bool = False
) -> Iterator[Command]:
    """Start a command for the length of a with block. Its processes and files are removed."""
    command = Command(words, environment or {}, with_forks)
    try:
        yield command
    finally:
        for process in [*command.iterate_processes()]:
            process.kill()
        command.process.wait()
        os.close(command.reader)
        shutil.rmtree(command.scratch, ignore_errors=True)
