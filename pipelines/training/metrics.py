"""What a run writes down while it trains: a line a step that counted, in two files.

    metrics.jsonl    {"stage", "step", "loss", "learning_rate", "grad_norm", "samples", "replaced", "skipped",
                     "tokens", "data_s", "compute_s", "stall_s", "peak_bytes", "slowest", "slowest_s"}
    consumed.jsonl   the samples of the step; see pipelines/data/consumed.py

A step stands once: what a resumed run is about to do again is cut off first, a line torn by a crash too.
"""

import json
import os
import resource
from dataclasses import asdict
from pathlib import Path

from pipelines.core import failures, jsonl, storage
from pipelines.data import consumed
from pipelines.data.consumed import ConsumedSamples

FILE = "metrics.jsonl"


class Metrics:
    """The record of one stage, open for steps after `cursor`; `run` is the run folder.

    replaced, skipped: samples of the stage so far that stood in for others, and steps that changed no weights.
    """

    def __init__(self, run: Path, stage: str, cursor: int) -> None:
        self.stage = stage
        _cut(run / consumed.CONSUMED_FILE, stage, cursor)
        kept = [entry for entry in _cut(run / FILE, stage, cursor) if entry["stage"] == stage]
        self.replaced, self.skipped = (sum(entry.get(name, 0) for entry in kept) for name in ("replaced", "skipped"))
        self.files = (run / consumed.CONSUMED_FILE).open("a"), (run / FILE).open("a")

    def write(self, step: int, values: dict[str, float | None], used: ConsumedSamples) -> None:
        """Append one step; what is not finite has become None."""
        self.replaced += len(used.replaced)
        self.skipped += int(values["skipped"] or 0)
        for file, entry in zip(self.files, (asdict(used), values), strict=True):
            with failures.locate_errors(file.name):
                file.write(json.dumps({"stage": self.stage, "step": step, **entry}, allow_nan=False) + "\n")
                file.flush()

    def sync(self) -> None:
        """What was written survives a machine that fails when this returns."""
        for file in self.files:
            with failures.locate_errors(file.name):
                os.fsync(file.fileno())

    def close(self) -> None:
        self.sync()
        for file in self.files:
            file.close()


def peak_bytes() -> int:
    """The most memory that this process has used so far: of its GPU, or without one all of it."""
    import torch  # the recorder, which has no use for it, comes by here too

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def steps(run: Path, stage: str) -> int:
    """The stage's last step on record, 0 before the first."""
    return max(losses(run, stage), default=0)


def stages(run: Path) -> set[str]:
    """Return the names of the stages with a step on record."""
    return {entry["stage"] for entry in jsonl.read(run / FILE)}


def losses(run: Path, stage: str) -> dict[int, float | None]:
    """The loss of each of the stage's steps on record; None where it was not finite."""
    return {entry["step"]: entry["loss"] for entry in jsonl.read(run / FILE) if entry["stage"] == stage}


def tokens_per_s(run: Path, stage: str) -> float:
    """Of the stage's steps on record, all workers together; start-up and evaluation apart."""
    steps = [entry for entry in jsonl.read(run / FILE) if entry["stage"] == stage]
    spent = sum(entry[name] for entry in steps for name in ("data_s", "compute_s", "stall_s"))
    return float(sum(entry["tokens"] for entry in steps) / spent)


def _cut(path: Path, stage: str, cursor: int) -> list[dict]:
    """Drop this stage's lines after step `cursor`, and whatever is no whole line; returns the entries that are left."""
    if not path.exists():
        return []
    whole = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("}\n")]
    entries = [(line, json.loads(line)) for line in whole]
    kept = [(line, entry) for line, entry in entries if entry["stage"] != stage or entry["step"] <= cursor]
    storage.write(str(path), "".join(line for line, _ in kept).encode())
    return [entry for _, entry in kept]
