"""Stored features of images: outputs of a frozen image tower, which training reads in place of pixels.

    out/features.json       `FeatureFormat`, the fingerprint of the set, and `finished`; written first and last
    out/000000.features     one file per shard of the set: a record for each sample with an image, in the set's order

A record is a SHA-256 of the sample's checksum in the index and of the features, then the features. All records of a
folder have the same length, so one is found without an index. A sample whose image cannot be used has a record of
zeros, and training replaces it as it replaces the image.

`pipelines.training.feature_writer` writes them. A stage reads them if its tower is frozen: it decodes no image and runs
no tower. Everything else that shows or evaluates images reads the set itself.
"""

import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
from jaxtyping import Int64

from pipelines.core import storage
from pipelines.data.shard_index import Shards
from redux.settings import ImageAspectRatio, ImageBackend

FORMAT_FILE = "features.json"
IMAGE_DIGEST_BYTES = 32
BYTES_PER_VALUE = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True, kw_only=True)
class FeatureFormat:
    """Everything on which features depend, besides the images.

    Args:
        tower: SHA-256 of weights and settings of the tower, of VMTC and of the baselines, see
            `pipelines.training.feature_writer.compute_tower_digest`.
        precision: precision of tower and features.
        tokens: tokens of an image.
        width: values of a token.
        image_size: side of the images in pixels.
        image_aspect_ratio: conversion of images to squares.
        image_backend: decoder of the images.
    """

    tower: str
    precision: Literal["fp32", "bf16"]
    tokens: int
    width: int
    image_size: int
    image_aspect_ratio: ImageAspectRatio
    image_backend: ImageBackend

    @property
    def row_bytes(self) -> int:
        """Bytes of a token."""
        return self.width * BYTES_PER_VALUE[self.precision]

    @property
    def record_bytes(self) -> int:
        """Bytes of a record."""
        return IMAGE_DIGEST_BYTES + self.tokens * self.row_bytes


class StoredFeatures:
    """Features of a set. Pickles to the readers.

    Args:
        folder: folder or URL of the features.
        shards: the set.

    Raises:
        ValueError: there are no features, they are unfinished, or they are those of another set.
    """

    def __init__(self, folder: str, shards: Shards) -> None:
        self.folder, self.shards = folder, shards
        header = read_format(folder)
        if header is None:
            raise ValueError(f"{folder}: no features here, allowed: a folder of `redux shards features`")
        self.format, fingerprint, is_finished = header
        if not is_finished:
            raise ValueError(f"{folder}: features are unfinished, allowed: start `redux shards features` again first")
        # This reads the whole index, once per stage.
        if fingerprint != shards.fingerprint:
            raise ValueError(
                f"{folder}: got features of another set than {shards.folder}, or the set was made again; allowed: "
                "features of this set; write them again into another folder"
            )

    @functools.cached_property
    def _images_before(self) -> Int64[np.ndarray, " samples"]:
        """Number of images before each sample. Reads the whole index, once in each reader."""
        has_image = self.shards.has_image
        return np.cumsum(has_image) - has_image

    def read(self, numbers: Sequence[int]) -> list[bytes]:
        """Read the features of samples with images.

        Raises:
            ValueError: features are damaged, or there are none because an image cannot be used; names the sample.
        """
        stops, size = np.cumsum(self.shards.shard_sizes), self.format.record_bytes
        ranges = []
        for number in numbers:
            shard = int(np.searchsorted(stops, number, side="right"))
            start = int(stops[shard - 1]) if shard else 0
            # The position of a record in its file: the images before it in its shard.
            position = int(self._images_before[number] - self._images_before[start])
            ranges.append((storage.join(self.folder, name_file(shard)), position * size, (position + 1) * size))
        result = []
        rows = self.shards.read_rows(numbers)
        for row, data, (url, *_) in zip(rows, storage.read_ranges(ranges), ranges, strict=True):
            digest, features = data[:IMAGE_DIGEST_BYTES], data[IMAGE_DIGEST_BYTES:]
            if not any(digest):
                raise ValueError(f"{url}: sample {row['key']}: no features, because its image cannot be used")
            # The checksum of the sample is part of it, so a file of another sample is noticed as well.
            if digest != compute_digest(row["sha256"], features):
                raise ValueError(f"{url}: sample {row['key']}: features differ from their checksum")
            result.append(features)
        return result


def name_file(shard: int) -> str:
    """Return the name of the file with the features of a shard, given by its number."""
    return f"{shard:06d}.features"


def compute_digest(sample_digest: bytes, features: bytes) -> bytes:
    """Compute the checksum of a record.

    Args:
        sample_digest: checksum of the sample in the index of the set.
        features: features of its image.
    """
    return hashlib.sha256(sample_digest + features).digest()


def read_format(folder: str) -> tuple[FeatureFormat, str, bool] | None:
    """Read the format of the features in a folder, the fingerprint of their set, and True if they are finished.

    Returns:
        None if there are none.

    Raises:
        ValueError: the file is damaged.
    """
    path = storage.join(folder, FORMAT_FILE)
    if not storage.exists(path):
        return None
    try:
        values = json.loads(storage.read(path))
        return FeatureFormat(**values["format"]), values["set"], values["finished"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: got {error!r}, allowed: a file of `redux shards features`") from None


def write_format(folder: str, format: FeatureFormat, fingerprint: str, is_finished: bool) -> None:
    """Write the file that `read_format` reads."""
    values = {"format": asdict(format), "set": fingerprint, "finished": is_finished}
    storage.write(storage.join(folder, FORMAT_FILE), json.dumps(values, indent=2).encode())
