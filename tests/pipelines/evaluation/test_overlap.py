"""Evaluation questions in a training set: other words around them, and images in another format or size."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from pipelines.data import easy_vqa
from pipelines.data.options import ShardOptions
from pipelines.data.unmade import UnmadeShards
from pipelines.evaluation.overlap import EvaluationImages, Overlap, find_overlap, list_question_texts
from pipelines.evaluation.tasks import TaskSettings

QUESTION = "Is there a red shape?"
COUNT = 60


def find_image(split: str, number: int) -> Path:
    return Path(easy_vqa.PACKAGE_IMAGES) / split / "images" / f"{number}.png"


def write_images(folder: Path, split: str, write: Callable[[Image.Image, Path], None] | None = None) -> None:
    """Write images of easy-VQA, as they are or in another form."""
    folder.mkdir(parents=True)
    for number in range(COUNT):
        image = find_image(split, number)
        if write is None:
            (folder / image.name).write_bytes(image.read_bytes())
        else:
            with Image.open(image) as opened:
                write(opened.convert("RGB"), folder / image.name)


def find(folder: Path, trained: str, asked: str, question: str = QUESTION) -> Overlap:
    """Find the overlap of a set with the images of one folder and a task with those of another one."""
    turns = [{"from": "human", "value": f"<image>\n{QUESTION}"}, {"from": "gpt", "value": "yes"}]
    records = [{"id": n, "image": f"{trained}/{n}.png", "conversations": turns} for n in range(COUNT)]
    entries = [{"image": f"{asked}/{n}.png", "question": question, "answer": "yes"} for n in range(COUNT)]
    file = folder / "questions.jsonl"
    file.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    task = TaskSettings(file=str(file), images=str(folder), metric="exact")
    shards = UnmadeShards(records, str(folder), ShardOptions())
    return find_overlap(shards, "own", EvaluationImages.from_task("own", task), 0)


def save_as(image_format: str, path: Path, image: Image.Image, quality: int) -> None:
    sink = io.BytesIO()
    image.save(sink, image_format, quality=quality)
    path.write_bytes(sink.getvalue())


@pytest.mark.parametrize(
    "write",
    [
        lambda image, path: save_as("JPEG", path, image, 75),
        lambda image, path: save_as("WEBP", path, image, 80),
        lambda image, path: save_as("PNG", path, image.resize((128, 128)), 0),
        lambda image, path: save_as("JPEG", path, image.resize((48, 48)), 90),
        lambda image, path: save_as("PNG", path, image.convert("P"), 0),
    ],
    ids=["JPEG", "WEBP", "twice the size", "three quarters", "palette"],
)
def test_copies_of_images_in_another_form(write: Callable[[Image.Image, Path], None], tmp_path: Path) -> None:
    write_images(tmp_path / "test", "test")
    write_images(tmp_path / "copies", "test", write)
    overlap = find(tmp_path, "copies", "test")
    assert overlap.pairs == set()
    assert len(overlap.copies) > COUNT / 2
    # Each is the image of its own record.
    assert all(path == f"test/{path.rpartition('/')[2]}" for path, _ in overlap.copies)
    assert overlap.drawn == COUNT
    # Other questions about the same images are no overlap.
    assert find(tmp_path, "copies", "test", "Which shape is it?").copies == set()


def test_images_that_resemble_each_other_are_no_copies(tmp_path: Path) -> None:
    write_images(tmp_path / "train", "train")
    write_images(tmp_path / "test", "test")
    overlap = find(tmp_path, "train", "test")
    assert (overlap.pairs, overlap.copies) == (set(), set())
    # Equal images are found by their bytes.
    overlap = find(tmp_path, "test", "test")
    assert (len(overlap.pairs), overlap.copies) == (COUNT, set())


@pytest.mark.parametrize(
    "text",
    [
        "IS THERE  a red shape ?",
        "Is there a red shape",
        "Question: Is there a red shape? (A) yes (B) no",
        "Is there a red shape?\nA. no\nB. yes\nAnswer with the option's letter.",
        "Context: a picture.\nIs there a red shape? Answer the question using a single word or phrase.",
        "Is there a red shape?\n<image>",
        "Is there a red shape\uff1f",
    ],
)
def test_a_question_in_other_words_around_it(text: str) -> None:
    assert list_question_texts(text) == list_question_texts(QUESTION)


@pytest.mark.parametrize(
    ("first", "second"),
    [("What is 2+3?", "What is 2-3?"), ("Is there a red shape?", "Is there a blue shape?"), ("Say A.", "Say B.")],
)
def test_other_questions_differ(first: str, second: str) -> None:
    assert list_question_texts(first) != list_question_texts(second)
