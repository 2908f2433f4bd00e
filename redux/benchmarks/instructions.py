"""The paper's benchmark of instruction following: questions about images, combined with sixteen instructions.

A prompt is the question, a space, and IFEval's text, as in the paper's Figure 4. The paper gives neither the questions
nor their number. All its figures are multiples of 1/218, and MM-Vet has 218 questions, so the default is 218 for each
task. Every instruction has the same questions, so that differences between tasks do not depend on the questions. The
independent unit is the question, which is asked sixteen times.

Arguments are sampled once and frozen in a file, so that every model answers the same prompts. They depend only on the
seed, the task and the id of the question.

A model that ignores the image may follow instructions better. So if an answer is known, a score also shows whether the
response contains it ("right"), and whether it contains it and follows the instruction ("both"). "words" is the mean
length of responses, since a short one breaks many instructions and a long one contains many answers.

A prompt of the sixteen tasks has one instruction, so IFEval's prompt-level and instruction-level accuracies are the
same number there. They differ for prompts with two instructions, which `build_pair_questions` makes: "strict" is then
the share of instructions that are followed, and "prompt_strict" the share of prompts whose instructions all are.

The constraints of `redux.held_out_instructions` are asked in the same way, as further tasks. The same prompts without
images, which `without_images` makes, show what the language model follows by text alone.

An evaluation can measure the attention of some answers (`redux.attention_mass`), as the field "attention" of their
rows. "image_mass" is the mass on image tokens, "dominance" the Modality Dominance Index.

Cost: some seconds for 3,488 responses, mostly for detecting the language of responses in upper or lower case.
"""

import base64
import itertools
import json
import random
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from redux.attention_mass import AttentionMass
from redux.benchmarks import Metric, Outcome, Question, Row, source
from redux.benchmarks.benchmark import group_metrics
from redux.instructions import (
    ALL_INSTRUCTIONS,
    INSTRUCTION_PAIRS,
    INSTRUCTIONS,
    KEYWORDS,
    count_words,
    draw_arguments,
    follows_loosely,
    follows_strictly,
    render_instruction,
)

PER_TASK = 218

ID_LIST = "instruction_id_list"
"""Field of a row with several instructions, as in IFEval; "kwargs" is then a list, too.

`id` and `kwargs`, the names of variables below, are IFEval's for an instruction and its arguments.
"""


@dataclass(frozen=True, kw_only=True)
class ImageQuestion:
    """A question about an image.

    Args:
        id: unique id.
        image: as in `Question`.
        question: text of the question.
        answer: right answer, None if unknown.
    """

    id: str
    image: str | bytes | None
    question: str
    answer: str | None = None


def build_questions(
    questions: Sequence[ImageQuestion],
    per_task: int = PER_TASK,
    seed: int = 0,
    keywords: Sequence[str] = KEYWORDS,
    instruction_ids: Iterable[str] = tuple(INSTRUCTIONS),
) -> list[Question]:
    """Combine questions with instructions, by default the sixteen: 16 × per_task questions, task by task.

    Args:
        questions: questions about images; a random sample of them is used, in their order.
        per_task: size of the sample.
        seed: seed of the sample and of the arguments.
        keywords: words that "keywords" and "word order" sample from.
        instruction_ids: ids of the instructions.

    Raises:
        ValueError: there are too few questions, two have the same id, or an answer is empty.
    """
    return [
        _build_question(question, id, seed, keywords)
        for id, question in itertools.product(instruction_ids, _draw_questions(questions, per_task, seed))
    ]


def build_pair_questions(
    questions: Sequence[ImageQuestion], per_task: int = PER_TASK, seed: int = 0, keywords: Sequence[str] = KEYWORDS
) -> list[Question]:
    """Combine questions with two instructions each, by `INSTRUCTION_PAIRS`: per_task questions for each pair.

    Arguments and errors are those of `build_questions`. Questions and arguments of an instruction are the same as in
    its own task, so both prompts can be compared.
    """
    return [
        _build_pair_question(question, number, seed, keywords)
        for number, question in itertools.product(
            range(1, len(INSTRUCTION_PAIRS) + 1), _draw_questions(questions, per_task, seed)
        )
    ]


def _draw_questions(questions: Sequence[ImageQuestion], per_task: int, seed: int) -> list[ImageQuestion]:
    """Draw a random sample of questions, in their order; errors are those of `build_questions`."""
    ids = [question.id for question in questions]
    if len(set(ids)) < len(ids):
        raise ValueError(f"questions: got {max(ids, key=ids.count)!r} more than once, allowed: ids that are unique")
    if not 1 <= per_task <= len(questions):
        raise ValueError(f"per_task: got {per_task}, allowed: 1 to {len(questions)}, the number of questions")
    if empty := [question.id for question in questions if question.answer is not None and not question.answer.strip()]:
        raise ValueError(f"{empty[0]}: answer: got nothing, allowed: a text or None")
    positions = sorted(random.Random(seed).sample(range(len(questions)), per_task))
    return [questions[position] for position in positions]


def without_images(questions: Iterable[Question]) -> list[Question]:
    """Remove the images: the same prompts, ids and units as text alone, without image tokens."""
    return [replace(question, image=None) for question in questions]


def _build_question(image_question: ImageQuestion, id: str, seed: int, keywords: Sequence[str]) -> Question:
    task, kwargs = ALL_INSTRUCTIONS[id].task, _draw_arguments(image_question, id, seed, keywords)
    return _make_question(image_question, {"task": task, "instruction_id": id, "kwargs": kwargs})


def _build_pair_question(image_question: ImageQuestion, number: int, seed: int, keywords: Sequence[str]) -> Question:
    """Build the prompt with the instructions of a pair, whose number counts from 1."""
    ids = list(INSTRUCTION_PAIRS[number - 1])
    kwargs = [_draw_arguments(image_question, id, seed, keywords) for id in ids]
    return _make_question(image_question, {"task": number, ID_LIST: ids, "kwargs": kwargs})


def _draw_arguments(image_question: ImageQuestion, id: str, seed: int, keywords: Sequence[str]) -> dict[str, Any]:
    # A seed for each question: adding a question or a task changes no other prompt.
    return draw_arguments(id, random.Random(f"{seed}/{ALL_INSTRUCTIONS[id].task}/{image_question.id}"), keywords)


def _make_question(image_question: ImageQuestion, instructions: dict[str, Any]) -> Question:
    """Make a question from its task and its instructions, in the form of a row."""
    reference = {**instructions, "question": image_question.question, "answer": image_question.answer}
    return Question(
        id=f"{_find_group(reference)}/{image_question.id}",
        unit=image_question.id,
        image=image_question.image,
        prompt=_build_prompt(reference),
        reference=reference,
    )


def _build_prompt(reference: Row) -> str:
    texts = [render_instruction(id, kwargs) for id, kwargs in pair_arguments(reference)]
    return " ".join([reference["question"], *texts])


def has_instructions(row: Row) -> bool:
    """Return True if a row asks to follow one or several instructions."""
    return "instruction_id" in row or ID_LIST in row


def pair_arguments(row: Row) -> list[tuple[str, dict[str, Any]]]:
    """Pair the ids of the instructions of a row with their arguments."""
    if ID_LIST in row:
        return list(zip(row[ID_LIST], row["kwargs"], strict=True))
    return [(row["instruction_id"], row["kwargs"])]


def _find_group(row: Row) -> str:
    """Find the task of a row: T and its number in the paper or after it, or P and the number of a pair."""
    return f"P{row['task']:02}" if ID_LIST in row else _task_group(row["task"])


def _task_group(task: int) -> str:
    return f"T{task:02}"


# --- scores ----------------------------------------------------------------------------------------------------------


def _judge_instructions(row: Row) -> list[tuple[str, dict[str, bool]]]:
    """Judge each instruction of a row: its id, and if the response follows it strictly and loosely."""
    result = []
    for id, kwargs in pair_arguments(row):
        is_strict = follows_strictly(id, kwargs, row["response"])
        # A response that follows strictly also follows loosely.
        is_loose = is_strict or follows_loosely(id, kwargs, row["response"])
        result.append((id, {"strict": is_strict, "loose": is_loose}))
    return result


def contains_answer(answer: str, response: str) -> bool:
    """Return True if a response of any format contains the answer; upper and lower case are equal.

    For "yes" and "no" the first of the two words in the response counts. Any other answer must occur as whole words.
    That is lenient: "not red" contains "red", and so does a list of all colours.

    >>> contains_answer("no", "NO, IT IS NOT. YES, REALLY.")
    True
    >>> contains_answer("red", "It is reddish."), contains_answer("red", '{"colour": "Red"}')
    (False, True)
    """
    answer, response = answer.strip().lower(), response.lower()
    if answer in ("yes", "no"):
        match = re.search(r"\b(yes|no)\b", response)
        return match is not None and match[0] == answer
    return re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", response) is not None


def compute_metrics(rows: Sequence[Row]) -> dict[str, Metric]:
    """Compute "strict" and "loose", means over tasks as the paper's AVG, and "strict.NAME" of each instruction.

    For rows with several instructions these are shares of instructions, and "prompt_strict" and "prompt_loose" are
    shares of prompts whose instructions are all followed. For rows with a known answer also "right" and "both": right,
    and all instructions followed strictly. "words" is the mean number of words. For rows with a measured attention
    also those of `_attention_metrics`.
    """
    outcomes: dict[str, list[Outcome]] = {"strict": [], "loose": []}
    for row in rows:
        for name, value in _score_row(row).items():
            outcomes.setdefault(name, []).append(Outcome(_find_group(row), row["unit"], float(value)))
    return {name: _mean_over_tasks(named) for name, named in outcomes.items()} | _attention_metrics(rows)


def _score_row(row: Row) -> dict[str, float]:
    """Compute the values of a row for `compute_metrics`, by name of the metric."""
    verdicts = _judge_instructions(row)
    scores = {name: fmean(verdict[name] for _, verdict in verdicts) for name in ("strict", "loose")}
    if ID_LIST in row:
        scores |= {f"prompt_{name}": all(verdict[name] for _, verdict in verdicts) for name in ("strict", "loose")}
    if row.get("answer") is not None:
        scores["right"] = contains_answer(row["answer"], row["response"])
        scores["both"] = scores["right"] and all(verdict["strict"] for _, verdict in verdicts)
    scores |= {f"strict.{ALL_INSTRUCTIONS[id].name}": verdict["strict"] for id, verdict in verdicts}
    scores["words"] = count_words(row["response"])
    return scores


def _attention_metrics(rows: Sequence[Row]) -> dict[str, Metric]:
    """Compute "image_mass", its mean over layers; "image_mass.layer_NN", from 0; "dominance", and by group of layers.

    Only rows with images and a measured attention count, each alike.
    """
    outcomes: list[tuple[str, Outcome]] = []
    for row in rows:
        if attention := row.get("attention"):
            mass = AttentionMass(**attention)
            values = {"image_mass": fmean(mass.image)}
            values |= {f"image_mass.layer_{layer:02}": value for layer, value in enumerate(mass.image)}
            values["dominance"] = mass.dominance
            values |= {f"dominance.{group}": value for group, value in mass.dominance_by_group.items()}
            outcomes += [(name, Outcome("", row["unit"], value)) for name, value in values.items()]
    return group_metrics(outcomes)


def select_tasks(metric: Metric, instruction_ids: Collection[str]) -> Metric | None:
    """Select the tasks of some instructions from a mean over tasks, such as "strict"; None if it has none of them."""
    groups = {_task_group(ALL_INSTRUCTIONS[id].task) for id in instruction_ids}
    selected = [outcome for outcome in metric.outcomes if outcome.group in groups]
    return _mean_over_tasks(selected) if selected else None


def _mean_over_tasks(outcomes: Sequence[Outcome]) -> Metric:
    return Metric(outcomes, 1 / max(1, len({outcome.group for outcome in outcomes})))


def score_lines(text: str, name: str) -> Iterator[dict[str, Any]]:
    """Score JSON lines {"instruction_id", "kwargs", "response"}; other fields are ignored.

    A line may also be IFEval's, with lists "instruction_id_list" and "kwargs".

    Args:
        text: content of the file.
        name: name of the file, for errors.

    Yields:
        {"strict", "loose"} for each line; the values are lists for a line of IFEval.

    Raises:
        ValueError: names the file and a line that cannot be scored.
    """
    for location, line in source.parse_lines(name, text):
        try:
            instructions = _list_instructions(line)
            scores = {
                "strict": [follows_strictly(*instruction) for instruction in instructions],
                "loose": [follows_loosely(*instruction) for instruction in instructions],
            }
        except ValueError as error:
            raise ValueError(f"{location}: {error}") from None
        yield scores if ID_LIST in line else {name: values[0] for name, values in scores.items()}


def _list_instructions(line: dict[str, Any]) -> list[tuple[str, dict[str, Any], str]]:
    """List (id, arguments, response) of each instruction of a line; ValueError if the line has another form."""
    names = (ID_LIST if ID_LIST in line else "instruction_id", "kwargs", "response")
    if missing := [name for name in names if name not in line]:
        raise ValueError(f"got no {missing[0]}, allowed: an object with {', '.join(names)}")
    ids, kwargs, response = (line[name] for name in names)
    if ID_LIST not in line:
        ids, kwargs = [ids], [kwargs]
    if not isinstance(ids, list) or not all(isinstance(id, str) for id in ids):
        raise ValueError(f"{names[0]}: got {line[names[0]]!r}, allowed: ids that are texts")
    if (
        not isinstance(kwargs, list)
        or len(kwargs) != len(ids)
        or not all(isinstance(arguments, dict) for arguments in kwargs)
    ):
        raise ValueError(f"kwargs: got {line['kwargs']!r}, allowed: an object of arguments for each instruction")
    if not isinstance(response, str):
        raise ValueError(f"response: got {response!r}, allowed: text")
    return [(id, arguments, response) for id, arguments in zip(ids, kwargs, strict=True)]


# --- the frozen file -------------------------------------------------------------------------------------------------


def write_questions(questions: Iterable[Question], path: str | Path) -> None:
    """Write questions as JSON lines. An encoded image becomes {"base64": text}."""
    lines = (
        {
            "id": question.id,
            "unit": question.unit,
            "image": {"base64": base64.b64encode(question.image).decode()}
            if isinstance(question.image, bytes)
            else question.image,
            "prompt": question.prompt,
            "reference": question.reference,
        }
        for question in questions
    )
    Path(path).write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")


def read_questions(path: str | Path) -> list[Question]:
    """Read the file of `write_questions`.

    Raises:
        ValueError: names the file and a line that is not a question, whose prompt differs from its reference, or whose
            id occurs twice.
    """
    questions: dict[str, Question] = {}
    for location, line in source.parse_lines(path, source.read_text(path)):
        try:
            question = _parse_question(line)
        except ValueError as error:
            raise ValueError(f"{location}: {error}") from None
        if question.id in questions:
            raise ValueError(f"{location}: id: got {question.id!r} again, allowed: each once")
        questions[question.id] = question
    return list(questions.values())


QUESTION_FIELDS = {"id": str, "unit": str, "image": str | dict | None, "prompt": str, "reference": dict}
REFERENCE_FIELDS = {"task": int, "instruction_id": str, "kwargs": dict, "question": str, "answer": str | None}
PAIR_FIELDS = {"task": int, ID_LIST: list, "kwargs": list, "question": str, "answer": str | None}


def _parse_question(line: dict[str, Any]) -> Question:
    _check_record(line, QUESTION_FIELDS)
    reference = line["reference"]
    is_pair = ID_LIST in reference
    _check_record(reference, PAIR_FIELDS if is_pair else REFERENCE_FIELDS)
    _list_instructions({**reference, "response": ""})  # Checks the lists
    prompt = _build_prompt(reference)
    # A file that was edited by hand would be scored by arguments that the prompt does not contain.
    if line["prompt"] != prompt:
        raise ValueError(f"prompt: got {line['prompt']!r}, allowed: what its reference asks, {prompt!r}")
    task = _find_pair_number(reference[ID_LIST]) if is_pair else ALL_INSTRUCTIONS[reference["instruction_id"]].task
    if reference["task"] != task:
        ids = " + ".join(reference[ID_LIST]) if is_pair else reference["instruction_id"]
        raise ValueError(f"task: got {reference['task']}, allowed: that of {ids}, {task}")
    return Question(**{**line, "image": _decode_image(line["image"])})


def _find_pair_number(ids: Sequence[str]) -> int:
    """Find the number of a pair, from 1; ValueError if there is no such pair."""
    if tuple(ids) not in INSTRUCTION_PAIRS:
        pairs = "; ".join(" + ".join(pair) for pair in INSTRUCTION_PAIRS)
        raise ValueError(f"{ID_LIST}: got {' + '.join(ids)}, allowed: {pairs}")
    return INSTRUCTION_PAIRS.index(tuple(ids)) + 1


def _decode_image(image: Any) -> str | bytes | None:
    if not isinstance(image, dict):
        return image
    try:
        return base64.b64decode(image["base64"], validate=True)
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"image: got {image!r}, allowed: a path, null, or an object with base64") from None


def _check_record(line: dict[str, Any], fields: dict[str, Any]) -> None:
    """Raise a ValueError unless the object has exactly these fields, of these types."""
    if set(line) != set(fields):
        raise ValueError(f"got {', '.join(line) or 'nothing'}, allowed: {', '.join(fields)}")
    for name, field_type in fields.items():
        if not isinstance(line[name], field_type):
            raise ValueError(f"{name}: got {line[name]!r}, allowed: {getattr(field_type, '__name__', field_type)}")
