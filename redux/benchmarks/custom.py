"""Questions of users: a file of questions, images and answers, scored by one of five metrics.

The file has JSON lines or a JSON list.  An entry is {"image", "question", "answer" or "answers"}, if wanted with "id",
"type" and, for multiple choice, "options"; or it is a LLaVA record, of which the first question and answer count.  The
prompt is the question as it is written.  Text without an image has no `image`, or null.

exact      the response equals an answer, up to case, white space, quotation marks and a final mark
contains   an answer occurs in the response as whole words, up to case and white space
vqa        VQAv2's accuracy over the answers of several people (`redux.benchmarks.vqav2`)
anls       normalised Levenshtein similarity, 0 if below 0.5 (Biten et al. 2019, arXiv 1905.13648, eq. 1)
choice     the response names the option of the answer, read as in MMBench (`redux.benchmarks.mmbench`)
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

from redux.benchmarks.benchmark import Metric, Outcome, Question, Row, group_metrics
from redux.benchmarks.mmbench import read_letter
from redux.benchmarks.source import (
    Source,
    get_field,
    get_id,
    get_texts,
    number_items,
    parse_json,
    parse_lines,
    read_text,
)
from redux.benchmarks.vqav2 import official_accuracy
from redux.conversation import IMAGE_TOKEN

AnswerMetric = Literal["exact", "contains", "vqa", "anls", "choice", "instructions"]
"""Metrics of users' questions; "instructions" are the prompts that `redux instructions` writes."""

MIN_PEOPLE = 4
"""Fewest answers with which VQAv2's accuracy can reach 1."""

OPTION_LINE = re.compile(r"^\s*\(?([A-Z])[.):]\s*(\S.*?)\s*$", re.MULTILINE)
"""An option in the text of a question, such as "A. a red circle"."""


def read_questions(source: Source, metric: AnswerMetric) -> list[Question]:
    """Read a file of questions for a metric; a ValueError names the file, the line and the field of an error."""
    return [
        _build_question(location, _read_llava(location, entry) if "conversations" in entry else entry, number, metric)
        for number, (location, entry) in enumerate(_read_entries(source), 1)
    ]


def compute_metrics(rows: Sequence[Row]) -> dict[str, Metric]:
    """Compute accuracy, and accuracy.TYPE for each type if there are several."""
    types = list(dict.fromkeys(row["type"] for row in rows))

    def outcomes() -> Iterator[tuple[str, Outcome]]:
        for row in rows:
            outcome = Outcome("", row["unit"], score_response(row))
            yield "accuracy", outcome
            if len(types) > 1:
                yield f"accuracy.{row['type']}", outcome

    return group_metrics(outcomes())


def score_response(row: Row) -> float:
    """Score the response of a row from 0 to 1 by the row's own metric; 0 for a missing one."""
    if row["response"] is None:
        return 0.0
    return _METRICS[row["metric"]](row["response"], row)


def _score_exact(response: str, row: Row) -> float:
    return float(_normalize(response) in map(_normalize, row["answers"]))


def _score_contains(response: str, row: Row) -> float:
    text = _normalize(response)
    return float(any(re.search(rf"(?<!\w){re.escape(_normalize(answer))}(?!\w)", text) for answer in row["answers"]))


def _score_vqa(response: str, row: Row) -> float:
    return official_accuracy(response, row["answers"])


def _score_anls(response: str, row: Row) -> float:
    similarities = (_levenshtein_similarity(_flatten(response), _flatten(answer)) for answer in row["answers"])
    best = max(similarities)
    return best if best >= 0.5 else 0.0


def _score_choice(response: str, row: Row) -> float:
    return float(read_letter(response, row["options"]) in row["answers"])


_METRICS: Mapping[str, Callable[[str, Row], float]] = {
    "exact": _score_exact,
    "contains": _score_contains,
    "vqa": _score_vqa,
    "anls": _score_anls,
    "choice": _score_choice,
}


def _flatten(text: str) -> str:
    return " ".join(text.lower().split())


def _normalize(text: str) -> str:
    """Normalize a text for comparison: case, white space, and marks around it."""
    return _flatten(text).strip(" .!?\"'“”‘’")


def _levenshtein_similarity(first: str, second: str) -> float:
    """Compute 1 - the edit distance / the longer length."""
    previous = list(range(len(second) + 1))
    for row, character in enumerate(first, 1):
        current = [row]
        for column, other in enumerate(second, 1):
            current.append(min(previous[column] + 1, current[-1] + 1, previous[column - 1] + (character != other)))
        previous = current
    return 1 - previous[-1] / max(len(first), len(second), 1)


def _read_entries(source: Source) -> Iterator[tuple[str, dict[str, Any]]]:
    """Read the objects of a JSON list or of JSON lines: (location, object)."""
    text = read_text(source)
    if text.lstrip()[:1] == "[":
        yield from number_items(source, parse_json(source, text))
    else:
        yield from parse_lines(source, text)


def _read_llava(location: str, record: Mapping[str, Any]) -> dict[str, Any]:
    """Read the first question and its answer from a LLaVA record."""
    turns = get_field(location, record, "conversations", list)
    if len(turns) < 2 or any(not isinstance(turn, dict) for turn in turns[:2]):
        raise ValueError(f"{location}: got conversations of {len(turns)} turns, allowed: a question and its answer")
    roles = [turn.get("from") for turn in turns[:2]]
    if roles != ["human", "gpt"]:
        raise ValueError(f"{location}: got turns from {roles[0]!r} and {roles[1]!r}, allowed: human, then gpt")
    question, answer = (get_field(f"{location}, conversations", turn, "value") for turn in turns[:2])
    others = {name: record[name] for name in ("id", "image", "type") if name in record}
    return {**others, "question": question.replace(IMAGE_TOKEN, "").strip(), "answer": answer}


def _build_question(location: str, entry: Mapping[str, Any], number: int, metric: AnswerMetric) -> Question:
    image = None if entry.get("image") is None else get_field(location, entry, "image")
    prompt = get_field(location, entry, "question")
    if not prompt.strip() or IMAGE_TOKEN in prompt:
        raise ValueError(f"{location}: got question {prompt!r}, allowed: a text without {IMAGE_TOKEN}")
    answers = get_texts(location, entry, "answers") if "answers" in entry else [get_field(location, entry, "answer")]
    if not answers or not all(answer.strip() for answer in answers):
        raise ValueError(f"{location}: got answers {answers}, allowed: at least one, none of them empty")
    if metric == "vqa" and len(answers) < MIN_PEOPLE:
        raise ValueError(
            f"{location}: got {len(answers)} answers, allowed with metric vqa: at least {MIN_PEOPLE}; or metric exact"
        )
    id = get_id(location, entry, "id") if "id" in entry else str(number)
    reference: dict[str, Any] = {
        "image": image,
        "answers": answers,
        "type": str(entry.get("type") or "all"),
        "metric": metric,
    }
    if metric == "choice":
        reference["options"] = _read_options(location, entry, prompt)
        reference["answers"] = [_find_letter(location, answer, reference["options"]) for answer in answers]
    return Question(id=id, unit=image or id, image=image, prompt=prompt, reference=reference)


def _read_options(location: str, entry: Mapping[str, Any], prompt: str) -> dict[str, str]:
    """Read the options by letter, from the entry or from lines of the question such as "A. red"."""
    if "options" not in entry:
        options = dict(OPTION_LINE.findall(prompt))
    elif isinstance(entry["options"], dict):
        options = {letter: get_field(f"{location}, options", entry["options"], letter) for letter in entry["options"]}
    else:
        texts = get_texts(location, entry, "options")
        options = {chr(ord("A") + position): text for position, text in enumerate(texts[:26])}
    if len(options) < 2:
        raise ValueError(
            f"{location}: got {len(options)} options, allowed with metric choice: at least two, under options or as "
            'lines "A. …" of the question'
        )
    return options


def _find_letter(location: str, answer: str, options: Mapping[str, str]) -> str:
    """Find the letter of an answer that is a letter or the text of an option."""
    plain = answer.strip().strip("().")
    letters = [plain] if plain in options else [letter for letter, text in options.items() if text == answer]
    if len(letters) != 1:
        raise ValueError(f"{location}: got answer {answer!r}, allowed: {', '.join(options)}, or the text of an option")
    return letters[0]
