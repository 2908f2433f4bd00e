"""VQAv2: open questions about COCO images, each answered by ten people. Goyal et al., arXiv 1612.00837.

The official scorer is vqaEval.py (GT-Vision-Lab/VQA, commit a013f004). It does not normalise an answer if all ten
people agree exactly, so "Yes" would be wrong there. LLaVA therefore submits the result of the EvalAI answer processor
(scripts/convert_vqav2_for_submission.py), and here it is scored. Answers in the official format of results have been
submitted already, so they are scored unchanged.

The paper's split, test-dev, has no public answers: the server scores the result of `build_submission`.
"""

from collections.abc import Iterator, Mapping, Sequence
from os import fspath
from typing import Any

from redux.benchmarks.benchmark import (
    SHORT_ANSWER_PROMPT,
    Metric,
    Outcome,
    Question,
    Row,
    SubmittedAnswer,
    group_metrics,
)
from redux.benchmarks.source import (
    FoundAnswer,
    Source,
    get_field,
    get_id,
    list_entries,
    match_answers,
    number_items,
    read_json,
    read_records,
)
from redux.benchmarks.vqa_text import flatten_whitespace, human_agreement, normalize_answer, normalize_as_evalai

OFFICIAL_KEYS = ("question_id", "answer")
_ANSWER_KEYS = (OFFICIAL_KEYS, ("question_id", "text"), ("id", "response"))


def read_questions(*sources: Source) -> list[Question]:
    """Read v2_OpenEnded_mscoco_*_questions.json and, if answers are public, v2_mscoco_*_annotations.json.

    Images have the names of COCO's folder of the split.

    Args:
        sources: one file or both, in any order.
    """
    question_file, content, references = _sort_sources({fspath(source): read_json(source) for source in sources})
    # Test-dev is a part of test, whose images it shares.
    subset = get_field(question_file, content, "data_subtype").replace("test-dev", "test")
    result = []
    for location, entry in list_entries(question_file, content, "questions"):
        question, image = get_id(location, entry, "question_id"), get_field(location, entry, "image_id", int)
        if references is not None and question not in references:
            raise ValueError(f"{location}: got question {question} without an annotation, allowed: those with one")
        result.append(
            Question(
                id=question,
                unit=str(image),
                image=f"COCO_{subset}_{image:012d}.jpg",
                prompt=get_field(location, entry, "question") + SHORT_ANSWER_PROMPT,
                reference={} if references is None else references[question],
            )
        )
    return result


def _sort_sources(contents: Mapping[str, Any]) -> tuple[str, Any, dict[str, dict[str, Any]] | None]:
    """Find the file of questions.

    Returns:
        (file of questions, its value, references by question id or None without a file of annotations).
    """
    question_files = [
        source for source, content in contents.items() if isinstance(content, dict) and "questions" in content
    ]
    annotation_files = [source for source in contents if source not in question_files]
    if len(question_files) != 1 or len(annotation_files) > 1:
        raise ValueError(
            f"VQAv2: got {', '.join(contents) or 'no file'}, {len(question_files)} of them with 'questions', "
            "allowed: one of questions, and at most one of annotations"
        )
    references = [_read_references(source, contents[source]) for source in annotation_files]
    [question_file] = question_files
    return question_file, contents[question_file], references[0] if references else None


def _read_references(source: str, content: Any) -> dict[str, dict[str, Any]]:
    references = {}
    for location, entry in list_entries(source, content, "annotations"):
        people = get_field(location, entry, "answers", list)
        if not people:
            raise ValueError(f"{location}: got no answers, allowed: those of ten people")
        references[get_id(location, entry, "question_id")] = {
            "answers": [
                get_field(item_location, item, "answer")
                for item_location, item in number_items(f"{location}, answers", people)
            ],
            "answer_type": get_field(location, entry, "answer_type"),
        }
    return references


def official_accuracy(response: str | None, people: Sequence[str]) -> float:
    """Compute the official accuracy of an answer, from 0 to 1.

    Args:
        response: a model's response, which is converted first; or a SubmittedAnswer, which is not.
        people: answers of people, as in the annotations.
    """
    if response is None:
        return 0.0
    answer = flatten_whitespace(response if isinstance(response, SubmittedAnswer) else normalize_as_evalai(response))
    references = [flatten_whitespace(person) for person in people]
    # The official scorer normalizes only if people disagree.
    if len(set(references)) > 1:
        answer = normalize_answer(answer)
        references = [normalize_answer(reference) for reference in references]
    return human_agreement(answer, references)


def compute_metrics(rows: Sequence[Row]) -> dict[str, Metric]:
    """Compute accuracy, and accuracy.yes/no, .number and .other; there are no metrics without answers of people."""

    def outcomes() -> Iterator[tuple[str, Outcome]]:
        for row in rows:
            if "answers" in row:
                outcome = Outcome("", row["unit"], official_accuracy(row["response"], row["answers"]))
                yield "accuracy", outcome
                yield f"accuracy.{row['answer_type']}", outcome

    return group_metrics(outcomes())


def read_answers(source: Source, questions: Sequence[Question]) -> dict[str, str]:
    """Read the official [{question_id, answer}], or lines {question_id, text} (LLaVA's) or {id, response}."""

    def iterate_answers() -> Iterator[FoundAnswer]:
        for record in read_records(source, _ANSWER_KEYS):
            response = SubmittedAnswer(record.response) if record.keys == OFFICIAL_KEYS else record.response
            yield FoundAnswer(record.location, record.id, response)

    return match_answers(iterate_answers(), {question.id for question in questions})


def build_submission(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Build EvalAI's list of {"question_id", "answer"}, in the order of the rows; a missing response is ""."""

    def convert(response: str | None) -> str:
        return response if isinstance(response, SubmittedAnswer) else normalize_as_evalai(response or "")

    return [{"question_id": int(row["id"]), "answer": convert(row["response"])} for row in rows]
