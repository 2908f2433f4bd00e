"""JSON Lines files that are appended to. A crash may leave a partial line at the end."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pipelines.core import failures, storage


def read(path: Path) -> list[dict[str, Any]]:
    """Read the objects of a file. A missing file has none, and a partial line at the end is skipped.

    Raises:
        ValueError: another line is not a JSON object. The message names file and line.
    """
    # Not splitlines(): other programs write JSON with line separators of Unicode in its texts.
    return [
        parse_line(line, number, path) for number, line in enumerate(_read_whole_lines(path).split("\n")[:-1], start=1)
    ]


def parse_line(line: str, number: int, path: Path) -> dict[str, Any]:
    """Parse a line of a file. `number` and `path` are for the message of the ValueError if it is not an object."""
    try:
        value = json.loads(line)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: line {number}: got {line[:60]!r}, allowed: an object of JSON")
    return value


def append(path: Path, entries: Iterable[Mapping[str, Any]]) -> None:
    """Append objects to a file."""
    with failures.locate_errors(path), path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(entry) + "\n" for entry in entries)


def drop_partial_line(path: Path) -> None:
    """Remove a partial line at the end, so that the next append starts a new line."""
    lines = _read_whole_lines(path).encode()
    if path.exists() and path.stat().st_size > len(lines):
        storage.write(str(path), lines)


def _read_whole_lines(path: Path) -> str:
    """Read the text up to the last line break; "" for a missing file."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return text[: text.rfind("\n") + 1]
