"""easy-VQA (PyPI `easy-vqa`, MIT): real images and questions that need no hub, as records of LLaVA's JSON form to train
on, and as questions to be asked one by one.

Each image holds one coloured shape, and the questions are its only annotations.  About ten questions an image become
one conversation, as in LLaVA's instruction mixture; its caption says what the answers settle and no more.

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
"""Type of a question by its answer; these are all 13 answers."""

PACKAGE_IMAGES = Path(easy_vqa.__file__).parent / "data"
"""Where the images' paths start."""

INSTRUCTIONS_WITH_IMAGES = (
    "change_case:english_capital",
    "detectable_content:postscript",
    "detectable_format:number_bullet_lists",
    "startend:end_checker",
)
"""Four instructions, of different kinds, that are also taught beside images: without them a small model learns to look
at nothing but the question as soon as there is an image.
"""

QuestionAnswers = list[tuple[str, str]]


def make_conversations(split: Literal["train", "test"]) -> list[dict]:
    """One conversation an image with all its questions, in the order of image numbers."""
    return [
        _make_record(split, image, path, [turn for question, answer in asked for turn in (question, answer)])
        for image, path, asked in _load_images(split)
    ]


def make_captions(split: Literal["train", "test"]) -> list[dict]:
    """One caption an image."""
    return [_make_record(split, image, path, ["", derive_caption(asked)]) for image, path, asked in _load_images(split)]


def make_image_instructions() -> list[dict]:
    """Beside each training image two questions about it, each to be answered in one of the forms of `SHOWN`."""
    chance = random.Random(0)
    return [
        _make_record(
            "train",
            image,
            path,
            [
                text
                for pair in chance.sample(asked, 2)
                for text in formats.add_instruction(chance.choice(INSTRUCTIONS_WITH_IMAGES), *pair, chance)
            ],
        )
        for image, path, asked in _load_images("train")
    ]


def make_text_instructions() -> list[dict]:
    """Text alone: two questions about each training image, which is told in words, each to be answered in a form."""
    chance = random.Random(0)
    told = [
        (f"there is {derive_caption(asked)}.", *pair)
        for _, _, asked in _load_images("train")
        for pair in chance.sample(asked, 2)
    ]
    chance.shuffle(told)
    return formats.make_records(told)


EASY_VQA_SETS: dict[str, Callable[[], list[dict]]] = {
    "captions": partial(make_captions, "train"),
    "conversations": partial(make_conversations, "train"),
    "shown": make_image_instructions,
    "formats": make_text_instructions,
}
"""What a job can make of easy-VQA to train on, by name."""


def load_questions(*files: str) -> list[Question]:
    """All 9,673 test questions, of no files; those about one image depend on each other."""
    if files:
        raise ValueError(f"got {', '.join(files)}, allowed: none, as easy-VQA's own are in its package")
    return [
        Question(
            id=f"test/{image}/{number}",
            unit=f"test/{image}",
            image=path,
            prompt=question,
            reference={"image": path, "answer": answer, "type": QUESTION_TYPES[answer]},
        )
        for image, path, asked in _load_images("test")
        for number, (question, answer) in enumerate(asked)
    ]


def draw_questions() -> list[ImageQuestion]:
    """One question about each test image, for an instruction to go with; drawn once for all."""
    chance = random.Random(0)
    return [chance.choice(each) for each in _group_by_image(load_questions())]


def compute_metrics(rows: Sequence[Row]) -> dict[str, Metric]:
    """Accuracy over all questions and over those of each type, 0 to 1."""
    kinds = sorted({row["type"] for row in rows})
    whole = {"accuracy": Metric([Outcome("", row["unit"], is_correct(row)) for row in rows])}
    return whole | {
        f"accuracy.{kind}": Metric([Outcome("", row["unit"], is_correct(row)) for row in rows if row["type"] == kind])
        for kind in kinds
    }


def is_correct(row: Row) -> bool:
    """Whether the response is the answer, word for word."""
    return bool(row["response"] == row["answer"])


def derive_caption(asked: QuestionAnswers) -> str:
    """What the questions and answers settle of the image: "a teal circle", "a teal shape", "a circle" or "a shape".

    An attribute is settled by an answer that names it, a question that takes it for granted ("what color is the
    circle?"), a "yes" to it, or by a "no" to all the others of its kind.
    """
    words = (_derive_attribute(asked, ANSWER_COLOURS) or "", _derive_attribute(asked, ANSWER_SHAPES) or "shape")
    return " ".join(["a", *filter(None, words)])


def _derive_attribute(asked: QuestionAnswers, kind: tuple[str, ...]) -> str | None:
    left = set(kind)
    for question, answer in asked:
        named = {answer, *re.findall(r"\w+", question)} & set(kind)
        if not named:
            continue
        denied = bool(re.search(r"\b(not|no)\b", question)) != (answer == "no")
        left = left - named if denied else left & named
    return left.pop() if len(left) == 1 else None


def _make_record(split: str, image: int, path: str, texts: list[str]) -> dict:
    turns = [{"from": ("human", "gpt")[number % 2], "value": text} for number, text in enumerate(texts)]
    turns[0]["value"] = f"<image>\n{turns[0]['value']}"
    return {"id": f"{split}/{image}", "image": path, "conversations": turns}


def _group_by_image(questions: list[Question]) -> Iterator[list[ImageQuestion]]:
    for _, about in itertools.groupby(questions, key=lambda question: question.unit):
        yield [
            ImageQuestion(id=each.id, image=each.image, question=each.prompt, answer=each.reference["answer"])
            for each in about
        ]


def _load_images(split: str) -> list[tuple[int, str, QuestionAnswers]]:
    """(number, path, questions with answers) of each image."""
    asked: dict[int, QuestionAnswers] = {}
    for question, answer, image in zip(*getattr(easy_vqa, f"get_{split}_questions")(), strict=True):
        asked.setdefault(image, []).append((question, answer))
    paths = getattr(easy_vqa, f"get_{split}_image_paths")()
    return [(image, Path(paths[image]).relative_to(PACKAGE_IMAGES).as_posix(), asked[image]) for image in sorted(asked)]
