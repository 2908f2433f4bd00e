"""Conversations that teach the sixteen instructions, in words of their own.

What the paper finds missing in LLaVA is this: that instructions known from text are obeyed when an image comes with the
question.  So here an image is told in words ("there is a teal circle."), the question about it asks for a form, and the
answer has that form.  The wordings are none of those that an evaluation uses, which are IFEval's
(redux/instructions.py).

Arguments are drawn as for an evaluation, but for what nobody could meet (fewer than one sentence) and what a small
model's few hundred positions could not hold (at least some hundred words).

    {"id": "formats/7", "conversations": [{"from": "human", "value": "there is … . what … ? answer in JSON."},
     {"from": "gpt", "value": "{\\"answer\\": \\"teal\\"}"}]}
"""

import itertools
import random
from collections.abc import Callable, Sequence
from typing import Any

from redux import instructions

Arguments = dict[str, Any]

FILLER_SENTENCES = ("that is all", "this is what it shows", "nothing else is there", "so it is", "look at it again")
"""Sentences that an answer is drawn out with."""

PLACEHOLDER_NAMES = ("name", "place", "date", "email", "number")
"""Placeholders."""


def _write_keywords(answer: str, given: Arguments, chance: random.Random) -> str:
    return f"the answer is {answer} with {' and '.join(given['keywords'])}"


def _write_placeholders(answer: str, given: Arguments, chance: random.Random) -> str:
    marks = " ".join(f"[{mark}]" for mark in chance.sample(PLACEHOLDER_NAMES, given["num_placeholders"]))
    return f"the answer is {answer} {marks}"


def _write_highlights(answer: str, given: Arguments, chance: random.Random) -> str:
    return " ".join(
        [f"*{answer}*", *(f"*{each}*" for each in chance.sample(FILLER_SENTENCES, given["num_highlights"] - 1))]
    )


def _write_sections(answer: str, given: Arguments, chance: random.Random) -> str:
    mark, count = given["section_spliter"], given["num_sections"]
    said = [answer, *_draw_fillers(count - 1, chance)]
    return "\n".join(f"{mark} {number} {each}" for number, each in enumerate(said, start=1))


def _write_bullets(answer: str, given: Arguments, chance: random.Random) -> str:
    return "\n".join(f"* {each}" for each in [answer, *_draw_fillers(given["num_bullets"] - 1, chance)])


def _write_sentences(answer: str, given: Arguments, chance: random.Random) -> str:
    count = given["num_sentences"] if given["relation"] == "at least" else 1
    return " ".join(f"{each}." for each in [f"The answer is {answer}", *_draw_fillers(count - 1, chance, capital=True)])


def _draw_fillers(count: int, chance: random.Random, capital: bool = False) -> list[str]:
    said = chance.choices(FILLER_SENTENCES, k=count)
    return [each.capitalize() for each in said] if capital else said


INSTRUCTION_FORMS: dict[str, tuple[tuple[str, ...], Callable[[str, Arguments, random.Random], str]]] = {
    "punctuation:no_comma": (
        ("do not write a comma.", "leave out commas.", "your answer must be without commas."),
        lambda answer, given, chance: f"the answer is {answer}",
    ),
    "change_case:english_lowercase": (
        ("write in lowercase only.", "use small letters, no capital letters.", "all lowercase letters, please."),
        lambda answer, given, chance: f"the answer to the question is {answer}",
    ),
    "change_case:english_capital": (
        ("write in capital letters only.", "use CAPITAL letters.", "all capital letters, please."),
        lambda answer, given, chance: f"WHAT THE IMAGE SHOWS IS THAT THE ANSWER IS {answer.upper()}",
    ),
    "detectable_content:number_placeholders": (
        (
            "put {num_placeholders} placeholders in square brackets.",
            "add at least {num_placeholders} placeholders such as [name].",
            "use square brackets for {num_placeholders} placeholders.",
        ),
        _write_placeholders,
    ),
    "detectable_content:postscript": (
        (
            "end with a postscript that starts with {postscript_marker}",
            "add a postscript, {postscript_marker}, at the end.",
            "close with the postscript {postscript_marker}",
        ),
        lambda answer, given, chance: (
            f"the answer is {answer}.\n{given['postscript_marker']} {chance.choice(FILLER_SENTENCES)}"
        ),
    ),
    "detectable_format:title": (
        (
            "give it a title in double angular brackets.",
            "start with a title, such as <<title>>.",
            "your answer needs a title wrapped in << and >>.",
        ),
        lambda answer, given, chance: f"<<{chance.choice(FILLER_SENTENCES)}>>\nthe answer is {answer}",
    ),
    "keywords:existence": (
        ("use the keywords {keywords}.", "the keywords {keywords} must be there.", "include the words {keywords}."),
        _write_keywords,
    ),
    "detectable_format:number_highlighted_sections": (
        (
            "highlight {num_highlights} sections with markdown, *like this*.",
            "put {num_highlights} highlighted parts between asterisks.",
            "at least {num_highlights} sections must be highlighted.",
        ),
        _write_highlights,
    ),
    "detectable_format:json_format": (
        ("answer in JSON.", "use the JSON format.", "your output must be JSON, wrapped in braces."),
        lambda answer, given, chance: f'{{"answer": "{answer}"}}',
    ),
    "detectable_format:multiple_sections": (
        (
            "write {num_sections} sections, each with {section_spliter} and its number.",
            "make {num_sections} sections that begin with {section_spliter}.",
            "divide it into {num_sections} sections marked {section_spliter} 1 and so on.",
        ),
        _write_sections,
    ),
    "detectable_format:number_bullet_lists": (
        (
            "answer with {num_bullets} bullet points.",
            "make a list of exactly {num_bullets} bullets.",
            "use {num_bullets} markdown bullet points.",
        ),
        _write_bullets,
    ),
    "length_constraints:number_sentences": (
        ("write {relation} {num_sentences} sentences.", "use {relation} {num_sentences} sentences."),
        _write_sentences,
    ),
    "length_constraints:number_words": (
        ("write {relation} {num_words} words.", "use {relation} {num_words} words."),
        lambda answer, given, chance: f"the answer is {answer}",
    ),
    "combination:two_responses": (
        (
            "give two different answers, with ****** between them.",
            "answer twice, not the same, separated by ******.",
            "two responses, please, separated by six asterisks: ******.",
        ),
        lambda answer, given, chance: f"{answer}\n******\nthe answer is {answer}",
    ),
    "startend:end_checker": (
        ("end with: {end_phrase}", "your last words must be: {end_phrase}", "close with the phrase: {end_phrase}"),
        lambda answer, given, chance: f"the answer is {answer}. {given['end_phrase']}",
    ),
    "multi-turn:constrained_start": (
        ("start with: {starter}", "your first words must be: {starter}", "begin with the phrase: {starter}"),
        lambda answer, given, chance: f"{given['starter']} {answer}",
    ),
}
"""By instruction: wordings that ask for it, and what makes an answer of that form."""


def make_records(told: Sequence[tuple[str, str, str]], seed: int = 0) -> list[dict]:
    """One conversation for each (description, question, answer); instructions take turns, so that all are as frequent.

    Deterministic in its arguments.
    """
    chance = random.Random(seed)
    names = itertools.cycle(INSTRUCTION_FORMS)
    result = []
    for number, (description, question, answer) in enumerate(told):
        human, gpt = add_instruction(next(names), question, answer, chance)
        turns = [{"from": "human", "value": f"{description} {human}"}, {"from": "gpt", "value": gpt}]
        result.append({"id": f"formats/{number}", "conversations": turns})
    return result


def add_instruction(name: str, question: str, answer: str, chance: random.Random) -> tuple[str, str]:
    """The question with an instruction, and the answer that follows it."""
    wordings, form = INSTRUCTION_FORMS[name]
    given = _draw_arguments(name, chance)
    shown = {key: ", ".join(value) if key == "keywords" else value for key, value in given.items()}
    return f"{question} {chance.choice(wordings).format(**shown)}", form(answer, given, chance)


def _draw_arguments(name: str, chance: random.Random) -> Arguments:
    """Arguments as an evaluation draws them, that a short answer can meet."""
    while not _is_feasible(given := instructions.draw_arguments(name, chance)):
        pass
    return given


def _is_feasible(given: Arguments) -> bool:
    if given.get("relation") == "less than":
        return given.get("num_sentences") != 1
    return "num_words" not in given
