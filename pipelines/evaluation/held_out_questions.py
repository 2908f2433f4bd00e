"""Questions from held-out samples: `evaluate.tasks.NAME.held_out` becomes a file of questions with images.

The first question of each sample that training never uses is copied once, before training. So evaluation, report and
conversations read it like any other file of questions, also if the set is in a bucket or has moved.

questions.jsonl   an entry per sample, as redux.benchmarks.custom reads it; the id is the sample's number in its set
HASH.jpg          the images as stored; samples with equal images share a file, and so a unit of the bootstrap

Cost: reads the held-out samples and decodes their images once: one percent of 665,000 samples with photos is 6,650.
"""

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipelines.core import interrupts, storage
from pipelines.data.held_out import select_held_out
from pipelines.data.images import check_image
from pipelines.data.records import find_rejection
from pipelines.data.shard_index import Shards, StoredSample
from redux.benchmarks.custom import read_first_question

CHUNK_SIZE = 64
"""Samples that are read, and held in memory, together."""


def write_held_out_questions(url: str, share: float, name: str, file: Path) -> None:
    """Write the questions of the held-out samples of a set, and their images beside them.

    A sample that training could not use either, or that begins without a question in words, is left out.

    Args:
        url: folder or URL of the set.
        share: share of its samples that is held out.
        name: name of the set, for messages.
        file: file of the questions, which appears when it is complete. Its folder is replaced.

    Raises:
        ValueError: the set cannot be read, has too few samples, or has no question among the held-out ones.
    """
    shards = Shards(url)
    numbers = select_held_out(len(shards), share, name).tolist()
    # Images of an interrupted call, or of another share, are of no use.
    shutil.rmtree(file.parent, ignore_errors=True)
    file.parent.mkdir(parents=True)
    entries = []
    for start in range(0, len(numbers), CHUNK_SIZE):
        interrupts.raise_if_interrupted()
        chunk = numbers[start : start + CHUNK_SIZE]
        for number, sample in _read_usable(shards, chunk):
            if entry := _write_entry(number, sample, file.parent):
                entries.append(entry)
    if not entries:
        raise ValueError(
            f"{url}: got no question among the {len(numbers)} held-out samples of {name}, allowed: conversations that "
            "begin with a question in words"
        )
    if left_out := len(numbers) - len(entries):
        print(f"{name}: {left_out} of {len(numbers)} held-out samples have no question in words, or cannot be used")
    storage.write(str(file), "".join(json.dumps(entry) + "\n" for entry in entries).encode())


def _read_usable(shards: Shards, numbers: Sequence[int]) -> list[tuple[int, StoredSample]]:
    """Read samples with their numbers, without those whose bytes are not those of the index."""
    try:
        return list(zip(numbers, shards.read_samples(numbers), strict=True))
    except ValueError:
        # One damaged sample fails the whole request, so each one gets its own.
        if len(numbers) == 1:
            return []
        return [pair for number in numbers for pair in _read_usable(shards, [number])]


def _write_entry(number: int, sample: StoredSample, folder: Path) -> dict[str, Any] | None:
    """Write the image of a sample and return its entry; None for a sample that is left out."""
    # As pipelines.data.ingest: tars of other programs may hold anything.
    record = {name: sample.record[name] for name in ("conversations", "type") if name in sample.record}
    if find_rejection(record | ({"image": "image"} if sample.image else {}), None):
        return None
    fields = read_first_question(sample.id, record)
    if not fields["question"]:
        return None
    entry = {"id": str(number), "question": fields["question"], "answer": fields["answer"]}
    if isinstance(fields.get("type"), str):
        entry["type"] = fields["type"]
    if sample.image:
        try:
            suffix = check_image(sample.image)
        except ValueError:
            return None
        entry["image"] = f"{hashlib.sha256(sample.image).hexdigest()[:32]}.{suffix}"
        (folder / entry["image"]).write_bytes(sample.image)
    return entry
