"""Machines of a Ray cluster, all on this machine.

Each is a set of Linux namespaces: an address, a name, processes and temporary files of its own, on one network without
a route to others. Where namespaces are not allowed, as in most containers, all of them are this machine, at loopback.

A machine is lost at once: SIGKILL for all its processes, and none of them sees another one end.
"""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import psutil

from tests.forks import ForkedCommand
from tests.waiting import wait_until

FAST_FAILURE_DETECTION = {
    "RAY_health_check_initial_delay_ms": "0",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "5",
}
"""Time until a cluster and its driver notice a lost node or head; with Ray's defaults up to a minute."""

NAMESPACES = ("user", "net", "mount", "uts", "pid")

Process = subprocess.Popen[bytes] | ForkedCommand


@cache
def can_use_namespaces() -> bool:
    """Tell if machines can have namespaces of their own."""
    unshare = ["unshare", "--user", "--map-root-user", *(f"--{name}" for name in NAMESPACES[1:])]
    script = """
        ip link add switch type bridge
        ip link add first type veth peer name second
        mount --bind /tmp /tmp
        command -v nsenter"""
    try:
        command = [*unshare, "--fork", "--mount-proc", "sh", "-ec", script]
        return subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        return False


def _enter(process: int, namespaces: Sequence[str], command: Sequence[str]) -> list[str]:
    """Return a command that runs in namespaces of a process."""
    options = [f"--{name}" for name in namespaces]
    return ["nsenter", f"--target={process}", *options, "--preserve-credentials", f"--wd={Path.cwd()}", *command]


def _hold_namespaces(command: Sequence[str]) -> subprocess.Popen[bytes]:
    """Start a process that holds the namespaces of a command, and wait until they exist."""
    script = "echo there; sleep infinity; :"  # the last command keeps the shell, which reaps orphans
    holder = subprocess.Popen([*command, "sh", "-c", script], stdout=subprocess.PIPE)
    assert holder.stdout
    assert holder.stdout.readline() == b"there\n", command
    return holder


class Machine:
    """A machine on which commands run.

    Attributes:
        ip: its address.
        scratch: a folder of its own. Its path is short, since Ray's sockets lie in it.
        processes: the commands.
    """

    def __init__(self, network: "Network", name: str, ip: str) -> None:
        self.network, self.ip = network, ip
        self.scratch = network.folder / "scratch"
        self.processes: list[Process] = []
        self.holder: subprocess.Popen[bytes] | None = None
        if network.holder:
            self._create_namespaces(network.holder.pid, name)

    def _create_namespaces(self, network: int, name: str) -> None:
        scratch, hosts = self.network.folder / name, self.network.folder / f"{name}.hosts"
        scratch.mkdir()
        hosts.write_text(f"127.0.0.1 localhost\n{self.ip} {name}\n")
        unshare = ["unshare", "--net", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
        self.holder = _hold_namespaces(_enter(network, ("user", "net"), unshare))
        [first] = psutil.Process(self.holder.pid).children()
        self.first = first.pid
        _run_script(_enter(network, ("user", "net"), ()), f"""
            ip link add {name} type veth peer name eth0 netns {self.first}
            ip link set {name} master switch up""")  # fmt: skip
        _run_script(_enter(self.first, NAMESPACES[:-1], ()), f"""
            hostname {name}
            mount --bind {hosts} /etc/hosts
            mount --bind {scratch} {self.scratch}
            ip link set lo up
            ip address add {self.ip}/24 dev eth0
            ip link set eth0 up
            ip route add default via {self.network.gateway}""")  # fmt: skip

    def start(self, command: Sequence[str], environment: Mapping[str, str]) -> Process:
        """Start a command whose output goes to a file."""
        words = _enter(self.first, NAMESPACES, command) if self.holder else command
        with self._open_log() as log:
            process = subprocess.Popen(
                words, env=dict(environment), stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        return self._add_process(process, log.name)

    def start_fork(self, module: str, words: Sequence[str], environment: Mapping[str, str]) -> Process:
        """Start `python -m MODULE WORDS...` as a fork, so that neither it nor the workers of its Ray import modules."""
        with self._open_log() as log:
            namespaces = self.first if self.holder else None
            process = ForkedCommand(module, words, environment, log.fileno(), namespaces)
        return self._add_process(process, log.name)

    def _open_log(self) -> BinaryIO:
        return (self.network.folder / f"log-{len(self.network.logs)}").open("wb")

    def _add_process(self, process: Process, log: str) -> Process:
        self.processes.append(process)
        self.network.logs[process] = Path(log)
        return process

    def list_processes(self) -> list[psutil.Process]:
        """List all processes of this machine."""
        found = []
        for process in (self.holder, *self.processes):
            if process and process.poll() is None:
                found += psutil.Process(process.pid).children(recursive=True)
        return found

    def lose(self) -> None:
        """Kill all processes."""
        for process in (self.holder, *self.processes):
            if process:
                kill(process)


def _run_script(prefix: Sequence[str], script: str) -> None:
    subprocess.run([*prefix, "sh", "-ec", script], check=True)


class Network:
    """Machines that reach each other.

    Args:
        folder: folder that all machines share, because they share all files but their scratch.
        has_namespaces: give each machine namespaces of its own.

    Attributes:
        gateway: address of processes beside the machines, such as a bucket.
    """

    def __init__(self, folder: Path, has_namespaces: bool) -> None:
        self.folder, self.machines, self.logs = folder, list[Machine](), dict[Process, Path]()
        self.holder: subprocess.Popen[bytes] | None = None
        self.gateway = "127.0.0.1"
        (folder / "scratch").mkdir()
        if has_namespaces:
            self.gateway = "10.77.0.1"
            self.holder = _hold_namespaces(["unshare", "--user", "--map-root-user", "--net"])
            _run_script(_enter(self.holder.pid, ("user", "net"), ()), f"""
                ip link set lo up
                ip link add switch type bridge
                ip address add {self.gateway}/24 dev switch
                ip link set switch up""")  # fmt: skip

    def add_machine(self) -> Machine:
        """Add a machine."""
        number = len(self.machines) + 1
        self.machines.append(Machine(self, f"machine-{number}", self.find_address(number)))
        return self.machines[-1]

    def find_address(self, number: int) -> str:
        """Return the address of a machine; the first has number 1."""
        return f"10.77.0.{10 + number}" if self.holder else self.gateway

    def at_gateway(self, command: Sequence[str]) -> list[str]:
        """Return a command whose servers are reached at the gateway's address."""
        return _enter(self.holder.pid, ("user", "net"), command) if self.holder else list(command)

    def read_log(self, process: Process) -> str:
        """Read the output of a command."""
        return self.logs[process].read_text()

    def close(self) -> None:
        """Lose all machines."""
        for machine in self.machines:
            machine.lose()
        if self.holder:
            kill(self.holder)


@contextmanager
def open_network(folder: Path, has_namespaces: bool) -> Iterator[Network]:
    """Make a network for the length of a with block."""
    network = Network(folder, has_namespaces)
    try:
        yield network
    finally:
        network.close()


class Cluster:
    """A Ray cluster: a head, nodes with one CPU, and the commands that run there.

    Args:
        network: the network of its machines.
        environment: environment of all its processes.
        has_dashboard: start the head with a dashboard.
        head_cpus: CPUs of the head for tasks.
    """

    def __init__(
        self, network: Network, environment: Mapping[str, str], has_dashboard: bool = False, head_cpus: int = 0
    ) -> None:
        self.network, self.head_machine = network, network.add_machine()
        self.nodes: list[Machine] = []
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        scratch = str(self.head_machine.scratch)
        self.environment = {
            **os.environ, **FAST_FAILURE_DETECTION, **environment, "PATH": path, "RAY_TMPDIR": scratch,
        }  # fmt: skip
        for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
            self.environment.pop(name, None)
        port, dashboard_port = find_free_port(), find_free_port()
        self.address = f"{self.head_machine.ip}:{port}"
        self.dashboard = f"http://127.0.0.1:{dashboard_port}" if has_dashboard else ""
        self._head_options = (
            *("--head", f"--port={port}", f"--dashboard-port={dashboard_port}"),
            *(f"--include-dashboard={has_dashboard}", f"--num-cpus={head_cpus}"),
        )

    def start(self, nodes: int = 2) -> None:
        """Start the head and this number of nodes, with the same commands each time."""
        self.nodes.clear()
        self.start_head()
        for _ in range(nodes):
            self.add_node()

    def start_head(self) -> None:
        """Start the head."""
        self.head = self._start_ray(self.head_machine, *self._head_options)

    def add_node(self) -> None:
        """Add a machine with a node."""
        self.nodes.append(self.network.add_machine())
        self._start_ray(self.nodes[-1], f"--address={self.address}", "--num-cpus=1")

    def _start_ray(self, machine: Machine, *options: str) -> Process:
        process = machine.start_fork(
            "ray.scripts.scripts", ["start", "--block", "--disable-usage-stats", *options], self.environment
        )

        def has_started() -> bool:
            assert process.poll() is None, self.network.read_log(process)
            return "Ray runtime started" in self.network.read_log(process)

        wait_until(has_started, 60)
        return process

    def start_redux(self, *words: str) -> Process:
        """Start `redux WORDS...` on the first node."""
        return self._start_redux(self.nodes[0], words, {"RAY_ADDRESS": self.address})

    def start_redux_on_head(self, *words: str) -> Process:
        """Start `redux WORDS...` on the head."""
        return self._start_redux(self.head_machine, words, {})

    def _start_redux(self, machine: Machine, words: Sequence[str], environment: Mapping[str, str]) -> Process:
        return machine.start_fork("jobs.command", words, {**self.environment, **environment})


def find_free_port() -> int:
    """Find a port that no process uses."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def kill(process: Process) -> None:
    """Send SIGKILL to a process and all its descendants."""
    if process.poll() is None:
        parent = psutil.Process(process.pid)
        tree = [parent, *parent.children(recursive=True)]
        # Suspended first, so that none sees another one end.
        for act in (psutil.Process.suspend, psutil.Process.kill):
            for member in tree:
                with suppress(psutil.NoSuchProcess):
                    act(member)
        psutil.wait_procs(tree, timeout=30)
    process.wait(30)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read the complete lines of a file of JSON lines that may still grow."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
