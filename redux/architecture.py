"""Sizes of a model that is built from nothing, and where a pretrained one is found: what a job file says of a model.

Plain Python, as `redux.settings`.
"""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from annotated_types import Ge

from redux.settings import CMAI, METHODS, VMTC, Reduction


@dataclass(frozen=True, kw_only=True)
class TransformerSizes:
    """Size of a transformer: width, depth, heads and width of the MLP."""

    hidden_size: Annotated[int, Ge(1)]
    num_hidden_layers: Annotated[int, Ge(1)]
    num_attention_heads: Annotated[int, Ge(1)]
    intermediate_size: Annotated[int, Ge(1)]

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads: got {self.num_attention_heads}, "
                f"allowed: a divisor of hidden_size, {self.hidden_size}"
            )


@dataclass(frozen=True, kw_only=True)
class TowerSizes(TransformerSizes):
    """An image tower of CLIP's kind: square images of image_size pixels, in patches of patch_size pixels."""

    image_size: Annotated[int, Ge(1)]
    patch_size: Annotated[int, Ge(1)]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.image_size % self.patch_size:
            raise ValueError(f"patch_size: got {self.patch_size}, allowed: a divisor of image_size, {self.image_size}")
        if self.num_hidden_layers < 2:
            raise ValueError("num_hidden_layers: got 1, allowed: at least 2, as LLaVA reads the last but one layer")


@dataclass(frozen=True, kw_only=True)
class LanguageSizes(TransformerSizes):
    """A language model of LLaMA's kind."""

    max_position_embeddings: Annotated[int, Ge(1)] = 2048

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hidden_size // self.num_attention_heads % 2:
            raise ValueError(
                f"num_attention_heads: got {self.num_attention_heads}, allowed: one that gives heads of even width, "
                "which rotary positions need"
            )


FromCheckpoint = Literal["own"]


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """A model: its two parts, the modules of the method (null: off), or in VMTC's place a rival of it.

    tower, language: sizes of parts to build from nothing; or folders, hub ids or URLs (s3://) of pretrained ones.
    gguf_file: the file in `language` that holds language model and tokenizer.
    checkpoint: folder, hub id or URL of a whole model in place of parts.  To be trained it must be a LLaVA.
    vmtc, cmai, reduction: "own" is what the checkpoint has; of a model from parts it is both modules at their defaults
        and no reduction.
    """

    tower: TowerSizes | str | None = None
    language: LanguageSizes | str | None = None
    gguf_file: str | None = None
    checkpoint: str | None = None
    vmtc: VMTC | FromCheckpoint | None = "own"
    cmai: CMAI | FromCheckpoint | None = "own"
    reduction: Reduction | FromCheckpoint | None = "own"

    def __post_init__(self) -> None:
        for name, value in {} if self.checkpoint else {"vmtc": VMTC(), "cmai": CMAI(), "reduction": None}.items():
            if getattr(self, name) == "own":
                object.__setattr__(self, name, value)
        if self.vmtc and self.reduction and "own" not in (self.vmtc, self.reduction):
            raise ValueError("reduction: got one besides vmtc, allowed: one of the two, the other null")
        if self.checkpoint:
            if self.tower or self.language or self.gguf_file:
                raise ValueError("checkpoint: got one besides parts of a model, allowed: the one or the other")
            return
        if not (self.tower and self.language):
            missing = "language" if self.tower else "tower"
            raise ValueError(f"{missing}: got null, allowed: sizes or a pretrained one, or a checkpoint of both")
        if isinstance(self.tower, str) != isinstance(self.language, str):
            raise ValueError(
                f"language: got {_describe_part(self.language)} beside a tower of {_describe_part(self.tower)}, allowed: sizes for both, "
                "or pretrained ones"
            )
        if isinstance(self.tower, str) or isinstance(self.language, str):
            return  # redux.pretrained.configured knows the rest
        if self.gguf_file:
            raise ValueError(f"gguf_file: got {self.gguf_file}, allowed: null, as language is built from sizes")
        try:
            tokens = count_image_tokens(self)
        except ValueError as error:
            raise ValueError(f"{'vmtc' if self.vmtc else 'reduction'}.{error}") from None
        if self.language.max_position_embeddings <= tokens:
            raise ValueError(
                f"language.max_position_embeddings: got {self.language.max_position_embeddings}, "
                f"allowed: more than the {tokens} tokens of an image"
            )

    @property
    def is_pretrained(self) -> bool:
        """Whether it, or its parts, are taken from checkpoints."""
        return not isinstance(self.tower, TowerSizes)

    @property
    def methods(self) -> dict[str, Any]:
        """The settings of the method, by their names in `METHODS`, without those that are a checkpoint's own."""
        return {name: value for name in METHODS if (value := getattr(self, name)) != "own"}


def _describe_part(part: TransformerSizes | str) -> str:
    return part if isinstance(part, str) else "sizes"


def count_image_tokens(model: ModelSettings) -> int:
    """Visual tokens of one image that reach the language model, of one that is built from sizes."""
    assert isinstance(model.tower, TowerSizes)
    patches = (model.tower.image_size // model.tower.patch_size) ** 2
    if isinstance(model.reduction, Reduction):
        return model.reduction.count_tokens(patches)
    return (
        model.vmtc.count_tokens_left(patches, model.tower.num_hidden_layers - 1)
        if isinstance(model.vmtc, VMTC)
        else patches
    )
