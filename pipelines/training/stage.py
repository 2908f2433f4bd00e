"""Settings of a training stage in a job file.

The module does not import torch or Ray, so an error in a job file is reported at once.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt, MinLen

from pipelines.data.order import Shuffle
from pipelines.data.packing import Packing
from redux.settings import ImageAspectRatio, ImageBackend, TemplateName

ModelPart = Literal["tower", "projector", "language"]

DEFAULT_TEMPLATE: TemplateName = "vicuna_v1"
"""Conversation template of LLaVA-1.5's second stage."""

DEFAULT_IMAGE_ASPECT_RATIO: ImageAspectRatio = "pad"
"""Conversion of images to squares in LLaVA-1.5's second stage."""


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Low-rank adapters (arXiv 2106.09685) on the linear layers of the language model, trained in place of its weights.

    Args:
        rank: rank of each adapter.
        alpha: scale; the output of an adapter is multiplied by alpha / rank.
        dropout: probability of dropping an input of an adapter while training.
    """

    rank: Annotated[int, Ge(1)] = 128
    alpha: Annotated[float, Gt(0)] = 256
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.05


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Configuration of one training stage.

    Args:
        objective: "contrastive" trains the image tower alone, with CLIP's objective on captions; "language" trains
            LLaVA with next-token prediction.
        data: name of a set of shards, or a mixture: set names with their shares of each global batch.
        template: conversation template. "plain" keeps only image and answer (LLaVA's stage 1), "vicuna_v1" is that of
            its stage 2, "vicuna_bare" the same without system prompt, "chat" the chat template of the language model's
            tokenizer. null takes the template of model.checkpoint, or vicuna_v1 if it has none for questions.
        max_length: number of tokens to which a sample is truncated, as in LLaVA. With null, samples that exceed the
            positions of the model are replaced.
        epochs: passes over all samples of all sets together. Set exactly one of epochs and steps.
        steps: number of global batches. Set exactly one of epochs and steps.
        shuffle: "global" mixes the whole set. "window" mixes the shards, and the samples of `window` shards at a time,
            so that reads stay close together. "none" keeps the stored order.
        window: number of shards whose samples "window" mixes at a time.
        group_by_length: number of global batches whose samples are sorted together. The sorted batches have one
            modality and similar lengths, as in LLaVA (group_by_modality_length). null mixes all samples.
        packing: rows of several conversations, for little padding. Loss and gradients are those without packing, except
            for rounding and the dropout of LoRA. null gives each conversation a row of its own.
        image_aspect_ratio: "pad" pads images to a square (LLaVA's stage 2), "crop" crops them (its stage 1). null takes
            that of model.checkpoint, or pad if it has none.
        image_backend: "exact" computes LLaVA's pixels bit for bit; "fast" differs by one or two grey levels.
        global_batch_size: samples of one optimizer step, over all workers.
        micro_batch_size: samples that one worker computes at a time. With packing it is their mean number: the
            micro-batches of a step then have about equally many tokens. Each has as few rows as packing.max_length
            admits.
        learning_rate: peak learning rate of each part: tower, projector, language. A part without one is frozen.
        lora: adapters that are trained instead of the weights of the language model, with learning_rate.language. null
            trains the weights.
        loss_reduction: "token" averages over the tokens of a global batch; "sample" averages over its samples, each of
            which is the average of its tokens.
        warmup_ratio: share of the steps in which the learning rate rises to its peak. It then falls along a half cosine
            to 0.
        beta2: decay of AdamW's second moment. 0.95 adapts sooner and helps small models with small batches.
        weight_decay: weight decay of AdamW.
        max_grad_norm: norm to which gradients are clipped.
        zero_stage: ZeRO stage of DeepSpeed. 1 partitions optimizer states among workers, 2 also gradients, 3 also
            weights, 0 nothing. With 0 and bf16, gradients are summed in bf16, so results depend slightly on the number
            of workers.
        offload_optimizer: keep optimizer states and fp32 weights in CPU memory, and update them there. Saves GPU memory
            and slows steps down. Requires zero_stage 1, 2 or 3.
        offload_parameters: keep the weights in CPU memory, and copy each layer to the GPU when it is used. Requires
            zero_stage 3.
        precision: "fp32" or "bf16" for weights and activations. The optimizer keeps fp32 weights with both.
        activation_checkpointing: recompute activations in the backward pass instead of keeping them. Saves memory.
        save_steps: steps between checkpoints.
        save_total_limit: number of newest checkpoints that are kept.
        save_best_limit: number of checkpoints that are also kept because their mean training loss since the previous
            checkpoint is lowest.
        validate_steps: steps between validations, which compute the loss of the samples that data.hold_out keeps out of
            training. The last step is validated as well. null is save_steps.
        on_nonfinite: reaction to a NaN or infinite loss or gradient. "skip" skips the update. "rollback" first repeats
            the steps since the last checkpoint, in case of a hardware fault, and skips the update if it happens again.
        max_nonfinite_steps: allowed number of skipped updates; one more stops the stage.
        random_flip: mirror each image with probability 0.5.
        max_rounds: maximum number of question-answer rounds of a sample. They are drawn and shuffled in each epoch, so
            that each question also comes first. null keeps whole conversations.
    """

    objective: Literal["contrastive", "language"]
    data: str | Annotated[dict[str, Annotated[float, Gt(0)]], MinLen(1)]
    template: TemplateName | None = None
    max_length: Annotated[int, Ge(1)] | None = None
    epochs: Annotated[float, Gt(0)] | None = None
    steps: Annotated[int, Ge(1)] | None = None
    shuffle: Shuffle = "global"
    window: Annotated[int, Ge(1)] = 8
    group_by_length: Annotated[int, Ge(1)] | None = None
    packing: Packing | None = None
    image_aspect_ratio: ImageAspectRatio | None = None
    image_backend: ImageBackend = "exact"
    global_batch_size: Annotated[int, Ge(1)]
    micro_batch_size: Annotated[int, Ge(1)]
    learning_rate: dict[ModelPart, Annotated[float, Gt(0)]]
    lora: Lora | None = None
    loss_reduction: Literal["token", "sample"] = "token"
    warmup_ratio: Annotated[float, Ge(0), Le(1)] = 0.03
    beta2: Annotated[float, Ge(0), Lt(1)] = 0.999
    weight_decay: Annotated[float, Ge(0)] = 0.0
    max_grad_norm: Annotated[float, Gt(0)] = 1.0
    zero_stage: Literal[0, 1, 2, 3] = 2
    offload_optimizer: bool = False
    offload_parameters: bool = False
    precision: Literal["fp32", "bf16"] = "fp32"
    activation_checkpointing: bool = False
    save_steps: Annotated[int, Ge(1)] = 100
    save_total_limit: Annotated[int, Ge(1)] = 2
    save_best_limit: Annotated[int, Ge(0)] = 0
    validate_steps: Annotated[int, Ge(1)] | None = None
    on_nonfinite: Literal["skip", "rollback"] = "skip"
    max_nonfinite_steps: Annotated[int, Ge(0)] = 10
    random_flip: bool = False
    max_rounds: Annotated[int, Ge(1)] | None = None

    def __post_init__(self) -> None:
        if not self.learning_rate:
            raise ValueError("learning_rate: got {}, allowed: a rate for at least one of tower, projector, language")
        if (self.epochs is None) == (self.steps is None):
            raise ValueError(f"epochs: got {self.epochs}, and steps {self.steps}, allowed: one of the two")
        # Batches.
        if self.global_batch_size % self.micro_batch_size:
            raise ValueError(
                f"global_batch_size: got {self.global_batch_size}, allowed: a multiple of micro_batch_size, "
                f"{self.micro_batch_size}"
            )
        if self.group_by_length and (self.shuffle != "global" or len(self.mixture) > 1):
            raise ValueError(
                f"group_by_length: got {self.group_by_length} with shuffle {self.shuffle} and {len(self.mixture)} "
                "sets, allowed: null, or shuffle global and one set"
            )
        if self.packing:
            self._check_packing(self.packing)
        # The contrastive objective trains the tower alone.
        if self.objective == "contrastive" and self.micro_batch_size < 2:
            raise ValueError(
                "micro_batch_size: got 1, allowed: at least 2, because a contrastive stage compares samples"
            )
        if self.objective == "contrastive" and set(self.learning_rate) != {"tower"}:
            raise ValueError(
                f"learning_rate: got {self.learning_rate}, allowed: tower alone, which is all that objective "
                "contrastive trains"
            )
        # DeepSpeed offloads what ZeRO divides.
        if self.offload_optimizer and not self.zero_stage:
            raise ValueError("offload_optimizer: got true with zero_stage 0, allowed: false, or zero_stage 1, 2 or 3")
        if self.offload_parameters and self.zero_stage != 3:
            raise ValueError(
                f"offload_parameters: got true with zero_stage {self.zero_stage}, allowed: false, or zero_stage 3"
            )
        if self.lora and "language" not in self.learning_rate:
            raise ValueError("lora: requires learning_rate.language, the learning rate of the adapters")

    def _check_packing(self, packing: Packing) -> None:
        """Raise a ValueError if the stage cannot pack conversations."""
        if self.objective == "contrastive":
            raise ValueError("packing: got one with objective contrastive, allowed: null, or objective language")
        if self.group_by_length:
            raise ValueError(
                f"packing: got one with group_by_length {self.group_by_length}, allowed: null, or group_by_length null"
            )
        if self.max_length and packing.max_length < self.max_length:
            raise ValueError(
                f"packing.max_length: got {packing.max_length}, allowed: at least max_length, {self.max_length}"
            )

    @property
    def mixture(self) -> dict[str, float]:
        """Share of each set, by name."""
        return {self.data: 1.0} if isinstance(self.data, str) else self.data

    def resolve_format(self, template: TemplateName | None, image_aspect_ratio: ImageAspectRatio | None) -> "Stage":
        """Return the stage with a template and an image_aspect_ratio, if it has none.

        Args:
            template: template of the model from which training starts. None and "plain" give that of LLaVA-1.5.
            image_aspect_ratio: image_aspect_ratio of that model. None gives that of LLaVA-1.5.
        """
        template = None if template == "plain" else template
        return replace(
            self,
            template=self.template or template or DEFAULT_TEMPLATE,
            image_aspect_ratio=self.image_aspect_ratio or image_aspect_ratio or DEFAULT_IMAGE_ASPECT_RATIO,
        )

    def count_usable_workers(self, workers: int) -> int:
        """Count the workers, at most so many, that share the global batch evenly."""
        micro_batches = self.global_batch_size // self.micro_batch_size
        return next(count for count in range(min(workers, micro_batches), 0, -1) if micro_batches % count == 0)

    def count_accumulation_steps(self, workers: int) -> int:
        """Count the micro-batches that each worker accumulates per global batch.

        Raises:
            ValueError: the workers cannot share the global batch evenly.
        """
        samples = self.micro_batch_size * workers
        if self.global_batch_size % samples:
            raise ValueError(
                f"global_batch_size: got {self.global_batch_size}, allowed: a multiple of {samples}, "
                f"{workers} workers x micro_batch_size {self.micro_batch_size}"
            )
        return self.global_batch_size // samples


def count_shared_workers(stages: Iterable[Stage], most: int) -> int:
    """Count the workers, at most so many, that share the global batch of every stage evenly."""
    return next(
        count for count in range(most, 0, -1) if all(stage.count_usable_workers(count) == count for stage in stages)
    )


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """Reaction of a run to faults and stops.

    Args:
        restarts: allowed number of consecutive faults without a new step; one more ends the run.
        watchdog_s: seconds without a finished step after which a worker counts as hung and all workers are restarted.
            They must suffice for a whole start (model, checkpoint, first batch) and for the upload of a checkpoint.
        grace_s: seconds that a run gets after SIGTERM for the current step, the next step and a last checkpoint. Most
            schedulers kill a job after 30 seconds or more.
        resize_s: if num_workers is a range, seconds between checks for new or lost machines. A change restarts all
            workers from the last checkpoint.
    """

    restarts: Annotated[int, Ge(0)] = 3
    watchdog_s: Annotated[float, Gt(0)] = 900
    grace_s: Annotated[float, Ge(0)] = 25
    resize_s: Annotated[float, Gt(0)] = 60
