"""Sets that a job has not made yet: their records in memory, with the look-ups of `Shards`.

A look or a check before training then sees the samples that training will see, and no shard is written. Images are read
when a sample is read, so a record whose image is missing is still counted here, while shards leave it out.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int32, Int64

from pipelines.data.images import ImageFolder, OutsideError, check_image
from pipelines.data.options import ShardOptions
from pipelines.data.records import count_words, find_rejection, has_image, shorten
from pipelines.data.shard_index import Shards, StoredSample
from redux.image import prepare_image
from redux.settings import ImageAspectRatio


class UnmadeShards(Shards):
    """Set of the records that `make_shards` would store. Only its own methods work, and not in another process.

    Args:
        records: records of the set; those that would be rejected are left out.
        images: folder or URL of their images.
        options: options with which the set would be made.
    """

    def __init__(self, records: Sequence[Any], images: str, options: ShardOptions) -> None:
        self.folder = images
        self.options = options
        self._images = ImageFolder(images)
        # the numbers of the records name samples, and assign them to shards, as in a set that is made
        self._numbers: list[int] = []
        # digests, as whole records of a large file would be in memory twice
        seen: set[bytes] = set()
        for number, record in enumerate(records):
            digest = hashlib.sha256(json.dumps(record).encode()).digest()
            if digest not in seen and find_rejection(record, options.max_words) is None:
                self._numbers.append(number)
            seen.add(digest)
        self._records = [records[number] for number in self._numbers]

    def __len__(self) -> int:
        return len(self._records)

    def iterate_records(self) -> Iterator[Any]:
        return iter(self._records)

    @property
    def shard_sizes(self) -> Int64[np.ndarray, " shards"]:
        # a shard has fewer samples if records are rejected, and none if all are
        sizes = np.bincount(np.array(self._numbers, np.int64) // self.options.samples_per_shard)
        return sizes[sizes > 0].astype(np.int64)

    @property
    def word_counts(self) -> Int32[np.ndarray, " samples"]:
        return np.array([count_words(record) for record in self._records], np.int32)

    @property
    def has_image(self) -> Bool[np.ndarray, " samples"]:
        return np.array([has_image(record) for record in self._records], bool)

    @property
    def image_sizes(self) -> Int64[np.ndarray, " samples"]:
        """-1 for each sample with an image, as it is not read yet, and 0 for text only."""
        return -self.has_image.astype(np.int64)

    @property
    def prepared_format(self) -> tuple[int, ImageAspectRatio] | None:
        size = self.options.image_size
        return (size, self.options.image_aspect_ratio) if size else None

    def read_rows(self, numbers: Iterable[int]) -> list[dict[str, Any]]:
        """Return the columns key and shard of rows; the shard is the image that the record names."""
        return [
            {"key": f"{self._numbers[number]:09d}", "shard": str(self._records[number].get("image") or "")}
            for number in numbers
        ]

    def read_samples(self, numbers: Iterable[int]) -> list[StoredSample]:
        """Read samples as they would be stored. ValueError if an image is missing or broken."""
        return [
            StoredSample(f"{self._numbers[number]:09d}", self._read_image(self._records[number]), self._records[number])
            for number in numbers
        ]

    def _read_image(self, record: dict) -> bytes:
        """Read the image of a record, as it would be stored; b"" for text only."""
        if not has_image(record):
            return b""
        # the reasons are those of the quarantine list
        try:
            image = self._images.read(record["image"])
            check_image(image)
        except (FileNotFoundError, OutsideError):
            raise ValueError(f"missing image: {shorten(record['image'])}, allowed: a file in {self.folder}") from None
        except ValueError as error:
            raise ValueError(f"broken image: {shorten(record['image'])}: {error}") from None
        size = self.options.image_size
        return prepare_image(image, size, self.options.image_aspect_ratio) if size else image
