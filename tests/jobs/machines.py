"""Machines of a Ray cluster as who operates one has them, all on this one.

Each is a set of Linux namespaces: an address, a name, processes and temporary files of its own, on one network that
leads nowhere else.  Where these are not allowed, as in most containers, all of them are this machine, at its loopback.

What is lost is lost at once: SIGKILL for all processes, none of which sees another die.
"""

import json
import os
import socket
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import psutil

from tests.pipelines.faults import wait_until

QUICK = {
    "RAY_health_check_initial_delay_ms": "0",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "5",
}
"""How soon a cluster and its driver take a node or the head for dead; by Ray's own settings after up to a minute."""

RAY = str(Path(sysconfig.get_path("scripts"), "ray"))

NAMESPACES = ("user", "net", "mount", "uts", "pid")

Process = subprocess.Popen[bytes]


@cache
def apart() -> bool:
    """Whether machines can have namespaces of their own."""
    spaces = ["unshare", "--user", "--map-root-user", *(f"--{one}" for one in NAMESPACES[1:]), "--fork", "--mount-proc"]
    needed = """
        ip link add switch type bridge
        ip link add one type veth peer name other
        mount --bind /tmp /tmp
        command -v nsenter"""
    try:
        return subprocess.run([*spaces, "sh", "-ec", needed], capture_output=True).returncode == 0
    except OSError:
        return False


def _in(process: int, namespaces: Sequence[str], command: Sequence[str]) -> list[str]:
    """A command, in namespaces of a process."""
    entered = [f"--{one}" for one in namespaces]
    return ["nsenter", f"--target={process}", *entered, "--preserve-credentials", f"--wd={Path.cwd()}", *command]


def _held(command: Sequence[str]) -> Process:
    """Namespaces, once they are there; they last as long as the process."""
    stays = "echo there; sleep infinity; :"  # the shell too, as what takes leave of orphans
    held = subprocess.Popen([*command, "sh", "-c", stays], stdout=subprocess.PIPE)
    assert held.stdout
    assert held.stdout.readline() == b"there\n", command
    return held


class Machine:
    """One on which commands run.

    ip: its address.  scratch: a folder of its own, under a short name since Ray's sockets lie in it.
    """

    def __init__(self, network: "Network", name: str, ip: str) -> None:
        self.network, self.ip = network, ip
        self.scratch = network.folder / "scratch"
        self.running: list[Process] = []
        self.holder: Process | None = None
        if network.holder:
            self._move_in(network.holder.pid, name)

    def _move_in(self, network: int, name: str) -> None:
        own, hosts = self.network.folder / name, self.network.folder / f"{name}.hosts"
        own.mkdir()
        hosts.write_text(f"127.0.0.1 localhost\n{self.ip} {name}\n")
        wanted = ["unshare", "--net", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
        self.holder = _held(_in(network, ("user", "net"), wanted))
        [first] = psutil.Process(self.holder.pid).children()
        self.first = first.pid
        _shell(_in(network, ("user", "net"), ()), f"""
            ip link add {name} type veth peer name eth0 netns {self.first}
            ip link set {name} master switch up""")  # fmt: skip
        _shell(_in(self.first, NAMESPACES[:-1], ()), f"""
            hostname {name}
            mount --bind {hosts} /etc/hosts
            mount --bind {own} {self.scratch}
            ip link set lo up
            ip address add {self.ip}/24 dev eth0
            ip link set eth0 up
            ip route add default via {self.network.gateway}""")  # fmt: skip

    def starts(self, command: Sequence[str], environment: Mapping[str, str]) -> Process:
        """A command whose output goes to a file."""
        path = self.network.folder / f"log-{len(self.network.logs)}"
        inside = _in(self.first, NAMESPACES, command) if self.holder else command
        with path.open("wb") as log:
            started = subprocess.Popen(
                inside, env=dict(environment), stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        self.running.append(started)
        self.network.logs[started] = path
        return started

    def processes(self) -> list[psutil.Process]:
        """All that runs there."""
        found = []
        for one in (self.holder, *self.running):
            if one and one.poll() is None:
                found += psutil.Process(one.pid).children(recursive=True)
        return found

    def lose(self) -> None:
        for one in (self.holder, *self.running):
            if one:
                kill(one)


def _shell(place: Sequence[str], script: str) -> None:
    subprocess.run([*place, "sh", "-ec", script], check=True)


class Network:
    """Machines that reach each other.

    folder: what all of them see, as they do all files but their scratch.  gateway: the address of what is there besides
    them, such as buckets.
    """

    def __init__(self, folder: Path, apart: bool) -> None:
        self.folder, self.machines, self.logs = folder, list[Machine](), dict[Process, Path]()
        self.holder: Process | None = None
        self.gateway = "127.0.0.1"
        (folder / "scratch").mkdir()
        if apart:
            self.gateway = "10.77.0.1"
            self.holder = _held(["unshare", "--user", "--map-root-user", "--net"])
            _shell(_in(self.holder.pid, ("user", "net"), ()), f"""
                ip link set lo up
                ip link add switch type bridge
                ip address add {self.gateway}/24 dev switch
                ip link set switch up""")  # fmt: skip

    def add(self) -> Machine:
        number = len(self.machines) + 1
        self.machines.append(Machine(self, f"machine-{number}", self.address(number)))
        return self.machines[-1]

    def address(self, number: int) -> str:
        """Of the first machine, the second and so on."""
        return f"10.77.0.{10 + number}" if self.holder else self.gateway

    def besides(self, command: Sequence[str]) -> list[str]:
        """A command, where it is reached by the gateway's address."""
        return _in(self.holder.pid, ("user", "net"), command) if self.holder else list(command)

    def said(self, started: Process) -> str:
        return self.logs[started].read_text()

    def close(self) -> None:
        for machine in self.machines:
            machine.lose()
        if self.holder:
            kill(self.holder)


@contextmanager
def network(folder: Path, apart: bool) -> Iterator[Network]:
    made = Network(folder, apart)
    try:
        yield made
    finally:
        made.close()


class Cluster:
    """A head that only keeps house, nodes of one CPU, and the commands that are run there.

    environment: of all of them.  dashboard: whether the head has one.
    """

    def __init__(self, network: Network, environment: Mapping[str, str], dashboard: bool = False) -> None:
        self.network, self.house = network, network.add()
        self.nodes: list[Machine] = []
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        self.environment = {**os.environ, **QUICK, **environment, "PATH": path, "RAY_TMPDIR": str(self.house.scratch)}
        for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
            self.environment.pop(name, None)
        port, shown = free_port(), free_port()
        self.address = f"{self.house.ip}:{port}"
        self.dashboard = f"http://127.0.0.1:{shown}" if dashboard else ""
        self._head = ("--head", f"--port={port}", f"--dashboard-port={shown}", f"--include-dashboard={dashboard}")

    def start(self) -> None:
        """By the same commands each time."""
        self.nodes.clear()
        self.start_head()
        self.add()
        self.add()

    def start_head(self) -> None:
        self.head = self._ray(self.house, *self._head, "--num-cpus=0")

    def add(self) -> None:
        """A machine more."""
        self.nodes.append(self.network.add())
        self._ray(self.nodes[-1], f"--address={self.address}", "--num-cpus=1")

    def _ray(self, machine: Machine, *options: str) -> Process:
        started = machine.starts([RAY, "start", "--block", "--disable-usage-stats", *options], self.environment)

        def up() -> bool:
            assert started.poll() is None, self.network.said(started)
            return "Ray runtime started" in self.network.said(started)

        wait_until(up, 60)
        return started

    def runs(self, *words: str) -> Process:
        """redux WORDS… on the first of the nodes."""
        return self._redux(self.nodes[0], words, {"RAY_ADDRESS": self.address})

    def runs_at_the_head(self, *words: str) -> Process:
        return self._redux(self.house, words, {})

    def _redux(self, machine: Machine, words: Sequence[str], environment: Mapping[str, str]) -> Process:
        return machine.starts([sys.executable, "-m", "jobs.command", *words], {**self.environment, **environment})


def free_port() -> int:
    with socket.socket() as tried:
        tried.bind(("127.0.0.1", 0))
        return int(tried.getsockname()[1])


def kill(started: Process) -> None:
    """SIGKILL for it and all that it started."""
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
