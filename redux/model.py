"""LLaVA with token compression in the image tower (VMTC) and attention inhibition in the language model (CMAI).

transformers' own classes do the work. No weights are added, so a plain LLaVA checkpoint loads as it is, and plain
transformers opens what is saved. Code is added at two places: the image tower (`redux.tower`) and, by `redux.plugin`,
the attention function of the language model.

Shapes: batch, images, patches, tokens (visual tokens that reach the language model), dim.
"""

import os
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration, LlavaModel, PreTrainedTokenizerBase
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling

from redux.architecture import ModelSettings
from redux.configuration import ReduxConfig, build_config
from redux.conversation import IMAGE_TOKEN
from redux.graph_encoding import run_tower
from redux.hub import local_copy
from redux.image import CLIP_MEAN, CLIP_STD
from redux.loading import check_layout, check_loading, report_damage
from redux.plugin import inhibit
from redux.settings import METHODS
from redux.tower import (
    BlockCompression,
    CompressingBlock,
    CompressingTower,
    TowerCompression,
    extend_module,
    is_clip_like,
)
from redux.vmtc import PatchAssignment

FEATURE_FIELDS = ("vision_feature_layer", "vision_feature_select_strategy")
"""Fields of LLaVA's configuration that choose features of the tower, and that a call may override."""

PART_PREFIXES = {"tower": "model.vision_tower", "projector": "model.multi_modal_projector", "language": ""}
"""Parts of the model that train or stay frozen separately, and their parameters' prefix; the last has the rest."""


class ReduxModel(LlavaModel):
    """LlavaModel whose image features are compressed inside the tower."""

    config: ReduxConfig

    def __init__(self, config: ReduxConfig) -> None:
        super().__init__(config)
        self.vmtc, self.reduction = config.method_settings("vmtc"), config.method_settings("reduction")
        num_prefix_tokens = int(config.has_class_token)
        self.compressions = {
            number: BlockCompression(stage, self.vmtc, num_prefix_tokens)
            for number, stage in config.compression_stages.items()
        }
        if self.vmtc or self.reduction:
            self._check_tower()
        if self.runs_blocks:
            self._extend_tower()

    @property
    def runs_blocks(self) -> bool:
        """True if `redux.tower` runs the tower block by block: it is of CLIP's build, and one layer of it is read."""
        return isinstance(self.config.vision_feature_layer, int) and is_clip_like(self.vision_tower)

    def _check_tower(self) -> None:
        """Raise a ValueError if VMTC or a reduction cannot work in this tower."""
        config, model_type = self.config, self.config.vision_config.model_type
        if not self.runs_blocks:
            raise ValueError(
                f"vision_config: got a tower {model_type}, allowed with vmtc or reduction: one of CLIP's or SigLIP's "
                "build"
            )
        if not (config.has_class_token or config.keeps_class_token):
            raise ValueError(
                f"vision_feature_select_strategy: got default, allowed: full, because {model_type} has no class token "
                "to leave out"
            )
        if self.reduction and self.reduction.method == "prumerge":
            last = config.vision_config.num_hidden_layers - 1
            if not config.has_class_token or config.num_blocks_used != last:
                raise ValueError(
                    "reduction.method: got prumerge, allowed: any other, because prumerge needs a class token and "
                    f"features of layer {last}, below the last block"
                )

    def _extend_tower(self) -> None:
        """Let the tower and its blocks compress.

        It runs before every encoding, since the caller may have replaced the tower since then.
        """
        tower: Any = self.vision_tower
        extend_module(tower, CompressingTower)
        for number in self.compressions:
            extend_module(tower.encoder.layers[number], CompressingBlock)
        if self.reduction and self.reduction.method == "prumerge":
            extend_module(tower.encoder.layers[-1], CompressingBlock)

    def encode_images(
        self, pixel_values: Float[Tensor, "images 3 height width"], first_token_only: bool = False
    ) -> tuple[Float[Tensor, "images tokens dim"], PatchAssignment]:
        """Compute the features of the layer that LLaVA reads, compressed.

        Args:
            pixel_values: normalised pixels.
            first_token_only: see `TowerCompression`.

        Returns:
            The features, which begin with the class token if `vision_feature_select_strategy` is full; and the visual
            token that holds each patch.
        """
        self._extend_tower()
        num_prefix_tokens = int(self.config.has_class_token)
        compression = TowerCompression(
            self.config.num_blocks_used, num_prefix_tokens, self.compressions, self.reduction, first_token_only
        )
        hidden, *assignment = run_tower(self.vision_tower, pixel_values, compression)
        features = hidden if self.config.keeps_class_token else hidden[:, num_prefix_tokens:]
        return features, PatchAssignment(*assignment)

    def get_image_features(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """Compute projected image features, as LlavaModel does.

        Returns:
            `pooler_output` is a list with one tensor (tokens, dim) for each image.

        Raises:
            ValueError: with VMTC or a reduction, a keyword asks for other features than the configuration.
        """
        overrides = {
            name: kwargs[name] for name in FEATURE_FIELDS if kwargs.get(name) not in (None, getattr(self.config, name))
        }
        if overrides and (self.vmtc or self.reduction):
            name, value = overrides.popitem()
            raise ValueError(f"{name}: got {value}, allowed with vmtc or reduction: {getattr(self.config, name)}")
        # A batch of text alone encodes a token of a blank image, and takes nothing of it. Parameters then have
        # gradients, zeros, and modules run as on ranks with images. Otherwise ranks would wait for each other.
        has_images = len(pixel_values) > 0
        if not has_images:
            pixel_values = pixel_values.new_zeros(1, *pixel_values.shape[1:])
        if overrides or kwargs.get("output_hidden_states") or not self.runs_blocks:
            output = super().get_image_features(pixel_values, **kwargs)
        else:
            features, _ = self.encode_images(pixel_values, first_token_only=not has_images and not self.reduction)
            output = self.project_features(features)
        if not has_images:
            output.pooler_output = [tokens[:0] for tokens in output.pooler_output]
        return output

    def project_features(self, features: Float[Tensor, "images tokens dim"]) -> BaseModelOutputWithPooling:
        """Project features of `encode_images`. Result as of `get_image_features`."""
        projected = self.multi_modal_projector(features)
        # The list must not be empty, since its tensors are joined.
        return BaseModelOutputWithPooling(features, pooler_output=list(projected) or [projected.flatten(0, 1)])


class ReduxForConditionalGeneration(LlavaForConditionalGeneration):
    """LLaVA with VMTC and CMAI; with both off its outputs are bit-equal to LlavaForConditionalGeneration's."""

    config_class = ReduxConfig
    config: ReduxConfig

    def __init__(self, config: ReduxConfig) -> None:
        # LlavaForConditionalGeneration's __init__ is skipped: it would build a second, plain model first.
        super(LlavaForConditionalGeneration, self).__init__(config)
        self.model = ReduxModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()
        inhibit(self, config.method_settings("cmai"))

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike | None, *args: Any, config: Any = None, **kwargs: Any
    ) -> Any:
        """Load a model of this package or a plain LLaVA, with all of its weights, as transformers does.

        Args:
            pretrained_model_name_or_path: folder, hub id or URL (s3://); None for weights in memory (`state_dict`).
            kwargs: transformers' arguments, and `vmtc`, `cmai`, `reduction`: settings that replace those of the
                folder; None turns that part off.

        Raises:
            ValueError: weights are missing, unexpected or of another shape. `ignore_mismatched_sizes` allows another
                shape.
        """
        if pretrained_model_name_or_path is None:
            return super().from_pretrained(None, *args, config=config, **kwargs)
        # Fields of the configuration, which transformers would pass to `__init__`.
        changes = {name: kwargs.pop(name) for name in (*METHODS, *FEATURE_FIELDS) if name in kwargs}
        returns_info = kwargs.pop("output_loading_info", False)
        allows_mismatch = kwargs.pop("ignore_mismatched_sizes", False)
        # transformers asks the hub with a token or a cache of the arguments.
        with (
            local_copy(pretrained_model_name_or_path, asks_hub=False) as folder,
            report_damage(pretrained_model_name_or_path, "path"),
        ):
            # Read the configuration first: the layout of the LLaVA repository would fail later without a clear error.
            if config is None or isinstance(config, str | os.PathLike):
                hub_options = ("cache_dir", "revision", "subfolder", "token", "local_files_only")
                options = {name: kwargs[name] for name in hub_options if name in kwargs}
                saved, _ = cls.config_class.get_config_dict(config or folder, **options)
                check_layout(saved, pretrained_model_name_or_path, "path")
                config = cls.config_class.from_pretrained(config or folder, **options)
            config = cls.config_class(**{**config.to_dict(), **changes})
            # Without ignore_mismatched_sizes a weight of another shape is a RuntimeError that does not name it.
            options = {"ignore_mismatched_sizes": True, "output_loading_info": True, **kwargs}
            model, loading_info = super().from_pretrained(folder, *args, config=config, **options)
        checked = {**loading_info, "mismatched_keys": set()} if allows_mismatch else loading_info
        check_loading(checked, pretrained_model_name_or_path, "path")
        return (model, loading_info) if returns_info else model

    def parameters_by_part(self) -> dict[str, list[nn.Parameter]]:
        """Group the parameters by the part in `PART_PREFIXES` that they belong to."""
        parameters: dict[str, list[nn.Parameter]] = {part: [] for part in PART_PREFIXES}
        for name, parameter in self.named_parameters():
            # The prefix of "language" is empty, so that the last part takes every other name.
            part = next(part for part, prefix in PART_PREFIXES.items() if name.startswith(prefix))
            parameters[part].append(parameter)
        return parameters


# transformers (5.23) looks up the parameter names of older LLaVA checkpoints by the name of the class.
for _redux_name, _llava_name in (("ReduxModel", "LlavaModel"), ("ReduxForConditionalGeneration", "llava")):
    register_checkpoint_conversion_mapping(_redux_name, get_checkpoint_conversion_mapping(_llava_name), overwrite=True)


def normalize_pixels(images: UInt8[Tensor, "images 3 height width"]) -> Float[Tensor, "images 3 height width"]:
    """Scale pixels in 0..255 as CLIP reads them: mean 0 and deviation 1 over its training images."""
    mean, std = (torch.tensor(value, device=images.device).view(3, 1, 1) * 255 for value in (CLIP_MEAN, CLIP_STD))
    return (images.float() - mean) / std


def build_model(model: ModelSettings, tokenizer: PreTrainedTokenizerBase) -> ReduxForConditionalGeneration:
    """Build a model from sizes with random weights and the tokenizer's vocabulary. Seed torch before."""
    special_tokens = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = build_config(model, len(tokenizer), **special_tokens)
    config.image_token_index = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    return ReduxForConditionalGeneration(config)
