"""Tests of preview: drawn samples are those of the micro-batches at their positions, bit for bit."""

import functools
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from pipelines.data.ingest import Reader, make_conversation_encoder
from pipelines.data.order import Order
from pipelines.data.preview import draw_positions, draw_rows, draw_samples
from pipelines.data.shard_index import Shards
from redux.conversation import TEMPLATES, encode_conversation, label_conversation
from tests.pipelines.data.test_bad_samples import damage

GLOBAL_BATCH = 8


@pytest.fixture(scope="session")
def make_reader(stored: Shards, tokenizer: Path) -> Callable[[Shards], Reader]:
    """Return a function that makes a reader of micro-batches of 4, with all augmentations."""

    def make(shards: Shards = stored) -> Reader:
        return Reader(
            sources={"all": shards},
            order=Order(samples=(len(shards),), global_batch_size=GLOBAL_BATCH, seed=3),
            micro_batch_size=4,
            image_size=16,
            tokenizer=tokenizer,
            encode=make_conversation_encoder(TEMPLATES["vicuna_bare"], 5),
            random_flip=True,
            max_rounds=2,
        )

    return make


def test_samples_are_those_of_the_micro_batches(make_reader: Callable[..., Reader]) -> None:
    reader = make_reader()
    samples = list(draw_samples(reader, "all", 100, seed=1, threads=2))
    assert sorted(sample.stream_position.sample for sample in samples) == list(range(22))
    for sample in samples:
        number, turn = divmod(sample.stream_position.position, reader.micro_batch_size)
        batch = reader(number)
        assert batch["sample"][turn] == sample.stream_position.sample
        assert sample.stream_position.batch == sample.stream_position.position // GLOBAL_BATCH
        assert sample.image is not None
        assert sample.encoded is not None
        assert sample.problem == ""
        assert (batch["pixel_values"][turn] == sample.image).all()
        length = int(batch["attention_mask"][turn].sum())
        for name in ("input_ids", "labels"):
            assert batch[name][turn, :length].tolist() == sample.encoded[name].tolist()
    assert [sample.stream_position for sample in draw_samples(reader, "all", 100, seed=1)] == [
        sample.stream_position for sample in samples
    ]


def test_unusable_samples_have_the_reason_of_training(
    make_reader: Callable[..., Reader], stored: Shards, tmp_path: Path
) -> None:
    shutil.copytree(stored.folder, folder := tmp_path / "set")
    damage(folder, 2)
    reader = make_reader(Shards(folder))
    reader = replace(reader, encode=make_conversation_encoder(TEMPLATES["vicuna_bare"], 90, 92))
    samples = {sample.stream_position.sample: sample for sample in draw_samples(reader, "all", 22, seed=0)}
    assert samples[2].stored is None
    assert "checksum" in samples[2].problem
    assert samples[1].encoded is None
    assert "cut off after 92" in samples[1].problem
    assert samples[1].image is not None


@pytest.mark.parametrize("weights", [(), (1.0, 3.0, 0.1)])
def test_positions_are_those_of_the_order(weights: tuple[float, ...]) -> None:
    order = Order(samples=(400, 100, 30), global_batch_size=16, seed=0, weights=weights)
    get_batch = functools.cache(order.get_batch)
    for source, samples in enumerate(order.samples):
        for count, batches in ((10, None), (1000, None), (1000, 3)):
            positions = draw_positions(order, source, count, seed=5, batches=batches)
            if batches is None:
                assert min(count, samples) - 1 <= len(positions) <= count
            assert len({found.sample for found in positions}) == len(positions)
            for position, batch, sample in positions:
                sources, numbers = get_batch(batch)
                assert (sources[position % 16], numbers[position % 16]) == (source, sample)
                assert batches is None or batch < batches


def test_held_out_samples_are_not_drawn() -> None:
    order = Order(samples=(90,), global_batch_size=8, seed=0, held_out=(np.arange(0, 100, 10),))
    drawn = {found.sample for found in draw_positions(order, 0, 90, seed=0)}
    assert drawn == set(range(100)) - set(range(0, 100, 10))


def test_a_large_set_is_not_listed() -> None:
    order = Order(samples=(1_000_000,), global_batch_size=128, seed=0)
    assert len(draw_positions(order, 0, 1000, seed=0)) == 1000


def test_rows_are_drawn_once(stored: Shards) -> None:
    assert draw_rows(stored, 100, 0) == list(range(22))
    assert len(set(draw_rows(stored, 5, 0))) == 5


def test_whole_conversations_begin_with_the_cut_ones(records: list[dict], tokenizer: Path) -> None:
    loaded, template = AutoTokenizer.from_pretrained(tokenizer), TEMPLATES["vicuna_v1"]
    text, whole = label_conversation(loaded, records[3]["conversations"], template, 5)
    ids, labels = encode_conversation(loaded, records[3]["conversations"], template, 5, 60)
    assert len(ids) == 60 < len(whole.ids)
    assert whole.ids[:60].tolist() == ids.tolist()
    assert whole.labels[:60].tolist() == labels.tolist()
    spans = [text[start:end] for start, end in zip(whole.start, whole.end, strict=True)]
    assert spans.count("<image>") == 5
    assert "ASSISTANT:" in spans
