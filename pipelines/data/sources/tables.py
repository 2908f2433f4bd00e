"""Rows of tables: parquet and Arrow files as Hugging Face `datasets` writes them, and CSV files."""

import csv
import io
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
from pyarrow import ipc, parquet

from pipelines.core import storage
from pipelines.data.records import is_unicode, shorten

BATCH_ROWS = 64
"""Rows that are read at a time. Their images are in memory."""

CSV_DELIMITERS = ",\t;|"
"""Separators of columns that programs write."""

MAX_CELL_CHARACTERS = 2**31 - 1
"""Maximum length of a cell of a CSV file. It may hold an image as base64, which Python's default does not allow."""


def read_parquet(url: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield position and values of each row of a parquet file."""
    try:
        # A local file is mapped, so memory does not grow with it.
        with parquet.ParquetFile(pa.BufferReader(_map(url))) as file:
            _check_names(url, file.schema_arrow.names)
            yield from _list_rows(url, file.iter_batches(batch_size=BATCH_ROWS))
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{url}: no parquet file, or damaged: {error}, allowed: a whole parquet file") from None


def read_arrow(url: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield position and values of each row of an Arrow file, in the stream format or the file format."""
    # `save_to_disk` writes the stream format, other programs the file format.
    data = _map(url)
    try:
        if data.slice(0, 6).to_pybytes() == b"ARROW1":
            file = ipc.open_file(data)
            batches = (file.get_batch(number) for number in range(file.num_record_batches))
        else:
            file = ipc.open_stream(data)
            batches = iter(file)
        _check_names(url, file.schema.names)
        parts = (batch.slice(start, BATCH_ROWS) for batch in batches for start in range(0, len(batch), BATCH_ROWS))
        yield from _list_rows(url, parts)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{url}: no Arrow file, or damaged: {error}, allowed: a whole Arrow file") from None


def read_csv(url: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield position and values of each row of a CSV file with a header; a .tsv file has tabs.

    The key None has the cells of a row that come after its last column.
    """
    chunks = io.BufferedReader(_ChunkReader(storage.read_chunks(url)))
    # Invalid bytes become lone surrogates, so that only their record is rejected.
    text = io.TextIOWrapper(chunks, "utf-8-sig", "surrogateescape", newline="")
    # Captions may contain line breaks, so the reader splits the lines.
    delimiter = "\t" if url.lower().endswith(".tsv") else ","
    csv.field_size_limit(MAX_CELL_CHARACTERS)
    # The reader is strict: an open quotation mark would make one text of the lines after it.
    reader = csv.DictReader(text, delimiter=delimiter, strict=True)
    try:
        names = list(reader.fieldnames or ())
        _check_header(url, names, delimiter)
        for row in reader:
            yield f"line {reader.line_num}", row
    except csv.Error as error:
        raise ValueError(
            f"{url}: the row after line {reader.line_num}: {error}, allowed: cells in pairs of quotation marks, or "
            "without any"
        ) from None


def _check_header(url: str, names: list[str], delimiter: str) -> None:
    """Check that the first line of a table of text has the names of columns."""
    _check_names(url, names)
    if not all(map(is_unicode, names)):
        raise ValueError(f"{url}: got the columns {shorten(names)}, allowed: a table in UTF-8")
    # One column alone has no room for an image and a text.
    other = next((mark for mark in CSV_DELIMITERS if len(names) == 1 and mark in names[0]), None)
    if other:
        raise ValueError(
            f"{url}: got one column, {shorten(names[0])}, allowed: several columns with {delimiter!r} between them, as "
            f"in .{'csv' if delimiter == ',' else 'tsv'} files"
        )


class _ChunkReader(io.RawIOBase):
    """File of chunks that are read when they are needed."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks, self._rest = chunks, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._rest:
            self._rest = memoryview(next(self._chunks, b""))
        count = min(len(buffer), len(self._rest))
        buffer[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count


def read_columns(url: str) -> list[str]:
    """Return the names of the columns of a parquet file."""
    try:
        with parquet.ParquetFile(pa.BufferReader(_map(url))) as file:
            return list(file.schema_arrow.names)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{url}: no parquet file, or damaged: {error}, allowed: a whole parquet file") from None


def _check_names(url: str, names: list[str]) -> None:
    """Check that no two columns have the same name, of which only one would be read."""
    if repeated := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"{url}: got {names.count(repeated[0])} columns {repeated[0]}, allowed: one of each name")


def _map(url: str) -> pa.Buffer:
    return pa.py_buffer(storage.map_file(url))


def _list_rows(url: str, batches: Iterator[pa.RecordBatch]) -> Iterator[tuple[str, dict[str, Any]]]:
    # Rows are numbered over all batches, as `datasets` counts them.
    number = 0
    for batch in batches:
        try:
            batch.validate(full=True)  # offsets of a damaged file may lead out of it, and texts may be no UTF-8
        except pa.ArrowInvalid as error:
            raise pa.ArrowInvalid(f"rows {number} to {number + len(batch) - 1}: {error}") from None
        columns = [_list_values(url, name, column) for name, column in zip(batch.schema.names, batch, strict=True)]
        for values in zip(*columns, strict=True):
            yield f"row {number}", dict(zip(batch.schema.names, values, strict=True))
            number += 1


def _list_values(url: str, name: str, column: pa.Array) -> list[Any]:
    """Return the values of a column. Times that Python does not have are their numbers in the file."""
    try:
        return list(column.to_pylist())
    except (OverflowError, ValueError, pa.ArrowException) as error:
        # Years after 9999, and time zones that this machine does not know.
        if pa.types.is_temporal(column.type):
            return list(column.view(pa.int32() if column.type.bit_width == 32 else pa.int64()).to_pylist())
        raise ValueError(
            f"{url}: column {name} of type {column.type}: {error}, allowed: values that Python has, or no such column"
        ) from None
