"""Prompts are made of questions in all forms; other lines are named."""

import json
from pathlib import Path

import pytest

from jobs import command
from redux.benchmarks.instructions import read_questions


def test_questions_in_llavas_form_become_sixteen_prompts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    questions, out = tmp_path / "mm-vet.jsonl", tmp_path / "prompts.jsonl"
    lines = [{"question_id": f"v1_{n}", "image": f"v1_{n}.png", "text": f"What is {n}?"} for n in range(5)]
    questions.write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ["instructions", str(questions), "--out", str(out), "--per-task", "3"]
    assert command.main(words) == 0
    assert "48 prompts" in capsys.readouterr().out
    prompts = read_questions(out)
    assert len({prompt.id for prompt in prompts}) == 48
    assert len({prompt.unit for prompt in prompts}) == 3
    assert all(prompt.prompt.startswith(f"What is {str(prompt.image)[3]}? ") for prompt in prompts)
    prompts_file = out.read_bytes()
    assert command.main(words) == 0
    assert out.read_bytes() == prompts_file
    assert command.main([*words, "--seed", "1"]) == 0
    assert out.read_bytes() != prompts_file


def test_without_a_file_prompts_are_about_easy_vqa(tmp_path: Path) -> None:
    assert command.main(["instructions", "--out", str(tmp_path / "prompts.jsonl")]) == 0
    prompts = read_questions(tmp_path / "prompts.jsonl")
    assert len(prompts) == 16 * 218
    assert all(prompt.reference["answer"] for prompt in prompts)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"question_id": 1, "text": "what?"}', "line 1: got keys question_id, text, allowed: image, a text"),
        ('{"question": "what?"}', "line 1: got keys question, allowed: question_id and text"),
        ("", "FILE: got no question in "),
    ],
)
def test_a_line_that_is_no_question_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str, message: str
) -> None:
    (tmp_path / "asked.jsonl").write_text(line)
    assert command.main(["instructions", str(tmp_path / "asked.jsonl"), "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
