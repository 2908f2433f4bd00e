"""MMBench: questions with two to four options, asked once for every rotation of the options. arXiv 2307.06281.

A question counts only if it is right in all rotations (circular evaluation). The official files have a row for each
rotation, rotation k with index + 1000000 k. For a file without rotations they are added as by LLaVA's `--all-rounds`:
the first option moves to the end.

Rules of open-compass/VLMEvalKit read the letter from a response (vlmeval/utils/matching_util.py in the package
ms-vlmeval 0.0.20). Its second step, which asks GPT about responses without a readable letter, is left out: they are
wrong, as with its `exact_matching`. LLaVA's prompt requests a letter, so almost none of its responses are concerned.
The paper's split, dev, has public answers; only the official server has those of test.
"""

import base64
import binascii
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from redux.benchmarks.benchmark import Metric, Outcome, Question, Row, group_metrics
from redux.benchmarks.source import (
    FoundAnswer,
    Source,
    get_field,
    match_answers,
    only_source,
    parse_table,
    read_records,
    read_text,
)

OPTION_LETTERS = "ABCD"
ROTATION_OFFSET = 1_000_000
LETTER_PROMPT = "\nAnswer with the option's letter from the given choices directly."
_ANSWER_KEYS = (("index", "prediction"), ("question_id", "text"), ("id", "response"))
CATEGORIES = ("l2-category", "category")

EMPTY_CELLS = {
    "", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A", "NA",
    "NULL", "n/a", "null",
}  # fmt: skip
"""Cells that are empty for pandas, with which LLaVA reads the file; so are nan and none, in any case."""

REFUSALS = (
    "Sorry, I can't help with images of people yet.", "I can't process this file.",
    "I'm sorry, but without the image provided", "Cannot determine the answer",
)  # fmt: skip
PUNCTUATION_TO_SPACE = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))


def read_questions(*sources: Source) -> list[Question]:
    """Read mmbench_dev_20230712.tsv: index, question, hint, A to D, answer, image (base64), category, l2-category."""
    source = only_source(sources)
    rows: dict[int, tuple[str, dict[str, str]]] = {}
    for location, row in parse_table(source, read_text(source)):
        index = get_field(location, row, "index")
        if not index.isdecimal():
            raise ValueError(f"{location}: got index {index!r}, allowed: a whole number")
        if int(index) in rows:
            raise ValueError(f"{location}: got index {index} again, allowed: each once")
        rows[int(index)] = (location, row)
    has_rotations = any(index >= ROTATION_OFFSET for index in rows)
    result: list[Question] = []
    for index, (location, row) in rows.items():
        options = _read_options(location, row)
        image = _read_image(location, row, rows)
        rotations = range(1 if has_rotations else len(options))
        result += [
            _build_question(location, row, index + number * ROTATION_OFFSET, options, number, image)
            for number in rotations
        ]
    return result


def _read_options(location: str, row: Mapping[str, str]) -> list[str]:
    options = []
    for letter in OPTION_LETTERS:
        if (text := _read_cell(row, letter)) is None:
            break
        options.append(text)
    if not options:
        raise ValueError(f"{location}: got no option, allowed: text in A, and in B to D as far as there are more")
    return options


def _read_cell(row: Mapping[str, str], column: str) -> str | None:
    text = row.get(column) or ""
    return None if text in EMPTY_CELLS or text.lower() in ("nan", "none") else text


def _read_image(location: str, row: Mapping[str, str], rows: Mapping[int, tuple[str, Mapping[str, str]]]) -> bytes:
    """Read the encoded image. Newer files replace a repeated image by the index of the row that has it."""
    code = get_field(location, row, "image")
    if len(code) <= 64 and code.isdecimal() and int(code) in rows:
        code = get_field(location, rows[int(code)][1], "image")
    try:
        return base64.b64decode(code, validate=True)
    except binascii.Error as error:
        raise ValueError(f"{location}: got image {code[:20]!r}…, allowed: base64; {error}") from None


def _build_question(
    location: str, row: Mapping[str, str], index: int, options: list[str], rotation: int, image: bytes
) -> Question:
    """Build a question with its options rotated; each rotation moves the first option to the end."""
    rotated = dict(zip(OPTION_LETTERS, options[rotation:] + options[:rotation], strict=False))
    hint, question = _read_cell(row, "hint"), get_field(location, row, "question")
    lines = [*([hint] if hint else []), question, *(f"{letter}. {option}" for letter, option in rotated.items())]
    reference: dict[str, Any] = {"options": rotated}
    if (answer := _read_cell(row, "answer")) is not None:
        if answer not in rotated:
            raise ValueError(f"{location}: got answer {answer!r}, allowed: {', '.join(rotated)}")
        reference["answer"] = OPTION_LETTERS[(OPTION_LETTERS.index(answer) - rotation) % len(options)]
    reference |= {name: text for name in CATEGORIES if (text := _read_cell(row, name)) is not None}
    return Question(
        id=str(index),
        unit=str(index % ROTATION_OFFSET),
        image=image,
        prompt="\n".join(lines) + LETTER_PROMPT,
        reference=reference,
    )


def read_letter(response: str | None, options: Mapping[str, str]) -> str | None:
    """Read the option that a response names, by letter or else by text; None if it names none or several."""
    if not response or any(refusal in response for refusal in REFUSALS):
        return None
    words = response.translate(PUNCTUATION_TO_SPACE).split()
    named = [option for option in options if option in words]
    if len(named) == 1 and words.index(named[0]) > len(words) - 5:  # A far from the end may be an article
        return named[0]
    if not named and "Z" in words:  # VLMEvalKit's letter for "none of them"
        return None
    if len(response) > 2 * sum(map(len, options.values())):
        return None
    quoted = [option for option, text in options.items() if text.lower() in response.lower()]
    return quoted[0] if len(quoted) == 1 else None


def compute_metrics(rows: Sequence[Row]) -> dict[str, Metric]:
    """Compute accuracy, the share of questions right in all rotations; also by l2-category and category.

    There are no metrics without answers.
    """
    # All rotations of a question are one outcome, so they are collected first.
    rotations = defaultdict(list)
    for row in rows:
        if "answer" in row:
            rotations[row["unit"]].append(row)

    def outcomes() -> Iterator[tuple[str, Outcome]]:
        for unit, unit_rows in rotations.items():
            right = all(read_letter(row["response"], row["options"]) == row["answer"] for row in unit_rows)
            outcome = Outcome("", unit, float(right))
            yield "accuracy", outcome
            for name in CATEGORIES:
                if name in unit_rows[0]:
                    yield f"{name}.{unit_rows[0][name]}", outcome

    return group_metrics(outcomes())


def read_answers(source: Source, questions: Sequence[Question]) -> dict[str, str]:
    """Read a table, JSON list or lines of {index, prediction}, of LLaVA's {question_id, text}, or {id, response}.

    The server's .xlsx must be saved as CSV first. LLaVA's round_id is the number of a rotation that LLaVA added.
    """

    def iterate_answers() -> Iterator[FoundAnswer]:
        for record in read_records(source, _ANSWER_KEYS):
            number = record.id
            if "round_id" in record.fields and number.isdecimal():
                number = str(int(number) + get_field(record.location, record.fields, "round_id", int) * ROTATION_OFFSET)
            yield FoundAnswer(record.location, number, record.response)

    return match_answers(iterate_answers(), {question.id for question in questions})
