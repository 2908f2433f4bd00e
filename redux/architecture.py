"""The model section of a job file: sizes of a model to build, or the location of pretrained parts.

Plain Python, as `redux.settings`.
"""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from annotated_types import Ge

from redux.settings import CMAI, METHODS, VMTC, KernelChoice, Reduction


@dataclass(frozen=True, kw_only=True)
class TransformerSizes:
    """Sizes of a transformer.

    Args:
        hidden_size: width.
        num_hidden_layers: number of layers.
        num_attention_heads: attention heads; a divisor of hidden_size.
        intermediate_size: width of the MLP.
    """

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
    """Sizes of an image tower of CLIP's build.

    Args:
        image_size: side of the square images, in pixels.
        patch_size: side of a patch, in pixels; a divisor of image_size.
    """

    image_size: Annotated[int, Ge(1)]
    patch_size: Annotated[int, Ge(1)]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.image_size % self.patch_size:
            raise ValueError(f"patch_size: got {self.patch_size}, allowed: a divisor of image_size, {self.image_size}")
        if self.num_hidden_layers < 2:
            raise ValueError(
                "num_hidden_layers: got 1, allowed: at least 2, because LLaVA reads the layer before the last"
            )


@dataclass(frozen=True, kw_only=True)
class LanguageSizes(TransformerSizes):
    """Sizes of a language model of LLaMA's build.

    Args:
        max_position_embeddings: limit of tokens in a sequence, image tokens included.
    """

    max_position_embeddings: Annotated[int, Ge(1)] = 2048

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hidden_size // self.num_attention_heads % 2:
            raise ValueError(
                f"num_attention_heads: got {self.num_attention_heads}, allowed: one that gives heads of even width, "
                "which rotary positions need"
            )


FromCheckpoint = Literal["checkpoint"]
"""Settings that the checkpoint was saved with."""


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """A model: its parts or a checkpoint, and the modules of the method.

    Args:
        tower: sizes of an image tower to build; or folder, hub id or URL (s3://) of a pretrained one.
        language: sizes of a language model to build; or folder, hub id or URL (s3://) of a pretrained one, or
            package:NAME for the folder of an installed Python package. If `tower` has sizes, contrastive
            stages train it first; then both are joined.
        gguf_file: file in `language` with language model and tokenizer.
        checkpoint: folder, hub id or URL of a whole model, instead of parts. Training requires a LLaVA.
        vmtc: settings of the token compression; null turns it off. "checkpoint" takes those of the checkpoint, or the
            defaults for a model from parts.
        cmai: settings of the attention inhibition; null turns it off. "checkpoint" is as for vmtc.
        reduction: settings of a baseline, instead of vmtc; null turns it off. "checkpoint" takes those of the
            checkpoint, or none for a model from parts.
        kernels: code that computes vmtc and cmai. "auto" takes fused kernels on a GPU where they support the model,
            "plain" none, "fused" requires them. They change results by rounding only.
    """

    tower: TowerSizes | str | None = None
    language: LanguageSizes | str | None = None
    gguf_file: str | None = None
    checkpoint: str | None = None
    vmtc: VMTC | FromCheckpoint | None = "checkpoint"
    cmai: CMAI | FromCheckpoint | None = "checkpoint"
    reduction: Reduction | FromCheckpoint | None = "checkpoint"
    kernels: KernelChoice = "auto"

    def __post_init__(self) -> None:
        # Without a checkpoint "checkpoint" means the defaults.
        defaults = {} if self.checkpoint else {"vmtc": VMTC(), "cmai": CMAI(), "reduction": None}
        for name, value in defaults.items():
            if getattr(self, name) == "checkpoint":
                object.__setattr__(self, name, value)  # The dataclass is frozen
        if self.vmtc and self.reduction and "checkpoint" not in (self.vmtc, self.reduction):
            raise ValueError("reduction: got one besides vmtc, allowed: one of the two, the other null")
        # A checkpoint fixes all sizes, so none of the checks below applies.
        if self.checkpoint:
            if self.tower or self.language or self.gguf_file:
                raise ValueError("checkpoint: got one besides parts of a model, allowed: the one or the other")
            return
        # Both parts are there, and of one kind.
        if not (self.tower and self.language):
            missing = "language" if self.tower else "tower"
            raise ValueError(f"{missing}: got null, allowed: sizes or a pretrained one, or a checkpoint of both")
        if isinstance(self.tower, str) and not isinstance(self.language, str):
            raise ValueError(
                f"language: got sizes beside a tower of {self.tower}, allowed: sizes for both, or a pretrained one"
            )
        if isinstance(self.tower, str):
            return  # redux.pretrained.configure_assembly checks pretrained parts
        if self.gguf_file and not isinstance(self.language, str):
            raise ValueError(f"gguf_file: got {self.gguf_file}, allowed: null, because language is built from sizes")
        # The visual tokens of an image must fit into the language model.
        try:
            tokens = count_image_tokens(self)
        except ValueError as error:
            raise ValueError(f"{'vmtc' if self.vmtc else 'reduction'}.{error}") from None
        if isinstance(self.language, LanguageSizes) and self.language.max_position_embeddings <= tokens:
            raise ValueError(
                f"language.max_position_embeddings: got {self.language.max_position_embeddings}, "
                f"allowed: more than the {tokens} tokens of an image"
            )

    @property
    def is_pretrained(self) -> bool:
        """True if the model or its parts come from checkpoints, so that the first stage starts from a LLaVA."""
        return not isinstance(self.tower, TowerSizes)

    @property
    def has_pretrained_language(self) -> bool:
        """True if the language model, with its tokenizer, comes from a checkpoint."""
        return not isinstance(self.language, LanguageSizes)

    @property
    def methods(self) -> dict[str, Any]:
        """Settings of the method by their names in `METHODS`, without those that the checkpoint decides."""
        return {name: value for name in METHODS if (value := getattr(self, name)) != "checkpoint"}


def count_image_tokens(model: ModelSettings) -> int:
    """Count the visual tokens of one image that reach the language model, for a tower that is built from sizes."""
    assert isinstance(model.tower, TowerSizes)
    patches = (model.tower.image_size // model.tower.patch_size) ** 2
    if isinstance(model.reduction, Reduction):
        return model.reduction.count_tokens(patches)
    if isinstance(model.vmtc, VMTC):
        # LLaVA reads the last but one layer, so that the last block is not in use.
        return model.vmtc.count_tokens_left(patches, model.tower.num_hidden_layers - 1)
    return patches
