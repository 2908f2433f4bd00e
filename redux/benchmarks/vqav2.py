"""VQAv2: open questions about COCO images, each answered by ten people.  Goyal et al., arXiv 1612.00837.

The official scorer is vqaEval.py (GT-Vision-Lab/VQA, commit a013f004).  It leaves an answer as it is where all ten
people agree to the letter, so "Yes" would be wrong there; LLaVA therefore hands in what the EvalAI answer processor
makes of a response (scripts/convert_vqav2_for_submission.py), and so is a response scored here.  What a file in the
official format of results says is handed in already, and is scored to the letter.

The paper's split, test-dev, has no public answers: its score comes from the server, for `submission`.
"""

from collections.abc import Iterator, Mapping, Sequence
from os import fspath
from typing import Any

from redux.benchmarks.benchmark import SHORT, Metric, Outcome, Question, Row, Submitted, means
from redux.benchmarks.source import Found, Source, document, entries, field, identity, matched, numbered, records
from redux.benchmarks.vqa_text import agreement, evalai, flat, processed

OFFICIAL = ("question_id", "answer")
FORMS = (OFFICIAL, ("question_id", "text"), ("id", "response"))


def questions(*sources: Source) -> list[Question]:
    """Of v2_OpenEnded_mscoco_*_questions.json and, where people's answers are public, v2_mscoco_*_annotations.json.

    sources: one file or both, in any order.  Images are named as in COCO's folder of the split.
    """
    asked, whole, references = _sorted({fspath(source): document(source) for source in sources})
    subset = field(asked, whole, "data_subtype").replace("test-dev", "test")
    result = []
    for place, entry in entries(asked, whole, "questions"):
        question, image = identity(place, entry, "question_id"), field(place, entry, "image_id", int)
        if references is not None and question not in references:
            raise ValueError(f"{place}: got question {question} without an annotation, allowed: those with one")
        result.append(
            Question(
                id=question,
                unit=str(image),
                image=f"COCO_{subset}_{image:012d}.jpg",
                prompt=field(place, entry, "question") + SHORT,
                reference={} if references is None else references[question],
            )
        )
    return result


def _sorted(wholes: Mapping[str, Any]) -> tuple[str, Any, dict[str, dict[str, Any]] | None]:
    """The file of questions and its value, and the references of that of annotations, if there is one."""
    asked = [source for source, whole in wholes.items() if isinstance(whole, dict) and "questions" in whole]
    answered = [source for source in wholes if source not in asked]
    if len(asked) != 1 or len(answered) > 1:
        raise ValueError(
            f"VQAv2: got {', '.join(wholes) or 'no file'}, {len(asked)} of them with 'questions', "
            "allowed: one of questions, and at most one of annotations"
        )
    references = [_references(source, wholes[source]) for source in answered]
    return asked[0], wholes[asked[0]], references[0] if references else None


def _references(source: str, whole: Any) -> dict[str, dict[str, Any]]:
    references = {}
    for place, entry in entries(source, whole, "annotations"):
        people = field(place, entry, "answers", list)
        if not people:
            raise ValueError(f"{place}: got no answers, allowed: those of ten people")
        references[identity(place, entry, "question_id")] = {
            "answers": [field(where, given, "answer") for where, given in numbered(f"{place}, answers", people)],
            "answer_type": field(place, entry, "answer_type"),
        }
    return references


def accuracy(response: str | None, people: Sequence[str]) -> float:
    """The official scorer's accuracy of an answer, from 0 to 1; a response is converted first.

    people: their answers as the annotations have them.
    """
    if response is None:
        return 0.0
    answer = flat(response if isinstance(response, Submitted) else evalai(response))
    given = [flat(person) for person in people]
    if len(set(given)) > 1:
        answer, given = processed(answer), [processed(person) for person in given]
    return agreement(answer, given)


def metrics(rows: Sequence[Row]) -> dict[str, Metric]:
    """accuracy, and that of each type of answer (accuracy.yes/no, .number, .other); none without people's answers."""

    def outcomes() -> Iterator[tuple[str, Outcome]]:
        for row in rows:
            if "answers" in row:
                outcome = Outcome("", row["unit"], accuracy(row["response"], row["answers"]))
                yield "accuracy", outcome
                yield f"accuracy.{row['answer_type']}", outcome

    return means(outcomes())


def answers(source: Source, questions: Sequence[Question]) -> dict[str, str]:
    """Of the official [{question_id, answer}], or of lines {question_id, text} (LLaVA's) or {id, response}."""

    def found() -> Iterator[Found]:
        for record in records(source, FORMS):
            response = Submitted(record.response) if record.form == OFFICIAL else record.response
            yield Found(record.place, record.id, response)

    return matched(found(), {question.id for question in questions})


def submission(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """What EvalAI takes: {"question_id", "answer"} for each row, in their order; "" where there is no response."""

    def handed_in(response: str | None) -> str:
        return response if isinstance(response, Submitted) else evalai(response or "")

    return [{"question_id": int(row["id"]), "answer": handed_in(row["response"])} for row in rows]
