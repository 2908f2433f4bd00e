"""VQAv2: official files in, LLaVA's prompts and official scores out.

The reference follows the official scorer step by step. Its tables of words are the library's own, checked by examples.
"""

import random
from pathlib import Path
from typing import Any

import pytest

from redux.benchmarks import join_answers, vqav2
from redux.benchmarks.benchmark import SubmittedAnswer
from redux.benchmarks.vqa_text import (
    normalize_answer,
    normalize_as_evalai,
)
from tests.redux.benchmarks.official_files import (
    Write,
    asked_vqav2,
    official_evalai,
    official_text,
    scored,
    scores,
    texts,
)


def official_vqa(answer: str, people: list[str]) -> float:
    """vqaEval's accuracy: leave each person out in turn."""

    def one_line(text: str) -> str:
        return text.replace("\n", " ").replace("\t", " ").strip()

    given, answer = [one_line(person) for person in people], one_line(answer)
    if len(set(given)) > 1:
        given, answer = [official_text(person) for person in given], official_text(answer)
    shares = []
    for place in range(len(given)):
        others = given[:place] + given[place + 1 :]
        shares.append(min(1, len([other for other in others if other == answer]) / 3))
    return sum(shares) / len(shares)


@pytest.mark.parametrize(
    ("text", "official", "handed_in"),
    [
        ("The Dog.", "dog", "dog"),
        ("two", "2", "2"),
        ("dont", "don't", "don't"),
        ("none of them", "0 of them", "0 of them"),
        ("1,000", "1000", "1000"),
        ("yes, it is", "yes it is", "yes it is"),
        ("black-white", "black white", "black white"),
        ("black - white", "black white", "black white"),
        ("3.5", "3.5", "3.5"),
        ("man's hat", "man's hat", "man 's hat"),
        ("red,blue", "red blue", "redblue"),
        ("a", "", ""),
        ("." * 40, "." * 8, "." * 8),
    ],
)
def test_words_are_compared_in_the_official_form(text: str, official: str, handed_in: str) -> None:
    assert normalize_answer(text) == official
    assert normalize_as_evalai(text) == handed_in


def test_processors_equal_the_official_steps() -> None:
    for text in texts(0, 3000):
        assert normalize_answer(text) == official_text(text)
        assert normalize_as_evalai(text) == official_evalai(text)


def test_vqav2_asks_as_llava_does(write: Write) -> None:
    [question] = asked_vqav2(write, [["yes"] * 10])
    assert question.prompt == "What is 1?\nAnswer the question using a single word or phrase."
    assert (question.id, question.unit, question.image) == ("10", "1", "COCO_val2014_000000000001.jpg")
    [question] = asked_vqav2(write, [["yes"] * 10], split="test-dev2015")
    assert question.image == "COCO_test2015_000000000001.jpg"
    assert question.reference == {}
    assert scored("vqav2", [question], {"10": "yes"}) == ({}, 0)


@pytest.mark.parametrize(
    ("annotation", "said"),
    [
        ({"answers": ["yes"], "answer_type": "other"}, "item 1, answers: item 1: got a str, allowed: an object"),
        ({"answers": [{"answer": 1}], "answer_type": "other"}, "item 1, answers: item 1: got answer = '1'"),
        ({"answers": [], "answer_type": "other"}, "item 1: got no answers, allowed: those of ten people"),
        ({"answers": [{"answer": "yes"}]}, "item 1: got keys question_id, answers, allowed: answer_type, a text"),
        ({"question_id": 5, "answers": [{"answer": "yes"}], "answer_type": "other"}, "got question 10 without an ann"),
    ],
)
def test_a_bad_annotation_of_vqav2_is_named(write: Write, annotation: dict[str, Any], said: str) -> None:
    asked_vqav2(write, [["yes"]], split="test2015")
    annotations = write("annotations.json", {"annotations": [{"question_id": 10} | annotation]})
    with pytest.raises(ValueError, match=said):
        vqav2.read_questions(str(Path(annotations).with_name("questions.json")), annotations)


def test_vqav2_counts_people_who_agree(write: Write) -> None:
    """An answer of 2 people: 1/3 for each of them left out, 2/3 for the eight others; of 3: 2/3 and 1; of 4: 1."""
    people = ["red"] * 4 + ["blue"] * 3 + ["green"] * 2 + ["Gray"]
    questions = asked_vqav2(write, [people] * 5)
    answers = {"10": "Red.", "20": "blue", "30": "the green", "40": "gray", "50": "pink"}
    single = [1.0, (3 * 2 / 3 + 7) / 10, (2 / 3 + 8 * 2 / 3) / 10, 9 / 30, 0.0]
    assert scores("vqav2", questions, answers) == pytest.approx(
        {
            "accuracy": sum(single) / 5,
            "accuracy.other": (single[0] + single[2] + single[4]) / 3,
            "accuracy.yes/no": (single[1] + single[3]) / 2,
        }
    )


def test_vqav2_equals_the_official_scorer_on_responses_and_on_result_files(write: Write) -> None:
    rng, pool = random.Random(1), texts(1, 400)
    few = [rng.sample(pool, rng.randrange(1, 4)) for _ in range(400)]
    people = [rng.choices(group, k=10) for group in few]
    said = {str(10 * number): rng.choice([*group, rng.choice(pool)]) for number, group in enumerate(few, 1)}
    questions = asked_vqav2(write, people)
    as_responses = sum(map(official_vqa, map(official_evalai, said.values()), people)) / 400
    assert scores("vqav2", questions, said)["accuracy"] == pytest.approx(as_responses)
    official = write("results.json", [{"question_id": int(key), "answer": text} for key, text in said.items()])
    to_the_letter = sum(map(official_vqa, said.values(), people)) / 400
    assert scores("vqav2", questions, vqav2.read_answers(official, questions))["accuracy"] == pytest.approx(
        to_the_letter
    )
    assert to_the_letter != pytest.approx(as_responses)


def test_where_all_people_agree_only_a_response_is_converted() -> None:
    assert vqav2.official_accuracy("Yes.", ["yes"] * 10) == 1
    assert vqav2.official_accuracy(SubmittedAnswer("Yes."), ["yes"] * 10) == 0
    assert vqav2.official_accuracy(SubmittedAnswer("Yes."), ["yes"] * 9 + ["no"]) == 1


def test_a_submission_has_every_question_of_the_split_in_order(write: Write) -> None:
    questions = asked_vqav2(write, [["x"]] * 3, split="test2015")
    rows, missing = join_answers(questions, {"30": "Two dogs.", "10": "No"})
    assert missing == 1
    assert vqav2.build_submission(rows) == [
        {"question_id": 10, "answer": "no"},
        {"question_id": 20, "answer": ""},
        {"question_id": 30, "answer": "2 dogs"},
    ]
