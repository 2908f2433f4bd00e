"""File of the index of a set: Arrow IPC in blocks of rows, of which a process reads only those that it needs.

A reader opens the file by its footer: names and sizes of the shards, the fingerprint, and the position of each block.
Then a row costs one ranged read of its block, 30 KB. So opening a set of 100 million samples takes 12 MB of a file of
12 GB, and no time per sample. A local file is mapped into memory instead, and all processes of a machine share it.

The schema of the file is INDEX_SCHEMA, but `shard` is the number of a shard, since a dictionary is not part of a block.
Metadata of the schema, in JSON:

    shards, sizes    name and number of samples of each shard, in the order of the samples
    rows_per_block   number of rows of each block but the last one
    fingerprint      SHA-256 of the rows as one record batch in an Arrow IPC file of INDEX_SCHEMA

Sets of earlier versions have that file of one record batch instead. It is read as a whole from a bucket.
"""

import hashlib
import io
import json
import mmap
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from typing import IO, Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Int64, Shaped
from pyarrow import ipc

from pipelines.core import storage
from redux.rounding import divide_up

INDEX_FILE = "index.arrow"

INDEX_SCHEMA = pa.schema(
    {
        "key": pa.large_string(),
        "shard": pa.dictionary(pa.int32(), pa.string()),
        "offset": pa.int64(),
        "length": pa.int64(),
        "sha256": pa.binary(32),
        "record_at": pa.int64(),
        "record_size": pa.int64(),
        "image_at": pa.int64(),
        "image_size": pa.int64(),
        "words": pa.int32(),
    }
)
"""Columns of the index.

key: name of the sample in its tar. shard: file name of the tar. offset, length, sha256: byte range in the tar, and its
checksum. record_at, record_size, image_at, image_size: record and image file within the range; image_size is 0 for
text only. words: number of words of all turns.

The samples of a shard are contiguous, and the dictionary lists the shards in the order of their samples.
"""

STORED_SCHEMA = INDEX_SCHEMA.set(1, pa.field("shard", pa.int32()))

ROWS_PER_BLOCK = 256
"""Rows of a block: more take longer to arrive for one row, fewer make the footer longer."""

MAX_CACHED_BLOCKS = 1024
"""Blocks from a bucket that a process keeps, 30 MB: the rows of a window of shards, and those of a packed batch."""

SCAN_BLOCKS = 512
"""Blocks that are in memory at a time when a whole column is read."""

TAIL_BYTES = 2**16
"""Bytes at the end of a file that are read first. The footer of a set of less than 100,000 samples is shorter."""

MAGIC = b"ARROW1"
BLOCK_TYPE = np.dtype([("offset", "<i8"), ("metadata", "<i4"), ("padding", "<i4"), ("body", "<i8")])
"""Position of a record batch in Arrow's footer (format/File.fbs)."""

BLOCK_MARK, MARK_LENGTH = "fingerprint", 16
"""Metadata of each block: the first characters of the fingerprint. A file in a bucket may be replaced while it is read,
and the blocks of two files must not be mixed."""

RECORD_BATCHES_FIELD = 3
"""Number of the field of the footer that lists the record batches."""


class _DigestSink(io.RawIOBase):
    """File that keeps only the SHA-256 of what is written to it."""

    def __init__(self) -> None:
        self.digest = hashlib.sha256()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.digest.update(data)
        return len(data)


class IndexBuilder:
    """Index of a set from its parts, one after the other, in memory that does not grow with the set.

    The fingerprint is that of one record batch, column after column, and stands in each block of rows. So the columns
    are kept in scratch files in the machine's temporary folder, without names, and read as one mapped batch.
    """

    def __init__(self) -> None:
        self.num_rows = self._num_key_bytes = 0
        self._shards: dict[str, int] = {}
        self._stack = ExitStack()
        self._files: dict[str, IO[bytes]] = {}

    def __enter__(self) -> Self:
        for name in ("key_ends", *INDEX_SCHEMA.names):
            self._files[name] = self._stack.enter_context(tempfile.TemporaryFile())
        self._files["key_ends"].write(bytes(8))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def add(self, part: pa.Table) -> None:
        """Add the rows of a part, a table of INDEX_SCHEMA."""
        rows = as_record_batch(part)
        shard = rows["shard"]
        numbers = [self._shards.setdefault(name, len(self._shards)) for name in shard.dictionary.to_pylist()]
        ends = np.cumsum(pc.binary_length(rows["key"]).to_numpy()) + self._num_key_bytes
        self._files["key_ends"].write(ends.astype("<i8").data)
        self._files["key"].write("".join(rows["key"].to_pylist()).encode())
        self._files["shard"].write(np.array(numbers, np.int32)[shard.indices.to_numpy()].data)
        self._files["sha256"].write(b"".join(rows["sha256"].to_pylist()))
        for name in INDEX_SCHEMA.names:
            if pa.types.is_integer(rows.schema.field(name).type):
                self._files[name].write(rows[name].to_numpy().data)
        self.num_rows += rows.num_rows
        self._num_key_bytes = int(ends[-1]) if len(ends) else self._num_key_bytes

    def write(self, folder: str) -> None:
        """Write the index, which makes the folder a set."""
        write_index(folder, self._map_rows())

    def _map_rows(self) -> pa.Table:
        """Map the columns into memory as a table of one chunk."""
        if not self.num_rows:
            return INDEX_SCHEMA.empty_table()
        buffers = {}
        for name, file in self._files.items():
            file.flush()
            has_bytes = file.tell() > 0  # all keys may be ""
            buffers[name] = pa.py_buffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if has_bytes else b"")
        columns = []
        for name, kind in zip(INDEX_SCHEMA.names, INDEX_SCHEMA.types, strict=True):
            parts = [None, *([buffers["key_ends"]] if name == "key" else []), buffers[name]]
            stored_as = pa.int32() if name == "shard" else kind
            column = pa.Array.from_buffers(stored_as, self.num_rows, parts, null_count=0)
            if name == "shard":
                column = pa.DictionaryArray.from_arrays(column, pa.array(list(self._shards), pa.string()))
            columns.append(column)
        return pa.Table.from_arrays(columns, schema=INDEX_SCHEMA)


def write_index(folder: str, table: pa.Table, fingerprint: str = "") -> None:
    """Write the index of a set, which makes the folder a set. See `write_blocks`."""
    with storage.open_writer(storage.join(folder, INDEX_FILE)) as file:
        write_blocks(file, table, fingerprint)


def write_blocks(file: Any, table: pa.Table, fingerprint: str = "") -> None:
    """Write the rows of a set as an index file.

    Args:
        file: the opened file.
        table: the rows, a table of INDEX_SCHEMA.
        fingerprint: fingerprint of the set; "" computes it.
    """
    rows = as_record_batch(table)
    fingerprint = fingerprint or _compute_fingerprint(rows)
    shard = rows["shard"]
    about = {
        "shards": shard.dictionary.to_pylist(),
        "sizes": _count_shard_sizes(shard).tolist(),
        "rows_per_block": ROWS_PER_BLOCK,
        "fingerprint": fingerprint,
    }
    metadata = {name: json.dumps(value) for name, value in about.items()}
    column = table.schema.get_field_index("shard")
    schema = table.schema.set(column, pa.field("shard", pa.int32())).with_metadata(metadata)
    columns = [*rows.columns[:column], shard.indices, *rows.columns[column + 1 :]]
    stored = pa.RecordBatch.from_arrays(columns, schema=schema)
    # Write one block at a time: a list of all would grow with the set.
    blocks = (stored.slice(start, ROWS_PER_BLOCK) for start in range(0, stored.num_rows, ROWS_PER_BLOCK))
    _write_file(file, blocks, schema, {BLOCK_MARK: fingerprint[:MARK_LENGTH]})


def _count_shard_sizes(shard: pa.DictionaryArray) -> Int64[np.ndarray, " shards"]:
    """Count the samples of each shard. Shard numbers ascend, so a binary search reads only a few pages of a file."""
    return np.diff(np.searchsorted(shard.indices.to_numpy(), np.arange(len(shard.dictionary) + 1))).astype(np.int64)


def _compute_fingerprint(rows: pa.RecordBatch) -> str:
    sink = _DigestSink()
    _write_file(sink, [rows], rows.schema)
    return sink.digest.hexdigest()


def rewrite_former(folder: str) -> bool:
    """Write an index of an earlier version in blocks, with the same fingerprint. Returns False if there is none."""
    path = storage.join(folder, INDEX_FILE)
    if not storage.exists(path):
        return False
    index = IndexFile(folder)
    table = index.read_former()
    if table is not None:
        write_index(folder, table, index.fingerprint)
    return table is not None


def as_record_batch(table: pa.Table) -> pa.RecordBatch:
    """Return a table as one record batch. Columns of one chunk are not copied."""
    columns = [column.chunk(0) if column.num_chunks == 1 else column.combine_chunks() for column in table.columns]
    return pa.RecordBatch.from_arrays(columns, schema=table.schema)


def _write_file(
    sink: Any, batches: Iterable[pa.RecordBatch], schema: pa.Schema, metadata: dict[str, str] | None = None
) -> None:
    with ipc.new_file(sink, schema) as file:
        for batch in batches:
            file.write_batch(batch, custom_metadata=metadata)


class IndexFile:
    """Opened index of a set, in blocks of rows.

    Attributes:
        folder: folder or URL of the set.
        shard_names: file names of the shards, in the order of the samples.
        shard_sizes: number of samples of each shard.
    """

    def __init__(self, folder: str) -> None:
        """Open an index. ValueError if it is missing or invalid. Its rows are checked when they are read."""
        self.folder = folder
        self._path = storage.join(folder, INDEX_FILE)
        self._cache: dict[int, pa.RecordBatch] = {}
        self._single: pa.RecordBatch | None = None  # all rows of a file of earlier versions
        if not storage.exists(self._path):
            raise ValueError(f"{folder}: no shards here, {INDEX_FILE} is missing")
        self._map = storage.map_file(self._path) if storage.is_local(self._path) else None
        size = len(self._map) if self._map is not None else storage.get_size(self._path)
        footer = self._read_footer(size)
        try:
            # Arrow needs no block to parse the footer.
            parsed = ipc.open_file(pa.py_buffer(MAGIC + b"\0\0" + footer))
        except (pa.ArrowException, OSError) as error:
            raise self.damaged(error) from None
        is_former = parsed.schema.equals(INDEX_SCHEMA)
        if is_former:
            self._data = self._map if self._map is not None else storage.map_file(self._path)
        # From here on nothing is read: an error of the storage is not taken for damage.
        try:
            if is_former:
                self._open_single()
            else:
                self._open_blocks(parsed, footer, size - len(footer))
        except (pa.ArrowException, OSError, LookupError, TypeError, ValueError, AttributeError) as error:
            raise self.damaged(error) from None

    def _open_blocks(self, parsed: ipc.RecordBatchFileReader, footer: bytes, end: int) -> None:
        """Take the metadata and the positions of the blocks, which are before `end`. ValueError if they differ."""
        if not parsed.schema.equals(STORED_SCHEMA):
            raise ValueError("other columns")
        about = {name.decode(): json.loads(value) for name, value in parsed.schema.metadata.items()}
        self.shard_names = [str(name) for name in about["shards"]]
        self.shard_sizes = np.array(about["sizes"], np.int64)
        self._fingerprint = str(about["fingerprint"])
        self._rows_per_block, self._length = max(int(about["rows_per_block"]), 1), int(self.shard_sizes.sum())
        self._positions = _parse_positions(footer)
        if {len(self._positions), parsed.num_record_batches} != {divide_up(self._length, self._rows_per_block)}:
            raise ValueError(f"{len(self._positions)} blocks, which are not those of {self._length} samples")
        if len(self.shard_names) != len(self.shard_sizes) or (self.shard_sizes < 0).any():
            raise ValueError(f"{len(self.shard_names)} names and {len(self.shard_sizes)} sizes of shards")
        block_ends = self._positions["offset"] + self._positions["metadata"] + self._positions["body"]
        if (self._positions["offset"] < 0).any() or (block_ends > end).any():
            raise ValueError("a block outside of the file")

    def _open_single(self) -> None:
        """Take the rows of a file of earlier versions: one record batch, with a dictionary of the shards."""
        file = ipc.open_file(pa.py_buffer(self._data))
        if file.num_record_batches != 1:
            raise ValueError("more than one record batch")
        rows = file.get_batch(0)
        rows.validate()
        shard = rows["shard"]
        shard.dictionary.validate(full=True)
        if any(column.null_count for column in rows.columns):
            raise ValueError("rows with nulls")
        self._fingerprint = ""
        self._rows_per_block, self._length = max(rows.num_rows, 1), rows.num_rows
        self.shard_names = shard.dictionary.to_pylist()
        self.shard_sizes = _count_shard_sizes(shard)
        columns = [shard.indices if name == "shard" else rows[name] for name in STORED_SCHEMA.names]
        self._single = pa.RecordBatch.from_arrays(columns, schema=STORED_SCHEMA)

    def _read_footer(self, size: int) -> bytes:
        """Read the footer with its length and the magic bytes after it."""
        tail = bytes(self._read_bytes([(max(size - TAIL_BYTES, 0), size)])[0])
        length = int.from_bytes(tail[-10:-6], "little", signed=True) + 10
        if tail[-6:] != MAGIC or not 10 < length <= size - 8:
            raise self.damaged("no footer")
        if length > len(tail):
            tail = bytes(self._read_bytes([(size - length, size - len(tail))])[0]) + tail
        return tail[-length:]

    def _read_bytes(self, ranges: Sequence[tuple[int, int]]) -> Sequence[bytes | memoryview]:
        """Read byte ranges; those of a local file are views of its map."""
        if self._map is None:
            return storage.read_ranges([(self._path, start, stop) for start, stop in ranges])
        view = memoryview(self._map)
        return [view[start:stop] for start, stop in ranges]

    def __len__(self) -> int:
        return self._length

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the rows in hex, equal for the same samples in the same order. See the module's docstring."""
        return self._fingerprint or hashlib.sha256(self._data).hexdigest()

    def read_former(self) -> pa.Table | None:
        """Read all rows of a file of earlier versions, with INDEX_SCHEMA; None for a file in blocks."""
        return ipc.open_file(pa.py_buffer(self._data)).read_all() if self._single is not None else None

    def damaged(self, reason: object) -> ValueError:
        """Make the error for an index that is damaged."""
        return ValueError(f"{self._path}: not an index of shards, or damaged: {reason}")

    def read_column(self, name: str) -> Shaped[np.ndarray, " samples"]:
        """Read a whole column of numbers."""
        # Fill the column block by block, because the blocks of a whole index take more memory.
        column = np.empty(len(self), STORED_SCHEMA.field(name).type.to_pandas_dtype())
        start = 0
        for block in self._iterate_blocks():
            column[start : start + block.num_rows] = block[name].to_numpy()
            start += block.num_rows
        return column

    def read_rows(self, numbers: Iterable[int]) -> list[dict[str, Any]]:
        """Read rows, with the columns of INDEX_SCHEMA.

        Raises:
            IndexError: a number is out of range.
            ValueError: a row is damaged.
        """
        table, positions = self._select(numbers)
        # Check the keys first: Arrow does not, and would read outside of the block.
        shard = table["shard"].combine_chunks().to_numpy()[positions]
        if ((shard < 0) | (shard >= len(self.shard_names))).any():
            raise self.damaged("a row of no shard")
        try:
            for position in positions.tolist():
                table["key"].slice(position, 1).validate(full=True)
            rows: list[dict[str, Any]] = table.take(pa.array(positions)).to_pylist()
        except pa.ArrowException as error:
            raise self.damaged(error) from None
        return [{**row, "shard": self.shard_names[row["shard"]]} for row in rows]

    def read_values(self, numbers: Iterable[int], *names: str) -> list[Int64[np.ndarray, " numbers"]]:
        """Read some columns of numbers of rows."""
        table, positions = self._select(numbers)
        return [table[name].combine_chunks().to_numpy()[positions] for name in names]

    def validate(self) -> None:
        """Check all rows. ValueError if they are damaged."""
        start = 0
        # Names of shards may not repeat, and samples of a shard stand together.
        owner = np.repeat(np.arange(len(self.shard_names)), self.shard_sizes)
        try:
            for block in self._iterate_blocks():
                block.validate(full=True)
                stop = start + block.num_rows
                if not np.array_equal(block["shard"].to_numpy(), owner[start:stop]):
                    raise self.damaged("samples of a shard do not stand together")
                start = stop
        except pa.ArrowException as error:
            raise self.damaged(error) from None
        if start != len(self) or not all(self.shard_sizes) or len({*self.shard_names}) < len(self.shard_names):
            raise self.damaged("samples of a shard do not stand together")

    def _select(self, numbers: Iterable[int]) -> tuple[pa.Table, Int64[np.ndarray, " numbers"]]:
        """Return the blocks of rows as a table, and the position of each row in it."""
        selected = np.array([int(number) for number in numbers], np.int64)
        outside = selected[(selected < 0) | (selected >= len(self))]
        if outside.size:
            raise IndexError(f"{self.folder}: got sample {outside[0]}, allowed: 0 to {len(self) - 1}")
        blocks, inverse = np.unique(selected // self._rows_per_block, return_inverse=True)
        table = pa.Table.from_batches(self._load(blocks.tolist()), STORED_SCHEMA)
        # All blocks are full, except the last one of the file, which is the last one here, too.
        return table, inverse * self._rows_per_block + selected % self._rows_per_block

    def _load(self, numbers: Sequence[int]) -> list[pa.RecordBatch]:
        """Load blocks, those that are not in the cache together."""
        if self._single is not None:
            return [self._single][: len(numbers)]
        missing = [number for number in numbers if number not in self._cache]
        read = dict(zip(missing, self._read_blocks(missing), strict=True))
        # The blocks that were used last come last.
        loaded = {number: read[number] if number in read else self._cache.pop(number) for number in numbers}
        self._cache |= loaded
        for number in list(self._cache)[:-MAX_CACHED_BLOCKS]:
            del self._cache[number]
        return list(loaded.values())

    def _iterate_blocks(self) -> Iterator[pa.RecordBatch]:
        """Yield all blocks in their order. They do not stay in memory."""
        if self._single is not None:
            yield self._single
            return
        for start in range(0, len(self._positions), SCAN_BLOCKS):
            yield from self._read_blocks(range(start, min(start + SCAN_BLOCKS, len(self._positions))))

    def _read_blocks(self, numbers: Sequence[int]) -> list[pa.RecordBatch]:
        """Read and check blocks."""
        if not numbers:  # also if the index has a single block, and no positions
            return []
        ranges = [
            (start, start + metadata + body) for start, metadata, _, body in self._positions[list(numbers)].tolist()
        ]
        blocks = []
        for number, data in zip(numbers, self._read_bytes(ranges), strict=True):
            try:
                message = ipc.read_message(pa.py_buffer(data))
                block = ipc.read_record_batch(message, STORED_SCHEMA)
                block.validate()
            except (pa.ArrowException, OSError, EOFError) as error:
                raise self.damaged(error) from None
            if self._fingerprint[:MARK_LENGTH].encode() not in message.metadata.to_pybytes():
                raise self.damaged(f"block {number} is that of another index, or the set was replaced")
            rows = min(self._rows_per_block, len(self) - number * self._rows_per_block)
            if block.num_rows != rows or any(column.null_count for column in block.columns):
                raise self.damaged(f"block {number} does not have {rows} rows")
            blocks.append(block)
        return blocks


def _parse_positions(footer: bytes) -> np.ndarray:
    """Parse the positions of the record batches in Arrow's footer, which pyarrow does not tell.

    The footer is a table of FlatBuffers: its root points to the table, whose first word points back to the list of
    offsets of its fields.

    Raises:
        ValueError: the footer is damaged.
    """

    def read(offset: int, size: int = 4) -> int:
        if not 0 <= offset <= len(footer) - size:
            raise ValueError("a damaged footer")
        return int.from_bytes(footer[offset : offset + size], "little", signed=size == 4)

    table = read(0)
    fields = table - read(table)
    offset = read(fields + 4 + 2 * RECORD_BATCHES_FIELD, size=2)
    vector = table + offset + read(table + offset)
    count = read(vector)
    if not 0 <= count * BLOCK_TYPE.itemsize <= len(footer) - vector - 4:
        raise ValueError("a damaged footer")
    return np.frombuffer(footer, BLOCK_TYPE, count, vector + 4)
