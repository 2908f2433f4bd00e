"""Questions of users: a file of questions, images and answers, scored by one of five metrics.

The file has JSON lines or a JSON list. An entry is {"image", "question", "answer" or "answers"}, if wanted with "id",
"type" and, for multiple choice, "options"; or it is a LLaVA record, of which the first question and answer count. The
prompt is the question as it is written, so it must list the options. Text without an image has no `image`, or null.
Answers, ids and types may be numbers. An entry without id has its number in the file as its id.

exact      the response equals an answer, up to case, white space, quotation marks and a final mark
contains   an answer occurs in the response as whole words or as a whole number, up to case and white space; for "yes"
           and "no" the first of the two words in the response counts
vqa        VQAv2's accuracy over the answers of several people (`redux.benchmarks.vqav2`)
anls       normalised Levenshtein similarity, 0 if it is 0.5 or less (Biten et al. 2019, arXiv 1905.13648, eq. 1); the
           scorer of the DocVQA server counts exactly 0.5
choice     the response names the option of the answer: its letter first or alone, its whole text, or as in MMBench
           (`redux.benchmarks.mmbench`)
"""

import json
import math
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

from redux.benchmarks.benchmark import Metric, Outcome, Question, Row, group_metrics
from redux.benchmarks.mmbench import read_letter
from redux.benchmarks.source import (
    FoundAnswer,
    Source,
    get_field,
    get_id,
    match_answers,
    number_items,
    parse_json,
    parse_lines,
    read_records,
    read_text,
)
from redux.benchmarks.vqav2 import official_accuracy
from redux.conversation import IMAGE_TOKEN

AnswerMetric = Literal["exact", "contains", "vqa", "anls", "choice", "instructions"]
"""Metrics of users' questions; "instructions" are the prompts that `redux instructions` writes."""

MIN_PEOPLE = 4
"""Fewest answers with which VQAv2's accuracy can reach 1."""

CHOICE_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
OPTION_LINE = re.compile(r"^\s*\(?([A-Z])[.):]\s*(\S.*?)\s*$", re.MULTILINE)
"""An option in the text of a question, such as "A. a red circle"."""

STATED_LETTER = r"\b[Aa]nswer(?:\s+is)?:?\s*[(\[*\"']*([A-Z])\b(?! [a-z])"
MARKED_LETTER = r"^\s*(?:[Oo]ption\s+|[Cc]hoice\s+)?[(\[*\"']*([A-Z])[.):\]*]+(?:\s|$)"
CAPITAL_FIRST = r"^\s*(?:[Oo]ption\s+|[Cc]hoice\s+)?([B-HJ-Z])(?=[\s,])"
LETTER_ALONE = r"^[\W_]*([A-Za-z])[\W_]*$"
CHOICE_PATTERNS = tuple(map(re.compile, (STATED_LETTER, MARKED_LETTER, CAPITAL_FIRST, LETTER_ALONE)))
"""Forms of a response that names an option by its letter: "The answer is B.", "B. red", "B because …", "(b)".

The words "A" and "I" at the start of a sentence are not letters.
"""

NARROW_LETTER = r"[^\W\u0E00-\u0EFF\u2E80-\u9FFF\uAC00-\uD7AF\uF900-\uFAFF]"
"""A letter or digit of a script that separates words by blanks; Chinese, Japanese and Thai do not."""

UNTYPED = "all"
"""Type of an entry without a type."""

_ANSWER_KEYS = (("id", "response"), ("question_id", "text"), ("id", "text"))


def read_questions(
    source: Source, metric: AnswerMetric, resolve_image: Callable[[str], str] = lambda image: image
) -> list[Question]:
    """Read a file of questions for a metric.

    Args:
        source: path or URL of the file.
        metric: metric that will score the responses.
        resolve_image: function from the image of an entry to its path in the folder of the images.

    Raises:
        ValueError: names the file, the line or item, and the field of an error.
    """
    questions: list[Question] = []
    locations: dict[str, str] = {}
    for number, (location, entry) in enumerate(_read_entries(source), 1):
        fields = read_first_question(location, entry) if "conversations" in entry else entry
        question = _build_question(location, fields, number, metric, resolve_image)
        # Answers are stored by id.
        if first := locations.get(question.id):
            raise ValueError(
                f"{location}: got id {question.id!r}, which {first.removeprefix(f'{source}: ')} has, allowed: each once"
                + ("" if fields.get("id") is not None else "; an entry without id has its number as id")
            )
        locations[question.id] = location
        questions.append(question)
    return questions


def read_answers(source: Source, questions: Sequence[Question]) -> dict[str, str]:
    """Read {question id: response} from JSON lines, a list or a table of {id, response} or {question_id, text}."""
    answers = (
        FoundAnswer(record.location, record.id, record.response) for record in read_records(source, _ANSWER_KEYS)
    )
    return match_answers(answers, {question.id for question in questions})


def compute_metrics(rows: Sequence[Row]) -> dict[str, Metric]:
    """Compute accuracy, and accuracy.TYPE for each type if there are several."""
    types = list(dict.fromkeys(row["type"] for row in rows))

    def outcomes() -> Iterator[tuple[str, Outcome]]:
        for row in rows:
            outcome = Outcome("", row["unit"], score_response(row))
            yield "accuracy", outcome
            if len(types) > 1 and row["type"] != UNTYPED:
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
    text = _fold(response)
    return float(any(_contains(text, _normalize(answer)) for answer in row["answers"]))


def _contains(text: str, answer: str) -> bool:
    """Return True if a normalized text contains a normalized answer."""
    if answer in ("yes", "no"):
        first = re.search(r"\b(yes|no)\b", text)
        return first is not None and first[0] == answer
    # A blank stands before the text, because a look-behind has a fixed width.
    pattern = _bound(answer[0], before=True) + re.escape(answer) + _bound(answer[-1], before=False)
    return re.search(pattern, f" {text}") is not None


def _bound(edge: str, before: bool) -> str:
    """Make the pattern of the text next to an answer, which must not continue the answer's first or last word.

    Args:
        edge: first or last character of the answer.
        before: True for the text before the answer, False for the text after it.
    """
    if not re.match(NARROW_LETTER, edge):
        return ""
    pattern = f"(?<!{NARROW_LETTER})" if before else f"(?!{NARROW_LETTER})"
    if edge.isdigit():
        # 5 is not in 3.5, 1,500 or -5.
        pattern += r"(?<!\d[.,])(?<!\s[-−])" if before else r"(?![.,]\d)"
    return pattern


def _score_vqa(response: str, row: Row) -> float:
    return official_accuracy(response, row["answers"])


def _score_anls(response: str, row: Row) -> float:
    best = max(_levenshtein_similarity(_flatten(response), _flatten(answer)) for answer in row["answers"])
    return best if best > 0.5 else 0.0


def _score_choice(response: str, row: Row) -> float:
    return float(_read_choice(response, row["options"]) in row["answers"])


def _read_choice(response: str, options: Mapping[str, str]) -> str | None:
    """Read the letter of the option that a response names; None if it names none or several."""
    for pattern in CHOICE_PATTERNS:
        match = pattern.search(response)
        if match and match[1].upper() in options:
            return match[1].upper()
    equal = [letter for letter, text in options.items() if _normalize(text) == _normalize(response)]
    if len(equal) == 1:
        return equal[0]
    # MMBench's rule takes the article of "A blue one" for a letter.
    if re.match(r"\s*A [a-z]", response):
        quoted = [letter for letter, text in options.items() if text.lower() in response.lower()]
        if len(quoted) == 1:
            return quoted[0]
    return read_letter(response, options)


_METRICS: Mapping[str, Callable[[str, Row], float]] = {
    "exact": _score_exact,
    "contains": _score_contains,
    "vqa": _score_vqa,
    "anls": _score_anls,
    "choice": _score_choice,
}


def _flatten(text: str) -> str:
    return " ".join(text.lower().split())


def _fold(text: str) -> str:
    """Normalize a text for comparison: Unicode composition, case and white space."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _normalize(text: str) -> str:
    """Normalize an answer for comparison, also without quotation marks around it and a final mark."""
    flat = _fold(text)
    # An answer of marks alone, such as "?", keeps them.
    return flat.strip(" .!?\"'“”‘’") or flat


def _levenshtein_similarity(first: str, second: str) -> float:
    """Compute 1 - the edit distance / the longer length; 0 if it is 0.5 or less."""
    shorter, longer = sorted((len(first), len(second)))
    # At least longer - shorter edits are needed; a long response to a short answer costs no time.
    if 2 * shorter <= longer:
        return 0.0
    previous = list(range(len(second) + 1))
    for row, first_character in enumerate(first, 1):
        current = [row]
        for column, second_character in enumerate(second, 1):
            substitution = previous[column - 1] + (first_character != second_character)
            current.append(min(previous[column] + 1, current[-1] + 1, substitution))
        previous = current
    return 1 - previous[-1] / longer


def _read_entries(source: Source) -> Iterator[tuple[str, dict[str, Any]]]:
    """Read the objects of a JSON list or of JSON lines: (location, object)."""
    text = read_text(source)
    if text.lstrip()[:1] == "[":
        yield from number_items(source, parse_json(source, text))
    else:
        yield from parse_lines(source, text)


def read_first_question(location: str, record: Mapping[str, Any]) -> dict[str, Any]:
    """Read the first question of a LLaVA record and its answer, as an entry of a file of questions.

    Args:
        location: file and line or item, for errors.
        record: the record.

    Raises:
        ValueError: the conversation does not begin with a question and its answer.
    """
    turns = get_field(location, record, "conversations", list)
    if len(turns) < 2 or any(not isinstance(turn, dict) for turn in turns[:2]):
        raise ValueError(f"{location}: got conversations of {len(turns)} turns, allowed: a question and its answer")
    roles = [turn.get("from") for turn in turns[:2]]
    if roles != ["human", "gpt"]:
        raise ValueError(f"{location}: got turns from {roles[0]!r} and {roles[1]!r}, allowed: human, then gpt")
    question, answer = (get_field(f"{location}, conversations", turn, "value") for turn in turns[:2])
    other_fields = {name: record[name] for name in ("id", "image", "type") if name in record}
    return {**other_fields, "question": question.replace(IMAGE_TOKEN, "").strip(), "answer": answer}


def _build_question(
    location: str, entry: Mapping[str, Any], number: int, metric: AnswerMetric, resolve_image: Callable[[str], str]
) -> Question:
    image = None
    if entry.get("image") is not None:
        try:
            image = resolve_image(get_field(location, entry, "image"))
        except ValueError as error:
            raise ValueError(str(error) if location in str(error) else f"{location}: {error}") from None
    prompt = _to_text(location, "question", get_field(location, entry, "question"))
    if not prompt.strip() or IMAGE_TOKEN in prompt:
        raise ValueError(f"{location}: got question {prompt[:80]!r}, allowed: a text without {IMAGE_TOKEN}")
    answers = _read_answers(location, entry)
    # The accuracy of VQA compares an answer with those of several people.
    if metric == "vqa" and len(answers) < MIN_PEOPLE:
        raise ValueError(
            f"{location}: got {len(answers)} answers, allowed with metric vqa: at least {MIN_PEOPLE}; or metric exact"
        )
    id = str(number) if entry.get("id") is None else get_id(location, entry, "id")
    reference: dict[str, Any] = {
        "image": image,
        "answers": answers,
        "type": UNTYPED if entry.get("type") in (None, "") else _to_text(location, "type", entry["type"]),
        "metric": metric,
    }
    if metric == "choice":
        reference["options"] = _read_options(location, entry, prompt)
        reference["answers"] = [_find_letter(location, answer, reference["options"]) for answer in answers]
    return Question(id=id, unit=image or id, image=image, prompt=prompt, reference=reference)


def _read_answers(location: str, entry: Mapping[str, Any]) -> list[str]:
    """Read the answers of an entry: a text or a number, or a list of them, under `answers` or else `answer`."""
    key = "answers" if entry.get("answers") is not None else "answer"
    if entry.get(key) is None:
        get_field(location, entry, key)  # Raises
    values = entry[key] if isinstance(entry[key], list) else [entry[key]]
    answers = [_to_text(location, key, value) for value in values]
    if not answers or not all(answer.strip() for answer in answers):
        raise ValueError(f"{location}: got {key} {answers}, allowed: at least one, none of them empty")
    return answers


def _to_text(location: str, key: str, value: Any) -> str:
    """Return a text or a number of a file as text."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not isinstance(value, str) and not is_number:
        raise ValueError(f"{location}: got {key} = {str(value)[:80]!r}, allowed: {key}, a text or a number")
    text = value if isinstance(value, str) else json.dumps(value)
    # JSON may hold half of a surrogate pair, which no tokenizer takes.
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError(f"{location}: got {key} = {text[:80]!a}, allowed: valid Unicode")
    return text


def _read_options(location: str, entry: Mapping[str, Any], prompt: str) -> dict[str, str]:
    """Read the options by letter, from the entry or from lines of the question such as "A. red"."""
    options_field = entry.get("options")
    if options_field is None:
        options = _find_option_lines(prompt)
    elif isinstance(options_field, dict):
        options = {
            letter.upper(): _to_text(location, f"options.{letter}", text) for letter, text in options_field.items()
        }
    else:
        texts = get_field(location, entry, "options", list)
        options = dict(zip(CHOICE_LETTERS, (_to_text(location, "options", text) for text in texts), strict=False))
    if len(options) < 2 or not all(letter in CHOICE_LETTERS and letter for letter in options):
        raise ValueError(
            f"{location}: got {len(options)} options{f' {list(options)}' if options else ''}, allowed with metric "
            'choice: at least two, under options as a list or by letter, or as lines "A. …" of the question'
        )
    return options


def _find_option_lines(prompt: str) -> dict[str, str]:
    """Find the options A, B, … in their order; a line such as "Q: …" is none."""
    options: dict[str, str] = {}
    for letter, text in OPTION_LINE.findall(prompt):
        if letter == CHOICE_LETTERS[len(options) : len(options) + 1]:
            options[letter] = text
    return options


def _find_letter(location: str, answer: str, options: Mapping[str, str]) -> str:
    """Find the letter of an answer that is a letter or the text of an option."""
    # The text counts first: with options "B" and "A", the answer "B" would be ambiguous as a letter.
    letters = [letter for letter, text in options.items() if _normalize(text) == _normalize(answer)]
    plain = answer.strip().strip("().:").upper()
    if not letters and plain in options:
        return plain
    if len(letters) != 1:
        raise ValueError(f"{location}: got answer {answer!r}, allowed: {', '.join(options)}, or the text of one option")
    return letters[0]
