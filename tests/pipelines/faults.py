"""Faults for tests, as hooks that workers call: each happens once, after a step, on one rank."""

import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch.distributed as dist
from ray.train.v2._internal.execution.context import get_train_context

from pipelines.training.hooks import Hook, StepResult
from pipelines.training.plan import StagePlan


@dataclass(frozen=True)
class Fault:
    """kind: raise, exit, SIGKILL, SIGSTOP, hang, nan (in the loss of the step after) or slow (from then on, forward
    passes sleep).

    marks: a folder that outlives the process, where what has happened is noted.
    """

    kind: str
    step: int
    rank: int
    marks: Path
    times: int = 1

    def __call__(self, engine: Any, plan: StagePlan) -> Hook:
        return _Happens(self, engine)

    def due(self, step: int) -> bool:
        """Whether it happens now; then it is noted."""
        if step != self.step or dist.get_rank() != self.rank:
            return False
        before = len(list(self.marks.glob(f"{self.kind}-{self.step}-*")))
        if before >= self.times:
            return False
        (self.marks / f"{self.kind}-{self.step}-{before}").touch()
        return True


class _Happens(Hook):
    def __init__(self, fault: Fault, engine: Any) -> None:
        self.fault, self.engine = fault, engine
        self.handle: Any = None

    def on_step_end(self, step: StepResult) -> None:
        if self.handle:
            self.handle.remove()
        if not self.fault.due(step.number):
            return
        match self.fault.kind:
            case "raise":
                raise RuntimeError("made for the test")
            case "exit":
                os._exit(3)
            case "SIGKILL" | "SIGSTOP":
                os.kill(os.getpid(), getattr(signal, self.fault.kind))
            case "hang":
                threading.Event().wait()
            case "nan":
                self.handle = self.engine.module.register_forward_hook(
                    lambda module, given, output: output * float("nan")
                )
            case "slow":
                self.engine.module.register_forward_pre_hook(lambda module, given: time.sleep(0.3))
            case kind:
                raise AssertionError(kind)


@dataclass(frozen=True)
class Hold:
    """Keeps all ranks after a step, until a test has done to the cluster what it wants to happen there and then.

    A rank that has arrived is a file in `marks`, named by the step, the number of ranks, the rank and its node's ID.
    One named `go-STEP` lets them go on, then and whenever the step is done again; with one named `told-STEP` not before
    Ray told them that a machine will go.
    """

    steps: tuple[int, ...]
    marks: Path

    def __call__(self, engine: Any, plan: StagePlan) -> Hook:
        return _Holds(self)

    def arrived(self, step: int, ranks: int) -> list[str]:
        """Node IDs of the ranks, once all have come, else nothing."""
        nodes = [next(self.marks.glob(f"{step}-{ranks}-{rank}-*"), None) for rank in range(ranks)]
        return [node.name.split("-")[3] for node in nodes if node] if all(nodes) else []

    def go(self, step: int, told: bool = False) -> None:
        if told:
            (self.marks / f"told-{step}").touch()
        (self.marks / f"go-{step}").touch()


class _Holds(Hook):
    def __init__(self, hold: Hold) -> None:
        self.hold = hold

    def on_step_end(self, step: StepResult) -> None:
        if step.number not in self.hold.steps:
            return
        node = ray.get_runtime_context().get_node_id()
        (self.hold.marks / f"{step.number}-{dist.get_world_size()}-{dist.get_rank()}-{node}").touch()
        until((self.hold.marks / f"go-{step.number}").exists)
        if (self.hold.marks / f"told-{step.number}").exists():
            until(lambda: get_train_context().preemption_context.preemption_info)


def until(happened: Callable[[], Any], seconds: float = 240) -> Any:
    """What `happened` returns, once that is true."""
    deadline = time.monotonic() + seconds
    while not (value := happened()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{happened} for {seconds} s")
        threading.Event().wait(0.02)
    return value
