"""easy-VQA (PyPI `easy-vqa`, MIT) as records in LLaVA's JSON form for training, and as questions for evaluation.

Its images and questions come with a Python package, so no hub is needed. Each image shows one coloured shape, and the
questions are its only annotations. The questions of an image, about ten, become one conversation, as in LLaVA's
instruction mixture. The caption states what the answers determine, and no more.

    {"id": "train/7", "image": "train/images/7.png",
     "conversations": [{"from": "human", "value": "<image>\\n…"}, {"from": "gpt", …}]}
"""

import itertools
import random
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import easy_vqa

from pipelines.data import formats
from redux.benchmarks import Metric, Outcome, Question, Row
from redux.benchmarks.instructions import ImageQuestion

ANSWER_COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
ANSWER_SHAPES = ("circle", "rectangle", "triangle")
QUESTION_TYPES = {
    **dict.fromkeys(ANSWER_COLOURS, "colour"),
    **dict.fromkeys(ANSWER_SHAPES, "shape"),
    "yes": "yes/no",
    "no": "yes/no",
}
"""Type of a question by its answer. These are all 13 answers."""

PACKAGE_IMAGES = Path(easy_vqa.__file__).parent / "data"
"""Folder of the images: their paths are relative to it."""

INSTRUCTIONS_WITH_IMAGES = (
    "change_case:english_capital",
    "detectable_content:postscript",
    "detectable_format:number_bullet_lists",
    "startend:end_checker",
)
"""Four instructions of different kinds that are also taught with images.

Without them, a small model learns to use nothing but the question as soon as there is an image.
"""

HALF_OF_INSTRUCTIONS = tuple(formats.INSTRUCTION_FORMS)[1::2]
"""Every second of the sixteen, T2 to T16, so that the taught and the untaught half have instructions of each kind."""

QuestionAnswers = list[tuple[str, str]]


def make_conversations(split: Literal["train", "test"]) -> list[dict]:
    """Make one conversation per image with all its questions, in the order of image numbers."""
    return [
        _make_record(split, image, path, [turn for question, answer in pairs for turn in (question, answer)])
        for image, path, pairs in _load_images(split)
    ]


def make_captions(split: Literal["train", "test"]) -> list[dict]:
    """Make one record with a caption per image."""
    return [_make_record(split, image, path, ["", derive_caption(pairs)]) for image, path, pairs in _load_images(split)]


def make_image_instructions(taught: Sequence[str] = INSTRUCTIONS_WITH_IMAGES) -> list[dict]:
    """Make one record per training image with two questions, each with an instruction.

    Args:
        taught: ids of the instructions.
    """
    rng = random.Random(0)
    return [
        _make_record(
            "train",
            image,
            path,
            [text for pair in rng.sample(pairs, 2) for text in formats.add_instruction(rng.choice(taught), *pair, rng)],
        )
        for image, path, pairs in _load_images("train")
    ]


def make_text_instructions(taught: Sequence[str] = tuple(formats.INSTRUCTION_FORMS)) -> list[dict]:
    """Make text-only records: a description of each training image, with two questions and an instruction each.

    Args:
        taught: ids of the instructions. Descriptions and questions are the same for all choices.
    """
    rng = random.Random(0)
    examples = [
        (f"there is {derive_caption(pairs)}.", *pair)
        for _, _, pairs in _load_images("train")
        for pair in rng.sample(pairs, 2)
    ]
    rng.shuffle(examples)
    return formats.make_records(examples, taught=taught)


EASY_VQA_SETS: dict[str, Callable[[], list[dict]]] = {
    "captions": partial(make_captions, "train"),
    "conversations": partial(make_conversations, "train"),
    "shown": make_image_instructions,
    "half_shown": partial(make_image_instructions, HALF_OF_INSTRUCTIONS),
    "formats": make_text_instructions,
    "half_formats": partial(make_text_instructions, HALF_OF_INSTRUCTIONS),
}
"""Training sets that a job can make of easy-VQA, by name."""

INSTRUCTIONS_BY_SET: dict[str, tuple[str, ...]] = {
    "shown": INSTRUCTIONS_WITH_IMAGES,
    "half_shown": HALF_OF_INSTRUCTIONS,
    "formats": tuple(formats.INSTRUCTION_FORMS),
    "half_formats": HALF_OF_INSTRUCTIONS,
}
"""Ids of the instructions that each of these sets teaches; the others teach none."""


def load_test_questions(*files: str) -> list[Question]:
    """Load all 9,673 test questions. Questions about one image share their `unit`, since they are not independent.

    Takes no files: the parameter is that of other benchmarks.
    """
    if files:
        raise ValueError(f"got {', '.join(files)}, allowed: none, because easy-VQA's files are in its package")
    return [
        Question(
            id=f"test/{image}/{number}",
            unit=f"test/{image}",
            image=path,
            prompt=question,
            reference={"image": path, "answer": answer, "type": QUESTION_TYPES[answer]},
        )
        for image, path, pairs in _load_images("test")
        for number, (question, answer) in enumerate(pairs)
    ]


def draw_questions() -> list[ImageQuestion]:
    """Draw one question per test image, for the evaluation of instructions. The draw is always the same."""
    rng = random.Random(0)
    return [rng.choice(group) for group in _group_by_image(load_test_questions())]


def compute_metrics(rows: Sequence[Row]) -> dict[str, Metric]:
    """Compute the accuracy over all questions and per type, from 0 to 1."""
    types = sorted({row["type"] for row in rows})
    overall = {"accuracy": Metric([Outcome("", row["unit"], is_correct(row)) for row in rows])}
    return overall | {
        f"accuracy.{kind}": Metric([Outcome("", row["unit"], is_correct(row)) for row in rows if row["type"] == kind])
        for kind in types
    }


def is_correct(row: Row) -> bool:
    """Return True if the response equals the answer."""
    return bool(row["response"] == row["answer"])


def derive_caption(pairs: QuestionAnswers) -> str:
    """Derive a caption from questions and answers: "a teal circle", "a teal shape", "a circle" or "a shape".

    Four things determine an attribute: an answer that names it, a question that presupposes it ("what color is the
    circle?"), a "yes" to it, or a "no" to all other values.
    """
    attributes = (_derive_attribute(pairs, ANSWER_COLOURS) or "", _derive_attribute(pairs, ANSWER_SHAPES) or "shape")
    return " ".join(["a", *filter(None, attributes)])


def _derive_attribute(pairs: QuestionAnswers, values: tuple[str, ...]) -> str | None:
    """Find the only value that no question and answer excludes, or return None."""
    possible = set(values)
    for question, answer in pairs:
        named = {answer, *re.findall(r"\w+", question)} & set(values)
        if not named:
            continue
        # The answer "no" to "is it not red?" means red.
        denied = bool(re.search(r"\b(not|no)\b", question)) != (answer == "no")
        possible = possible - named if denied else possible & named
    return possible.pop() if len(possible) == 1 else None


def _make_record(split: str, image: int, path: str, texts: list[str]) -> dict:
    """Make a record from the texts of its turns."""
    turns = [{"from": ("human", "gpt")[number % 2], "value": text} for number, text in enumerate(texts)]
    turns[0]["value"] = f"<image>\n{turns[0]['value']}"
    return {"id": f"{split}/{image}", "image": path, "conversations": turns}


def _group_by_image(questions: list[Question]) -> Iterator[list[ImageQuestion]]:
    """Yield the questions about each image."""
    for _, group in itertools.groupby(questions, key=lambda question: question.unit):
        yield [
            ImageQuestion(
                id=question.id,
                image=question.image,
                question=question.prompt,
                answer=question.reference["answer"],
            )
            for question in group
        ]


def _load_images(split: str) -> list[tuple[int, str, QuestionAnswers]]:
    """Load (number, path, questions with answers) of each image."""
    pairs: dict[int, QuestionAnswers] = {}
    for question, answer, image in zip(*getattr(easy_vqa, f"get_{split}_questions")(), strict=True):
        pairs.setdefault(image, []).append((question, answer))
    paths = getattr(easy_vqa, f"get_{split}_image_paths")()
    return [(image, Path(paths[image]).relative_to(PACKAGE_IMAGES).as_posix(), pairs[image]) for image in sorted(pairs)]
