"""The paper's benchmark of following instructions: questions about images, each with each of sixteen instructions.

A prompt is the question, a space, and IFEval's text, as in the paper's Figure 4.  The paper says neither which
questions nor how many; all its figures are multiples of 1/218, and MM-Vet has 218 questions, so 218 a task is the
default.  The same questions go with every instruction: their differences then say nothing about the questions, and the
unit that is independent of others is the question, which is asked sixteen times.

Arguments are drawn once and frozen into a file, so that every model answers the same prompts.  What is drawn for a
question depends on the seed, the task and the question's id alone.

Who looks away from the image may follow instructions better, so where an answer is known it is also told whether the
response has it ("right"), and whether it has it and follows the instruction ("both").

Cost: some seconds to score 3,488 responses, most of them for telling the language of those in one case.
"""

import base64
import json
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from redux.benchmarks import Metric, Outcome, Question, Row, source
from redux.instructions import (
    INSTRUCTIONS,
    KEYWORDS,
    draw_arguments,
    follows_loosely,
    follows_strictly,
    render_instruction,
)

PER_TASK = 218


@dataclass(frozen=True, kw_only=True)
class ImageQuestion:
    """A question about an image, and its answer where one is known.  image: as `Question` has it."""

    id: str
    image: str | bytes | None
    question: str
    answer: str | None = None


def build_questions(
    asked: Sequence[ImageQuestion], per_task: int = PER_TASK, seed: int = 0, keywords: Sequence[str] = KEYWORDS
) -> list[Question]:
    """16 × per_task questions, task by task: `per_task` of those asked, by chance, in their order.

    ValueError where fewer are asked, two have the same id, or an answer is empty.
    """
    ids = [each.id for each in asked]
    if len(set(ids)) < len(ids):
        raise ValueError(f"asked: got {max(ids, key=ids.count)!r} more than once, allowed: ids that are unique")
    if not 1 <= per_task <= len(asked):
        raise ValueError(f"per_task: got {per_task}, allowed: 1 to {len(asked)}, as many as are asked")
    if empty := [each.id for each in asked if each.answer is not None and not each.answer.strip()]:
        raise ValueError(f"{empty[0]}: answer: got nothing, allowed: a text or None")
    places = sorted(random.Random(seed).sample(range(len(asked)), per_task))
    return [_build_question(asked[place], id, seed, keywords) for id in INSTRUCTIONS for place in places]


def _build_question(asked: ImageQuestion, id: str, seed: int, keywords: Sequence[str]) -> Question:
    task = INSTRUCTIONS[id].task
    kwargs = draw_arguments(id, random.Random(f"{seed}/{task}/{asked.id}"), keywords)
    return Question(
        id=f"{_task_group(task)}/{asked.id}",
        unit=asked.id,
        image=asked.image,
        prompt=_build_prompt(asked.question, id, kwargs),
        reference={
            "task": task,
            "instruction_id": id,
            "kwargs": kwargs,
            "question": asked.question,
            "answer": asked.answer,
        },
    )


def _build_prompt(question: str, id: str, kwargs: dict[str, Any]) -> str:
    return f"{question} {render_instruction(id, kwargs)}"


def _task_group(task: int) -> str:
    return f"T{task:02}"


# --- scores ----------------------------------------------------------------------------------------------------------


def judge_row(row: Row) -> dict[str, bool]:
    """What a line of answers is extended by: "strict", "loose", and "right" where an answer is known."""
    told = (row["instruction_id"], row["kwargs"], row["response"])
    judged = {"strict": (followed := follows_strictly(*told)), "loose": followed or follows_loosely(*told)}
    if row.get("answer") is not None:
        judged["right"] = contains_answer(row["answer"], row["response"])
    return judged


def contains_answer(answer: str, response: str) -> bool:
    """Whether a response, however it is dressed up, gives the answer; case counts nowhere.

    "yes" and "no": the first of the two words in the response is it.  Any other: it occurs, as whole words.  That is
    lenient: "not red" has "red", and so has a list of all colours.

    >>> right("no", "NO, IT IS NOT. YES, REALLY."), right("red", "It is reddish."), right("red", '{"colour": "Red"}')
    (True, False, True)
    """
    wanted, said = answer.strip().lower(), response.lower()
    if wanted in ("yes", "no"):
        first = re.search(r"\b(yes|no)\b", said)
        return first is not None and first[0] == wanted
    return re.search(rf"(?<!\w){re.escape(wanted)}(?!\w)", said) is not None


def compute_metrics(rows: Sequence[Row]) -> dict[str, Metric]:
    """The metrics "strict" and "loose", means over tasks, as the paper's AVG; "strict.NAME" of each task that has rows.

    Where answers are known also "right" and "both", right and strict, over the rows that have one.
    """
    outcomes: dict[str, list[Outcome]] = {"strict": [], "loose": []}
    for row in rows:
        judged: dict[str, bool] = judge_row(row)
        if "right" in judged:
            judged["both"] = judged["right"] and judged["strict"]
        judged[f"strict.{INSTRUCTIONS[row['instruction_id']].name}"] = judged["strict"]
        for name, value in judged.items():
            outcomes.setdefault(name, []).append(Outcome(_task_group(row["task"]), row["unit"], float(value)))
    return {name: _mean_over_tasks(each) for name, each in outcomes.items()}


def _mean_over_tasks(outcomes: Sequence[Outcome]) -> Metric:
    return Metric(outcomes, 1 / max(1, len({outcome.group for outcome in outcomes})))


def score_lines(text: str, name: str) -> Iterator[dict[str, Any]]:
    """{"strict", "loose"} of each line {"instruction_id", "kwargs", "response"} of JSON, whatever else it has.

    A line may also be IFEval's, with "instruction_id_list" and "kwargs" as lists; then both values are lists, too.
    name: of the file, for errors.  ValueError naming it and the line where one cannot be scored.
    """
    for where, line in source.parse_lines(name, text):
        try:
            told = _list_instructions(line)
            judged = {
                "strict": [follows_strictly(*each) for each in told],
                "loose": [follows_loosely(*each) for each in told],
            }
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        yield judged if ID_LIST in line else {kind: values[0] for kind, values in judged.items()}


ID_LIST = "instruction_id_list"


def _list_instructions(line: dict[str, Any]) -> list[tuple[str, dict[str, Any], str]]:
    """(id, arguments, response) of each instruction of a line."""
    names = (ID_LIST if ID_LIST in line else "instruction_id", "kwargs", "response")
    if missing := [name for name in names if name not in line]:
        raise ValueError(f"got no {missing[0]}, allowed: an object with {', '.join(names)}")
    ids, kwargs, response = (line[name] for name in names)
    if ID_LIST not in line:
        ids, kwargs = [ids], [kwargs]
    if not isinstance(ids, list) or not all(isinstance(id, str) for id in ids):
        raise ValueError(f"{names[0]}: got {line[names[0]]!r}, allowed: ids that are texts")
    if not isinstance(kwargs, list) or len(kwargs) != len(ids) or not all(isinstance(each, dict) for each in kwargs):
        raise ValueError(f"kwargs: got {line['kwargs']!r}, allowed: an object of arguments for each instruction")
    if not isinstance(response, str):
        raise ValueError(f"response: got {response!r}, allowed: text")
    return [(id, each, response) for id, each in zip(ids, kwargs, strict=True)]


# --- the frozen file -------------------------------------------------------------------------------------------------


def write_questions(questions: Iterable[Question], path: str | Path) -> None:
    """One JSON object a line; an image that is no path as {"base64": text}."""
    lines = (
        {
            "id": each.id,
            "unit": each.unit,
            "image": {"base64": base64.b64encode(each.image).decode()} if isinstance(each.image, bytes) else each.image,
            "prompt": each.prompt,
            "reference": each.reference,
        }
        for each in questions
    )
    Path(path).write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")


def read_questions(path: str | Path) -> list[Question]:
    """The questions that `write` wrote.

    ValueError naming file and line where one is no such question, its prompt is not what its reference asks, or its id
    comes twice.
    """
    found: dict[str, Question] = {}
    for where, line in source.parse_lines(path, source.read_text(path)):
        try:
            question = _parse_question(line)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        if question.id in found:
            raise ValueError(f"{where}: id: got {question.id!r} again, allowed: each once")
        found[question.id] = question
    return list(found.values())


QUESTION_FIELDS = {"id": str, "unit": str, "image": str | dict | None, "prompt": str, "reference": dict}
REFERENCE_FIELDS = {"task": int, "instruction_id": str, "kwargs": dict, "question": str, "answer": str | None}


def _parse_question(line: dict[str, Any]) -> Question:
    _check_record(line, QUESTION_FIELDS)
    reference = line["reference"]
    _check_record(reference, REFERENCE_FIELDS)
    prompt = _build_prompt(reference["question"], reference["instruction_id"], reference["kwargs"])
    if line["prompt"] != prompt:
        raise ValueError(f"prompt: got {line['prompt']!r}, allowed: what its reference asks, {prompt!r}")
    if reference["task"] != (task := INSTRUCTIONS[reference["instruction_id"]].task):
        raise ValueError(f"task: got {reference['task']}, allowed: that of {reference['instruction_id']}, {task}")
    return Question(**{**line, "image": _decode_image(line["image"])})


def _decode_image(image: Any) -> str | bytes | None:
    if not isinstance(image, dict):
        return image
    try:
        return base64.b64decode(image["base64"], validate=True)
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"image: got {image!r}, allowed: a path, null, or an object with base64") from None


def _check_record(line: dict[str, Any], fields: dict[str, Any]) -> None:
    """ValueError unless the object has these fields, of these types, and no others."""
    if set(line) != set(fields):
        raise ValueError(f"got {', '.join(line) or 'nothing'}, allowed: {', '.join(fields)}")
    for name, kind in fields.items():
        if not isinstance(line[name], kind):
            raise ValueError(f"{name}: got {line[name]!r}, allowed: {getattr(kind, '__name__', kind)}")
