"""Data section of a job file: existing sets, sets that the job makes, and tolerated fractions of bad samples.

Plain Python, so that mistakes in a job file are found without Ray.
"""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from annotated_types import Ge, Le, Lt

from redux.settings import ImageAspectRatio


@dataclass(frozen=True, kw_only=True)
class ShardOptions:
    """Settings for turning records into shards.

    Args:
        samples_per_shard: number of records per shard, including rejected records. A whole shard is in memory while
            it is made.
        max_words: reject records with more words. null accepts any length.
        image_size: store images as squares with sides of this many pixels (3 image_size² bytes). They load faster.
            null stores the files unchanged.
        image_aspect_ratio: method that makes stored images square, "pad" or "crop".
        max_bad_fraction: share of the records that may be rejected. With a larger share, no index is written.
    """

    samples_per_shard: Annotated[int, Ge(1)] = 1000
    max_words: Annotated[int, Ge(1)] | None = None
    image_size: Annotated[int, Ge(1)] | None = None
    image_aspect_ratio: ImageAspectRatio = "pad"
    max_bad_fraction: Annotated[float, Ge(0), Le(1)] = 0.0


@dataclass(frozen=True, kw_only=True)
class SetSource(ShardOptions):
    """Source of a set that the job makes.

    Args:
        json: file or URL of the records, in LLaVA's form.
        images: folder or URL of their images.
    """

    json: str
    images: str = "."


@dataclass(frozen=True, kw_only=True)
class Data:
    """Data of a job.

    Args:
        source: "easy-vqa" makes those sets of easy-VQA that a stage uses. null makes none.
        samples_per_shard: number of samples per shard of these sets.
        sets: other sets of shards by name, each as a folder or URL.
        make: sources of those of `sets` that the job makes before training, by name.
        max_bad_fraction: share of the samples of a stage that may be replaced because they cannot be used. A larger
            share stops the stage.
        hold_out: share of each set that training never uses, such as 0.01. Its loss is the validation loss, see
            train.*.validate_steps; evaluate.tasks.*.held_out asks its questions. The samples are the same for every
            seed.
    """

    source: Literal["easy-vqa"] | None = "easy-vqa"
    samples_per_shard: Annotated[int, Ge(1)] = 1000
    sets: dict[str, str] = field(default_factory=dict)
    make: dict[str, SetSource] = field(default_factory=dict)
    max_bad_fraction: Annotated[float, Ge(0), Le(1)] = 0.001
    hold_out: Annotated[float, Ge(0), Lt(1)] = 0.0

    def __post_init__(self) -> None:
        if missing := self.make.keys() - self.sets.keys():
            raise ValueError(
                f"make: got {min(missing)}, allowed: names in sets, which give the folders: {', '.join(self.sets)}"
            )
