"""The same questions go with all sixteen instructions, stay as they were drawn, and are scored row by row."""

import json
import random
import re
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from redux.attention_mass import AttentionMass
from redux.benchmarks import Question
from redux.benchmarks.instructions import (
    REFERENCE_FIELDS,
    ImageQuestion,
    build_pair_questions,
    build_questions,
    compute_metrics,
    contains_answer,
    pair_arguments,
    read_questions,
    score_lines,
    select_tasks,
    without_images,
    write_questions,
)
from redux.held_out_instructions import HELD_OUT_INSTRUCTIONS
from redux.instructions import INSTRUCTION_PAIRS, INSTRUCTIONS, follows_loosely, follows_strictly, render_instruction

ASKED = [
    ImageQuestion(
        id=f"q{number}", image=f"{number // 2}.png", question=f"What is {number}?", answer=("red", None)[number % 2]
    )
    for number in range(12)
]


def rows(asked: list[Question], *responses: str) -> list[dict[str, Any]]:
    """The questions answered with the responses by turns."""
    return [
        {"id": q.id, "unit": q.unit, "prompt": q.prompt, "response": responses[place % len(responses)], **q.reference}
        for place, q in enumerate(asked)
    ]


def test_each_task_has_the_same_questions() -> None:
    made = build_questions(ASKED, per_task=5)
    assert len(made) == 16 * 5
    assert len({each.id for each in made}) == len(made)
    by_task = [made[start : start + 5] for start in range(0, len(made), 5)]
    assert (
        len({tuple((q.unit, q.image, q.reference["question"], q.reference["answer"]) for q in t) for t in by_task}) == 1
    )
    assert [{q.reference["task"] for q in task} for task in by_task] == [{number} for number in range(1, 17)]
    assert made[0].id == f"T01/{made[0].unit}"


def test_a_prompt_is_the_question_and_what_ifeval_asks() -> None:
    for each in build_questions(ASKED, per_task=12):
        asked = render_instruction(each.reference["instruction_id"], each.reference["kwargs"])
        assert each.prompt == f"{each.reference['question']} {asked}"


def test_questions_are_drawn_by_the_seed_alone() -> None:
    made = build_questions(ASKED, per_task=5)
    assert made == build_questions(ASKED, per_task=5)
    assert made != build_questions(ASKED, per_task=5, seed=1)
    everything = {each.id: each for each in build_questions(ASKED, per_task=12)}
    assert all(everything[each.id] == each for each in made), "arguments do not depend on which others are asked"


def test_tasks_are_drawn_apart() -> None:
    made = build_questions(ASKED, per_task=12)
    fourth, eighth = (
        [next(iter(q.reference["kwargs"].values())) for q in made if q.reference["task"] == n] for n in (4, 8)
    )
    assert fourth != eighth, "both are a number from 1 to 4 for the same questions"


def test_keywords_come_from_the_callers_list() -> None:
    made = build_questions(ASKED, per_task=12, keywords=["sun", "moon", "star"])
    drawn = [tuple(q.reference["kwargs"]["keywords"]) for q in made if q.reference["task"] == 7]
    assert len(set(drawn)) > 1
    assert {word for words in drawn for word in words} == {"sun", "moon", "star"}


@pytest.mark.parametrize(
    ("asked", "per_task", "message"),
    [
        (ASKED, 13, "per_task: got 13, allowed: 1 to 12"),
        (ASKED, 0, "per_task: got 0, allowed: 1 to 12"),
        ([*ASKED, ASKED[3]], 5, "questions: got 'q3' more than once"),
        ([ImageQuestion(id="a", image=None, question="What?", answer=" ")], 1, "a: answer: got nothing"),
    ],
)
def test_what_cannot_be_drawn_is_named(asked: list[ImageQuestion], per_task: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_questions(asked, per_task)


# --- scores ----------------------------------------------------------------------------------------------------------


def judge_row(row: dict[str, Any]) -> dict[str, bool]:
    """Score one row: "strict" and "loose" if all its instructions are followed, and "right" if an answer is known."""
    checks = {"strict": follows_strictly, "loose": follows_loosely}
    scores = {
        name: all(check(id, arguments, row["response"]) for id, arguments in pair_arguments(row))
        for name, check in checks.items()
    }
    if row["answer"] is not None:
        scores["right"] = contains_answer(row["answer"], row["response"])
    return scores


def test_scores_are_means_of_tasks() -> None:
    answered = rows(
        build_questions(ASKED, per_task=12), "it is red", "IT IS BLUE, I think", '*{"x": 1}*', "*a* **b** [c] [d]"
    )
    found = compute_metrics(answered)
    for kind in ("strict", "loose"):
        by_task = [[judge_row(row)[kind] for row in answered if row["task"] == task] for task in range(1, 17)]
        assert found[kind].score == pytest.approx(fmean(map(fmean, by_task)))
        assert 0 < found[kind].score < 1
    assert found["strict"].score < found["loose"].score
    for instruction in INSTRUCTIONS.values():
        mean = fmean(judge_row(row)["strict"] for row in answered if row["task"] == instruction.task)
        assert found[f"strict.{instruction.name}"].score == pytest.approx(mean)
    assert {outcome.unit for outcome in found["strict"].outcomes} == {each.id for each in ASKED}


def test_tasks_weigh_the_same_however_many_rows_they_have() -> None:
    made = [q for q in build_questions(ASKED, per_task=12) if q.reference["task"] in (1, 9)]
    answered = rows(made[:12] + made[12:14], "no JSON and nothing else")
    assert compute_metrics(answered)["strict"].score == 0.5


def test_right_and_both_are_over_rows_with_an_answer() -> None:
    answered = rows(build_questions(ASKED, per_task=12), "it is red")
    found = compute_metrics(answered)
    known = [row for row in answered if row["answer"] is not None]
    assert len(found["right"].outcomes) == len(found["both"].outcomes) == len(known) == len(answered) / 2
    assert found["right"].score == 1
    assert 0 < found["both"].score < 1
    assert compute_metrics(rows(build_questions(ASKED, per_task=12), "it is blue"))["both"].score == 0


def test_without_answers_nothing_is_right_or_wrong() -> None:
    asked = [ImageQuestion(id="a", image=None, question="What?")]
    assert set(compute_metrics(rows(build_questions(asked, 1), "red"))) == {
        "strict",
        "loose",
        "words",
        *(f"strict.{each.name}" for each in INSTRUCTIONS.values()),
    }
    assert compute_metrics([])["strict"].score == 0


def test_words_are_the_mean_length_of_all_answers() -> None:
    answered = rows(build_questions(ASKED, per_task=12), "red", "it is red", "no", "it's blue, not red")
    assert compute_metrics(answered)["words"].score == pytest.approx((1 + 3 + 1 + 5) / 4)


def test_attention_counts_where_it_was_measured() -> None:
    answered = rows(build_questions(ASKED, per_task=12), "red")
    measured = [
        AttentionMass(image=[0.1, 0.3], text=[0.6, 0.2], image_tokens=16, text_tokens=8),
        AttentionMass(image=[0.5, 0.1], text=[0.4, 0.4], image_tokens=16, text_tokens=10),
    ]
    for row, mass in zip(answered[::20], measured, strict=False):
        row["attention"] = vars(mass)
    found = compute_metrics(answered)
    assert {outcome.unit for outcome in found["image_mass"].outcomes} == {answered[0]["unit"], answered[20]["unit"]}
    assert found["image_mass"].score == pytest.approx(0.25)
    assert found["image_mass.layer_00"].score == pytest.approx(0.3)
    assert found["image_mass.layer_01"].score == pytest.approx(0.2)
    assert found["dominance"].score == pytest.approx(fmean(each.dominance for each in measured))
    for group in ("early", "middle", "late"):
        expected = fmean(each.dominance_by_group[group] for each in measured)
        assert found[f"dominance.{group}"].score == pytest.approx(expected)


def test_tasks_of_some_instructions_are_a_mean_of_their_own() -> None:
    answered = rows(build_questions(ASKED, per_task=12), "it is red", '*{"x": 1}*')
    strict = compute_metrics(answered)["strict"]
    first, others = list(INSTRUCTIONS)[:5], list(INSTRUCTIONS)[5:]
    parts = [select_tasks(strict, ids) for ids in (first, others)]
    assert all(parts)
    assert strict.score == pytest.approx(
        sum(part.score * len(ids) / 16 for part, ids in zip(parts, (first, others), strict=True) if part)
    )
    only = select_tasks(strict, [first[0]])
    assert only
    assert only.score == pytest.approx(compute_metrics(answered)["strict.no comma"].score)
    assert select_tasks(strict, HELD_OUT_INSTRUCTIONS) is None


def test_scores_do_not_depend_on_the_arm() -> None:
    """A scorer sees rows alone: answers of several arms, pooled and shuffled, have the scores that they have apart."""
    arms = {
        arm: rows(build_questions(ASKED, per_task=12), *responses)
        for arm, responses in {
            "llava": ("it is red",),
            "both": ("RED", "blue, I think"),
            "random": ('{"a": "red"}',),
        }.items()
    }
    apart = {(arm, row["id"]): judge_row(row) for arm, answered in arms.items() for row in answered}
    pooled = [(arm, row) for arm, answered in arms.items() for row in answered]
    random.Random(0).shuffle(pooled)
    assert {(arm, row["id"]): judge_row(row) for arm, row in pooled} == apart
    fields = {name for answered in arms.values() for row in answered for name in row}
    assert fields == {"id", "unit", "prompt", "response", *REFERENCE_FIELDS}, "no field names an arm"
    # Other labels on the same answers change no score.
    relabelled = dict(zip(arms, [*list(arms.values())[1:], arms["llava"]], strict=True))
    scores, others = (
        sorted(compute_metrics(answered)["strict"].score for answered in answers_by_arm.values())
        for answers_by_arm in (arms, relabelled)
    )
    assert scores == others


# --- prompts with two instructions -----------------------------------------------------------------------------------


def test_each_of_the_sixteen_is_in_one_pair() -> None:
    assert sorted(id for pair in INSTRUCTION_PAIRS for id in pair) == sorted(INSTRUCTIONS)


FOLLOWING_BOTH = (
    '{"answer": "red"}',
    "* it is a red shape\n* it is a circle\n* that is all there is\n* nothing more\n* so it is",
    "<<WHAT THE IMAGE SHOWS IS THAT THE ANSWER IS RED>>",
    "{starter} red [a] [b] [c] [d]",
    "*red* *a* *b* *c*\n{postscript_marker} that is all",
    "{keywords} are in it. Red.",
    "{section_spliter} 1 red {section_spliter} 2 a {section_spliter} 3 b {section_spliter} 4 c {section_spliter} 5 d",
    "red\n******\nit is red. {end_phrase}",
)
"""A response for each pair; the first bullets and the keywords of a prompt are put in below."""


def test_a_response_can_follow_both_instructions_of_a_pair() -> None:
    made = build_pair_questions(ASKED, per_task=12)
    assert len(made) == 8 * 12
    for question in made:
        arguments = {name: value for kwargs in question.reference["kwargs"] for name, value in kwargs.items()}
        response = FOLLOWING_BOTH[question.reference["task"] - 1]
        values = {name: value for name, value in arguments.items() if isinstance(value, str)}
        values["keywords"] = " and ".join(arguments.get("keywords", ()))
        if "{" in response.replace('{"', ""):
            response = response.format(**values)
        if "num_bullets" in arguments:
            response = "\n".join(response.split("\n")[: arguments["num_bullets"]])
        # Sentences and words are bounded from one of two sides.
        if arguments.get("relation") == "at least":
            filler, count = (
                ("It is red. ", arguments["num_sentences"])
                if "num_sentences" in arguments
                else ("red ", arguments["num_words"])
            )
            response = filler * count + response
        if arguments.get("relation") == "less than":
            if arguments.get("num_sentences") == 1:
                continue  # No response has fewer
            response = response.replace(". ", " ").rstrip(".")
        assert judge_row({**question.reference, "response": response})["strict"], (question.prompt, response)


def test_a_prompt_of_a_pair_has_the_texts_of_both_single_prompts() -> None:
    single = {
        (each.unit, each.reference["instruction_id"]): each.reference["kwargs"]
        for each in build_questions(ASKED, per_task=12)
    }
    for each in build_pair_questions(ASKED, per_task=12):
        pairs = list(zip(each.reference["instruction_id_list"], each.reference["kwargs"], strict=True))
        assert [kwargs for _, kwargs in pairs] == [single[each.unit, id] for id, _ in pairs]
        texts = [render_instruction(id, kwargs) for id, kwargs in pairs]
        assert each.prompt == " ".join([each.reference["question"], *texts])
    assert build_pair_questions(ASKED, 5) == build_pair_questions(ASKED, 5) != build_pair_questions(ASKED, 5, seed=1)


def test_the_levels_differ_for_prompts_with_two_instructions() -> None:
    answered = rows(build_pair_questions(ASKED, per_task=12), "it is red", "IT IS RED", '{"a": "red"}', "*a* **b**, c")
    found = compute_metrics(answered)
    for kind in ("strict", "loose"):
        row_scores = [next(score_lines(json.dumps(row), "a"))[kind] for row in answered]
        assert found[kind].score == pytest.approx(fmean(map(fmean, row_scores)))
        assert found[f"prompt_{kind}"].score == pytest.approx(fmean(map(all, row_scores)))
        assert 0 < found[f"prompt_{kind}"].score < found[kind].score < 1
    assert found["prompt_strict"].score == pytest.approx(fmean(judge_row(row)["strict"] for row in answered))
    known = [row for row in answered if row["answer"] is not None]
    both = [judge_row(row)["strict"] and judge_row(row)["right"] for row in known]
    assert found["both"].score == pytest.approx(fmean(both))
    assert {f"strict.{each.name}" for each in INSTRUCTIONS.values()} <= set(found)
    assert "prompt_strict" not in compute_metrics(rows(build_questions(ASKED, per_task=12), "it is red"))


def test_pairs_are_frozen_and_checked(tmp_path: Path) -> None:
    path = tmp_path / "frozen.jsonl"
    made = build_pair_questions(ASKED, per_task=2)
    write_questions(made, path)
    assert read_questions(path) == made
    for change, message in (
        ({"task": 2}, "task: got 2, allowed: that of punctuation:no_comma"),
        ({"kwargs": [{}]}, "kwargs: got"),
        ({"kwargs": {}}, "kwargs: got"),
        ({"instruction_id_list": ["punctuation:no_comma"] * 2}, "prompt: got"),
    ):
        write_questions([replace(made[0], reference={**made[0].reference, **change})], path)
        with pytest.raises(ValueError, match=re.escape(message)):
            read_questions(path)
    # The prompt fits its reference, but there is no such pair.
    twice = render_instruction("punctuation:no_comma", {})
    reference = {**made[0].reference, "instruction_id_list": ["punctuation:no_comma"] * 2}
    other = replace(made[0], prompt=f"{reference['question']} {twice} {twice}", reference=reference)
    write_questions([other], path)
    with pytest.raises(
        ValueError, match=re.escape("instruction_id_list: got punctuation:no_comma + punctuation:no_comma")
    ):
        read_questions(path)


# --- held-out constraints, and no image ------------------------------------------------------------------------------


def test_held_out_constraints_are_tasks_after_the_sixteen(tmp_path: Path) -> None:
    made = build_questions(ASKED, per_task=5, instruction_ids=HELD_OUT_INSTRUCTIONS)
    assert [question.reference["task"] for question in made[::5]] == list(range(17, 29))
    assert {question.unit for question in made} == {question.unit for question in build_questions(ASKED, per_task=5)}
    write_questions(made, tmp_path / "frozen.jsonl")
    assert read_questions(tmp_path / "frozen.jsonl") == made
    found = compute_metrics(rows(made, "it is red"))
    assert {f"strict.{each.name}" for each in HELD_OUT_INSTRUCTIONS.values()} <= set(found)


def test_without_images_the_prompts_are_the_same() -> None:
    made = build_questions(ASKED, per_task=5)
    text = without_images(made)
    assert [vars(question) for question in text] == [{**vars(question), "image": None} for question in made]


@pytest.mark.parametrize(
    ("answer", "response", "gives"),
    [
        ("red", "IT IS RED.", True),
        ("red", "It is reddish.", False),
        ("red", '```json\n{"colour": "red"}\n```', True),
        ("red", "**red**", True),
        ("2.5 m", "about 2.5 m high", True),
        ("2.5 m", "about 2x5 m high", False),
        ("c++", "It says C++!", True),
        ("yes", "Yes, there is no doubt.", True),
        ("no", "Yes, there is no doubt.", False),
        ("no", "I know nothing.", False),
        ("No", "I would say: NO.", True),
    ],
)
def test_an_answer_is_found_as_a_whole_word(answer: str, response: str, gives: bool) -> None:
    assert contains_answer(answer, response) is gives


# --- lines -----------------------------------------------------------------------------------------------------------


def test_lines_are_scored_one_by_one_whoever_wrote_them() -> None:
    lines = [
        '{"instruction_id": "punctuation:no_comma", "kwargs": {}, "response": "Sure,\\nred", "more": 1}',
        "",
        '{"instruction_id_list": ["punctuation:no_comma", "length_constraints:number_words"], "response": "a b", '
        '"kwargs": [{"num_words": null}, {"num_words": 3, "relation": "at least"}]}',
    ]
    assert list(score_lines("\n".join(lines), "a.jsonl")) == [
        {"strict": False, "loose": True},
        {"strict": [True, False], "loose": [True, False]},
    ]
    answered = rows(build_questions(ASKED, per_task=12), "it is red", "**IT**")
    scored = score_lines("\n".join(map(json.dumps, answered)), "b.jsonl")
    assert list(scored) == [{key: judge_row(row)[key] for key in ("strict", "loose")} for row in answered]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ("[" * 10**5, "not JSON"),
        ("[]", "got a list, allowed: an object"),
        ('{"instruction_id": "punctuation:no_comma", "kwargs": {}}', "got no response, allowed: an object with "),
        ('{"instruction_id": "x", "kwargs": {}, "response": ""}', "instruction_id: got 'x', allowed: punctuation"),
        ('{"instruction_id": ["x"], "kwargs": {}, "response": ""}', "instruction_id: got .*ids that are texts"),
        (
            '{"instruction_id": "punctuation:no_comma", "kwargs": null, "response": ""}',
            "kwargs: got None, allowed: an o",
        ),
        ('{"instruction_id": "punctuation:no_comma", "kwargs": {}, "response": 3}', "response: got 3, allowed: text"),
        ('{"instruction_id_list": ["x"], "kwargs": [], "response": ""}', r"kwargs: got \[\], allowed: an object of "),
    ],
)
def test_a_line_that_cannot_be_scored_is_named(line: str, message: str) -> None:
    good = '{"instruction_id": "punctuation:no_comma", "kwargs": {}, "response": "red"}'
    with pytest.raises(ValueError, match=rf"^a\.jsonl: line 3: {message}"):
        list(score_lines(f"{good}\n\n{line}", "a.jsonl"))


def test_questions_are_read_as_they_were_written(tmp_path: Path) -> None:
    asked = [
        *ASKED,
        ImageQuestion(id="bytes", image=b"\x89PNG\x00", question="Où\u2028 est-ce?"),
        ImageQuestion(id="n", image=None, question="?"),
    ]
    made = build_questions(asked, per_task=14)
    write_questions(made, tmp_path / "frozen.jsonl")
    assert read_questions(tmp_path / "frozen.jsonl") == made


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": "What?"}, "prompt: got 'What\\?', allowed: what its reference asks"),
        ({"image": 3}, "image: got 3, allowed: str"),
        ({"image": {"base64": "?"}}, "image: got .*base64"),
        ({"extra": 1}, "got id, .*extra, allowed: id, "),
        ({"id": "T01/q0"}, "id: got 'T01/q0' again, allowed: each once"),
        ({"reference": {}}, "got nothing, allowed: task"),
        ({"reference": {"task": 2}}, "task: got 2, allowed: that of punctuation:no_comma, 1"),
        ({"reference": {"answer": 3}}, "answer: got 3, allowed: str"),
        ({"reference": {"instruction_id": "x"}}, "instruction_id: got 'x', allowed: "),
        ({"reference": {"kwargs": {"x": 1}}}, "punctuation:no_comma: kwargs: got 'x', allowed: none"),
    ],
)
def test_a_line_that_is_no_question_is_named(tmp_path: Path, change: dict, message: str) -> None:
    path = tmp_path / "frozen.jsonl"
    write_questions(build_questions(ASKED, per_task=12), path)
    lines = path.read_text().splitlines()
    line = json.loads(lines[1])
    if change.get("reference"):
        change = {"reference": {**line["reference"], **change["reference"]}}
    path.write_text("\n".join([lines[0], json.dumps({**line, **change})]))
    with pytest.raises(ValueError, match=rf"frozen\.jsonl: line 2: {message}"):
        read_questions(path)
