"""Plan of a training stage: its settings, and the location of everything that it reads and writes.

Values that follow from others are derived, not configured: accumulation steps from the number of workers, steps from
epochs, the learning rate from the step.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from pipelines.core import storage
from pipelines.data import ingest
from pipelines.data.features import StoredFeatures
from pipelines.data.grouping import LengthGroups
from pipelines.data.held_out import select_held_out
from pipelines.data.order import Order
from pipelines.data.shard_index import Shards
from pipelines.data.text_tokenizer import load_text_tokenizer
from pipelines.training.stage import DEFAULT_IMAGE_ASPECT_RATIO, DEFAULT_TEMPLATE, Recovery, Stage
from redux.architecture import ModelSettings
from redux.conversation import TEMPLATES, Template
from redux.settings import ImageAspectRatio, KernelChoice, TemplateName


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """Everything that the driver and the workers of a stage need. Pickles to the workers.

    Args:
        name: name of the stage.
        stage: its settings.
        model: architecture of a new model; None if the stage starts from a pretrained LLaVA.
        seed: seed of weights, order of samples and dropout.
        workers: fewest and most workers; None for as many as fit when the stage begins.
        run: run folder, on the machine of the driver.
        checkpoints: folder or URL that every worker can reach.
        sets: folder or URL of each set of the mixture.
        max_bad_fraction: share of the stage's samples that may be replaced before it stops.
        tokenizer: folder of the tokenizer.
        start: folder or URL of the model from which the stage starts: that of the previous stage or a pretrained one.
            None builds `model` with random weights.
        image_size: side of the images in pixels.
        image_tokens: tokens of an image that reach the language model.
        recovery: reaction to faults and stops.
        job: text of the resolved job file, which each checkpoint contains.
        job_name: name of the job.
        trackers: names of the trackers.
        allow_changes: resume from a checkpoint that was written with other data or another model.
        gpu_share: share of a GPU of each worker.
        kernels: choice between fused kernels and plain code.
        hold_out: share of each set that is held out of training.
        features: folder or URL of the stored features of sets, by name. A stage that trains the tower ignores them.
    """

    name: str
    stage: Stage
    model: ModelSettings | None
    seed: int
    workers: tuple[int, int] | None
    run: Path
    checkpoints: str
    sets: dict[str, str]
    max_bad_fraction: float
    tokenizer: Path
    start: str | None
    image_size: int
    image_tokens: int
    recovery: Recovery = Recovery()
    job: str = ""
    job_name: str = ""
    trackers: tuple[str, ...] = ("tensorboard",)
    allow_changes: bool = False
    gpu_share: float = 1
    kernels: KernelChoice = "auto"
    hold_out: float = 0
    features: dict[str, str] = field(default_factory=dict)

    @property
    def template(self) -> TemplateName:
        """Name of the conversation template."""
        return self.stage.template or DEFAULT_TEMPLATE

    @property
    def image_aspect_ratio(self) -> ImageAspectRatio:
        """Conversion of images to squares: pad or crop."""
        return self.stage.image_aspect_ratio or DEFAULT_IMAGE_ASPECT_RATIO

    @property
    def is_elastic(self) -> bool:
        """True if the number of workers follows the number of machines."""
        fewest, most = self.workers or (1, 1)
        return fewest < most

    def leaves_cpus_to_readers(self, uses_gpus: bool) -> bool:
        """Return False if an elastic group of CPU workers may take all CPUs of the cluster."""
        return uses_gpus or not self.is_elastic

    def with_workers(self, capacity: int) -> "StagePlan":
        """Return the plan with its number of workers decided.

        Args:
            capacity: number of workers that fit into the cluster. Workers that cannot share the global batch evenly are
                left out.
        """
        if self.workers:
            return self
        count = self.stage.count_usable_workers(capacity)
        return replace(self, workers=(count, count))

    @property
    def folder(self) -> str:
        """Folder or URL of this stage's checkpoints."""
        return storage.join(self.checkpoints, self.name)

    @property
    def result(self) -> str:
        """Folder or URL of the model that the stage produces."""
        return storage.join(self.folder, "model")

    def open_sources(self) -> dict[str, Shards]:
        """Open the sets of the mixture.

        Raises:
            ValueError: the images of a set were prepared differently from the settings of the stage.
        """
        sources = {name: Shards(self.sets[name]) for name in self.stage.mixture}
        for name, shards in sources.items():
            self.check_prepared(name, shards.prepared_format)
        return sources

    def check_prepared(self, name: str, prepared: tuple[int, ImageAspectRatio] | None) -> None:
        """Check that the images of a set fit the stage.

        Args:
            name: name of the set.
            prepared: size and aspect ratio setting of its images; None for original images.

        Raises:
            ValueError: the images were prepared differently from the settings of the stage.
        """
        required = (self.image_size, self.image_aspect_ratio)
        if prepared not in (None, required):
            raise ValueError(
                f"train.{self.name}.data: {name} has images prepared as {prepared}, allowed: {required}, the image "
                "size of the tower and image_aspect_ratio, or original images"
            )

    def open_features(self, sources: dict[str, Shards]) -> dict[str, StoredFeatures]:
        """Open the stored features of the mixture; {} if the stage decodes images.

        Raises:
            ValueError: features are missing or were made of other images than the stage trains on. Weights of the tower
                are checked later, when they are loaded.
        """
        stage = self.stage
        if not self.features or "tower" in stage.learning_rate:
            return {}
        if stage.random_flip:
            raise ValueError(
                f"train.{self.name}.random_flip: got true with data.features, allowed: false, because features "
                "are those of images that are not mirrored"
            )
        # A micro-batch has either features or pixels, so all sets with images need features.
        features_by_set = {}
        for name, shards in sources.items():
            if name in self.features:
                features_by_set[name] = StoredFeatures(self.features[name], shards)
            elif shards.has_image.any():
                raise ValueError(
                    f"data.features: got none for {name}, which train.{self.name} mixes with "
                    f"{', '.join(self.features)}; allowed: features of each set with images, or none"
                )
        required = {
            "image_size": self.image_size,
            "image_aspect_ratio": self.image_aspect_ratio,
            "image_backend": stage.image_backend,
            "precision": stage.precision,
            "tokens": self.image_tokens,
        }
        for name, features in features_by_set.items():
            for value, expected in required.items():
                actual = getattr(features.format, value)
                if actual != expected:
                    raise ValueError(
                        f"data.features.{name}: got features with {value} {actual}, allowed for "
                        f"train.{self.name}: {expected}; write them again with `redux shards features`"
                    )
        if len({features.format for features in features_by_set.values()}) > 1:
            raise ValueError(f"data.features: got features of different towers for train.{self.name}, allowed: one")
        return features_by_set

    def build_reader(self, sources: dict[str, Shards] | None = None) -> ingest.Reader:
        """Build the reader of micro-batches, which Ray Data runs.

        Args:
            sources: sets of the mixture; None opens them.
        """
        stage = self.stage
        sources = sources or self.open_sources()
        # Only a single set can be grouped; Stage checks that.
        held_out: tuple[Int[np.ndarray, " samples"], ...] = ()
        if self.hold_out:
            held_out = tuple(select_held_out(len(shards), self.hold_out, name) for name, shards in sources.items())
        groups = None
        if stage.group_by_length:
            [shards] = sources.values()
            rows = held_out[0] if held_out else ()
            modality, lengths = (np.delete(column, rows) for column in (shards.has_image, shards.word_counts))
            groups = LengthGroups.from_columns(modality, lengths, stage.group_by_length)
        sizes = tuple(map(len, sources.values()))
        shard_sizes = tuple(shards.shard_sizes for shards in sources.values()) if stage.shuffle == "window" else ()
        # From here on, samples are counted without the held-out ones.
        if held_out:
            sizes = tuple(size - len(rows) for size, rows in zip(sizes, held_out, strict=True))
            shard_sizes = tuple(map(_subtract_held_out, shard_sizes, held_out))

        # The order of samples is a function of these values alone, not of the number of workers.
        order = Order(
            samples=sizes,
            weights=() if isinstance(stage.data, str) else tuple(stage.data.values()),
            global_batch_size=stage.global_batch_size,
            seed=self.seed,
            shuffle=stage.shuffle,
            window=stage.window,
            shards=shard_sizes,
            groups=groups,
            held_out=held_out,
        )
        # The driver finds the template, since readers load no chat template.
        encode = (
            ingest.make_conversation_encoder(self.load_template(), self.image_tokens, stage.max_length)
            if stage.objective == "language"
            else ingest.encode_caption
        )
        return ingest.Reader(
            sources=sources,
            order=order,
            micro_batch_size=stage.micro_batch_size,
            image_size=self.image_size,
            tokenizer=self.tokenizer,
            encode=encode,
            image_aspect_ratio=self.image_aspect_ratio,
            image_backend=stage.image_backend,
            random_flip=stage.random_flip,
            max_rounds=stage.max_rounds,
            text_tokenizer=load_text_tokenizer(self.tokenizer),
            packing=stage.packing,
            image_tokens=self.image_tokens,
            features=self.open_features(sources),
        )

    def build_validation_readers(self, reader: ingest.Reader) -> list[ingest.Reader]:
        """Build a reader of the held-out samples of each set, whose global batches are micro-batches."""
        # One reader per set: in a mixture, the epochs of sets may end in different batches.
        return [
            replace(
                reader,
                sources={name: shards},
                order=Order(
                    samples=(len(held_out),),
                    global_batch_size=self.stage.micro_batch_size,
                    seed=self.seed,
                    shuffle="none",
                    held_out=(held_out,),
                    validates=True,
                ),
                random_flip=False,
                max_rounds=None,
                packing=None,
            )
            for (name, shards), held_out in zip(reader.sources.items(), reader.order.held_out, strict=True)
        ]

    def load_template(self) -> Template:
        """Load the conversation template; "chat" is that of the tokenizer, which exists when the stage begins.

        Readers get the result, as they do without transformers.

        Raises:
            ValueError: the tokenizer has no chat template, or one that cannot be expressed as a `Template`.
        """
        if self.template in TEMPLATES:
            return TEMPLATES[self.template]
        # Imports torch, which the other templates do not need.
        from transformers import AutoTokenizer

        from redux.chat_template import find_template

        try:
            return find_template(self.template, AutoTokenizer.from_pretrained(self.tokenizer))
        except ValueError as error:
            raise ValueError(f"train.{self.name}.{error}") from None

    def count_steps(self, order: Order) -> int:
        """Count the global batches of the stage."""
        return self.stage.steps or order.count_batches(self.stage.epochs or 0)


def _subtract_held_out(
    shard_sizes: Int[np.ndarray, " shards"], held_out: Int[np.ndarray, " samples"]
) -> Int[np.ndarray, " shards"]:
    """Subtract the held-out samples of each shard from its number of samples."""
    # The shard of each held-out sample.
    shard = np.searchsorted(np.cumsum(shard_sizes), held_out, side="right")
    return shard_sizes - np.bincount(shard, minlength=len(shard_sizes))


class StageWork(NamedTuple):
    """Work of the workers in one stage.

    Args:
        plan: plan of the stage, with its number of workers.
        reader: reader of its micro-batches.
        steps: number of its global batches.
    """

    plan: StagePlan
    reader: ingest.Reader
    steps: int


@dataclass(frozen=True)
class LearningRateSchedule:
    """Share of the peak learning rate at a step, counted from 0: linear warm-up, then half a cosine down to 0.

    Args:
        steps: number of steps of the stage.
        warmup: share of the steps in which the rate rises.
    """

    steps: int
    warmup: float

    def __call__(self, step: int) -> float:
        rising = max(round(self.steps * self.warmup), 1)
        if step < rising:
            return (step + 1) / rising
        return float(0.5 * (1 + np.cos(np.pi * min((step - rising) / max(self.steps - rising, 1), 1.0))))
