"""Faults for tests, as hooks that workers call: each happens once, after a step, on one rank."""

import os
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from pipelines.hooks import Hook, Step
from pipelines.stage import Plan


@dataclass(frozen=True)
class Fault:
    """kind: raise, exit, SIGKILL, SIGSTOP, hang, nan (in the loss of the step after) or slow (from then on).

    marks: a folder that outlives the process, where what has happened is noted.
    """

    kind: str
    step: int
    rank: int
    marks: Path
    times: int = 1

    def __call__(self, engine: Any, plan: Plan) -> Hook:
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

    def __call__(self, step: Step) -> None:
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
