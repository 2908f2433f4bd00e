"""Settings of a training stage, as a job file has them.

Without torch and Ray, so that a mistake in a job file is found at once.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt, MinLen

from pipelines.data.order import Shuffle
from redux.settings import Fit, TemplateName, Way

Part = Literal["tower", "projector", "language"]

TEMPLATE: TemplateName = "vicuna_v1"
FIT: Fit = "pad"
"""Of conversations and images in LLaVA-1.5's second stage."""


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Low-rank adapters in the language model's linear layers (arXiv 2106.09685), trained in place of its weights.

    alpha: the adapters' output is scaled by alpha / rank.
    """

    rank: Annotated[int, Ge(1)] = 128
    alpha: Annotated[float, Gt(0)] = 256
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.05


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Settings of one stage.

    objective: "contrastive" trains the image tower alone, with CLIP's objective on captions; "language" the whole
        LLaVA, with next-token prediction.
    data: the set of shards, or a mixture: names of sets with their shares of each global batch.
    template: of the conversations (objective "language"); null is that of model.checkpoint where it says one with
        questions, else vicuna_v1.
    length: tokens after which a sample is cut off, as LLaVA does; null replaces one that exceeds the model's positions.
    epochs: of all sets together, whatever their shares; or steps: global batches.
    shuffle: "global" takes samples from anywhere; "window" mixes them within `window` shards at a time, which keeps
        reads near each other; "none" leaves them as they are stored.
    groups: batches of one modality and of similar lengths, sorted within so many global batches at a time, as LLaVA
        does for conversations; null mixes them.
    fit: images padded to a square (LLaVA's stage 2) or cropped (its stage 1); null is that of model.checkpoint where
        it says one, else pad.
    pixels: "exact" equals LLaVA's to the bit; "fast" does not, by a grey level or two (redux/image.py).
    learning_rate: peak for each part; a part that is not named is frozen.
    lora: adapters take the place of the language model's weights; its learning rate is then theirs.
    loss: mean over the tokens of a global batch, or over its samples, each counting for the mean of its tokens.
    warmup: share of the steps over which the rate rises to its peak; from there it falls as a half cosine to 0.
    beta2: of AdamW; 0.95 forgets old gradients sooner and helps small models in small batches over plateaus.
    micro_batch: samples a worker computes at once.
    zero: DeepSpeed's ZeRO stage: what is divided among workers. 0 nothing (in bf16 it then adds gradients up in bf16,
        so results depend a little on the number of workers), 1 optimizer states, 2 gradients too, 3 weights too.
    activation_checkpointing: compute activations again in the backward pass instead of keeping them.
    checkpoint_every: steps between checkpoints.  keep_last, keep_best: how many of them stay, the newest and those
        with the lowest mean loss since the checkpoint before.
    nonfinite: what to do when the loss or gradient of a batch is NaN or infinite: "skip" its update, or "rollback" to
        the last checkpoint first, in case the machine was at fault, and skip it if that happens again.
    max_nonfinite: skipped batches after which the stage stops.
    flip: mirror every other image at random.
    rounds: of a conversation, at most so many at a time, drawn anew and in another order each epoch, so that questions
        also come first, without the answers to others before them; null takes conversations as they are.
    """

    objective: Literal["contrastive", "language"]
    data: str | Annotated[dict[str, Annotated[float, Gt(0)]], MinLen(1)]
    template: TemplateName | None = None
    length: Annotated[int, Ge(1)] | None = None
    epochs: Annotated[float, Gt(0)] | None = None
    steps: Annotated[int, Ge(1)] | None = None
    shuffle: Shuffle = "global"
    window: Annotated[int, Ge(1)] = 8
    groups: Annotated[int, Ge(1)] | None = None
    fit: Fit | None = None
    pixels: Way = "exact"
    global_batch: Annotated[int, Ge(1)]
    micro_batch: Annotated[int, Ge(1)]
    learning_rate: dict[Part, Annotated[float, Gt(0)]]
    lora: Lora | None = None
    loss: Literal["token", "sample"] = "token"
    warmup: Annotated[float, Ge(0), Le(1)] = 0.03
    beta2: Annotated[float, Ge(0), Lt(1)] = 0.999
    weight_decay: Annotated[float, Ge(0)] = 0.0
    clip: Annotated[float, Gt(0)] = 1.0
    zero: Literal[0, 1, 2, 3] = 2
    precision: Literal["fp32", "bf16"] = "fp32"
    activation_checkpointing: bool = False
    checkpoint_every: Annotated[int, Ge(1)] = 100
    keep_last: Annotated[int, Ge(1)] = 2
    keep_best: Annotated[int, Ge(0)] = 0
    nonfinite: Literal["skip", "rollback"] = "skip"
    max_nonfinite: Annotated[int, Ge(0)] = 10
    flip: bool = False
    rounds: Annotated[int, Ge(1)] | None = None

    def __post_init__(self) -> None:
        if not self.learning_rate:
            raise ValueError("learning_rate: got {}, allowed: a rate for at least one of tower, projector, language")
        if (self.epochs is None) == (self.steps is None):
            raise ValueError(f"epochs: got {self.epochs}, and steps {self.steps}, allowed: one of the two")
        if self.global_batch % self.micro_batch:
            raise ValueError(
                f"global_batch: got {self.global_batch}, allowed: a multiple of micro_batch, {self.micro_batch}"
            )
        if self.groups and (self.shuffle != "global" or len(self.mixture) > 1):
            raise ValueError(
                f"groups: got {self.groups} with shuffle {self.shuffle} and {len(self.mixture)} sets, allowed: groups "
                "with shuffle global and one set"
            )
        if self.objective == "contrastive" and self.micro_batch < 2:
            raise ValueError("micro_batch: got 1, allowed: at least 2, as objective contrastive compares samples")
        if self.objective == "contrastive" and set(self.learning_rate) != {"tower"}:
            raise ValueError(
                f"learning_rate: got {self.learning_rate}, allowed: tower alone, which is all that objective "
                "contrastive trains"
            )
        if self.lora and "language" not in self.learning_rate:
            raise ValueError("lora: got one, allowed: null, as learning_rate has none for language")

    @property
    def mixture(self) -> dict[str, float]:
        """Shares of the sets by name."""
        return {self.data: 1.0} if isinstance(self.data, str) else self.data

    def resolve_format(self, template: TemplateName | None, fit: Fit | None) -> "Stage":
        """Return the stage with a template and a fit, where it names none.

        Args:
            template, fit: those of the model that training starts from; None, or `plain`, is LLaVA-1.5's.
        """
        template = None if template == "plain" else template
        return replace(self, template=self.template or template or TEMPLATE, fit=self.fit or fit or FIT)

    def usable(self, workers: int) -> int:
        """How many of so many workers share the global batch evenly: the most that do."""
        micro_batches = self.global_batch // self.micro_batch
        return next(count for count in range(min(workers, micro_batches), 0, -1) if micro_batches % count == 0)

    def accumulation(self, workers: int) -> int:
        """Micro-batches that each worker adds up to a global batch.  ValueError where that is no whole number."""
        together = self.micro_batch * workers
        if self.global_batch % together:
            raise ValueError(
                f"global_batch: got {self.global_batch}, allowed: a multiple of {together}, "
                f"{workers} workers x micro_batch {self.micro_batch}"
            )
        return self.global_batch // together


def count_shared_workers(stages: Iterable[Stage], most: int) -> int:
    """Count the workers, at most so many, that share the global batch of every stage evenly."""
    return next(count for count in range(most, 0, -1) if all(stage.usable(count) == count for stage in stages))


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """How a run meets faults.

    restarts: faults in a row, without a step further than any before, after which the run stops.
    watchdog_s: seconds without a finished step after which a worker counts as hung and all are started again. All of a
        start must fit in (loading the model and a checkpoint, the first batch), and the last checkpoint's upload.
    grace_s: after SIGTERM, seconds for the step at hand, the next one and a last checkpoint; schedulers give 30 or
        more before they kill.
    resize_s: for a range of workers, seconds between looks whether machines have come or gone; a change starts all
        workers again from the last checkpoint.
    """

    restarts: Annotated[int, Ge(0)] = 3
    watchdog_s: Annotated[float, Gt(0)] = 900
    grace_s: Annotated[float, Ge(0)] = 25
    resize_s: Annotated[float, Gt(0)] = 60
