"""Properties of all benchmarks: scores, forms of answers, and errors that name file and place."""

import json
import math
from pathlib import Path
from typing import NamedTuple

import pytest

from pipelines.report.columns import BENCHMARK_COLUMNS
from redux.benchmark_titles import BENCHMARK_TITLES
from redux.benchmarks import BENCHMARKS, Metric, Outcome, Question, join_answers, mmbench, mme, textvqa
from redux.benchmarks.benchmark import compute_scores as benchmark_scores
from tests.redux.benchmarks.official_files import Write, asked_vqav2, mmbench_row, scored, scores, tsv


def test_a_metric_is_the_weighted_sum_of_the_means_of_groups() -> None:
    outcomes = [Outcome("a", "1", 1.0), Outcome("a", "2", 0.0), Outcome("b", "1", 0.25)]
    assert Metric(outcomes).score == 0.75
    assert Metric(outcomes, weight=100.0).score == 75
    assert Metric([]).score == 0


@pytest.mark.parametrize("metrics", [{}, {"accuracy": Metric([])}, {"accuracy": Metric([Outcome("", "1", math.nan)])}])
def test_what_was_not_scored_is_an_error(metrics: dict[str, Metric]) -> None:
    with pytest.raises(ValueError, match=r"^mine: got .*, allowed: "):
        benchmark_scores(metrics, "mine")


class Example(NamedTuple):
    """Questions of a benchmark with right answers.

    Args:
        questions: questions.
        answers: right answers by the id of the question; by default the references.
        score: the main metric with these answers.
        keys: keys of the id and the answer in the official form.
    """

    questions: list[Question]
    keys: tuple[str, str]
    answers: dict[str, str] | None = None
    score: float = 1

    def find_right_answers(self) -> dict[str, str]:
        return self.answers or {question.id: question.reference["answer"] for question in self.questions}


@pytest.fixture
def vqav2_example(write: Write) -> Example:
    questions = asked_vqav2(write, [["a"] * 5 + ["cat"] * 5, ["dog"] * 10, ["2"] * 10])
    return Example(questions, ("question_id", "answer"), {"10": "cat", "20": "dog", "30": "two"})


@pytest.fixture
def gqa_example(gqa: list[Question]) -> Example:
    return Example(gqa, ("questionId", "prediction"))


@pytest.fixture
def textvqa_example(textvqa_files: list[str]) -> Example:
    questions = textvqa.read_questions(*textvqa_files)[:2]
    return Example(questions, ("question_id", "answer"), {"34602": "dakota", "34603": "yes"})


@pytest.fixture
def mme_example(mme_folder: str) -> Example:
    return Example(mme.read_questions(mme_folder), ("question_id", "text"), score=600)


@pytest.fixture
def mmbench_example(write: Write) -> Example:
    rows = [mmbench_row(1, "B", "square", "circle"), mmbench_row(2, "A", "red", "blue", "green")]
    return Example(mmbench.read_questions(write("dev.tsv", tsv(rows))), ("index", "prediction"))


@pytest.fixture
def example(name: str, request: pytest.FixtureRequest) -> Example:
    """The example of a benchmark, of the fixture NAME_example."""
    return request.getfixturevalue(f"{name}_example")


def test_each_benchmark_has_a_title_and_a_column() -> None:
    assert BENCHMARKS.keys() == BENCHMARK_TITLES.keys()
    assert BENCHMARKS.keys() <= {column.source.partition(".")[0] for column in BENCHMARK_COLUMNS}


@pytest.mark.parametrize("name", BENCHMARKS)
def test_scrambled_answers_score_less_and_none_score_nothing(name: str, write: Write, example: Example) -> None:
    questions, right = example.questions, example.find_right_answers()
    best, missing = scored(name, questions, right)
    assert missing == 0
    # The main metric is the first, and that of the column in tables.
    main = next(iter(best))
    assert f"{name}.{main}" in {column.source for column in BENCHMARK_COLUMNS}
    assert best[main].score == example.score
    moved = dict(zip(right, [*list(right.values())[1:], "?"], strict=True))
    assert scores(name, questions, moved)[main] < best[main].score
    for empty in ("", "\n"):
        nothing = BENCHMARKS[name].read_answers(write("empty", empty), questions)
        metrics, missing = scored(name, questions, nothing)
        assert missing == len(questions)
        assert metrics.keys() == best.keys()
        assert {metric.score for metric in metrics.values()} == {0}


@pytest.mark.parametrize("name", BENCHMARKS)
def test_our_own_lines_and_the_official_form_say_the_same(name: str, write: Write, example: Example) -> None:
    questions, right = example.questions, example.find_right_answers()
    key, value = example.keys
    ours = write("answers.jsonl", lines=[{"id": i, "response": text, "unit": "x"} for i, text in right.items()])
    official = write("results.json", [{key: i, value: text} for i, text in right.items()])
    assert BENCHMARKS[name].read_answers(ours, questions) == right
    assert BENCHMARKS[name].read_answers(official, questions) == right


@pytest.mark.parametrize("name", BENCHMARKS)
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"id": "@", "response": "x"}\n\n{"id": ', r"answers: line 3: not JSON: .*, at character \d+"),
        ('{"id": "@", "response": "x"}\n{"id": "no", "response": "x"}', "answers: line 2: got an answer to 'no'"),
        ('{"id": "@", "response": "x"}\n{"id": "@", "response": "x"}', "answers: line 2: got a second answer"),
        ('{"id": "@", "reply": "x"}', "answers: line 1: got keys id, reply, allowed: .*id and response"),
        ('{"id": "@", "response": 3}', "answers: line 1: got response = '3', allowed: response, a text"),
        ('{"id": 1.5, "response": "x"}', "answers: line 1: got id = '1.5'"),
        ('[{"id": "@", "response": "x"}, 7]', "answers: item 2: got a int, allowed: an object"),
        ('[{"id": "@", "response": "x"},\n', "answers: line 2: not JSON"),
        ("what is this", "answers: line 1: got keys what is this, allowed: "),
        ("id,response\n@,x,y\n", "answers: not a table: .*Expected 2 columns, got 3"),
    ],
)  # fmt: skip
def test_a_bad_answer_is_named_with_file_and_place(
    name: str, content: str, message: str, write: Write, example: Example
) -> None:
    questions, right = example.questions, example.find_right_answers()
    path = write("answers", content.replace("@", next(iter(right))))
    with pytest.raises(ValueError, match=message) as caught:
        BENCHMARKS[name].read_answers(path, questions)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("vqav2", '{"questions": [', "line 1: not JSON"),
        ("vqav2", "3", "VQAv2: got .*, 0 of them with 'questions', allowed: one of questions"),
        ("vqav2", '{"data_subtype": "val2014", "questions": [{"question_id": 1}]}', "item 1: got keys question_id"),
        ("gqa", "[]", "got a list, allowed: an object of questions by id"),
        ("gqa", '{"201": {"question": "Is it?"}}', "question 201: got keys question, allowed: imageId, a text"),
        ("textvqa", '{"data": [{"image_id": "x", "question": 3}]}', "item 1: got question = '3', allowed: question"),
        ("textvqa", '{"data": [{"image_id": "x", "question": "y", "question_id": 1, "answers": [1]}]}', "1, answers 1"),
        ("mme", "Is it?\tYes\n", "got no questions, allowed: a folder with subtasks"),
        ("mmbench", "index\tquestion\tA\timage\nx\tq\ta\tAAAA\n", "row 1: got index 'x', allowed: a whole number"),
        ("mmbench", "index\tquestion\tA\timage\n1\tq\ta\t!!\n", "row 1: got image '!!'…, allowed: base64"),
        ("mmbench", "index\tquestion\tA\tanswer\timage\n1\tq\ta\tB\tAAAA\n", "row 1: got answer 'B', allowed: A"),
        ("mmbench", "index\tquestion\timage\n1\tq\tAAAA\n", "row 1: got no option"),
    ],
)  # fmt: skip
def test_a_bad_file_of_questions_is_named_with_the_place(name: str, content: str, message: str, write: Write) -> None:
    path = write("questions", content)
    with pytest.raises(ValueError, match=message) as caught:
        BENCHMARKS[name].read_questions(path)
    assert path in str(caught.value)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_file_that_is_not_there_is_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere"):
        BENCHMARKS[name].read_questions(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="nowhere"):
        BENCHMARKS[name].read_answers(str(tmp_path / "nowhere"), [])


@pytest.mark.parametrize("name", BENCHMARKS)
def test_rows_are_json_and_score_the_same_after_a_round_trip(name: str, write: Write, example: Example) -> None:
    questions, right = example.questions, example.find_right_answers()
    rows, _ = join_answers(questions, right)
    again = [json.loads(json.dumps(row)) for row in rows]
    assert BENCHMARKS[name].compute_metrics(again) == BENCHMARKS[name].compute_metrics(rows)
    assert len({question.id for question in questions}) == len(questions)


def test_an_answer_to_no_question_is_named() -> None:
    with pytest.raises(ValueError, match="got one to 'x'"):
        join_answers([], {"x": "y"})
