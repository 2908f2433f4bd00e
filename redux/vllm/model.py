"""A LLaVA with VMTC in vLLM: its tower and projector are those of `redux.model`, its language model is vLLM's.

VMTC leaves each image the same number of tokens, so that vLLM knows the length of a prompt before it runs the tower.
Every rank of tensor parallelism has the whole tower, which needs all heads for the importance scores. Images are
prepared as in training, from the bytes of their file: vLLM would rotate them by EXIF and put transparency on white.
"""

import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import BatchFeature
from vllm.config import VllmConfig
from vllm.model_executor.models.interfaces import SupportsMultiModal, SupportsPP
from vllm.model_executor.models.utils import (
    AutoWeightsLoader,
    WeightsMapper,
    init_vllm_registered_model,
    maybe_prefix,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.image import open_image
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.media import MediaWithBytes
from vllm.multimodal.parse import ImageProcessorItems, MultiModalDataParser
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    PromptReplacement,
)

from redux.answering import resolve_format
from redux.conversation import IMAGE_TOKEN
from redux.image import square_pixels
from redux.model import normalize_pixels
from redux.vllm.configuration import build_image_encoder, check_config


class EncodedImageItems(ImageProcessorItems):
    """Images of a request, which keep the bytes of their files."""

    def get(self, index: int) -> Any:
        return self.data[index]


class EncodedImageParser(MultiModalDataParser):
    """Parser of a request's images."""

    def _parse_image_data(self, data: Any) -> Any:
        items = super()._parse_image_data(data)
        if items is None or isinstance(items, ImageProcessorItems):
            return items and EncodedImageItems(items.data)
        raise ValueError("image: got embeddings, allowed: images")


class ReduxProcessingInfo(BaseProcessingInfo):
    """Limits and number of image tokens of a model."""

    def __init__(self, ctx: Any) -> None:
        super().__init__(ctx)
        try:
            self.config = check_config(ctx.get_hf_config())
            _, self.image_aspect_ratio = resolve_format(self.config.to_dict())
        except ValueError as error:  # vLLM (0.32) would take it for a model without images, and go on
            raise RuntimeError(str(error)) from error

    def get_data_parser(self) -> MultiModalDataParser:
        return EncodedImageParser()

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {"image": None}

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        return {"image": self.config.image_seq_length}


class ReduxDummyInputs(BaseDummyInputsBuilder):
    """Inputs with which vLLM measures memory."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        return IMAGE_TOKEN * mm_counts.get("image", 0)

    def get_dummy_mm_data(self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Any) -> Any:
        side = self.info.config.vision_config.image_size
        return {"image": [Image.new("RGB", (side, side))] * mm_counts.get("image", 0)}


class ReduxMultiModalProcessor(BaseMultiModalProcessor):
    """Processor that prepares the images of a request and makes room for their tokens in its prompt."""

    def _call_hf_processor(self, hf_data: Mapping[str, Any], hf_kwargs: Mapping[str, Any]) -> BatchFeature:
        size, aspect_ratio = self.info.config.vision_config.image_size, self.info.image_aspect_ratio
        pixels = [square_pixels(decode_image(image), size, aspect_ratio) for image in hf_data["images"]]
        return BatchFeature({"pixel_values": torch.from_numpy(np.stack(pixels))})

    def _get_mm_fields_config(self, hf_inputs: Any, hf_processor_mm_kwargs: Any) -> Any:
        return {"pixel_values": MultiModalFieldConfig.batched("image")}

    def _get_prompt_updates(self, mm_items: Any, hf_processor_mm_kwargs: Any, out_mm_kwargs: Any) -> Sequence[Any]:
        token, count = self.info.config.image_token_index, self.info.config.image_seq_length
        return [PromptReplacement(modality="image", target=[token], replacement=[token] * count)]


def decode_image(image: Any) -> np.ndarray:
    """Decode an image of a request to RGB as `redux.image.decode_rgb`, in the file formats that vLLM allows."""
    if isinstance(image, MediaWithBytes):
        image = open_image(io.BytesIO(image.original_bytes))
    return np.array(image.convert("RGB") if isinstance(image, Image.Image) else image)


@MULTIMODAL_REGISTRY.register_processor(
    ReduxMultiModalProcessor, info=ReduxProcessingInfo, dummy_inputs=ReduxDummyInputs
)
class ServedRedux(nn.Module, SupportsMultiModal, SupportsPP):
    """The model in vLLM, see `redux.model.ReduxForConditionalGeneration`."""

    hf_to_vllm_mapper = WeightsMapper(
        # Towers of CLIP have this part in their names in some checkpoints.
        orig_to_new_substr={"vision_tower.vision_model.": "vision_tower."},
        orig_to_new_prefix={
            "lm_head.": "language_model.lm_head.",
            "model.language_model.": "language_model.model.",
            "model.multi_modal_projector.": "images.multi_modal_projector.",
            "model.vision_tower.": "images.vision_tower.",
            "multi_modal_projector.": "images.multi_modal_projector.",
            "vision_tower.": "images.vision_tower.",
        },
    )

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str:
        """Return the text of an image in a prompt that vLLM writes without the chat template's image parts."""
        return IMAGE_TOKEN

    def __init__(self: Any, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = check_config(vllm_config.model_config.hf_config)
        self.configure_mm_token_handling(config.text_config.vocab_size, [config.image_token_index])
        with self._mark_tower_model(vllm_config, "image"):
            self.images = build_image_encoder(config)
        with self._mark_language_model(vllm_config):
            self.language_model = init_vllm_registered_model(
                vllm_config=vllm_config,
                hf_config=vllm_config.model_config.hf_config.text_config,
                prefix=maybe_prefix(prefix, "language_model"),
            )
        self.make_empty_intermediate_tensors = self.language_model.make_empty_intermediate_tensors

    def embed_multimodal(self, **kwargs: Any) -> list[Tensor]:
        """Compute the tokens (tokens, dim) of each image of a batch of requests."""
        pixels = kwargs.get("pixel_values")
        if pixels is None:
            return []
        normalized = normalize_pixels(pixels).to(next(self.images.parameters()).dtype)
        return self.images.get_image_features(normalized).pooler_output

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the language model on embeddings, in which the images' tokens are already in their places."""
        return self.language_model.model(input_ids, positions, intermediate_tensors, inputs_embeds=inputs_embeds)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """Compute logits from the output of `forward`."""
        return self.language_model.compute_logits(hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load the weights of a checkpoint and return their names."""
        return AutoWeightsLoader(self).load_weights(weights, mapper=self.hf_to_vllm_mapper)
