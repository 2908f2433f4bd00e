"""Records of a JSON file, one after the other: a JSON list, JSON lines, or one record.

A file is read in chunks, so that memory does not grow with it. A record that Python cannot parse (nested too deep, a
number of thousands of digits, a damaged line) is returned as an `UnparsedRecord`, and is rejected later.
"""

import codecs
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

from pipelines.core import storage
from pipelines.data.records import MAX_DEPTH, UnparsedRecord, describe_json_error, shorten, shorten_text

MAX_JSON_RECORD_CHARACTERS = 2**28
"""Maximum length of one record. A longer one is a damaged file: an open quotation mark makes one text of its rest."""

CUT_MARGIN = 16
"""Distance from the end of the text within which an error may come from a value that continues in the next chunk."""

ALLOWED_JSON = "allowed: a list of records as JSON, or JSON lines, one record a line"

_DECODER = json.JSONDecoder()
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[\[\]{},]', re.DOTALL)
_BLANK = re.compile(r"[ \t\r\n]*")


def read_json_records(url: str, known_columns: frozenset[str]) -> Iterator[tuple[str, Any]]:
    """Yield the position and the value of each record of a file. See `iterate_json`."""
    return iterate_json(storage.read_chunks(url), url, known_columns)


def iterate_json(chunks: Iterable[bytes], name: str, known_columns: frozenset[str]) -> Iterator[tuple[str, Any]]:
    """Yield the records of a file, unchecked, with their positions, such as "line 7" or "item 6".

    Args:
        chunks: content of the file in pieces.
        name: name of the file, for messages.
        known_columns: fields of records. A file of one object is one record if it has any of them.

    Raises:
        ValueError: the file has another form or no record.
    """
    text = _TextReader(chunks, name)
    character = text.peek()
    if not character:
        raise ValueError(f"{name}: an empty file, {ALLOWED_JSON}")
    if character == "[":
        yield from _iterate_list(text, name)
    else:
        yield from _iterate_lines(text, name, known_columns)


class _TextReader:
    """Text of a file that is decoded as it is consumed.

    Invalid bytes become lone surrogates, so that only their record is rejected.
    """

    def __init__(self, chunks: Iterable[bytes], name: str) -> None:
        self._chunks, self._name = iter(chunks), name
        self._decoder: codecs.IncrementalDecoder | None = None
        self.text, self.position, self.is_complete = "", 0, False
        self.consumed = 0  # characters before `text`

    def fill(self) -> bool:
        """Decode another chunk, as long as the text that is not consumed yet. False if there is none."""
        pending = max(len(self.text) - self.position, 1)
        if pending > MAX_JSON_RECORD_CHARACTERS:
            raise self.describe_damage(f"a record longer than {MAX_JSON_RECORD_CHARACTERS} characters")
        self.consumed += self.position
        parts = [self.text[self.position :]]
        self.position = added = 0
        # Read at least as much as is there: each retry of a long record then costs no more than all before.
        while added < pending and not self.is_complete:
            chunk = next(self._chunks, None)
            self.is_complete = chunk is None
            parts.append(self._decode(chunk or b""))
            added += len(parts[-1])
        self.text = "".join(parts)
        return added > 0

    def _decode(self, chunk: bytes) -> str:
        if self._decoder is None:
            encoding = json.detect_encoding(chunk)
            try:
                chunk.decode(encoding, "surrogateescape" if encoding.startswith("utf-8") else "surrogatepass")
            except UnicodeDecodeError:  # UTF-8 that looks like UTF-16; a chunk of UTF-16 ends between two characters
                encoding = "utf-8"
            errors = "surrogateescape" if encoding.startswith("utf-8") else "surrogatepass"
            self._decoder = codecs.getincrementaldecoder(encoding)(errors)
        try:
            return self._decoder.decode(chunk, final=self.is_complete)
        except UnicodeDecodeError as error:
            raise ValueError(f"{self._name}: not JSON: {error}, {ALLOWED_JSON}") from None

    def peek(self) -> str:
        """Skip blanks, and return the next character; "" at the end."""
        while True:
            self.position = _BLANK.match(self.text, self.position).end()  # type: ignore[union-attr]
            if self.position < len(self.text):
                return self.text[self.position]
            if not self.fill():
                return ""

    def take_value(self) -> Any:
        """Parse the value that begins here. An `UnparsedRecord` if Python cannot parse it."""
        while True:
            try:
                value, end = _DECODER.raw_decode(self.text, self.position)
            except json.JSONDecodeError as error:
                may_be_cut = error.msg.startswith("Unterminated") or error.pos >= len(self.text) - CUT_MARGIN
                if may_be_cut and self.fill():
                    continue
                raise self.describe_damage(error.msg, error.pos) from None
            except (ValueError, RecursionError) as error:  # too many digits, too deep
                return UnparsedRecord(self._take_text(), describe_json_error(error))
            # A number may go on in the next chunk.
            if end < len(self.text) or not self.fill():
                self.position = min(end, len(self.text))
                return value

    def _take_text(self) -> str:
        """Return the text of the value that begins here, up to the next comma or bracket outside of it."""
        while True:
            depth = 0
            for token in _TOKEN.finditer(self.text, self.position):
                mark = token.group()
                if depth == 0 and mark in ",]}":
                    text, self.position = self.text[self.position : token.start()].strip(), token.start()
                    return text
                depth += (mark in "[{") - (mark in "]}")
            if not self.fill():
                text, self.position = self.text[self.position :].strip(), len(self.text)
                return text

    def take_line(self) -> str | None:
        """Return the next line without its end; None at the end of the text."""
        searched = self.position
        while (end := self.text.find("\n", searched)) < 0:
            pending = len(self.text) - self.position
            if not self.fill():
                line, self.position = self.text[self.position :], len(self.text)
                return line or None
            searched = self.position + pending
        line, self.position = self.text[self.position : end], end + 1
        return line

    def untake_line(self, line: str) -> None:
        """Take back the line that `take_line` has just returned."""
        self.position -= len(line) + self.text.endswith("\n", 0, self.position)

    def describe_damage(self, problem: str, at: int | None = None) -> ValueError:
        """Return the error of a damaged file."""
        character = self.consumed + (self.position if at is None else at)
        return ValueError(f"{self._name}: not JSON: {problem}: character {character}, {ALLOWED_JSON}")


def _iterate_list(text: _TextReader, name: str) -> Iterator[tuple[str, Any]]:
    text.position += 1
    # Parse item by item, so that a damaged or deep one does not end the others.
    number = 0
    while (mark := text.peek()) != "]" or number:
        if not mark:
            raise text.describe_damage("the list does not end")
        yield f"item {number}", _check_depth(text.take_value())
        number += 1
        mark = text.peek()
        if mark not in (",", "]"):
            raise text.describe_damage("Expecting ',' delimiter" if mark else "the list does not end")
        if mark == "]":
            break
        text.position += 1
    text.position += 1
    if not number:
        raise ValueError(f"{name}: no records, {ALLOWED_JSON}")
    if text.peek():
        raise text.describe_damage("Extra data")


def _iterate_lines(text: _TextReader, name: str, known_columns: frozenset[str]) -> Iterator[tuple[str, Any]]:
    lines = _parse_lines(text)
    # One object alone may be a wrapper of the list.
    first_line = next(lines)
    second_line = next(lines, None)
    if second_line is None:
        position, record = first_line
        yield position, _check_only_record(record, name, known_columns)
        return
    has_object = False
    for position, record in itertools.chain([first_line, second_line], lines):
        has_object |= isinstance(record, dict)
        yield position, _check_depth(record)
    if not has_object:
        record = first_line[1]
        problem = record.problem if isinstance(record, UnparsedRecord) else "no line is an object"
        raise ValueError(f"{name}: not JSON: {problem}, {ALLOWED_JSON}")


def _parse_lines(text: _TextReader) -> Iterator[tuple[str, Any]]:
    """Yield position and value of each line. An object over several lines is one value."""
    number = 0
    while (line := text.take_line()) is not None:
        number += 1
        if not line.strip():
            continue
        try:
            yield f"line {number}", json.loads(line)
        except (ValueError, RecursionError) as error:
            # Only the first line can begin an object of several lines.
            if number == 1 and isinstance(error, json.JSONDecodeError):
                text.untake_line(line)
                try:
                    record = text.take_value()
                except ValueError:  # not an object over several lines, but a damaged line
                    line = text.take_line() or ""
                else:
                    if text.peek():
                        raise text.describe_damage("Extra data") from None
                    yield "item 0", record
                    return
            yield f"line {number}", UnparsedRecord(line.strip(), describe_json_error(error))


def _check_only_record(record: Any, name: str, known_columns: frozenset[str]) -> Any:
    """Return the only value of a file, if it is a record."""
    if isinstance(record, dict) and record.keys() & known_columns:
        return _check_depth(record)
    if isinstance(record, UnparsedRecord):
        got = f"not JSON: {record.problem}"
    elif isinstance(record, dict):
        got = f"got one object with {shorten_text(', '.join(record), 80)}"
    else:
        got = f"got {type(record).__name__}"
    raise ValueError(f"{name}: {got}, {ALLOWED_JSON}")


def _check_depth(record: Any) -> Any:
    """Return a record. An `UnparsedRecord` if lists and objects are nested deeper than MAX_DEPTH."""
    level = [record]
    # Search breadth first, since recursion has a limit, too.
    for _ in range(MAX_DEPTH):
        containers = [item for item in level if isinstance(item, list | dict)]
        children = [child for item in containers for child in (item.values() if isinstance(item, dict) else item)]
        level = [child for child in children if isinstance(child, list | dict)]
        if not level:
            return record
    return UnparsedRecord(shorten(record), f"nested deeper than {MAX_DEPTH}")
