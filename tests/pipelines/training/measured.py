"""Measurement of the memory of real training steps of DeepSpeed: the bytes of all tensors that are alive."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from pipelines.training.plan import StagePlan
from pipelines.training.step_trace import ByteCounter
from tests.pipelines import ranks

STEPS = 3
"""Steps that are run. The last one is measured: the first makes the state of the optimizer."""


class MeasuredBytes(NamedTuple):
    """Bytes of torch's tensors on one rank.

    Args:
        resting: before the step.
        peak: largest sum within the step.
        update_peak: the same within the update.
    """

    resting: int
    peak: int
    update_peak: int


class CountingMode(TorchDispatchMode):
    """Counts the results of all operations of this thread."""

    def __init__(self, counter: ByteCounter) -> None:
        super().__init__()
        self.counter = counter

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._add, result)
        return result

    def _add(self, tensor: Tensor) -> None:
        # DeepSpeed's ZeRO 1 and 2 keep the shapes of all trained weights as tensors on "meta", which have no memory.
        if tensor.device.type != "meta":
            self.counter.add(tensor)


def measure_step(plan: StagePlan) -> MeasuredBytes:
    """Train some steps on this rank and measure the last one."""
    from pipelines.training import engine

    counter = ByteCounter()
    with CountingMode(counter), _measure_update(counter) as update_peaks:
        deepspeed_engine: Any = engine.build_engine(plan, ranks.count_workers())
        steps = ranks.run_steps(deepspeed_engine, plan, 0, STEPS)
        for _ in range(STEPS - 1):
            next(steps)
        gc.collect()
        resting = counter.peak = counter.live
        next(steps)
    peak = max(counter.peak, *update_peaks[-1])
    del steps
    engine.free_engine(deepspeed_engine)
    return MeasuredBytes(resting, peak, update_peaks[-1][1])


@contextmanager
def _measure_update(counter: ByteCounter) -> Iterator[list[tuple[int, int]]]:
    """Yield a list with the peaks before and within each update."""
    from pipelines.training import worker

    peaks: list[tuple[int, int]] = []
    update: Any = worker.apply_update

    def measured_update(*args: Any) -> Any:
        before, counter.peak = counter.peak, counter.live
        result = update(*args)
        peaks.append((before, counter.peak))
        return result

    worker.apply_update = measured_update
    try:
        yield peaks
    finally:
        worker.apply_update = update


def measure_all(plans: list[StagePlan]) -> list[MeasuredBytes]:
    """Measure several plans on this rank, one after the other."""
    return [measure_step(plan) for plan in plans]
