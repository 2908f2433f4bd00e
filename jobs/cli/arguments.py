"""Types and arguments that several verbs share."""

import argparse
import os
from collections.abc import Callable
from pathlib import Path

EXAMPLE_JOB = "jobs/recipes/quickstart.yaml"

TOKEN_HELP = (
    "If the cluster requires a token, set RAY_AUTH_MODE=token, and put the token in RAY_AUTH_TOKEN, in the file that "
    "RAY_AUTH_TOKEN_PATH names, or in ~/.ray/auth_token. http is allowed only for this machine and private networks."
)


def parse_fraction(text: str) -> float:
    """Parse a number from 0 to 1."""
    try:
        fraction = float(text)
    except ValueError:
        fraction = -1
    if not 0 <= fraction <= 1:
        raise argparse.ArgumentTypeError(f"got {text}, allowed: a number from 0 to 1")
    return fraction


def parse_share(text: str) -> float:
    """Parse a number above 0, up to 1."""
    fraction = parse_fraction(text)
    if not fraction:
        raise argparse.ArgumentTypeError(f"got {text}, allowed: a number above 0, up to 1")
    return fraction


def parse_count(text: str) -> int:
    """Parse a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text}, allowed: a whole number >= 1")
    return int(text)


def parse_natural(text: str) -> int:
    """Parse a whole number of at least 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"got {text}, allowed: a whole number >= 0")
    return int(text)


def build_pair_parser(form: str) -> Callable[[str], tuple[str, str]]:
    """Build a parser for two words in a form such as KEY=VALUE or HOST:PORT."""
    separator = "=" if "=" in form else ":"

    def parse_pair(text: str) -> tuple[str, str]:
        first, _, second = text.rpartition(separator)
        if not first or not second or (form.endswith("PORT") and not second.isdecimal()):
            raise argparse.ArgumentTypeError(f"got {text}, allowed: {form}")
        return first, second

    return parse_pair


def add_job(parser: argparse.ArgumentParser, help: str) -> None:
    """Add the job file and its overrides."""
    parser.add_argument("job", metavar="JOB", type=Path, help=help)
    parser.add_argument(
        "overrides",
        metavar="section.key=value",
        nargs="*",
        help="replace a value of the file; the value is written as in YAML",
    )


def add_address(parser: argparse.ArgumentParser) -> None:
    """Add the address of a cluster."""
    parser.add_argument(
        "--address",
        metavar="URL",
        default=os.environ.get("RAY_API_SERVER_ADDRESS") or "http://127.0.0.1:8265",
        help="dashboard of the cluster (default: %(default)s; the variable RAY_API_SERVER_ADDRESS sets it)",
    )
