"""TextVQA: questions about the text in images, each answered by ten people. Singh et al., arXiv 1904.08920.

The score is M4C's, as in LLaVA's eval_textvqa.py (haotian-liu/LLaVA, commit c121f043). LLaVA reaches 58.2 with the
words that the Rosetta OCR read from the image in its prompt, and about 46 without them.
"""

import re
from collections.abc import Iterator, Sequence
from os import fspath
from typing import Any

from redux.benchmarks.benchmark import SHORT_ANSWER_PROMPT, Metric, Outcome, Question, Row, group_metrics
from redux.benchmarks.source import (
    FoundAnswer,
    Source,
    get_field,
    get_id,
    get_texts,
    list_entries,
    match_answers,
    read_json,
    read_records,
)
from redux.benchmarks.vqa_text import human_agreement, normalize_as_evalai

_ANSWER_KEYS = (("question_id", "answer"), ("question_id", "text"), ("id", "response"))


def read_questions(*sources: Source, ocr: bool | None = None) -> list[Question]:
    """Read TextVQA_0.5.1_val.json and, for OCR tokens in the prompts, TextVQA_Rosetta_OCR_v0.2_val.json.

    Args:
        sources: one file or both, in any order.
        ocr: True requires OCR tokens in prompts, False leaves them out; None adds them if their file is given.
    """
    data = {fspath(source): list_entries(source, read_json(source), "data") for source in sources}
    ocr_files = {source: entries for source, entries in data.items() if entries and "ocr_tokens" in entries[0][1]}
    question_files = [source for source in data if source not in ocr_files]
    if len(question_files) != 1 or len(ocr_files) > 1 or (ocr and not ocr_files):
        ocr_rule = "and one of OCR tokens" if ocr else "and at most one of OCR tokens"
        raise ValueError(f"TextVQA: got {', '.join(data) or 'no file'}, allowed: one of questions, {ocr_rule}")
    tokens = _read_ocr_tokens(*ocr_files.values()) if ocr_files and ocr is not False else None
    return [_build_question(location, entry, tokens) for location, entry in data[question_files[0]]]


def _read_ocr_tokens(entries: list[tuple[str, dict[str, Any]]]) -> dict[str, list[str]]:
    return {
        get_field(location, entry, "image_id"): get_texts(location, entry, "ocr_tokens") for location, entry in entries
    }


def _build_question(location: str, entry: dict[str, Any], tokens: dict[str, list[str]] | None) -> Question:
    image = get_field(location, entry, "image_id")
    question = get_field(location, entry, "question")
    if tokens is not None and image not in tokens:
        raise ValueError(f"{location}: got image {image}, allowed: one that the file of OCR tokens has")
    ocr_line = "" if tokens is None else f"\nReference OCR token: {', '.join(tokens[image])}"
    return Question(
        id=get_id(location, entry, "question_id"),
        unit=image,
        image=f"{image}.jpg",
        # LLaVA's prompts begin with upper case, the questions of the file do not.
        prompt=question.capitalize() + ocr_line + SHORT_ANSWER_PROMPT,
        reference={"answers": get_texts(location, entry, "answers")} if "answers" in entry else {},
    )


def compute_metrics(rows: Sequence[Row]) -> dict[str, Metric]:
    """Compute accuracy, the mean soft accuracy; there are no metrics without answers of people."""
    return group_metrics(
        ("accuracy", Outcome("", row["unit"], soft_accuracy(row["response"], row["answers"])))
        for row in rows
        if row.get("answers")
    )


def soft_accuracy(response: str | None, people: Sequence[str]) -> float:
    """Compute M4C's soft accuracy of a response, from 0 to 1."""
    return (
        0.0
        if response is None
        else human_agreement(normalize_as_evalai(response), [normalize_as_evalai(person) for person in people])
    )


def read_answers(source: Source, questions: Sequence[Question]) -> dict[str, str]:
    """Read the official [{question_id, answer}], or lines {id, response} or LLaVA's {question_id, prompt, text}.

    LLaVA's question_id is the id of the image, so the prompt identifies the question.
    """
    question_ids = {question.id for question in questions}
    id_by_prompt = {(question.unit, _extract_question(question.prompt)): question.id for question in questions}

    def iterate_answers() -> Iterator[FoundAnswer]:
        for record in read_records(source, _ANSWER_KEYS):
            number = record.id
            if number not in question_ids and "prompt" in record.fields:
                question = _extract_question(get_field(record.location, record.fields, "prompt"))
                number = id_by_prompt.get((number, question), number)
            yield FoundAnswer(record.location, number, record.response)

    return match_answers(iterate_answers(), question_ids)


def _extract_question(prompt: str) -> str:
    """Extract the question of a prompt, in lower case.

    LLaVA's eval_textvqa.py has three forms: the question's line before or after the line of OCR tokens, and one line
    "OCR tokens: ... Question: ... Short answer:".
    """
    match = re.search(r"Question: (.*?) Short answer:", prompt, re.DOTALL)
    if prompt.startswith("OCR tokens: ") and match:
        return match[1].lower()
    lines = prompt.split("\n")
    return lines[1 if len(lines) > 1 and lines[0].startswith("Reference OCR token:") else 0].lower()
