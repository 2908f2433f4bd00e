"""The form of a verifiable instruction: its text, the arguments of the text, and the check of a response."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

Keywords = Sequence[str]


@dataclass(frozen=True)
class InstructionArgument:
    """An argument of an instruction.

    Args:
        sample: returns a random value, for keywords from a list of words.
        allowed: description of the allowed values.
        is_valid: tells if a value is allowed.
        normalize: change of a value before rendering and checking.
    """

    sample: Callable[[random.Random, Keywords], Any]
    allowed: str
    is_valid: Callable[[Any], bool]
    normalize: Callable[[Any], Any] = lambda value: value


@dataclass(frozen=True, kw_only=True)
class Instruction:
    """A verifiable instruction.

    Args:
        task: number in the paper, or the next ones for held-out constraints.
        id: id in IFEval, or "held_out:NAME".
        name: name for tables.
        group: group in the paper, or "Held out".
        text: text with the arguments in braces.
        check: takes a response and the arguments by name; tells if the response follows the instruction.
        arguments: arguments by their names, which are IFEval's for its instructions.
    """

    task: int
    id: str
    name: str
    group: str
    text: str
    check: Callable[..., bool]
    arguments: dict[str, InstructionArgument] = field(default_factory=dict)


def number_argument(low: int, high: int) -> InstructionArgument:
    """Build an argument of a whole number, sampled from low to high, both included."""
    return InstructionArgument(
        sample=lambda rng, words: rng.randint(low, high),
        allowed="a whole number, at least 1",
        is_valid=lambda value: type(value) is int and value >= 1,
    )
