"""Faults for tests, as hooks of workers. Each fault happens after one step, on one rank, a given number of times."""

import os
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch.distributed as dist
from ray.train.v2._internal.execution.context import get_train_context

from pipelines.training.hooks import Hook, StepResult
from pipelines.training.plan import StagePlan
from tests.waiting import wait_until


@dataclass(frozen=True)
class InjectedFault:
    """Factory of a hook that injects a fault.

    Args:
        kind: "raise", "exit", "SIGKILL", "SIGSTOP", "hang", "nan" (in the loss of the next step), or "slow" (every
            later forward pass sleeps).
        step: step after which the fault happens.
        rank: rank on which it happens.
        marks: folder with a file for each fault that has happened. It outlives the process.
        times: number of times that the fault happens, after the same step.
    """

    kind: str
    step: int
    rank: int
    marks: Path
    times: int = 1

    def __call__(self, engine: Any, plan: StagePlan) -> Hook:
        return _FaultHook(self, engine)

    def is_due(self, step: int) -> bool:
        """Return True if the fault happens now, and mark it as happened."""
        if step != self.step or dist.get_rank() != self.rank:
            return False
        count = len(list(self.marks.glob(f"{self.kind}-{self.step}-*")))
        if count >= self.times:
            return False
        (self.marks / f"{self.kind}-{self.step}-{count}").touch()
        return True


class _FaultHook(Hook):
    def __init__(self, fault: InjectedFault, engine: Any) -> None:
        self.fault, self.engine = fault, engine
        self.handle: Any = None

    def on_step_end(self, step: StepResult) -> None:
        # The NaN lasts one step.
        if self.handle:
            self.handle.remove()
        if not self.fault.is_due(step.number):
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
                    lambda module, inputs, output: output * float("nan")
                )
            case "slow":
                self.engine.module.register_forward_pre_hook(lambda module, inputs: time.sleep(0.3))
            case kind:
                raise AssertionError(kind)


@dataclass(frozen=True)
class Hold:
    """Factory of a hook that keeps all ranks after a step until the test lets them continue.

    Files in `marks` pass messages between ranks and test:

        STEP-RANKS-RANK-NODE   a rank has arrived: step, number of ranks, rank, ID of its node
        go-STEP                ranks may continue, also when the step is repeated
        announced-STEP         ranks must first wait until Ray has announced a preemption to them
    """

    steps: tuple[int, ...]
    marks: Path

    def __call__(self, engine: Any, plan: StagePlan) -> Hook:
        return _HoldHook(self)

    def list_nodes(self, step: int, ranks: int) -> list[str]:
        """Return the node IDs of the ranks after all of them have arrived; before that, an empty list."""
        nodes = [next(self.marks.glob(f"{step}-{ranks}-{rank}-*"), None) for rank in range(ranks)]
        return [node.name.split("-")[3] for node in nodes if node] if all(nodes) else []

    def release(self, step: int, after_announcement: bool = False) -> None:
        """Let the ranks continue, optionally after Ray has announced a preemption to them."""
        if after_announcement:
            (self.marks / f"announced-{step}").touch()
        (self.marks / f"go-{step}").touch()


class _HoldHook(Hook):
    def __init__(self, hold: Hold) -> None:
        self.hold = hold

    def on_step_end(self, step: StepResult) -> None:
        if step.number not in self.hold.steps:
            return
        node = ray.get_runtime_context().get_node_id()
        (self.hold.marks / f"{step.number}-{dist.get_world_size()}-{dist.get_rank()}-{node}").touch()
        wait_until((self.hold.marks / f"go-{step.number}").exists)
        if (self.hold.marks / f"announced-{step.number}").exists():
            wait_until(lambda: get_train_context().preemption_context.preemption_info)
