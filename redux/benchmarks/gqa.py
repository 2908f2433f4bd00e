"""GQA: compositional questions made from scene graphs, with one right answer. Hudson and Manning, arXiv 1902.09506.

The official eval.py counts answers that equal the right one, over the balanced questions. LLaVA first lowers a
response and removes periods from its end (scripts/convert_gqa_for_eval.py, haotian-liu/LLaVA, commit c121f043). Here
this also happens to a file in the official format. Consistency, validity, plausibility and distribution are left out,
since they need files that GQA 1.2 no longer has.
"""

from collections.abc import Iterator, Sequence

from redux.benchmarks.benchmark import SHORT_ANSWER_PROMPT, Metric, Outcome, Question, Row, group_metrics
from redux.benchmarks.source import FoundAnswer, Source, get_field, match_answers, only_source, read_json, read_records

_ANSWER_KEYS = (("questionId", "prediction"), ("question_id", "text"), ("id", "response"))


def read_questions(*sources: Source) -> list[Question]:
    """Read testdev_balanced_questions.json: {id: {question, imageId, answer, types, isBalanced, …}, …}."""
    source = only_source(sources)
    entries = read_json(source)
    if not isinstance(entries, dict):
        raise ValueError(f"{source}: got a {type(entries).__name__}, allowed: an object of questions by id")
    result: list[Question] = []
    for id, entry in entries.items():
        location = f"{source}: question {id}"
        if not isinstance(entry, dict):
            raise ValueError(f"{location}: got a {type(entry).__name__}, allowed: an object")
        image = get_field(location, entry, "imageId")
        types = get_field(location, entry, "types", dict) if "types" in entry else {}
        reference = {name: types[name] for name in ("structural", "semantic") if name in types}
        if "answer" in entry:  # The test and challenge splits have none
            reference["answer"] = get_field(location, entry, "answer")
        result.append(
            Question(
                id=id,
                unit=image,
                image=f"{image}.jpg",
                prompt=get_field(location, entry, "question") + SHORT_ANSWER_PROMPT,
                reference={**reference, "balanced": entry.get("isBalanced", True)},
            )
        )
    return result


def is_correct(response: str | None, answer: str) -> bool:
    """Return True if a response equals the answer, ignoring case and final periods."""
    return response is not None and response.rstrip(".").lower() == answer


def compute_metrics(rows: Sequence[Row]) -> dict[str, Metric]:
    """Compute accuracy; binary and open, for questions with and without the answer in them; and accuracy by type.

    Names of types are structural.* and semantic.*.
    """

    def outcomes() -> Iterator[tuple[str, Outcome]]:
        for row in rows:
            # The official score takes balanced questions alone.
            if "answer" not in row or not row["balanced"]:
                continue
            outcome = Outcome("", row["unit"], float(is_correct(row["response"], row["answer"])))
            yield "accuracy", outcome
            if "structural" in row:
                yield "open" if row["structural"] == "query" else "binary", outcome
            for name in ("structural", "semantic"):
                if name in row:
                    yield f"{name}.{row[name]}", outcome

    return group_metrics(outcomes())


def read_answers(source: Source, questions: Sequence[Question]) -> dict[str, str]:
    """Read the official [{questionId, prediction}], or lines {question_id, text} (LLaVA's) or {id, response}."""
    records = read_records(source, _ANSWER_KEYS)
    answers = (FoundAnswer(record.location, record.id, record.response) for record in records)
    return match_answers(answers, {question.id for question in questions})
