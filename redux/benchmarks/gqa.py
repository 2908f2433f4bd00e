"""GQA: compositional questions made from scene graphs, with one right answer.  Hudson and Manning, arXiv 1902.09506.

The official eval.py counts an answer that is equal to the right one, over the balanced questions.  LLaVA lowers a
response and takes periods from its end before (scripts/convert_gqa_for_eval.py, haotian-liu/LLaVA, commit c121f043);
so is done here, also with a file in the official format.  Consistency, validity, plausibility and distribution, which
need files that GQA 1.2 no longer has, are left out.
"""

from collections.abc import Iterator, Sequence

from redux.benchmarks.benchmark import SHORT, Metric, Outcome, Question, Row, means
from redux.benchmarks.source import Found, Source, document, field, matched, one, records

FORMS = (("questionId", "prediction"), ("question_id", "text"), ("id", "response"))


def questions(*sources: Source) -> list[Question]:
    """Of testdev_balanced_questions.json: {id: {question, imageId, answer, types, isBalanced, …}, …}."""
    source = one(sources)
    whole = document(source)
    if not isinstance(whole, dict):
        raise ValueError(f"{source}: got a {type(whole).__name__}, allowed: an object of questions by id")
    result = []
    for number, entry in whole.items():
        place = f"{source}: question {number}"
        if not isinstance(entry, dict):
            raise ValueError(f"{place}: got a {type(entry).__name__}, allowed: an object")
        image = field(place, entry, "imageId")
        types = field(place, entry, "types", dict) if "types" in entry else {}
        reference = {name: types[name] for name in ("structural", "semantic") if name in types}
        if "answer" in entry:  # the test and challenge splits have none
            reference["answer"] = field(place, entry, "answer")
        result.append(
            Question(
                id=number,
                unit=image,
                image=f"{image}.jpg",
                prompt=field(place, entry, "question") + SHORT,
                reference={**reference, "balanced": entry.get("isBalanced", True)},
            )
        )
    return result


def correct(response: str | None, answer: str) -> bool:
    """Whether a response is the answer, but for capitals and periods at its end."""
    return response is not None and response.rstrip(".").lower() == answer


def metrics(rows: Sequence[Row]) -> dict[str, Metric]:
    """accuracy; binary and open, by whether the answer is given in the question; structural.* and semantic.* types."""

    def outcomes() -> Iterator[tuple[str, Outcome]]:
        for row in rows:
            if "answer" not in row or not row["balanced"]:
                continue
            outcome = Outcome("", row["unit"], float(correct(row["response"], row["answer"])))
            yield "accuracy", outcome
            if "structural" in row:
                yield "open" if row["structural"] == "query" else "binary", outcome
            for name in ("structural", "semantic"):
                if name in row:
                    yield f"{name}.{row[name]}", outcome

    return means(outcomes())


def answers(source: Source, questions: Sequence[Question]) -> dict[str, str]:
    """Of the official [{questionId, prediction}], or of lines {question_id, text} (LLaVA's) or {id, response}."""
    found = (Found(record.place, record.id, record.response) for record in records(source, FORMS))
    return matched(found, {question.id for question in questions})
