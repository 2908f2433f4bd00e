"""TextVQA: questions about the text in images, each answered by ten people.  Singh et al., arXiv 1904.08920.

The score is M4C's, as LLaVA's eval_textvqa.py has it (haotian-liu/LLaVA, commit c121f043).  LLaVA's 58.2 is reached
with the words that the Rosetta OCR read in the image given in the prompt; without them it is about 46.
"""

import re
from collections.abc import Iterator, Sequence
from os import fspath
from typing import Any

from redux.benchmarks.benchmark import SHORT, Metric, Outcome, Question, Row, means
from redux.benchmarks.source import Found, Source, document, entries, field, identity, matched, records, texts
from redux.benchmarks.vqa_text import agreement, evalai

FORMS = (("question_id", "answer"), ("question_id", "text"), ("id", "response"))


def questions(*sources: Source, ocr: bool | None = None) -> list[Question]:
    """Of TextVQA_0.5.1_val.json and, for the words in the prompts, TextVQA_Rosetta_OCR_v0.2_val.json.

    sources: one file or both, in any order.
    ocr: whether prompts have the words; None where a file of them is given.
    """
    data = {fspath(source): entries(source, document(source), "data") for source in sources}
    words = {source: found for source, found in data.items() if found and "ocr_tokens" in found[0][1]}
    asked = [source for source in data if source not in words]
    if len(asked) != 1 or len(words) > 1 or (ocr and not words):
        wanted = "and one of OCR tokens" if ocr else "and at most one of OCR tokens"
        raise ValueError(f"TextVQA: got {', '.join(data) or 'no file'}, allowed: one of questions, {wanted}")
    tokens = _tokens(*words.values()) if words and ocr is not False else None
    return [_question(place, entry, tokens) for place, entry in data[asked[0]]]


def _tokens(read: list[tuple[str, dict[str, Any]]]) -> dict[str, list[str]]:
    return {field(place, entry, "image_id"): texts(place, entry, "ocr_tokens") for place, entry in read}


def _question(place: str, entry: dict[str, Any], tokens: dict[str, list[str]] | None) -> Question:
    image, asked = field(place, entry, "image_id"), field(place, entry, "question")
    if tokens is not None and image not in tokens:
        raise ValueError(f"{place}: got image {image}, allowed: one that the file of OCR tokens has")
    shown = "" if tokens is None else f"\nReference OCR token: {', '.join(tokens[image])}"
    return Question(
        id=identity(place, entry, "question_id"),
        unit=image,
        image=f"{image}.jpg",
        prompt=asked.capitalize() + shown + SHORT,  # the file has small letters only, LLaVA's prompts do not
        reference={"answers": texts(place, entry, "answers")} if "answers" in entry else {},
    )


def metrics(rows: Sequence[Row]) -> dict[str, Metric]:
    """accuracy: the mean soft accuracy; none without people's answers."""
    return means(
        ("accuracy", Outcome("", row["unit"], accuracy(row["response"], row["answers"])))
        for row in rows
        if row.get("answers")
    )


def accuracy(response: str | None, people: Sequence[str]) -> float:
    """M4C's soft accuracy of a response, from 0 to 1."""
    return 0.0 if response is None else agreement(evalai(response), [evalai(person) for person in people])


def answers(source: Source, questions: Sequence[Question]) -> dict[str, str]:
    """Of the official [{question_id, answer}], or of lines {id, response} or LLaVA's {question_id, prompt, text}.

    LLaVA's question_id is the image's, so the prompt tells its questions apart.
    """
    known = {question.id for question in questions}
    asked = {(question.unit, _asked(question.prompt)): question.id for question in questions}

    def found() -> Iterator[Found]:
        for record in records(source, FORMS):
            number = record.id
            if number not in known and "prompt" in record.fields:
                number = asked.get((number, _asked(field(record.place, record.fields, "prompt"))), number)
            yield Found(record.place, number, record.response)

    return matched(found(), known)


def _asked(prompt: str) -> str:
    """The question of a prompt, in small letters.

    LLaVA's eval_textvqa.py knows three forms: the question's line before or behind the line of OCR tokens, and one line
    "OCR tokens: ... Question: ... Short answer:".
    """
    if prompt.startswith("OCR tokens: ") and (found := re.search(r"Question: (.*?) Short answer:", prompt, re.DOTALL)):
        return found[1].lower()
    lines = prompt.split("\n")
    return lines[1 if len(lines) > 1 and lines[0].startswith("Reference OCR token:") else 0].lower()
