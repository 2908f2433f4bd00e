"""Samples of a stage as its workers would get them, drawn from its stream for a look before training.

A sample is drawn by its position in the stream, so that it has the augmentations of this position, and samples that the
stage does not reach are not shown. `Reader` prepares and encodes it: nothing here repeats what training does.

Cost: an index in memory, one ranged read per sample, and the decoding of its image. Samples are yielded in blocks, so
that a thousand images are not in memory at once.
"""

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from pipelines.data.ingest import Reader, TextRow, describe_failure
from pipelines.data.order import Order
from pipelines.data.shard_index import Shards, StoredSample
from redux.rounding import divide_up

BLOCK_SAMPLES = 64
"""Samples that are read together."""


class StreamPosition(NamedTuple):
    """Position of a sample in the stream of a stage.

    Args:
        position: number in the stream, counted from 0.
        batch: number of the global batch.
        sample: row of the sample in the index of its set.
    """

    position: int
    batch: int
    sample: int


@dataclass(frozen=True, kw_only=True)
class PreviewSample:
    """Sample as a worker would get it. A part that cannot be made is None, and `problem` says why.

    Args:
        stream_position: its position in the stream.
        problem: reason why training would replace it, in the words of `consumed.jsonl`; "" for a usable sample.
        stored: the sample as stored; None if its bytes are damaged.
        prepared: the sample with the rounds that are learned, in their order.
        image: image as the tower gets it, (height, width, 3); None for text only.
        encoded: text columns of the encoded sample: input_ids, and labels in a stage with the objective language.
    """

    stream_position: StreamPosition
    problem: str
    stored: StoredSample | None
    prepared: StoredSample | None
    image: UInt8[np.ndarray, "height width 3"] | None
    encoded: TextRow | None


def draw_samples(
    reader: Reader, source: str, count: int, seed: int, batches: int | None = None, threads: int = 1
) -> Iterator[PreviewSample]:
    """Draw samples of a set and encode them as training does.

    Args:
        reader: reader of the stage, see `StagePlan.build_reader`.
        source: name of the set in `reader.sources`.
        count: number of samples; fewer are drawn if the stage has fewer of this set.
        seed: seed of the draw.
        batches: number of global batches of the stage; None for as many as an epoch of the set needs.
        threads: threads that decode images.

    Yields:
        Different samples, in an order that depends on the seed.
    """
    shards = reader.sources[source]
    positions = draw_positions(reader.order, list(reader.sources).index(source), count, seed, batches)
    with ThreadPoolExecutor(threads) as executor:
        for start in range(0, len(positions), BLOCK_SAMPLES):
            block = positions[start : start + BLOCK_SAMPLES]
            stored = read_stored(shards, [position.sample for position in block])
            prepared = executor.map(
                lambda position, stored_or_error: _prepare(reader, shards, position, stored_or_error), block, stored
            )
            # Make tokens here, not in the threads: truncation is a setting of the tokenizer that they would share.
            for sample in prepared:
                yield _encode(reader, shards, sample)


def draw_positions(
    order: Order, source: int, count: int, seed: int, batches: int | None = None
) -> list[StreamPosition]:
    """Draw stream positions of different samples of a source, within its first epoch.

    Args:
        order: order of the stage.
        source: index of the source.
        count: number of positions; fewer are drawn if the stage has fewer samples of the source.
        seed: seed of the draw.
        batches: number of global batches of the stage; None for as many as an epoch of the source needs.
    """
    # The source's first epoch ends in this batch, whatever the other sources have.
    weights = order.weights or order.samples
    per_batch = order.global_batch_size * weights[source] / sum(weights)
    in_epoch = math.ceil(order.samples[source] / per_batch)
    span = in_epoch if batches is None else min(in_epoch, batches)
    # Take a few samples from each of many batches: a batch may hold samples of one length and one window of shards.
    from_each = divide_up(count, span)
    rng = np.random.default_rng((seed, source))
    positions_by_sample: dict[int, StreamPosition] = {}
    for batch in rng.permutation(span).tolist():
        sources, samples = order.get_batch(batch)
        indices = rng.permutation(np.flatnonzero(sources == source))[:from_each]
        # The last batch of an epoch may repeat a sample of the first one.
        for index in indices.tolist():
            position = StreamPosition(batch * order.global_batch_size + index, batch, int(samples[index]))
            positions_by_sample.setdefault(position.sample, position)
        if len(positions_by_sample) >= count:
            break
    return list(positions_by_sample.values())[:count]


def draw_rows(shards: Shards, count: int, seed: int) -> list[int]:
    """Draw rows of a set that no stage orders, in the order of the index."""
    return sorted(np.random.default_rng(seed).permutation(len(shards))[:count].tolist())


def read_stored(shards: Shards, rows: Sequence[int]) -> list[StoredSample | str]:
    """Read samples together. A damaged sample is the reason why it cannot be read."""
    try:
        return list(shards.read_samples(rows))
    except ValueError:  # one of them is damaged, and the error does not say which
        return [_read_alone(shards, row) for row in rows]


def _read_alone(shards: Shards, row: int) -> StoredSample | str:
    try:
        return shards.read_samples([row])[0]
    except ValueError as error:
        return describe_failure(shards, row, error)


def _prepare(
    reader: Reader, shards: Shards, position: StreamPosition, stored_or_error: StoredSample | str
) -> PreviewSample:
    """Prepare a sample; it is not encoded yet."""
    # This runs in a thread, so an error is a value: the other samples of the block are still wanted.
    stored = prepared = image = None
    problem = ""
    if isinstance(stored_or_error, str):
        problem = stored_or_error
    else:
        stored = stored_or_error
        try:
            prepared, image = reader.prepare_sample(stored_or_error, position.position)
        except ValueError as error:
            problem = describe_failure(shards, position.sample, error)
    return PreviewSample(
        stream_position=position, problem=problem, stored=stored, prepared=prepared, image=image, encoded=None
    )


def _encode(reader: Reader, shards: Shards, sample: PreviewSample) -> PreviewSample:
    """Add the text columns to a prepared sample."""
    # The first problem of a sample is the one that training would report.
    if sample.prepared is None:
        return sample
    try:
        return replace(sample, encoded=reader.encode(reader.get_tokenizer(), sample.prepared))
    except ValueError as error:
        return replace(sample, problem=describe_failure(shards, sample.stream_position.sample, error))
