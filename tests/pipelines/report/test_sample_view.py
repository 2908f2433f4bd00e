"""Tests of the view of samples: tokens, labels and positions are those of training, and the page is safe text."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from pipelines.data.ingest import Reader, encode_caption, make_conversation_encoder
from pipelines.data.order import Order
from pipelines.data.preview import PreviewSample, StreamPosition, draw_samples, read_stored
from pipelines.data.shard_index import Shards, StoredSample
from pipelines.data.text_tokenizer import load_text_tokenizer
from pipelines.report.sample_view import (
    SampleView,
    SetView,
    StageView,
    format_stages,
    name_tokens,
    render_page,
    view_sample,
    view_stored,
    view_template,
)
from redux.conversation import IGNORE_INDEX, IMAGE_TOKEN, TEMPLATES, label_conversation

IMAGE_TOKENS = 5
TEMPLATE = TEMPLATES["vicuna_bare"]


@pytest.fixture(scope="session")
def make_reader(stored: Shards, tokenizer: Path) -> Callable[..., Reader]:
    """Return a function that makes a reader with a limit of tokens."""

    def make(max_length: int | None = None, **options: Any) -> Reader:
        reader = Reader(
            sources={"all": stored},
            order=Order(samples=(len(stored),), global_batch_size=8, seed=3),
            micro_batch_size=4,
            image_size=16,
            tokenizer=tokenizer,
            encode=make_conversation_encoder(TEMPLATE, IMAGE_TOKENS, max_length),
            text_tokenizer=load_text_tokenizer(tokenizer),
        )
        return replace(reader, **options)

    return make


def view(reader: Reader, max_length: int | None = None) -> list[tuple[PreviewSample, SampleView]]:
    return [
        (sample, view_sample(sample, reader, TEMPLATE, IMAGE_TOKENS, max_length, None))
        for sample in draw_samples(reader, "all", 22, seed=0)
    ]


def read_tokens(shown: SampleView) -> list[tuple[int | None, int | None, str, bool]]:
    """List (position, id, kind, is_cut) of all tokens; those of an image are repeated."""
    return [
        (token.position if run.kind != "image" else (run.first or 0) + number, token.id, run.kind, run.is_cut)
        for run in shown.spans
        for number, token in enumerate(run.tokens * (run.length if run.kind == "image" else 1))
    ]


@pytest.mark.parametrize("max_length", [None, 30])
def test_tokens_labels_and_positions_are_those_of_a_worker(
    make_reader: Callable[..., Reader], max_length: int | None
) -> None:
    num_cut = 0
    for sample, shown in view(make_reader(max_length), max_length):
        assert sample.encoded is not None
        tokens = read_tokens(shown)
        assert [position for position, *_ in tokens] == list(range(len(tokens)))
        kept = [(token, kind) for _, token, kind, is_cut in tokens if not is_cut]
        assert [token for token, _ in kept] == sample.encoded["input_ids"].tolist()
        learned = (sample.encoded["labels"] != IGNORE_INDEX).tolist()
        assert [kind == "learned" for _, kind in kept] == learned
        assert (shown.count("image"), shown.count("learned"), shown.num_tokens) == (5, sum(learned), len(kept))
        assert shown.count(is_cut=True) == len(tokens) - len(kept)
        num_cut += len(tokens) > len(kept)
        assert (
            shown.position
            == f"step {sample.stream_position.batch + 1}, sample {sample.stream_position.position % 8 + 1} of 8"
        )
    assert bool(num_cut) == (max_length is not None)


def test_labels_are_those_that_the_reader_made(make_reader: Callable[..., Reader]) -> None:
    """A page that computed labels again would hide a fault of the encoder."""
    reader = make_reader()
    [sample] = draw_samples(reader, "all", 1, seed=0)
    assert sample.encoded is not None
    shifted = replace(sample, encoded={**sample.encoded, "labels": np.roll(sample.encoded["labels"], 1)})
    shown = view_sample(shifted, reader, TEMPLATE, IMAGE_TOKENS, None, None)
    kinds = [kind for _, _, kind, _ in read_tokens(shown)]
    assert [kind == "learned" for kind in kinds] == (shifted.encoded["labels"] != IGNORE_INDEX).tolist()  # type: ignore[index]


def test_an_unusable_sample_is_shown_with_its_reason(make_reader: Callable[..., Reader]) -> None:
    for sample, shown in view(make_reader(9), 9):
        assert shown.problem.endswith("tokens, cut off after 9 before any answer")
        assert shown.num_tokens is None
        assert [is_cut for _, _, _, is_cut in read_tokens(shown)][8:10] == [False, True]
        assert sample.stored is not None
        assert json.loads(shown.record) == sample.stored.record
    broken = PreviewSample(
        stream_position=StreamPosition(0, 0, 7), problem="broken", stored=None, prepared=None, image=None, encoded=None
    )
    shown = view_sample(broken, make_reader(), TEMPLATE, IMAGE_TOKENS, None, None)
    assert (shown.title, shown.problem, shown.spans) == ("row 7", "broken", ())


def test_notes_say_what_was_drawn(make_reader: Callable[..., Reader]) -> None:
    reader = make_reader(random_flip=True, max_rounds=2)
    for sample, shown in view(reader):
        assert sample.stored is not None
        assert sample.image is not None
        plain = replace(reader, random_flip=False).prepare_sample(sample.stored, sample.stream_position.position)[1]
        is_mirrored = not np.array_equal(plain, sample.image)
        rounds = len(sample.stored.record["conversations"]) // 2
        assert ("mirrored" in shown.notes) == is_mirrored
        assert f"{min(rounds, 2)} of {rounds} rounds drawn" in shown.notes


def test_a_caption_is_shown_with_its_end_token(make_reader: Callable[..., Reader]) -> None:
    reader = make_reader(encode=encode_caption)
    for sample in draw_samples(reader, "all", 22, seed=0):
        shown = view_sample(sample, reader, None, IMAGE_TOKENS, None, None)
        assert sample.encoded is not None
        assert [token for _, token, _, _ in read_tokens(shown)] == sample.encoded["input_ids"].tolist()
        assert [run.kind for run in shown.spans] == ["caption"]
        assert shown.spans[0].tokens[-1].text == "</s>"


def test_a_long_caption_shows_what_is_cut(make_reader: Callable[..., Reader]) -> None:
    reader = make_reader(encode=encode_caption)
    [sample] = draw_samples(reader, "all", 1, seed=0)
    assert sample.stored is not None
    turns = [{"from": "human", "value": IMAGE_TOKEN}, {"from": "gpt", "value": " ".join(["red blue"] * 60)}]
    stored = StoredSample("k", sample.stored.image, {"conversations": turns})
    row = encode_caption(reader.get_tokenizer(), stored)
    shown = view_sample(
        replace(sample, stored=stored, prepared=stored, encoded=row), reader, None, IMAGE_TOKENS, None, None
    )
    kept, cut = shown.spans
    assert [token.id for token in kept.tokens] == row["input_ids"].tolist()
    assert (kept.length, cut.length, cut.is_cut) == (77, 45, True)


def train_byte_tokenizer() -> PreTrainedTokenizerFast:
    """Train a tokenizer of bytes, as GPT-2's, in which an emoji is several tokens."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(["it is red"], trainers.BpeTrainer(initial_alphabet=alphabet, show_progress=False))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
    return tokenizer


def test_each_character_is_shown_once() -> None:
    tokenizer = train_byte_tokenizer()
    turns = [{"from": "human", "value": "<image>\nis it\n\nred?"}, {"from": "gpt", "value": "ja, schön 🙂!"}]
    text, tokens = label_conversation(tokenizer, turns, TEMPLATE, 3)
    shown = name_tokens(tokenizer, text, tokens.ids, tokens.start, tokens.end)
    assert len(shown) == len(tokens.ids)
    joined = "".join(token.text for token in shown if token.text not in (IMAGE_TOKEN, "·"))
    assert joined == text.replace(IMAGE_TOKEN, "")
    assert [token.text for token in shown].count("·") == 4  # three more bytes of the emoji, one more of ö
    assert [token.text for token in shown if token.is_special] == [IMAGE_TOKEN] * 3 + ["·"] * 4 + ["<|end|>"]


def test_unknown_words_are_marked(tokenizer: Path) -> None:
    loaded = AutoTokenizer.from_pretrained(tokenizer)
    turns = [{"from": "human", "value": "is there a zebra?"}, {"from": "gpt", "value": "no"}]
    text, tokens = label_conversation(loaded, turns, TEMPLATE, 3)
    for any_tokenizer in (loaded, load_text_tokenizer(tokenizer)):
        shown = name_tokens(any_tokenizer, text, tokens.ids, tokens.start, tokens.end)
        assert "zebra" in [token.text.strip() for token in shown if token.is_unknown]
        assert [token.text for token in shown if token.is_special] == ["<s>", "</s>"]


def test_a_set_without_a_tokenizer_shows_the_text(stored: Shards, records: list[dict]) -> None:
    for row, found in enumerate(read_stored(stored, range(22))):
        shown = view_stored(row, found, TEMPLATE, 16, "pad")
        text = "".join(piece for piece, _ in TEMPLATE.split_spans(records[row]["conversations"]))
        assert "".join(run.tokens[0].text for run in shown.spans) == text
        assert [run.kind for run in shown.spans][1:2] == ["image"]
        assert shown.image is not None
        assert shown.image.size == (16, 16)
    record = {"conversations": [{"from": "gpt", "value": "no"}]}
    assert view_stored(3, StoredSample("k", b"", record), TEMPLATE, 16, "pad").problem.startswith("turn order")
    assert view_stored(3, StoredSample("k", b"", {}), TEMPLATE, 16, "pad").problem.startswith("wrong fields")
    assert view_stored(3, "damaged", TEMPLATE, 16, "pad").problem == "damaged"


@pytest.fixture(scope="module")
def stages(make_reader: Callable[..., Reader]) -> list[StageView]:
    samples = [shown for _, shown in view(make_reader(30), 30)]
    evil = replace(samples[0], name="<script>alert(1)</script>", problem="</p><img src=x>")
    shown = SetView(name="a <b>set</b>", facts=("2 of 3 samples",), samples=(evil, *samples[1:]))
    return [StageView(name="instruct", facts={"length": "30"}, template=view_template(TEMPLATE, "</s>"), sets=(shown,))]


def test_the_page_needs_no_script_and_no_network(stages: list[StageView]) -> None:
    html = render_page("mine", "a lead", stages)
    assert "<script" not in html
    assert "src=x" not in html.replace("&lt;img src=x&gt;", "")
    assert "a <b>set" not in html
    assert re.findall(r"""(?:src|href)=["'](?!data:|#)""", html) == []
    assert html.count('<img src="data:image/webp') == 22
    for text in ("cut off by max_length", "Training would replace this sample", "a lead", "[question]"):
        assert text in html
    # Anchors of the navigation exist.
    assert set(re.findall(r'href="#([^"]+)"', html)) <= set(re.findall(r'id="([^"]+)"', html))


def test_a_sample_without_learned_tokens_says_so(make_reader: Callable[..., Reader]) -> None:
    reader = make_reader()
    [sample] = draw_samples(reader, "all", 1, seed=0)
    assert sample.encoded is not None
    masked = replace(sample, encoded={**sample.encoded, "labels": np.full_like(sample.encoded["labels"], IGNORE_INDEX)})
    shown = view_sample(masked, reader, TEMPLATE, IMAGE_TOKENS, None, None)
    assert "0 learned" in shown.summary
    assert "0.0 % of them learned" in SetView(name="s", facts=(), samples=(shown,)).summary


def test_a_terminal_obeys_no_text(stages: list[StageView]) -> None:
    [shown] = stages[0].sets
    evil = replace(shown.samples[0], name="\x1b[2Jname", problem="\x07bell")
    text = format_stages([replace(stages[0], sets=(replace(shown, samples=(evil,)),))])
    assert "\x1b" not in text
    assert "\\x1b[2Jname" in text
    assert "\\x07bell" in text


def test_text_has_colours_only_if_pictures_can_be_drawn(stages: list[StageView]) -> None:
    plain = format_stages(stages)
    assert "\x1b" not in plain
    assert "cut off, context" in plain
    assert "<image> x 5" in plain
    coloured = format_stages(stages, lambda picture: f"picture {picture.size}")
    assert coloured.count("picture (16, 16)") == 22
    assert re.sub(r"\x1b\[[\d;]*m", "", coloured).replace("picture (16, 16)\n", "") == plain
