"""Data section of a job file: existing sets, sets that the job makes, and tolerated fractions of bad samples.

Plain Python, so that mistakes in a job file are found without Ray.
"""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from annotated_types import Ge, Le, Lt

from redux.settings import ImageAspectRatio

ColumnName = Literal[
    "conversations",
    "question",
    "input",
    "answer",
    "history",
    "text",
    "image",
    "system",
    "id",
    "role",
    "content",
    "user",
    "assistant",
]
"""Columns that a column map may name: those of a row; then field names of a turn, and the roles of the two speakers."""


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
        fix: repair records where the repair is certain, and list them in repaired.jsonl.
    """

    samples_per_shard: Annotated[int, Ge(1)] = 1000
    max_words: Annotated[int, Ge(1)] | None = None
    image_size: Annotated[int, Ge(1)] | None = None
    image_aspect_ratio: ImageAspectRatio = "pad"
    max_bad_fraction: Annotated[float, Ge(0), Le(1)] = 0.0
    fix: bool = False


@dataclass(frozen=True, kw_only=True)
class SetSource(ShardOptions):
    """Source of a set that the job makes.

    Args:
        source: file, folder or URL of the data, in any form of "Formats" in jobs/README.md.
        images: folder or URL of the images that records name. null is the folder of the source.
        columns: names of columns that differ from the usual ones, such as {conversations: chat, image: photo}. Keys are
            conversations; question, input, answer, history; text, the caption; image, system, id. Further keys rename
            parts of a turn: its fields role and content, and the values user and assistant of its role. In tars,
            columns are suffixes of members.
        prompt: question of captions. null leaves it empty.
    """

    source: str
    images: str | None = None
    columns: dict[ColumnName, str] = field(default_factory=dict)
    prompt: str | None = None


@dataclass(frozen=True, kw_only=True)
class Data:
    """Data of a job.

    Args:
        source: "easy-vqa" makes those sets of easy-VQA that a stage uses. Sets with images: captions; conversations;
            shown, with four instructions; half_shown, with eight. Sets of text alone: formats, with sixteen
            instructions; half_formats, with eight. null makes none.
        samples_per_shard: number of samples per shard of these sets.
        sets: other sets by name: folders or URLs of shards, or data in any form of "Formats" in jobs/README.md, of
            which the job makes shards.
        make: sources of sets that the job makes before training, by name. Their folders are those in `sets`, or folders
            in the run folder.
        max_bad_fraction: share of the samples of a stage that may be replaced because they cannot be used. A larger
            share stops the stage.
        hold_out: share of each set that training never uses, such as 0.01. Its loss is the validation loss, see
            train.*.validate_steps; evaluate.tasks.*.held_out asks its questions. The samples are the same for every
            seed.
        features: folder or URL of stored features of sets, by name, which `redux shards features` writes. A stage whose
            tower is frozen reads them in place of images. Other stages and the evaluation read images.
    """

    source: Literal["easy-vqa"] | None = "easy-vqa"
    samples_per_shard: Annotated[int, Ge(1)] = 1000
    sets: dict[str, str] = field(default_factory=dict)
    make: dict[str, SetSource] = field(default_factory=dict)
    max_bad_fraction: Annotated[float, Ge(0), Le(1)] = 0.001
    hold_out: Annotated[float, Ge(0), Lt(1)] = 0.0
    features: dict[str, str] = field(default_factory=dict)

    @property
    def set_names(self) -> tuple[str, ...]:
        """Names of all sets besides those of `source`."""
        return tuple(dict.fromkeys([*self.sets, *self.make]))
