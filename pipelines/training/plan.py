"""Plan of a training stage for its workers: its settings, and where everything lies.

What follows from other values is derived, not configured: accumulation from the number of workers, steps from epochs,
learning rate from the step.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.core import storage
from pipelines.data import ingest
from pipelines.data.grouping import LengthGroups
from pipelines.data.order import Order
from pipelines.data.shard_index import Shards
from pipelines.training.stage import FIT, TEMPLATE, Recovery, Stage
from redux.architecture import Model
from redux.settings import Fit, TemplateName


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All that the workers of a stage need to know.

    workers: fewest and most of them; None is as many as fit when the stage begins.
    gpu_share: of a GPU, for each worker.
    checkpoints: folder or URL that every worker can reach.
    sets: where each set of the mixture lies.
    start: the model to begin with, that of the stage before or a pretrained one; None builds `model` from nothing.
    image_size, image_tokens: pixels of a side, and tokens that reach the language model.
    tolerance: share of the stage's samples that may be replaced before it stops.
    job: the whole job file as resolved; it goes into each checkpoint.  title: the job's name.
    trackers: where its numbers are shown.
    changed: go on from a checkpoint of other data or another model.
    """

    name: str
    stage: Stage
    model: Model | None
    seed: int
    workers: tuple[int, int] | None
    run: Path
    checkpoints: str
    sets: dict[str, str]
    tolerance: float
    tokenizer: Path
    start: str | None
    image_size: int
    image_tokens: int
    recovery: Recovery = Recovery()
    job: str = ""
    title: str = ""
    trackers: tuple[str, ...] = ("tensorboard",)
    changed: bool = False
    gpu_share: float = 1

    @property
    def template(self) -> TemplateName:
        """Of the conversations."""
        return self.stage.template or TEMPLATE

    @property
    def image_aspect_ratio(self) -> Fit:
        """How images become squares."""
        return self.stage.image_aspect_ratio or FIT

    @property
    def elastic(self) -> bool:
        """Whether the number of workers follows that of the machines."""
        fewest, most = self.workers or (1, 1)
        return fewest < most

    def with_workers(self, places: int) -> "Plan":
        """Return the plan with its number of workers decided.

        places: how many fit; those that cannot share the global batch evenly are left out.
        """
        if self.workers:
            return self
        count = self.stage.usable(places)
        return replace(self, workers=(count, count))

    @property
    def folder(self) -> str:
        """Where this stage's checkpoints lie."""
        return storage.join(self.checkpoints, self.name)

    @property
    def result(self) -> str:
        """The model that the stage makes."""
        return storage.join(self.folder, "model")

    def sources(self) -> dict[str, Shards]:
        """The sets of the mixture.  ValueError where images were prepared in another way than the stage wants."""
        sources = {name: Shards(self.sets[name]) for name in self.stage.mixture}
        for name, shards in sources.items():
            self.check_prepared(name, shards.prepared_format)
        return sources

    def check_prepared(self, name: str, prepared: tuple[int, Fit] | None) -> None:
        """ValueError where a set's images were prepared in another way than the stage wants; None: as they came."""
        wanted = (self.image_size, self.image_aspect_ratio)
        if prepared not in (None, wanted):
            raise ValueError(
                f"train.{self.name}.data: {name} has images prepared as {prepared}, allowed: {wanted}, by the image "
                "tower's size and fit, or images as they came"
            )

    def reader(self) -> ingest.Reader:
        """What Ray Data reads."""
        stage, sources = self.stage, self.sources()
        groups = None
        if stage.group_by_length:
            [shards] = sources.values()
            groups = LengthGroups.from_columns(shards.has_image, shards.word_counts, stage.group_by_length)
        order = Order(
            samples=tuple(map(len, sources.values())),
            weights=() if isinstance(stage.data, str) else tuple(stage.data.values()),
            global_batch_size=stage.global_batch_size,
            seed=self.seed,
            shuffle=stage.shuffle,
            window=stage.window,
            shards=tuple(shards.shard_sizes for shards in sources.values()) if stage.shuffle == "window" else (),
            groups=groups,
        )
        language = stage.objective == "language"
        return ingest.Reader(
            sources=sources,
            order=order,
            micro_batch_size=stage.micro_batch_size,
            image_size=self.image_size,
            tokenizer=self.tokenizer,
            encode=ingest.make_conversation_encoder(self.template, self.image_tokens, stage.max_length)
            if language
            else ingest.encode_caption,
            image_aspect_ratio=self.image_aspect_ratio,
            image_backend=stage.image_backend,
            random_flip=stage.random_flip,
            max_rounds=stage.max_rounds,
        )

    def steps(self, order: Order) -> int:
        """Global batches of the stage."""
        return self.stage.steps or order.count_batches(self.stage.epochs or 0)

    def identity(self) -> dict[str, Any]:
        """What a checkpoint of this stage goes with, beside its own settings: the contents of the sets."""
        return {name: shards.fingerprint for name, shards in self.sources().items()}


@dataclass(frozen=True)
class Schedule:
    """Share of the peak learning rate at a step (from 0): linear warm-up, then half a cosine down to 0."""

    steps: int
    warmup: float

    def __call__(self, step: int) -> float:
        rising = max(round(self.steps * self.warmup), 1)
        if step < rising:
            return (step + 1) / rising
        return float(0.5 * (1 + np.cos(np.pi * min((step - rising) / max(self.steps - rising, 1), 1.0))))
