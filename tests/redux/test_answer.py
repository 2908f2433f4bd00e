"""Answers are those of each question alone, and the upper limit never shows the image to who answers."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from redux.answer import answer, answer_from_descriptions
from redux.conversation import TEMPLATES
from redux.model import ReduxForConditionalGeneration

TEMPLATE = TEMPLATES["vicuna_bare"]
QUESTIONS = ["Is it a red circle?", "What colour is the shape?", "Is it a blue square?"]


@pytest.fixture
def images() -> Any:
    return torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model(tiny: Callable[..., ReduxForConditionalGeneration]) -> ReduxForConditionalGeneration:
    """One that neither shows images of its own nor ends early."""
    model = tiny()
    model.generation_config.suppress_tokens = [model.config.image_token_id, model.config.text_config.eos_token_id]
    return model


def test_each_question_is_answered_as_if_alone(
    model: ReduxForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, images: Any
) -> None:
    told = answer(model, tokenizer, TEMPLATE, QUESTIONS, images, 6)
    for number, question in enumerate(QUESTIONS):
        alone = answer(model, tokenizer, TEMPLATE, [question], images[number : number + 1], 6)
        assert alone == [told[number]]
    assert told != answer(model, tokenizer, TEMPLATE, QUESTIONS, images.flip(0), 6)


@pytest.fixture
def towers(model: ReduxForConditionalGeneration) -> Iterator[list[int]]:
    """Number of images at each use of the image tower."""
    used: list[int] = []
    handle = model.model.vision_tower.embeddings.register_forward_hook(
        lambda module, args, output: used.append(len(args[0]))
    )
    yield used
    handle.remove()


def test_the_upper_limit_sees_each_image_once_and_answers_from_what_it_said_of_it(
    model: ReduxForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, images: Any, towers: list[int]
) -> None:
    limits = {"describe": "What colour is the shape?", "description_tokens": 5, "max_new_tokens": 6}
    told = answer_from_descriptions(model, tokenizer, TEMPLATE, QUESTIONS, images[:2], [1, 0, 1], **limits)
    assert towers == [2]
    descriptions = answer(model, tokenizer, TEMPLATE, ["What colour is the shape?"] * 2, images[:2], 5)
    asked = [f"{descriptions[image]}\n{question}" for image, question in zip([1, 0, 1], QUESTIONS, strict=True)]
    assert told == answer(model, tokenizer, TEMPLATE, asked, None, 6)
