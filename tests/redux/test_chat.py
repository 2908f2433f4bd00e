"""Conversations are encoded as in training, and each answer is independent of the batch and of how it is delivered."""

import io
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, PreTrainedTokenizerBase

from redux import chat
from redux.answering import LlavaAnswerer
from redux.chat import ChatModel, RowDecoder, RowSampler, load_chat_model
from redux.conversation import IMAGE_TOKEN, TEMPLATES, encode_conversation
from redux.messages import Delta, Message, Sampling
from redux.model import ReduxForConditionalGeneration
from redux.processor import build_processor, record_training_format

Tiny = Callable[..., ReduxForConditionalGeneration]


def encode_image(seed: int, width: int = 40, height: int = 32) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def ask(text: str, *images: bytes) -> Message:
    return Message(role="user", text=text, images=images)


QUESTION = [ask("Is it a red circle?", encode_image(0))]
CONVERSATIONS = [
    QUESTION,
    [ask("Is it a red circle?")],
    [
        ask("What colour is the shape?", encode_image(1)),
        Message(role="assistant", text="A blue square."),
        ask("Is it a circle?"),
    ],
    [ask("Is it a red shape?", encode_image(2), encode_image(3, 20, 60))],
    [
        ask("What colour is it?", encode_image(1)),
        Message(role="assistant", text="yes"),
        ask("", encode_image(2), encode_image(3)),
    ],
]


@pytest.fixture(scope="module")
def model(tiny: Tiny, tokenizer: PreTrainedTokenizerBase) -> ChatModel:
    return ChatModel(tiny(), tokenizer, TEMPLATES["vicuna_v1"])


def answer(
    model: ChatModel, conversations: Sequence[Sequence[Message]], samplings: Sequence[Sampling] | None = None
) -> tuple[list[str], list[Delta]]:
    """Answer a batch; return the answers and all deltas."""
    deltas: list[Delta] = []

    def collect(new: Sequence[Delta]) -> list[int]:
        deltas.extend(new)
        return []

    samplings = samplings or [Sampling(max_new_tokens=6)] * len(conversations)
    answers = model.generate([model.encode(messages) for messages in conversations], samplings, collect)
    return [answer.text for answer in answers], deltas


def test_a_question_is_answered_as_in_evaluation(model: ChatModel) -> None:
    answerer = LlavaAnswerer(model.model, model.tokenizer, model.template)
    texts, _ = answer(model, [QUESTION])
    assert texts == answerer([QUESTION[0].text], [QUESTION[0].images[0]], 6).texts


@pytest.mark.parametrize("name", ["vicuna_v1", "vicuna_bare"])
def test_turns_are_encoded_as_in_training(tiny: Tiny, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    model = ChatModel(tiny(), tokenizer, TEMPLATES[name])
    turns = [
        {"from": "human", "value": f"{IMAGE_TOKEN}\nWhat colour is the shape?"},
        {"from": "gpt", "value": "A blue square."},
        {"from": "human", "value": "Is it a circle?"},
    ]
    expected, _ = encode_conversation(tokenizer, turns, TEMPLATES[name], 8)
    encoded = model.encode(CONVERSATIONS[2])
    assert encoded.input_ids.tolist() == expected.tolist()
    assert (encoded.image_tokens_before, encoded.image_tokens) == (16, 8)


@pytest.mark.parametrize("messages", CONVERSATIONS)
@pytest.mark.parametrize("system", ["", "yes no"])
def test_the_saved_processor_gives_the_same_ids(
    model: ChatModel, tmp_path: Path, messages: list[Message], system: str
) -> None:
    record_training_format(model.model, model.tokenizer, "vicuna_v1", "pad")
    build_processor(model.model.config, model.tokenizer).save_pretrained(tmp_path)
    processor = AutoProcessor.from_pretrained(tmp_path)
    messages = [*([Message(role="system", text=system)] if system else []), *messages]
    as_parts = [
        {
            "role": message.role,
            "content": [
                *({"type": "image", "image": Image.open(io.BytesIO(image))} for image in message.images),
                {"type": "text", "text": message.text},
            ],
        }
        for message in messages
    ]
    inputs = processor.apply_chat_template(as_parts, add_generation_prompt=True, tokenize=True, return_dict=True)
    encoded = model.encode(messages)
    assert inputs["input_ids"][0] == encoded.input_ids.tolist()
    assert len(encoded.pixels) == sum(len(message.images) for message in messages)


def test_rows_of_a_batch_are_independent(model: ChatModel) -> None:
    together, deltas = answer(model, CONVERSATIONS)
    assert together == [answer(model, [messages])[0][0] for messages in CONVERSATIONS]
    for row, text in enumerate(together):
        row_deltas = [delta for delta in deltas if delta.row == row]
        assert "".join(delta.text for delta in row_deltas) == text
        assert [delta.tokens for delta in row_deltas] == list(range(1, len(row_deltas) + 1))
        assert [delta.finish_reason is not None for delta in row_deltas] == [False] * (len(row_deltas) - 1) + [True]


def test_greedy_answers_by_static_steps_are_the_same(model: ChatModel, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = answer(model, CONVERSATIONS)
    monkeypatch.setattr(chat, "use_graph", lambda *_: True)
    assert answer(model, CONVERSATIONS) == expected


def test_each_row_has_its_own_limit(model: ChatModel) -> None:
    whole, _ = answer(model, CONVERSATIONS[:3], [Sampling(max_new_tokens=8)] * 3)
    cut, deltas = answer(model, CONVERSATIONS[:3], [Sampling(max_new_tokens=limit) for limit in (1, 3, 8)])
    assert [text.startswith(short) for text, short in zip(whole, cut, strict=True)] == [True] * 3
    last = {delta.row: delta for delta in deltas}
    assert all(last[row].tokens <= limit for row, limit in enumerate((1, 3, 8)))


def test_the_last_position_of_the_model_ends_an_answer(model: ChatModel) -> None:
    words = "circle " * (model.max_length - len(model.encode([ask("")]).input_ids) - 3)
    _, deltas = answer(model, [[ask(words.strip())]], [Sampling(max_new_tokens=10_000)])
    assert deltas[-1].tokens <= 5
    with pytest.raises(ValueError, match=r"messages: got 128 tokens, allowed: up to 127"):
        model.encode([ask((words + "circle circle circle").strip())])


def test_a_cancelled_row_ends_and_the_others_go_on(model: ChatModel) -> None:
    expected, _ = answer(model, CONVERSATIONS[:3])
    seen: list[Delta] = []

    def cancel_row_1(deltas: Sequence[Delta]) -> list[int]:
        seen.extend(deltas)
        return [1]

    chats = [model.encode(messages) for messages in CONVERSATIONS[:3]]
    answers = model.generate(chats, [Sampling(max_new_tokens=6)] * 3, cancel_row_1)
    assert [delta.tokens for delta in seen if delta.row == 1] == [1]
    assert (answers[0].text, answers[2].text) == (expected[0], expected[2])
    assert [len(answers[1].tokens), answers[1].finish_reason] == [1, "cancelled"]


@pytest.mark.parametrize("temperature", [0.7, 1.5])
def test_a_seed_decides_sampled_answers_in_any_batch(model: ChatModel, temperature: float) -> None:
    samplings = [Sampling(max_new_tokens=6, temperature=temperature, top_p=0.9, seed=seed) for seed in (1, 2, 1)]
    conversations = [QUESTION, QUESTION, QUESTION]
    texts, _ = answer(model, conversations, samplings)
    assert texts[0] == texts[2]
    assert texts[:2] == [answer(model, [QUESTION], [sampling])[0][0] for sampling in samplings[:2]]
    mixed, _ = answer(model, [QUESTION, QUESTION], [Sampling(max_new_tokens=6), samplings[0]])
    assert mixed == [answer(model, [QUESTION])[0][0], texts[0]]


def test_draws_follow_the_distribution_within_the_nucleus() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    draws = 4000
    temperature, top_p = 0.8, 0.95
    sampler = RowSampler([Sampling(temperature=temperature, top_p=top_p, seed=seed) for seed in range(draws)])
    chosen = sampler(torch.zeros(draws, 1), logits.repeat(draws, 1)).argmax(dim=1)
    counts = torch.bincount(chosen, minlength=4) / draws
    # The nucleus: the likeliest tokens up to the one that crosses top_p.
    expected = (logits / temperature).softmax(dim=0)
    expected[3] = 0
    expected /= expected.sum()
    torch.testing.assert_close(counts, expected, rtol=0, atol=0.03)


def decode_row(texts: Sequence[str], sampling: Sampling) -> tuple[list[str], RowDecoder]:
    """Decode tokens 0, 1, ... with these texts; the last one is the end token."""
    row = RowDecoder(0, lambda tokens: "".join(texts[token] for token in tokens), sampling)
    deltas = [row.add(token, token == len(texts) - 1) for token in range(len(texts))]
    return [delta.text for delta in deltas if delta], row


@pytest.mark.parametrize("stop", ["END", "\n\n", "E"])
def test_a_stop_text_ends_the_answer_and_no_part_of_it_is_delivered(stop: str) -> None:
    tokens = [" one", " E", "N", "ND", " two ", *stop, " three", ""]
    texts, row = decode_row(tokens, Sampling(stop=(stop,)))
    whole = "".join(tokens).strip()
    assert "".join(texts) == row.text == whole[: whole.index(stop)].strip()
    assert row.finish_reason == "stop"


def test_half_a_character_is_held_back() -> None:
    texts, row = decode_row(["caf", "\ufffd", "", " x"], Sampling())
    assert texts[0] == "caf"
    assert "\ufffd" not in texts[1]
    assert row.finish_reason == "stop"


@pytest.mark.parametrize(
    ("messages", "error"),
    [
        ([], "messages: got none"),
        ([Message(role="assistant", text="a")], "message 1: got role assistant, allowed: user"),
        ([ask("a"), ask("b")], "message 2: got role user, allowed: assistant"),
        ([ask("a"), Message(role="assistant", text="b")], "message 2: got role assistant, allowed: user"),
        ([Message(role="system", text="a")], "message 1: got role system, allowed: user"),
        ([ask("a"), Message(role="system", text="b"), ask("c")], "message 2: got role system"),
        ([ask(f"see {IMAGE_TOKEN}")], "message 1: got <image> in its text"),
        ([ask("a"), Message(role="assistant", text="b", images=(b"",)), ask("c")], "message 2: got an image"),
        ([ask("a", b"no image")], "not an image that Pillow knows"),
    ],
)
def test_wrong_conversations_are_refused(model: ChatModel, messages: list[Message], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        model.encode(messages)


@pytest.mark.parametrize(
    "settings",
    [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_p": 0.0}, {"max_new_tokens": 0}, {"stop": ("",)}],
)
def test_wrong_sampling_is_refused(settings: dict) -> None:
    [name] = settings
    with pytest.raises(ValueError, match=f"{name}: got .*, allowed: "):
        Sampling(**settings)


def test_a_saved_model_is_loaded_with_its_format(model: ChatModel, tmp_path: Path) -> None:
    record_training_format(model.model, model.tokenizer, "vicuna_bare", "crop")
    model.model.save_pretrained(tmp_path)
    build_processor(model.model.config, model.tokenizer).save_pretrained(tmp_path)
    loaded = load_chat_model(tmp_path)
    assert (loaded.template, loaded.image_aspect_ratio) == (TEMPLATES["vicuna_bare"], "crop")
