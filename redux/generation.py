"""Greedy generation for a batch of prompts, with token counts and times.

Numbers of two models compare only if both count tokens and take times at the same points. So every model generates
here, whatever class or processor it has.

On a GPU a LLaVA decodes by a CUDA graph (`redux.graph_decoding`), with the same tokens as its `generate`. The first
batch of a size captures the graph, so its decoding takes longer.

Cost: two waits for the device in each batch, which the times need.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from redux.graph_decoding import PrefilledPrompt, decode_prompt, use_graph


@dataclass(frozen=True)
class Answers:
    """Answers to a batch of prompts, and their cost.

    Args:
        texts: the answers, stripped, in the order of the prompts.
        tokens: new tokens of each answer, with the end token.
        prefill_s: wall seconds until the first new token of the batch, with the image tower. The inputs are on the
            device before.
        decode_s: wall seconds from the first new token to the end of the batch.
    """

    texts: list[str]
    tokens: list[int]
    prefill_s: float
    decode_s: float


def drop_warm_up(batches: Sequence[Answers]) -> list[Answers]:
    """Drop the first batch of each size, in which kernels are compiled, memory is allocated and graphs are captured.

    If no batch is left, all are kept: their times are all there is.
    """
    sizes = set[int]()
    warm_batches = []
    for answers in batches:
        if len(answers.texts) in sizes:
            warm_batches.append(answers)
        sizes.add(len(answers.texts))
    return warm_batches or list(batches)


def check_batch(prompts: Sequence[str], images: Sequence[bytes | None]) -> None:
    """Raise a ValueError unless there is at least one prompt, and an image or None for each."""
    if not prompts or len(prompts) != len(images):
        raise ValueError(f"images: got {len(images)}, allowed: as many as prompts, {len(prompts)}, and at least one")


def ensure_pad_token(tokenizer: PreTrainedTokenizerBase) -> None:
    """Give the tokenizer a pad token if it has none. Any token will do, because attention is masked there."""
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token


class FirstTokenTimer(StoppingCriteria):
    """A stopping criterion that never stops and records the first new token.

    `generate` returns the new tokens alone, or after the prompt, or after a decoder's start token. So the column of
    the first new token is recorded with its time.
    """

    def __init__(self) -> None:
        self.column = 0
        self.time = 0.0

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        # Called after every token; only the first call counts.
        if not self.time:
            self.column = input_ids.shape[1] - 1
            self.time = read_clock(input_ids.device)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def read_clock(device: torch.device) -> float:
    """Return wall seconds, after all work queued on the device is done."""
    if device.type == "cuda":
        # The host runs ahead of a GPU, so the clock alone would time the launches.
        torch.cuda.synchronize(device)
    return time.perf_counter()


@torch.inference_mode()
def generate_greedily(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    inputs: Mapping[str, Tensor],
    eos_token_ids: Sequence[int],
    max_new_tokens: int,
) -> Answers:
    """Generate greedy answers with any generating model, if possible by a CUDA graph.

    Args:
        model: a model of transformers.
        tokenizer: its tokenizer, with a pad token.
        inputs: padded batch on the model's device.
        eos_token_ids: tokens that end an answer.
        max_new_tokens: limit for each answer.
    """
    start_s = read_clock(model.device)
    if use_graph(model, inputs):
        prompt = PrefilledPrompt.run(model, inputs)
        first_s = read_clock(model.device)
        new_tokens = decode_prompt(model, prompt, eos_token_ids, tokenizer.pad_token_id, max_new_tokens)
    else:
        new_tokens, first_s = generate_tokens(model, tokenizer, inputs, eos_token_ids, max_new_tokens)
    end_s = read_clock(model.device)
    # An answer counts up to its first end token; padding follows.
    is_end = torch.isin(new_tokens, torch.tensor(eos_token_ids, device=new_tokens.device)).int()
    counts = (is_end.cumsum(dim=1) - is_end == 0).sum(dim=1).tolist()
    answers = [row[:count] for row, count in zip(new_tokens.tolist(), counts, strict=True)]
    texts = [text.strip() for text in tokenizer.batch_decode(answers, skip_special_tokens=True)]
    return Answers(texts, counts, first_s - start_s, end_s - first_s)


def generate_tokens(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    inputs: Mapping[str, Tensor],
    eos_token_ids: Sequence[int],
    max_new_tokens: int,
) -> tuple[Tensor, float]:
    """Generate by the model's own `generate`, with the arguments of `generate_greedily`.

    Returns:
        New tokens, (batch, new), and the time of the first one.
    """
    timer = FirstTokenTimer()
    sequences = model.generate(
        **inputs,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        eos_token_id=list(eos_token_ids),
        pad_token_id=tokenizer.pad_token_id,
        stopping_criteria=StoppingCriteriaList([timer]),
    )
    return sequences[:, timer.column :], timer.time
