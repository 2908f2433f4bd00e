"""Tests of questions of users: files are read or refused by line and field, and metrics equal slow references."""

import json
import random
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from redux.benchmarks import vqav2
from redux.benchmarks.benchmark import Row
from redux.benchmarks.custom import (
    AnswerMetric,
    compute_metrics,
    read_answers,
    read_questions,
    score_response,
)

Write = Callable[..., Path]

RED = {"image": "1.png", "question": "Which colour?", "answer": "red"}


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write entries as JSON lines, or a text as it is; returns the file."""

    def write(*entries: dict[str, Any], text: str | None = None) -> Path:
        path = tmp_path / "my.jsonl"
        lines = "".join(json.dumps(entry) + "\n" for entry in entries) if text is None else text
        path.write_bytes(lines.encode("utf-8", "surrogatepass"))
        return path

    return write


def score(metric: str, response: str | None, *answers: str, options: dict[str, str] | None = None) -> float:
    row: dict[str, Any] = {"response": response, "answers": list(answers), "metric": metric, "unit": "1", "type": "all"}
    return score_response(row | ({"options": options} if options else {}))


# Reading.


def test_lines_a_list_windows_line_ends_and_a_byte_order_mark_read_equally(write: Write) -> None:
    entries = [RED, {"question": "Wie heißt das?", "answers": ["Käse", "チーズ"], "id": "b", "type": "Wörter"}]
    lines = [json.dumps(entry, ensure_ascii=False) for entry in entries]
    expected = read_questions(write(*entries), "exact")
    assert [question.prompt for question in expected] == ["Which colour?", "Wie heißt das?"]
    for text in (
        "\r\n".join(lines) + "\r\n",
        "\ufeff" + "\n".join(lines),
        "\n\n" + "\n \n".join(lines) + "\n\n",
        json.dumps(entries),
        "\ufeff" + json.dumps(entries, indent=2, ensure_ascii=False).replace("\n", "\r\n"),
    ):
        assert read_questions(write(text=text), "exact") == expected


def test_fields_that_are_missing_or_null_have_defaults(write: Write) -> None:
    bare = {"question": "What is 1 + 1?", "answer": "2"}
    expected = {"image": None, "answers": ["2"], "type": "all", "metric": "exact"}
    for entry in (bare, {**bare, "image": None, "id": None, "type": None, "answers": None}, {**bare, "type": ""}):
        [question] = read_questions(write(entry), "exact")
        assert (question.id, question.unit, question.image, question.reference) == ("1", "1", None, expected)
    [seen] = read_questions(write({**RED, "id": "x"}), "exact")
    assert (seen.unit, seen.image) == ("1.png", "1.png"), "questions about an image are resampled together"


def test_numbers_are_texts_as_in_the_file(write: Write) -> None:
    text = '{"id": 7, "question": "How many?", "answers": [3, 0.50, -1e3, "three"], "type": 2}'
    [question] = read_questions(write(text=text), "exact")
    assert (question.id, question.reference["type"]) == ("7", "2")
    assert question.reference["answers"] == ["3", "0.5", "-1000.0", "three"]
    [single] = read_questions(write({"question": "How many?", "answer": 3}), "contains")
    assert single.reference["answers"] == ["3"]


def test_the_first_question_of_a_llava_record_counts(write: Write) -> None:
    turns = [("human", "<image>\nWhat is it?"), ("gpt", "A dog."), ("human", "Sure?"), ("gpt", "Yes.")]
    record = {
        "id": "000/1",
        "image": "a/b.jpg",
        "conversations": [{"from": role, "value": text} for role, text in turns],
    }
    [question] = read_questions(write(record), "contains")
    assert (question.id, question.image, question.prompt) == ("000/1", "a/b.jpg", "What is it?")
    assert question.reference["answers"] == ["A dog."]


def test_the_prompt_is_the_question_as_it_is_written(write: Write) -> None:
    prompt = "  Look:\nA. red\nB. blue \u2028 Answer with a letter. "
    [question] = read_questions(write({"question": prompt, "answer": "B"}), "choice")
    assert question.prompt == prompt


@pytest.mark.parametrize(
    ("entry", "metric", "message"),
    [
        ({"answer": "red"}, "exact", "got keys answer, allowed: question, a text"),
        ({"question": 3, "answer": "red"}, "exact", "got question = '3', allowed: question, a text"),
        ({"question": " \n", "answer": "red"}, "exact", "allowed: a text without <image>"),
        ({"question": "<image>\nWhat?", "answer": "red"}, "exact", "allowed: a text without <image>"),
        ({"question": "What?"}, "exact", "got keys question, allowed: answer, a text"),
        ({"question": "What?", "answer": ""}, "exact", "got answer [''], allowed: at least one, none of them empty"),
        ({"question": "What?", "answers": []}, "exact", "got answers [], allowed: at least one"),
        ({"question": "What?", "answers": ["a", " "]}, "exact", "none of them empty"),
        ({"question": "What?", "answer": True}, "exact", "got answer = 'True', allowed: answer, a text or a number"),
        ({"question": "What?", "answers": [{"answer": "a"}]}, "exact", "allowed: answers, a text or a number"),
        ({"question": "What?", "answer": float("nan")}, "exact", "got answer = 'nan', allowed: answer, a text or"),
        ({"question": "What?", "answer": "\ud800"}, "exact", "got answer = '\\ud800', allowed: valid Unicode"),
        ({"question": "\ud800?", "answer": "a"}, "exact", "got question = '\\ud800?', allowed: valid Unicode"),
        ({**RED, "image": 3}, "exact", "got image = '3', allowed: image, a text"),
        ({**RED, "image": ["1.png"]}, "exact", "allowed: image, a text"),
        ({**RED, "id": 1.5}, "exact", "got id = '1.5', allowed: id, a text"),
        ({**RED, "type": ["a"]}, "exact", "allowed: type, a text or a number"),
        ({**RED, "answers": ["a", "b", "c"]}, "vqa", "got 3 answers, allowed with metric vqa: at least 4"),
        (RED, "choice", "got 0 options, allowed with metric choice: at least two"),
        ({**RED, "options": ["red"]}, "choice", "got 1 options ['A'], allowed with metric choice: at least two"),
        ({**RED, "options": {"1": "red", "2": "blue"}}, "choice", "got 2 options ['1', '2'], allowed"),
        ({**RED, "options": "red, blue"}, "choice", "allowed: options, a list"),
        ({**RED, "options": ["blue", "green"]}, "choice", "got answer 'red', allowed: A, B, or the text of one option"),
        ({**RED, "options": ["red", "Red "]}, "choice", "got answer 'red', allowed: A, B, or the text of one option"),
        ({"conversations": []}, "exact", "got conversations of 0 turns, allowed: a question and its answer"),
        (
            {"conversations": [{"from": "gpt", "value": "a"}, {"from": "human", "value": "b"}]},
            "exact",
            "got turns from 'gpt' and 'human', allowed: human, then gpt",
        ),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt"}]}, "exact", "allowed: value, a text"),
    ],
    ids=str,
)
def test_an_error_names_file_line_and_field(
    write: Write, entry: dict[str, Any], metric: AnswerMetric, message: str
) -> None:
    good = {"question": "Q: right?\nA. red\nB. blue", "answers": ["A"] * 4}
    path = write(good, entry)
    with pytest.raises(ValueError, match="line 2") as error:
        read_questions(path, metric)
    assert str(error.value).startswith(f"{path}: line 2")
    assert message in str(error.value)
    path = write(text=json.dumps([good, entry]))
    with pytest.raises(ValueError, match="item 2") as error:
        read_questions(path, metric)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"question": "a"', "line 1: not JSON"),
        (json.dumps(RED) + "\n[1]\n", "line 2: got a list, allowed: an object"),
        ("[1]", "item 1: got a int, allowed: an object"),
        ('[{"question": "a",\n "answer": "b"},\n oops]', "line 3: not JSON"),
        ("question,answer\nwhat,red\n", "line 1: not JSON"),
    ],
)
def test_a_file_of_another_form_is_refused_by_line(write: Write, text: str, message: str) -> None:
    path = write(text=text)
    with pytest.raises(ValueError, match=r"allowed|not JSON") as error:
        read_questions(path, "exact")
    assert str(error.value).startswith(f"{path}: {message}")


def test_a_missing_file_and_another_encoding_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere\.jsonl: cannot be read"):
        read_questions(tmp_path / "nowhere.jsonl", "exact")
    (tmp_path / "wide.jsonl").write_text(json.dumps(RED), encoding="utf-16")
    with pytest.raises(ValueError, match=r"wide\.jsonl: cannot be read.*UTF-8"):
        read_questions(tmp_path / "wide.jsonl", "exact")


def test_an_id_that_comes_twice_is_named_with_both_lines(write: Write) -> None:
    with pytest.raises(ValueError, match=r"line 3: got id 'x', which line 1 has, allowed: each once$"):
        read_questions(write({**RED, "id": "x"}, RED, {**RED, "id": "x"}), "exact")
    # The second entry has no id, so its id is 2.
    with pytest.raises(ValueError, match=r"got id '2', which line 1 has.*an entry without id has its number"):
        read_questions(write({**RED, "id": 2}, RED), "exact")


def test_options_are_read_by_letter_as_a_list_or_from_lines_of_the_question(write: Write) -> None:
    expected = {"A": "red", "B": "blue sky", "C": "3"}
    lines = "Q: Which?\nA: it is far\n"
    for entry in (
        {"question": "Which?", "options": ["red", "blue sky", 3]},
        {"question": "Which?", "options": {"a": "red", "b": "blue sky", "c": 3}},
        {"question": "Q: Which?\nA. red\n B. blue sky \nC. 3\nAnswer with a letter."},
        {"question": "Which?\n(A) red\n(B) blue sky\n(C) 3\nE. no option, since D is missing"},
        {"question": "Which?\r\nA) red\r\nB) blue sky\r\nC) 3"},
    ):
        for answer in ("B", "(b)", "B.", "Blue  sky"):
            [question] = read_questions(write({**entry, "answer": answer}), "choice")
            assert (question.reference["options"], question.reference["answers"]) == (expected, ["B"]), entry
    with pytest.raises(ValueError, match="got 1 options"):
        read_questions(write({"question": lines, "answer": "A"}), "choice")


def test_answers_of_another_system_are_read_by_id(write: Write, tmp_path: Path) -> None:
    questions = read_questions(write({**RED, "id": 5}, RED), "exact")
    path = tmp_path / "answers"
    for lines in (
        '{"id": 5, "response": "red"}\n{"id": "2", "response": "blue", "prompt": "x"}',
        '[{"question_id": "5", "text": "red"}, {"question_id": 2, "text": "blue"}]',
        "id,response\n5,red\n2,blue\n",
    ):
        path.write_text(lines)
        assert read_answers(path, questions) == {"5": "red", "2": "blue"}
    path.write_text('{"id": 9, "response": "red"}')
    with pytest.raises(ValueError, match="got an answer to '9', allowed: ids of the 2 questions"):
        read_answers(path, questions)


# Metrics.


def test_accuracy_counts_a_type_only_if_there_are_several() -> None:
    def make_row(type: str, response: str | None) -> Row:
        return {"unit": "1", "type": type, "answers": ["a"], "metric": "exact", "response": response}

    rows = [make_row("x", "a"), make_row("x", "b"), make_row("y", "a"), make_row("all", None)]
    assert {name: metric.score for name, metric in compute_metrics(rows).items()} == {
        "accuracy": 0.5,
        "accuracy.x": 0.5,
        "accuracy.y": 1.0,
    }
    assert compute_metrics(rows[:2]).keys() == {"accuracy"}


@pytest.mark.parametrize("metric", ["exact", "contains", "vqa", "anls", "choice"])
def test_a_missing_or_empty_response_is_wrong(metric: str) -> None:
    for response in (None, "", " ", "."):
        assert score(metric, response, *["red"] * 4 if metric != "choice" else "A", options={"A": "x", "B": "y"}) == 0


@pytest.mark.parametrize(
    ("response", "answer", "expected"),
    [
        ("red", "red", 1), ("  Red.\n", "red", 1), ('"RED"', "red", 1), ("red", "Red!", 1), ("dark red", "red", 0),
        ("dark  red", "dark red", 1), ("reddish", "red", 0), ("Straße", "STRASSE", 1), ("Cafe\u0301", "Café", 1),
        ("3", "３", 1), ("?", "?", 1), ("", "?", 0), ("3.5", "3.50", 0), ("c++", "C++", 1), ("红色。", "红色", 0),
    ],
)  # fmt: skip
def test_exact_ignores_case_blanks_and_marks_around_the_answer(response: str, answer: str, expected: int) -> None:
    assert score("exact", response, answer) == expected
    assert score("exact", response, "other", answer) == expected


@pytest.mark.parametrize(
    ("response", "answer", "expected"),
    [
        ("It is RED.", "red", 1), ("reddish", "red", 0), ("infrared", "red", 0), ("a red-hot rod", "red", 1),
        ("a dark\nred circle", "dark red", 1), ("C++ is used", "c++", 1), ("the naïve one", "naïve", 1),
        ("there are 5 of 12", "5", 1), ("3.5", "5", 0), ("3.5", "3.5", 1), ("1,500", "500", 0), ("1,500", "1,500", 1),
        ("it is -5", "5", 0), ("-5", "5", 0), ("it is -5.", "-5", 1), ("between 3-5", "5", 1), ("15", "5", 0),
        ("it is 5.", "5", 1), ("5, maybe 6", "5", 1), ("12:05", "12", 1), ("5kg", "5", 0),
        ("Yes, there is no doubt", "no", 0), ("No. Yes would be wrong", "no", 1), ("unknown", "no", 0),
        ("这是红色的", "红色", 1), ("iPhone是", "iphone", 1), ("どの色？赤です", "赤", 1), ("สีแดงเข้ม", "แดง", 1),
        ("빨간색", "색", 1), ("красная", "красна", 0), ("really?", "?", 1),
    ],
)  # fmt: skip
def test_contains_finds_whole_words_and_numbers(response: str, answer: str, expected: int) -> None:
    assert score("contains", response, answer) == expected


def test_contains_equals_a_search_over_lists_of_words() -> None:
    """Texts of plain words: a slow reference compares every run of words."""
    rng = random.Random(0)
    words = ["red", "re", "dark", "circle", "no", "not", "12", "1"]
    for _ in range(2000):
        response, answer = ([rng.choice(words) for _ in range(rng.randint(1, size))] for size in (6, 2))
        if answer in (["no"], ["yes"]):
            continue
        runs = [response[start : start + len(answer)] for start in range(len(response))]
        text = rng.choice([" ", "  ", "\n"]).join(response)
        assert score("contains", text.upper() + ".", " ".join(answer)) == float(answer in runs), (response, answer)


def test_vqa_is_the_official_accuracy() -> None:
    rng = random.Random(0)
    words = ["yes", "Yes", "two", "2", "a dog", "dog.", "it's", "1,000"]
    values = set()
    for _ in range(500):
        people = [rng.choice(words) for _ in range(10)]
        row = {"unit": "1", "answers": people, "answer_type": "other", "response": rng.choice(words)}
        official = vqav2.compute_metrics([row])["accuracy"].score
        assert score("vqa", row["response"], *people) == official
        values.add(round(official, 3))
    assert len(values) > 4
    assert score("vqa", "dog", *["dog"] * 4) == 1.0


def anls(response: str, answers: tuple[str, ...]) -> float:
    """Compute eq. 1 of Biten et al. for one question: 1 - NL if NL < 0.5, else 0; the best over the answers."""

    @cache
    def distance(first: str, second: str) -> int:
        if not first or not second:
            return len(first) + len(second)
        return min(
            distance(first[1:], second) + 1,
            distance(first, second[1:]) + 1,
            distance(first[1:], second[1:]) + (first[0] != second[0]),
        )

    normalized = [distance(response, answer) / max(len(response), len(answer)) for answer in answers]
    return max(1 - nl if nl < 0.5 else 0.0 for nl in normalized)


def test_anls_equals_its_definition() -> None:
    rng = random.Random(0)
    values = set()
    for _ in range(1500):
        response = "".join(rng.choice("ab c1") for _ in range(rng.randint(1, 9))).strip() or "a"
        answers = tuple("".join(rng.choice("abc1") for _ in range(rng.randint(1, 9))) for _ in range(rng.randint(1, 3)))
        flat = " ".join(response.split())
        expected = anls(flat, answers)
        assert score("anls", f" {response.upper()} ", *answers) == pytest.approx(expected)
        values.add(round(expected, 3))
    assert len(values) > 8
    # Values from the definition, by hand.
    assert score("anls", "0.50 mg", "0.5 mg") == pytest.approx(1 - 1 / 7)
    assert score("anls", "ab", "ac") == 0.0, "NL = 0.5 is not below the threshold"
    assert score("anls", "A  B", "a b") == 1.0


COLOURS = {"A": "red", "B": "dark red", "C": "blue", "D": "a green square"}


@pytest.mark.parametrize(
    ("response", "letter"),
    [
        ("B", "B"), ("b", "B"), ("(B)", "B"), ("(b)", "B"), ("B.", "B"), ("b)", "B"), ("**B**", "B"), ("[B]", "B"),
        ('"B"', "B"), ("B. dark red", "B"), ("B: dark red", "B"), ("(B) dark red", "B"), ("B) dark red", "B"),
        ("**B.** dark red", "B"), ("B dark red", "B"), ("B\ndark red", "B"), (" B\n", "B"), ("B.dark red", "B"),
        ("The answer is B.", "B"), ("The answer is (B) dark red.", "B"), ("Answer: B", "B"), ("answer: (B)", "B"),
        ("The correct answer is **B**", "B"), ("Option B", "B"), ("Option B is right, as all of it is dark.", "B"),
        ("B, because A is much too bright for the shade that is shown here.", "B"),
        ("B is wrong. The answer is C.", "C"), ("A", "A"), ("a", "A"), ("A. red", "A"), ("The answer is A", "A"),
        ("red", "A"), ("Red.", "A"), ("dark red", "B"), ("Dark Red!", "B"), ("It is blue.", "C"),
        ("A green square", "D"), ("a green square", "D"), ("The answer is a green square.", "D"),
        ("A blue one", "C"), ("E", None), ("Z", None), ("I do not know", None), ("A or B", None), ("green", None),
        ("", None),
    ],
)  # fmt: skip
def test_choice_reads_the_forms_of_answers_that_models_give(response: str, letter: str | None) -> None:
    for answer in COLOURS:
        assert score("choice", response, answer, options=COLOURS) == float(answer == letter)
