"""`redux instructions`: questions about images, each with each of the sixteen instructions, frozen to a file.

Arguments are drawn once, so that every model answers the same prompts; a job names the file at
`evaluate.tasks.instructions.files`.
"""

import argparse

from pipelines.data import easy_vqa
from redux.benchmarks import instructions
from redux.benchmarks.instructions import ImageQuestion
from redux.benchmarks.source import AnswerKeys, get_field, read_records

FORMS: tuple[AnswerKeys, ...] = (("question_id", "text"), ("id", "question"), ("id", "prompt"))
"""Of a question: LLaVA's files, and others."""


def freeze(arguments: argparse.Namespace) -> None:
    """Write the prompts and say how many.  ValueError where a question or the file cannot be used."""
    asked = read(arguments.questions) if arguments.questions else easy_vqa.asked()
    prompts = instructions.build_questions(asked, arguments.per_task, arguments.seed)
    try:
        instructions.write_questions(prompts, arguments.out)
    except OSError as error:
        raise ValueError(f"--out: got {arguments.out}, allowed: a file that can be written; {error}") from None
    print(f"{arguments.out}: {len(prompts)} prompts")


def read(path: str) -> list[ImageQuestion]:
    """The questions of a JSON list, JSON lines or a table; each with an image, and an answer where it is known."""
    return [
        ImageQuestion(
            id=each.id,
            image=get_field(each.location, each.fields, "image"),
            question=each.response,
            answer=get_field(each.location, each.fields, "answer") if each.fields.get("answer") else None,
        )
        for each in read_records(path, FORMS)
    ]
