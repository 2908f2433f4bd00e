"""Tests of easy-VQA: records have exactly the questions of the package, and captions what the answers determine."""

import itertools
import re
from collections import Counter
from functools import cache
from typing import Literal

import easy_vqa as package
import pytest

from pipelines.data.easy_vqa import (
    ANSWER_COLOURS,
    ANSWER_SHAPES,
    PACKAGE_IMAGES,
    QUESTION_TYPES,
    derive_caption,
    make_captions,
    make_conversations,
)

Split = Literal["train", "test"]
SPLITS = pytest.mark.parametrize("split", ["train", "test"])


@cache
def told(split: Split) -> list[dict]:
    return make_conversations(split)


def rounds(record: dict) -> list[tuple[str, str]]:
    values = [turn["value"].removeprefix("<image>\n") for turn in record["conversations"]]
    return list(zip(values[::2], values[1::2], strict=True))


def true_of(colour: str, shape: str, question: str, answer: str) -> bool:
    """Tell if an image with this colour and shape allows the answer, from the words of the question."""
    words = question.rstrip("?").split()
    fits = all(word == colour for word in words if word in ANSWER_COLOURS)
    fits = fits and all(word == shape for word in words if word in ANSWER_SHAPES)
    if answer in ("yes", "no"):
        asserted = "not" not in words and "no" not in words
        return fits == (asserted == (answer == "yes"))
    return fits and answer in (colour, shape)


@SPLITS
def test_every_question_of_the_package_is_asked_once_with_its_answer(split: Split):
    questions, answers, images = getattr(package, f"get_{split}_questions")()
    asked = Counter((question, answer, record["id"]) for record in told(split) for question, answer in rounds(record))
    there = Counter(
        (question, answer, f"{split}/{image}")
        for question, answer, image in zip(questions, answers, images, strict=True)
    )
    assert asked == there
    assert sum(asked.values()) == {"train": 38_575, "test": 9_673}[split]


@SPLITS
def test_every_image_is_one_record_and_its_file_bears_its_number(split: Split):
    paths = getattr(package, f"get_{split}_image_paths")()
    assert [record["id"] for record in told(split)] == [f"{split}/{image}" for image in sorted(paths)]
    assert len(told(split)) == {"train": 4_000, "test": 1_000}[split]
    for record in told(split):
        image = int(record["id"].split("/")[1])
        assert (PACKAGE_IMAGES / record["image"]).samefile(paths[image])


def test_no_image_of_training_is_an_image_of_the_test():
    train, test = ({PACKAGE_IMAGES / record["image"] for record in told(split)} for split in ("train", "test"))
    assert (len(train), len(test)) == (4_000, 1_000)
    assert train.isdisjoint(test)
    assert {path.read_bytes() for path in train}.isdisjoint({path.read_bytes() for path in test})


@SPLITS
def test_turns_alternate_and_the_image_stands_once_and_first(split: Split):
    for record in told(split):
        turns = record["conversations"]
        assert [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2)
        assert turns[0]["value"].startswith("<image>\n")
        assert sum(turn["value"].count("<image>") for turn in turns) == 1


@SPLITS
def test_a_caption_says_what_every_image_that_fits_the_answers_has_and_nothing_else(split: Split):
    """Slow reference: those of the 24 possible images that allow every answer."""
    made = make_captions(split)
    assert [(record["id"], record["image"]) for record in made] == [(r["id"], r["image"]) for r in told(split)]
    for record, asked in zip(made, map(rounds, told(split)), strict=True):
        fitting = [
            pair
            for pair in itertools.product(ANSWER_COLOURS, ANSWER_SHAPES)
            if all(true_of(*pair, question, answer) for question, answer in asked)
        ]
        assert fitting, record["id"]
        colours, shapes = ({pair[place] for pair in fitting} for place in (0, 1))
        colour = f"{next(iter(colours))} " if len(colours) == 1 else ""
        shape = next(iter(shapes)) if len(shapes) == 1 else "shape"
        [(request, said)] = rounds(record)
        assert (request, said) == ("", f"a {colour}{shape}"), record["id"]


@SPLITS
def test_a_caption_names_every_colour_and_shape_that_was_an_answer(split: Split):
    for record, asked in zip(make_captions(split), map(rounds, told(split)), strict=True):
        words = record["conversations"][1]["value"].split()
        named = {answer for _, answer in asked} - {"yes", "no"}
        assert named <= set(words), record["id"]


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ([], "a shape"),
        ([("what color is the circle?", "teal")], "a teal circle"),
        ([("what is the color of the shape?", "red")], "a red shape"),
        ([("is there a blue shape?", "yes")], "a blue shape"),
        ([("is no blue shape present?", "no")], "a blue shape"),
        ([("is there a blue shape?", "no")], "a shape"),
        ([("is there a circle?", "no"), ("is there not a triangle?", "yes")], "a rectangle"),
    ],
)
def test_a_caption_follows_from_what_is_asked_affirmed_and_denied(asked: list[tuple[str, str]], said: str):
    assert derive_caption(asked) == said


def test_the_thirteen_answers_of_the_package_have_a_type_each():
    assert set(QUESTION_TYPES) == set(package.get_answers())
    assert Counter(QUESTION_TYPES.values()) == {"colour": 8, "shape": 3, "yes/no": 2}


@SPLITS
def test_the_type_of_an_answer_is_the_type_of_its_question(split: Split):
    kinds = (("what colou?r|the colou?r of", "colour"), ("what (shape|is the \\w+ shape)", "shape"), ("", "yes/no"))
    for record in told(split):
        for question, answer in rounds(record):
            kind = next(kind for pattern, kind in kinds if re.search(pattern, question))
            assert QUESTION_TYPES[answer] == kind, question
