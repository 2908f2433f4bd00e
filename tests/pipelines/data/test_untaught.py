"""No training text has a wording of the evaluation, of the sixteen instructions or of the held-out constraints."""

import random
import re
from collections.abc import Iterator
from functools import cache
from typing import Any

from pipelines.data.easy_vqa import EASY_VQA_SETS
from redux.held_out_instructions import HELD_OUT_INSTRUCTIONS
from redux.instructions import ALL_INSTRUCTIONS, draw_arguments

RUN = 5
"""Words in a row that make two wordings the same."""

MASKS: dict[type, Any] = {str: "…", list: ["…", "…"]}
"""Text in place of an argument that is a phrase or a list of words."""


def split_words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def list_runs(text: str) -> set[tuple[str, ...]]:
    words = split_words(text)
    return {tuple(words[start : start + RUN]) for start in range(len(words) - RUN + 1)}


@cache
def read_training_texts() -> tuple[str, ...]:
    """All different texts of all training sets of easy-VQA."""
    texts = {turn["value"] for make in EASY_VQA_SETS.values() for record in make() for turn in record["conversations"]}
    return tuple(sorted(texts))


def list_test_wordings() -> Iterator[tuple[str, set[tuple[str, ...]]]]:
    """Word runs of each instruction, as prompts have them but for phrases that are arguments: a set may teach those."""
    for id, instruction in ALL_INSTRUCTIONS.items():
        runs = set[tuple[str, ...]]()
        for seed in range(50):
            kwargs = draw_arguments(id, random.Random(seed))
            masked = {name: MASKS.get(type(value), value) for name, value in kwargs.items()}
            if "relation" in kwargs:
                masked["relation"] = kwargs["relation"]
            runs |= list_runs(instruction.text.format(**masked))
        yield id, runs


def test_no_wording_of_the_evaluation_is_in_a_training_text() -> None:
    trained = {run for text in read_training_texts() for run in list_runs(text)}
    assert len(trained) > 1000
    for id, runs in list_test_wordings():
        assert not runs & trained, f"{id}: {RUN} words in a row are in a training text"


def test_held_out_constraints_share_no_wording_with_the_sixteen() -> None:
    wordings = dict(list_test_wordings())
    for id in HELD_OUT_INSTRUCTIONS:
        for other in ALL_INSTRUCTIONS.keys() - {id}:
            assert not wordings[id] & wordings[other]
