"""Tests of ingest: micro-batches match images and records, and Ray Data delivers them in order from any start."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from pipelines.data.ingest import (
    MAX_BLOCK_SAMPLES,
    Reader,
    draw_rounds,
    encode_caption,
    iterate_micro_batches,
    make_conversation_encoder,
    make_dataset,
)
from pipelines.data.options import ShardOptions
from pipelines.data.order import Order
from pipelines.data.shard_index import Shards, StoredSample
from pipelines.data.shard_writer import make_shards
from redux.conversation import CLIP_MAX_LENGTH, IGNORE_INDEX, IMAGE_TOKEN, TEMPLATES
from redux.image import load_pixels

pytestmark = pytest.mark.integration

SIDE = 16
TEMPLATE = TEMPLATES["vicuna_bare"]
IMAGE_TOKENS = 5
GLOBAL_BATCH = 8


@pytest.fixture(scope="session")
def reader(stored: Shards, tokenizer: Path) -> Reader:
    """A reader of micro-batches of 4. 22 samples are not a multiple of the global batch, so epochs meet within one."""
    return Reader(
        sources={"all": stored},
        order=Order(samples=(len(stored),), global_batch_size=GLOBAL_BATCH, seed=3),
        micro_batch_size=4,
        image_size=SIDE,
        tokenizer=tokenizer,
        encode=make_conversation_encoder(TEMPLATE, IMAGE_TOKENS),
        random_flip=True,
        max_rounds=99,
    )


def make_sample(rounds: int, first: str = f"{IMAGE_TOKEN}\n") -> StoredSample:
    turns = []
    for number in range(rounds):
        turns += [{"from": "human", "value": f"question {number}?"}, {"from": "gpt", "value": f"answer {number}"}]
    turns[0]["value"] = first + turns[0]["value"]
    return StoredSample("key", b"", {"id": "key", "conversations": turns})


def only_set(reader: Reader) -> Shards:
    [shards] = reader.sources.values()
    return shards


def pairs(sample: StoredSample) -> list[tuple[str, str]]:
    values = [turn["value"].removeprefix(f"{IMAGE_TOKEN}\n") for turn in sample.record["conversations"]]
    return list(zip(values[::2], values[1::2], strict=True))


def drawn(reader: Reader) -> dict[bytes, tuple[str, bool]]:
    """Map the bytes of every possible image to (key, is_mirrored)."""
    result = {}
    for sample in only_set(reader).read_samples(range(len(only_set(reader)))):
        array = load_pixels(sample.image, reader.image_size).transpose(1, 2, 0)
        result[array.tobytes()] = (sample.key, False)
        result[array[:, ::-1].tobytes()] = (sample.key, True)
    assert len(result) == 2 * len(only_set(reader))
    return result


def read_images(reader: Reader, numbers: Sequence[int]) -> list[tuple[str, bool]]:
    """Return (key, is_mirrored) of each sample in these micro-batches."""
    names = drawn(reader)
    return [names[row.tobytes()] for number in numbers for row in reader(number)["pixel_values"]]


def read_texts(reader: Reader, numbers: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Return input_ids and labels of each sample without padding."""
    result = []
    for number in numbers:
        batch = reader(number)
        for ids, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True):
            result.append((ids[mask == 1].tolist(), labels[mask == 1].tolist()))
    return result


def equal(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> bool:
    return first.keys() == second.keys() and all(
        np.array_equal(first[name], second[name]) and np.asarray(first[name]).dtype == np.asarray(second[name]).dtype
        for name in first
    )


@pytest.mark.parametrize("rounds", [1, 2, 7])
def test_shuffled_rounds_keep_each_answer_with_its_question_and_the_image_first(rounds: int):
    sample, orders = make_sample(rounds), set()
    for seed in range(60):
        mixed = draw_rounds(sample, 99, np.random.default_rng(seed))
        turns = mixed.record["conversations"]
        assert sorted(pairs(mixed)) == sorted(pairs(sample))
        assert turns[0]["value"].startswith(f"{IMAGE_TOKEN}\n")
        assert sum(turn["value"].count(IMAGE_TOKEN) for turn in turns) == 1
        assert [turn["from"] for turn in turns] == ["human", "gpt"] * rounds
        orders.add(tuple(pairs(mixed)))
    assert len(orders) == min(rounds, 2) if rounds < 3 else len(orders) > 50
    assert sample == make_sample(rounds), "the sample itself is as it was"


def test_a_system_message_stays_first() -> None:
    sample = make_sample(4)
    system = {"from": "system", "value": "Be brief."}
    with_system = replace(sample, record={"conversations": [system, *sample.record["conversations"]]})
    for seed in range(5):
        drawn_turns = draw_rounds(with_system, 2, np.random.default_rng(seed)).record["conversations"]
        same = draw_rounds(sample, 2, np.random.default_rng(seed)).record["conversations"]
        assert drawn_turns == [system, *same]


def test_a_draw_of_fewer_rounds_takes_all_rounds_equally_often():
    sample = make_sample(5)
    draws = [pairs(draw_rounds(sample, 2, np.random.default_rng(seed))) for seed in range(500)]
    assert all(len(draw) == len({*draw}) == 2 and {*draw} <= {*pairs(sample)} for draw in draws)
    counts = Counter(pair for draw in draws for pair in draw)
    assert all(150 < counts[pair] < 250 for pair in pairs(sample))


def test_a_question_without_an_answer_is_refused_by_name():
    sample = make_sample(2)
    cut = replace(sample, record={**sample.record, "conversations": sample.record["conversations"][:-1]})
    with pytest.raises(ValueError, match=rf"sample {sample.key}: 3 turns"):
        draw_rounds(cut, 2, np.random.default_rng(0))


def test_shuffling_a_conversation_without_an_image_adds_none():
    mixed = draw_rounds(make_sample(5, first=""), 99, np.random.default_rng(0))
    assert not any(IMAGE_TOKEN in turn["value"] for turn in mixed.record["conversations"])


def test_labels_are_the_answers_and_an_image_has_the_token_count_of_the_model(reader: Reader):
    tokenizer, keys = AutoTokenizer.from_pretrained(reader.tokenizer), [key for key, _ in read_images(reader, range(6))]
    records = {sample.key: sample for sample in only_set(reader).read_samples(range(len(only_set(reader))))}
    for key, (ids, labels) in zip(keys, read_texts(reader, range(6)), strict=True):
        assert ids.count(tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)) == IMAGE_TOKENS
        learned = [label for label in labels if label != IGNORE_INDEX]
        assert learned == [token for token, label in zip(ids, labels, strict=True) if label != IGNORE_INDEX]
        answers = tokenizer.decode(learned).split("</s>")[:-1]
        assert sorted(answer.strip() for answer in answers) == sorted(answer for _, answer in pairs(records[key]))


def test_rows_are_padded_on_the_right_with_ignored_tokens(reader: Reader):
    padding = AutoTokenizer.from_pretrained(reader.tokenizer).pad_token_id
    widths = set()
    for number in range(6):
        batch = reader(number)
        lengths = batch["attention_mask"].sum(axis=1)
        assert lengths.max() == batch["input_ids"].shape[1], "no wider than the longest"
        beyond = np.arange(batch["input_ids"].shape[1]) >= lengths[:, None]
        assert np.array_equal(batch["attention_mask"] == 0, beyond)
        assert (batch["input_ids"][beyond] == padding).all()
        assert (batch["labels"][beyond] == IGNORE_INDEX).all()
        widths.add(tuple(lengths))
    assert len(widths) > 1


def test_a_conversation_that_is_too_long_names_the_sample_and_the_limit(tokenizer: Path):
    loaded = AutoTokenizer.from_pretrained(tokenizer)
    with pytest.raises(ValueError, match=rf"sample test/99: \d+ tokens, allowed: {loaded.model_max_length}, "):
        make_conversation_encoder(TEMPLATE, IMAGE_TOKENS)(loaded, replace(make_sample(40), key="test/99"))


def test_a_conversation_that_is_too_long_can_be_cut_off_instead(tokenizer: Path):
    """Truncation as in LLaVA: the same tokens up to max_length, including image tokens."""
    loaded = AutoTokenizer.from_pretrained(tokenizer)
    whole = make_conversation_encoder(TEMPLATE, IMAGE_TOKENS)(loaded, make_sample(3))
    length = len(whole["input_ids"]) - 5
    cut = make_conversation_encoder(TEMPLATE, IMAGE_TOKENS, length)(loaded, make_sample(3))
    assert all(np.array_equal(cut[name], whole[name][:length]) for name in ("input_ids", "labels"))
    longer = make_conversation_encoder(TEMPLATE, IMAGE_TOKENS, loaded.model_max_length)(loaded, make_sample(40))
    assert len(longer["input_ids"]) == loaded.model_max_length
    with pytest.raises(ValueError, match=r"sample \S+: \d+ tokens, cut off after 3 within or before the image"):
        make_conversation_encoder(TEMPLATE, IMAGE_TOKENS, 3)(loaded, make_sample(3))


@pytest.mark.parametrize("roles", ["human human", "gpt human", "human user"])
def test_a_conversation_of_wrong_roles_names_the_sample(tokenizer: Path, roles: str):
    turns = [{"from": role, "value": "a question"} for role in roles.split()]
    sample = replace(make_sample(1), key="test/7", record={"conversations": turns})
    with pytest.raises(ValueError, match=r"sample test/7: turn \d: got role"):
        make_conversation_encoder(TEMPLATE, IMAGE_TOKENS)(AutoTokenizer.from_pretrained(tokenizer), sample)


def test_a_conversation_may_have_as_many_tokens_as_the_limit_and_no_more(tokenizer: Path):
    loaded = AutoTokenizer.from_pretrained(tokenizer)
    fits = loaded.model_max_length - len(encode_alone(loaded, 0))
    assert len(encode_alone(loaded, fits)) == loaded.model_max_length
    with pytest.raises(ValueError, match=f"{loaded.model_max_length + 1} tokens"):
        encode_alone(loaded, fits + 1)


def encode_alone(tokenizer: Any, image_tokens: int) -> list[int]:
    return make_conversation_encoder(TEMPLATE, image_tokens)(tokenizer, make_sample(2))["input_ids"].tolist()


def test_captions_are_the_answers_and_equal_captions_are_equal_rows(reader: Reader):
    tokenizer = AutoTokenizer.from_pretrained(reader.tokenizer)
    samples = only_set(reader).read_samples(range(len(only_set(reader))))
    ids = [encode_caption(tokenizer, sample)["input_ids"] for sample in samples]
    texts = [sample.record["conversations"][1]["value"] for sample in samples]
    for row, text in zip(ids, texts, strict=True):
        assert tokenizer.decode(row).replace(" ", "") == f"<s>{text}</s>"
        assert [np.array_equal(row, other_row) for other_row in ids] == [other == text for other in texts]
    long = replace(samples[0], record={"conversations": [{}, {"value": "yes " * 200}]})
    assert len(encode_caption(tokenizer, long)["input_ids"]) == CLIP_MAX_LENGTH


def test_a_micro_batch_is_a_pure_function_of_its_number(reader: Reader):
    batches_by_number = {number: reader(number) for number in (5, 0, 3)}
    again = replace(reader, sources={"all": Shards(only_set(reader).folder)})
    for number in (0, 3, 5):
        assert equal(again(number), batches_by_number[number])
        assert batches_by_number[number]["number"] == number


def test_flips_and_orders_of_rounds_do_not_depend_on_the_size_of_micro_batches(reader: Reader):
    """40 positions in micro-batches of 4, 2, 1 and 8 have the same samples and augmentations."""
    pictures, texts = read_images(reader, range(10)), read_texts(reader, range(10))
    for size in (1, 2, 8):
        other = replace(reader, micro_batch_size=size)
        assert read_images(other, range(40 // size)) == pictures
        assert read_texts(other, range(40 // size)) == texts


def test_about_half_of_the_images_are_mirrored_and_others_in_each_epoch_and_seed(reader: Reader):
    mirrored = [flip for _, flip in read_images(reader, range(55))]  # ten epochs
    assert 80 < sum(mirrored) < 140
    again = replace(reader, order=replace(reader.order, seed=4))
    assert [flip for _, flip in read_images(again, range(55))] != mirrored
    both = set(read_images(reader, range(55)))
    assert len(both) > 40, "nearly every image comes both ways"


def test_without_flip_and_shuffle_the_samples_are_as_stored(reader: Reader):
    plain = replace(reader, random_flip=False, max_rounds=None)
    numbers = np.concatenate([plain.order.get_batch(number)[1] for number in range(3)])
    stored = only_set(plain).read_samples(numbers)
    assert read_images(plain, range(6)) == [(sample.key, False) for sample in stored]
    loaded = AutoTokenizer.from_pretrained(plain.tokenizer)
    expected = [plain.encode(loaded, sample)["input_ids"].tolist() for sample in stored]
    assert [row for row, _ in read_texts(plain, range(6))] == expected


@pytest.mark.parametrize(("size", "workers"), [(8, 1), (4, 1), (4, 2), (2, 1), (2, 2), (2, 4), (1, 8), (1, 4)])
def test_a_global_batch_has_the_same_samples_at_any_number_of_workers(reader: Reader, size: int, workers: int):
    """Rank r computes micro-batches r, r + workers, ... After each step, all ranks have the global batch."""
    shared = replace(reader, micro_batch_size=size)
    per_rank = GLOBAL_BATCH // (size * workers)
    for step in range(4):
        turns = [(step * per_rank + turn) * workers + rank for turn in range(per_rank) for rank in range(workers)]
        keys = [key for key, _ in read_images(shared, turns)]
        assert keys == [row["key"] for row in only_set(reader).read_rows(reader.order.get_batch(step)[1])]


def batches(data: Any) -> list[dict[str, np.ndarray]]:
    return list(iterate_micro_batches(data.iter_batches(batch_size=None)))


def in_order(data: Any) -> Any:
    from ray.data import ExecutionOptions

    data.context.execution_options = ExecutionOptions(preserve_order=True)
    return data


def matches(got: Sequence[dict[str, np.ndarray]], reader: Reader, numbers: Sequence[int]) -> bool:
    return len(got) == len(numbers) and all(equal(batch, reader(n)) for batch, n in zip(got, numbers, strict=True))


@pytest.mark.usefixtures("ray_cluster")
def test_from_a_later_start_ray_data_gives_the_rest_of_the_stream_in_order(reader: Reader):
    assert matches(batches(in_order(make_dataset(reader, 5, 40, workers=1))), reader, range(5, 40))


@pytest.mark.usefixtures("ray_cluster")
def test_two_workers_get_every_other_micro_batch_in_order(reader: Reader):
    """Each worker has two full blocks and a short one."""
    stop = 2 * (2 * MAX_BLOCK_SAMPLES // reader.micro_batch_size + 3)
    shards = in_order(make_dataset(reader, 0, stop, workers=2)).streaming_split(2, equal=True)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(batches, shards)
    assert matches(first, reader, range(0, stop, 2))
    assert matches(second, reader, range(1, stop, 2))


@pytest.fixture(scope="module")
def mixed(
    in_process: Callable[[], AbstractContextManager[None]],
    reader: Reader,
    records: list[dict],
    pictures: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Reader:
    """A reader of a set in which only every fifth record has an image."""
    given = [dict(record) for record in records]
    for number, record in enumerate(given):
        if number % 5:
            del record["image"]
            turns = [
                {**turn, "value": turn["value"].removeprefix(f"{IMAGE_TOKEN}\n")} for turn in record["conversations"]
            ]
            record["conversations"] = turns
    folder = tmp_path_factory.mktemp("mixed")
    with in_process():
        make_shards(given, str(pictures), str(folder), ShardOptions(samples_per_shard=5))
    return replace(reader, sources={"mixed": Shards(folder)})


def test_a_micro_batch_has_the_images_of_its_samples_and_all_their_texts(mixed: Reader):
    """Image tokens match the images. Text-only samples have neither, even if a whole batch is text only."""
    image = AutoTokenizer.from_pretrained(mixed.tokenizer).convert_tokens_to_ids(IMAGE_TOKEN)
    counts = []
    for number in range(22):
        batch = mixed(number)
        counts.append(len(batch["pixel_values"]))
        assert batch["pixel_values"].shape[1:] == (SIDE, SIDE, 3)
        assert len(batch["input_ids"]) == mixed.micro_batch_size
        assert (batch["input_ids"] == image).sum() == counts[-1] * IMAGE_TOKENS
    assert 0 in counts
    assert len(set(counts)) > 2


@pytest.mark.usefixtures("ray_cluster")
def test_micro_batches_with_and_without_images_travel_through_ray(mixed: Reader):
    blocks = make_dataset(mixed, 0, 20, workers=2).iter_batches(batch_size=None)
    found = {int(row["number"]): row for row in iterate_micro_batches(blocks)}
    assert sorted(found) == list(range(20))
    assert all(equal(found[number], mixed(number)) for number in found)


def test_a_contrastive_stage_replaces_samples_of_text_alone(mixed: Reader):
    for number in range(6):
        batch = replace(mixed, encode=encode_caption)(number)
        assert len(batch["pixel_values"]) == mixed.micro_batch_size
        for entry in json.loads(batch["replaced"]):
            assert "text alone, allowed in a contrastive stage: an image and its caption" in entry["reason"]
            assert not only_set(mixed).has_image[entry["scheduled"]]
            assert only_set(mixed).has_image[entry["used"]]
