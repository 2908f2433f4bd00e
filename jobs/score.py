"""`redux score …`: files of answers, ours or another system's, scored as the benchmark's official scorer does."""

import argparse
import json
from importlib import import_module
from pathlib import Path

from redux.benchmarks import BENCHMARKS, answered
from redux.benchmarks.source import read

INSTRUCTIONS = "instructions"


def score(arguments: argparse.Namespace) -> None:
    """Prints the scores of a task's answers as JSON; for instructions, which need no questions, a line for each answer.

    ValueError for a task, a file or an answer that is not what it must be.
    """
    if arguments.task == INSTRUCTIONS:
        instructions = import_module("redux.benchmarks.instructions")  # its checkers take a second to load
        verdicts = list(instructions.score(read(arguments.answers), arguments.answers))
        print("".join(f"{json.dumps(verdict)}\n" for verdict in verdicts), end="")
        return
    if arguments.task not in BENCHMARKS:
        raise ValueError(f"TASK: got {arguments.task}, allowed: {', '.join(BENCHMARKS)}, {INSTRUCTIONS}")
    benchmark = BENCHMARKS[arguments.task]
    if not arguments.questions:
        raise ValueError(f"--questions: got none, allowed: the official files of {benchmark.title}")
    if arguments.submission and not benchmark.submission:
        allowed = ", ".join(name for name, other in BENCHMARKS.items() if other.submission)
        raise ValueError(f"--submission: got task {arguments.task}, allowed: {allowed}")
    questions = benchmark.questions(*arguments.questions)
    rows, missing = answered(questions, benchmark.answers(arguments.answers, questions))
    if arguments.submission and benchmark.submission:
        _write(arguments.submission, json.dumps(benchmark.submission(rows)))
    scores = {name: metric.score for name, metric in benchmark.metrics(rows).items()}
    print(json.dumps({"task": arguments.task, "scores": scores, "questions": len(questions), "missing": missing}))


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text)
    except OSError as error:
        raise ValueError(f"--submission: got {path}, allowed: a file that can be written; {error}") from None
