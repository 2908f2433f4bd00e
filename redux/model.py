"""LLaVA with token compression in the image tower (VMTC) and attention inhibition in the language model (CMAI).

transformers' own classes do the work; nothing is added to their weights, so a plain LLaVA checkpoint loads as it is and
what is saved opens in plain transformers.  Two seams are used: the image tower (`redux.tower`) and, by `redux.plugin`,
the attention function of the language model.

Shapes: batch, images, patches, tokens (visual tokens that reach the language model), dim.
"""

import dataclasses
import os
from typing import Any, get_args

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaModel,
    PreTrainedTokenizerBase,
)
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling

from redux.architecture import Language, Model, Tower
from redux.conversation import CONTEXT, IMAGE, TEMPLATES
from redux.hub import fetched
from redux.image import MEAN, STD
from redux.loading import check_layout, check_loading, report_damage
from redux.plugin import inhibit
from redux.settings import FORMER_NAMES, METHODS, CompressionStage, Fit, TemplateName
from redux.tower import CompressingBlock, Compression, Encoding, EncodingTower, extend, is_clip_like
from redux.vmtc import Fate

FEATURES = ("vision_feature_layer", "vision_feature_select_strategy")
"""What of the tower LLaVA reads: fields of its configuration that a call may override."""

PARTS = {"tower": "model.vision_tower", "projector": "model.multi_modal_projector", "language": ""}
"""Parts of the model that train or stay frozen on their own: prefix of their parameters' names; last, the rest."""


class ReduxConfig(LlavaConfig):
    """LlavaConfig, the settings of the method, and how the model was trained.

    Args:
        vmtc, cmai, reduction: settings as dictionaries, read when a model is built; None turns a part off.
        conversation_template: name in `redux.conversation.TEMPLATES` with which the model was trained, None if unknown.
        image_aspect_ratio: how its images became squares, "pad" or "crop"; None if unknown.
    """

    # its signature does not tell that transformers lets it take any other key, which a runtime checker would refuse
    __no_type_check__ = True

    vmtc: dict | None = None
    cmai: dict | None = None
    reduction: dict | None = None
    conversation_template: TemplateName | None = None
    image_aspect_ratio: Fit | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        for name, kind in METHODS.items():
            if isinstance(value := getattr(self, name), kind):
                setattr(self, name, dataclasses.asdict(value))
            elif isinstance(value, dict):
                setattr(self, name, {FORMER_NAMES.get(key, key): setting for key, setting in value.items()})
            elif value is not None:
                raise ValueError(
                    f"{name}: got {value!r}, allowed: redux.{kind.__name__}, a dictionary of its fields or None"
                )
        super().__post_init__(**kwargs)
        layers, read = self.vision_config.num_hidden_layers, self.vision_feature_layer
        for layer in [read] if isinstance(read, int) else read:
            if not -layers - 1 <= layer <= layers:
                raise ValueError(f"vision_feature_layer: got {layer}, allowed: {-layers - 1} to {layers}")
        if self.vmtc is not None and self.reduction is not None:
            raise ValueError("reduction: got one besides vmtc, allowed: one of the two, the other None")
        for name, known in {"conversation_template": tuple(TEMPLATES), "image_aspect_ratio": get_args(Fit)}.items():
            if (value := getattr(self, name)) not in (None, *known):
                raise ValueError(f"{name}: got {value!r}, allowed: {', '.join(known)} or None")
        self.settings("cmai")  # a mistake is told before anything is built
        self.image_seq_length = self.tokens + (self.whole and self.has_class_token)

    def settings(self, name: str) -> Any:
        """The part of the method under a name of `METHODS`, None if off; ValueError for settings it does not have."""
        if (values := getattr(self, name)) is None:
            return None
        known = {field.name for field in dataclasses.fields(METHODS[name])}
        needed = {field.name for field in dataclasses.fields(METHODS[name]) if field.default is dataclasses.MISSING}
        if wrong := (values.keys() - known) | (needed - values.keys()):
            problem = "got" if wrong & values.keys() else "missing"
            raise ValueError(f"{name}: {problem} {', '.join(sorted(wrong))}, allowed: {', '.join(sorted(known))}")
        # JSON, which configurations are saved as, has lists only
        return METHODS[name](
            **{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
        )

    @property
    def patches(self) -> int:
        """Patch tokens of one image before compression."""
        return (self.vision_config.image_size // self.vision_config.patch_size) ** 2

    @property
    def tokens(self) -> int:
        """Visual tokens of one image that reach the language model, a class token apart."""
        if reduction := self.settings("reduction"):
            return reduction.count(self.patches)
        return next((stage.out for stage in reversed(self.stages.values())), self.patches)

    @property
    def whole(self) -> bool:
        """Whether every token of the tower is a feature, a class token among them, or the first is left out."""
        return self.vision_feature_select_strategy == "full"

    @property
    def has_class_token(self) -> bool:
        """Whether the tower puts a class token first, as CLIP's does and SigLIP's does not."""
        return "siglip" not in self.vision_config.model_type

    @property
    def depth(self) -> int:
        """Blocks of the tower that contribute: the layer LLaVA reads, counted from the first block."""
        layer = self.vision_feature_layer
        if not isinstance(layer, int):
            raise ValueError(f"vision_feature_layer: got {layer}, allowed with vmtc or reduction: one layer")
        return layer if layer >= 0 else self.vision_config.num_hidden_layers + 1 + layer

    @property
    def stages(self) -> dict[int, CompressionStage]:
        """The compressing blocks, by block number."""
        vmtc = self.settings("vmtc")
        return {stage.block: stage for stage in vmtc.schedule(self.patches, self.depth)} if vmtc else {}


class ReduxModel(LlavaModel):
    """LlavaModel whose image features are compressed on the way through the tower."""

    config: ReduxConfig

    def __init__(self, config: ReduxConfig) -> None:
        super().__init__(config)
        self.vmtc, self.reduction = config.settings("vmtc"), config.settings("reduction")
        first = int(config.has_class_token)
        self.compressions = {number: Compression(stage, self.vmtc, first) for number, stage in config.stages.items()}
        if self.vmtc or self.reduction:
            self._check_tower()
        if self.runs_blocks:
            self._extend_tower()

    @property
    def runs_blocks(self) -> bool:
        """Whether the tower is run here, block by block: it is of CLIP's build, and one layer of it is read."""
        return isinstance(self.config.vision_feature_layer, int) and is_clip_like(self.vision_tower)

    def _check_tower(self) -> None:
        config, kind = self.config, self.config.vision_config.model_type
        if not self.runs_blocks:
            raise ValueError(
                f"vision_config: got a tower {kind}, allowed with vmtc or reduction: one of CLIP's or SigLIP's build"
            )
        if not (config.has_class_token or config.whole):
            raise ValueError(
                f"vision_feature_select_strategy: got default, allowed: full, as {kind} has no class token to leave out"
            )
        if self.reduction and self.reduction.method == "prumerge":
            last = config.vision_config.num_hidden_layers - 1
            if not config.has_class_token or config.depth != last:
                raise ValueError(
                    "reduction.method: got prumerge, allowed: any other, as that one needs a class token and features "
                    f"of layer {last}, below the last block"
                )

    def _extend_tower(self) -> None:
        """Let the tower and its blocks compress; later also a tower that was put in the first one's place."""
        tower: Any = self.vision_tower
        extend(tower, EncodingTower)
        for number in self.compressions:
            extend(tower.encoder.layers[number], CompressingBlock)
        if self.reduction and self.reduction.method == "prumerge":
            extend(tower.encoder.layers[-1], CompressingBlock)

    def encode_images(
        self, pixel_values: Float[Tensor, "images 3 height width"]
    ) -> tuple[Float[Tensor, "images tokens dim"], Fate]:
        """Features of the layer that LLaVA reads, and where each patch went.

        They begin with the class token where the configuration keeps it (`vision_feature_select_strategy` full).
        """
        self._extend_tower()
        first = int(self.config.has_class_token)
        encoding = Encoding(self.config.depth, first, self.compressions, self.reduction)
        hidden, *fate = self.vision_tower(pixel_values, encoding=encoding)
        return hidden if self.config.whole else hidden[:, first:], Fate(*fate)

    def get_image_features(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """As LlavaModel's: `pooler_output` is a list of (tokens, dim), one an image, projected."""
        others = {name: kwargs[name] for name in FEATURES if kwargs.get(name) not in (None, getattr(self.config, name))}
        if others and (self.vmtc or self.reduction):
            name, value = others.popitem()
            raise ValueError(f"{name}: got {value}, allowed with vmtc or reduction: {getattr(self.config, name)}")
        if not len(pixel_values):
            # a batch of text alone: an image of which nothing is taken, so that the tower has its gradients, zeros, as
            # on ranks with images; without them ranks would wait for each other
            image = self.get_image_features(pixel_values.new_zeros(1, *pixel_values.shape[1:]), **kwargs)
            image.pooler_output = [tokens[:0] for tokens in image.pooler_output]
            return image
        if others or kwargs.get("output_hidden_states") or not self.runs_blocks:
            return super().get_image_features(pixel_values, **kwargs)
        features, _ = self.encode_images(pixel_values)
        return BaseModelOutputWithPooling(features, pooler_output=list(self.multi_modal_projector(features)))


class ReduxForConditionalGeneration(LlavaForConditionalGeneration):
    """LLaVA with VMTC and CMAI; with both off its outputs are bit-equal to LlavaForConditionalGeneration's."""

    config_class = ReduxConfig
    config: ReduxConfig

    def __init__(self, config: ReduxConfig) -> None:
        # past LlavaForConditionalGeneration's own: it would build a second, plain model first
        super(LlavaForConditionalGeneration, self).__init__(config)
        self.model = ReduxModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()
        inhibit(self, config.settings("cmai"))

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike | None, *args: Any, config: Any = None, **kwargs: Any
    ) -> Any:
        """Load a model of ours or a plain LLaVA, with all of its weights, as transformers does.

        Args:
            pretrained_model_name_or_path: folder, hub id or URL (s3://); None for weights in memory (`state_dict`).
            kwargs: transformers' arguments, and `vmtc`, `cmai`, `reduction`: settings in place of those that the
                folder holds; None turns that part off.

        Raises:
            ValueError: weights are missing, unexpected or of another shape.  Of another shape they may be where
                `ignore_mismatched_sizes` is true.
        """
        if pretrained_model_name_or_path is None:
            return super().from_pretrained(None, *args, config=config, **kwargs)
        changes = {name: kwargs.pop(name) for name in (*METHODS, *FEATURES) if name in kwargs}
        with_info, resize = kwargs.pop("output_loading_info", False), kwargs.pop("ignore_mismatched_sizes", False)
        with fetched(pretrained_model_name_or_path) as folder, report_damage(pretrained_model_name_or_path, "path"):
            if config is None or isinstance(config, str | os.PathLike):
                names = ("cache_dir", "revision", "subfolder", "token", "local_files_only")
                where = {name: kwargs[name] for name in names if name in kwargs}
                saved, _ = cls.config_class.get_config_dict(config or folder, **where)
                check_layout(saved, pretrained_model_name_or_path, "path")
                config = cls.config_class.from_pretrained(config or folder, **where)
            config = cls.config_class(**{**config.to_dict(), **changes})
            # a weight of another shape would be a RuntimeError that does not name it
            options = {"ignore_mismatched_sizes": True, "output_loading_info": True, **kwargs}
            model, found = super().from_pretrained(folder, *args, config=config, **options)
        check_loading({**found, "mismatched_keys": set()} if resize else found, pretrained_model_name_or_path, "path")
        return (model, found) if with_info else model

    def parts(self) -> dict[str, list[nn.Parameter]]:
        """Parameters of each part in `PARTS`."""
        result: dict[str, list[nn.Parameter]] = {part: [] for part in PARTS}
        for name, parameter in self.named_parameters():
            result[next(part for part, prefix in PARTS.items() if name.startswith(prefix))].append(parameter)
        return result


# transformers finds the names that older LLaVA checkpoints use by the name of its class
for _ours, _theirs in (("ReduxModel", "LlavaModel"), ("ReduxForConditionalGeneration", "llava")):
    register_checkpoint_conversion_mapping(_ours, get_checkpoint_conversion_mapping(_theirs), overwrite=True)


def normalise(images: UInt8[Tensor, "images 3 height width"]) -> Float[Tensor, "images 3 height width"]:
    """Pixels in 0..255 as CLIP reads them: mean 0 and deviation 1 over its training images."""
    mean, std = (torch.tensor(value, device=images.device).view(3, 1, 1) * 255 for value in (MEAN, STD))
    return (images.float() - mean) / std


def build(model: Model, tokenizer: PreTrainedTokenizerBase) -> ReduxForConditionalGeneration:
    """A new model with random weights (seed torch before) whose vocabulary is the tokenizer's."""
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = configured(model, len(tokenizer), **special)
    config.image_token_index = tokenizer.convert_tokens_to_ids(IMAGE)
    return ReduxForConditionalGeneration(config)


def configured(model: Model, words: int, **special: int) -> ReduxConfig:
    """The configuration of a model from sizes, with a vocabulary of so many words and these special ones."""
    assert isinstance(model.tower, Tower)
    assert isinstance(model.language, Language)
    sizes = dataclasses.asdict(model.language)
    # "small init" (Nguyen & Salazar 2019, arXiv 1910.05895); where dim is small, LLaMA's fixed 0.02 learns far slower
    spread = (2 / (5 * model.language.hidden_size)) ** 0.5
    return ReduxConfig(
        vision_config=vision_config(model.tower).to_dict(),
        text_config=LlamaConfig(vocab_size=words, initializer_range=spread, **sizes, **special).to_dict(),
        **model.methods,
        **special,
    )


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
