"""Machines of a Ray cluster as who operates one starts them: each a `ray start --block` of its own, all on this one.

What is lost is lost at once: SIGKILL for all processes of a machine.
"""

import json
import os
import socket
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from tests.pipelines.faults import until

QUICK = {
    "RAY_health_check_initial_delay_ms": "0",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "5",
}
"""How soon a cluster and its driver take a node or the head for dead; by Ray's own settings after up to a minute."""

RAY = str(Path(sysconfig.get_path("scripts"), "ray"))


def free_port() -> int:
    with socket.socket() as tried:
        tried.bind(("127.0.0.1", 0))
        return int(tried.getsockname()[1])


class Machines:
    """A head that only keeps house, nodes of one CPU, and the commands that are run there.

    folder: short, since Ray's sockets lie in it.
    """

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self.folder, self.port = folder, free_port()
        self.environment = {**os.environ, **QUICK, **environment, "RAY_TMPDIR": str(folder)}
        self.environment.pop("RAY_ADDRESS", None)
        self.address = f"127.0.0.1:{self.port}"
        self.running: dict[subprocess.Popen[bytes], Path] = {}
        self.nodes: list[subprocess.Popen[bytes]] = []

    def start_head(self) -> None:
        """The same command each time."""
        self.head = self._start(
            "--head", f"--port={self.port}", "--num-cpus=0", "--include-dashboard=false", f"--temp-dir={self.folder}"
        )

    def add(self) -> None:
        self.nodes.append(self._start(f"--address={self.address}", "--num-cpus=1"))

    def _start(self, *options: str) -> subprocess.Popen[bytes]:
        command = [RAY, "start", "--block", "--disable-usage-stats", *options]
        started = self._popen(f"machine-{len(self.running)}", command, self.environment)
        log = self.log(started)

        def up() -> bool:
            assert started.poll() is None, log.read_text()
            return "Ray runtime started" in log.read_text()

        until(up, 60)
        return started

    def command(self, *words: str) -> subprocess.Popen[bytes]:
        """redux WORDS… on this cluster."""
        command = [sys.executable, "-m", "jobs.command", *words]
        return self._popen(f"command-{len(self.running)}", command, {**self.environment, "RAY_ADDRESS": self.address})

    def _popen(self, name: str, command: list[str], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
        path = self.folder / f"{name}.log"
        with path.open("wb") as log:
            started = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        self.running[started] = path
        return started

    def log(self, started: subprocess.Popen[bytes]) -> Path:
        return self.running[started]

    def close(self) -> None:
        for one in self.running:
            kill(one)


def kill(started: subprocess.Popen[bytes]) -> None:
    """SIGKILL for it and all that it started, none of which sees another die."""
    if started.poll() is None:
        own = psutil.Process(started.pid)
        everyone = [own, *own.children(recursive=True)]
        for act in (psutil.Process.suspend, psutil.Process.kill):
            for one in everyone:
                with suppress(psutil.NoSuchProcess):
                    act(one)
        psutil.wait_procs(everyone, timeout=30)
    started.wait(30)


def lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file that may still grow."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
