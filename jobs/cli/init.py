"""`redux init`: write a first job file."""

import argparse
from pathlib import Path
from typing import Any


def add_parsers(verbs: Any) -> None:
    """Add the parser of this verb."""
    parser = verbs.add_parser(
        "init",
        help="write a job file from answers to a few questions",
        description="Ask for data, images, questions to score, GPUs and model, and write a commented job file for "
        "redux run. Enter takes the answer in brackets. After a wrong answer, the command says why and asks again. An "
        "existing file is never overwritten.",
        epilog="example: redux init mine.yaml && redux run mine.yaml",
    )
    parser.add_argument(
        "file",
        metavar="FILE",
        type=Path,
        nargs="?",
        default=Path("job.yaml"),
        help="job file to write (default: %(default)s)",
    )
    parser.add_argument("--yes", action="store_true", help="take all defaults and ask nothing")
    parser.set_defaults(verb=_init)


def _init(arguments: argparse.Namespace) -> None:
    from jobs.init import init

    init(arguments.file, arguments.yes)
