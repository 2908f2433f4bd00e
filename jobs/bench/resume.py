"""Measure the time to the first batch at the start and at 95 % of an epoch, and the bytes of shards read for it.

    python jobs/bench/resume.py

Prepared squares of 336 pixels with texts of two words. Each measurement starts Ray Data again, alternately at both
positions, with two training workers that take one batch each. The script prints the result and appends it to
resume.jsonl.
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

from jobs.bench.record import add_out_option, append_record
from pipelines.core import cluster, storage
from pipelines.core.storage import read_ranges
from pipelines.data.ingest import Reader, iterate_micro_batches, make_conversation_encoder, make_dataset
from pipelines.data.options import ShardOptions
from pipelines.data.order import Order
from pipelines.data.shard_index import Shards
from pipelines.data.shard_writer import make_shards
from redux.conversation import IMAGE_TOKEN, TEMPLATES, train_word_tokenizer

RESUME_SIZE, RESUME_BATCH, RESUME_WORKERS = 336, 16, 2


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=3200, help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=5, help="default: %(default)s")
    add_out_option(parser, __file__)
    arguments = parser.parse_args(argv)
    steps = arguments.samples // (RESUME_BATCH * RESUME_WORKERS)
    first_steps = {"start": 0, "95 %": int(0.95 * steps)}
    seconds: dict[str, list[float]] = {name: [] for name in first_steps}
    with tempfile.TemporaryDirectory() as folder, cluster.open_session():
        reader = build_reader(Path(folder), arguments.samples)
        # A first measurement is dropped: it includes imports and the start of worker processes.
        time_first_batch(reader, 0, steps)
        for _ in range(arguments.repeats):
            for name, step in first_steps.items():
                seconds[name].append(time_first_batch(reader, step, steps))
        bytes_read = {name: count_bytes_read(reader, step) for name, step in first_steps.items()}
    medians = {name: round(statistics.median(values), 2) for name, values in seconds.items()}
    for name, median in medians.items():
        print(f"{name:6} {median:6.2f} s to the first batch, {bytes_read[name]} bytes of the shards in it")
    append_record(
        arguments.out,
        versions={"ray": ray.__version__},
        samples=arguments.samples,
        first_batch_s=medians,
        readings_s={name: [round(value, 2) for value in values] for name, values in seconds.items()},
        ratio=round(medians["95 %"] / medians["start"], 3),
        bytes=bytes_read,
    )


def build_reader(folder: Path, samples: int) -> Reader:
    """Build a reader of a set of noise, whose samples all have the same size on disk."""
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (480, 640, 3), dtype=np.uint8)).save(file, "png")
    (folder / "noise.png").write_bytes(file.getvalue())
    records = [
        {
            "id": f"{number:06d}",
            "image": "noise.png",
            "conversations": [
                {"from": "human", "value": IMAGE_TOKEN},
                {"from": "gpt", "value": f"photo {number:06d}"},
            ],
        }
        for number in range(samples)
    ]
    # Prepared squares: every sample has the same number of bytes, so the reads can be compared.
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
        encode=make_conversation_encoder(TEMPLATES["plain"], image_tokens=1),
    )


def time_first_batch(reader: Reader, step: int, steps: int) -> float:
    """Measure the seconds until every worker has its first micro-batch of a step."""
    start = time.perf_counter()
    data = make_dataset(reader, step * RESUME_WORKERS, steps * RESUME_WORKERS, RESUME_WORKERS)
    data.context.execution_options = ray.data.ExecutionOptions(preserve_order=True)
    with ThreadPoolExecutor(RESUME_WORKERS) as pool:
        numbers = list(pool.map(read_number, data.streaming_split(RESUME_WORKERS, equal=True)))
    # A time counts only if the batches are the right ones.
    if sorted(numbers) != [step * RESUME_WORKERS + rank for rank in range(RESUME_WORKERS)]:
        raise RuntimeError(f"step {step}: got micro-batches {numbers}, allowed: one per worker, from this step")
    return time.perf_counter() - start


def read_number(shard: Any) -> int:
    return int(next(iterate_micro_batches(shard.iter_batches(batch_size=None)))["number"])


def count_bytes_read(reader: Reader, step: int) -> int:
    """Count the bytes that a global batch requests from the storage."""
    requested: list[storage.ByteRange] = []

    def read_and_record(ranges: Sequence[storage.ByteRange]) -> list[bytes]:
        requested.extend(ranges)
        return read_ranges(ranges)

    # Shards reads through this function, so its arguments are all that is requested.
    with patch.object(storage, "read_ranges", read_and_record):
        for rank in range(RESUME_WORKERS):
            reader(step * RESUME_WORKERS + rank)
    return sum(stop - start for _, start, stop in requested)


if __name__ == "__main__":
    main()
