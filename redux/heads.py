"""Heads of the language model that decide how an answer goes on, for `CMAI.heads`.

Few heads decide whether an instruction is followed, so a mean over heads may inhibit the wrong ones. In Instruction
Anchor (arXiv 2602.03677) blocking 5 % of the heads degrades following. Only its abstract was readable, so its way to
find the heads is not used here. Importance is that of Michel et al. 2019 (arXiv 1905.10650, eq. 2): the output of each
head gets a factor xi = 1, and

    I_h = mean over examples of | d loss / d xi_h |

estimates by how much the loss of an answer would change without the head. An answer that follows its instruction makes
that the heads which decide about following. Take examples from the training set, never from the evaluation.

Cost: one forward and one backward pass for each example.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from redux.answering import TrainedLlava, build_inputs
from redux.conversation import IMAGE_TOKEN, encode_conversation
from redux.image import load_pixels
from redux.model import ReduxForConditionalGeneration


def measure_head_importance(
    model: ReduxForConditionalGeneration, examples: Iterable[Mapping[str, Tensor]]
) -> Float[Tensor, "layers heads"]:
    """Measure the importance of each head of the language model, I_h.

    Args:
        model: the model.
        examples: inputs of single sequences with `labels`.

    Raises:
        ValueError: there are no examples.
    """
    config = model.config.get_text_config()
    shape = (config.num_hidden_layers, config.num_attention_heads)
    total, count = torch.zeros(shape), 0
    for example in examples:
        factors = torch.ones(shape, device=model.device, requires_grad=True)
        with torch.enable_grad(), _scale_heads(model, factors):
            loss = model(**example, use_cache=False).loss
            (gradient,) = torch.autograd.grad(loss, factors)
        total += gradient.abs().float().cpu()
        count += 1
    if not count:
        raise ValueError("examples: got none, allowed: at least one")
    return total / count


def select_decisive_heads(
    answerer: TrainedLlava, examples: Iterable[tuple[str, bytes | None, str]], share: float = 0.05
) -> tuple[int, ...]:
    """Select the most important heads, as numbers for `CMAI.heads`.

    Args:
        answerer: the model.
        examples: prompts with instructions, their images, and answers that follow.
        share: share of all heads to select; at least one head.

    Raises:
        ValueError: there are no examples, or the share is not between 0 and 1.
    """
    importance = measure_head_importance(answerer.model, (encode_example(answerer, *example) for example in examples))
    return select_heads(importance, share)


def select_heads(importance: Float[Tensor, "layers heads"], share: float = 0.05) -> tuple[int, ...]:
    """Select the heads with the largest importance, as numbers for `CMAI.heads`; at least one.

    Raises:
        ValueError: the share is not between 0 and 1.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share: got {share}, allowed: 0 < share <= 1")
    ranked = importance.flatten().argsort(descending=True, stable=True)
    return tuple(sorted(ranked[: max(round(share * len(ranked)), 1)].tolist()))


def encode_example(answerer: TrainedLlava, prompt: str, image: bytes | None, answer: str) -> dict[str, Tensor]:
    """Encode a prompt and its answer as in training, with labels for the answer."""
    config = answerer.model.config
    human = prompt if image is None else f"{IMAGE_TOKEN}\n{prompt}"
    turns = [{"from": "human", "value": human}, {"from": "gpt", "value": answer}]
    ids, labels = encode_conversation(answerer.tokenizer, turns, answerer.template, config.image_seq_length)
    size, ratio = config.vision_config.image_size, answerer.image_aspect_ratio
    pixels = [] if image is None else [load_pixels(image, size, ratio)]
    inputs = build_inputs(answerer.model, answerer.tokenizer, [ids], pixels)
    return {**inputs, "labels": torch.from_numpy(labels)[None].to(answerer.model.device)}


@contextmanager
def _scale_heads(model: ReduxForConditionalGeneration, factors: Float[Tensor, "layers heads"]) -> Iterator[None]:
    """Multiply the output of each head by its factor within the block, before heads are mixed."""
    decoder: Any = model.get_decoder()

    def make_hook(layer: int) -> Any:
        def scale(module: Any, args: tuple[Tensor]) -> tuple[Tensor]:
            heads = args[0].unflatten(-1, (factors.shape[1], -1))
            return ((heads * factors[layer].to(heads.dtype).unsqueeze(-1)).flatten(-2),)

        return scale

    handles = [
        layer.self_attn.o_proj.register_forward_pre_hook(make_hook(number))
        for number, layer in enumerate(decoder.layers)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
