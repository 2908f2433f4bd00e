"""GQA: official files in, LLaVA's prompts and official scores out."""

from redux.benchmarks import Question
from tests.redux.benchmarks.official_files import scores


def test_gqa_asks_as_llava_does(gqa: list[Question]) -> None:
    assert gqa[0].prompt == "Is it overcast?\nAnswer the question using a single word or phrase."
    assert (gqa[0].id, gqa[0].image, gqa[0].unit) == ("201", "n161313.jpg", "n161313")


def test_gqa_counts_equal_words_over_balanced_questions(gqa: list[Question]) -> None:
    answers = {"201": "No.", "202": "Woman", "203": " red", "204": "a table", "205": "table"}
    assert scores("gqa", gqa, answers) == {
        "accuracy": 2 / 4,
        "binary": 1 / 2,
        "structural.verify": 1,
        "semantic.global": 1,
        "open": 1 / 2,
        "structural.query": 1 / 2,
        "semantic.rel": 1,
        "structural.choose": 0,
        "semantic.attr": 0,
        "semantic.obj": 0,
    }
