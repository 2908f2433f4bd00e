"""A stage on a cluster of several machines, to which something happens: a script, for test_cluster_faults.py.

    python -m tests.pipelines.cluster_day SCENARIO FOLDER    what happens; prints JSON at the end
    python -m tests.pipelines.cluster_day fit FOLDER         the driver that the scenario starts; RAY_ADDRESS says where

Machines are Ray's nodes, each with processes of its own, on this one; they live in the scenario's process.  FOLDER has
the plan (plan.pickle), and gets the marks of the ranks and what the driver wrote (driver.log).
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
from tests.pipelines.faults import Hold, until

HELD = (3, 5, 7)
"""Steps after which ranks wait until the scenario lets them go on.  """

QUICK = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 1000,
    "health_check_failure_threshold": 3,
}
"""How soon a cluster takes a node for dead: after seconds, by Ray's own settings after half a minute."""


class Day:
    """A cluster whose head only keeps house, and the driver."""

    def __init__(self, folder: Path, machines: int) -> None:
        self.folder = folder
        self.hold = Hold(HELD, folder / "marks")
        self.hold.marks.mkdir()
        self.begin(machines)

    def begin(self, machines: int) -> None:
        """A new cluster, and the command that trains."""
        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "_system_config": QUICK})
        for _ in range(machines):
            self.add()
        with (self.folder / "driver.log").open("ab") as log:
            self.driver = subprocess.Popen(
                [sys.executable, "-m", "tests.pipelines.cluster_day", "fit", str(self.folder)],
                env=os.environ | {"RAY_ADDRESS": self.cluster.address},
                stdout=log,
                stderr=log,
            )

    def add(self) -> None:
        """One more machine, of one CPU."""
        self.cluster.add_node(num_cpus=1)

    def at(self, step: int, ranks: int) -> list[str]:
        """Wait until so many ranks have done the step; returns their nodes."""

        def there() -> list[str]:
            assert self.driver.poll() is None, self.log
            return self.hold.arrived(step, ranks)

        return until(there)

    def kill(self, node: str) -> float:
        """The machine is gone; returns when."""
        [machine] = [one for one in self.cluster.worker_nodes if one.node_id == node]
        self.cluster.worker_nodes.remove(machine)
        return power_off(machine)

    def kill_all(self) -> float:
        """The head first."""
        at = power_off(self.cluster.head_node)
        for machine in self.cluster.worker_nodes:
            power_off(machine)
        return at

    def drain(self, node: str, seconds: float) -> None:
        """Give notice that the machine will be taken away."""
        reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
        deadline = int((time.time() + seconds) * 1000)
        accepted, why = ray._raylet.GcsClient(address=self.cluster.address).drain_node(node, reason, "test", deadline)
        assert accepted, why

    def ends(self) -> int:
        """The driver's exit code."""
        return self.driver.wait(timeout=300)

    @property
    def log(self) -> str:
        return (self.folder / "driver.log").read_text()[-3000:]


def power_off(node: Any) -> float:
    """SIGKILL for all processes of a node, workers among them, and all at once; returns when."""
    started = [one.process for kind in node.all_processes.values() for one in kind]
    own = [psutil.Process(one.pid) for one in started if one.poll() is None]
    everyone = own + [child for one in own for child in one.children(recursive=True)]
    at = time.time()
    for act in (psutil.Process.suspend, psutil.Process.kill):  # none sees another die, or it would say so
        for one in everyone:
            with suppress(psutil.NoSuchProcess):
                act(one)
    psutil.wait_procs(everyone)
    return at


def checkpoints(day: Day) -> list[str]:
    return [one.parent.name for one in day.folder.glob("run/checkpoints/*/*/manifest.json")]


def after_checkpoint(day: Day, ranks: int) -> list[str]:
    """Go on to step 7, before which a checkpoint is made; it is stored when this returns the ranks' nodes."""
    day.hold.go(3)
    day.at(5, ranks)
    day.hold.go(5)
    nodes = day.at(7, ranks)
    until(lambda: checkpoints(day))
    return nodes


def killed(day: Day) -> dict[str, Any]:
    """The machine of rank 0 dies."""
    nodes = after_checkpoint(day, 2)
    at = day.kill(nodes[0])
    day.hold.go(7)
    assert day.ends() == 0, day.log
    return {"at": at}


def preempted(day: Day) -> dict[str, Any]:
    """Notice after step 3; rank 0's machine goes after step 7."""
    day.drain(day.at(3, 2)[0], seconds=30)
    day.hold.go(3, told=True)
    nodes = after_checkpoint(day, 2)
    saved = checkpoints(day)
    at = day.kill(nodes[0])
    day.hold.go(7)
    assert day.ends() == 0, day.log
    return {"at": at, "saved": saved}


def head_killed(day: Day) -> dict[str, Any]:
    """The head dies; its driver ends; a new cluster, and the same command."""
    after_checkpoint(day, 2)
    at = power_off(day.cluster.head_node)
    code = day.ends()
    ended = time.time()
    day.kill_all()
    day.hold.go(7)
    day.begin(2)
    assert day.ends() == 0, day.log
    return {"at": at, "code": code, "ended": ended}


def resized(day: Day) -> dict[str, Any]:
    """A machine comes after step 3, another goes after step 7."""
    day.at(3, 2)
    day.add()
    day.at(3, 3)
    nodes = after_checkpoint(day, 3)
    at = day.kill(nodes[0])
    day.hold.go(7)
    assert day.ends() == 0, day.log
    return {"at": at}


SCENARIOS: dict[str, tuple[Callable[[Day], dict[str, Any]], int]] = {
    "killed": (killed, 3),
    "preempted": (preempted, 4),
    "head_killed": (head_killed, 2),
    "resized": (resized, 2),
}
"""What happens, and the number of machines at the beginning."""


def fit(folder: Path) -> None:
    plan = pickle.loads((folder / "plan.pickle").read_bytes())
    with cluster.open_session():
        driver.train_stage(plan, [Hold(HELD, folder / "marks")])
        left = [one for one in placement_group_table().values() if one["state"] != "REMOVED"]
    assert not left


def main(scenario: str, folder: Path) -> None:
    if scenario == "fit":
        return fit(folder)
    happens, machines = SCENARIOS[scenario]
    day = Day(folder, machines)
    try:
        print(json.dumps(happens(day)))
    finally:
        day.driver.kill()
        day.driver.wait()
        day.kill_all()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
