"""Index of a set of shards, and random reads of its samples by byte ranges.

The index gives every sample's shard, byte range and checksum, so one sample is one ranged read. Training can take any
sample at any time and in any order, without streaming the tar before it. Nothing in a shard is ever unpickled.

    out/index.arrow                     one row per sample, in the order of the records: SCHEMA

The index is an Arrow IPC file of one uncompressed record batch, about 100 bytes per sample. A local index is mapped
into memory: a process pays for the pages that it touches, and all processes of a machine share them. It is therefore
replaced, and never written in place, which would crash its readers. From a bucket each process reads all of it.
"""

import contextlib
import functools
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Int32, Int64
from pyarrow import ipc

from pipelines.core import storage
from redux.settings import Fit

FORMER_SHARD_OPTIONS = {
    "words": "max_words",
    "size": "image_size",
    "fit": "image_aspect_ratio",
    "tolerance": "max_bad_fraction",
}
"""Settings that had other names when older sets were made."""

INDEX_FILE, QUARANTINE_FILE, SUMMARY_FILE, UNFINISHED_DIR = (
    "index.arrow",
    "quarantine.jsonl",
    "summary.json",
    "unfinished",
)
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
"""Of each sample: its name, tar, range of bytes and their checksum; within the range the record and the image file,
of size 0 for text alone; and the words of all turns.

Samples of a shard stand together, and the dictionary has the shards in the order of their samples.
"""


@dataclass(frozen=True)
class StoredSample:
    """One sample as stored: the image file's bytes, none for text alone, and the record."""

    key: str
    image: bytes
    record: dict

    @property
    def id(self) -> str:
        """The record's own id, which may repeat; the key where it has none."""
        name = self.record.get("id")
        return self.key if name is None else str(name).encode("utf-8", "backslashreplace").decode()


def is_finished(out: str) -> bool:
    """Tell if the folder holds a finished set."""
    return storage.exists(storage.join(out, INDEX_FILE))


def rename_former_options(asked: dict[str, Any]) -> dict[str, Any]:
    """Settings in a summary under the names they have now; sets that are in use were made under others."""
    return {FORMER_SHARD_OPTIONS.get(name, name): value for name, value in asked.items()}


class Shards:
    """A finished set of shards: `len`, and any samples by number.

    It travels to a task as little more than its folder's name; there the index is opened at the first look-up, once a
    process.  A set made anew in the same folder is seen by what is constructed after it.
    """

    def __init__(self, folder: str | os.PathLike) -> None:
        """ValueError where there is no index, or no valid one; its rows are checked as they are read."""
        self.folder = os.fspath(folder)
        self._opening = uuid4().hex
        self._length = _open_index(self.folder, self._opening)[1].num_rows

    def __len__(self) -> int:
        return self._length

    def iterate_records(self) -> Iterator[Any]:
        """All records in the order of the index, unchecked; where one cannot be read some are left out."""
        for first in range(0, len(self), 64):
            ranges = []
            for row in self.read_rows(range(first, min(first + 64, len(self)))):
                start = row["offset"] + row["record_at"]
                ranges.append((storage.join(self.folder, row["shard"]), start, start + row["record_size"]))
            with contextlib.suppress(ValueError):
                yield from map(json.loads, storage.read_ranges(ranges))

    @property
    def shard_names(self) -> list[str]:
        """Of each shard the file's name, in the order of the index."""
        return self._rows["shard"].dictionary.to_pylist()

    @property
    def shard_sizes(self) -> Int64[np.ndarray, " shards"]:
        """Of each shard how many samples it holds, in the order of the index."""
        shard = self._rows["shard"]
        # the shards' numbers ascend, so that a search finds where each starts in a few pages of them
        return np.diff(np.searchsorted(shard.indices.to_numpy(), np.arange(len(shard.dictionary) + 1)))

    @property
    def word_counts(self) -> Int32[np.ndarray, " samples"]:
        """Of each sample the words of all turns; a view of the index."""
        return self._rows["words"].to_numpy()

    @property
    def has_image(self) -> Bool[np.ndarray, " samples"]:
        """Of each sample whether it has an image; a byte a sample."""
        return self._rows["image_size"].to_numpy() > 0

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the index in hex: the same for the same samples in the same order.  Reads all of the index."""
        return hashlib.sha256(self._opened[0]).hexdigest()

    @property
    def prepared_format(self) -> tuple[int, Fit] | None:
        """Size and fit of images that are stored as squares; None where they are stored as they came."""
        path = storage.join(self.folder, SUMMARY_FILE)  # which sets of others lack
        asked = rename_former_options(json.loads(storage.read(path)).get("asked", {})) if storage.exists(path) else {}
        return (asked["image_size"], asked["image_aspect_ratio"]) if asked.get("image_size") else None

    def get_key(self, number: int) -> str:
        """The sample's name in its tar."""
        return self.read_rows([number])[0]["key"]

    def read_rows(self, numbers: Iterable[int]) -> list[dict[str, Any]]:
        """Rows of the index: SCHEMA's columns.  IndexError where there is no such number, ValueError for a bad row."""
        asked, table = np.array([int(number) for number in numbers], np.int64), self._rows
        if (wrong := asked[(asked < 0) | (asked >= len(self))]).size:
            raise IndexError(f"{self.folder}: got sample {wrong[0]}, allowed: 0 to {len(self) - 1}")
        # Arrow follows what a damaged row says out of the file
        shard = table["shard"].indices.to_numpy()[asked]
        if ((shard < 0) | (shard >= len(table["shard"].dictionary))).any():
            raise _damaged_index(self.folder, "a row of no shard")
        try:
            for number in asked.tolist():
                table["key"].slice(number, 1).validate(full=True)
        except pa.ArrowException as error:
            raise _damaged_index(self.folder, error) from None
        return table.take(pa.array(asked)).to_pylist()

    def validate(self) -> None:
        """Read all of the index.  ValueError where it is damaged."""
        try:
            self._rows.validate(full=True)
        except pa.ArrowException as error:
            raise _damaged_index(self.folder, error) from None
        shard = self._rows["shard"]
        steps = np.diff(shard.indices.to_numpy(), prepend=-1, append=len(shard.dictionary))
        if ((steps != 0) & (steps != 1)).any() or len(set(self.shard_names)) < len(self.shard_names):
            raise _damaged_index(self.folder, "samples of a shard do not stand together")

    def read_samples(self, numbers: Iterable[int]) -> list[StoredSample]:
        """The samples with these numbers, in this order.  ValueError where stored bytes are not those of the index."""
        return read_samples([(self, number) for number in numbers])

    @property
    def _opened(self) -> tuple[pa.Buffer, pa.RecordBatch]:
        opened = _open_index(self.folder, self._opening)
        if opened[1].num_rows != len(self):
            raise ValueError(f"{self.folder}: {INDEX_FILE} has {opened[1].num_rows} samples now, it had {len(self)}")
        return opened

    @property
    def _rows(self) -> pa.RecordBatch:
        return self._opened[1]


@functools.lru_cache(maxsize=64)  # more than a mixture has sets
def _open_index(folder: str, opening: str) -> tuple[pa.Buffer, pa.RecordBatch]:
    """The index file and its rows, once a process for each opening, as the file may be replaced between two."""
    path = storage.join(folder, INDEX_FILE)
    if not storage.exists(path):
        raise ValueError(f"{folder}: no shards here, {INDEX_FILE} is missing")
    data = pa.py_buffer(storage.map_file(path))
    try:
        file = ipc.open_file(data)
        if not file.schema.equals(INDEX_SCHEMA) or file.num_record_batches != 1:
            raise _damaged_index(folder, "other columns, or more than one batch")
        rows = file.get_batch(0)
        rows.validate()
        rows["shard"].dictionary.validate(full=True)
    except (pa.ArrowException, OSError) as error:
        raise _damaged_index(folder, error) from None
    if any(column.null_count for column in rows.columns):
        raise _damaged_index(folder, "rows with nulls")
    return data, rows


def _damaged_index(folder: str, why: object) -> ValueError:
    return ValueError(f"{storage.join(folder, INDEX_FILE)}: not an index of shards, or damaged: {why}")


def read_samples(wanted: Sequence[tuple[Shards, int]]) -> list[StoredSample]:
    """Samples of several sets, side by side, in this order; as `Shards.read`."""
    found: dict[int, dict[str, Any]] = {}
    for shards in dict.fromkeys(shards for shards, _ in wanted):
        places = [place for place, (one, _) in enumerate(wanted) if one is shards]
        found |= zip(places, shards.read_rows(wanted[place][1] for place in places), strict=True)
    rows = [found[place] for place in range(len(wanted))]
    urls = [storage.join(shards.folder, row["shard"]) for (shards, _), row in zip(wanted, rows, strict=True)]
    ranges = [(url, row["offset"], row["offset"] + row["length"]) for url, row in zip(urls, rows, strict=True)]
    return [_parse_sample(*each) for each in zip(rows, storage.read_ranges(ranges), urls, strict=True)]


def _parse_sample(row: dict[str, Any], data: bytes, url: str) -> StoredSample:
    if hashlib.sha256(data).digest() != row["sha256"]:
        raise ValueError(f"{url}: sample {row['key']}: bytes differ from the index's checksum")
    image, record = (data[row[f"{part}_at"] : row[f"{part}_at"] + row[f"{part}_size"]] for part in ("image", "record"))
    return StoredSample(row["key"], image, json.loads(record))
