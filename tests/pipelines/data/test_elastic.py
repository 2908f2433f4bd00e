"""Tests of elasticity: the stream of global batches is the same for any number of workers and after any restart.

Neither the speed of ranks and readers, nor a killed reader, nor errors of the store change it. Sets and shards have
random sizes. A few large cases run on Ray, and many small ones without it.
"""

import hashlib
import os
import random
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pytest
from PIL import Image
from ray.data import ExecutionOptions

from pipelines.core import storage
from pipelines.core.storage import Retry
from pipelines.data import ingest
from pipelines.data.grouping import LengthGroups
from pipelines.data.ingest import Reader, iterate_micro_batches, make_conversation_encoder, make_dataset
from pipelines.data.options import ShardOptions
from pipelines.data.order import Order
from pipelines.data.shard_index import Shards
from pipelines.data.shard_writer import make_shards
from redux.conversation import IMAGE_TOKEN, TEMPLATES

pytestmark = pytest.mark.integration

SIDE = 8
PACE = random.Random(0)
InProcess = Callable[[], AbstractContextManager[None]]
StreamItem = tuple[int, int, str]
"""Source, sample, and a digest of all that a model sees of it."""


@pytest.fixture(scope="module")
def pool(in_process: InProcess, records: list[dict], tmp_path_factory: pytest.TempPathFactory) -> list[Shards]:
    """Sets with no, some and only text-only samples. Some records are rejected, so shards differ in size."""
    rng, images, sets = np.random.default_rng(0), tmp_path_factory.mktemp("images"), []
    for share in (0, 0, 0.4, 0.7, 1):
        given: list[dict] = []
        for number in range(rng.integers(20, 80)):
            turns = [dict(turn) for turn in records[rng.integers(len(records))]["conversations"]]
            record = {"id": number, "conversations": turns}
            if rng.random() < share:
                turns[0]["value"] = turns[0]["value"].removeprefix(f"{IMAGE_TOKEN}\n")
            else:
                record["image"] = f"{uuid4()}.png"
                noise = rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
                Image.fromarray(noise).save(images / record["image"])
            given += [record] * (2 if rng.random() < 0.1 else 1)
        making = ShardOptions(samples_per_shard=int(rng.integers(1, 15)), max_bad_fraction=1)
        folder = tmp_path_factory.mktemp("set")
        with in_process():
            assert make_shards(given, str(images), str(folder), making)["quarantined"]
        sets.append(Shards(folder))
    return sets


@pytest.fixture(scope="module")
def long(in_process: InProcess, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Shards:
    """400 samples of equal size in shards of 24."""
    turns = [{"from": "human", "value": f"{IMAGE_TOKEN}\nis there red shape?"}, {"from": "gpt", "value": "yes"}]
    given = [{"id": f"{number:04d}", "image": "0.png", "conversations": turns} for number in range(400)]
    folder = tmp_path_factory.mktemp("long")
    with in_process():
        make_shards(given, str(pictures), str(folder), ShardOptions(samples_per_shard=24, image_size=SIDE))
    return Shards(folder)


def make_reader(tokenizer: Path, order: Order, sets: Sequence[Shards]) -> Reader:
    """Make a reader of whole global batches that augments each sample."""
    return Reader(
        sources={f"set {number}": shards for number, shards in enumerate(sets)},
        order=order,
        micro_batch_size=order.global_batch_size,
        image_size=SIDE,
        tokenizer=tokenizer,
        encode=make_conversation_encoder(TEMPLATES["vicuna_bare"], 2),
        random_flip=True,
        max_rounds=2,
    )


class FakeSet:
    """Stand-in for a set with random sizes, as far as an order needs it."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.shard_sizes = rng.integers(1, rng.integers(2, 20), rng.integers(1, 15))
        self.has_image = rng.random(len(self)) < rng.random()
        self.word_counts = rng.integers(1, 99, len(self))

    def __len__(self) -> int:
        return int(self.shard_sizes.sum())


def mixture(pool: Sequence[Any], rng: np.random.Generator, kind: str) -> tuple[Order, list[Any]]:
    """Make an order over some sets. Kinds: "weights", "plain" (no weights, not shuffled), "window", "groups"."""
    count = 1 if kind == "groups" else int(rng.integers(1, 4))
    taken = [pool[number] for number in rng.permutation(len(pool))[:count]]
    order = Order(
        samples=tuple(map(len, taken)),
        global_batch_size=int(rng.choice([4, 6, 8, 12, 24])),
        seed=int(rng.integers(1000)),
        weights=tuple(rng.uniform(0.5, 5, count).round(2).tolist()) if kind != "plain" else (),
        shuffle={"window": "window", "plain": "none"}.get(kind, "global"),
        window=int(rng.integers(1, 5)),
        shards=tuple(shards.shard_sizes for shards in taken) if kind == "window" else (),
        groups=LengthGroups.from_columns(taken[0].has_image, taken[0].word_counts, int(rng.integers(1, 4)))
        if kind == "groups"
        else None,
    )
    return order, taken


@dataclass
class Run:
    """Steps start..stop-1 of a longer job, with a number of workers and a micro-batch size."""

    start: int
    stop: int
    workers: int
    size: int


def runs(rng: np.random.Generator, global_batch_size: int, steps: int, count: int) -> list[Run]:
    """Draw consecutive runs, each with another number of workers than the previous one."""
    borders, result, workers = sorted(rng.permutation(range(1, steps))[: count - 1].tolist()), [], 0
    for start, stop in zip([0, *borders], [*borders, steps], strict=True):
        workers = int(rng.choice([n for n in range(1, 5) if global_batch_size % n == 0 and n != workers]))
        share = global_batch_size // workers
        size = int(rng.choice([n for n in range(1, share + 1) if share % n == 0]))
        result.append(Run(start, stop, workers, size))
    return result


def stream(reader: Reader, ranks: Sequence[list[dict[str, Any]]]) -> list[StreamItem]:
    """Interleave the micro-batches of the ranks into the order of the global batches."""
    return [item for turn in zip(*ranks, strict=True) for batch in turn for item in flatten_batch(reader, batch)]


def flatten_batch(reader: Reader, batch: dict[str, Any]) -> Iterator[StreamItem]:
    assert batch["replaced"] == "[]"
    sets, images = list(reader.sources.values()), iter(batch["pixel_values"])
    columns = (batch[name] for name in ("source", "sample", "input_ids", "labels", "attention_mask"))
    for source, sample, ids, labels, mask in zip(*columns, strict=True):
        image = next(images) if sets[source].has_image[sample] else np.empty(0)
        seen = b"".join(array.tobytes() for array in (ids[mask == 1], labels[mask == 1], image))
        yield int(source), int(sample), hashlib.sha256(seen).hexdigest()
    assert next(images, None) is None


def read_alone(reader: Reader, steps: range) -> list[StreamItem]:
    """Compute the stream with one reader alone."""
    return [item for step in steps for item in flatten_batch(reader, reader(step))]


def list_samples(items: Sequence[StreamItem]) -> list[tuple[int, int]]:
    return [(source, sample) for source, sample, _ in items]


def ordered(order: Order, steps: range) -> list[tuple[int, int]]:
    """Return (source, sample) of these global batches according to the order."""
    return [pair for step in steps for pair in zip(*map(np.ndarray.tolist, order.get_batch(step)), strict=True)]


def is_once_per_epoch(order: Order, pairs: Sequence[tuple[int, int]]) -> bool:
    for source, samples in enumerate(order.samples):
        drawn = [sample for pair_source, sample in pairs if pair_source == source]
        epochs = [drawn[start : start + samples] for start in range(0, len(drawn), samples)]
        if any(len({*epoch}) < len(epoch) or not {*epoch} <= {*range(samples)} for epoch in epochs):
            return False
    return True


# Without Ray


class NumbersOnlyReader(Reader):
    """Reader that returns the scheduled samples without reading them."""

    def _read_or_none(self, source: np.ndarray, scheduled: np.ndarray) -> list[None]:
        return [None] * len(scheduled)

    def _encode_or_replace(self, position: int, source: int, scheduled: int, *_: None) -> tuple[Any, None, None]:
        return {"input_ids": np.array([scheduled])}, None, None


def deal_blocks(in_process: InProcess, reader: Reader, run: Run, steps: int) -> list[list[dict[str, Any]]]:
    """Deal blocks to the workers in turn without Ray. Tests on Ray show that it does the same."""
    per_step = reader.order.global_batch_size // run.size
    with in_process():
        blocks: Any = make_dataset(
            replace(reader, micro_batch_size=run.size), run.start * per_step, steps * per_step, run.workers
        )
    due = (run.stop - run.start) * per_step // run.workers
    return [list(islice(iterate_micro_batches(blocks[rank :: run.workers]), due)) for rank in range(run.workers)]


@pytest.mark.parametrize("kind", ["weights", "plain", "window", "groups"])
@pytest.mark.parametrize("seed", range(40))
def test_the_order_survives_any_restarts_at_other_world_sizes(
    in_process: InProcess,
    tokenizer: Path,
    monkeypatch: pytest.MonkeyPatch,
    seed: int,
    kind: str,
):
    rng = np.random.default_rng((seed, len(kind)))
    sets = [FakeSet(rng) for _ in range(3)]
    order = mixture(sets, rng, kind)[0]
    steps = order.count_batches(2.3)
    pairs: list[tuple[int, int]] = []
    for run in runs(rng, order.global_batch_size, steps, int(rng.integers(1, 6))):
        monkeypatch.setattr(ingest, "MAX_BLOCK_SAMPLES", int(rng.integers(1, 65)))
        ranks = deal_blocks(in_process, NumbersOnlyReader(**vars(make_reader(tokenizer, order, []))), run, steps)
        pairs += [
            pair
            for turn in zip(*ranks, strict=True)
            for batch in turn
            for pair in zip(batch["source"].tolist(), batch["sample"].tolist(), strict=True)
        ]
    assert pairs == ordered(order, range(steps))
    assert is_once_per_epoch(order, pairs)


@pytest.mark.parametrize("kind", ["weights", "plain", "window", "groups"])
@pytest.mark.parametrize("seed", range(4))
def test_all_that_a_model_sees_survives_any_restarts_at_other_world_sizes(
    in_process: InProcess,
    pool: list[Shards],
    tokenizer: Path,
    monkeypatch: pytest.MonkeyPatch,
    seed: int,
    kind: str,
):
    rng = np.random.default_rng((seed, len(kind)))
    order, sets = mixture(pool, rng, kind)
    reader, steps = make_reader(tokenizer, order, sets), order.count_batches(1.2)
    items: list[StreamItem] = []
    for run in runs(rng, order.global_batch_size, steps, 3):
        monkeypatch.setattr(ingest, "MAX_BLOCK_SAMPLES", int(rng.integers(1, 65)))
        items += stream(reader, deal_blocks(in_process, reader, run, steps))
    assert items == read_alone(reader, range(steps))
    assert list_samples(items) == ordered(order, range(steps))


# On Ray


def run_ranks(
    reader: Reader, run: Run, steps: int, wait: Callable[[int], None] = lambda _: None
) -> list[list[dict[str, Any]]]:
    """Return the micro-batches of the ranks, which are threads. The run stops while Ray Data reads ahead.

    Args:
        reader: reader of the stream.
        run: the steps.
        steps: number of all steps.
        wait: called with the rank before each of its micro-batches.
    """
    per_step = reader.order.global_batch_size // run.size
    data = make_dataset(replace(reader, micro_batch_size=run.size), run.start * per_step, steps * per_step, run.workers)
    data.context.execution_options = ExecutionOptions(preserve_order=True)
    shards = data.streaming_split(run.workers, equal=True)
    due = (run.stop - run.start) * per_step // run.workers

    def rank(number: int) -> list[dict[str, Any]]:
        got = []
        for turn, batch in enumerate(islice(iterate_micro_batches(shards[number].iter_batches(batch_size=None)), due)):
            assert batch["number"] == run.start * per_step + turn * run.workers + number
            wait(number)
            got.append(batch)
        return got

    with ThreadPoolExecutor(run.workers) as pool:
        return list(pool.map(rank, range(run.workers)))


def sleep_like_training(rank: int) -> None:
    """Sleep as if computing: times vary, and higher ranks take longer. The variation is what is tested."""
    time.sleep(PACE.choice((0, 0, 0.01, 0.03)) * rank)


def slow_down(encode: Callable[..., Any]) -> Callable[..., Any]:
    """Make some samples slow to encode."""

    def row(tokenizer: Any, sample: Any) -> Any:
        time.sleep(int(sample.key) * 7919 % 13 / 1000)
        return encode(tokenizer, sample)

    return row


def kill_once(encode: Callable[..., Any], marker: Path, key: str) -> Callable[..., Any]:
    """Kill the first process that encodes the sample."""

    def row(tokenizer: Any, sample: Any) -> Any:
        if sample.key == key:
            try:
                with open(marker, "x") as file:
                    file.write(str(os.getpid()))
            except FileExistsError:
                pass
            else:
                os.kill(os.getpid(), signal.SIGKILL)
        return encode(tokenizer, sample)

    return row


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize(
    ("kind", "seed", "count", "slow", "killed"),
    [("weights", 1, 2, True, False), ("window", 0, 2, False, True), ("groups", 9, 2, True, False)],
)
def test_on_ray_the_stream_survives_restarts_at_other_world_sizes_slow_ranks_and_killed_readers(
    pool: list[Shards],
    tokenizer: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    kind: str,
    seed: int,
    count: int,
    slow: bool,
    killed: bool,
):
    rng = np.random.default_rng((seed, len(kind)))
    order, sets = mixture(pool, rng, kind)
    reader, steps = make_reader(tokenizer, order, sets), order.count_batches(2.2)
    disturbed = replace(reader, encode=slow_down(reader.encode)) if slow else reader
    items: list[StreamItem] = []
    for number, run in enumerate(runs(rng, order.global_batch_size, steps, count)):
        monkeypatch.setattr(ingest, "MAX_BLOCK_SAMPLES", int(rng.integers(4, 33)))
        faulty, marker = disturbed, tmp_path / str(number)
        if killed and number == 1:
            source, sample = ordered(order, range(run.start, run.stop))[
                (run.stop - run.start) * order.global_batch_size // 2
            ]
            (row,) = sets[source].read_rows([sample])
            faulty = replace(disturbed, encode=kill_once(disturbed.encode, marker, row["key"]))
        items += stream(reader, run_ranks(faulty, run, steps, sleep_like_training if slow else lambda _: None))
        assert marker.exists() == (faulty is not disturbed)
    assert items == read_alone(reader, range(steps))
    assert list_samples(items) == ordered(order, range(steps))
    assert is_once_per_epoch(order, list_samples(items))


# Restarts


@pytest.mark.parametrize("size", [4, 16])
def test_a_restart_reads_the_same_number_of_bytes_at_any_step(
    long: Shards, tokenizer: Path, monkeypatch: pytest.MonkeyPatch, size: int
):
    """Count calls, ranges and bytes of the first micro-batch. An epoch has 25 global batches."""
    order = Order(samples=(len(long),), global_batch_size=16, seed=5)
    reader, read, asked = replace(make_reader(tokenizer, order, [long]), micro_batch_size=size), storage.read_ranges, []

    def counted(ranges: Sequence[storage.ByteRange]) -> list[bytes]:
        asked.append((len(ranges), sum(stop - start for _, start, stop in ranges)))
        return read(ranges)

    monkeypatch.setattr(storage, "read_ranges", counted)
    for step in (0, 1, 12, 24, 25, 10**6):
        asked.clear()
        replace(reader, sources={"set 0": Shards(long.folder)})(step * 16 // size)
        assert asked == [(size, size * 2048)]


@pytest.mark.usefixtures("ray_cluster")
def test_on_ray_nothing_before_the_start_is_read(long: Shards, tokenizer: Path, tmp_path: Path):
    """The run starts at 95 % of an epoch and goes to its end."""
    order, log = Order(samples=(len(long),), global_batch_size=4, seed=5), tmp_path / "log"
    reader = make_reader(tokenizer, order, [long])
    encode = reader.encode

    def logged(tokenizer: Any, sample: Any) -> Any:
        with open(log, "a") as file:  # O_APPEND: lines of several processes do not mix
            file.write(f"{sample.key}\n")
        return encode(tokenizer, sample)

    run = Run(95, 100, workers=2, size=1)
    items = stream(reader, run_ranks(replace(reader, encode=logged), run, 100))
    assert list_samples(items) == ordered(order, range(95, 100))
    rows = long.read_rows(sample for _, sample in list_samples(items))
    assert sorted(log.read_text().split()) == sorted(row["key"] for row in rows)


# A store full of faults


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("seed", [0])
def test_on_ray_a_store_full_of_faults_gives_what_the_local_folder_gives(
    proxy: Any,
    bucket: str,
    fast: Retry,
    stored: Shards,
    tokenizer: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    seed: int,
):
    """The store returns all kinds of errors in turn. Credentials expire three times and are renewed in a file."""
    monkeypatch.setattr(ingest, "MAX_BLOCK_SAMPLES", 8)
    monkeypatch.setattr(storage, "RETRY", replace(fast, tries=30, deadline_s=60, read_timeout_s=0.5))
    monkeypatch.setattr(storage, "MAX_GAP_BYTES", 0)
    credentials, lock = tmp_path / "credentials", threading.Lock()

    def renew() -> None:
        text = f"[default]\naws_access_key_id = KEY{uuid4().hex}\naws_secret_access_key = a-secret-of-ours\n"
        storage.write(str(credentials), text.encode())

    class Script(deque[str]):
        """The proxy's faults; at "expire" the last key becomes invalid, and another one valid."""

        def popleft(self) -> str:
            if (fault := super().popleft()) != "expire":
                return fault
            with lock:
                expired_key = proxy.key
                renew()
                proxy.expired[expired_key] = "ExpiredToken"
            return "ExpiredToken"

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(credentials))
    renew()
    for name in storage.list_files(stored.folder):
        storage.write(storage.join(bucket, name), storage.read(storage.join(stored.folder, name)))
    remote = Shards(bucket)
    proxy.asked.clear()
    kinds = ["SlowDown", "InternalError", "cut", "short", "drop"] * 6 + ["stall"] * 3 + ["expire"] * 3 + [""] * 30
    proxy.faults = Script(random.Random(seed).sample(kinds, len(kinds)))
    order = Order(samples=(len(stored),), global_batch_size=8, seed=seed)
    local = make_reader(tokenizer, order, [stored])

    class Carried(dict[str, Shards]):
        """Sources that bring along what S3 is reached with: Ray's workers know nothing of this test."""

        def __reduce__(self) -> Any:
            environment = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
            return arrive, (dict(self), environment, storage.RETRY, storage.MAX_GAP_BYTES)

    def arrive(sources: dict[str, Shards], environment: dict[str, str], retry: Retry, gap: int) -> Carried:
        os.environ.update(environment)
        storage.RETRY, storage.MAX_GAP_BYTES = retry, gap
        return Carried(sources)

    carried = replace(local, sources=Carried({"set 0": remote}))
    items = stream(local, run_ranks(carried, Run(0, 12, workers=2, size=2), 12))
    assert items == read_alone(local, range(12))
    assert not proxy.faults, "all were served"
    assert len(proxy.asked) > len(items) + len(kinds) - kinds.count("")
    assert proxy.expired
    assert proxy.key not in proxy.expired
