"""Write prompts that combine questions about images with instructions (`redux instructions`).

Arguments of the instructions are drawn once, so that every model answers the same prompts. A job names the file in
`evaluate.tasks.instructions.files`, or in that of `instructions_held_out` for the held-out constraints, or in that of
`instruction_pairs` for prompts with two instructions.
"""

import argparse

from pipelines.data import easy_vqa
from redux.benchmarks import instructions
from redux.benchmarks.instructions import ImageQuestion
from redux.benchmarks.source import AnswerKeys, get_field, read_records
from redux.held_out_instructions import HELD_OUT_INSTRUCTIONS
from redux.instructions import INSTRUCTIONS

QUESTION_FORMS: tuple[AnswerKeys, ...] = (("question_id", "text"), ("id", "question"), ("id", "prompt"))
"""Names of the fields for id and text of a question, in LLaVA's files and in others."""


def write_prompts(arguments: argparse.Namespace) -> None:
    """Write the prompts and print their number; ValueError if a question or the output file cannot be used."""
    questions = read_questions(arguments.questions) if arguments.questions else easy_vqa.draw_questions()
    # Drawn with the seed, so that the same command writes the same file.
    if arguments.pairs:
        prompts = instructions.build_pair_questions(questions, arguments.per_task, arguments.seed)
    else:
        ids = HELD_OUT_INSTRUCTIONS if arguments.held_out else INSTRUCTIONS
        prompts = instructions.build_questions(questions, arguments.per_task, arguments.seed, instruction_ids=ids)
    try:
        instructions.write_questions(prompts, arguments.out)
    except OSError as error:
        raise ValueError(f"--out: got {arguments.out}, allowed: a file that can be written; {error}") from None
    print(f"{arguments.out}: {len(prompts)} prompts")


def read_questions(path: str) -> list[ImageQuestion]:
    """Read questions about images, with optional answers, from a JSON list, JSON lines or a table."""
    questions = [
        ImageQuestion(
            id=record.id,
            image=get_field(record.location, record.fields, "image"),
            question=record.response,
            answer=get_field(record.location, record.fields, "answer") if record.fields.get("answer") else None,
        )
        for record in read_records(path, QUESTION_FORMS)
    ]
    if not questions:
        raise ValueError(f"FILE: got no question in {path}, allowed: at least one")
    return questions
