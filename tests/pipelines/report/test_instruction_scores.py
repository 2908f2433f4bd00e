"""Scores are split by what the training text teaches, and the report shows quantities as numbers."""

from typing import Any

import pytest

from pipelines.data.easy_vqa import INSTRUCTIONS_WITH_IMAGES
from pipelines.report.instruction_scores import add_split_metrics, list_taught, split_by_teaching
from pipelines.report.scores import make_score_line
from redux.benchmarks import Metric, Outcome
from redux.benchmarks.instructions import ImageQuestion, build_questions, compute_metrics
from redux.held_out_instructions import HELD_OUT_INSTRUCTIONS
from redux.instructions import INSTRUCTIONS, follows_strictly

QUESTIONS = [ImageQuestion(id=f"q{number}", image=None, question="What is it?", answer="red") for number in range(8)]


def answer(*responses: str, **options: Any) -> list[dict[str, Any]]:
    made = build_questions(QUESTIONS, 8, **options)
    return [
        {"id": each.id, "unit": each.unit, "response": responses[place % len(responses)], **each.reference}
        for place, each in enumerate(made)
    ]


def job(**data: Any) -> dict[str, Any]:
    return {"train": {name: {"data": of_stage} for name, of_stage in data.items()}}


def test_a_job_teaches_what_its_sets_teach() -> None:
    assert list_taught(job(instruct="conversations")) == frozenset()
    assert list_taught(job(instruct={"conversations": 0.9, "shown": 0.1})) == set(INSTRUCTIONS_WITH_IMAGES)
    assert list_taught(job(pretrain="captions", instruct={"mine": 0.5, "formats": 0.5})) == set(INSTRUCTIONS)
    assert list_taught({"train": {}}) == list_taught({}) == frozenset()


def test_scores_are_split_into_taught_and_untaught_tasks() -> None:
    rows = answer("it is red", "RED", '{"a": 1}', "red, P.S. blue")
    metrics = {f"instructions.{name}": metric for name, metric in compute_metrics(rows).items()}
    held_out = compute_metrics(answer("it is red", instruction_ids=HELD_OUT_INSTRUCTIONS))
    metrics |= {f"instructions_held_out.{name}": metric for name, metric in held_out.items()}
    split = split_by_teaching(metrics, INSTRUCTIONS_WITH_IMAGES)
    assert set(split) == {
        f"instructions.{kind}_{part}" for kind in ("strict", "loose") for part in ("taught", "untaught")
    }
    for part, is_taught in (("taught", True), ("untaught", False)):
        verdicts = [
            follows_strictly(row["instruction_id"], row["kwargs"], row["response"])
            for row in rows
            if (row["instruction_id"] in INSTRUCTIONS_WITH_IMAGES) == is_taught
        ]
        expected = sum(verdicts) / len(verdicts)
        assert split[f"instructions.strict_{part}"].score == pytest.approx(expected)


def test_all_runs_are_split_alike() -> None:
    """A run that learned nothing of instructions has the same items as one that learned some."""
    metrics = {f"instructions.{name}": metric for name, metric in compute_metrics(answer("it is red")).items()}
    without, with_some = add_split_metrics([metrics, metrics], [job(a="conversations"), job(a={"shown": 1.0})])
    assert without == with_some
    assert {outcome.group for outcome in without["instructions.strict_taught"].outcomes} == {
        f"T{INSTRUCTIONS[id].task:02}" for id in INSTRUCTIONS_WITH_IMAGES
    }


def test_words_are_a_number_and_no_share() -> None:
    metric = compute_metrics(answer("red", "it is red"))["words"]
    line = make_score_line("words", metric, "strict")
    assert (line.title, line.is_share, line.maximum) == ("words per answer", False, 3)
    assert line.interval.value == pytest.approx(2)
    assert line.interval.low < 2 < line.interval.high
    equal = make_score_line("words", Metric([Outcome("a", str(unit), 1.0) for unit in range(5)]), "strict")
    assert not equal.is_share
    assert (equal.interval.low, equal.interval.high) == (1, 1)
