"""Scenarios of a stage on a cluster of several machines; a script for test_cluster_faults.py.

    python -m tests.pipelines.cluster_day SCENARIO FOLDER    run a scenario; prints JSON at the end
    python -m tests.pipelines.cluster_day fit FOLDER         the driver, started by the scenario; RAY_ADDRESS is set

Machines are Ray nodes on this machine, each with its own processes. They belong to the process of the scenario. FOLDER
contains the plan (plan.pickle), the marks of the ranks and the output of the driver (driver.log).
"""

import json
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.cluster_utils import Cluster
from ray.core.generated import autoscaler_pb2
from ray.util.placement_group import placement_group_table

from pipelines.core import cluster
from pipelines.training import driver
from tests.pipelines.faults import Hold
from tests.waiting import wait_until

HOLD_STEPS = (3, 5, 7)
"""Steps after which ranks wait until the scenario lets them continue."""

FAST_HEALTH_CHECKS = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 1000,
    "health_check_failure_threshold": 3,
}
"""Settings with which Ray declares a node dead after seconds. Its defaults take half a minute."""


class ClusterDay:
    """A cluster whose head runs no workers, and the driver of a stage."""

    def __init__(self, folder: Path, machines: int) -> None:
        self.folder = folder
        self.hold = Hold(HOLD_STEPS, folder / "marks")
        self.hold.marks.mkdir()
        self.start(machines)

    def start(self, machines: int) -> None:
        """Start a new cluster, and the command that trains."""
        self.cluster = Cluster(
            initialize_head=True, head_node_args={"num_cpus": 0, "_system_config": FAST_HEALTH_CHECKS}
        )
        for _ in range(machines):
            self.add_machine()
        with (self.folder / "driver.log").open("ab") as log:
            self.driver = subprocess.Popen(
                [sys.executable, "-m", "tests.pipelines.cluster_day", "fit", str(self.folder)],
                env=os.environ | {"RAY_ADDRESS": self.cluster.address},
                stdout=log,
                stderr=log,
            )

    def add_machine(self) -> None:
        """Add a machine with one CPU."""
        self.cluster.add_node(num_cpus=1)

    def wait_for_step(self, step: int, ranks: int) -> list[str]:
        """Wait until so many ranks have finished the step, and return the IDs of their nodes."""

        def find_nodes() -> list[str]:
            assert self.driver.poll() is None, self.log
            return self.hold.list_nodes(step, ranks)

        return wait_until(find_nodes)

    def kill_machine(self, node_id: str) -> float:
        """Kill a machine and return the time."""
        [machine] = [node for node in self.cluster.worker_nodes if node.node_id == node_id]
        self.cluster.worker_nodes.remove(machine)
        return power_off(machine)

    def kill_all(self) -> float:
        """Kill all machines, the head first, and return the time."""
        at = power_off(self.cluster.head_node)
        for machine in self.cluster.worker_nodes:
            power_off(machine)
        return at

    def announce_preemption(self, node_id: str, seconds: float) -> None:
        """Announce that a machine will be taken away."""
        cause = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
        deadline = int((time.time() + seconds) * 1000)
        client = ray._raylet.GcsClient(address=self.cluster.address)
        accepted, reason = client.drain_node(node_id, cause, "test", deadline)
        assert accepted, reason

    def wait_for_driver(self) -> int:
        """Wait for the end of the driver and return its exit code."""
        return self.driver.wait(timeout=300)

    @property
    def log(self) -> str:
        return (self.folder / "driver.log").read_text()[-3000:]


def power_off(node: Any) -> float:
    """Send SIGKILL to all processes of a node at once, including workers, and return the time."""
    started = [entry.process for kind in node.all_processes.values() for entry in kind]
    parents = [psutil.Process(process.pid) for process in started if process.poll() is None]
    processes = parents + [child for parent in parents for child in parent.children(recursive=True)]
    at = time.time()
    # Suspend all of them first: a process that sees another one die would report it, unlike after a power failure.
    for act in (psutil.Process.suspend, psutil.Process.kill):
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                act(process)
    psutil.wait_procs(processes)
    return at


def list_checkpoints(day: ClusterDay) -> list[str]:
    return [path.parent.name for path in day.folder.glob("run/checkpoints/*/*/manifest.json")]


def continue_past_checkpoint(day: ClusterDay, ranks: int) -> list[str]:
    """Continue to step 7, wait until the checkpoint before it is stored, and return the nodes of the ranks."""
    day.hold.release(3)
    day.wait_for_step(5, ranks)
    day.hold.release(5)
    nodes = day.wait_for_step(7, ranks)
    wait_until(lambda: list_checkpoints(day))
    return nodes


def run_killed(day: ClusterDay) -> dict[str, Any]:
    """The machine of rank 0 dies."""
    nodes = continue_past_checkpoint(day, 2)
    at = day.kill_machine(nodes[0])
    day.hold.release(7)
    assert day.wait_for_driver() == 0, day.log
    return {"at": at}


def run_preempted(day: ClusterDay) -> dict[str, Any]:
    """A preemption is announced after step 3; the machine of rank 0 dies after step 7."""
    day.announce_preemption(day.wait_for_step(3, 2)[0], seconds=30)
    day.hold.release(3, after_announcement=True)
    nodes = continue_past_checkpoint(day, 2)
    saved = list_checkpoints(day)
    at = day.kill_machine(nodes[0])
    day.hold.release(7)
    assert day.wait_for_driver() == 0, day.log
    return {"at": at, "saved": saved}


def run_head_killed(day: ClusterDay) -> dict[str, Any]:
    """The head dies and its driver ends; then the same command runs on a new cluster."""
    continue_past_checkpoint(day, 2)
    at = power_off(day.cluster.head_node)
    code = day.wait_for_driver()
    ended = time.time()
    day.kill_all()
    day.hold.release(7)
    day.start(2)
    assert day.wait_for_driver() == 0, day.log
    return {"at": at, "code": code, "ended": ended}


def run_resized(day: ClusterDay) -> dict[str, Any]:
    """A machine joins after step 3; another one dies after step 7."""
    day.wait_for_step(3, 2)
    day.add_machine()
    day.wait_for_step(3, 3)
    nodes = continue_past_checkpoint(day, 3)
    at = day.kill_machine(nodes[0])
    day.hold.release(7)
    assert day.wait_for_driver() == 0, day.log
    return {"at": at}


SCENARIOS: dict[str, tuple[Callable[[ClusterDay], dict[str, Any]], int]] = {
    "killed": (run_killed, 3),
    "preempted": (run_preempted, 4),
    "head_killed": (run_head_killed, 2),
    "resized": (run_resized, 2),
}
"""Function of each scenario, and its number of machines at the start."""


def fit(folder: Path) -> None:
    """Train the stage of the plan, as the driver."""
    plan = pickle.loads((folder / "plan.pickle").read_bytes())
    with cluster.open_session():
        driver.train_stage(plan, [Hold(HOLD_STEPS, folder / "marks")])
        remaining = [group for group in placement_group_table().values() if group["state"] != "REMOVED"]
    assert not remaining


def main(scenario: str, folder: Path) -> None:
    if scenario == "fit":
        return fit(folder)
    run_scenario, machines = SCENARIOS[scenario]
    day = ClusterDay(folder, machines)
    try:
        print(json.dumps(run_scenario(day)))
    finally:
        day.driver.kill()
        day.driver.wait()
        day.kill_all()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
