"""What a run writes down while it trains, from one place: a line a step in two files, and TensorBoard's events.

    metrics.jsonl    {"stage", "step", "loss", "learning_rate", "grad_norm", "samples", "replaced", "tokens", "data_s",
                     "compute_s"}
    consumed.jsonl   the samples of the step; see pipelines/consumed.py

A step stands once: what a resumed run is about to do again is cut off first, a line torn by a crash too.
"""

import json
import os
from dataclasses import asdict
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from pipelines import consumed, storage
from pipelines.consumed import Used

FILE = "metrics.jsonl"


class Metrics:
    """The record of one stage, open for steps after `cursor`; `run` is the run folder.

    replaced: samples of the stage so far that stood in for others.
    """

    def __init__(self, run: Path, stage: str, cursor: int) -> None:
        self.stage = stage
        _cut(run / consumed.FILE, stage, cursor)
        self.replaced = sum(entry["replaced"] for entry in _cut(run / FILE, stage, cursor) if entry["stage"] == stage)
        self.used, self.file = (run / consumed.FILE).open("a"), (run / FILE).open("a")
        self.events = SummaryWriter(run / "tensorboard" / stage, purge_step=cursor + 1)

    def write(self, step: int, values: dict[str, float], used: Used) -> None:
        """Append one step; it is on its way to the disk when this returns."""
        self.replaced += len(used.replaced)
        for file, entry in ((self.used, asdict(used)), (self.file, values)):
            file.write(json.dumps({"stage": self.stage, "step": step, **entry}) + "\n")
            file.flush()
        for name, value in values.items():
            self.events.add_scalar(name, value, step)

    def close(self) -> None:
        self.used.close()
        self.file.close()
        self.events.close()


def last(run: Path) -> dict | None:
    """The last whole line on record, None before the first."""
    try:
        with (run / FILE).open("rb") as file:
            file.seek(max(file.seek(0, os.SEEK_END) - 4096, 0))
            whole = file.read().rpartition(b"\n")[0]
    except FileNotFoundError:
        return None
    return json.loads(whole.rpartition(b"\n")[2]) if whole else None


def steps(run: Path, stage: str) -> int:
    """The stage's last step on record, 0 before the first."""
    with (run / FILE).open() as file:
        return max((entry["step"] for entry in map(json.loads, file) if entry["stage"] == stage), default=0)


def _cut(path: Path, stage: str, cursor: int) -> list[dict]:
    """Drop this stage's lines after step `cursor`, and whatever is no whole line; returns the entries that are left."""
    if not path.exists():
        return []
    whole = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("}\n")]
    entries = [(line, json.loads(line)) for line in whole]
    kept = [(line, entry) for line, entry in entries if entry["stage"] != stage or entry["step"] <= cursor]
    storage.write(str(path), "".join(line for line, _ in kept).encode())
    return [entry for _, entry in kept]
