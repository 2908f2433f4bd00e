"""Ray Data executes the order: a dataset over micro-batch numbers whose tasks read just their samples.

    rows in:   number of a micro-batch
    rows out:  one row a sample, one block a micro-batch; columns as the collation gives them, and
               number (of the micro-batch), pixel_values (3, size, size) uint8
    resources: 1 CPU a task; decoding, tokenising and padding happen there, scaling to floats in the trainer

A task is a pure function of (settings, number), so what Ray computes again after a lost node has the same bytes.
Images travel as uint8: a quarter of the bytes of floats.
"""

import functools
import io
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import ray.data
from jaxtyping import UInt8
from PIL import Image
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from pipelines.order import Order
from pipelines.shards import Sample, Shards
from redux.conversation import IGNORE, IMAGE, TEMPLATES, encode, pad
from redux.model import CONTEXT, IMAGE_MEAN

Batch = dict[str, np.ndarray]


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
        stored = self.shards.read(self.order.batch(batch)[within : within + self.size])
        images, samples = zip(*(self._vary(sample, first + place) for place, sample in enumerate(stored)), strict=True)
        text = self.collate(_tokenizer(self.tokenizer), samples)
        return {"number": np.full(self.size, number), "pixel_values": np.stack(images), **text}

    def _vary(self, sample: Sample, place: int) -> tuple[UInt8[np.ndarray, "3 size size"], Sample]:
        """The sample's pixels and the sample, varied as asked for by chance of (seed, place in the stream)."""
        chance = np.random.default_rng((self.order.seed, place))
        image = pixels(sample.image, self.image_size)
        if self.flip and chance.random() < 0.5:
            image = image[:, :, ::-1]
        if self.rounds:
            sample = draw_rounds(sample, self.rounds, chance)
        return image, sample


def dataset(micro: Micro, start: int, stop: int) -> ray.data.Dataset:
    """Micro-batches start..stop-1 in order, one block each.  Iterate with preserve_order."""

    def read(rows: Batch) -> Batch:
        return micro(int(rows["id"][0]) + start)

    count = stop - start
    return ray.data.range(count, override_num_blocks=count).map_batches(read, batch_size=None)


def captions(tokenizer: PreTrainedTokenizerBase, samples: Sequence[Sample]) -> Batch:
    """CLIP's side of a batch: what the assistant says first, as `<s> caption </s>`.

    input_ids, attention_mask: (samples, longest) int64, padded on the right; what is longer than CONTEXT is cut.
    """
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


def pixels(image: bytes, size: int) -> UInt8[np.ndarray, "3 size size"]:
    """The image, padded to a square with CLIP's mean colour and resized: LLaVA-1.5's stage 2."""
    with Image.open(io.BytesIO(image)) as opened:
        picture = opened.convert("RGB")
    if picture.size != (size, size):
        side = max(picture.size)
        square = Image.new("RGB", (side, side), tuple(int(mean * 255) for mean in IMAGE_MEAN))
        square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
        picture = square.resize((size, size), Image.Resampling.BICUBIC)
    return np.array(picture).transpose(2, 0, 1)


@functools.cache
def _tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Read once a process; a task is one thread, so the tokenizer must not start its own."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    return AutoTokenizer.from_pretrained(folder)
