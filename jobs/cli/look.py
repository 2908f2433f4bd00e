"""`redux look`: what a job trains on, before it is trained."""

import argparse
from pathlib import Path
from typing import Any

from jobs.cli.arguments import EXAMPLE_JOB, build_options, parse_count, parse_natural


def add_parsers(verbs: Any) -> None:
    """Add the parser of this group."""
    look = verbs.add_parser(
        "look",
        help="show what a job trains on, before it is trained",
        description="Write a page with some samples of each set as training gets them: the image as the model sees "
        "it, kept and merged patches, tokens with their positions and labels, the template, and what is cut off. "
        "Nothing is trained, and Ray is not started. A set of shards is shown with the default template; --model adds "
        "the tokens of a model.",
        epilog=f"example: redux look {EXAMPLE_JOB}",
    )
    look.add_argument(
        "source",
        metavar="JOB|SET",
        help=f"a job file, such as {EXAMPLE_JOB}; the folder of a run; or a folder or URL of shards",
    )
    look.add_argument(
        "overrides",
        metavar="section.key=value",
        nargs="*",
        default=[],  # Or argparse calls it required
        help="replace a value of the job file; the value is written as in YAML",
    )
    look.add_argument("--text", action="store_true", help="print to the terminal instead of writing a page")
    look.add_argument(
        "--out", metavar="FILE", type=Path, help="file of the page (default: look-NAME.html in the current folder)"
    )
    look.add_argument(
        "--samples", metavar="N", type=parse_count, default=10, help="samples of each set (default: %(default)s)"
    )
    look.add_argument(
        "--seed", metavar="N", type=parse_natural, default=0, help="seed of the draw (default: %(default)s)"
    )
    look.add_argument(
        "--model",
        metavar="MODEL",
        help="for a set: the LLaVA that will be trained on it (folder of a run; or folder, Hugging Face Hub id or URL "
        "of a model)",
    )
    look.add_argument(
        "--runs-dir",
        metavar="DIR",
        type=Path,
        default=Path("runs"),
        help="the run folder of a job is DIR/NAME; what exists there is used (default: %(default)s)",
    )
    look.set_defaults(verb=_look)


def _look(arguments: argparse.Namespace) -> None:
    from jobs import look

    print(look.look(build_options(look.LookOptions, arguments)))
