"""Micro-batches on Ray Data: a dataset over micro-batch numbers whose readers fetch only the samples they need.

    rows in:   number of a block
    rows out:  one row per micro-batch, each block for one worker; columns as in `Reader`
    resources: 1 CPU per reader, as many readers as CPUs are left; if workers may take all CPUs, one reader per worker
               that reserves no CPU. Readers read, decode, tokenise and pad; the trainer scales to floats.

A micro-batch is a pure function of (settings, number), so Ray recomputes the same bytes after a lost node. Images
travel as uint8, a quarter of the bytes of floats. They lie in a block as they lie in Ray's object store, so they are
copied once. Readers import neither torch nor transformers: each would take seconds of CPU at every start.

Readers are actors with a few blocks queued for each. Ray Data polls for finished blocks ten times a second, twice for a
task, so with tasks a CPU would idle for 0.2 seconds after each block (jobs/bench/ingest.md).
"""

import functools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import ray.data
from jaxtyping import Int, UInt8
from ray.data import ExecutionResources
from ray.data._internal.cluster_autoscaler import get_or_create_autoscaling_coordinator
from ray.data._internal.execution.node_trackers import get_or_create_actor_location_tracker
from ray.data._internal.stats import get_or_create_stats_actor

from pipelines.core import storage
from pipelines.core.background import read_ahead
from pipelines.data import lazy_input
from pipelines.data.features import StoredFeatures
from pipelines.data.order import Order
from pipelines.data.packing import BYTES_PER_TOKEN, Packing, divide_evenly, join_rows, lay_rows
from pipelines.data.records import find_rejection
from pipelines.data.shard_index import Shards, StoredSample, read_samples
from pipelines.data.text_tokenizer import TextTokenizer
from redux.conversation import (
    CLIP_MAX_LENGTH,
    IGNORE_INDEX,
    IMAGE_TOKEN,
    Template,
    encode_conversation,
    pad_rows,
    split_system,
)
from redux.image import load_pixels
from redux.rounding import divide_up
from redux.settings import ImageAspectRatio, ImageBackend

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Batch = dict[str, Any]
TextRow = dict[str, Int[np.ndarray, " length"]]
"""Text columns of a sample: input_ids, and labels if the stage has any."""

MAX_BLOCK_SAMPLES = 64
"""Samples of a block if a micro-batch is smaller. A block costs Ray the same time at any size."""

MAX_IMAGE_BLOCK_BYTES = 64 * 2**20
"""Maximum size of a block with several micro-batches. Ray Data splits blocks above 128 MiB."""

TEXT_BYTES_PER_SAMPLE = 24 * 2048
"""Estimated size of a sample's text: three columns of 8 bytes per token."""

MAX_SMALL_BLOCKS = 4096
"""Number of blocks up to which they hold MAX_BLOCK_SAMPLES; a longer run has larger blocks, which cost Ray less."""

PREFETCHED_BYTES = 128 * 2**20
"""Bytes of blocks that a worker fetches ahead; at least one block."""

MAX_STORED_BYTES_PER_WORKER = 2**30
"""Bytes of blocks in Ray's object store, for each worker, above which readers wait.

Ray Data ends idle readers, so there are as many as the workers need, whatever the number of CPUs."""

MAX_BLOCKS_IN_FLIGHT = 3
"""Blocks that a reader works on or that are queued for it."""

MAX_SAMPLE_TRIES = 20
"""Maximum number of samples tried for one position, before unusable samples are an error."""


@dataclass(frozen=True, kw_only=True)
class Reader:
    """Callable that makes micro-batch `number`: slice `number` of the stream of global batches, as arrays.

    An unusable sample is replaced by another one of the same source, drawn by (seed, stream position, attempt), and is
    reported. A sample is unusable if its bytes are not those of the index, its image is broken, or its conversation
    does not fit. A store that does not respond is an error instead.

    Args:
        sources: sets of shards by name, in the order of `order.samples`.
        order: assignment of samples to global batches.
        micro_batch_size: samples per micro-batch; with packing, on average.
        image_size: side of the square images in pixels.
        tokenizer: folder of the saved tokenizer.
        encode: function from (tokenizer, sample) to the text columns.
        image_aspect_ratio: "pad" or "crop"; see redux.image.
        image_backend: "exact" or "fast"; see redux.image.
        random_flip: mirror every image with probability 0.5.
        max_rounds: see `draw_rounds`. None leaves conversations unchanged.
        text_tokenizer: the same tokenizer without transformers; None loads `tokenizer`.
        packing: packing of several conversations into a row; None gives each a row of its own.
        image_tokens: number of tokens that stand for an image, for packing.
        features: stored features by set, of one format, which are read in place of images; empty decodes images. Sets
            without any have text only.
    """

    sources: Mapping[str, Shards]
    order: Order
    micro_batch_size: int
    image_size: int
    tokenizer: Path
    encode: "Callable[[PreTrainedTokenizerBase | TextTokenizer, StoredSample], TextRow]"
    image_aspect_ratio: ImageAspectRatio = "pad"
    image_backend: ImageBackend = "exact"
    random_flip: bool = False
    max_rounds: int | None = None
    text_tokenizer: TextTokenizer | None = None
    packing: Packing | None = None
    image_tokens: int = 0
    features: Mapping[str, StoredFeatures] = field(default_factory=dict)

    @property
    def image_column(self) -> str:
        """Name of the column that has the images."""
        return "image_features" if self.features else "pixel_values"

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Shape of an image: (height, width, 3) pixels, or (tokens, bytes) of features."""
        for stored in self.features.values():
            return stored.format.tokens, stored.format.row_bytes
        return self.image_size, self.image_size, 3

    @property
    def sample_bytes(self) -> int:
        """Estimated bytes of a sample in a micro-batch."""
        return math.prod(self.image_shape) + TEXT_BYTES_PER_SAMPLE

    def __call__(self, number: int, out: UInt8[np.ndarray, "size ..."] | None = None) -> Batch:
        """Make a micro-batch.

        Args:
            number: number of the micro-batch in the run.
            out: array that the images are written to; None allocates one.

        Returns:
            number: number of the micro-batch.
            pixel_values: (images, height, width, 3) uint8, a view of `out`. Samples of text only have no image. With
                features instead image_features: (images, tokens, bytes) uint8.
            input_ids, labels, attention_mask: (rows, longest) int64, padded on the right. A row is a sample, or several
                with packing. Then there are position_ids and sample_index as well, see `packing.join_rows`.
            position, source, sample: (samples,) int64, position in the stream, index of the source and number of the
                sample that is used. With packing, in the order of the rows.
            replaced: JSON, a list of {"set", "position", "scheduled", "used", "reason"}, one entry per replaced sample:
                the position in the stream, the scheduled sample and its replacement.
        """
        position, source, scheduled = self._schedule(number)
        if out is None:
            out = np.empty((len(position), *self.image_shape), np.uint8)
        # Read the samples together, then encode one by one and replace unusable samples.
        rows, replaced = [], []
        used = scheduled.copy()
        # Rows of `out` by index of the sample in the micro-batch.
        image_rows: dict[int, int] = {}
        for index, stored_sample in enumerate(self._read_or_none(source, scheduled)):
            row, image, entry = self._encode_or_replace(
                int(position[index]), int(source[index]), int(scheduled[index]), stored_sample
            )
            rows.append(row)
            if image is not None:
                out[len(image_rows)] = image
                image_rows[index] = len(image_rows)
            if entry:
                replaced.append(entry)
                used[index] = entry["used"]
        images = out[: len(image_rows)]
        # Rows follow from the samples that are used, replacements included.
        if self.packing:
            layout = lay_rows([len(row["input_ids"]) for row in rows], self.packing.max_length)
            rows = join_rows(rows, layout)
            # Samples and images in the order of the rows.
            indices = np.concatenate([np.array(members) for members in layout])
            position, source, used = position[indices], source[indices], used[indices]
            images = images[[image_rows[index] for index in indices.tolist() if index in image_rows]]
        return {
            "number": number,
            self.image_column: images,
            **pad_columns(rows, self.get_tokenizer().pad_token_id),
            "position": position,
            "source": source,
            "sample": used,
            "replaced": json.dumps(replaced),
        }

    def read_block(self, numbers: Sequence[int]) -> dict[str, Any]:
        """Make several micro-batches as columns, one row each. Full image batches are not copied again."""
        # Packed micro-batches have different numbers of samples, so no array holds the images of all.
        if self.packing:
            packed = [self(number) for number in numbers]
            return {name: [batch[name] for batch in packed] for name in packed[0]}
        out = np.empty((len(numbers), self.micro_batch_size, *self.image_shape), np.uint8)
        batches = [self(number, batch_out) for number, batch_out in zip(numbers, out, strict=True)]
        columns: dict[str, Any] = {name: [batch[name] for batch in batches] for name in batches[0]}
        # One dense array, if no sample is text only.
        if all(len(images) == self.micro_batch_size for images in columns[self.image_column]):
            columns[self.image_column] = out
        return columns

    def fingerprint_sources(self) -> dict[str, str]:
        """Return the fingerprint of each set. It depends on contents, not on locations."""
        return {name: shards.fingerprint for name, shards in self.sources.items()}

    def get_tokenizer(self) -> "PreTrainedTokenizerBase | TextTokenizer":
        """Return the tokenizer; the folder is read at the first call in a process."""
        return self.text_tokenizer or _load_tokenizer(self.tokenizer)

    def _schedule(
        self, number: int
    ) -> tuple[Int[np.ndarray, " samples"], Int[np.ndarray, " samples"], Int[np.ndarray, " samples"]]:
        """Schedule the samples of a micro-batch: a slice of one global batch, or its part by length with packing.

        Returns:
            Position in the stream, index of the source and number of each scheduled sample.
        """
        size = self.micro_batch_size
        batch, offset = divmod(number * size, self.order.global_batch_size)
        source, scheduled = _cached_global_batch(self.order, batch)
        indices = np.arange(offset, offset + size)
        # Every reader divides the whole global batch, and takes the part of its micro-batch.
        if self.packing:
            lengths = self._estimate_lengths(source, scheduled)
            indices = np.array(divide_evenly(lengths, self.order.global_batch_size // size)[offset // size])
        return batch * self.order.global_batch_size + indices, source[indices], scheduled[indices]

    def _estimate_lengths(self, source: Int[np.ndarray, " size"], scheduled: Int[np.ndarray, " size"]) -> list[int]:
        """Estimate the tokens of scheduled samples from the index."""
        lengths = np.empty(len(source), np.int64)
        for index, shards in enumerate(self.sources.values()):
            record_sizes, has_image = shards.read_sizes(scheduled[source == index])
            lengths[source == index] = record_sizes // BYTES_PER_TOKEN + has_image * self.image_tokens
        return lengths.tolist()

    def _read_or_none(
        self, source: Int[np.ndarray, " size"], scheduled: Int[np.ndarray, " size"]
    ) -> list[StoredSample | None]:
        """Read the scheduled samples together; None for all of them if one is damaged."""
        try:
            return list(self._read_samples(source.tolist(), scheduled.tolist()))
        except ValueError:
            return [None] * len(scheduled)

    def _read_samples(self, source: Sequence[int], numbers: Sequence[int]) -> list[StoredSample]:
        """Read samples together. With features, the bytes of these stand in place of the image file.

        Raises:
            ValueError: a sample or its features are damaged, or has no features because its image cannot be used.
        """
        # The whole sample is read, so that its checksum is checked here as without features.
        sets = list(self.sources.values())
        samples = read_samples([(sets[index], number) for index, number in zip(source, numbers, strict=True)])
        for set_index, name in enumerate(self.sources):
            indices = [index for index, sample in enumerate(samples) if source[index] == set_index and sample.image]
            if name in self.features and indices:
                feature_bytes = self.features[name].read([numbers[index] for index in indices])
                for index, features in zip(indices, feature_bytes, strict=True):
                    samples[index] = replace(samples[index], image=features)
        return samples

    def _encode_or_replace(
        self, position: int, source: int, scheduled: int, stored_sample: StoredSample | None
    ) -> tuple[TextRow, UInt8[np.ndarray, "height width 3"] | None, dict[str, Any] | None]:
        """Encode the scheduled sample, or a replacement if it is unusable.

        Args:
            position: position in the stream.
            source: index of the source.
            scheduled: number of the scheduled sample.
            stored_sample: the scheduled sample; None reads it again, alone.

        Returns:
            Text columns, image, and the entry of `replaced` or None.

        Raises:
            ValueError: MAX_SAMPLE_TRIES samples in a row are unusable.
        """
        name, shards = list(self.sources.items())[source]
        used = scheduled
        reason = ""
        for attempt in range(1, MAX_SAMPLE_TRIES + 1):
            try:
                row, image = self._encode(stored_sample or self._read_samples([source], [used])[0], position)
            except ValueError as error:
                reason = reason or describe_failure(shards, used, error)
                # The generator is seeded by the position, so that every reader draws the same replacement.
                rng = np.random.default_rng((self.order.seed, position, attempt))
                numbers = rng.integers(self.order.samples[source], size=1)
                used = int(self.order.get_rows(source, numbers)[0])
                stored_sample = None
            else:
                entry = {"set": name, "position": position, "scheduled": scheduled, "used": used, "reason": reason}
                return row, image, entry if reason else None
        raise ValueError(
            f"{shards.folder}: sample {scheduled} and {MAX_SAMPLE_TRIES - 1} replacements cannot be used: {reason}"
        )

    def _encode(self, sample: StoredSample, position: int) -> tuple[TextRow, UInt8[np.ndarray, "..."] | None]:
        """Encode text and image. See `prepare_sample`."""
        sample, image = self.prepare_sample(sample, position)
        return self.encode(self.get_tokenizer(), sample), image

    def prepare_sample(
        self, sample: StoredSample, position: int
    ) -> tuple[StoredSample, UInt8[np.ndarray, "..."] | None]:
        """Check a sample and draw its augmentations by (seed, stream position).

        Returns:
            The sample with the rounds that are learned, and its image as the tower gets it, or its features. None for
            text only.

        Raises:
            ValueError: the record is rejected, or its image is broken.
        """
        check_record(sample)
        rng = np.random.default_rng((self.order.seed, position)) if self.random_flip or self.max_rounds else None
        image = self._load_image(sample.image) if sample.image else None
        # The draw for the flip comes first, also without an image: it sets the state for the rounds.
        if self.random_flip and rng and rng.random() < 0.5 and image is not None:
            image = image[:, ::-1]
        if self.max_rounds and rng:
            sample = draw_rounds(sample, self.max_rounds, rng)
        return sample, image

    def _load_image(self, image: bytes) -> UInt8[np.ndarray, "..."]:
        if self.features:
            return np.frombuffer(image, np.uint8).reshape(self.image_shape)
        pixels = load_pixels(image, self.image_size, self.image_aspect_ratio, self.image_backend)
        return pixels.transpose(1, 2, 0)


def check_record(sample: StoredSample) -> None:
    """Raise a ValueError if the record of a stored sample would be rejected."""
    # Foreign tars may hold anything; an image without a tag would be matched with another sample's tag.
    checked = {"conversations": sample.record.get("conversations")}
    if rejection := find_rejection({**checked, "image": "image"} if sample.image else checked, None):
        raise ValueError(f"{rejection.reason}: {rejection.explanation}: {rejection.field}: got {rejection.value}")


class Segment(NamedTuple):
    """Micro-batches start..stop-1 of one reader, such as those of a training stage.

    Args:
        reader: maker of micro-batches.
        start: number of the first micro-batch.
        stop: number after the last one; stop - start is a multiple of the number of workers.
    """

    reader: Reader
    start: int
    stop: int

    def lay_out_blocks(self, workers: int) -> "BlockLayout":
        """Lay out the blocks in which Ray Data moves the micro-batches to the workers."""
        reader, length = self.reader, self.stop - self.start
        samples_per_block = max(MAX_BLOCK_SAMPLES, length * reader.micro_batch_size // MAX_SMALL_BLOCKS)
        limited = min(samples_per_block, MAX_IMAGE_BLOCK_BYTES // reader.sample_bytes)
        size = min(limited // reader.micro_batch_size, length // workers)
        return BlockLayout(self.start, self.stop, max(size, 1), workers)

    def count_prefetched_blocks(self, workers: int) -> int:
        """Count the blocks that a worker fetches ahead of the one that it reads."""
        block_bytes = self.lay_out_blocks(workers).size * self.reader.micro_batch_size * self.reader.sample_bytes
        return max(PREFETCHED_BYTES // block_bytes, 1)


class BlockLayout(NamedTuple):
    """Blocks of a segment. Worker b % workers reads block b, so all workers read equally many.

    Args:
        start: number of the first micro-batch.
        stop: number after the last one.
        size: micro-batches of a block. The first block of each worker has a single one, so that it comes soon.
        workers: number of workers.
    """

    start: int
    stop: int
    size: int
    workers: int

    def count_blocks(self) -> int:
        """Count the blocks."""
        after_first = max(self.stop - self.start - self.workers, 0)
        # Each worker has a block in each round.
        first_round = int(self.stop > self.start)
        later_rounds = divide_up(after_first, self.size * self.workers)
        return (first_round + later_rounds) * self.workers

    def describe_block(self, number: int) -> dict[str, int]:
        """Describe a block: it has every `workers`-th micro-batch from `start` to `stop` - 1."""
        round_number, worker = divmod(number, self.workers)
        # Blocks of round 0 have one micro-batch, those of later rounds `size`.
        if round_number == 0:
            start, size = self.start, 1
        else:
            start, size = self.start + (1 + (round_number - 1) * self.size) * self.workers, self.size
        end = start + size * self.workers
        return {"start": start + worker, "stop": min(end, self.stop)}


class BlockSequence(Sequence[dict[str, int]]):
    """Blocks of all segments, each computed when it is due."""

    def __init__(self, layouts: Sequence[BlockLayout]) -> None:
        self.layouts = layouts
        self.ends = np.cumsum([layout.count_blocks() for layout in layouts])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, number: Any) -> Any:
        if not 0 <= number < len(self):
            raise IndexError(number)
        segment = int(np.searchsorted(self.ends, number, side="right"))
        segment_start = int(self.ends[segment - 1]) if segment else 0
        return {"segment": segment, **self.layouts[segment].describe_block(number - segment_start)}


def make_dataset(reader: Reader, start: int, stop: int, workers: int, leaves_cpus: bool = True) -> ray.data.Dataset:
    """Make a dataset of micro-batches start..stop-1 of one reader. See `join_segments`."""
    return join_segments([Segment(reader, start, stop)], workers, leaves_cpus)


def join_segments(segments: Sequence[Segment], workers: int, leaves_cpus: bool = True) -> ray.data.Dataset:
    """Make a dataset of the micro-batches of segments, one after the other. Iterate it with preserve_order.

    Worker r gets micro-batches start + r, start + r + workers, ... of each segment. Blocks are assigned to the
    workers round-robin, so block b holds the next few micro-batches of worker b % workers.

    Args:
        segments: segments in their order. The same readers, which took seconds to start, serve all of them, and read
            ahead across their boundaries.
        workers: number of training workers.
        leaves_cpus: True if the workers leave CPUs for readers.
    """
    blocks = BlockSequence([segment.lay_out_blocks(workers) for segment in segments])
    return lazy_input.from_sequence(blocks).map_batches(
        _BlockReader,
        fn_constructor_args=([segment.reader for segment in segments], workers),
        batch_size=None,
        num_cpus=int(leaves_cpus),
        compute=ray.data.ActorPoolStrategy(
            min_size=1, max_size=None if leaves_cpus else workers, max_tasks_in_flight_per_actor=MAX_BLOCKS_IN_FLIGHT
        ),
    )


def make_streams(segments: Sequence[Segment], workers: int, leaves_cpus: bool = True) -> list[ray.data.DataIterator]:
    """Split the dataset into one stream per worker, in order. Arguments as in `join_segments`.

    The caller keeps the first stream alive while workers read: that stream owns the execution of the dataset.
    """
    dataset = join_segments(segments, workers, leaves_cpus)
    dataset.context.execution_options.preserve_order = True
    dataset.context.execution_options.resource_limits = ExecutionResources.for_limits(
        object_store_memory=workers * MAX_STORED_BYTES_PER_WORKER
    )
    dataset.context.enable_progress_bars = False
    return dataset.streaming_split(workers, equal=True)


def start_shared_actors() -> None:
    """Start the actors that all datasets of a cluster share, if they do not exist.

    Ray Data 2.60 starts them with the first dataset, and its readers wait for them: 3 seconds of CPU.
    """
    get_or_create_autoscaling_coordinator()
    get_or_create_actor_location_tracker()
    get_or_create_stats_actor()


class _BlockReader:
    """Actor that maps a block of `BlockLayout` to its micro-batches."""

    def __init__(self, readers: Sequence[Reader], workers: int) -> None:
        self.readers, self.workers = readers, workers

    def __call__(self, rows: Batch) -> dict[str, Any]:
        segment, start, stop = (int(rows[name][0]) for name in ("segment", "start", "stop"))
        return self.readers[segment].read_block(range(start, stop, self.workers))


def read_stream(stream: ray.data.DataIterator, prefetched_blocks: int = 1) -> Iterator[Batch]:
    """Start to read the stream of a worker, and return its micro-batches, as `Reader` made them.

    Readers start when all workers read their streams.

    Args:
        stream: see `make_streams`.
        prefetched_blocks: maximum number of blocks that are fetched ahead.
    """
    # Ray Data 2.60 would fetch ahead, too, but would yield the first block only after all those ahead of it.
    blocks = stream.iter_batches(batch_size=None, prefetch_batches=0)
    return iterate_micro_batches(read_ahead(iter(blocks), prefetched_blocks))


def iterate_micro_batches(blocks: Iterable[Batch]) -> Iterator[Batch]:
    """Yield the micro-batches of a worker's blocks, as `Reader` made them."""
    for block in blocks:
        for row in range(len(block["number"])):
            yield {name: column[row] for name, column in block.items()}


def encode_caption(tokenizer: "PreTrainedTokenizerBase | TextTokenizer", sample: StoredSample) -> TextRow:
    """Encode the first answer of a sample for CLIP, as `<s> caption </s>`, truncated to CLIP_MAX_LENGTH tokens."""
    if not sample.image:
        raise ValueError(f"sample {sample.key}: text alone, allowed in a contrastive stage: an image and its caption")
    ids = tokenizer(get_caption(sample), truncation=True, max_length=CLIP_MAX_LENGTH - 1)["input_ids"]
    return {"input_ids": np.array([*ids, tokenizer.eos_token_id])}


def get_caption(sample: StoredSample) -> str:
    """Return the text that a contrastive stage compares with the image: the first answer."""
    _, turns = split_system(sample.record["conversations"])
    return str(turns[1]["value"]).replace(IMAGE_TOKEN, "")


def make_conversation_encoder(
    template: Template, image_tokens: int, max_length: int | None = None
) -> "Callable[[PreTrainedTokenizerBase | TextTokenizer, StoredSample], TextRow]":
    """Make the function that encodes a sample's conversation as input_ids and labels, as LLaVA does.

    Args:
        template: conversation template.
        image_tokens: number of tokens that stand for an image.
        max_length: number of tokens to which a sample is truncated, as in LLaVA. None rejects samples that are longer
            than the model's positions.
    """

    def encode(tokenizer: "PreTrainedTokenizerBase | TextTokenizer", sample: StoredSample) -> TextRow:
        turns = sample.record["conversations"]
        try:
            ids, labels = encode_conversation(tokenizer, turns, template, image_tokens, max_length)
        except ValueError as error:
            raise ValueError(f"sample {sample.key}: {error}") from None
        if len(ids) > tokenizer.model_max_length:
            raise ValueError(
                f"sample {sample.key}: {len(ids)} tokens, allowed: {tokenizer.model_max_length}, "
                "the language model's max_position_embeddings"
            )
        return {"input_ids": ids, "labels": labels}

    return encode


def draw_rounds(sample: StoredSample, max_rounds: int, rng: np.random.Generator) -> StoredSample:
    """Return the sample with at most `max_rounds` of its rounds, shuffled. The image stays in the first turn."""
    all_turns = sample.record["conversations"]
    _, turns = split_system(all_turns)
    if len(turns) % 2:
        raise ValueError(f"sample {sample.key}: {len(turns)} turns, allowed: an even number, so that each is answered")
    texts = [{**turn, "value": turn["value"].replace(IMAGE_TOKEN, "").strip()} for turn in turns]
    # A round is a question and its answer.
    starts = 2 * rng.permutation(len(turns) // 2)[:max_rounds]
    shuffled = [turn for start in starts for turn in texts[start : start + 2]]
    if any(IMAGE_TOKEN in turn["value"] for turn in turns):
        shuffled[0]["value"] = f"{IMAGE_TOKEN}\n{shuffled[0]['value']}"
    system = all_turns[: len(all_turns) - len(turns)]
    return replace(sample, record={**sample.record, "conversations": [*system, *shuffled]})


def describe_failure(shards: Shards, number: int, error: ValueError) -> str:
    """Describe an unusable sample: its tar, its name and the error."""
    try:
        [row] = shards.read_rows([number])
    except ValueError:  # the index is damaged at this row, and the error says so
        return str(error)
    tar, name = storage.join(shards.folder, row["shard"]), f"sample {row['key']}"
    return f"{tar}: {name}: {str(error).removeprefix(f'{tar}: ').removeprefix(f'{name}: ')}"


def pad_columns(rows: Sequence[TextRow], pad_token_id: int) -> dict[str, Int[np.ndarray, "samples longest"]]:
    """Pad text columns on the right, and add the attention mask."""
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    mask = [np.ones_like(ids) for ids in columns["input_ids"]]
    fill = {"input_ids": pad_token_id, "labels": IGNORE_INDEX}
    padded = {name: pad_rows(column, fill.get(name, 0)) for name, column in columns.items()}
    if "position_ids" in columns:
        # Padding goes on with the last conversation of a row, which does not see it.
        longest = padded["position_ids"].shape[1]
        padded["position_ids"] = np.stack(
            [np.append(row, row[-1] + 1 + np.arange(longest - len(row))) for row in columns["position_ids"]]
        )
    return {**padded, "attention_mask": pad_rows(mask, 0)}


@functools.lru_cache(maxsize=4)
def _cached_global_batch(order: Order, number: int) -> tuple[Int[np.ndarray, " samples"], Int[np.ndarray, " samples"]]:
    """Compute a global batch. Cached, because several micro-batches are slices of one global batch."""
    return order.get_batch(number)


@functools.cache
def _load_tokenizer(folder: Path) -> "PreTrainedTokenizerBase":
    """Load the tokenizer, once per process."""
    from transformers import AutoTokenizer  # imports torch, which Ray's coordinator of the readers does not need

    return AutoTokenizer.from_pretrained(folder)
