"""Each held-out constraint checks what its text says, and takes only arguments that it can check."""

import random
from typing import Any

import pytest

from redux.held_out_instructions import HELD_OUT_INSTRUCTIONS
from redux.instructions import (
    ALL_INSTRUCTIONS,
    INSTRUCTIONS,
    draw_arguments,
    follows_loosely,
    follows_strictly,
    render_instruction,
)

IDS = {each.name: id for id, each in HELD_OUT_INSTRUCTIONS.items()}

CASES: list[tuple[str, dict[str, Any], str, bool]] = [
    ("first letter", {"letter": "t"}, '"The circle is red."', True),
    ("first letter", {"letter": "T"}, "teal", True),
    ("first letter", {"letter": "t"}, "A teal circle", False),
    ("first letter", {"letter": "t"}, "123", False),
    ("absent letter", {"letter": "e"}, "A brown circl", True),
    ("absent letter", {"letter": "e"}, "GREEN", False),
    ("exact words", {"num_words": 3}, "It's a circle-like shape", False),
    ("exact words", {"num_words": 3}, "It's a circle!", True),
    ("exact words", {"num_words": 3}, "a blue-green circle", True),
    ("exact words", {"num_words": 3}, "red", False),
    ("numbered list", {"num_items": 2}, "1. red\n2. round", True),
    ("numbered list", {"num_items": 2}, "1. red\n\n 2.  round\n", True),
    ("numbered list", {"num_items": 2}, "Sure:\n1. red\n2. round", False),
    ("numbered list", {"num_items": 2}, "1. red\n3. round", False),
    ("numbered list", {"num_items": 2}, "1. red\n2. round\n3. big", False),
    ("numbered list", {"num_items": 1}, "1.", False),
    ("word order", {"words": ["sun", "moon"]}, "The Sun and the MOON", True),
    ("word order", {"words": ["sun", "moon"]}, "moon, sun", False),
    ("word order", {"words": ["sun", "moon"]}, "sunny moon", False),
    ("word order", {"words": ["sun", "moon"]}, "moon sun moon", False),
    ("alphabetical words", {"num_words": 3}, "a circle, red", True),
    ("alphabetical words", {"num_words": 3}, "a Big circle", True),
    ("alphabetical words", {"num_words": 3}, "a red circle", False),
    ("alphabetical words", {"num_words": 3}, "red", False),
    ("closing brackets", {}, "It is red (a circle)", True),
    ("closing brackets", {}, "It is red\n(a circle).", False),
    ("closing brackets", {}, "(a circle)", False),
    ("closing brackets", {}, "It is red ()", False),
    ("hyphens", {}, "it-is-red.", True),
    ("hyphens", {}, "it-is red", False),
    ("hyphens", {}, "red", False),
    ("hyphens", {}, "it--is", False),
    ("question", {}, "Is it not red?", True),
    ("question", {}, "It is red. Is it?", False),
    ("question", {}, "Red? Yes?", False),
    ("question", {}, "red", False),
    ("capitalised words", {"num_words": 2}, "The Circle's Red", True),
    ("capitalised words", {"num_words": 2}, "The circle", False),
    ("capitalised words", {"num_words": 2}, "Red", False),
    ("capitalised words", {"num_words": 2}, "3 Red Circles", True),
    ("exclamation marks", {"num_marks": 2}, "It is red! Yes!", True),
    ("exclamation marks", {"num_marks": 2}, "It is red!!!", False),
    ("labelled lines", {}, "Answer: red\nReason: it looks so", True),
    ("labelled lines", {}, "answer: red\n\nreason: it looks so", True),
    ("labelled lines", {}, "Answer: red Reason: it looks so", False),
    ("labelled lines", {}, "Reason: it looks so\nAnswer: red", False),
    ("labelled lines", {}, "Answer:\nReason: it looks so", False),
]


@pytest.mark.parametrize(("name", "kwargs", "response", "follows"), CASES)
def test_a_check_counts_what_the_text_says(name: str, kwargs: dict, response: str, follows: bool) -> None:
    assert follows_strictly(IDS[name], kwargs, response) is follows
    assert follows_loosely(IDS[name], kwargs, response) >= follows


def test_the_cases_show_each_constraint_followed_and_not() -> None:
    assert {(name, follows) for name, _, _, follows in CASES} == {(name, end) for name in IDS for end in (True, False)}


def test_constraints_are_another_group_with_other_names_and_numbers() -> None:
    assert len(HELD_OUT_INSTRUCTIONS) >= 10
    assert {each.group for each in HELD_OUT_INSTRUCTIONS.values()} == {"Held out"}
    assert [each.task for each in ALL_INSTRUCTIONS.values()] == list(range(1, len(ALL_INSTRUCTIONS) + 1))
    assert len({each.name for each in ALL_INSTRUCTIONS.values()}) == len(ALL_INSTRUCTIONS)
    assert INSTRUCTIONS.keys().isdisjoint(HELD_OUT_INSTRUCTIONS)


@pytest.mark.parametrize("id", HELD_OUT_INSTRUCTIONS)
def test_drawn_arguments_are_asked_for_and_nothing_empty_follows(id: str) -> None:
    for seed in range(20):
        kwargs = draw_arguments(id, random.Random(seed))
        assert kwargs == draw_arguments(id, random.Random(seed))
        text = render_instruction(id, kwargs)
        values = [each for value in kwargs.values() for each in (value if isinstance(value, list) else [value])]
        assert "{" not in text
        assert all(str(value) in text for value in values)
        assert not any(follows_loosely(id, kwargs, response) for response in ("", " \n"))


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("first letter", {"letter": "ab"}, "letter: got 'ab', allowed: a letter from a to z"),
        ("exact words", {"num_words": 0}, "num_words: got 0, allowed: a whole number"),
        ("word order", {"words": ["sun", "Sun"]}, "words: got .*allowed: a list of two different words"),
        ("word order", {"words": ["sun", "full moon"]}, "allowed: a list of two different words"),
    ],
)
def test_wrong_arguments_are_refused(name: str, kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        follows_strictly(IDS[name], kwargs, "red")
