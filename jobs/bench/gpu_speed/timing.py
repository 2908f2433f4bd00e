"""Time variants in turn on one device, and keep what each of them took or why it failed."""

import gc
import statistics
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from jobs.bench.gpu_speed.shapes import Shapes
from redux.kernels import set_kernels

TimedChoice = str
"""Column of the table: "plain", or "fused" for what the library chooses on this machine ("auto")."""

CHOICES: dict[TimedChoice, Any] = {"plain": "plain", "fused": "auto"}
"""Argument of `set_kernels` for each column."""

MAX_ROUNDS = 15


class TimedVariant(NamedTuple):
    """One thing to time.

    Args:
        name: name, without the choice of kernels.
        choice: key of `CHOICES`.
        run: the timed call.
    """

    name: str
    choice: TimedChoice
    run: Callable[[], object]

    @property
    def label(self) -> str:
        """Key in the results."""
        return f"{self.name}/{self.choice}"


@dataclass
class Bench:
    """State of one run of the script.

    Args:
        shapes: sizes.
        device: "cuda" or "cpu".
        profiles: folder for the profiles of single calls; None for none.
        results: by group, {"ms": {variant: milliseconds of each round}, "errors": {variant: text}, ...}.
    """

    shapes: Shapes
    device: str
    profiles: Path | None = None
    results: dict[str, dict[str, Any]] = field(default_factory=dict)

    def time_call(self, run: Callable[[], object]) -> float:
        """Return the milliseconds of one call, from an idle device to an idle device."""
        if self.device == "cpu":
            start = time.perf_counter()
            run()
            return (time.perf_counter() - start) * 1e3
        # Events use the clock of the device, so the host's wait at the end does not count.
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end)

    def time_variants(
        self, group: str, variants: Sequence[TimedVariant], warm_calls: int = 2, settles: bool = True, **extra: Any
    ) -> None:
        """Time variants in turn, round after round, and put the times into the results.

        Args:
            group: key of the results.
            variants: the variants. One that fails is left out of the further rounds.
            warm_calls: calls of each variant before the first round, in which kernels are compiled and tuned.
            settles: call each variant twice in a round and time the second call, because the first one follows another
                variant.
            extra: further values for the results.
        """
        result: dict[str, Any] = {"ms": {}, "errors": {}, **extra}
        self.results[group] = result
        remaining = list(variants)

        def attempt(variant: TimedVariant) -> float | None:
            # Kernels are chosen for the whole process, so each call sets its own choice.
            set_kernels(CHOICES[variant.choice])
            try:
                return self.time_call(variant.run)
            except Exception as error:
                # A kernel that this card refuses must not cost the times of the others.
                traceback.print_exc()
                result["errors"][variant.label] = describe_error(error)
                remaining.remove(variant)
                self.free_memory()
                return None

        for variant in variants:
            for _ in range(warm_calls):
                if attempt(variant) is None:
                    break
        start = time.perf_counter()
        for number in range(MAX_ROUNDS):
            if number >= self.shapes.rounds and time.perf_counter() - start > self.shapes.section_s:
                break
            # Every round begins with another variant.
            offset = number % max(len(remaining), 1)
            for variant in [*remaining[offset:], *remaining[:offset]]:
                times = [attempt(variant) for _ in range(1 + settles) if variant in remaining]
                if times[-1] is not None:
                    result["ms"].setdefault(variant.label, []).append(round(times[-1], 4))
        set_kernels("auto")
        print(f"{group}: {format_medians(result)}", flush=True)
        if self.profiles:
            for variant in remaining:
                self.profile_call(group, variant)

    def profile_call(self, group: str, variant: TimedVariant) -> None:
        """Write the operations of one call, by time, into a file."""
        from torch.profiler import ProfilerActivity, profile

        assert self.profiles
        is_gpu = self.device == "cuda"
        set_kernels(CHOICES[variant.choice])
        with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_gpu else [])]) as profiler:
            self.time_call(variant.run)
        set_kernels("auto")
        averages = profiler.key_averages()
        table = averages.table(sort_by="cuda_time_total" if is_gpu else "cpu_time_total", row_limit=30)
        self.profiles.mkdir(parents=True, exist_ok=True)
        name = f"{group} {variant.name} {variant.choice}".replace(" ", "-")
        (self.profiles / f"{name}.txt").write_text(table)

    def free_memory(self) -> None:
        """Release memory that no tensor uses."""
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()

    def measure_peak_gib(self, run: Callable[[], object]) -> float:
        """Return GiB that one call adds at its peak; 0 on a CPU."""
        if self.device == "cpu":
            return 0.0
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        base_bytes = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return round((torch.cuda.max_memory_allocated() - base_bytes) / 2**30, 2)


def describe_error(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:400]


def build_variants(name: str, run: Callable[[], object]) -> list[TimedVariant]:
    """Return the plain and the fused variant of a call."""
    return [TimedVariant(name, choice, run) for choice in CHOICES]


def format_medians(result: dict[str, Any]) -> str:
    medians = {label: statistics.median(times) for label, times in result["ms"].items() if times}
    return ", ".join(f"{label} {milliseconds:.3f} ms" for label, milliseconds in medians.items())
