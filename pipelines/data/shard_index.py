"""Index of a set of shards, and random reads of its samples by byte ranges.

The index gives every sample's shard, byte range and checksum, so one sample is one ranged read. Training can take any
sample at any time and in any order, without streaming the tar before it. Nothing in a shard is ever unpickled.

    out/index.arrow                     one row per sample, in the order of the records: see index_file.py
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
from jaxtyping import Bool, Int32, Int64

from pipelines.core import storage
from pipelines.data.index_file import INDEX_FILE, IndexFile
from redux.settings import ImageAspectRatio

FORMER_SHARD_OPTIONS = {
    "words": "max_words",
    "size": "image_size",
    "fit": "image_aspect_ratio",
    "tolerance": "max_bad_fraction",
}
"""Former names of shard options, found in the summaries of older sets."""

FORMER_SUMMARY_FIELDS = {"asked": "settings", "kept": "samples"}
"""Former names of fields of a summary."""

QUARANTINE_FILE = "quarantine.jsonl"
REPAIRED_FILE = "repaired.jsonl"
SUMMARY_FILE = "summary.json"
UNFINISHED_DIR = "unfinished"


@dataclass(frozen=True)
class StoredSample:
    """Sample as it is stored: bytes of the image file, b"" for text only, and the record."""

    key: str
    image: bytes
    record: dict

    @property
    def id(self) -> str:
        """The record's id, which may repeat, or the key if it has none."""
        name = self.record.get("id")
        return self.key if name is None else str(name).encode("utf-8", "backslashreplace").decode()


def is_finished(out: str) -> bool:
    """Return True if the folder contains a finished set."""
    return storage.exists(storage.join(out, INDEX_FILE))


def read_summary(folder: str) -> dict[str, Any] | None:
    """Read summary.json of a set, with the current names of its fields and options.

    Returns:
        The summary, or None for a foreign set, which has no such file or that of another program.

    Raises:
        ValueError: the file is not JSON.
    """
    path = storage.join(folder, SUMMARY_FILE)
    if not storage.exists(path):
        return None
    text = storage.read(path)
    try:
        summary = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path}: got {error}, allowed: a summary of shards") from None
    if not isinstance(summary, dict):
        return None
    fields = _rename_former(summary, FORMER_SUMMARY_FIELDS)
    if not isinstance(settings := fields.get("settings"), dict):
        return None
    return {**fields, "settings": _rename_former(settings, FORMER_SHARD_OPTIONS)}


def _rename_former(values: dict[str, Any], current_names: dict[str, str]) -> dict[str, Any]:
    """Give values their current names."""
    return {current_names.get(name, name): value for name, value in values.items()}


class Shards:
    """Finished set of shards with random access by sample number.

    Pickled, it is little more than the folder's name. Another process opens the index at the first look-up, once. If
    the set is replaced in the same folder, only objects constructed afterwards read the new one.
    """

    def __init__(self, folder: str | os.PathLike) -> None:
        """Open a set. ValueError if the index is missing or invalid. Its rows are checked when they are read."""
        self.folder = os.fspath(folder)
        self._cache_key = uuid4().hex  # of this object and its pickled copies
        self._length = len(_open_index(self.folder, self._cache_key))

    def __len__(self) -> int:
        return self._length

    def iterate_records(self, start: int = 0, stop: int | None = None) -> Iterator[Any]:
        """Yield the records in the order of the index, unchecked. An unreadable record skips up to 64.

        Args:
            start, stop: rows of the index; None for the last one.
        """
        stop = len(self) if stop is None else min(stop, len(self))
        for block_start in range(start, stop, 64):
            ranges = []
            for row in self.read_rows(range(block_start, min(block_start + 64, stop))):
                url, record_start = storage.join(self.folder, row["shard"]), row["offset"] + row["record_at"]
                ranges.append((url, record_start, record_start + row["record_size"]))
            with contextlib.suppress(ValueError):
                yield from map(json.loads, storage.read_ranges(ranges))

    @property
    def shard_names(self) -> list[str]:
        """File names of the shards, in the order of the index."""
        return self._index.shard_names

    @property
    def shard_sizes(self) -> Int64[np.ndarray, " shards"]:
        """Number of samples of each shard, in the order of the index."""
        return self._index.shard_sizes

    @property
    def word_counts(self) -> Int32[np.ndarray, " samples"]:
        """Number of words of each sample, over all turns. Reads the whole index."""
        return self._index.read_column("words")

    @property
    def has_image(self) -> Bool[np.ndarray, " samples"]:
        """True for each sample with an image. Reads the whole index."""
        return self.image_sizes > 0

    def read_sizes(
        self, numbers: Int64[np.ndarray, " numbers"]
    ) -> tuple[Int64[np.ndarray, " numbers"], Bool[np.ndarray, " numbers"]]:
        """Return the bytes of the record of each sample, and True for each with an image."""
        record_sizes, image_sizes = self._index.read_values(numbers, "record_size", "image_size")
        return record_sizes, image_sizes > 0

    @property
    def image_sizes(self) -> Int64[np.ndarray, " samples"]:
        """Bytes of the image file of each sample, 0 for text only. Reads the whole index."""
        return self._index.read_column("image_size")

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the rows in hex, equal for the same samples in the same order."""
        return self._index.fingerprint

    @property
    def prepared_format(self) -> tuple[int, ImageAspectRatio] | None:
        """image_size and image_aspect_ratio of images stored as squares; None if they are stored unchanged."""
        summary = read_summary(self.folder)
        options = summary["settings"] if summary else {}
        return (options["image_size"], options["image_aspect_ratio"]) if options.get("image_size") else None

    def read_rows(self, numbers: Iterable[int]) -> list[dict[str, Any]]:
        """Read rows of the index, with the columns of INDEX_SCHEMA.

        Raises:
            IndexError: a number is out of range.
            ValueError: a row is damaged.
        """
        return self._index.read_rows(numbers)

    def validate(self) -> None:
        """Check the whole index. ValueError if it is damaged."""
        self._index.validate()

    def read_samples(self, numbers: Iterable[int]) -> list[StoredSample]:
        """Read samples by number, in this order. ValueError if stored bytes differ from the index's checksum."""
        return read_samples([(self, number) for number in numbers])

    @property
    def _index(self) -> IndexFile:
        """The index file. ValueError if it was replaced by one of another length."""
        index = _open_index(self.folder, self._cache_key)
        if len(index) != len(self):
            raise ValueError(f"{self.folder}: {INDEX_FILE} has {len(index)} samples now, it had {len(self)}")
        return index


@functools.lru_cache(maxsize=64)  # a mixture has fewer sets
def _open_index(folder: str, cache_key: str) -> IndexFile:
    """Open the index file, once per process and cache key, because the file may be replaced in between."""
    return IndexFile(folder)


def read_samples(requests: Sequence[tuple[Shards, int]]) -> list[StoredSample]:
    """Read samples of several sets in parallel. See `Shards.read_samples`.

    Args:
        requests: pairs of set and sample number.

    Returns:
        The samples, in the order of `requests`.
    """
    # Look up the rows of the index, set by set.
    row_of: dict[int, dict[str, Any]] = {}
    for shards in dict.fromkeys(shards for shards, _ in requests):
        positions = [position for position, (other, _) in enumerate(requests) if other is shards]
        row_of |= zip(positions, shards.read_rows(requests[position][1] for position in positions), strict=True)
    rows = [row_of[position] for position in range(len(requests))]
    # Read the bytes of all sets together.
    urls = [storage.join(shards.folder, row["shard"]) for (shards, _), row in zip(requests, rows, strict=True)]
    ranges = [(url, row["offset"], row["offset"] + row["length"]) for url, row in zip(urls, rows, strict=True)]
    return [_parse_sample(*parts) for parts in zip(rows, storage.read_ranges(ranges), urls, strict=True)]


def _parse_sample(row: dict[str, Any], data: bytes, url: str) -> StoredSample:
    """Check the bytes of a sample against its row, and cut image and record out of them."""
    if hashlib.sha256(data).digest() != row["sha256"]:
        raise ValueError(f"{url}: sample {row['key']}: bytes differ from the index's checksum")
    image, record = (data[row[f"{part}_at"] : row[f"{part}_at"] + row[f"{part}_size"]] for part in ("image", "record"))
    return StoredSample(row["key"], image, json.loads(record))
