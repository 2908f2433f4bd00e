"""Importance of a head is the slope of the loss along its output, and the most important heads are selected."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from redux.answering import LlavaAnswerer
from redux.conversation import IGNORE_INDEX, TEMPLATES
from redux.heads import encode_example, measure_head_importance, select_decisive_heads
from redux.model import ReduxForConditionalGeneration
from redux.settings import CMAI
from tests.redux.test_chat import encode_image

Tiny = Callable[..., ReduxForConditionalGeneration]
EXAMPLES = [
    ("Is it a red circle?", encode_image(0), "yes, it is."),
    ("What colour is the shape?", None, "A blue square."),
]


@pytest.fixture(scope="module")
def answerer(tiny: Tiny, tokenizer: PreTrainedTokenizerBase) -> LlavaAnswerer:
    return LlavaAnswerer(tiny(cmai=None).double(), tokenizer, TEMPLATES["vicuna_v1"])


def scale_columns(model: Any, layer: int, head: int, factor: float) -> None:
    """Scale a head's output by the columns of the product that mixes heads."""
    projection = model.get_decoder().layers[layer].self_attn.o_proj.weight
    width = projection.shape[1] // model.config.text_config.num_attention_heads
    with torch.no_grad():
        projection[:, head * width : (head + 1) * width] *= factor


def compute_loss(model: Any, example: dict[str, Tensor]) -> float:
    """Compute the loss in float64; transformers' loss, like its norms, is in float32."""
    with torch.no_grad():
        logits = model(**example).logits[0, :-1]
    return float(F.cross_entropy(logits, example["labels"][0, 1:], ignore_index=IGNORE_INDEX))


def test_importance_is_the_slope_of_the_loss_by_finite_differences(answerer: LlavaAnswerer) -> None:
    model, step = answerer.model, 1e-2
    examples = [encode_example(answerer, *example) for example in EXAMPLES]
    importance = measure_head_importance(model, examples)
    assert importance.shape == (3, 4)
    for layer in range(3):
        for head in range(4):
            losses = []
            for factor in (1 + step, 1 - step):
                scale_columns(model, layer, head, factor)
                losses.append([compute_loss(model, example) for example in examples])
                scale_columns(model, layer, head, 1 / factor)
            slopes = [abs(more - less) / (2 * step) for more, less in zip(*losses, strict=True)]
            assert float(importance[layer, head]) == pytest.approx(sum(slopes) / 2, rel=1e-2, abs=1e-4)


def test_the_most_important_heads_are_selected_and_work_as_a_setting(answerer: LlavaAnswerer, tiny: Tiny) -> None:
    importance = measure_head_importance(answerer.model, [encode_example(answerer, *example) for example in EXAMPLES])
    for share, count in ((0.25, 3), (0.001, 1), (1.0, 12)):
        heads = select_decisive_heads(answerer, EXAMPLES, share)
        assert len(heads) == count
        others = [value for number, value in enumerate(importance.flatten().tolist()) if number not in heads]
        assert not others or min(importance.flatten()[list(heads)].tolist()) >= max(others)
    tiny(cmai=CMAI(heads=select_decisive_heads(answerer, EXAMPLES, 0.25)))


def test_measuring_leaves_the_model_as_it_was(answerer: LlavaAnswerer) -> None:
    example = encode_example(answerer, *EXAMPLES[0])
    with torch.no_grad():
        before = answerer.model(**example).loss
        measure_head_importance(answerer.model, [example])
        assert torch.equal(answerer.model(**example).loss, before)
    assert all(weight.grad is None for weight in answerer.model.parameters())


@pytest.mark.parametrize(
    ("share", "examples", "message"), [(0.0, EXAMPLES, "share: got 0"), (0.5, [], "examples: got none")]
)
def test_what_cannot_be_selected_is_named(answerer: LlavaAnswerer, share: float, examples: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        select_decisive_heads(answerer, examples, share)
