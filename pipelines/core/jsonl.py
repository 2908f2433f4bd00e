"""Files of JSON lines that are appended to, and that a crash may leave with half a line at the end."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pipelines.core import failures, storage


def read(path: Path) -> list[dict[str, Any]]:
    """The objects of a file, none where it is missing; half a line at its end is passed over.

    ValueError, naming file and line, for any other that is no object.
    """
    result = []
    for number, line in enumerate(_read_whole_lines(path).splitlines(), start=1):
        try:
            found = json.loads(line)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise ValueError(f"{path}: line {number}: got {line[:60]!r}, allowed: an object of JSON")
        result.append(found)
    return result


def append(path: Path, entries: Iterable[Mapping[str, Any]]) -> None:
    """Add objects to the end of a file."""
    with failures.locate_errors(path), path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(entry) + "\n" for entry in entries)


def drop_partial_line(path: Path) -> None:
    """Cut half a line off, so that the next one does not go on from it."""
    if path.exists() and path.stat().st_size > len(whole := _read_whole_lines(path).encode()):
        storage.write(str(path), whole)


def _read_whole_lines(path: Path) -> str:
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return text[: text.rfind("\n") + 1]
