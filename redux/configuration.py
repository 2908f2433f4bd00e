"""The configuration of a LLaVA with VMTC and CMAI, and the configurations of models that are built from sizes.

`ReduxConfig` extends transformers' LlavaConfig. A plain LLaVA's config.json loads as it is, and plain transformers
opens what is saved here, without the settings of the method.
"""

import dataclasses
from typing import Any, get_args

from transformers import CLIPTextConfig, CLIPVisionConfig, LlamaConfig, LlavaConfig, PreTrainedTokenizerBase

from redux.architecture import LanguageSizes, ModelSettings, TowerSizes
from redux.conversation import CLIP_MAX_LENGTH
from redux.settings import FORMER_FIELD_NAMES, METHODS, CompressionStage, ImageAspectRatio, TemplateName


class ReduxConfig(LlavaConfig):
    """LlavaConfig, the settings of the method, and the format that the model was trained with.

    Args:
        vmtc, cmai, reduction: settings as dictionaries, or as the dataclasses of `redux.settings`. None turns a part
            off.
        conversation_template: name of the conversation template; None if unknown.
        image_aspect_ratio: "pad" or "crop", the method that made training images square; None if unknown.
    """

    # transformers accepts any other keyword, which the signature does not show; runtime type checkers would refuse it.
    __no_type_check__ = True

    vmtc: dict | None = None
    cmai: dict | None = None
    reduction: dict | None = None
    conversation_template: TemplateName | None = None
    image_aspect_ratio: ImageAspectRatio | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        # Settings are stored as dictionaries, since a configuration is saved as JSON.
        for name, settings_class in METHODS.items():
            value = getattr(self, name)
            if isinstance(value, settings_class):
                setattr(self, name, dataclasses.asdict(value))
            elif isinstance(value, dict):
                setattr(self, name, {FORMER_FIELD_NAMES.get(key, key): setting for key, setting in value.items()})
            elif value is not None:
                raise ValueError(
                    f"{name}: got {value!r}, allowed: redux.{settings_class.__name__}, a dictionary of its fields or "
                    "None"
                )
        # transformers builds vision_config and text_config here; all checks below read them.
        super().__post_init__(**kwargs)
        num_layers, layers_read = self.vision_config.num_hidden_layers, self.vision_feature_layer
        for layer in [layers_read] if isinstance(layers_read, int) else layers_read:
            if not -num_layers - 1 <= layer <= num_layers:
                raise ValueError(f"vision_feature_layer: got {layer}, allowed: {-num_layers - 1} to {num_layers}")
        if self.vmtc is not None and self.reduction is not None:
            raise ValueError("reduction: got one besides vmtc, allowed: one of the two, the other None")
        choices = {"conversation_template": get_args(TemplateName), "image_aspect_ratio": get_args(ImageAspectRatio)}
        for name, allowed in choices.items():
            if (value := getattr(self, name)) not in (None, *allowed):
                raise ValueError(f"{name}: got {value!r}, allowed: {', '.join(allowed)} or None")
        # Read the settings once, so that an error is raised before any weight is built.
        self.method_settings("cmai")
        self.image_seq_length = self.num_visual_tokens + (self.keeps_class_token and self.has_class_token)

    def method_settings(self, name: str) -> Any:
        """Build the settings of one part of the method.

        Args:
            name: a name in `METHODS`.

        Returns:
            VMTC, CMAI or Reduction; None if the part is off.

        Raises:
            ValueError: a field is unknown or missing, or has a value that is not allowed.
        """
        if (values := getattr(self, name)) is None:
            return None
        fields = dataclasses.fields(METHODS[name])
        known = {field.name for field in fields}
        required = {field.name for field in fields if field.default is dataclasses.MISSING}
        if wrong := (values.keys() - known) | (required - values.keys()):
            problem = "got" if wrong & values.keys() else "missing"
            raise ValueError(f"{name}: {problem} {', '.join(sorted(wrong))}, allowed: {', '.join(sorted(known))}")
        # JSON has lists only, the settings have tuples.
        return METHODS[name](
            **{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
        )

    @property
    def num_patches(self) -> int:
        """Patch tokens of one image before compression."""
        return (self.vision_config.image_size // self.vision_config.patch_size) ** 2

    @property
    def num_visual_tokens(self) -> int:
        """Visual tokens of one image that reach the language model, without a class token."""
        if reduction := self.method_settings("reduction"):
            return reduction.count_tokens(self.num_patches)
        return next((stage.num_tokens_out for stage in reversed(self.compression_stages.values())), self.num_patches)

    @property
    def keeps_class_token(self) -> bool:
        """True if every token of the tower is a feature; False if the first one, the class token, is left out."""
        return self.vision_feature_select_strategy == "full"

    @property
    def has_class_token(self) -> bool:
        """True if the tower puts a class token first. CLIP's towers do, SigLIP's do not."""
        return "siglip" not in self.vision_config.model_type

    @property
    def num_blocks_used(self) -> int:
        """Blocks of the tower below the layer that LLaVA reads; blocks above it are never computed."""
        layer = self.vision_feature_layer
        if not isinstance(layer, int):
            raise ValueError(f"vision_feature_layer: got {layer}, allowed with vmtc or reduction: one layer")
        return layer if layer >= 0 else self.vision_config.num_hidden_layers + 1 + layer

    @property
    def compression_stages(self) -> dict[int, CompressionStage]:
        """Stages of VMTC by the number of their block; empty without VMTC."""
        vmtc = self.method_settings("vmtc")
        if vmtc is None:
            return {}
        return {stage.block: stage for stage in vmtc.plan_stages(self.num_patches, self.num_blocks_used)}


def build_config(model: ModelSettings, vocab_size: int, **special_tokens: int) -> ReduxConfig:
    """Build the configuration of a model that starts from sizes.

    Args:
        model: settings with sizes of both parts.
        vocab_size: tokens of the language model.
        special_tokens: bos_token_id, eos_token_id and pad_token_id.
    """
    assert isinstance(model.tower, TowerSizes)
    assert isinstance(model.language, LanguageSizes)
    sizes = dataclasses.asdict(model.language)
    # "small init" (Nguyen & Salazar 2019, arXiv 1910.05895); where dim is small, LLaMA's fixed 0.02 learns far slower.
    spread = (2 / (5 * model.language.hidden_size)) ** 0.5
    return ReduxConfig(
        vision_config=build_vision_config(model.tower).to_dict(),
        text_config=LlamaConfig(vocab_size=vocab_size, initializer_range=spread, **sizes, **special_tokens).to_dict(),
        **model.methods,
        **special_tokens,
    )


def build_vision_config(tower: TowerSizes) -> CLIPVisionConfig:
    """Build transformers' configuration of the image tower."""
    return CLIPVisionConfig(**dataclasses.asdict(tower), projection_dim=tower.hidden_size)


def build_caption_config(tower: TowerSizes, tokenizer: PreTrainedTokenizerBase) -> CLIPTextConfig:
    """Build the text tower for CLIP's objective on short captions: width of the image tower, half of its blocks."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=tower.hidden_size,
        num_hidden_layers=max(tower.num_hidden_layers // 2, 1),
        num_attention_heads=tower.num_attention_heads,
        intermediate_size=tower.intermediate_size,
        projection_dim=tower.hidden_size,
        max_position_embeddings=CLIP_MAX_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
