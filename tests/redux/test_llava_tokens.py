"""Tokens and labels are those of LLaVA's trainer, wherever `<image>` stands and whatever blanks are around it.

The reference does what llava/train/train.py of haotian-liu/LLaVA does, a piece at a time and in its order: move the
image, write the prompt, tokenise between images, mask by adding up lengths.
"""

import random

import numpy as np
import pytest
from tokenizers import AddedToken
from transformers import LlamaTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from redux.conversation import (
    IGNORE_INDEX,
    IMAGE_TOKEN,
    TEMPLATES,
    VICUNA_SYSTEM,
    encode_conversation,
    move_image_to_front,
)
from redux.processor import write_chat_template

IMAGE_INDEX = -200
"""LLaVA's number for an image among token ids."""

COUNT = 3
"""Tokens of an image here."""

Turns = list[dict[str, str]]


@pytest.fixture(scope="module", params=[False, True], ids=["as Vicuna's", "legacy"])
def llama(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    """LLaMA's kind: SentencePiece's blank before a text, bytes for what is unknown."""
    letters = "▁abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.,:?!'-<>/"
    merges = [("U", "S"), ("E", "R"), ("▁", "a"), ("▁", "▁"), ("▁▁", "▁▁"), ("r", "e"), ("re", "d"), ("▁", "red")]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters, *map("".join, merges)]
    vocab = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = LlamaTokenizer(vocab=vocab, merges=merges, legacy=request.param)
    tokenizer.add_tokens(AddedToken(IMAGE_TOKEN, special=True, normalized=False), special_tokens=True)
    tokenizer.pad_token = "<unk>"
    tokenizer.add_bos_token = True
    assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    return tokenizer


def move_images(turns: Turns) -> Turns:
    """LLaVA's preprocess_multimodal."""
    moved = []
    for turn in turns:
        value = turn["value"]
        if "<image>" in value:
            value = value.replace("<image>", "").strip()
            value = "<image>" + "\n" + value
            value = value.strip()
        moved.append({"from": turn["from"], "value": value})
    return moved


def tokenize(prompt: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """LLaVA's tokenizer_image_token: each piece by itself, the opening token once."""
    pieces = [tokenizer(piece)["input_ids"] for piece in prompt.split("<image>")]
    opening = 1 if pieces[0][:1] == [tokenizer.bos_token_id] else 0
    ids = pieces[0][:opening]
    for number, piece in enumerate(pieces):
        ids += [IMAGE_INDEX] * (number > 0) + piece[opening:]
    return ids


def llava_v1(turns: Turns, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]] | None:
    """LLaVA's preprocess_v1; None where it masks all of a conversation, because its lengths disagree."""
    end = str(tokenizer.eos_token)
    prompt = VICUNA_SYSTEM
    for turn in turns:
        name, behind = ("USER", " ") if turn["from"] == "human" else ("ASSISTANT", end)
        prompt += f"{name}: {turn['value']}{behind}" if turn["value"] else f"{name}:"
    ids = tokenize(prompt, tokenizer)
    labels, at = [*ids], 1
    labels[0] = IGNORE_INDEX
    for number, around in enumerate(prompt.split(end)):
        parts = around.split(" ASSISTANT: ")
        if len(parts) != 2:
            break
        # A round by itself has a blank in front, which it has not in the whole prompt.
        shorter = number > 0 and not tokenizer.legacy
        asked = len(tokenize(parts[0] + " ASSISTANT: ", tokenizer)) - 2 - shorter
        labels[at : at + asked] = [IGNORE_INDEX] * asked
        at += len(tokenize(around, tokenizer)) - shorter
    return (ids, labels) if at == len(ids) else None


def llava_plain(turns: Turns, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """LLaVA's preprocess_plain."""
    assert "<image>" in turns[0]["value"]
    ids = tokenize("<image>" + turns[1]["value"] + "\n", tokenizer)
    opening = len(tokenize("<image>", tokenizer))
    return ids, [IGNORE_INDEX] * opening + ids[opening:]


def spread(ids: list[int], labels: list[int], image: int) -> tuple[list[int], list[int]]:
    """Spread tokens as LLaVA's model does: an image is COUNT positions, which are never predicted."""
    pairs = [
        pair
        for token_id, label in zip(ids, labels, strict=True)
        for pair in ([(image, IGNORE_INDEX)] * COUNT if token_id == IMAGE_INDEX else [(token_id, label)])
    ]
    return [token_id for token_id, _ in pairs], [label for _, label in pairs]


BLANKS = ["", " ", "\n", "  ", "\t", " \n ", "\r\n", "\u00a0", "\u2003", "\u200b"]
WORDS = [
    "red",
    "a",
    "What?",
    "汉字",
    "é",
    "😀",
    "a <b>",
    "x'y",
    "USER",
    "a\nb",
    "- a",
    "<image >",
    "< image>",
    "image>",
]


def draw_text(chance: random.Random, tags: int, least: int) -> str:
    words = [chance.choice(WORDS) for _ in range(chance.randint(least, 4))] + [IMAGE_TOKEN] * tags
    chance.shuffle(words)
    return chance.choice(BLANKS) + "".join(word + chance.choice([" ", *BLANKS]) for word in words)


def draw_turns(chance: random.Random, rounds: int, tags: list[int]) -> Turns:
    """A conversation in which turn i has `<image>` tags[i] times."""
    return [
        {"from": ("human", "gpt")[number % 2], "value": draw_text(chance, tags[number], number % 2 or not tags[number])}
        for number in range(2 * rounds)
    ]


def test_conversations_have_llavas_tokens_and_labels(llama: PreTrainedTokenizerBase) -> None:
    chance, same = random.Random(0), 0
    image = llama.convert_tokens_to_ids(IMAGE_TOKEN)
    for _ in range(250):
        rounds = chance.randint(1, 3)
        kind = chance.choice(["one", "one", "several", "answer", "twice"])
        tags = [0] * 2 * rounds
        if kind == "answer":
            tags[2 * chance.randrange(rounds) + 1] = 1
        elif kind == "several":
            tags = [chance.randint(0, 1) for _ in tags]
            tags[0] = 1
        else:
            tags[2 * chance.randrange(rounds)] = 1 + (kind == "twice")
        turns = draw_turns(chance, rounds, tags)
        expected = llava_v1(move_images(turns), llama)
        if expected is None or not all(turn["value"].strip() for turn in turns):
            continue
        same += 1
        ids, labels = encode_conversation(llama, turns, TEMPLATES["vicuna_v1"], COUNT)
        assert (ids.tolist(), labels.tolist()) == spread(*expected, image), turns
    assert same > 230


def test_text_alone_has_llavas_tokens_and_labels(llama: PreTrainedTokenizerBase) -> None:
    """LLaVA trims no turn of a record without an image."""
    chance = random.Random(1)
    for _ in range(100):
        rounds = chance.randint(1, 3)
        turns = draw_turns(chance, rounds, [0] * 2 * rounds)
        expected = llava_v1(turns, llama)
        if expected is not None:
            ids, labels = encode_conversation(llama, turns, TEMPLATES["vicuna_v1"], COUNT)
            assert (ids.tolist(), labels.tolist()) == expected, turns


def test_captions_have_llavas_tokens_and_labels(llama: PreTrainedTokenizerBase) -> None:
    chance = random.Random(2)
    image = llama.convert_tokens_to_ids(IMAGE_TOKEN)
    for _ in range(200):
        turns = draw_turns(chance, 1, [chance.randint(1, 2), 0])
        ids, labels = encode_conversation(llama, turns, TEMPLATES["plain"], COUNT)
        assert (ids.tolist(), labels.tolist()) == spread(*llava_plain(move_images(turns), llama), image), turns


@pytest.mark.parametrize("name", ["plain", "vicuna_v1", "vicuna_bare"])
def test_an_image_token_is_never_a_label(tokenizer: PreTrainedTokenizerFast, name: str) -> None:
    image = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    for answer in ("<image>", "<image>\nyes", "it is. <image>", "a <image> blue <image> square"):
        turns = [{"from": "human", "value": "Is it a red circle?"}, {"from": "gpt", "value": answer}]
        ids, labels = encode_conversation(tokenizer, turns, TEMPLATES[name], COUNT)
        assert (ids == image).sum() == COUNT
        assert (labels != image).all()


@pytest.mark.parametrize(
    ("text", "moved"),
    [
        ("<image>\nWhat?", "<image>\nWhat?"),
        ("<image>What?", "<image>\nWhat?"),
        ("What?\n<image>", "<image>\nWhat?"),
        ("What? <image>", "<image>\nWhat?"),
        (" Look <image> here ", "<image>\nLook  here"),
        ("<image>", "<image>"),
        (" \n<image>\n", "<image>"),
        ("<image><image>\nWhat?", "<image>\nWhat?"),
        (" What? ", " What? "),
    ],
)
def test_the_image_stands_in_front_of_its_turn(text: str, moved: str) -> None:
    assert move_image_to_front(text) == moved == move_images([{"from": "human", "value": text}])[0]["value"]
    assert move_image_to_front(moved) == moved
    asked = "".join(piece for piece, _ in TEMPLATES["vicuna_bare"].split_spans([{"from": "human", "value": text}]))
    assert asked == f"USER: {moved} ASSISTANT:"


@pytest.mark.parametrize("name", ["vicuna_v1", "vicuna_bare"])
def test_a_chat_template_gives_the_same_tokens(llama: PreTrainedTokenizerBase, name: str) -> None:
    """Programs write the text in one piece, which is tokenized as a whole."""
    chat = write_chat_template(TEMPLATES[name], llama)
    for texts in (["What?"], [""], ["  red \n"], ["What?", "red", "a?"], ["", " a", "What?", "b"]):
        messages, turns = [], []
        for number, text in enumerate(texts):
            parts = [{"type": "text", "text": text}]
            role = ("user", "assistant")[number % 2]
            messages.append({"role": role, "content": [{"type": "image"}, *parts] if number == 0 else parts})
            turns.append({"from": ("human", "gpt")[number % 2], "value": IMAGE_TOKEN * (number == 0) + text})
        asks = len(texts) % 2 == 1
        written = llama.apply_chat_template(messages, chat_template=chat, tokenize=False, add_generation_prompt=asks)
        ids = llama(written, add_special_tokens=not written.startswith("<s>"))["input_ids"]
        assert ids == encode_conversation(llama, turns, TEMPLATES[name], 1)[0].tolist(), texts


def test_numpy_types_stay(llama: PreTrainedTokenizerBase) -> None:
    ids, labels = encode_conversation(llama, [{"from": "human", "value": IMAGE_TOKEN}], TEMPLATES["plain"], 1)
    assert ids.dtype == labels.dtype == np.int64
