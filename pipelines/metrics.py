"""What a run writes down while it trains, from one place: a line a step, and TensorBoard's events beside it.

    metrics.jsonl   {"stage", "step", "loss", "learning_rate", "grad_norm", "samples", "tokens", "data_s", "compute_s"}

A step stands once: what a resumed run is about to do again is cut off first, a line torn by a crash too.
"""

import json
import os
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

FILE = "metrics.jsonl"


class Metrics:
    """The record of one stage, open for steps after `cursor`; `run` is the run folder."""

    def __init__(self, run: Path, stage: str, cursor: int) -> None:
        self.stage = stage
        _cut(run / FILE, stage, cursor)
        self.file = (run / FILE).open("a")
        self.events = SummaryWriter(run / "tensorboard" / stage, purge_step=cursor + 1)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Append one step; it is on its way to the disk when this returns."""
        self.file.write(json.dumps({"stage": self.stage, "step": step, **values}) + "\n")
        self.file.flush()
        for name, value in values.items():
            self.events.add_scalar(name, value, step)

    def close(self) -> None:
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


def _cut(path: Path, stage: str, cursor: int) -> None:
    """Drop this stage's lines after step `cursor`, and whatever is no whole line."""
    if not path.exists():
        return
    whole = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("}\n")]
    kept = [line for line in whole if (entry := json.loads(line))["stage"] != stage or entry["step"] <= cursor]
    temporary = path.with_suffix(".part")
    temporary.write_text("".join(kept))
    os.replace(temporary, path)
