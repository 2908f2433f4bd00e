"""Adapters for image-text-to-text models of transformers other than LLaVA.

Such a model is asked with its own processor and chat template. Models that are older than chat templates get the
prompt that their authors publish.

Cost: one generation for a batch, or two if it mixes prompts with and without images.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from redux.generation import Answers, check_batch, ensure_pad_token, generate_greedily
from redux.image import decode_rgb

PROMPTS_BY_MODEL_TYPE = {
    "blip-2": "Question: {} Answer:",  # Li et al. 2023, arXiv 2301.12597, section 4.1, of those with OPT
    "instructblip": "{}",  # Dai et al. 2023, arXiv 2305.06500: instructions in free words, no template around them
    "paligemma": "<image>answer en {}",  # google-research/big_vision, big_vision/configs/proj/paligemma/README.md
}
"""Prompts of models without a chat template, by model_type. None of these models answers without an image."""


@dataclass(frozen=True)
class TransformersModel:
    """An `Answerer` for a model that is not a LLaVA.

    It generates with the checkpoint's own settings, but greedily.

    Args:
        model: an image-text-to-text model of transformers.
        processor: its processor.
    """

    model: Any
    processor: Any

    def __post_init__(self) -> None:
        if not self.processor.chat_template and self.model_type not in PROMPTS_BY_MODEL_TYPE:
            raise ValueError(
                f"model_type: got {self.model_type} without a chat template, allowed without: "
                f"{', '.join(PROMPTS_BY_MODEL_TYPE)}"
            )
        tokenizer = self.processor.tokenizer
        # A decoder continues the last token, so padding goes left. An encoder's padding is harmless at the end; on the
        # left, between BLIP-2's image and text, it would shift T5's positions.
        tokenizer.padding_side = "right" if self.model.config.get_text_config().is_encoder_decoder else "left"
        # A saved padding_side is also forced on InstructBLIP's Q-Former, whose positions count from the left.
        tokenizer.init_kwargs.pop("padding_side", None)
        ensure_pad_token(tokenizer)

    @property
    def model_type(self) -> str:
        """transformers' name of the architecture."""
        return self.model.config.model_type

    def __call__(self, prompts: Sequence[str], images: Sequence[bytes | None], max_new_tokens: int) -> Answers:
        """Answer a batch, see `Answerer`.

        Prompts with and without images are two batches, since not every processor mixes them.
        """
        check_batch(prompts, images)
        order: list[int] = []
        batches: list[Answers] = []
        for has_no_image in (False, True):
            rows = [row for row, image in enumerate(images) if (image is None) == has_no_image]
            if rows:
                inputs = self._build_inputs([prompts[row] for row in rows], [images[row] for row in rows])
                batches.append(
                    generate_greedily(self.model, self.processor.tokenizer, inputs, self._eos_token_ids, max_new_tokens)
                )
                order += rows
        # Put the answers of both batches back into the order of the prompts.
        positions = np.argsort(order)
        texts = [text for batch in batches for text in batch.texts]
        tokens = [count for batch in batches for count in batch.tokens]
        return Answers(
            texts=[texts[position] for position in positions],
            tokens=[tokens[position] for position in positions],
            prefill_s=sum(batch.prefill_s for batch in batches),
            decode_s=sum(batch.decode_s for batch in batches),
        )

    def count_tokens(self, prompt: str) -> int:
        """Count the tokens of a prompt, see `Answerer`."""
        return len(self.processor.tokenizer(prompt)["input_ids"])

    @property
    def _eos_token_ids(self) -> list[int]:
        ids = self.model.generation_config.eos_token_id
        if ids is None:
            ids = self.processor.tokenizer.eos_token_id
        return [ids] if isinstance(ids, int) else list(ids)

    def _build_inputs(self, prompts: Sequence[str], images: Sequence[bytes | None]) -> Mapping[str, Tensor]:
        """Build the model's inputs. Either every prompt has an image, or none has."""
        pictures = [Image.fromarray(decode_rgb(image)) for image in images if image is not None]
        if self.processor.chat_template:
            # One message a prompt: the image first, then the text.
            contents = [
                [*image_contents, {"type": "text", "text": prompt}]
                for prompt, image_contents in zip(prompts, _image_contents(pictures, len(prompts)), strict=True)
            ]
            inputs = self.processor.apply_chat_template(
                [[{"role": "user", "content": content}] for content in contents],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                processor_kwargs={"padding": True},
            )
        elif pictures:
            texts = [PROMPTS_BY_MODEL_TYPE[self.model_type].format(prompt) for prompt in prompts]
            inputs = self.processor(images=pictures, text=texts, padding=True, return_tensors="pt")
        else:
            raise ValueError(f"image: got None, allowed for {self.model_type}: an image with each prompt")
        return inputs.to(self.model.device, self.model.dtype)


def _image_contents(images: Sequence[Image.Image], count: int) -> list[list[dict[str, Any]]]:
    """Build the contents before the text of each of `count` messages."""
    return [[{"type": "image", "image": image}] for image in images] or [[] for _ in range(count)]
