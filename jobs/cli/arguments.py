"""Types and arguments that several verbs share."""

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

CommandOptions = TypeVar("CommandOptions")

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
    return _parse_whole_number(text, 1)


def parse_natural(text: str) -> int:
    """Parse a whole number of at least 0."""
    return _parse_whole_number(text, 0)


def _parse_whole_number(text: str, minimum: int) -> int:
    # int() takes other digits and _ as well; more than 18 digits fit no counter.
    if not (text.isascii() and text.isdecimal() and len(text) <= 18 and int(text) >= minimum):
        raise argparse.ArgumentTypeError(f"got {text[:80]}, allowed: a whole number >= {minimum}")
    return int(text)


def build_pair_parser(form: str) -> Callable[[str], tuple[str, str]]:
    """Build a parser for two words in a form such as KEY=VALUE or HOST:PORT."""
    separator = "=" if "=" in form else ":"

    def parse_pair(text: str) -> tuple[str, str]:
        key, _, value = text.rpartition(separator)
        # The last separator counts, because a domain in a key and an IPv6 network hold the same character.
        if not key or not value or (form.endswith("PORT") and not value.isdecimal()):
            raise argparse.ArgumentTypeError(f"got {text}, allowed: {form}")
        return key, value

    return parse_pair


def build_options(options_class: type[CommandOptions], arguments: argparse.Namespace, **others: Any) -> CommandOptions:
    """Build a dataclass of options.

    Args:
        options_class: the dataclass. Its fields have the names of arguments, except those in `others`.
        arguments: parsed arguments.
        others: values of the other fields.
    """
    from dataclasses import fields  # Imported late, like all that the parser does not need

    names = {field.name for field in fields(options_class)} - others.keys()  # type: ignore[arg-type]
    return options_class(**others, **{name: getattr(arguments, name) for name in names})


def add_job(parser: argparse.ArgumentParser, help: str) -> None:
    """Add the job file and its overrides."""
    parser.add_argument("job", metavar="JOB", type=Path, help=help)
    parser.add_argument(
        "overrides",
        metavar="section.key=value",
        nargs="*",
        default=[],  # Or argparse calls it required
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
