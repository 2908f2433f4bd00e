"""Score files of answers, from Redux or another system, as the official scorer does (`redux score`)."""

import argparse
import json
from collections.abc import Sized
from importlib import import_module
from pathlib import Path

from jobs.cli.models import INSTRUCTIONS_TASK
from redux.benchmark_titles import BENCHMARK_TITLES
from redux.benchmarks import BENCHMARKS, compute_scores, custom, join_answers
from redux.benchmarks.source import read_text


def score(arguments: argparse.Namespace) -> None:
    """Print the scores of a task's answers as JSON; for instructions, one line per answer.

    Raises:
        ValueError: the task is unknown, or a file or an answer is wrong.
    """
    if arguments.metric:
        _score_own_questions(arguments)
        return
    if arguments.task not in (*BENCHMARKS, INSTRUCTIONS_TASK):
        task_names = f"{', '.join(BENCHMARKS)}, {INSTRUCTIONS_TASK}, or --metric for questions of your own"
        raise ValueError(f"TASK: got {arguments.task or 'none'}, allowed: {task_names}")
    with_submission = [name for name, benchmark in BENCHMARKS.items() if benchmark.build_submission]
    if arguments.submission and arguments.task not in with_submission:
        raise ValueError(f"--submission: got task {arguments.task}, allowed: {', '.join(with_submission)}")
    if arguments.task == INSTRUCTIONS_TASK:
        # Imported late, because its checkers take a second to load.
        instructions = import_module("redux.benchmarks.instructions")
        verdicts = list(instructions.score_lines(read_text(arguments.answers), arguments.answers))
        _require_answers(arguments.answers, verdicts)
        print("".join(f"{json.dumps(verdict)}\n" for verdict in verdicts), end="")
        return
    benchmark = BENCHMARKS[arguments.task]
    if not arguments.questions:
        raise ValueError(f"--questions: got none, allowed: the official files of {BENCHMARK_TITLES[arguments.task]}")
    questions = benchmark.read_questions(*arguments.questions)
    if not questions:
        raise ValueError(f"--questions: got no question in {', '.join(arguments.questions)}, allowed: at least one")
    answers = benchmark.read_answers(arguments.answers, questions)
    _require_answers(arguments.answers, answers)
    rows, missing = join_answers(questions, answers)
    metrics = benchmark.compute_metrics(rows)
    if arguments.submission and benchmark.build_submission:
        _write_submission(arguments.submission, json.dumps(benchmark.build_submission(rows)))
    # A submission is scored elsewhere, so reference answers may be missing then.
    scores = compute_scores(metrics, "--questions") if metrics or not arguments.submission else {}
    print(json.dumps({"task": arguments.task, "scores": scores, "questions": len(questions), "missing": missing}))


def _score_own_questions(arguments: argparse.Namespace) -> None:
    """Print the scores of answers to a user's file of questions."""
    if arguments.task or arguments.submission:
        raise ValueError(f"--metric: got {arguments.metric} besides TASK or --submission, allowed: --metric alone")
    if len(arguments.questions or ()) != 1:
        raise ValueError("--questions: got none or several files, allowed with --metric: one")
    questions = custom.read_questions(arguments.questions[0], arguments.metric)
    if not questions:
        raise ValueError(f"--questions: got no question in {arguments.questions[0]}, allowed: at least one")
    answers = custom.read_answers(arguments.answers, questions)
    _require_answers(arguments.answers, answers)
    rows, missing = join_answers(questions, answers)
    scores = compute_scores(custom.compute_metrics(rows), "--questions")
    print(json.dumps({"metric": arguments.metric, "scores": scores, "questions": len(questions), "missing": missing}))


def _require_answers(path: str, answers: Sized) -> None:
    if not answers:
        raise ValueError(f"--answers: got no answer in {path}, allowed: at least one")


def _write_submission(path: Path, text: str) -> None:
    try:
        path.write_text(text)
    except OSError as error:
        raise ValueError(f"--submission: got {path}, allowed: a file that can be written; {error}") from None
