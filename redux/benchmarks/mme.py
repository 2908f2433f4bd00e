"""MME: two yes-or-no questions about each image, in fourteen subtasks. Fu et al., arXiv 2306.13394.

A subtask's score is 100 × (share of questions right + share of images with both right). Ten subtasks add up to
perception, which papers call MME, at most 2000, and four to cognition, at most 800. The official scorer
eval_tool/calculation.py looks for "yes", then "no", in the first four characters of a response.

Official questions end with a request for yes or no; LLaVA requests a word or phrase instead (playground/data/eval/MME
in haotian-liu/LLaVA, commit 32cebc38). Images of a subtask lie in `images` and questions in `questions_answers_YN`, or
both in one folder.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from os import fspath
from pathlib import PurePosixPath

from redux.benchmarks.benchmark import SHORT_ANSWER_PROMPT, Metric, Outcome, Question, Row
from redux.benchmarks.source import (
    FoundAnswer,
    Source,
    get_field,
    list_files,
    match_answers,
    only_source,
    read_records,
    read_text,
)

PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
)  # fmt: skip
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
YES_OR_NO_PROMPT = "Please answer yes or no."
_ANSWER_KEYS = (("question_id", "text"), ("id", "response"))


def read_questions(*sources: Source) -> list[Question]:
    """Read the folder MME_Benchmark_release_version, with a folder for each subtask.

    A missing image gets the name of a .jpg file, so that reading it raises the error.
    """
    folder = only_source(sources).rstrip("/")
    paths = [PurePosixPath(path) for path in list_files(folder)]
    # By name without suffix, since images are .jpg or .png.
    images = {_image_key(path): str(path) for path in paths if path.suffix != ".txt"}
    result = []
    for path in paths:
        if path.suffix == ".txt" and path.parts[0] in PERCEPTION + COGNITION and len(path.parts) > 1:
            image_folder = (
                path.parent.with_name("images") if path.parent.name == "questions_answers_YN" else path.parent
            )
            image = images.get(_image_key(path), str(image_folder / f"{path.stem}.jpg"))
            result += _read_image_questions(f"{folder}/{path}", _image_key(path), image)
    if not result:
        raise ValueError(f"{folder}: got no questions, allowed: a folder with subtasks such as {PERCEPTION[0]}")
    return result


def _read_image_questions(source: str, image_key: str, image: str) -> list[Question]:
    """Read the two questions about an image."""
    result = []
    for location, line in _read_lines(source):
        question, *answer = line.strip().split("\t")
        if [text.lower() for text in answer] not in (["yes"], ["no"]):
            raise ValueError(f"{location}: got {line[:200]!r}, allowed: a question, a tab, Yes or No")
        result.append(
            Question(
                id=f"{image_key}/{_strip_prompts(question)}",
                unit=image_key,
                image=image,
                prompt=_strip_prompts(question) + SHORT_ANSWER_PROMPT,
                reference={"subtask": image_key.partition("/")[0], "answer": answer[0].lower()},
            )
        )
    if len({question.id for question in result}) != 2 or len(result) != 2:
        raise ValueError(f"{source}: got {len(result)} questions, allowed: two different ones")
    return result


def _image_key(path: PurePosixPath) -> str:
    """Return SUBTASK/STEM, which an image and its questions have in common."""
    return f"{path.parts[0]}/{path.stem}"


def _strip_prompts(question: str) -> str:
    """Remove the request for a form of the answer from a question."""
    return question.replace(YES_OR_NO_PROMPT, "").replace(SHORT_ANSWER_PROMPT.strip(), "").strip()


def _read_lines(source: str) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(read_text(source).replace("\r\n", "\n").split("\n"), 1):
        if line.strip():
            yield f"{source}: line {number}", line


def read_verdict(response: str | None) -> str:
    """Read "yes", "no" or "other" from the start of a response."""
    start = (response or "").lower()[:4]
    if "yes" in start:
        return "yes"
    return "no" if "no" in start else "other"


def compute_metrics(rows: Sequence[Row]) -> dict[str, Metric]:
    """Compute perception and cognition in points; and each subtask's points, acc and acc_plus (0 to 1)."""
    images: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        images[row["subtask"]][row["unit"]].append(read_verdict(row["response"]) == row["answer"])
    single_outcomes: dict[str, list[Outcome]] = {}
    pair_outcomes: dict[str, list[Outcome]] = {}
    for subtask, answers_by_image in images.items():
        single_outcomes[subtask] = [
            Outcome(f"{subtask}.acc", unit, float(is_right))
            for unit, answers in answers_by_image.items()
            for is_right in answers
        ]
        pair_outcomes[subtask] = [
            Outcome(f"{subtask}.acc_plus", unit, float(all(answers))) for unit, answers in answers_by_image.items()
        ]
    # The points of a subtask are the sum of both accuracies, times 100.
    result = {}
    for name, subtasks in (("perception", PERCEPTION), ("cognition", COGNITION)):
        if present := [subtask for subtask in subtasks if subtask in images]:
            outcomes = [outcome for subtask in present for outcome in single_outcomes[subtask] + pair_outcomes[subtask]]
            result[name] = Metric(outcomes, weight=100.0)
    for subtask in PERCEPTION + COGNITION:
        if subtask in images:
            result[subtask] = Metric(single_outcomes[subtask] + pair_outcomes[subtask], weight=100.0)
            result[f"{subtask}.acc"] = Metric(single_outcomes[subtask])
            result[f"{subtask}.acc_plus"] = Metric(pair_outcomes[subtask])
    return result


def read_answers(source: Source, questions: Sequence[Question]) -> dict[str, str]:
    """Read the official folder of SUBTASK.txt, or lines {id, response} or LLaVA's {question_id, prompt, text}."""
    question_ids = {question.id for question in questions}
    folder = fspath(source).rstrip("/")
    answers = _read_recorded(source, question_ids)
    if listed := [path for path in list_files(folder) if path.endswith(".txt")]:
        answers = (answer for path in listed for answer in _read_official(f"{folder}/{path}", PurePosixPath(path).stem))
    return match_answers(answers, question_ids)


def _read_official(source: str, subtask: str) -> Iterator[FoundAnswer]:
    for location, line in _read_lines(source):
        parts = line.split("\t")
        if len(parts) != 4:
            raise ValueError(f"{location}: got {len(parts)} fields, allowed: image, question, ground truth, answer")
        yield FoundAnswer(location, f"{subtask}/{PurePosixPath(parts[0]).stem}/{_strip_prompts(parts[1])}", parts[3])


def _read_recorded(source: Source, question_ids: set[str]) -> Iterator[FoundAnswer]:
    for record in read_records(source, _ANSWER_KEYS):
        id = record.id
        if id not in question_ids and "prompt" in record.fields:  # LLaVA's question_id is the path of the image
            prompt = get_field(record.location, record.fields, "prompt")
            id = f"{_image_key(PurePosixPath(id))}/{_strip_prompts(prompt)}"
        yield FoundAnswer(record.location, id, record.response)
