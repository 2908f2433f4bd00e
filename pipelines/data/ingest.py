"""Ray Data executes the order: a dataset over micro-batch numbers whose readers fetch just their samples.

    rows in:   number of a block
    rows out:  one row a micro-batch, each block for one worker; columns as `Reader` says
    resources: 1 CPU a reader, as many readers as the cluster has CPUs to spare; where workers may take all CPUs, one
               reader a worker beside them; reading, decoding, tokenising and padding happen there, scaling to floats
               in the trainer

What a reader returns is a pure function of (settings, number), so what Ray computes again after a lost node has the
same bytes.  Images travel as uint8, a quarter of the bytes of floats, and lie in a block as they lie in Ray's object
store, so that they are copied once.

Readers are actors, with a few blocks waiting for each: Ray Data learns of finished blocks by polling ten times a
second, twice for a task, so that a task's CPU would rest for 0.2 seconds after each block (jobs/bench/ingest.md).
"""

import functools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import ray.data
from jaxtyping import Int, UInt8
from transformers import PreTrainedTokenizerBase

from pipelines.core import storage
from pipelines.data.order import Order
from pipelines.data.records import find_fault
from pipelines.data.shards import Sample, Shards, read
from redux.conversation import CLIP_MAX_LENGTH, IGNORE_INDEX, IMAGE_TOKEN, TEMPLATES, encode_conversation, pad_rows
from redux.image import load_pixels
from redux.settings import ImageAspectRatio, ImageBackend, TemplateName

Batch = dict[str, Any]
Row = dict[str, Int[np.ndarray, " length"]]
"""The text side of a sample: input_ids, and labels where there are any."""

BLOCK_SAMPLES = 64
BLOCK_BYTES = 64 * 2**20
"""Samples and bytes of a block, at most, where a micro-batch is smaller: a block costs Ray the same whatever it holds,
but one beyond 128 MiB is cut in two."""

TEXT_BYTES = 24 * 2048
"""Counted for a sample's text: three columns of 8 bytes a token."""

BLOCKS = 4096
"""Blocks up to which they are of BLOCK_SAMPLES; in a longer run they are larger, since Ray Data takes 0.8 ms for each
block before the first one comes.  At 336 pixels BLOCK_BYTES sets in: 100 million samples wait for ten minutes."""

AHEAD = 3
"""Blocks that a reader works at or that wait for it."""

TRIES = 20
"""Samples tried in place of one that cannot be used, before that is an error."""


@dataclass(frozen=True, kw_only=True)
class Reader:
    """What micro-batch `number` holds: slice `number` of the stream of global batches, as arrays.

    sources: the sets of shards by name, in the order's order.
    fit, way: how images become pixels; see redux.image.
    encode: the text side of a sample, with the tokenizer saved at `tokenizer`.
    flip: mirror every other image.  rounds: see `draw_rounds`; None leaves conversations as they are.

    A sample that cannot be used (bytes that are not the index's, a broken image, a conversation that does not fit) is
    replaced by one of the same source, drawn by (seed, place in the stream, try), and reported.  A store that does not
    answer is no such case: that is an error.
    """

    sources: Mapping[str, Shards]
    order: Order
    size: int
    image_size: int
    tokenizer: Path
    encode: Callable[[PreTrainedTokenizerBase, Sample], Row]
    image_aspect_ratio: ImageAspectRatio = "pad"
    way: ImageBackend = "exact"
    flip: bool = False
    rounds: int | None = None

    def __call__(self, number: int, room: UInt8[np.ndarray, "size height width 3"] | None = None) -> Batch:
        """The micro-batch's columns.

        number: of the micro-batch.
        pixel_values: (images, height, width, 3) uint8, within `room` if given; text alone has no image.
        input_ids, labels, attention_mask: (samples, longest) int64, padded on the right.
        source, sample: (samples,) int64, the sample used and the number of its source.
        replaced: JSON, a list of {"set", "place", "due", "used", "reason"}, one for each sample that was replaced;
            place: in the stream.
        """
        first = number * self.size
        batch, within = divmod(first, self.order.global_batch_size)
        source, due = (column[within : within + self.size] for column in _global_batch(self.order, batch))
        if room is None:
            room = np.empty((self.size, self.image_size, self.image_size, 3), np.uint8)
        rows, used, replaced, images = [], due.copy(), [], 0
        for turn, stored in enumerate(self._stored(source, due)):
            row, image, entry = self._sound(first + turn, int(source[turn]), int(due[turn]), stored)
            rows.append(row)
            if image is not None:
                room[images] = image
                images += 1
            if entry:
                replaced.append(entry)
                used[turn] = entry["used"]
        return {
            "number": number,
            "pixel_values": room[:images],
            **_padded(rows, _tokenizer(self.tokenizer).pad_token_id),
            "source": source,
            "sample": used,
            "replaced": json.dumps(replaced),
        }

    def block(self, numbers: Sequence[int]) -> dict[str, Any]:
        """Columns of several micro-batches, one a row; full ones without another copy of their images."""
        room = np.empty((len(numbers), self.size, self.image_size, self.image_size, 3), np.uint8)
        batches = [self(number, space) for number, space in zip(numbers, room, strict=True)]
        columns: dict[str, Any] = {name: [batch[name] for batch in batches] for name in batches[0]}
        if all(len(images) == self.size for images in columns["pixel_values"]):
            columns["pixel_values"] = room
        return columns

    def _stored(self, source: Int[np.ndarray, " size"], due: Int[np.ndarray, " size"]) -> list[Sample | None]:
        """The samples that are due, read together; None for each where one of them is not as the index says."""
        sets = list(self.sources.values())
        try:
            return list(read([(sets[one], int(number)) for one, number in zip(source, due, strict=True)]))
        except ValueError:
            return [None] * len(due)

    def _sound(
        self, place: int, source: int, due: int, stored: Sample | None
    ) -> tuple[Row, UInt8[np.ndarray, "height width 3"] | None, dict[str, Any] | None]:
        """(row, image, entry of `replaced`) of the sample that is due at this place, or of the one in its stead."""
        name, shards = list(self.sources.items())[source]
        used, reason = due, ""
        for attempt in range(1, TRIES + 1):
            try:
                row, image = self._made(stored or shards.read([used])[0], place)
            except ValueError as error:
                reason = reason or _reason(shards, used, error)
                chance = np.random.default_rng((self.order.seed, place, attempt))
                used, stored = int(chance.integers(len(shards))), None
            else:
                entry = {"set": name, "place": place, "due": due, "used": used, "reason": reason}
                return row, image, entry if reason else None
        raise ValueError(f"{shards.folder}: sample {due} and {TRIES - 1} drawn in its place cannot be used: {reason}")

    def _made(self, sample: Sample, place: int) -> tuple[Row, UInt8[np.ndarray, "height width 3"] | None]:
        """The sample's text and image, varied as asked for by chance of (seed, place in the stream)."""
        # tars of others may hold anything; an image without a tag would go to another sample's
        form = {"conversations": sample.record.get("conversations")}
        if fault := find_fault({**form, "image": "image"} if sample.image else form, None):
            raise ValueError(f"{fault.reason}: {fault.why}: {fault.field}: got {fault.value}")
        chance = np.random.default_rng((self.order.seed, place)) if self.flip or self.rounds else None
        image = (
            load_pixels(sample.image, self.image_size, self.image_aspect_ratio, self.way).transpose(1, 2, 0)
            if sample.image
            else None
        )
        if self.flip and chance and chance.random() < 0.5 and image is not None:
            image = image[:, ::-1]
        if self.rounds and chance:
            sample = draw_rounds(sample, self.rounds, chance)
        return self.encode(_tokenizer(self.tokenizer), sample), image


def dataset(reader: Reader, start: int, stop: int, workers: int, spare: bool = True) -> ray.data.Dataset:
    """Micro-batches start..stop-1 for that many workers; stop - start is a multiple of workers.

    spare: whether workers leave CPUs to readers.

    Worker r gets start + r, start + r + workers, ...: blocks are dealt to the workers in turn, so block b holds the
    next few of worker b % workers.  Iterate with preserve_order.
    """
    samples = max(BLOCK_SAMPLES, (stop - start) * reader.size // BLOCKS)
    span = max(min(samples, BLOCK_BYTES // (3 * reader.image_size**2 + TEXT_BYTES)) // reader.size, 1)
    count = -(-(stop - start) // (workers * span)) * workers
    return ray.data.from_items([{"id": number} for number in range(count)], override_num_blocks=count).map_batches(
        _Block,
        fn_constructor_args=(reader, start, stop, workers, span),
        batch_size=None,
        num_cpus=int(spare),
        compute=ray.data.ActorPoolStrategy(
            min_size=1, max_size=None if spare else workers, max_tasks_in_flight_per_actor=AHEAD
        ),
    )


def streams(reader: Reader, start: int, stop: int, workers: int, spare: bool = True) -> list[ray.data.DataIterator]:
    """The dataset's blocks dealt to the workers in order, one stream each; it is read while the first one lives."""
    data = dataset(reader, start, stop, workers, spare)
    data.context.execution_options.preserve_order = True
    data.context.enable_progress_bars = False
    return data.streaming_split(workers, equal=True)


class _Block:
    """An actor: from the number of a block to its micro-batches."""

    def __init__(self, reader: Reader, start: int, stop: int, workers: int, span: int) -> None:
        self.reader, self.start, self.stop, self.workers, self.span = reader, start, stop, workers, span

    def __call__(self, rows: Batch) -> dict[str, Any]:
        turn, worker = divmod(int(rows["id"][0]), self.workers)
        first = self.start + turn * self.span * self.workers + worker
        stop = min(first + self.span * self.workers, self.stop)
        return self.reader.block(range(first, stop, self.workers))


def micro_batches(blocks: Iterable[Batch]) -> Iterator[Batch]:
    """The rows of a worker's blocks one by one, as `Reader` made them."""
    for block in blocks:
        for row in range(len(block["number"])):
            yield {name: column[row] for name, column in block.items()}


def caption(tokenizer: PreTrainedTokenizerBase, sample: Sample) -> Row:
    """CLIP's side of a sample: what the assistant says first, as `<s> caption </s>`; beyond CONTEXT it is cut."""
    if not sample.image:
        raise ValueError(f"sample {sample.key}: text alone, allowed in a contrastive stage: an image and its caption")
    caption_text = sample.record["conversations"][1]["value"].replace(IMAGE_TOKEN, "")
    ids = tokenizer(caption_text, truncation=True, max_length=CLIP_MAX_LENGTH - 1)["input_ids"]
    return {"input_ids": np.array([*ids, tokenizer.eos_token_id])}


def conversation(
    template: TemplateName, image_tokens: int, length: int | None = None
) -> Callable[[PreTrainedTokenizerBase, Sample], Row]:
    """LLaVA's side of a sample: input_ids and labels.

    length: tokens after which a sample is cut off, as in LLaVA; None refuses one that is longer than the model's
    positions.
    """

    def row(tokenizer: PreTrainedTokenizerBase, sample: Sample) -> Row:
        try:
            ids, labels = encode_conversation(
                tokenizer, sample.record["conversations"], TEMPLATES[template], image_tokens, length
            )
        except ValueError as error:
            raise ValueError(f"sample {sample.key}: {error}") from None
        if len(ids) > tokenizer.model_max_length:
            raise ValueError(
                f"sample {sample.key}: {len(ids)} tokens, allowed: {tokenizer.model_max_length}, "
                "the language model's max_position_embeddings"
            )
        return {"input_ids": ids, "labels": labels}

    return row


def draw_rounds(sample: Sample, rounds: int, chance: np.random.Generator) -> Sample:
    """The sample with at most `rounds` of its rounds, in another order; the image still opens the conversation."""
    turns = sample.record["conversations"]
    if len(turns) % 2:
        raise ValueError(f"sample {sample.key}: {len(turns)} turns, allowed: an even number, so that each is answered")
    bare = [{**turn, "value": turn["value"].replace(IMAGE_TOKEN, "").strip()} for turn in turns]
    mixed = [turn for start in chance.permutation(len(turns) // 2)[:rounds] for turn in bare[2 * start : 2 * start + 2]]
    if any(IMAGE_TOKEN in turn["value"] for turn in turns):
        mixed[0]["value"] = f"{IMAGE_TOKEN}\n{mixed[0]['value']}"
    return replace(sample, record={**sample.record, "conversations": mixed})


def _reason(shards: Shards, number: int, error: ValueError) -> str:
    """Why the sample cannot be used, after its tar and its name."""
    try:
        [row] = shards.rows([number])
    except ValueError:  # the index is damaged there, which is what the error says
        return str(error)
    tar, name = storage.join(shards.folder, row["shard"]), f"sample {row['key']}"
    return f"{tar}: {name}: {str(error).removeprefix(f'{tar}: ').removeprefix(f'{name}: ')}"


def _padded(rows: Sequence[Row], padding: int) -> dict[str, Int[np.ndarray, "samples longest"]]:
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    mask = [np.ones_like(ids) for ids in columns["input_ids"]]
    fill = {"input_ids": padding, "labels": IGNORE_INDEX}
    return {
        **{name: pad_rows(column, fill[name]) for name, column in columns.items()},
        "attention_mask": pad_rows(mask, 0),
    }


@functools.lru_cache(maxsize=4)
def _global_batch(order: Order, number: int) -> tuple[Int[np.ndarray, " samples"], Int[np.ndarray, " samples"]]:
    """Kept, as several micro-batches are slices of one."""
    return order.batch(number)


@functools.cache
def _tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Read once a process."""
    from transformers import AutoTokenizer  # brings torch along, which Ray's coordinator of the readers does without

    return AutoTokenizer.from_pretrained(folder)
