"""Rows of tables: parquet and Arrow files as Hugging Face `datasets` writes them, and CSV files."""

import csv
import io
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
from pyarrow import ipc, parquet

from pipelines.core import storage

BATCH_ROWS = 64
"""Rows that are read at a time. Their images are in memory."""

MAX_CELL_CHARACTERS = 2**31 - 1
"""Maximum length of a cell of a CSV file. It may hold an image as base64, which Python's default does not allow."""


def read_parquet(url: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield position and values of each row of a parquet file."""
    try:
        # a local file is mapped, so memory does not grow with it
        with parquet.ParquetFile(pa.BufferReader(_map(url))) as file:
            _check_names(url, file.schema_arrow.names)
            yield from _list_rows(file.iter_batches(batch_size=BATCH_ROWS))
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{url}: no parquet file, or damaged: {error}, allowed: a whole parquet file") from None


def read_arrow(url: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield position and values of each row of an Arrow file, in the stream format or the file format."""
    # save_to_disk writes the stream format, other programs the file format
    data = _map(url)
    try:
        if data.slice(0, 6).to_pybytes() == b"ARROW1":
            file = ipc.open_file(data)
            batches = (file.get_batch(number) for number in range(file.num_record_batches))
        else:
            file = ipc.open_stream(data)
            batches = iter(file)
        _check_names(url, file.schema.names)
        parts = (batch.slice(first, BATCH_ROWS) for batch in batches for first in range(0, len(batch), BATCH_ROWS))
        yield from _list_rows(parts)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{url}: no Arrow file, or damaged: {error}, allowed: a whole Arrow file") from None


def read_csv(url: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield position and values of each row of a CSV file with a header; a .tsv file has tabs.

    The key None has the cells of a row that come after its last column.
    """
    chunks = io.BufferedReader(_ChunkReader(storage.read_chunks(url)))
    text = io.TextIOWrapper(chunks, "utf-8-sig", newline="")
    # captions may contain line breaks, so the reader splits the lines
    delimiter = "\t" if url.lower().endswith(".tsv") else ","
    csv.field_size_limit(MAX_CELL_CHARACTERS)
    # strict: an open quotation mark would make one text of the lines after it
    reader = csv.DictReader(text, delimiter=delimiter, strict=True)
    try:
        _check_names(url, list(reader.fieldnames or ()))
        for row in reader:
            yield f"line {reader.line_num}", row
    except UnicodeDecodeError as error:
        raise ValueError(f"{url}: {error}, allowed: a table in UTF-8") from None
    except csv.Error as error:
        raise ValueError(
            f"{url}: the row after line {reader.line_num}: {error}, allowed: cells in pairs of quotation marks, or "
            "without any"
        ) from None


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


def _list_rows(batches: Iterator[pa.RecordBatch]) -> Iterator[tuple[str, dict[str, Any]]]:
    # rows are numbered over all batches, as `datasets` counts them
    number = 0
    for batch in batches:
        try:
            batch.validate(full=True)  # offsets of a damaged file may lead out of it, and texts may be no UTF-8
        except pa.ArrowInvalid as error:
            raise pa.ArrowInvalid(f"rows {number} to {number + len(batch) - 1}: {error}") from None
        for row in batch.to_pylist():
            yield f"row {number}", row
            number += 1
