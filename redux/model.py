"""LLaVA with token compression in the image tower (VMTC) and attention inhibition in the language model (CMAI).

transformers' own classes do the work; nothing is added to their weights, so a plain LLaVA checkpoint loads as it is and
what is saved opens in plain transformers.  Two seams are used: the image features (the tower's blocks are run here, one
by one, up to the layer that LLaVA reads: the block above it is never computed) and the attention function of the
language model.

Shapes: batch, images, patches, tokens (visual tokens that reach the language model), dim.
"""

import dataclasses
from typing import Annotated, Any

import torch
from annotated_types import Ge
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    CLIPTextConfig,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling

from redux.cmai import ATTENTION, CMAI, FocusCache, Inhibition
from redux.conversation import CONTEXT, IMAGE
from redux.image import MEAN, STD
from redux.vmtc import VMTC, Fate, Stage, compress, importance

PARTS = {"tower": "model.vision_tower", "projector": "model.multi_modal_projector", "language": ""}
"""Parts of the model that train or stay frozen on their own: prefix of their parameters' names; last, the rest."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Transformer:
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tower(Transformer):
    """An image tower of CLIP's kind: square images of image_size pixels, in patches of patch_size pixels."""

    image_size: Annotated[int, Ge(1)]
    patch_size: Annotated[int, Ge(1)]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.image_size % self.patch_size:
            raise ValueError(f"patch_size: got {self.patch_size}, allowed: a divisor of image_size, {self.image_size}")
        if self.num_hidden_layers < 2:
            raise ValueError("num_hidden_layers: got 1, allowed: at least 2, as LLaVA reads the last but one layer")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Language(Transformer):
    """A language model of LLaMA's kind."""

    max_position_embeddings: Annotated[int, Ge(1)] = 2048

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hidden_size // self.num_attention_heads % 2:
            raise ValueError(
                f"num_attention_heads: got {self.num_attention_heads}, allowed: one that gives heads of even width, "
                "which rotary positions need"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """A model to build from nothing: its sizes, the two modules (null: off)."""

    tower: Tower
    language: Language
    vmtc: VMTC | None = VMTC()
    cmai: CMAI | None = CMAI()

    def __post_init__(self) -> None:
        try:
            tokens = image_tokens(self)
        except ValueError as error:
            raise ValueError(f"vmtc.{error}") from None
        if self.language.max_position_embeddings <= tokens:
            raise ValueError(
                f"language.max_position_embeddings: got {self.language.max_position_embeddings}, "
                f"allowed: more than the {tokens} tokens of an image"
            )


class ReduxConfig(LlavaConfig):
    """LlavaConfig and the settings of the two modules, as dictionaries; None turns a module off."""

    # its signature does not tell that transformers lets it take any other key, which a runtime checker would refuse
    __no_type_check__ = True

    vmtc: dict | None = None
    cmai: dict | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.image_seq_length = self.vmtc_settings.tokens(self.patches, self.depth) if self.vmtc else self.patches

    @property
    def vmtc_settings(self) -> VMTC:
        """VMTC of this model; ValueError or TypeError for settings it does not have."""
        return VMTC(**(self.vmtc or {}))

    @property
    def patches(self) -> int:
        """Patch tokens of one image before compression."""
        return (self.vision_config.image_size // self.vision_config.patch_size) ** 2

    @property
    def depth(self) -> int:
        """Blocks of the tower that contribute: the layer LLaVA reads, counted from the first block."""
        layer = self.vision_feature_layer
        return layer if layer >= 0 else self.vision_config.num_hidden_layers + 1 + layer

    @property
    def stages(self) -> dict[int, Stage]:
        """The compressing blocks, by block number."""
        return {s.block: s for s in self.vmtc_settings.schedule(self.patches, self.depth)} if self.vmtc else {}


class ReduxModel(LlavaModel):
    """LlavaModel whose image features are compressed on the way through the tower."""

    config: ReduxConfig

    def encode_images(
        self, pixel_values: Float[Tensor, "images 3 height width"]
    ) -> tuple[Float[Tensor, "images tokens dim"], Fate]:
        """Features of the layer that LLaVA reads, class token dropped, and where each patch went."""
        tower: Any = self.vision_tower
        stages = self.config.stages
        hidden = tower.pre_layrnorm(tower.embeddings(pixel_values))
        fate = Fate.untouched(hidden.shape[0], hidden.shape[1] - 1, hidden.device)
        for number, block in enumerate(tower.encoder.layers[: self.config.depth]):
            if number in stages:
                hidden, fate = self._compressing_block(block, hidden, stages[number], fate)
            else:
                hidden = block(hidden, attention_mask=None)
        return hidden[:, 1:], fate

    def _compressing_block(
        self, block: Any, hidden: Float[Tensor, "images all dim"], stage: Stage, fate: Fate
    ) -> tuple[Float[Tensor, "images fewer dim"], Fate]:
        """One ViT block (eq. 1, 2) with VMTC between attention and MLP.

        Queries, keys and values are computed once and serve both the attention and the importance score.
        Shapes: all = patches + 1, fewer = out + 1, with the class token.
        """
        attention = block.self_attn
        normed = block.layer_norm1(hidden)
        query, key, value = (
            project(normed).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
            for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        mixed = F.scaled_dot_product_attention(query, key, value, scale=attention.scale)
        hidden = hidden + attention.out_proj(mixed.transpose(1, 2).flatten(2))
        ips = importance(query[:, :, :1], key, attention.scale)
        patches, slot, cluster = compress(hidden[:, 1:], ips, stage, self.config.vmtc_settings)
        hidden = torch.cat([hidden[:, :1], patches], dim=1)
        return hidden + block.mlp(block.layer_norm2(hidden)), fate.then(slot, cluster)

    def get_image_features(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """As LlavaModel's: `pooler_output` is a list of (tokens, dim), one an image, projected."""
        features, _ = self.encode_images(pixel_values)
        projected = self.multi_modal_projector(features)
        return BaseModelOutputWithPooling(last_hidden_state=features, pooler_output=list(projected))


class ReduxForConditionalGeneration(LlavaForConditionalGeneration):
    """LLaVA with VMTC and CMAI; with both off its outputs are bit-equal to LlavaForConditionalGeneration's."""

    config_class = ReduxConfig
    config: ReduxConfig

    def __init__(self, config: ReduxConfig) -> None:
        # past LlavaForConditionalGeneration's own: it would build a second, plain model first
        super(LlavaForConditionalGeneration, self).__init__(config)
        self.model = ReduxModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.ratios = CMAI(**config.cmai).ratios(config.text_config.num_hidden_layers) if config.cmai else ()
        self.post_init()
        if self.ratios:
            self.set_attn_implementation({"text_config": ATTENTION})

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> Any:
        """As LlavaForConditionalGeneration's; CMAI needs `input_ids`, since they tell image tokens from text."""
        if self.ratios:
            if input_ids is None:
                raise ValueError("input_ids: got None, allowed: token ids, which tell CMAI image tokens from text")
            caching = self.config.text_config.use_cache if use_cache is None else use_cache
            # recomputation would write a second time into a cache; transformers' layers take theirs away as well
            recomputing = self.training and self.is_activation_checkpointing
            if past_key_values is None and caching and not recomputing:
                past_key_values = FocusCache(config=self.config.text_config)
            if not isinstance(past_key_values, FocusCache | None):
                kind = type(past_key_values).__name__
                raise ValueError(f"past_key_values: got {kind}, allowed: redux.cmai.FocusCache")
            image = input_ids == self.config.image_token_id
            kwargs["inhibition"] = Inhibition.of(self.ratios, image, past_key_values)
        return super().forward(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers' generate, on a cache that also holds CMAI's focus."""
        if self.ratios and kwargs.get("use_cache", True) and kwargs.get("past_key_values") is None:
            kwargs["past_key_values"] = FocusCache(config=self.config.text_config)
        return super().generate(*args, **kwargs)

    def parts(self) -> dict[str, list[nn.Parameter]]:
        """Parameters of each part in `PARTS`."""
        result: dict[str, list[nn.Parameter]] = {part: [] for part in PARTS}
        for name, parameter in self.named_parameters():
            result[next(part for part, prefix in PARTS.items() if name.startswith(prefix))].append(parameter)
        return result


def normalise(images: UInt8[Tensor, "images 3 height width"]) -> Float[Tensor, "images 3 height width"]:
    """Pixels in 0..255 as CLIP reads them: mean 0 and deviation 1 over its training images."""
    mean, std = (torch.tensor(value, device=images.device).view(3, 1, 1) * 255 for value in (MEAN, STD))
    return (images.float() - mean) / std


def image_tokens(model: Model) -> int:
    """Visual tokens of one image that reach the language model."""
    patches = (model.tower.image_size // model.tower.patch_size) ** 2
    return model.vmtc.tokens(patches, model.tower.num_hidden_layers - 1) if model.vmtc else patches


def build(model: Model, tokenizer: PreTrainedTokenizerBase) -> ReduxForConditionalGeneration:
    """A new model with random weights (seed torch before) whose vocabulary is the tokenizer's."""
    sizes = dataclasses.asdict(model.language)
    # "small init" (Nguyen & Salazar 2019, arXiv 1910.05895); where dim is small, LLaMA's fixed 0.02 learns far slower
    spread = (2 / (5 * model.language.hidden_size)) ** 0.5
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = ReduxConfig(
        vision_config=vision_config(model.tower).to_dict(),
        text_config=LlamaConfig(vocab_size=len(tokenizer), initializer_range=spread, **sizes, **special).to_dict(),
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        vmtc=dataclasses.asdict(model.vmtc) if model.vmtc else None,
        cmai=dataclasses.asdict(model.cmai) if model.cmai else None,
        **special,
    )
    return ReduxForConditionalGeneration(config)


def vision_config(tower: Tower) -> CLIPVisionConfig:
    """transformers' configuration of the image tower."""
    return CLIPVisionConfig(**dataclasses.asdict(tower), projection_dim=tower.hidden_size)


def caption_config(tower: Tower, tokenizer: PreTrainedTokenizerBase) -> CLIPTextConfig:
    """A text tower of the image tower's width and half its depth, for CLIP's objective on short captions."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=tower.hidden_size,
        num_hidden_layers=max(tower.num_hidden_layers // 2, 1),
        num_attention_heads=tower.num_attention_heads,
        intermediate_size=tower.intermediate_size,
        projection_dim=tower.hidden_size,
        max_position_embeddings=CONTEXT,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
