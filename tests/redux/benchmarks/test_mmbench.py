"""MMBench: official files in, LLaVA's prompts and official scores out."""

import io

import pytest
from PIL import Image

from redux.benchmarks import mmbench
from tests.redux.benchmarks.official_files import Write, mmbench_row, scores, tsv


def test_mmbench_asks_as_llava_does(write: Write) -> None:
    rows = [
        mmbench_row(1, "B", "square", "circle", hint='A "hint"\nof two lines'),
        mmbench_row(1_000_001, "A", "circle", "square", hint="nan"),
    ]
    first, second = mmbench.read_questions(write("dev.tsv", tsv(rows)))
    assert first.prompt == (
        'A "hint"\nof two lines\nwhat is 1?\nA. square\nB. circle\n'
        "Answer with the option's letter from the given choices directly."
    )
    assert second.prompt == (
        "what is 1?\nA. circle\nB. square\nAnswer with the option's letter from the given choices directly."
    )
    assert (first.id, second.id) == ("1", "1000001")
    assert first.unit == second.unit
    assert isinstance(first.image, bytes)
    assert Image.open(io.BytesIO(first.image)).size == (4, 4)


def test_mmbench_rotations_are_made_where_the_file_has_none(write: Write) -> None:
    questions = mmbench.read_questions(write("dev.tsv", tsv([mmbench_row(7, "C", "x", "y", "z")])))
    assert [question.id for question in questions] == ["7", "1000007", "2000007"]
    assert [list(question.reference["options"].values()) for question in questions] == [[*"xyz"], [*"yzx"], [*"zxy"]]
    for question in questions:
        assert question.reference["options"][question.reference["answer"]] == "z"
        for letter, option in question.reference["options"].items():
            assert f"\n{letter}. {option}\n" in question.prompt
    lines = [{"question_id": 7, "round_id": turn, "text": "BAC"[turn]} for turn in range(3)]
    assert mmbench.read_answers(write("llava.jsonl", lines=lines), questions) == {
        "7": "B",
        "1000007": "A",
        "2000007": "C",
    }


def test_mmbench_counts_a_question_only_if_all_its_rotations_are_right(write: Write) -> None:
    rows = [
        mmbench_row(1, "B", "square", "circle"),
        mmbench_row(1_000_001, "A", "circle", "square"),
        mmbench_row(2, "A", "red", "blue", **{"category": "color"}),
        mmbench_row(1_000_002, "B", "blue", "red", **{"category": "color"}),
    ]
    questions = mmbench.read_questions(write("dev.tsv", tsv(rows)))
    answers = {"1": "B", "1000001": "(A) circle", "2": "A", "1000002": "A"}
    assert scores("mmbench", questions, answers) == {
        "accuracy": 0.5,
        "l2-category.perception": 0.5,
        "category.ocr": 1.0,
        "category.color": 0.0,
    }
    assert scores("mmbench", questions, answers | {"1000002": "B"})["accuracy"] == 1


@pytest.mark.parametrize(
    ("response", "letter"),
    [
        ("B", "B"),
        ("b", None),
        ("B.", "B"),
        ("(B) a cat", "B"),
        ("The answer is: B", "B"),
        ("A or B", None),
        ("A cat sits on the red mat", None),  # The letter is too far from the end, and two options are quoted
        ("it is Red", "C"),
        ("Z", None),
        ("a cat, a dog", None),
        ("Sorry, I can't help with images of people yet. B", None),
        ("red " * 20, None),
        ("", None),
        (None, None),
    ],
)
def test_letters_are_read_by_the_official_rules(response: str | None, letter: str | None) -> None:
    assert mmbench.read_letter(response, {"A": "a dog", "B": "a cat", "C": "red", "D": "3"}) == letter


@pytest.mark.parametrize("separator", [",", "\t"])
def test_mmbench_reads_tables_of_predictions(write: Write, separator: str) -> None:
    questions = mmbench.read_questions(write("dev.tsv", tsv([mmbench_row(1, "B", "x", "y")])))
    table = separator.join(("index", "question", "prediction")) + "\n"
    table += separator.join(("1", '"a ""b"",\nc"', "B")) + "\n" + separator.join(("1000001", "d", "A")) + "\n"
    assert mmbench.read_answers(write("predictions", table), questions) == {"1": "B", "1000001": "A"}
