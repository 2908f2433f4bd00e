"""Trace of an answer: the visual token of each patch, and the tokens that each word could attend to.

The answer is read again with its conversation, in one forward pass without a cache, whose decisions are those of
decoding. Nothing slows down the generation itself.

Shapes: patches, words (tokens of the answer), tokens (visual tokens of all images, in their order).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from PIL import Image

from redux.answering import TrainedLlava, build_inputs
from redux.attention import ATTENTION_NAME, AttentionRecorder, record_attention
from redux.attention_mass import AttentionMass
from redux.chat import ChatModel, EncodedChat
from redux.cmai import record_decisions
from redux.conversation import IGNORE_INDEX, IMAGE_TOKEN, encode_conversation
from redux.image import load_pixels
from redux.model import ReduxForConditionalGeneration
from redux.picture import draw_patches


@dataclass(frozen=True)
class ImageTrace:
    """Compression of an image.

    Args:
        image: the image as the model sees it.
        token_of_patch: visual token of each patch, -1 if it was dropped.
        merged: True for patches of a cluster.
    """

    image: Image.Image
    token_of_patch: Int[np.ndarray, "patches"]
    merged: Bool[np.ndarray, "patches"]

    @property
    def num_tokens(self) -> int:
        """Visual tokens of the image."""
        return len(np.unique(self.token_of_patch[self.token_of_patch >= 0]))

    def draw(self, size: int = 256) -> Image.Image:
        """Draw kept and merged patches over the image, about `size` pixels a side."""
        return draw_patches(self.image, self.token_of_patch, self.merged, size)


@dataclass(frozen=True)
class AnswerTrace:
    """Trace of an answer.

    Args:
        images: compression of each image.
        words: text that each token of the answer adds; "" for the end token.
        allowed: share of the layers, and of their heads, in which CMAI lets the word attend to the visual token; 1
            without CMAI.
    """

    images: tuple[ImageTrace, ...]
    words: tuple[str, ...]
    allowed: Float[np.ndarray, "words tokens"]

    def spread_over_patches(self, word: int, image: int) -> Float[np.ndarray, "patches"]:
        """Return `allowed` of a word for each patch of an image; 0 for dropped patches."""
        start = sum(trace.num_tokens for trace in self.images[:image])
        trace = self.images[image]
        image_columns = self.allowed[word, start : start + trace.num_tokens]
        return np.where(trace.token_of_patch >= 0, image_columns[trace.token_of_patch], 0.0)


def trace_images(model: ChatModel, chat: EncodedChat) -> tuple[ImageTrace, ...]:
    """Encode the images of a conversation again, and return their compression."""
    if not chat.pixels:
        return ()
    pixel_values = model.build_inputs([chat])["pixel_values"]
    with torch.inference_mode():
        _, assignment = model.model.model.encode_images(pixel_values)
    return tuple(
        ImageTrace(Image.fromarray(pixels.transpose(1, 2, 0)), token_of_patch, merged)
        for pixels, token_of_patch, merged in zip(
            chat.pixels, assignment.token_of_patch.cpu().numpy(), assignment.merged.cpu().numpy(), strict=True
        )
    )


def trace_answer(model: ChatModel, chat: EncodedChat, tokens: Sequence[int]) -> AnswerTrace:
    """Read an answer again and record what the method did for it.

    Args:
        model: the model that gave the answer.
        chat: the conversation before the answer.
        tokens: tokens of the answer.
    """
    prompt_length = len(chat.input_ids)
    answered_chat = replace(chat, input_ids=np.concatenate([chat.input_ids, np.asarray(tokens, np.int64)]))
    with torch.inference_mode(), record_decisions() as decisions:
        model.model(**model.build_inputs([answered_chat]), use_cache=False, logits_to_keep=1)
    # A token is chosen by the row of the token before it.
    rows = slice(prompt_length - 1, len(answered_chat.input_ids) - 1)
    columns = np.flatnonzero(chat.input_ids == model.model.config.image_token_id)
    inhibited = torch.zeros(len(tokens), len(columns))
    for mask in decisions.values():
        inhibited += (~mask[0, :, rows][:, :, columns]).float().mean(dim=0).cpu()
    allowed = 1 - inhibited / model.model.config.text_config.num_hidden_layers
    return AnswerTrace(trace_images(model, chat), split_words(model, tokens), allowed.numpy())


def split_words(model: ChatModel, tokens: Sequence[int]) -> tuple[str, ...]:
    """Split an answer into the text that each of its tokens adds."""
    words: list[str] = []
    text = ""
    for number in range(1, len(tokens) + 1):
        decoded = model.decode(list(tokens[:number]))
        words.append(decoded[len(text) :])
        text = decoded
    return tuple(words)


def measure_attention(answerer: TrainedLlava, prompt: str, image: bytes, answer: str) -> AttentionMass:
    """Read an answer again and measure its attention to the image and to the text of the prompt.

    The answer is tokenized as in training, with the token that ends it.

    Args:
        answerer: the model that gave the answer.
        prompt: the question, without any template.
        image: the encoded image.
        answer: text of the answer.
    """
    model, size = answerer.model, answerer.model.config.vision_config.image_size
    turns = [{"from": "human", "value": f"{IMAGE_TOKEN}\n{prompt}"}, {"from": "gpt", "value": answer}]
    ids, labels = encode_conversation(answerer.tokenizer, turns, answerer.template, model.config.image_seq_length)
    prompt_length = int(np.flatnonzero(labels != IGNORE_INDEX)[0])
    pixels = load_pixels(image, size, answerer.image_aspect_ratio)
    inputs = build_inputs(model, answerer.tokenizer, [ids], [pixels])
    # A token is chosen by the row of the token before it.
    with torch.inference_mode(), _attention_by_layer(model, len(ids) - prompt_length + 1) as recorder:
        model(**inputs, use_cache=False, logits_to_keep=1)
    weights = torch.stack([recorder.weights[layer] for layer in sorted(recorder.weights)]).cpu()[:, :prompt_length]
    is_image = torch.from_numpy(ids[:prompt_length] == model.config.image_token_id)
    return AttentionMass(
        image=weights[:, is_image].sum(dim=1).tolist(),
        text=weights[:, ~is_image].sum(dim=1).tolist(),
        image_tokens=int(is_image.sum()),
        text_tokens=int((~is_image).sum()),
    )


@contextmanager
def _attention_by_layer(model: ReduxForConditionalGeneration, rows: int) -> Iterator[AttentionRecorder]:
    """Record the attention of the last rows, in the attention function of CMAI also if CMAI is off."""
    decoder: Any = model.get_decoder()
    original_attention = decoder.config._attn_implementation
    # Without an inhibition, "cmai" computes what the model's own attention does.
    decoder.set_attn_implementation(ATTENTION_NAME)
    try:
        with record_attention(rows) as recorder:
            yield recorder
    finally:
        decoder.set_attn_implementation(original_attention)
