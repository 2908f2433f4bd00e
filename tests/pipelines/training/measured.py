"""Measurement of the memory of real training steps: all allocations of torch on the CPU, as its profiler records them."""

from typing import Any, NamedTuple

import torch
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile, record_function

from pipelines.training.plan import StagePlan
from tests.pipelines import ranks

STEPS = 3
"""Steps that are run. The last one is measured: the first makes the state of the optimizer."""


class MeasuredBytes(NamedTuple):
    """Bytes of torch's tensors on one rank.

    Args:
        resting: before the step.
        peak: largest sum within the step.
        update_peak: the same within the last backward pass's reduction and the update.
    """

    resting: int
    peak: int
    update_peak: int


def measure_step(plan: StagePlan) -> MeasuredBytes:
    """Train some steps on this rank and measure the last one."""
    from pipelines.training import engine, worker

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        # the profiler goes on from what earlier engines have left
        with record_function("begin"):
            torch.ones(1)
        deepspeed_engine: Any = engine.build_engine(plan, ranks.count_workers())
        update = worker.apply_update

        def marked_update(*args: Any) -> Any:
            with record_function("update"):
                return update(*args)

        worker.apply_update = marked_update  # type: ignore[assignment]
        steps = ranks.run_steps(deepspeed_engine, plan, 0, STEPS)
        for _ in range(STEPS - 1):
            next(steps)
        with record_function("measured step"):
            next(steps)
        worker.apply_update = update  # type: ignore[assignment]
        del steps
        engine.free_engine(deepspeed_engine)
        del deepspeed_engine
    return _find_peaks(profiler)


def _find_peaks(profiler: Any) -> MeasuredBytes:
    events = sorted(profiler.profiler.kineto_results.experimental_event_tree(), key=lambda event: event.start_time_ns)
    allocations: list[tuple[int, int]] = []
    spans: dict[str, tuple[int, int]] = {}
    pending = list(events)
    while pending:
        event = pending.pop()
        pending += event.children
        if event.tag == _EventType.Allocation and event.extra_fields.device.type == "cpu":
            allocations.append((event.start_time_ns, event.extra_fields.total_allocated))
        elif event.name in ("begin", "measured step", "update"):
            # of several updates, the last is in the measured step
            spans[event.name] = max(
                spans.get(event.name, (0, 0)), (event.start_time_ns, event.start_time_ns + event.duration_time_ns)
            )
    allocations.sort()
    before = next(total for time, total in allocations if time >= spans["begin"][0])
    start, end = spans["measured step"]
    update_start, update_end = spans["update"]
    # the last of the totals before the step
    resting = max((time, total) for time, total in allocations if time < start)[1]
    peak = max(total for time, total in allocations if start <= time <= end)
    update_peak = max((total for time, total in allocations if update_start <= time <= update_end), default=0)
    return MeasuredBytes(resting - before, peak - before, update_peak - before)


def measure_all(plans: list[StagePlan]) -> list[MeasuredBytes]:
    """Measure several plans on this rank, one after the other."""
    return [measure_step(plan) for plan in plans]


