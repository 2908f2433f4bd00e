"""`redux score`: one line of JSON on standard output, or one line with the mistake."""

import importlib.util
import json
from pathlib import Path

import pytest

from jobs import command
from redux.benchmarks import BENCHMARKS


@pytest.fixture
def gqa(tmp_path: Path) -> Path:
    questions = {
        str(number): {"question": "Is it?", "imageId": f"n{number}", "answer": "yes", "isBalanced": True}
        for number in range(4)
    }
    path = tmp_path / "questions.json"
    path.write_text(json.dumps(questions))
    return path


def test_scores_are_one_line_of_json(gqa: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answers = tmp_path / "answers.json"
    answers.write_text(json.dumps([{"questionId": "0", "prediction": "yes"}, {"questionId": "2", "prediction": "no"}]))
    assert command.main(["score", "gqa", "--answers", str(answers), "--questions", str(gqa)]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert printed.out.count("\n") == 1
    assert json.loads(printed.out) == {"task": "gqa", "scores": {"accuracy": 0.25}, "questions": 4, "missing": 2}


def test_a_submission_is_written_for_every_question(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    questions, answers, out = (tmp_path / name for name in ("questions.json", "answers.jsonl", "out.json"))
    entries = [{"image_id": 1, "question": "Is it?", "question_id": number} for number in (10, 11)]
    questions.write_text(json.dumps({"data_subtype": "test2015", "questions": entries}))
    answers.write_text('{"question_id": 11, "text": "The Cat.", "prompt": "Is it?"}\n')
    words = ["score", "vqav2", "--answers", str(answers), "--questions", str(questions), "--submission", str(out)]
    assert command.main(words) == 0
    assert json.loads(out.read_text()) == [{"question_id": 10, "answer": ""}, {"question_id": 11, "answer": "cat"}]
    assert json.loads(capsys.readouterr().out) == {"task": "vqav2", "scores": {}, "questions": 2, "missing": 1}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["vqav3", "--questions", "@"], f"redux: TASK: got vqav3, allowed: {', '.join(BENCHMARKS)}, instructions"),
        (["gqa"], "redux: --questions: got none, allowed: the official files of GQA"),
        (["gqa", "--questions", "@", "@"], "redux: questions: got "),
        (["gqa", "--questions", "@", "--submission", "x"], "redux: --submission: got task gqa, allowed: vqav2"),
        (["instructions", "--submission", "x"], "redux: --submission: got task instructions, allowed: vqav2"),
        (["gqa", "--questions", "@"], "answers: line 1: got an answer to '9', allowed: ids of the 4 questions"),
    ],
    ids=str,
)
def test_a_mistake_is_one_line_and_exit_2(
    words: list[str], message: str, gqa: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = tmp_path / "answers"
    answers.write_text('{"id": "9", "response": "yes"}\n')
    given = [str(gqa) if word == "@" else word for word in words]
    assert command.main(["score", *given, "--answers", str(answers)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert message in printed.err
    assert printed.err.count("\n") == 1


def test_own_questions_are_scored_by_a_metric(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    questions, answers = tmp_path / "my.jsonl", tmp_path / "answers.jsonl"
    entries = [
        {"question": "Which colour?", "answer": "red", "type": "colour"},
        {"question": "Which shape?", "answer": "a circle", "type": "shape", "id": "s"},
        {"question": "Which shape?", "answer": "a circle", "type": "shape"},
    ]
    questions.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    answers.write_text('{"id": 1, "response": "It is red."}\n{"id": "s", "response": "a square"}\n')
    words = ["score", "--metric", "contains", "--questions", str(questions), "--answers", str(answers)]
    assert command.main(words) == 0
    assert json.loads(capsys.readouterr().out) == {
        "metric": "contains",
        "scores": {"accuracy": 1 / 3, "accuracy.colour": 1.0, "accuracy.shape": 0.0},
        "questions": 3,
        "missing": 1,
    }
    for words, message in (
        (["--questions", str(questions)], "TASK: got none, allowed: vqav2"),
        (["gqa", "--metric", "exact"], "--metric: got exact besides TASK or --submission, allowed: --metric alone"),
        (["--metric", "exact"], "--questions: got none or several files, allowed with --metric: one"),
        (["--metric", "choice", "--questions", str(questions)], "my.jsonl: line 1: got 0 options"),
    ):
        assert command.main(["score", *words, "--answers", str(answers)]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("task", ["gqa", "instructions"])
@pytest.mark.parametrize("text", ["", "\n", "[]"])
def test_no_answer_is_a_mistake(
    task: str, text: str, gqa: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (answers := tmp_path / "answers").write_text(text)
    assert command.main(["score", task, "--answers", str(answers), "--questions", str(gqa)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert str(answers) in printed.err
    assert printed.err.count("\n") == 1


def test_questions_without_reference_answers_are_a_mistake(
    gqa: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    questions = json.loads(gqa.read_text())
    for question in questions.values():
        del question["answer"]
    gqa.write_text(json.dumps(questions))
    (answers := tmp_path / "answers.json").write_text(json.dumps([{"questionId": "0", "prediction": "yes"}]))
    assert command.main(["score", "gqa", "--answers", str(answers), "--questions", str(gqa)]) == 2
    assert "--questions: got no question with a reference answer" in capsys.readouterr().err


@pytest.mark.skipif(
    importlib.util.find_spec("redux.benchmarks.instructions") is None, reason="the instructions are not there"
)
def test_instructions_are_scored_line_by_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answers = tmp_path / "answers.jsonl"
    responses = ["no commas here", "commas, here"]
    answers.write_text(
        "".join(
            json.dumps({"instruction_id": "punctuation:no_comma", "kwargs": {}, "response": response}) + "\n"
            for response in responses
        )
    )
    assert command.main(["score", "instructions", "--answers", str(answers)]) == 0
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == [
        {"strict": True, "loose": True},
        {"strict": False, "loose": False},
    ]
