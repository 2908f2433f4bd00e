"""Shared parts of benchmarks: a process for each measurement, and a dated line next to the script."""

import datetime
import json
import platform
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any


def each(script: str, ways: Iterable[str], **options: int | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(way, what the script called with `--way way --option value` prints as its last line, JSON)."""
    given = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    for way in ways:
        command = [sys.executable, script, "--way", way, *given]
        told = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout
        yield way, json.loads(told.splitlines()[-1])


def append(script: str, **measured: Any) -> None:
    """Add a line, with date and machine, to the .jsonl file of the script's name."""
    line = {"date": datetime.date.today().isoformat(), "machine": platform.machine(), **measured}
    with Path(script).with_suffix(".jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
