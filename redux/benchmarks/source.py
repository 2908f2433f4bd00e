"""Read files of questions and answers, by path or URL. Every ValueError names the file and the location in it.

Answers are a JSON list, JSON lines or a table. The content decides, since file names vary. pyarrow reads tables: the
standard library's reader refuses fields over 128 kB, such as images, unless a limit of the whole process is changed.
"""

import io
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from os import PathLike, fspath
from typing import Any, NamedTuple

import fsspec
import pyarrow
import pyarrow.csv

from redux.hub import explain_error

Source = str | PathLike[str]
"""A path or URL."""

AnswerKeys = tuple[str, str]
"""Keys of the id and the answer in a record."""

FIELD_TYPES: dict[type, str] = {str: "a text", int: "a whole number", list: "a list", dict: "an object"}


class AnswerRecord(NamedTuple):
    """An answer in a file.

    Args:
        location: file and line, row or item.
        fields: fields of the answer.
        keys: keys of its id and its response.
    """

    location: str
    fields: Mapping[str, Any]
    keys: AnswerKeys

    @property
    def id(self) -> str:
        """Id of the question, or of its image."""
        return get_id(self.location, self.fields, self.keys[0])

    @property
    def response(self) -> str:
        """Text of the answer."""
        return get_field(self.location, self.fields, self.keys[1])


class FoundAnswer(NamedTuple):
    """An answer with the id of its question, and its location in a file."""

    location: str
    id: str
    response: str


def read_text(source: Source) -> str:
    """Read the text of a file."""
    try:
        with fsspec.open(fspath(source), "rb") as file:
            return file.read().decode("utf-8-sig")  # Spreadsheets write a byte order mark
    # Each store of fsspec has errors of its own.
    except Exception as error:
        raise explain_error(error, f"{source}: cannot be read", "a path or URL of a file in UTF-8") from None


def list_files(folder: Source) -> list[str]:
    """List the files under a folder, as sorted relative paths; none if it is not a folder."""
    try:
        filesystem, root = fsspec.url_to_fs(fspath(folder))
        if not filesystem.isdir(root):
            return []
        return sorted(path[len(root) :].lstrip("/") for path in filesystem.find(root))
    except Exception as error:
        raise explain_error(error, f"{folder}: cannot be read", "a path or URL of a folder") from None


def only_source(sources: Sequence[Source]) -> str:
    """Return the only source; ValueError for none or several."""
    if len(sources) != 1:
        raise ValueError(f"questions: got {', '.join(map(str, sources)) or 'nothing'}, allowed: one file or folder")
    return fspath(sources[0])


def read_json(source: Source) -> Any:
    """Read the value of a JSON file."""
    return parse_json(source, read_text(source))


def list_entries(source: Source, content: Any, key: str) -> list[tuple[str, dict[str, Any]]]:
    """List (location, object) of a list in a JSON file.

    Args:
        source: the file, for errors.
        content: value of the file.
        key: key of the list.
    """
    if not isinstance(content, dict) or not isinstance(content.get(key), list):
        raise ValueError(f"{source}: got {_describe_keys(content)}, allowed: an object with a list under {key!r}")
    return list(number_items(source, content[key]))


def read_records(source: Source, key_choices: Sequence[AnswerKeys]) -> Iterator[AnswerRecord]:
    """Read answers from a JSON list, JSON lines, or else a table. An empty file has none.

    Args:
        source: path or URL.
        key_choices: known keys; a record has the first that fit.
    """
    text = read_text(source)
    match text.lstrip()[:1]:
        case "":
            return
        case "[":
            items = number_items(source, parse_json(source, text))
        case "{":
            items = parse_lines(source, text)
        case _:
            items = parse_table(source, text)
            # Checks the header even if the table has no rows.
            _match_keys(f"{source}: line 1", dict.fromkeys(_read_header(text)[0]), key_choices)
    for location, item in items:
        yield AnswerRecord(location, item, _match_keys(location, item, key_choices))


def parse_lines(source: Source, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Parse JSON lines to (location, object); blank lines are skipped."""
    # Not splitlines, which also splits at characters that JSON allows inside a text.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield (location := f"{source}: line {number}"), _require_object(location, parse_json(source, line, number))


def parse_table(source: Source, text: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Parse a table with a header to (location, row).

    Tabs separate columns if the header has any, else commas. Rows are numbered from 1.
    """
    names, separator = _read_header(text)
    data = text.encode()
    try:
        rows = pyarrow.csv.read_csv(
            io.BytesIO(data),
            read_options=pyarrow.csv.ReadOptions(block_size=len(data) + 1),  # A row must fit into a block
            parse_options=pyarrow.csv.ParseOptions(delimiter=separator, newlines_in_values=True),
            convert_options=pyarrow.csv.ConvertOptions(column_types=dict.fromkeys(names, pyarrow.string())),
        )
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{source}: not a table: {str(error)[:200]}") from None
    for number, row in enumerate(rows.to_pylist(), 1):
        yield f"{source}: row {number}", row


def match_answers(answers: Iterable[FoundAnswer], question_ids: Collection[str]) -> dict[str, str]:
    """Match answers to questions: {question id: response}.

    Args:
        answers: answers, in any order.
        question_ids: ids of the questions.

    Raises:
        ValueError: an answer belongs to no question, or a question has two answers.
    """
    responses: dict[str, str] = {}
    for location, identifier, response in answers:
        if identifier not in question_ids:
            raise ValueError(
                f"{location}: got an answer to {identifier!r}, allowed: ids of the {len(question_ids)} questions"
            )
        if identifier in responses:
            raise ValueError(f"{location}: got a second answer to {identifier!r}, allowed: one a question")
        responses[identifier] = response
    return responses


def get_field(location: str, record: Mapping[str, Any], key: str, value_type: type = str) -> Any:
    """Get the value under `key`; ValueError if it is missing or of another type."""
    value = record.get(key)
    # True is an int in Python, but no number in a file.
    if not isinstance(value, value_type) or isinstance(value, bool):
        got = f"{key} = {str(value)[:80]!r}" if key in record else _describe_keys(record)
        raise ValueError(f"{location}: got {got}, allowed: {key}, {FIELD_TYPES[value_type]}")
    return value


def get_texts(location: str, record: Mapping[str, Any], key: str) -> list[str]:
    """Get a list of texts under `key`; ValueError if it is missing or has other values."""
    values = get_field(location, record, key, list)
    return [
        get_field(f"{location}, {key} {number}", {"entry": value}, "entry") for number, value in enumerate(values, 1)
    ]


def get_id(location: str, record: Mapping[str, Any], key: str) -> str:
    """Get an id as text; in the file it may be a whole number."""
    return str(get_field(location, record, key, int if isinstance(record.get(key), int) else str))


def _match_keys(location: str, record: Mapping[str, Any], key_choices: Sequence[AnswerKeys]) -> AnswerKeys:
    for keys in key_choices:
        if record.keys() >= {*keys}:
            return keys
    raise ValueError(
        f"{location}: got {_describe_keys(record)}, allowed: {', or '.join(' and '.join(keys) for keys in key_choices)}"
    )


def _read_header(text: str) -> tuple[list[str], str]:
    """Read the names of the columns, and their separator."""
    line = text.lstrip().partition("\n")[0].strip("\r")
    separator = "\t" if "\t" in line else ","
    return [name.strip('"') for name in line.split(separator)], separator


def number_items(source: Source, items: list[Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Number the objects of a list from 1: (location, object). ValueError for an item that is not an object."""
    for number, item in enumerate(items, 1):
        yield (location := f"{source}: item {number}"), _require_object(location, item)


def parse_json(source: Source, text: str, first: int = 1) -> Any:
    """Parse JSON that begins on line number `first` of the source."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first + error.lineno - 1
        raise ValueError(f"{source}: line {line}: not JSON: {error.msg}, at character {error.colno}") from None
    except RecursionError:
        raise ValueError(f"{source}: line {first}: not JSON: nested too deep") from None


def _require_object(location: str, item: Any) -> dict[str, Any]:
    if not isinstance(item, dict):
        raise ValueError(f"{location}: got {_describe_keys(item)}, allowed: an object")
    return item


def _describe_keys(value: Any) -> str:
    return f"keys {', '.join(map(str, value))}"[:200] if isinstance(value, Mapping) else f"a {type(value).__name__}"
