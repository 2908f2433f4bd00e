"""The benchmarks of understanding by name: what a model is asked, and how its responses are scored.

Each is a file of its own that reads the official files, asks as LLaVA-1.5 does, to the letter, and scores as the
official scorer does; its docstring says where the two differ and what is left out.  LLaVA's evaluation differs from
lmms-eval's: up to 128 new tokens, not 16; OCR tokens in TextVQA's prompts; only a final period dropped in GQA.

A new benchmark is a file that imports from `redux.benchmarks.benchmark`, and a line in BENCHMARKS.
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
        title="VQAv2",
        questions=vqav2.read_questions,
        metrics=vqav2.compute_metrics,
        answers=vqav2.read_answers,
        max_new_tokens=128,
        submission=vqav2.build_submission,
    ),
    "gqa": Benchmark(
        title="GQA",
        questions=gqa.read_questions,
        metrics=gqa.compute_metrics,
        answers=gqa.read_answers,
        max_new_tokens=128,
    ),
    "textvqa": Benchmark(
        title="TextVQA",
        questions=textvqa.read_questions,
        metrics=textvqa.compute_metrics,
        answers=textvqa.read_answers,
        max_new_tokens=128,
    ),
    "mme": Benchmark(
        title="MME",
        questions=mme.read_questions,
        metrics=mme.compute_metrics,
        answers=mme.read_answers,
        max_new_tokens=128,
    ),
    "mmbench": Benchmark(
        title="MMBench",
        questions=mmbench.read_questions,
        metrics=mmbench.compute_metrics,
        answers=mmbench.read_answers,
        max_new_tokens=1024,
    ),
}


def join_answers(questions: Sequence[Question], answers: Mapping[str, str]) -> tuple[list[Row], int]:
    """(rows, missing): a row for each question, in order, and how many have no answer; the response of these is None.

    answers: {question id: response}.  ValueError for one to a question that is not there.
    """
    known = {question.id for question in questions}
    if unknown := [key for key in answers if key not in known]:
        raise ValueError(f"answers: got one to {unknown[0]!r}, allowed: ids of the {len(known)} questions")
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
    return rows, len(known - answers.keys())
