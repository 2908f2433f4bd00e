"""Time to the first batch of an epoch, from its start and from 95 % of it, and the bytes of the shards read for it.

    python jobs/bench/resume.py

Squares of 336 pixels, prepared, with texts of one word; each reading starts Ray Data anew, in turn from either place,
with two training workers who take one batch each.  The result is printed and added to resume.jsonl beside this file.
"""

import argparse
import io
import statistics
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import ray
import ray.data
from PIL import Image

from jobs.bench.record import append
from pipelines.core import cluster, storage
from pipelines.core.storage import read_ranges
from pipelines.data.ingest import Reader, iterate_micro_batches, make_conversation_encoder, make_dataset
from pipelines.data.options import ShardOptions
from pipelines.data.order import Order
from pipelines.data.shard_index import Shards
from pipelines.data.shard_writer import make_shards
from redux.conversation import IMAGE_TOKEN, train_word_tokenizer

RESUME_SIZE, RESUME_BATCH, RESUME_WORKERS = 336, 16, 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=3200, help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=5, help="default: %(default)s")
    arguments = parser.parse_args()
    steps = arguments.samples // (RESUME_BATCH * RESUME_WORKERS)
    places = {"start": 0, "95 %": int(0.95 * steps)}
    seconds: dict[str, list[float]] = {name: [] for name in places}
    with tempfile.TemporaryDirectory() as folder, cluster.open_session():
        reader = small(Path(folder), arguments.samples)
        first(reader, 0, steps)  # what is loaded once
        for _ in range(arguments.repeats):
            for name, place in places.items():
                seconds[name].append(first(reader, place, steps))
        read = {name: bytes_read(reader, place) for name, place in places.items()}
    medians = {name: round(statistics.median(values), 2) for name, values in seconds.items()}
    for name, median in medians.items():
        print(f"{name:6} {median:6.2f} s to the first batch, {read[name]} bytes of the shards in it")
    append(
        __file__,
        versions={"ray": ray.__version__},
        samples=arguments.samples,
        first_batch_s=medians,
        readings_s={name: [round(value, 2) for value in values] for name, values in seconds.items()},
        ratio=round(medians["95 %"] / medians["start"], 3),
        bytes=read,
    )


def small(folder: Path, samples: int) -> Reader:
    """A set whose samples are all of one size on disk: noise, made into squares."""
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (480, 640, 3), dtype=np.uint8)).save(file, "png")
    (folder / "noise.png").write_bytes(file.getvalue())
    records = [
        {"id": f"{n:06d}", "image": "noise.png", "conversations": [{"from": "human", "value": IMAGE_TOKEN}, said(n)]}
        for n in range(samples)
    ]
    make_shards(
        records, str(folder), str(folder / "shards"), ShardOptions(samples_per_shard=200, image_size=RESUME_SIZE)
    )
    train_word_tokenizer(["photo"], 32).save_pretrained(folder / "tokenizer")
    return Reader(
        sources={"noise": Shards(folder / "shards")},
        order=Order(samples=(samples,), global_batch_size=RESUME_BATCH * RESUME_WORKERS, seed=0),
        micro_batch_size=RESUME_BATCH,
        image_size=RESUME_SIZE,
        tokenizer=folder / "tokenizer",
        encode=make_conversation_encoder("plain", image_tokens=1),
    )


def said(number: int) -> dict[str, str]:
    return {"from": "gpt", "value": f"photo {number:06d}"}


def first(reader: Reader, step: int, steps: int) -> float:
    """Seconds until every worker has its first micro-batch of that step."""
    start = time.perf_counter()
    data = make_dataset(reader, step * RESUME_WORKERS, steps * RESUME_WORKERS, RESUME_WORKERS)
    data.context.execution_options = ray.data.ExecutionOptions(preserve_order=True)
    with ThreadPoolExecutor(RESUME_WORKERS) as pool:
        numbers = list(pool.map(number, data.streaming_split(RESUME_WORKERS, equal=True)))
    if sorted(numbers) != [step * RESUME_WORKERS + rank for rank in range(RESUME_WORKERS)]:
        raise RuntimeError(f"step {step}: got micro-batches {numbers}")
    return time.perf_counter() - start


def number(shard: Any) -> int:
    return int(next(iterate_micro_batches(shard.iter_batches(batch_size=None)))["number"])


def bytes_read(reader: Reader, step: int) -> int:
    """Asked of the storage for one global batch."""
    asked: list[storage.ByteRange] = []

    def counted(ranges: Sequence[storage.ByteRange]) -> list[bytes]:
        asked.extend(ranges)
        return read_ranges(ranges)

    with patch.object(storage, "read_ranges", counted):
        for rank in range(RESUME_WORKERS):
            reader(step * RESUME_WORKERS + rank)
    return sum(stop - start for _, start, stop in asked)


if __name__ == "__main__":
    main()
