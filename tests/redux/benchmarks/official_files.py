"""Small files of the benchmarks in their official forms, scores of answers, and the official form of words."""

import base64
import io
import random
import re
from collections.abc import Callable
from typing import Any

from PIL import Image

from redux.benchmarks import BENCHMARKS, Metric, Question, join_answers, vqav2
from redux.benchmarks.vqa_text import (
    ARTICLES,
    CONTRACTIONS,
    NUMBER_WORDS,
    PUNCTUATION,
)

Write = Callable[..., str]


def scored(name: str, questions: list[Question], answers: dict[str, str]) -> tuple[dict[str, Metric], int]:
    """(metrics, missing), as `redux score` has them."""
    rows, missing = join_answers(questions, answers)
    return BENCHMARKS[name].compute_metrics(rows), missing


def scores(name: str, questions: list[Question], answers: dict[str, str]) -> dict[str, float]:
    return {name: metric.score for name, metric in scored(name, questions, answers)[0].items()}


def asked_vqav2(write: Write, people: list[list[str]], split: str = "val2014") -> list[Question]:
    """Questions 10, 20, … about image 1, 2, …, answered by these people; types yes/no and other by turns."""
    asked = [
        {"image_id": number, "question": f"What is {number}?", "question_id": 10 * number}
        for number, _ in enumerate(people, 1)
    ]
    answered = [
        {
            "question_id": 10 * number,
            "image_id": number,
            "question_type": "what is",
            "answer_type": ("yes/no", "other")[number % 2],
            "multiple_choice_answer": given[0],
            "answers": [{"answer": a, "answer_confidence": "yes", "answer_id": i} for i, a in enumerate(given, 1)],
        }
        for number, given in enumerate(people, 1)
    ]
    files = [write("questions.json", {"data_subtype": split, "questions": asked})]
    if split == "val2014":
        files.insert(0, write("annotations.json", {"data_subtype": split, "annotations": answered}))
    return vqav2.read_questions(*files)


def official_text(text: str) -> str:
    """vqaEval's processPunctuation, then processDigitArticle."""
    out = text
    for mark in PUNCTUATION:
        if (mark + " " in text or " " + mark in text) or re.search(r"(\d)(\,)(\d)", text) is not None:
            out = out.replace(mark, "")
        else:
            out = out.replace(mark, " ")
    out = re.sub(r"(?!<=\d)(\.)(?!\d)", "", out, count=32)
    kept = []
    for word in out.lower().split():
        digit = NUMBER_WORDS.get(word, word)
        if digit not in ARTICLES:
            kept.append(digit)
    for place, word in enumerate(kept):
        if word in CONTRACTIONS:
            kept[place] = CONTRACTIONS[word]
    return " ".join(kept)


def official_evalai(text: str) -> str:
    word = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return official_text(word.replace("\n", " ").replace("\t", " ").strip())


def texts(seed: int, count: int) -> list[str]:
    """Words, numbers and marks at random, among them all that the processors know."""
    rng = random.Random(seed)
    words = [
        *CONTRACTIONS,
        *NUMBER_WORDS,
        *ARTICLES,
        "Yes",
        "dog's",
        "1,000",
        "3.5",
        "U.S.",
        "a.b",
        ".",
        "x\ty",
        "\n",
        "cat",
    ]
    parts = [*words, *PUNCTUATION, " ", " ", ", ", "; "]
    return ["".join(rng.choice(parts) for _ in range(rng.randrange(1, 7))) for _ in range(count)]


SUBTASKS = {"artwork": True, "existence": False, "OCR": False, "code_reasoning": False}  # Whether with subfolders


def picture() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, "PNG")
    return buffer.getvalue()


COLUMNS = ("index", "question", "hint", "A", "B", "C", "D", "answer", "category", "l2-category", "image", "split")


def tsv(rows: list[dict[str, Any]]) -> str:
    """Tab-separated as pandas writes it: cells with line breaks or quotes are quoted."""

    def cell(value: Any) -> str:
        text = str(value)
        return '"' + text.replace('"', '""') + '"' if any(mark in text for mark in '\n\t"') else text

    table = [COLUMNS, *(tuple(row.get(column, "") for column in COLUMNS) for row in rows)]
    return "".join("\t".join(map(cell, row)) + "\n" for row in table)


def mmbench_row(index: int, answer: str, *options: str, **others: str) -> dict[str, Any]:
    code = base64.b64encode(picture() + bytes(200_000)).decode()  # Longer than the field limit of Python's csv
    shown = dict(zip("ABCD", options, strict=False))
    return {
        "index": index, "question": f"what is {index % 1_000_000}?", "answer": answer, **shown, "image": code,
        "category": "ocr", "l2-category": "perception", "split": "dev", **others,
    }  # fmt: skip
