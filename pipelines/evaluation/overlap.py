"""Evaluation questions that are also in a training set: the same image, byte for byte, and the same question.

Scores on such questions say little. Images are found by their sizes first, which the index of a set has, so that few of
a million images are read. Images that were stored as squares, or lie behind a URL, are compared by their paths instead.
"""

import hashlib
import os
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.core import storage
from pipelines.data.shard_index import Shards, StoredSample
from pipelines.evaluation.tasks import TaskName, TaskSettings, find_image_folder, load_questions
from redux.conversation import IMAGE_TOKEN

MAX_CANDIDATES = 20_000
"""Samples of a set that are read to compare them, at most."""

BLOCK_CANDIDATES = 256


@dataclass
class EvaluationImages:
    """Questions of an evaluation by their images.

    Args:
        by_size: local image files by their size in bytes.
        by_path: questions of each image, by path as its file names it; None stands for text only.
        prompts: prompts of all questions.
    """

    by_size: dict[int, list[tuple[str, str]]] = field(default_factory=dict)
    by_path: dict[str | None, set[str]] = field(default_factory=dict)
    prompts: list[str] = field(default_factory=list)

    @classmethod
    def from_task(cls, name: TaskName, task: TaskSettings) -> "EvaluationImages":
        """Read the questions of a task."""
        result = cls()
        folder = find_image_folder(name, task)
        for question in load_questions(name, task):
            result.prompts.append(question.prompt)
            path = question.image if isinstance(question.image, str) else None
            if path is None and question.image is not None:
                continue  # an image inside the file of a benchmark
            result.by_path.setdefault(path, set()).add(normalize_question(question.prompt))
        if storage.is_local(folder):
            for path in filter(None, result.by_path):
                result._add_file(folder, path)
        return result

    def _add_file(self, folder: str, path: str) -> None:
        file = os.path.join(folder, path)
        try:
            self.by_size.setdefault(os.path.getsize(file), []).append((file, path))
        except OSError:
            return


def normalize_question(text: str) -> str:
    """Return the first line of a question in a form for comparison: what follows are instructions for the answer.

    >>> normalize_question("<image>\\nWhat  is it?\\nAnswer with one word.")
    'what is it?'
    """
    lines = text.replace(IMAGE_TOKEN, "").strip().splitlines()
    return " ".join(unicodedata.normalize("NFKC", lines[0]).casefold().split()) if lines else ""


@dataclass(frozen=True)
class Overlap:
    """Overlap of a task and a set.

    Args:
        task: name of the task.
        questions: number of its questions.
        pairs: pairs of an image and a question that are in both; text only has "" as its image.
        example: a sample of the set with one of them.
        compared: number of samples of the set that were compared.
    """

    task: str
    questions: int
    pairs: set[tuple[str, str]]
    example: str
    compared: int


def find_overlap(shards: Shards, task: str, evaluation: EvaluationImages, seed: int) -> Overlap:
    """Find the questions of an evaluation in a set."""
    candidates = _list_candidates(shards, evaluation)
    rows = candidates
    if len(candidates) > MAX_CANDIDATES:
        rows = np.sort(np.random.default_rng(seed).choice(candidates, MAX_CANDIDATES, replace=False))
    pairs: set[tuple[str, str]] = set()
    example = ""
    digests: dict[str, bytes] = {}
    for sample in _read(shards, rows):
        asked = {normalize_question(text) for text in _list_questions(sample.record)}
        for path in _find_paths(sample, evaluation, digests):
            for question in asked & evaluation.by_path.get(path, set()):
                pairs.add((path or "", question))
                example = example or f"sample {sample.key}, {question!r}" + (f", image {path}" if path else "")
    # samples that cannot match count as compared
    compared = len(shards) - len(candidates) + len(rows)
    return Overlap(task, sum(map(len, evaluation.by_path.values())), pairs, example, compared)


def _list_candidates(shards: Shards, evaluation: EvaluationImages) -> Any:
    """List the rows whose image has the size of an evaluation image, and those without one if questions have none."""
    sizes = [*evaluation.by_size, *([0] if None in evaluation.by_path else [])]
    if shards.prepared_format or not evaluation.by_size:
        # compare paths, which are in the records
        return np.arange(len(shards)) if set(evaluation.by_path) else np.arange(0)
    # -1 is unknown, for a set that is not made yet
    return np.flatnonzero(np.isin(shards.image_sizes, [-1, *sizes]))


def _read(shards: Shards, rows: Any) -> Iterator[StoredSample]:
    for first in range(0, len(rows), BLOCK_CANDIDATES):
        block = [int(row) for row in rows[first : first + BLOCK_CANDIDATES]]
        try:
            yield from shards.read_samples(block)
        except ValueError:  # a damaged sample is found elsewhere
            continue


def _list_questions(record: Mapping[str, Any]) -> Iterable[str]:
    turns = record.get("conversations")
    if not isinstance(turns, list):
        return []
    return [turn["value"] for turn in turns[::2] if isinstance(turn, dict) and isinstance(turn.get("value"), str)]


def _find_paths(sample: StoredSample, evaluation: EvaluationImages, digests: dict[str, bytes]) -> Iterable[str | None]:
    """Find the evaluation images that a sample has."""
    if not sample.image:
        return [None]
    same_size = evaluation.by_size.get(len(sample.image), [])
    digest = hashlib.sha256(sample.image).digest() if same_size else b""
    found = [path for file, path in same_size if _read_digest(file, digests) == digest]
    if found or evaluation.by_size:
        return found
    path = sample.record.get("image")
    return [path] if isinstance(path, str) and path in evaluation.by_path else []


def _read_digest(file: str, digests: dict[str, bytes]) -> bytes:
    if file not in digests:
        digests[file] = hashlib.sha256(Path(file).read_bytes()).digest()
    return digests[file]
