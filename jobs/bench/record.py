"""Shared parts of benchmarks: a process for each measurement, and a dated line in a file of records."""

import argparse
import datetime
import json
import platform
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any


def measure_variants(
    script: str, variants: Iterable[str], **options: int | Path
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Run a script once per variant, each time in a new process, and yield (variant, measured values).

    Args:
        script: path of the script. Its last line of output is an object of JSON.
        variants: values of its option --variant.
        options: values of its other options; True for an option without a value.
    """
    arguments = []
    for name, value in options.items():
        arguments.append(f"--{name.replace('_', '-')}")
        if value is not True:  # True stands for an option without a value
            arguments.append(str(value))
    for variant in variants:
        # A process of its own: imports and the peak memory of one variant must not count for another.
        command = [sys.executable, script, "--variant", variant, *arguments]
        output = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout
        yield variant, json.loads(output.splitlines()[-1])


def add_out_option(parser: argparse.ArgumentParser, script: str) -> None:
    """Add the option for the file of records, which by default is the .jsonl file next to the script."""
    default = Path(script).with_suffix(".jsonl")
    parser.add_argument(
        "--out", metavar="FILE", type=Path, default=default, help="file of records, default: %(default)s"
    )


def append_record(path: Path, **measured: Any) -> None:
    """Append a line with date and machine to a file of records."""
    line = {"date": datetime.date.today().isoformat(), "machine": platform.machine(), **measured}
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")
