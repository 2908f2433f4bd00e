"""The trace of an answer shows the decisions that the model made while it generated the answer."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerBase

from redux.answering import LlavaAnswerer, build_inputs
from redux.chat import ChatModel
from redux.conversation import IGNORE_INDEX, IMAGE_TOKEN, TEMPLATES, encode_conversation
from redux.decoding import DecodingStep
from redux.image import load_pixels
from redux.messages import Message, Sampling
from redux.model import ReduxForConditionalGeneration
from redux.settings import CMAI, VMTC
from redux.trace import measure_attention, trace_answer, trace_images
from tests.redux.test_chat import encode_image

Tiny = Callable[..., ReduxForConditionalGeneration]

TWO_IMAGES = [Message(role="user", text="Is it a red circle?", images=(encode_image(0), encode_image(1)))]


def build(tiny: Tiny, tokenizer: PreTrainedTokenizerBase, **methods: Any) -> ChatModel:
    return ChatModel(tiny(**methods), tokenizer, TEMPLATES["vicuna_v1"])


def test_images_have_the_tokens_of_the_tower(tiny: Tiny, tokenizer: PreTrainedTokenizerBase) -> None:
    model = build(tiny, tokenizer)
    chat = model.encode(TWO_IMAGES)
    traces = trace_images(model, chat)
    assert [trace.num_tokens for trace in traces] == [8, 8]
    for trace, pixels in zip(traces, chat.pixels, strict=True):
        assert np.array_equal(np.asarray(trace.image).transpose(2, 0, 1), pixels)
        assert trace.draw(64).size == (64, 64)
    _, assignment = model.model.model.encode_images(model.build_inputs([chat])["pixel_values"])
    assert np.array_equal([trace.token_of_patch for trace in traces], assignment.token_of_patch.numpy())


def test_without_inhibition_each_word_may_attend_to_all_tokens(tiny: Tiny, tokenizer: PreTrainedTokenizerBase) -> None:
    model = build(tiny, tokenizer, cmai=None)
    tokens = tokenizer("yes, it is.</s>", add_special_tokens=False)["input_ids"]
    trace = trace_answer(model, model.encode(TWO_IMAGES), tokens)
    assert "".join(trace.words) == "yes, it is."
    assert trace.allowed.shape == (len(trace.words), 16)
    assert (trace.allowed == 1).all()


@pytest.mark.parametrize("vmtc", [None, VMTC()])
def test_the_trace_has_the_decisions_of_decoding(
    tiny: Tiny, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch, vmtc: VMTC | None
) -> None:
    model = build(tiny, tokenizer, vmtc=vmtc, cmai=CMAI(gamma_max=0.8))
    layers = model.model.config.text_config.num_hidden_layers
    steps: list[torch.Tensor] = []
    compute_mask = DecodingStep.compute_mask

    def record(step: DecodingStep, *args: Any, **kwargs: Any) -> torch.Tensor:
        kept = compute_mask(step, *args, **kwargs)
        steps.append(kept.flatten())
        return kept

    monkeypatch.setattr(DecodingStep, "compute_mask", record)
    chat = model.encode(TWO_IMAGES)

    def go_on(_: Sequence[Any]) -> list[int]:
        return []

    [answer] = model.generate([chat], [Sampling(max_new_tokens=8)], go_on)
    trace = trace_answer(model, chat, answer.tokens)
    is_image = chat.input_ids == model.model.config.image_token_id
    # Layers without inhibition are not asked; a step has the others, in their order.
    active = sum(gamma > 0 for gamma in CMAI(gamma_max=0.8).compute_gammas(layers))
    assert len(steps) >= active
    for number in range(len(steps) // active):
        kept = [mask[: len(is_image)][is_image].double() for mask in steps[number * active : (number + 1) * active]]
        expected = 1 - sum(1 - mask for mask in kept) / layers
        # The first word comes from the prompt.
        np.testing.assert_allclose(trace.allowed[number + 1], expected, atol=1e-6)
    assert trace.allowed.min() < 1


def test_tokens_of_a_word_are_spread_over_their_patches(tiny: Tiny, tokenizer: PreTrainedTokenizerBase) -> None:
    model = build(tiny, tokenizer, cmai=CMAI(gamma_max=0.8))
    trace = trace_answer(model, model.encode(TWO_IMAGES), [tokenizer.convert_tokens_to_ids("yes")])
    for image, first in enumerate((0, 8)):
        slot = trace.images[image].token_of_patch
        assert trace.spread_over_patches(0, image).tolist() == [
            float(trace.allowed[0, first + token]) for token in slot
        ]


# --- attention of an answer ------------------------------------------------------------------------------------------

QUESTION, ANSWER = "Is it a red circle?", "yes, it is."


def answerer(tiny: Tiny, tokenizer: PreTrainedTokenizerBase, **methods: Any) -> LlavaAnswerer:
    return LlavaAnswerer(tiny(**methods), tokenizer, TEMPLATES["vicuna_v1"])


def eager_attention(model: LlavaAnswerer) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Maps of all layers and heads by transformers, the ids, and the tokens before the answer."""
    turns = [{"from": "human", "value": f"{IMAGE_TOKEN}\n{QUESTION}"}, {"from": "gpt", "value": ANSWER}]
    llava = model.model
    ids, labels = encode_conversation(model.tokenizer, turns, model.template, llava.config.image_seq_length)
    pixels = load_pixels(encode_image(0), llava.config.vision_config.image_size, "pad")
    inputs = build_inputs(llava, model.tokenizer, [ids], [pixels])
    llava.set_attn_implementation({"text_config": "eager"})
    with torch.no_grad():
        maps = torch.stack(llava(**inputs, output_attentions=True).attentions)[:, 0]
    return maps, torch.from_numpy(ids), int((labels != IGNORE_INDEX).nonzero()[0][0])


@pytest.mark.parametrize("vmtc", [None, VMTC()])
def test_attention_of_an_answer_is_that_of_transformers(
    tiny: Tiny, tokenizer: PreTrainedTokenizerBase, vmtc: VMTC | None
) -> None:
    model = answerer(tiny, tokenizer, vmtc=vmtc, cmai=None)
    before = model.model.get_decoder().config._attn_implementation
    mass = measure_attention(model, QUESTION, encode_image(0), ANSWER)
    assert model.model.get_decoder().config._attn_implementation == before
    maps, ids, prompt_length = eager_attention(model)
    is_image = ids == model.model.config.image_token_id
    assert mass.image_tokens == int(is_image.sum()) == (8 if vmtc else 16)
    assert mass.text_tokens == prompt_length - mass.image_tokens
    # The row before a token of the answer chooses it.
    rows = maps[:, :, prompt_length - 1 :].mean(dim=(1, 2))
    np.testing.assert_allclose(mass.image, rows[:, is_image].sum(dim=1), rtol=1e-5)
    is_text = ~is_image & (torch.arange(len(ids)) < prompt_length)
    np.testing.assert_allclose(mass.text, rows[:, is_text].sum(dim=1), rtol=1e-5)
    per_token = rows[:, is_text].mean() / rows[:, is_image].mean()
    assert mass.dominance == pytest.approx(float(per_token), rel=1e-5)
    # The first two layers alone.
    rows = rows[:2]
    per_token = rows[:, is_text].mean() / rows[:, is_image].mean()
    assert mass.dominance_by_group["early"] == pytest.approx(float(per_token), rel=1e-5)


@pytest.mark.parametrize("heads", ["mean", "each"])
def test_inhibited_pairs_get_no_attention(tiny: Tiny, tokenizer: PreTrainedTokenizerBase, heads: Any) -> None:
    with_cmai = answerer(tiny, tokenizer, cmai=CMAI(gamma_max=0.9, schedule="constant", heads=heads))
    without = answerer(tiny, tokenizer, cmai=None)
    mass, free = (measure_attention(model, QUESTION, encode_image(0), ANSWER) for model in (with_cmai, without))
    # The first layer has the same queries and keys, and seven of eight image tokens lose their attention.
    assert mass.image[0] < 0.5 * free.image[0]
    assert mass.image[0] + mass.text[0] < 1


def test_masses_are_recorded_of_single_heads_alone(tiny: Tiny, tokenizer: PreTrainedTokenizerBase) -> None:
    """A head that is not chosen attends as without CMAI."""
    mass_with_one, mass_with_two = (
        measure_attention(
            answerer(tiny, tokenizer, cmai=CMAI(gamma_max=0.9, schedule="constant", heads=heads), layers=1),
            QUESTION,
            encode_image(0),
            ANSWER,
        ).image[0]
        for heads in ((0,), (0, 1))
    )
    full = measure_attention(answerer(tiny, tokenizer, cmai=None, layers=1), QUESTION, encode_image(0), ANSWER)
    assert mass_with_two < mass_with_one < full.image[0]
