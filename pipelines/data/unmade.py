"""Sets that a job has not made yet: their records in memory, with the look-ups of `Shards`.

A look or a check before training then sees the samples that training will see, and no shard is written. Images are read
when a sample is read, so a record whose image is missing is still counted here, while shards leave it out.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from jaxtyping import Bool, Int32, Int64

from pipelines.data.images import ImageFolder
from pipelines.data.options import ShardOptions
from pipelines.data.records import count_words, has_image
from pipelines.data.shard_index import Shards, StoredSample
from pipelines.data.shard_writer import admit_record, as_source_record, read_image
from redux.settings import ImageAspectRatio

MAX_EMBEDDED_BYTES = 2**31
"""Maximum size of images that come with the records, since they are kept in memory."""


class UnmadeShards(Shards):
    """Set of the records that `make_shards` would store. Only its own methods work, and not in another process.

    Args:
        records: records of the set, or a `RecordSource`; those that would be rejected are left out.
        images: folder or URL of their images.
        options: options with which the set would be made.
    """

    def __init__(self, records: Iterable[Any], images: str, options: ShardOptions) -> None:
        self.folder = images
        self.options = options
        self._images = ImageFolder(images)
        # The numbers of the records name samples, and assign them to shards, as in a set that is made.
        self._numbers: list[int] = []
        self._records: list[dict[str, Any]] = []
        self._embedded: dict[int, bytes] = {}  # images that come with their records
        # Keep digests, because whole records of a large file would be in memory twice.
        known_digests: set[bytes] = set()
        embedded_bytes = 0
        for number, source_record in enumerate(map(as_source_record, records)):
            digest = hashlib.sha256(json.dumps(source_record.record, default=str).encode())
            digest.update(source_record.image or b"")
            record, _, _ = admit_record(source_record, options)
            if record is not None and digest.digest() not in known_digests:
                if source_record.image is not None:
                    self._embedded[len(self._numbers)] = source_record.image
                    embedded_bytes += len(source_record.image)
                    if embedded_bytes > MAX_EMBEDDED_BYTES:
                        raise ValueError(
                            f"{images}: its images take more than {MAX_EMBEDDED_BYTES >> 30} GiB, allowed for a set "
                            "that is not made yet: less; make it by redux shards make"
                        )
                self._numbers.append(number)
                self._records.append(record)
            known_digests.add(digest.digest())

    def __len__(self) -> int:
        return len(self._records)

    def iterate_records(self, start: int = 0, stop: int | None = None) -> Iterator[Any]:
        return iter(self._records[start:stop])

    @property
    def shard_sizes(self) -> Int64[np.ndarray, " shards"]:
        # A shard has fewer samples if records are rejected, and none if all are.
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
        """-1 for each sample with an image, because it is not read yet, and 0 for text only."""
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
            StoredSample(f"{self._numbers[number]:09d}", self._read_image(number), self._records[number])
            for number in numbers
        ]

    def _read_image(self, number: int) -> bytes:
        """Read the image of a sample, as it would be stored; b"" for text only."""
        record = self._records[number]
        if not has_image(record):
            return b""
        embedded = self._embedded.get(number)
        rejection, _, image = read_image(self._images, record["image"], embedded, self.options)
        # The reasons are those of the quarantine list.
        if rejection and rejection.reason == "broken image":
            raise ValueError(f"broken image: {rejection.value}: {rejection.detail}")
        if rejection:
            raise ValueError(f"missing image: {rejection.value}, allowed: a file in {self.folder}")
        return image
