"""Conversations that teach the sixteen instructions, with other wordings than the evaluation.

The paper finds that LLaVA does not follow instructions that it knows from text once the question comes with an image.
So these conversations describe an image in words ("there is a teal circle."), the question requests a format, and the
answer has that format. The wordings differ from those of the evaluation, which are IFEval's (redux/instructions.py).

Arguments are drawn as for an evaluation, except impossible ones (fewer than one sentence) and those that do not fit
into a small model's few hundred positions (at least some hundred words).

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
"""Sentences that make an answer longer."""

PLACEHOLDER_NAMES = ("name", "place", "date", "email", "number")
"""Names of placeholders in square brackets."""


def _write_keywords(answer: str, arguments: Arguments, rng: random.Random) -> str:
    return f"the answer is {answer} with {' and '.join(arguments['keywords'])}"


def _write_placeholders(answer: str, arguments: Arguments, rng: random.Random) -> str:
    marks = " ".join(f"[{mark}]" for mark in rng.sample(PLACEHOLDER_NAMES, arguments["num_placeholders"]))
    return f"the answer is {answer} {marks}"


def _write_highlights(answer: str, arguments: Arguments, rng: random.Random) -> str:
    return " ".join(
        [
            f"*{answer}*",
            *(f"*{sentence}*" for sentence in rng.sample(FILLER_SENTENCES, arguments["num_highlights"] - 1)),
        ]
    )


def _write_sections(answer: str, arguments: Arguments, rng: random.Random) -> str:
    mark, count = arguments["section_spliter"], arguments["num_sections"]
    sentences = [answer, *_draw_fillers(count - 1, rng)]
    return "\n".join(f"{mark} {number} {sentence}" for number, sentence in enumerate(sentences, start=1))


def _write_bullets(answer: str, arguments: Arguments, rng: random.Random) -> str:
    return "\n".join(f"* {sentence}" for sentence in [answer, *_draw_fillers(arguments["num_bullets"] - 1, rng)])


def _write_sentences(answer: str, arguments: Arguments, rng: random.Random) -> str:
    count = arguments["num_sentences"] if arguments["relation"] == "at least" else 1
    return " ".join(
        f"{sentence}." for sentence in [f"The answer is {answer}", *_draw_fillers(count - 1, rng, capital=True)]
    )


def _draw_fillers(count: int, rng: random.Random, capital: bool = False) -> list[str]:
    sentences = rng.choices(FILLER_SENTENCES, k=count)
    return [sentence.capitalize() for sentence in sentences] if capital else sentences


INSTRUCTION_FORMS: dict[str, tuple[tuple[str, ...], Callable[[str, Arguments, random.Random], str]]] = {
    "punctuation:no_comma": (
        ("do not write a comma.", "leave out commas.", "your answer must be without commas."),
        lambda answer, arguments, rng: f"the answer is {answer}",
    ),
    "change_case:english_lowercase": (
        ("write in lowercase only.", "use small letters, no capital letters.", "all lowercase letters, please."),
        lambda answer, arguments, rng: f"the answer to the question is {answer}",
    ),
    "change_case:english_capital": (
        ("write in capital letters only.", "use CAPITAL letters.", "all capital letters, please."),
        lambda answer, arguments, rng: f"WHAT THE IMAGE SHOWS IS THAT THE ANSWER IS {answer.upper()}",
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
        lambda answer, arguments, rng: (
            f"the answer is {answer}.\n{arguments['postscript_marker']} {rng.choice(FILLER_SENTENCES)}"
        ),
    ),
    "detectable_format:title": (
        (
            "give it a title in double angular brackets.",
            "start with a title, such as <<title>>.",
            "your answer needs a title wrapped in << and >>.",
        ),
        lambda answer, arguments, rng: f"<<{rng.choice(FILLER_SENTENCES)}>>\nthe answer is {answer}",
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
        lambda answer, arguments, rng: f'{{"answer": "{answer}"}}',
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
        lambda answer, arguments, rng: f"the answer is {answer}",
    ),
    "combination:two_responses": (
        (
            "give two different answers, with ****** between them.",
            "answer twice, not the same, separated by ******.",
            "two responses, please, separated by six asterisks: ******.",
        ),
        lambda answer, arguments, rng: f"{answer}\n******\nthe answer is {answer}",
    ),
    "startend:end_checker": (
        ("end with: {end_phrase}", "your last words must be: {end_phrase}", "close with the phrase: {end_phrase}"),
        lambda answer, arguments, rng: f"the answer is {answer}. {arguments['end_phrase']}",
    ),
    "multi-turn:constrained_start": (
        ("start with: {starter}", "your first words must be: {starter}", "begin with the phrase: {starter}"),
        lambda answer, arguments, rng: f"{arguments['starter']} {answer}",
    ),
}
"""Wordings of each instruction, and the function from (answer, arguments, rng) to a response that follows it."""


def make_records(
    examples: Sequence[tuple[str, str, str]], seed: int = 0, taught: Sequence[str] = tuple(INSTRUCTION_FORMS)
) -> list[dict]:
    """Make one conversation per example. Instructions take turns, so that all are equally frequent.

    Args:
        examples: tuples of (description of an image, question, answer).
        seed: seed of all draws; the result is deterministic.
        taught: ids of the instructions.

    Returns:
        Records in LLaVA's form.
    """
    rng = random.Random(seed)
    names = itertools.cycle(taught)
    result = []
    for number, (description, question, answer) in enumerate(examples):
        human, gpt = add_instruction(next(names), question, answer, rng)
        turns = [{"from": "human", "value": f"{description} {human}"}, {"from": "gpt", "value": gpt}]
        result.append({"id": f"formats/{number}", "conversations": turns})
    return result


def add_instruction(name: str, question: str, answer: str, rng: random.Random) -> tuple[str, str]:
    """Add an instruction to a question. Returns the question, and the response that follows the instruction."""
    wordings, respond = INSTRUCTION_FORMS[name]
    arguments = _draw_arguments(name, rng)
    texts = {key: ", ".join(value) if key == "keywords" else value for key, value in arguments.items()}
    # The wording is drawn before the response: the order of draws determines the set.
    prompt = f"{question} {rng.choice(wordings).format(**texts)}"
    return prompt, respond(answer, arguments, rng)


def _draw_arguments(name: str, rng: random.Random) -> Arguments:
    """Draw arguments as an evaluation does, until a short answer can follow them."""
    arguments = instructions.draw_arguments(name, rng)
    while not _is_feasible(arguments):
        arguments = instructions.draw_arguments(name, rng)
    return arguments


def _is_feasible(arguments: Arguments) -> bool:
    """Return True if a short answer can follow the instruction: no "less than 1 sentence", no minimum of words."""
    if arguments.get("relation") == "less than":
        return arguments.get("num_sentences") != 1
    return "num_words" not in arguments
