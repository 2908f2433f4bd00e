"""Benchmarks of understanding by name: their questions, and the scores of responses.

Each benchmark is a module that reads the official files, prompts exactly as LLaVA-1.5 and scores as the official
scorer. Its docstring lists differences between the two, and parts that are left out. LLaVA's evaluation differs from
lmms-eval's: up to 128 new tokens, not 16; OCR tokens in TextVQA's prompts; only a final period dropped in GQA.

A new benchmark is a module that imports from `redux.benchmarks.benchmark`, an entry in BENCHMARKS, and a title in
`redux.benchmark_titles`. pipelines/README.md lists all steps.
"""

from collections.abc import Mapping, Sequence

from redux.benchmarks import gqa, mmbench, mme, textvqa, vqav2
from redux.benchmarks.benchmark import Benchmark as Benchmark
from redux.benchmarks.benchmark import Metric as Metric
from redux.benchmarks.benchmark import Outcome as Outcome
from redux.benchmarks.benchmark import Question as Question
from redux.benchmarks.benchmark import Row as Row
from redux.benchmarks.benchmark import compute_scores as compute_scores

BENCHMARKS: dict[str, Benchmark] = {
    "vqav2": Benchmark(
        read_questions=vqav2.read_questions,
        compute_metrics=vqav2.compute_metrics,
        read_answers=vqav2.read_answers,
        max_new_tokens=128,
        build_submission=vqav2.build_submission,
    ),
    "gqa": Benchmark(
        read_questions=gqa.read_questions,
        compute_metrics=gqa.compute_metrics,
        read_answers=gqa.read_answers,
        max_new_tokens=128,
    ),
    "textvqa": Benchmark(
        read_questions=textvqa.read_questions,
        compute_metrics=textvqa.compute_metrics,
        read_answers=textvqa.read_answers,
        max_new_tokens=128,
    ),
    "mme": Benchmark(
        read_questions=mme.read_questions,
        compute_metrics=mme.compute_metrics,
        read_answers=mme.read_answers,
        max_new_tokens=128,
    ),
    "mmbench": Benchmark(
        read_questions=mmbench.read_questions,
        compute_metrics=mmbench.compute_metrics,
        read_answers=mmbench.read_answers,
        max_new_tokens=1024,
    ),
}


def join_answers(questions: Sequence[Question], answers: Mapping[str, str]) -> tuple[list[Row], int]:
    """Join questions and answers to rows.

    Args:
        questions: questions of a benchmark.
        answers: responses by the id of the question.

    Returns:
        (rows, missing): a row for each question, in order, and the number of questions without an answer. Their
        response is None.

    Raises:
        ValueError: an answer belongs to no question.
    """
    question_ids = {question.id for question in questions}
    if unknown := [key for key in answers if key not in question_ids]:
        raise ValueError(f"answers: got one to {unknown[0]!r}, allowed: ids of the {len(question_ids)} questions")
    rows: list[Row] = [
        {
            "id": question.id,
            "unit": question.unit,
            "prompt": question.prompt,
            "response": answers.get(question.id),
            **question.reference,
        }
        for question in questions
    ]
    return rows, len(question_ids - answers.keys())
