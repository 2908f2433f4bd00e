"""Metrics and samples of a run: one line per finished step in each of two files.

    metrics.jsonl    {"stage", "step", "loss", "learning_rate", "grad_norm", "samples", "replaced", "skipped",
                     "tokens", "data_s", "compute_s", "stall_s", "peak_bytes", "slowest_rank", "slowest_s"}, and
                     "validation_loss" for validated steps
    consumed.jsonl   samples of the step; see pipelines/data/consumed.py

Seconds are means over the workers, bytes are their sum. `slowest_rank` took `slowest_s` longer than the mean to read
and to compute the forward pass.

Each step has one line. When a stage resumes, the lines of steps that will be repeated are removed first, and a line
that a crash truncated.
"""

import json
import os
import resource
import sys
from dataclasses import asdict
from pathlib import Path

from pipelines.core import failures, jsonl, storage
from pipelines.data import consumed
from pipelines.data.consumed import ConsumedSamples
from pipelines.training.files import METRICS_FILE

VALIDATION_LOSS = "validation_loss"
"""Metric of the steps that were validated, see pipelines/training/validation.py."""


class MetricsWriter:
    """Writer of both files for one stage. Removes the stage's steps after the cursor when it opens them.

    Attributes:
        replaced: replaced samples of the stage so far.
        skipped: skipped updates of the stage so far.
    """

    def __init__(self, run: Path, stage: str, cursor: int) -> None:
        self.stage = stage
        for name in (consumed.CONSUMED_FILE, METRICS_FILE):
            _drop_steps_after(run / name, stage, cursor)
        stage_entries = [entry for entry in jsonl.read(run / METRICS_FILE) if entry["stage"] == stage]
        self.replaced = sum(entry.get("replaced", 0) for entry in stage_entries)
        self.skipped = sum(entry.get("skipped", 0) for entry in stage_entries)
        # Append mode: lines of steps up to the cursor stay.
        self.files = (run / consumed.CONSUMED_FILE).open("a"), (run / METRICS_FILE).open("a")

    def write(self, step: int, values: dict[str, float | None], used: ConsumedSamples) -> None:
        """Append one step.

        Args:
            step: number of the step, counted from 1.
            values: metrics; None for values that are not finite, which JSON cannot store.
            used: samples of the step.
        """
        self.replaced += len(used.replaced)
        self.skipped += int(values["skipped"] or 0)
        for file, entry in zip(self.files, (asdict(used), values), strict=True):
            with failures.locate_errors(file.name):
                file.write(json.dumps({"stage": self.stage, "step": step, **entry}, allow_nan=False) + "\n")
                # A reader, such as a search, sees the line at once. `sync` makes it survive a machine crash.
                file.flush()

    def sync(self) -> None:
        """Flush the files to disk, so that they survive a crash of the machine."""
        for file in self.files:
            with failures.locate_errors(file.name):
                os.fsync(file.fileno())

    def close(self) -> None:
        self.sync()
        for file in self.files:
            file.close()


def measure_peak_bytes() -> int:
    """Measure the peak memory of this process in bytes: of its GPU, or of all its memory without a GPU."""
    # Imported here, because the recorder imports this module and does without torch.
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts in bytes, Linux in KiB


def read_last_step(run: Path, stage: str) -> int:
    """Return the last recorded step of a stage, 0 before the first."""
    return max(read_losses(run, stage), default=0)


def read_stages(run: Path) -> set[str]:
    """Return the names of the stages with a recorded step."""
    return {entry["stage"] for entry in jsonl.read(run / METRICS_FILE)}


def read_losses(run: Path, stage: str) -> dict[int, float | None]:
    """Return the loss of each recorded step of a stage; None if it was not finite."""
    return {entry["step"]: entry["loss"] for entry in jsonl.read(run / METRICS_FILE) if entry["stage"] == stage}


def read_validation_loss(run: Path, stage: str) -> float | None:
    """Return the last validation loss of a stage; None if it was not validated or the loss was not finite."""
    entries = [entry for entry in jsonl.read(run / METRICS_FILE) if entry["stage"] == stage]
    return next((entry[VALIDATION_LOSS] for entry in reversed(entries) if VALIDATION_LOSS in entry), None)


def compute_tokens_per_s(run: Path, stage: str) -> float:
    """Compute tokens per second over the recorded steps of a stage and all workers, without start-up and evaluation.

    The first step, which compiles kernels and allocates memory, counts only if it is the only one.
    """
    steps = [entry for entry in jsonl.read(run / METRICS_FILE) if entry["stage"] == stage]
    steps = steps[1:] or steps
    seconds = sum(entry[name] for entry in steps for name in ("data_s", "compute_s", "stall_s"))
    return float(sum(entry["tokens"] for entry in steps) / seconds)


def _drop_steps_after(path: Path, stage: str, cursor: int) -> None:
    """Remove a stage's lines after the cursor, and truncated lines.

    The lines of consumed.jsonl may hold millions of numbers, so only their texts are in memory together.
    """
    if not path.exists():
        return
    remaining_lines = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            # A line that a crash truncated does not end with a brace and a newline.
            if not line.endswith("}\n"):
                continue
            entry = jsonl.parse_line(line, number, path)
            if entry["stage"] != stage or entry["step"] <= cursor:
                remaining_lines.append(line)
    storage.write(str(path), "".join(remaining_lines).encode())
