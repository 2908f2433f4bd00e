"""Packed micro-batches have the samples, tokens and images of the global batch, each conversation apart."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from pipelines.data.ingest import Batch, Reader, iterate_micro_batches, make_dataset
from pipelines.data.packing import Packing, divide_evenly, join_rows, lay_rows
from pipelines.data.shard_index import StoredSample
from redux.conversation import IGNORE_INDEX

GLOBAL_BATCH, MICRO_BATCH = 12, 3
MAX_LENGTH = 50
BATCHES = 5
SampleView = tuple[list[int], list[int], bytes]
"""Tokens and labels of a sample, and its pixels."""


def draw_lengths(seed: int) -> list[int]:
    rng = np.random.default_rng(seed)
    return rng.integers(1, rng.integers(2, 300), rng.integers(1, 60)).tolist()


@pytest.mark.parametrize("seed", range(30))
def test_parts_have_each_item_once_and_about_the_same_length(seed: int) -> None:
    lengths = draw_lengths(seed)
    parts = divide_evenly(lengths, seed % len(lengths) + 1)
    assert sorted(index for part in parts for index in part) == list(range(len(lengths)))
    totals = [sum(lengths[index] for index in part) for part in parts]
    assert min(map(len, parts)) > 0
    assert max(totals) - min(totals) <= max(lengths)


@pytest.mark.parametrize("seed", range(30))
def test_rows_have_each_item_once_and_only_a_longer_item_exceeds_the_limit(seed: int) -> None:
    lengths, limit = draw_lengths(seed), 100
    rows = lay_rows(lengths, limit)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert all(len(row) == 1 or sum(lengths[index] for index in row) <= limit for row in rows)
    assert all(rows)


def test_items_that_fit_one_row_share_it() -> None:
    assert lay_rows([3, 4, 3], 10) == [[0, 1, 2]]


def test_positions_restart_and_the_first_token_has_no_label() -> None:
    conversations = [{"input_ids": np.arange(size), "labels": np.arange(size)} for size in (2, 3, 1)]
    first, second = join_rows(conversations, [[2, 1], [0]])
    assert first["input_ids"].tolist() == [0, 0, 1, 2]
    assert first["position_ids"].tolist() == [0, 0, 1, 2]
    assert first["labels"].tolist() == [IGNORE_INDEX, IGNORE_INDEX, 1, 2]
    assert first["sample_index"].tolist() == [0, 1, 1, 1]
    assert second["sample_index"].tolist() == [2, 2]


@pytest.fixture(scope="module")
def reader(new_plan: Callable[..., Any]) -> Reader:
    """A reader of packed micro-batches. A third of the samples have no image."""
    packing = Packing(max_length=MAX_LENGTH)
    return new_plan(
        global_batch_size=GLOBAL_BATCH, micro_batch_size=MICRO_BATCH, packing=packing, random_flip=True
    ).build_reader()


def view_samples(reader: Reader, batch: Batch) -> dict[int, tuple[int, SampleView]]:
    """Map the position of each sample to its number and content. Images belong to the image tokens in their order."""
    image_id = reader.get_tokenizer().convert_tokens_to_ids("<image>")
    images = iter(batch["pixel_values"])
    real = batch["attention_mask"] == 1
    # Without packing each row is a sample.
    samples = batch.get("sample_index", np.arange(len(real))[:, None] + np.zeros_like(real, np.int64))
    views = {}
    for index, (position, number) in enumerate(zip(batch["position"].tolist(), batch["sample"].tolist(), strict=True)):
        tokens = real & (samples == index)
        ids, labels = batch["input_ids"][tokens].tolist(), batch["labels"][tokens].tolist()
        image = next(images).tobytes() if image_id in ids else b""
        views[position] = number, (ids, labels, image)
    assert next(images, None) is None
    return views


def read_stream(reader: Reader) -> dict[int, tuple[int, SampleView]]:
    """Read the samples of all global batches by position."""
    count = GLOBAL_BATCH // reader.micro_batch_size
    views = [view_samples(reader, reader(number)) for number in range(BATCHES * count)]
    return {position: view for batch in views for position, view in batch.items()}


def test_packed_samples_are_those_without_packing(reader: Reader) -> None:
    stream = read_stream(reader)
    assert sorted(stream) == list(range(BATCHES * GLOBAL_BATCH))
    assert stream == read_stream(replace(reader, packing=None))


def test_rows_keep_the_limit_and_some_have_several_images_or_text_alone(reader: Reader) -> None:
    image_id = reader.get_tokenizer().convert_tokens_to_ids("<image>")
    found = set()
    for number in range(BATCHES * GLOBAL_BATCH // MICRO_BATCH):
        batch = reader(number)
        for ids, mask, samples in zip(batch["input_ids"], batch["attention_mask"], batch["sample_index"], strict=True):
            num_samples = len(np.unique(samples[mask == 1]))
            assert mask.sum() <= MAX_LENGTH or num_samples == 1
            found.add((num_samples > 1, int((ids == image_id).sum()) // reader.image_tokens))
    assert {(True, 2), (True, 1), (False, 0)} <= found


def test_micro_batches_of_a_step_have_about_the_same_number_of_tokens(reader: Reader) -> None:
    totals = {}
    for packing in (reader.packing, None):
        batches = [replace(reader, packing=packing)(number) for number in range(BATCHES * GLOBAL_BATCH // MICRO_BATCH)]
        tokens = np.array([batch["attention_mask"].sum() for batch in batches]).reshape(BATCHES, -1)
        totals[packing is None] = (tokens.max(axis=1) / tokens.mean(axis=1)).mean()
    assert totals[False] < totals[True]


def test_replacements_are_those_without_packing(reader: Reader) -> None:
    encode = reader.encode

    def refuse_some(tokenizer: Any, sample: StoredSample) -> Any:
        if int(sample.id.rpartition("/")[2]) % 5 == 0:
            raise ValueError("refused")
        return encode(tokenizer, sample)

    refusing = replace(reader, encode=refuse_some)
    stream = read_stream(refusing)
    assert stream == read_stream(replace(refusing, packing=None))
    assert stream != read_stream(reader)


@pytest.mark.integration
@pytest.mark.usefixtures("ray_cluster")
def test_packed_micro_batches_travel_through_ray(reader: Reader) -> None:
    data = make_dataset(reader, 4, 16, 2)
    data.context.execution_options.preserve_order = True
    received = {int(batch["number"]): batch for batch in iterate_micro_batches(data.iter_batches(batch_size=None))}
    assert sorted(received) == list(range(4, 16))
    for number, batch in received.items():
        expected = reader(number)
        assert batch.keys() == expected.keys()
        assert all(np.array_equal(batch[name], expected[name]) for name in expected)
