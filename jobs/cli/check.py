"""`redux check`: what a job will train on and what it will take, before it runs."""

import argparse
from pathlib import Path
from typing import Any

from jobs.cli.arguments import EXAMPLE_JOB, add_job, build_options, parse_count, parse_natural


def add_parsers(verbs: Any) -> None:
    """Add the parser of this group."""
    check = verbs.add_parser(
        "check",
        help="check a job before it runs: data, labels, steps, cost and memory",
        description="Check a job without a GPU, without Ray and without a training step. It looks for wrong settings, "
        "missing files, packages, disk space and permissions; draws samples of each set and encodes them as training "
        "does; looks for evaluation questions in the training sets; and prints steps, tokens and the peak memory of "
        "each stage by part, with --tokens-per-s also hours, and with --price also cost. All problems are listed "
        "together, with exit code 2.",
        epilog=f"example: redux check {EXAMPLE_JOB}; redux check jobs/recipes/llava-1.5-7b.yaml --workers 8 "
        "--gpu-memory 80 --tokens-per-s 30000 --price 2.5",
    )
    add_job(check, f"a job file, such as {EXAMPLE_JOB}")
    check.add_argument(
        "--runs-dir",
        metavar="DIR",
        type=Path,
        default=Path("runs"),
        help="the run folder is DIR/NAME (default: %(default)s)",
    )
    check.add_argument(
        "--samples", metavar="N", type=parse_count, default=1000, help="samples of each set (default: %(default)s)"
    )
    check.add_argument("--seed", metavar="N", type=parse_natural, default=0, help="seed of the draw (default: 0)")
    check.add_argument(
        "--workers",
        metavar="N",
        type=parse_count,
        help="number of workers (default: num_workers of the job; for auto, the GPUs of this machine, or its CPUs)",
    )
    check.add_argument(
        "--gpu-memory",
        metavar="GIB",
        type=_parse_positive,
        help="memory of each GPU, to find the largest micro-batch (default: that of this machine's first GPU)",
    )
    check.add_argument(
        "--tokens-per-s",
        metavar="N",
        type=_parse_positive,
        help="tokens per second of all workers together (default: the speed of the stage in the run folder, if it has "
        "run)",
    )
    check.add_argument("--price", metavar="P", type=_parse_positive, help="price of a GPU-hour, in any currency")
    check.set_defaults(verb=_check)


def _parse_positive(text: str) -> float:
    """Parse a number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = 0
    if not 0 < number < 1e15:
        raise argparse.ArgumentTypeError(f"got {text}, allowed: a number above 0")
    return number


def _check(arguments: argparse.Namespace) -> None:
    from jobs import check

    check.check_job(build_options(check.CheckOptions, arguments))
