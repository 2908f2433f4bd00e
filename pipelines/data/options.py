"""Data section of a job file: sets that are there, sets to be made, and what is tolerated.

Plain Python: a mistake in a job file is found without Ray.
"""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from annotated_types import Ge, Le

from redux.settings import Fit


@dataclass(frozen=True, kw_only=True)
class Making:
    """How records become shards.

    samples_per_shard: records put in, kept or not.  A shard is made in the memory of one task.
    words: a record with more is kept out; None takes any length.
    size, fit: images are stored padded or cropped to a square and resized to size x size pixels, as
        redux.image.prepared makes them: 3 size² bytes each.  None stores files as they came.
    tolerance: share of the records that may be kept out before the whole fails.
    """

    samples_per_shard: Annotated[int, Ge(1)] = 1000
    words: Annotated[int, Ge(1)] | None = None
    size: Annotated[int, Ge(1)] | None = None
    fit: Fit = "pad"
    tolerance: Annotated[float, Ge(0), Le(1)] = 0.0


@dataclass(frozen=True, kw_only=True)
class Source(Making):
    """What a set is made of.

    json: file or URL of records of LLaVA's form.  images: folder or URL of their images.
    """

    json: str
    images: str = "."


@dataclass(frozen=True, kw_only=True)
class Data:
    """Where samples come from.

    source: what the job makes sets of, those of easy_vqa.SETS that a stage trains on; null makes none.
    samples_per_shard: of these sets.
    sets: folders or URLs of other sets by name, as `redux shards make` left them.
    make: of these sets, those that the job is to make there itself, and of what.
    tolerance: share of a stage's samples that may turn out bad, and be replaced by others, before it stops.
    """

    source: Literal["easy-vqa"] | None = "easy-vqa"
    samples_per_shard: Annotated[int, Ge(1)] = 1000
    sets: dict[str, str] = field(default_factory=dict)
    make: dict[str, Source] = field(default_factory=dict)
    tolerance: Annotated[float, Ge(0), Le(1)] = 0.001

    def __post_init__(self) -> None:
        if missing := self.make.keys() - self.sets.keys():
            raise ValueError(
                f"make: got {min(missing)}, allowed: names of sets, which say where: {', '.join(self.sets)}"
            )
