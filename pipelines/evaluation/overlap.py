"""Evaluation questions that are also in a training set: the same image and the same question.

Scores on such questions say little. Images are compared byte for byte. They are found by their sizes first, which the
index of a set has, so that few of a million images are read. Images that were stored as squares, or lie behind a URL,
are compared by their paths instead.

A copy of an image in another format or size has other bytes. It is searched among a drawn part of the set, by
thumbnails: it is near to one evaluation image and far from all others. Of easy-VQA's images, which resemble each other
more than photos do, 4,000 for training have a distance of at least 6.8 to the nearest of 1,000 test images, and of 0.29
of that to the next one; JPEGs of quality 75 to 90 and images of other sizes have 0.4 to 4.2 and less than 0.17 for nine
of ten. Images that were cropped, mirrored or padded are not found.
"""

import hashlib
import io
import os
import string
import unicodedata
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from PIL import Image

from pipelines.core import storage
from pipelines.data.shard_index import Shards, StoredSample
from pipelines.evaluation.tasks import TaskName, TaskSettings, find_image_folder, load_questions
from redux.conversation import IMAGE_TOKEN

MAX_CANDIDATES = 20_000
"""Samples of a set that are read to compare them, at most."""

BLOCK_CANDIDATES = 256

MAX_DRAWN = 1000
"""Samples of a set that are drawn to search for copies of evaluation images."""

MAX_THUMBNAILS = 2000
"""Evaluation images that are decoded for it, at most."""

THUMBNAIL_SIDE = 16

MAX_DISTANCE = 4.0
"""Largest root mean square of the difference of two thumbnails of one image, of 255."""

MAX_DISTANCE_RATIO = 0.2
"""Largest ratio of the distance to the nearest evaluation image and the distance to the next one."""

MIN_COPIES = 2
"""Fewest copies that are not a coincidence."""


@dataclass
class EvaluationImages:
    """Questions of an evaluation by their images.

    Args:
        by_size: local image files by their size in bytes.
        by_path: questions of each image, by path as its file names it; None stands for text only.
        files: local image files by path.
        prompts: prompts of all questions.
    """

    by_size: dict[int, list[tuple[str, str]]] = field(default_factory=dict)
    by_path: dict[str | None, set[str]] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
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
                continue  # An image inside the file of a benchmark
            result.by_path.setdefault(path, set()).add(list_question_texts(question.prompt)[0])
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
        self.files[path] = file


def list_question_texts(text: str) -> list[str]:
    """List the questions in a turn in a form for comparison, without options and instructions for the answer.

    A line is a question up to its first question mark. In a text without one, the first line is.

    >>> list_question_texts("Context: a dog.\\nQuestion: What  is it? (A) a cat (B) a dog\\nAnswer with one word.")
    ['what is it']
    >>> list_question_texts("<image>\\nDescribe it.\\nUse one word.")
    ['describe it']
    """
    plain = unicodedata.normalize("NFKC", text.replace(IMAGE_TOKEN, "")).casefold().strip()
    lines = plain.splitlines() or [""]
    asked = [line.partition("?")[0] for line in lines if "?" in line] or lines[:1]
    # Punctuation inside a word stays: 2+3 is not 2-3.
    words = [[word.strip(string.punctuation) for word in line.split()] for line in asked]
    return [" ".join(filter(None, line[1:] if line[:1] == ["question"] else line)) for line in words]


@dataclass(frozen=True)
class Overlap:
    """Overlap of a task and a set.

    Args:
        task: name of the task.
        questions: number of its questions.
        pairs: pairs of an image and a question that are in both; text only has "" as its image.
        example: a sample of the set with one of them.
        compared: number of samples of the set that were compared.
        copies: pairs whose image is in the set in another format or size, among the drawn samples.
        copy_example: a sample of the set with one of them.
        drawn: number of samples that were drawn to find copies.
    """

    task: str
    questions: int
    pairs: set[tuple[str, str]]
    example: str
    compared: int
    copies: set[tuple[str, str]] = field(default_factory=set)
    copy_example: str = ""
    drawn: int = 0


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
        asked = _list_asked(sample)
        for path in _find_paths(sample, evaluation, digests):
            for question in asked & evaluation.by_path.get(path, set()):
                pairs.add((path or "", question))
                example = example or _describe_pair(sample, question, path)
    # Samples that cannot match count as compared.
    compared = len(shards) - len(candidates) + len(rows)
    copies, copy_example, drawn = _find_copies(shards, evaluation, seed)
    questions = sum(map(len, evaluation.by_path.values()))
    return Overlap(task, questions, pairs, example, compared, copies - pairs, copy_example, drawn)


def _describe_pair(sample: StoredSample, question: str, path: str | None) -> str:
    return f"sample {sample.key}, {question!r}" + (f", image {path}" if path else "")


def _list_asked(sample: StoredSample) -> set[str]:
    return {question for text in _list_questions(sample.record) for question in list_question_texts(text)}


def _list_candidates(shards: Shards, evaluation: EvaluationImages) -> Any:
    """List the rows whose image has the size of an evaluation image, and those without one if questions have none."""
    sizes = [*evaluation.by_size, *([0] if None in evaluation.by_path else [])]
    if shards.prepared_format or not evaluation.by_size:
        # Compare paths, which are in the records.
        return np.arange(len(shards)) if set(evaluation.by_path) else np.arange(0)
    # -1 is unknown, for a set that is not made yet.
    return np.flatnonzero(np.isin(shards.image_sizes, [-1, *sizes]))


def _read(shards: Shards, rows: Any) -> Iterator[StoredSample]:
    for start in range(0, len(rows), BLOCK_CANDIDATES):
        block = [int(row) for row in rows[start : start + BLOCK_CANDIDATES]]
        try:
            yield from shards.read_samples(block)
        except ValueError:  # A damaged sample is found elsewhere
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
    equal_images = [path for file, path in same_size if _read_digest(file, digests) == digest]
    if equal_images or evaluation.by_size:
        return equal_images
    path = sample.record.get("image")
    return [path] if isinstance(path, str) and path in evaluation.by_path else []


def _read_digest(file: str, digests: dict[str, bytes]) -> bytes:
    if file not in digests:
        digests[file] = hashlib.sha256(Path(file).read_bytes()).digest()
    return digests[file]


# --- copies in another format or size ---------------------------------------------------------------------------------


def _find_copies(shards: Shards, evaluation: EvaluationImages, seed: int) -> tuple[set[tuple[str, str]], str, int]:
    """Find evaluation images with their questions among drawn samples of a set, by thumbnails.

    Returns:
        Pairs of an image and a question that are in both, without equal bytes; an example; the number of samples.
    """
    evaluation_texts = {question for path in evaluation.files for question in evaluation.by_path[path]}
    with_image = np.flatnonzero(shards.has_image) if evaluation_texts else np.arange(0)
    rng = np.random.default_rng((seed, 1))
    rows = np.sort(rng.permutation(with_image)[:MAX_DRAWN])
    # Only images with a question of the evaluation are decoded, on both sides.
    drawn_samples = []
    for sample in _read(shards, rows):
        asked = _list_asked(sample) & evaluation_texts
        if asked and (thumbnail := _draw_thumbnail(sample.image)) is not None:
            drawn_samples.append((sample, asked, thumbnail))
    set_texts = {question for _, asked, _ in drawn_samples for question in asked}
    paths = [path for path in evaluation.files if evaluation.by_path[path] & set_texts]
    paths = [paths[index] for index in np.sort(rng.permutation(len(paths))[:MAX_THUMBNAILS])]
    stored = {path: thumbnail for path in paths if (thumbnail := _draw_file(evaluation.files[path])) is not None}
    pairs: set[tuple[str, str]] = set()
    example = ""
    if drawn_samples and stored:
        nearest, is_copy = _match_thumbnails(
            np.stack([item[2] for item in drawn_samples]), np.stack(list(stored.values()))
        )
        names = list(stored)
        for number in np.flatnonzero(is_copy):
            sample, asked, _ = drawn_samples[number]
            path = names[nearest[number]]
            for question in asked & evaluation.by_path[path]:
                pairs.add((path, question))
                example = example or _describe_pair(sample, question, path)
    return (pairs, example, len(rows)) if len(pairs) >= MIN_COPIES else (set(), "", len(rows))


def _match_thumbnails(drawn: Any, stored: Any) -> tuple[Any, Any]:
    """Find the nearest stored thumbnail of each drawn one, and decide whether both are of one image."""
    squares = (drawn**2).sum(1)[:, None] + (stored**2).sum(1) - 2 * drawn @ stored.T
    distances = np.sqrt(np.maximum(squares, 0) / drawn.shape[1])
    nearest = distances.argmin(1)
    smallest = distances[np.arange(len(drawn)), nearest]
    distances[np.arange(len(drawn)), nearest] = np.inf
    # Equal or empty images are near to each other.
    return nearest, (smallest < MAX_DISTANCE) & (smallest < MAX_DISTANCE_RATIO * distances.min(1))


def _draw_file(file: str) -> Float[np.ndarray, " values"] | None:
    try:
        return _draw_thumbnail(Path(file).read_bytes())
    except OSError:
        return None


def _draw_thumbnail(image: bytes) -> Float[np.ndarray, " values"] | None:
    """Shrink an image to a square of few pixels, whatever its sides; None if it cannot be read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(image)) as decoder:
                decoder.draft("RGB", (4 * THUMBNAIL_SIDE, 4 * THUMBNAIL_SIDE))  # A JPEG is decoded at an eighth
                small = decoder.convert("RGB").resize((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.BOX)
    except Exception:  # Each format raises others; a sample that cannot be read is a problem of its own
        return None
    return np.asarray(small, np.float32).ravel()
