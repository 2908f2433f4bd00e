"""Files of questions and answers, by path or URL; every mistake is a ValueError that names file and place in it.

Answers come as a JSON list, as JSON lines or as a table; which of them is told from the content, since names of files
vary.  Tables are read by pyarrow: the standard library's reader refuses fields of more than 128 kB, as images are, but
for a limit that all of a process shares.
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
    """An answer as its file has it, and where it stands."""

    place: str
    fields: Mapping[str, Any]
    form: AnswerKeys

    @property
    def id(self) -> str:
        return get_id(self.place, self.fields, self.form[0])

    @property
    def response(self) -> str:
        return get_field(self.place, self.fields, self.form[1])


class FoundAnswer(NamedTuple):
    """An answer with the id of its question."""

    place: str
    id: str
    response: str


def read_text(source: Source) -> str:
    """The text of a file."""
    try:
        with fsspec.open(fspath(source), "rb") as file:
            return file.read().decode("utf-8-sig")  # spreadsheets write a byte order mark
    except Exception as error:
        raise explain_error(error, f"{source}: cannot be read", "a path or URL of a file in UTF-8") from None


def list_files(folder: Source) -> list[str]:
    """Paths in a folder, relative to it, sorted; none where it is no folder."""
    try:
        system, root = fsspec.url_to_fs(fspath(folder))
        return sorted(path[len(root) :].lstrip("/") for path in system.find(root)) if system.isdir(root) else []
    except Exception as error:
        raise explain_error(error, f"{folder}: cannot be read", "a path or URL of a folder") from None


def only_source(sources: Sequence[Source]) -> str:
    """The only one of the sources."""
    if len(sources) != 1:
        raise ValueError(f"questions: got {', '.join(map(str, sources)) or 'nothing'}, allowed: one file or folder")
    return fspath(sources[0])


def read_json(source: Source) -> Any:
    """The value of a JSON file."""
    return _parse_json(source, read_text(source))


def list_entries(source: Source, whole: Any, key: str) -> list[tuple[str, dict[str, Any]]]:
    """(place, object) of the list that a JSON file's value has under `key`."""
    if not isinstance(whole, dict) or not isinstance(whole.get(key), list):
        raise ValueError(f"{source}: got {_describe_keys(whole)}, allowed: an object with a list under {key!r}")
    return list(number_items(source, whole[key]))


def read_records(source: Source, forms: Sequence[AnswerKeys]) -> Iterator[AnswerRecord]:
    """The answers of a JSON list, of JSON lines or, where it begins as neither, of a table; an empty file has none.

    forms: those that are known; a record has the first that fits.
    """
    text = read_text(source)
    match text.lstrip()[:1]:
        case "":
            return
        case "[":
            found = number_items(source, _parse_json(source, text))
        case "{":
            found = parse_lines(source, text)
        case _:
            found = parse_table(source, text)
            _match_keys(f"{source}: line 1", dict.fromkeys(_read_header(text)[0]), forms)  # also where no row follows
    for place, item in found:
        yield AnswerRecord(place, item, _match_keys(place, item, forms))


def parse_lines(source: Source, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, object) of each line of JSON lines that is not blank."""
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield (place := f"{source}: line {number}"), _require_object(place, _parse_json(source, line, number))


def parse_table(source: Source, text: str) -> Iterator[tuple[str, dict[str, str]]]:
    """(place, row) of a table with a header, cut at tabs if the header has any, else at commas; rows number from 1."""
    names, separator = _read_header(text)
    data = text.encode()
    try:
        rows = pyarrow.csv.read_csv(
            io.BytesIO(data),
            read_options=pyarrow.csv.ReadOptions(block_size=len(data) + 1),  # a row must fit into a block
            parse_options=pyarrow.csv.ParseOptions(delimiter=separator, newlines_in_values=True),
            convert_options=pyarrow.csv.ConvertOptions(column_types=dict.fromkeys(names, pyarrow.string())),
        )
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{source}: not a table: {str(error)[:200]}") from None
    for number, row in enumerate(rows.to_pylist(), 1):
        yield f"{source}: row {number}", row


def match_answers(found: Iterable[FoundAnswer], known: Collection[str]) -> dict[str, str]:
    """{question id: response}.  ValueError for an answer to no question, or a second one to the same."""
    result: dict[str, str] = {}
    for place, identifier, response in found:
        if identifier not in known:
            raise ValueError(f"{place}: got an answer to {identifier!r}, allowed: ids of the {len(known)} questions")
        if identifier in result:
            raise ValueError(f"{place}: got a second answer to {identifier!r}, allowed: one a question")
        result[identifier] = response
    return result


def get_field(place: str, record: Mapping[str, Any], key: str, kind: type = str) -> Any:
    """The value under `key`.  ValueError where it is missing or of another type."""
    value = record.get(key)
    if not isinstance(value, kind) or isinstance(value, bool):
        got = f"{key} = {str(value)[:80]!r}" if key in record else _describe_keys(record)
        raise ValueError(f"{place}: got {got}, allowed: {key}, {FIELD_TYPES[kind]}")
    return value


def get_texts(place: str, record: Mapping[str, Any], key: str) -> list[str]:
    """The texts in a list."""
    values = get_field(place, record, key, list)
    return [get_field(f"{place}, {key} {number}", {"entry": value}, "entry") for number, value in enumerate(values, 1)]


def get_id(place: str, record: Mapping[str, Any], key: str) -> str:
    """An id, which is a text or a whole number, as text."""
    return str(get_field(place, record, key, int if isinstance(record.get(key), int) else str))


def _match_keys(place: str, record: Mapping[str, Any], forms: Sequence[AnswerKeys]) -> AnswerKeys:
    for form in forms:
        if record.keys() >= {*form}:
            return form
    raise ValueError(
        f"{place}: got {_describe_keys(record)}, allowed: {', or '.join(' and '.join(form) for form in forms)}"
    )


def _read_header(text: str) -> tuple[list[str], str]:
    """Names of the columns, and what is between them."""
    line = text.lstrip().partition("\n")[0].strip("\r")
    separator = "\t" if "\t" in line else ","
    return [name.strip('"') for name in line.split(separator)], separator


def number_items(source: Source, items: list[Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, object) of a list, from item 1 on.  ValueError where one is no object."""
    for number, item in enumerate(items, 1):
        yield (place := f"{source}: item {number}"), _require_object(place, item)


def _parse_json(source: Source, text: str, first: int = 1) -> Any:
    """The value of JSON that begins on the line with number `first`."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first + error.lineno - 1
        raise ValueError(f"{source}: line {line}: not JSON: {error.msg}, at character {error.colno}") from None
    except RecursionError:
        raise ValueError(f"{source}: line {first}: not JSON: nested too deep") from None


def _require_object(place: str, item: Any) -> dict[str, Any]:
    if not isinstance(item, dict):
        raise ValueError(f"{place}: got {_describe_keys(item)}, allowed: an object")
    return item


def _describe_keys(value: Any) -> str:
    return f"keys {', '.join(map(str, value))}"[:200] if isinstance(value, Mapping) else f"a {type(value).__name__}"
