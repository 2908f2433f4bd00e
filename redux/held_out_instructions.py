"""Twelve verifiable constraints that no training text teaches, to measure more than the kinds of IFEval.

Models over-fit the 25 kinds of IFEval (IFBench, arXiv 2507.02833). These constraints are of other kinds, worded here,
and a short answer about an image can follow each of them. They are held out: no training set of this project has their
texts or responses that were made to follow them.

A constraint holds for the whole response. Words are runs of letters and digits, with apostrophes and hyphens inside.
Letters are compared without upper and lower case. An answer can contradict its constraint, as "red" does without the
letter e; such prompts are the same for every model.
"""

from collections.abc import Sequence
from itertools import pairwise

import regex

from redux.instruction_form import Instruction, InstructionArgument, number_argument

_GROUP = "Held out"


def _split_words(response: str) -> list[str]:
    return [word.casefold() for word in regex.findall(r"\w+(?:['’-]\w+)*", response)]


# --- checks ----------------------------------------------------------------------------------------------------------


def _has_first_letter(response: str, letter: str) -> bool:
    letters = regex.search(r"\p{L}", response)
    return letters is not None and letters[0].casefold() == letter


def _has_no_letter(response: str, letter: str) -> bool:
    return letter not in response.casefold()


def _has_exact_words(response: str, num_words: int) -> bool:
    return len(_split_words(response)) == num_words


def _is_numbered_list(response: str, num_items: int) -> bool:
    lines = [line.strip() for line in response.strip().splitlines() if line.strip()]
    numbers = [regex.match(r"(\d+)\.\s+\S", line) for line in lines]
    return [int(number[1]) if number else None for number in numbers] == list(range(1, num_items + 1))


def _has_word_order(response: str, words: Sequence[str]) -> bool:
    response_words = _split_words(response)
    first, second = (word.casefold() for word in words)
    if first not in response_words or second not in response_words:
        return False
    return response_words.index(first) < response_words.index(second)


def _is_alphabetical(response: str, num_words: int) -> bool:
    words = _split_words(response)
    return len(words) >= num_words and all(word <= following for word, following in pairwise(words))


def _ends_in_brackets(response: str) -> bool:
    return regex.search(r"\S.*\([^()]*\w[^()]*\)$", response.strip(), regex.DOTALL) is not None


def _is_hyphenated(response: str) -> bool:
    return regex.fullmatch(r"\w+(?:-\w+)+[.!?]?", response.strip()) is not None


def _is_question(response: str) -> bool:
    text = response.strip()
    return text.endswith("?") and text.count("?") == 1 and not regex.search(r"[.!]\s", text)


def _has_capitalised_words(response: str, num_words: int) -> bool:
    words = regex.findall(r"\p{L}[\p{L}\p{M}]*", regex.sub(r"(?<=\p{L})['’]\p{L}+", "", response))
    return len(words) >= num_words and all(word[0].isupper() for word in words)


def _has_exclamation_marks(response: str, num_marks: int) -> bool:
    return response.count("!") == num_marks


def _has_labelled_lines(response: str) -> bool:
    lines = [line.strip() for line in response.strip().splitlines() if line.strip()]
    labels = (r"answer:\s*\S", r"reason:\s*\S")
    return len(lines) == 2 and all(
        regex.match(label, line, regex.IGNORECASE) for label, line in zip(labels, lines, strict=True)
    )


# --- constraints -----------------------------------------------------------------------------------------------------


def _letter_argument(letters: str) -> InstructionArgument:
    return InstructionArgument(
        sample=lambda rng, words: rng.choice(letters),
        allowed="a letter from a to z",
        is_valid=lambda value: isinstance(value, str) and regex.fullmatch(r"[A-Za-z]", value) is not None,
        normalize=str.casefold,
    )


_WORD_PAIR = InstructionArgument(
    sample=lambda rng, words: rng.sample(words, 2),
    allowed="a list of two different words",
    is_valid=lambda value: (
        isinstance(value, list)
        and len(value) == 2
        and all(isinstance(word, str) and _split_words(word) == [word.casefold()] for word in value)
        and value[0].casefold() != value[1].casefold()
    ),
)

HELD_OUT_INSTRUCTIONS: dict[str, Instruction] = {
    instruction.id: instruction
    for instruction in (
        Instruction(
            task=17,
            id="held_out:first_letter",
            name="first letter",
            group=_GROUP,
            text="Make {letter} the opening letter of what you reply.",
            check=_has_first_letter,
            arguments={"letter": _letter_argument("abhimotw")},
        ),
        Instruction(
            task=18,
            id="held_out:absent_letter",
            name="absent letter",
            group=_GROUP,
            text="Reply in such a way that the letter {letter} is never used.",
            check=_has_no_letter,
            arguments={"letter": _letter_argument("aeiost")},
        ),
        Instruction(
            task=19,
            id="held_out:exact_words",
            name="exact words",
            group=_GROUP,
            text="Your reply has to be {num_words} words long, neither more nor fewer.",
            check=_has_exact_words,
            arguments={"num_words": number_argument(3, 12)},
        ),
        Instruction(
            task=20,
            id="held_out:numbered_list",
            name="numbered list",
            group=_GROUP,
            text="Reply with a numbered list and nothing else: {num_items} lines, the first opening with 1. and each "
            "later line with the next number.",
            check=_is_numbered_list,
            arguments={"num_items": number_argument(2, 5)},
        ),
        Instruction(
            task=21,
            id="held_out:word_order",
            name="word order",
            group=_GROUP,
            text="Somewhere in your reply the word {words[0]} has to come earlier than the word {words[1]}.",
            check=_has_word_order,
            arguments={"words": _WORD_PAIR},
        ),
        Instruction(
            task=22,
            id="held_out:alphabetical_words",
            name="alphabetical words",
            group=_GROUP,
            text="Choose {num_words} or more words for your reply and sort them from A to Z.",
            check=_is_alphabetical,
            arguments={"num_words": number_argument(2, 5)},
        ),
        Instruction(
            task=23,
            id="held_out:closing_brackets",
            name="closing brackets",
            group=_GROUP,
            text="Close your reply with a short remark in round brackets (like this)",
            check=_ends_in_brackets,
        ),
        Instruction(
            task=24,
            id="held_out:hyphens",
            name="hyphens",
            group=_GROUP,
            text="Join all words of your reply with hyphens, so that no blank is left between them; a single word is "
            "not enough.",
            check=_is_hyphenated,
        ),
        Instruction(
            task=25,
            id="held_out:question",
            name="question",
            group=_GROUP,
            text="Phrase your reply as one question in return.",
            check=_is_question,
        ),
        Instruction(
            task=26,
            id="held_out:capitalised_words",
            name="capitalised words",
            group=_GROUP,
            text="Capitalise each word of your reply, and use {num_words} words or more.",
            check=_has_capitalised_words,
            arguments={"num_words": number_argument(2, 5)},
        ),
        Instruction(
            task=27,
            id="held_out:exclamation_marks",
            name="exclamation marks",
            group=_GROUP,
            text="Let your reply show excitement: {num_marks} exclamation marks in total.",
            check=_has_exclamation_marks,
            arguments={"num_marks": number_argument(1, 4)},
        ),
        Instruction(
            task=28,
            id="held_out:labelled_lines",
            name="labelled lines",
            group=_GROUP,
            text="Reply in two lines: one labelled Answer: and, below it, one labelled Reason:",
            check=_has_labelled_lines,
        ),
    )
}
"""The held-out constraints by id, numbered after the paper's sixteen tasks."""
