"""Measurement of the memory of real training steps of DeepSpeed: the bytes of all tensors that are alive."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from pipelines.training.plan import StagePlan
from pipelines.training.step_trace import ByteCounter, list_tensors
from tests.pipelines import ranks

STEPS = 3
"""Steps that are run. The last one is measured: the first makes the state of the optimizer."""


class MeasuredBytes(NamedTuple):
    """Bytes of torch's tensors on rank 0.

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
        for tensor in list_tensors([result]):
            # DeepSpeed's ZeRO 1 and 2 keep the shapes of all trained weights as tensors on "meta", without memory.
            if tensor.device.type != "meta":
                self.counter.add(tensor)
        return result


def measure_step(plan: StagePlan) -> MeasuredBytes:
    """Train some steps on this rank and measure the last one. Only rank 0 counts, which takes most of the time."""
    from pipelines.training import engine

    counter = ByteCounter()
    counting = CountingMode(counter) if dist.get_rank() == 0 else nullcontext()
    with counting, _measure_update(counter) as update_peaks:
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
    """Measure several plans, one after the other. Results of rank 0 alone count."""
    return [measure_step(plan) for plan in plans]
