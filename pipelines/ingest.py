"""Ray Data executes the order: a dataset over micro-batch numbers whose tasks read just their samples.

    rows in:   number of a block
    rows out:  one row a micro-batch, each block for one worker; columns as the collation gives them, and
               number (of the micro-batch), pixel_values (images, 3, size, size) uint8; text alone has no image
    resources: 1 CPU a task; decoding, tokenising and padding happen there, scaling to floats in the trainer

A task is a pure function of (settings, number), so what Ray computes again after a lost node has the same bytes.
Images travel as uint8: a quarter of the bytes of floats.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import ray.data
from jaxtyping import UInt8
from transformers import PreTrainedTokenizerBase

from pipelines.order import Order
from pipelines.shards import Sample, Shards
from redux.conversation import CONTEXT, IGNORE, IMAGE, TEMPLATES, encode, pad
from redux.image import pixels

Batch = dict[str, np.ndarray]

BLOCK = 64
BLOCK_BYTES = 64 * 2**20
"""Samples and bytes of pixels of a block, at most, where a micro-batch is smaller: a block costs Ray the same whatever
it holds, but one beyond 128 MiB is cut in two."""


@dataclass(frozen=True, kw_only=True)
class Micro:
    """What micro-batch `number` holds: slice `number` of the stream of global batches, as arrays.

    flip: mirror every other image.  rounds: see `draw_rounds`; None leaves conversations as they are.
    collate: the text side of a batch, from the samples and the tokenizer saved at `tokenizer`.
    """

    shards: Shards
    order: Order
    size: int
    image_size: int
    tokenizer: Path
    collate: Callable[[PreTrainedTokenizerBase, Sequence[Sample]], Batch]
    flip: bool
    rounds: int | None

    def __call__(self, number: int) -> Batch:
        first = number * self.size
        batch, within = divmod(first, self.order.global_batch)
        _, samples = self.order.batch(batch)
        stored = self.shards.read(samples[within : within + self.size])
        varied = [self._vary(sample, first + place) for place, sample in enumerate(stored)]
        shape = (-1, 3, self.image_size, self.image_size)
        images = np.array([image for image, _ in varied if image is not None], np.uint8).reshape(shape)
        text = self.collate(_tokenizer(self.tokenizer), [sample for _, sample in varied])
        return {"number": np.array(number), "pixel_values": images, **text}

    def _vary(self, sample: Sample, place: int) -> tuple[UInt8[np.ndarray, "3 size size"] | None, Sample]:
        """The sample's pixels, if any, and the sample, varied as asked for by chance of (seed, place in the stream)."""
        chance = np.random.default_rng((self.order.seed, place))
        image = pixels(sample.image, self.image_size) if sample.image else None
        if self.flip and chance.random() < 0.5 and image is not None:
            image = image[:, :, ::-1]
        if self.rounds:
            sample = draw_rounds(sample, self.rounds, chance)
        return image, sample


def dataset(micro: Micro, start: int, stop: int, workers: int) -> ray.data.Dataset:
    """Micro-batches start..stop-1 for that many workers; stop - start is a multiple of workers.

    Worker r gets start + r, start + r + workers, ...: blocks are dealt to the workers in turn, so block b holds the
    next few of worker b % workers.  Iterate with preserve_order.
    """
    span = max(min(BLOCK, BLOCK_BYTES // (3 * micro.image_size**2)) // micro.size, 1)

    def read(rows: Batch) -> dict[str, list]:
        turn, worker = divmod(int(rows["id"][0]), workers)
        first = start + turn * span * workers + worker
        batches = [micro(number) for number in range(first, min(first + span * workers, stop), workers)]
        return {name: [batch[name] for batch in batches] for name in batches[0]}

    count = -(-(stop - start) // (workers * span)) * workers
    return ray.data.range(count, override_num_blocks=count).map_batches(read, batch_size=None)


def micro_batches(blocks: Iterable[Batch]) -> Iterator[Batch]:
    """The rows of a worker's blocks one by one, as `Micro` made them."""
    for block in blocks:
        for row in range(len(block["number"])):
            yield {name: column[row] for name, column in block.items()}


def captions(tokenizer: PreTrainedTokenizerBase, samples: Sequence[Sample]) -> Batch:
    """CLIP's side of a batch: what the assistant says first, as `<s> caption </s>`.

    input_ids, attention_mask: (samples, longest) int64, padded on the right; what is longer than CONTEXT is cut.
    """
    if bare := next((sample for sample in samples if not sample.image), None):
        raise ValueError(f"sample {bare.key}: text alone, allowed in a contrastive stage: an image and its caption")
    texts = [sample.record["conversations"][1]["value"] for sample in samples]
    cut = tokenizer(texts, truncation=True, max_length=CONTEXT - 1)["input_ids"]
    rows = [np.array([*ids, tokenizer.eos_token_id]) for ids in cut]
    return {
        "input_ids": pad(rows, tokenizer.pad_token_id),
        "attention_mask": pad([np.ones_like(row) for row in rows], 0),
    }


def conversations(template: str, image_tokens: int) -> Callable[[PreTrainedTokenizerBase, Sequence[Sample]], Batch]:
    """LLaVA's side of a batch: input_ids, labels and attention_mask, (samples, longest) int64, padded on the right."""

    def collate(tokenizer: PreTrainedTokenizerBase, samples: Sequence[Sample]) -> Batch:
        rows = []
        for sample in samples:
            ids, labels = encode(tokenizer, sample.record["conversations"], TEMPLATES[template], image_tokens)
            if len(ids) > tokenizer.model_max_length:
                raise ValueError(
                    f"sample {sample.key}: {len(ids)} tokens, allowed: {tokenizer.model_max_length}, "
                    "model.language.max_position_embeddings"
                )
            rows.append((ids, labels, np.ones_like(ids)))
        ids, labels, mask = zip(*rows, strict=True)
        return {
            "input_ids": pad(ids, tokenizer.pad_token_id),
            "labels": pad(labels, IGNORE),
            "attention_mask": pad(mask, 0),
        }

    return collate


def draw_rounds(sample: Sample, rounds: int, chance: np.random.Generator) -> Sample:
    """The sample with at most `rounds` of its rounds, in another order; the image still opens the conversation."""
    turns = sample.record["conversations"]
    if len(turns) % 2:
        raise ValueError(f"sample {sample.key}: {len(turns)} turns, allowed: an even number, so that each is answered")
    bare = [{**turn, "value": turn["value"].replace(IMAGE, "").strip()} for turn in turns]
    mixed = [turn for start in chance.permutation(len(turns) // 2)[:rounds] for turn in bare[2 * start : 2 * start + 2]]
    if any(IMAGE in turn["value"] for turn in turns):
        mixed[0]["value"] = f"{IMAGE}\n{mixed[0]['value']}"
    return replace(sample, record={**sample.record, "conversations": mixed})


@functools.cache
def _tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Read once a process."""
    from transformers import AutoTokenizer  # brings torch along, which Ray's coordinator of the tasks does without

    return AutoTokenizer.from_pretrained(folder)
