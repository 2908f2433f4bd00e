"""Conversations with a LLaVA: several turns, several images, batches, sampling, and answers token by token.

A conversation is encoded with the template and the pixels of the training (`redux.conversation`, `redux.image`). A
turn with several images begins with one `<image>` line for each. A batch of conversations is padded on the left, and
each row has its own sampling and its own end, so a row's answer does not depend on the other rows. A greedy answer is
that of `redux.answering`.

Generation calls back after each step, in the thread of the caller. The caller prints, sends or stores the new text,
and may end single rows. On a GPU, greedy batches decode by a CUDA graph (`redux.graph_decoding`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from os import PathLike
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from redux.answering import LlavaAnswerer, TrainedLlava, build_inputs, load
from redux.conversation import IMAGE_TOKEN, Template, encode_pieces
from redux.graph_decoding import PrefilledPrompt, decode_prompt, use_graph
from redux.image import load_pixels
from redux.messages import Delta, FinishReason, Message, Sampling, check_messages
from redux.pretrained import configure_checkpoint
from redux.settings import CMAI, VMTC

REPLACEMENT_CHARACTER = "\ufffd"
"""Character that stands for bytes of a character whose other bytes are still to come."""


@dataclass(frozen=True)
class EncodedChat:
    """A conversation as the input of a model.

    Args:
        input_ids: tokens, up to the start of the answer, with image tokens after compression.
        pixels: its images in the order of their tokens.
        patches_per_image: image tokens of a LLaVA without compression.
        tokens_per_image: image tokens in `input_ids`.
    """

    input_ids: np.ndarray
    pixels: tuple[UInt8[np.ndarray, "3 size size"], ...]
    patches_per_image: int
    tokens_per_image: int

    @property
    def image_tokens(self) -> int:
        """Image tokens that reach the language model."""
        return len(self.pixels) * self.tokens_per_image

    @property
    def image_tokens_before(self) -> int:
        """Image tokens of a LLaVA without compression."""
        return len(self.pixels) * self.patches_per_image


class ChatAnswer(NamedTuple):
    """The answer of a row.

    Args:
        text: its deltas, joined.
        tokens: its tokens, with the end token.
        finish_reason: why it ended.
    """

    text: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason


DeltaCallback = Callable[[Sequence[Delta]], Sequence[int]]
"""Called after each step with the new text of the rows; returns the rows that shall end without more text."""


class ChatModel(TrainedLlava):
    """A LLaVA that continues conversations. One batch at a time."""

    @cached_property
    def max_length(self) -> int:
        """Most tokens of a conversation with its answer."""
        return min(int(self.model.config.text_config.max_position_embeddings), self.tokenizer.model_max_length)

    def encode(self, messages: Sequence[Message]) -> EncodedChat:
        """Encode a conversation up to the start of the next answer.

        Raises:
            ValueError: roles are in a wrong order, a text contains `<image>`, an image cannot be read, or the
                conversation leaves no position for an answer.
        """
        check_messages(messages)
        config = self.model.config
        pieces = split_messages(self.template, messages, self.tokenizer.eos_token)
        input_ids, _ = encode_pieces(
            self.tokenizer,
            pieces,
            config.image_seq_length,
            add_special_tokens=not self.template.has_special_tokens,
        )
        if len(input_ids) >= self.max_length:
            raise ValueError(
                f"messages: got {len(input_ids)} tokens, allowed: up to {self.max_length - 1}, so that an answer fits "
                f"into the {self.max_length} positions of the model"
            )
        size = config.vision_config.image_size
        pixels = tuple(
            load_pixels(image, size, self.image_aspect_ratio) for message in messages for image in message.images
        )
        return EncodedChat(input_ids, pixels, config.num_patches, config.image_seq_length)

    def generate(
        self, chats: Sequence[EncodedChat], samplings: Sequence[Sampling], on_deltas: DeltaCallback
    ) -> list[ChatAnswer]:
        """Answer a batch of conversations, step by step.

        Args:
            chats: encoded conversations.
            samplings: how to answer each of them. An answer also ends at the last position of the model.
            on_deltas: called after each step, in this thread.

        Returns:
            The answer of each row.
        """
        rows = [
            RowDecoder(number, self.decode, self._limit(chat, sampling))
            for number, (chat, sampling) in enumerate(zip(chats, samplings, strict=True))
        ]
        inputs = self.build_inputs(chats)
        eos_token_id = self.tokenizer.eos_token_id

        def is_finished(tokens: Sequence[int]) -> list[bool]:
            deltas = [row.add(token, token == eos_token_id) for row, token in zip(rows, tokens, strict=True)]
            for row in on_deltas([delta for delta in deltas if delta]):
                rows[row].finish_reason = rows[row].finish_reason or "cancelled"
            return [row.finish_reason is not None for row in rows]

        limit = max(row.sampling.max_new_tokens for row in rows)
        self._run(inputs, [row.sampling for row in rows], limit, is_finished)
        return [ChatAnswer(row.text, tuple(row.tokens), row.finish_reason or "length") for row in rows]

    @torch.inference_mode()
    def _run(
        self,
        inputs: dict[str, Tensor],
        samplings: Sequence[Sampling],
        limit: int,
        is_finished: Callable[[Sequence[int]], list[bool]],
    ) -> None:
        """Generate until all rows are finished; `is_finished` gets the new token of each row after each step."""
        eos_token_id, pad_token_id = self.tokenizer.eos_token_id, self.tokenizer.pad_token_id
        if all(sampling.temperature == 0 for sampling in samplings) and use_graph(self.model, inputs):
            prompt = PrefilledPrompt.run(self.model, inputs)
            decode_prompt(
                self.model,
                prompt,
                [eos_token_id],
                pad_token_id,
                limit,
                lambda tokens: all(is_finished(tokens.tolist())),
            )
            return
        self.model.generate(
            **inputs,
            max_new_tokens=limit,
            do_sample=False,  # `RowSampler` draws; then the drawn token is the likeliest
            num_beams=1,
            eos_token_id=eos_token_id,
            pad_token_id=pad_token_id,
            logits_processor=LogitsProcessorList([RowSampler(samplings)]),
            stopping_criteria=StoppingCriteriaList([RowStopper(is_finished)]),
        )

    def decode(self, tokens: list[int]) -> str:
        """Return the text of tokens without special tokens."""
        return self.tokenizer.decode(tokens, skip_special_tokens=True)

    def _limit(self, chat: EncodedChat, sampling: Sampling) -> Sampling:
        """Limit an answer to the positions that the conversation leaves."""
        free_positions = self.max_length - len(chat.input_ids)
        return replace(sampling, max_new_tokens=min(sampling.max_new_tokens, free_positions))

    def build_inputs(self, chats: Sequence[EncodedChat]) -> dict[str, Tensor]:
        """Build the inputs of a batch, see `redux.answering.build_inputs`."""
        rows = [chat.input_ids for chat in chats]
        return build_inputs(self.model, self.tokenizer, rows, [image for chat in chats for image in chat.pixels])


def load_chat_model(path: str | PathLike, **options: Any) -> ChatModel:
    """Load a LLaVA for conversations, with the template and pixels of its training.

    Args:
        path: folder, hub id or URL (s3://).
        options: as for `redux.answering.load`, except `image_input`.

    Raises:
        ValueError: the path has no LLaVA, or as `redux.answering.load`.
    """
    answerer = load(path, **options)
    if not isinstance(answerer, LlavaAnswerer):
        raise ValueError(f"model: got {path}, which is not a LLaVA, allowed: a LLaVA with a CLIP or SigLIP tower")
    return ChatModel(answerer.model, answerer.tokenizer, answerer.template, answerer.image_aspect_ratio)


def choose_methods(
    path: str | PathLike, image_tokens: int | Literal["all"] | None = None, gamma: float | None = None
) -> dict[str, Any]:
    """Choose settings of the method that replace those of the training, for `load_chat_model`.

    Args:
        path: folder, hub id or URL (s3://) of a LLaVA.
        image_tokens: image tokens that VMTC leaves; "all" turns VMTC and other reductions off. None takes the setting
            of the training.
        gamma: largest gamma of CMAI; 0 turns it off. None takes the setting of the training.

    Raises:
        ValueError: the model cannot have so many image tokens.
    """
    config = configure_checkpoint(path)
    methods: dict[str, Any] = {}
    if image_tokens is not None:
        methods["vmtc"] = methods["reduction"] = None
    if isinstance(image_tokens, int):
        vmtc = config.method_settings("vmtc") or VMTC()
        methods["vmtc"] = replace(vmtc, tokens=image_tokens, ratio=None, kept=None, clusters=None)
    if gamma is not None:
        cmai = config.method_settings("cmai") or CMAI()
        methods["cmai"] = replace(cmai, gamma_max=gamma, gamma_min=min(cmai.gamma_min, gamma)) if gamma else None
    configure_checkpoint(path, **methods)
    return methods


def split_messages(template: Template, messages: Sequence[Message], eos: str | None) -> list[tuple[str, bool]]:
    """Split a conversation into pieces (text, is_learned) of a template, as `Template.split_spans`.

    A system message replaces the template's system prompt.

    Args:
        template: the template.
        messages: checked messages.
        eos: end token of the tokenizer.
    """
    if messages[0].role == "system":
        template = template.replace_system(messages[0].text)
        messages = messages[1:]
    roles = {"user": "human", "assistant": "gpt"}
    turns = [
        {"from": roles[message.role], "value": f"{IMAGE_TOKEN}\n{message.text}" if message.images else message.text}
        for message in messages
    ]
    pieces = list(template.split_spans(turns, *([eos] if eos else [])))
    # The template writes one `<image>` line for a turn; a turn of several images needs as many.
    counts = iter([len(message.images) for message in messages if message.images])
    result = []
    for text, is_learned in pieces:
        if IMAGE_TOKEN in text:
            text = text.replace(IMAGE_TOKEN, "\n".join([IMAGE_TOKEN] * next(counts)))
        result.append((text, is_learned))
    return result


class RowDecoder:
    """The growing answer of one row.

    Args:
        number: number of the row.
        decode: turns tokens into text.
        sampling: limit and stop texts.
    """

    def __init__(self, number: int, decode: Callable[[list[int]], str], sampling: Sampling) -> None:
        self.number, self.decode, self.sampling = number, decode, sampling
        self.tokens: list[int] = []
        self.text = ""
        self.finish_reason: FinishReason | None = None

    def add(self, token: int, is_end: bool) -> Delta | None:
        """Add a token and return the text that is final now; None after the end."""
        if self.finish_reason:
            return None
        self.tokens.append(token)
        decoded = self.decode(self.tokens).strip()
        positions = [decoded.find(text) for text in self.sampling.stop]
        stop_position = min((position for position in positions if position >= 0), default=None)
        if stop_position is not None:
            decoded = decoded[:stop_position].rstrip()
            self.finish_reason = "stop"
        elif is_end:
            self.finish_reason = "stop"
        elif len(self.tokens) == self.sampling.max_new_tokens:
            self.finish_reason = "length"
        final = decoded if self.finish_reason else self._cut_unfinished(decoded)
        # Some decoders change earlier text for a while, which cannot be taken back: wait until they agree again.
        new_text = final[len(self.text) :] if final.startswith(self.text) or self.finish_reason else ""
        self.text += new_text
        return Delta(self.number, new_text, len(self.tokens), self.finish_reason)

    def _cut_unfinished(self, decoded: str) -> str:
        """Cut the end of a text that the next token may change, or that may begin a stop text."""
        decoded = decoded.rstrip(REPLACEMENT_CHARACTER)
        for stop in self.sampling.stop:
            # The longest beginning of the stop text that the text ends with.
            for length in range(len(stop) - 1, 0, -1):
                if decoded.endswith(stop[:length]):
                    decoded = decoded[:-length]
                    break
        return decoded.rstrip()


class RowSampler(LogitsProcessor):
    """Logits processor that draws the next token of each row with the row's own temperature, nucleus and seed.

    The drawn token keeps its score and all others lose theirs, so that greedy generation takes it. Rows of temperature
    0 keep all scores.

    Args:
        samplings: of each row.
    """

    def __init__(self, samplings: Sequence[Sampling]) -> None:
        self.samplings = samplings
        # Draws on the CPU, so that a seed gives the same answer on each device.
        self.generators = [torch.Generator() for _ in samplings]
        for generator, sampling in zip(self.generators, samplings, strict=True):
            if sampling.seed is None:
                generator.seed()
            else:
                generator.manual_seed(sampling.seed)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        for row, (sampling, generator) in enumerate(zip(self.samplings, self.generators, strict=True)):
            if sampling.temperature == 0:
                continue
            probabilities, tokens = (
                (scores[row].float() / sampling.temperature).softmax(dim=0).cpu().sort(descending=True)
            )
            # The likeliest tokens whose mass before them is below top_p.
            probabilities[probabilities.cumsum(dim=0) - probabilities >= sampling.top_p] = 0
            token = tokens[torch.multinomial(probabilities, 1, generator=generator)]
            score = scores[row, token].clone()
            scores[row] = -torch.inf
            scores[row, token] = score
        return scores


class RowStopper(StoppingCriteria):
    """Stopping criterion that passes the new token of each row on, and ends the rows that are finished.

    Args:
        is_finished: gets the new tokens, returns True for rows that are finished.
    """

    def __init__(self, is_finished: Callable[[Sequence[int]], list[bool]]) -> None:
        self.is_finished = is_finished

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.tensor(self.is_finished(input_ids[:, -1].tolist()), device=input_ids.device)
