"""The paper's sixteen verifiable instructions: how each is drawn, asked and checked.

They are IFEval's (Zhou et al. 2023, arXiv 2311.07911).  Texts, ranges of arguments and the regular expressions that
define what counts come from google-research/instruction_following_eval, which EleutherAI/lm-evaluation-harness carries
on (lm_eval/tasks/ifeval, commit 0d2cf3b); both Apache-2.0.  The texts are benchmark data, so they stand here word for
word, slips included.  T16 is IFEval's "multi-turn:constrained_start", which its own registry has commented out: it is
the only check of a start there, and the paper's task has one.

Checks are as lenient and as odd as IFEval's, since numbers are compared with those of others: ***bold*** counts as
two highlights, a bare number is JSON, 1,000 has a comma, a start may be that of any line; and keywords, markers,
splitters and starters are regular expressions.  Different on purpose are only these:

- langdetect starts from the same seed for every text, in a detector of our own, so that order, threads and other
  users of it change nothing.  IFEval leaves it unseeded: "a man and a dog" is English in seven cases of ten.
- Arguments must all be there and fit, counts be at least 1; anything else is a ValueError.  IFEval draws anew what is
  missing, and lm-eval drops what is 0 before, so that a text is checked against a number nobody asked for.
- Brackets nested deeper than Python's JSON reader goes are not JSON.  There, they end the evaluation.

Sentences are counted by redux/sentences.py.  Words are what the library `regex` takes for such, as in NLTK since 3.10,
by which lm-eval counts them: Unicode's, in which a combining mark belongs to its word.  Older NLTK counts by `re`.

Cost: a few milliseconds for a text in one case, where the language is asked; microseconds for the others.
"""

import json
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import regex
from langdetect import LangDetectException
from langdetect.detector_factory import PROFILES_DIRECTORY, DetectorFactory

from redux.sentences import SPLITTERS, choose_splitter

NUMBER_RELATIONS = ("less than", "at least")

STARTERS = (
    "I would say",
    "My answer is",
    "I believe",
    "In my opinion",
    "I think",
    "I reckon",
    "I feel",
    "From my perspective",
    "As I see it",
    "According to me",
    "As far as I'm concerned",
    "To my understanding",
    "In my view",
    "My take on it is",
    "As per my perception",
)

_COMMON = """
    afternoon apple balance bargain beautiful blanket borrow breakfast bridge brother candle captain careful century
    chapter cheese chicken children citizen climate comfort corner country cousin danger daughter decade different
    distance doctor dream engine evening expensive famous farmer festival flower forest freedom friend garden gentle
    guitar harvest history holiday honest hospital important island journey kitchen knowledge ladder language laughter
    library machine market memory message million mirror morning mountain museum neighbour notebook ocean orchestra
    parent pencil people perhaps picture planet popular promise quality question remember restaurant river rhythm school
    science season secret shoulder silence simple station storm strange student summer surprise teacher theatre together
    tomorrow travel umbrella valley village weather weekend window winter wonderful yesterday
"""

KEYWORDS = tuple(_COMMON.split())
"""Words that keywords are drawn from: common ones, none within another, no colours or shapes.

Not IFEval's list of some 1,500, which is its own work, and has many words that fit no image.
"""

Words = Sequence[str]


@dataclass(frozen=True)
class Argument:
    """What an instruction leaves open.

    drawn: a value from chance, and for keywords from words.  allowed: in words.  fits: whether a value is.
    tidy: what IFEval does to a value before it asks and checks.
    """

    drawn: Callable[[random.Random, Words], Any]
    allowed: str
    fits: Callable[[Any], bool]
    tidy: Callable[[Any], Any] = lambda value: value


@dataclass(frozen=True, kw_only=True)
class Instruction:
    """One of the sixteen.

    task: the paper's number.  id: IFEval's.  name: for tables.  group: the paper's.
    text: with arguments in braces.  followed: the check, of a response and the arguments by name.
    """

    task: int
    id: str
    name: str
    group: str
    text: str
    followed: Callable[..., bool]
    arguments: dict[str, Argument] = field(default_factory=dict)


def draw_arguments(id: str, chance: random.Random, words: Words = KEYWORDS) -> dict[str, Any]:
    """Arguments by IFEval's names, from IFEval's ranges; keywords are two of `words`.

    ValueError where `words` are fewer than two different ones, or are no regular expressions.
    """
    instruction = _find_instruction(id)
    choice = list(dict.fromkeys(words))
    if len(choice) < 2:
        raise ValueError(f"words: got {choice}, allowed: at least two different words")
    return _check_arguments(
        instruction, {name: each.drawn(chance, choice) for name, each in instruction.arguments.items()}
    )


def render_instruction(id: str, kwargs: Mapping[str, Any]) -> str:
    """IFEval's text with the arguments put in.

    >>> render_instruction("detectable_content:postscript", {"postscript_marker": "P.S."})
    'At the end of your response, please explicitly add a postscript starting with P.S.'
    """
    instruction = _find_instruction(id)
    return instruction.text.format(**_check_arguments(instruction, kwargs))


def follows_strictly(id: str, kwargs: Mapping[str, Any], response: str) -> bool:
    """Whether the response, as it is, follows the instruction; an empty one follows none.

    kwargs: exactly the instruction's arguments; those that are None count as not there, since tables of IFEval have a
        column for the arguments of all.
    ValueError for an id that is none of the sixteen, and for an argument that is missing, unknown or does not fit.
    """
    return _any_follows(id, kwargs, [response])


def follows_loosely(id: str, kwargs: Mapping[str, Any], response: str) -> bool:
    """Whether any of eight does: without the first line, the last, or both, and each of these without asterisks."""
    lines = response.split("\n")
    cut = [response, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
    return _any_follows(id, kwargs, list(dict.fromkeys(cut + [text.replace("*", "") for text in cut])))


def _any_follows(id: str, kwargs: Mapping[str, Any], responses: Sequence[str]) -> bool:
    instruction = _find_instruction(id)
    fitting = _check_arguments(instruction, kwargs)
    return any(text.strip() and instruction.followed(text, **fitting) for text in responses)


def _find_instruction(id: str) -> Instruction:
    if id not in INSTRUCTIONS:
        raise ValueError(f"instruction_id: got {id!r}, allowed: {', '.join(INSTRUCTIONS)}")
    return INSTRUCTIONS[id]


def _check_arguments(instruction: Instruction, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments, tidied.  ValueError unless they are the instruction's, and fit."""
    wanted, id = instruction.arguments, instruction.id
    given = {name: value for name, value in kwargs.items() if value is not None}
    if unknown := [name for name in given if name not in wanted]:
        raise ValueError(f"{id}: kwargs: got {unknown[0]!r}, allowed: {', '.join(wanted) or 'none'}")
    for name, argument in wanted.items():
        if name not in given or not argument.fits(given[name]):
            got = repr(given[name]) if name in given else "nothing"
            raise ValueError(f"{id}: {name}: got {got}, allowed: {argument.allowed}")
    return {name: argument.tidy(given[name]) for name, argument in wanted.items()}


# --- what is checked -------------------------------------------------------------------------------------------------


def _no_comma(response: str) -> bool:
    return "," not in response


def _lowercase(response: str) -> bool:
    return response.islower() and _is_english(response)


def _uppercase(response: str) -> bool:
    return response.isupper() and _is_english(response)


def _is_english(text: str) -> bool:
    """As langdetect tells; a text without a feature of any language counts as English, as in IFEval."""
    detector = _load_language_detectors().create()
    try:
        detector.append(text)
        return detector.detect() == "en"
    except LangDetectException:
        return True


@cache
def _load_language_detectors() -> Any:
    """A factory of our own: langdetect's is shared by the process, and so is the seed that others may set or not."""
    factory = DetectorFactory()
    factory.set_seed(0)
    profiles = [path for path in sorted(Path(PROFILES_DIRECTORY).iterdir()) if path.is_file()]
    factory.load_json_profile([path.read_text(encoding="utf-8") for path in profiles])
    return factory


def _placeholders(response: str, num_placeholders: int) -> bool:
    return len(re.findall(r"\[.*?\]", response)) >= num_placeholders


def _postscript(response: str, postscript_marker: str) -> bool:
    return re.search(_postscript_pattern(postscript_marker), response.lower(), re.MULTILINE) is not None


def _postscript_pattern(marker: str) -> str:
    known = {"P.S.": r"p\.\s?s\.", "P.P.S": r"p\.\s?p\.\s?s"}
    return rf"\s*{known.get(marker, marker.lower())}.*$"


def _title(response: str) -> bool:
    return any(title.lstrip("<").rstrip(">").strip() for title in re.findall(r"<<[^\n]+>>", response))


def _keywords(response: str, keywords: Sequence[str]) -> bool:
    return all(re.search(keyword, response, re.IGNORECASE) for keyword in keywords)


def _highlights(response: str, num_highlights: int) -> bool:
    single, double = (re.findall(pattern, response) for pattern in (r"\*([^\n*]*)\*", r"\*\*([^\n*]*)\*\*"))
    return sum(1 for text in single + double if text.strip()) >= num_highlights


def _json(response: str) -> bool:
    text = response.strip()
    for fence in ("```json", "```Json", "```JSON", "```"):
        text = text.removeprefix(fence)
    try:
        json.loads(text.removesuffix("```").strip())
    except (ValueError, RecursionError):
        return False
    return True


def _sections(response: str, section_spliter: str, num_sections: int) -> bool:
    return len(re.split(_section_pattern(section_spliter), response)) - 1 >= num_sections


def _section_pattern(spliter: str) -> str:
    return rf"\s?{spliter}\s?\d+\s?"


def _bullets(response: str, num_bullets: int) -> bool:
    stars, dashes = (re.findall(pattern, response, re.MULTILINE) for pattern in (r"^\s*\*[^\*].*$", r"^\s*-.*$"))
    return len(stars) + len(dashes) == num_bullets


def _sentences(response: str, num_sentences: int, relation: str) -> bool:
    return _compare_count(len(SPLITTERS[choose_splitter()](response)), relation, num_sentences)


def _words(response: str, num_words: int, relation: str) -> bool:
    # NLTK 3.10 searches by this library, whose words have combining marks within; re's end before each
    return _compare_count(len(regex.findall(r"\w+", response)), relation, num_words)


def _compare_count(count: int, relation: str, bound: int) -> bool:
    return count < bound if relation == "less than" else count >= bound


def _two_responses(response: str) -> bool:
    parts = [part.strip() for part in response.split("******")]
    said = [part for part in parts if part]
    return all(parts[1:-1]) and len(said) == 2 and said[0] != said[1]


def _ending(response: str, end_phrase: str) -> bool:
    return response.strip().strip('"').lower().endswith(end_phrase.lower())


def _start(response: str, starter: str) -> bool:
    return re.search(_start_pattern(starter), response, re.MULTILINE) is not None


def _start_pattern(starter: str) -> str:
    return rf"^\s*{starter}.*$"


# --- the sixteen -----------------------------------------------------------------------------------------------------


def _number_argument(low: int, high: int) -> Argument:
    return Argument(
        drawn=lambda chance, words: chance.randint(low, high),
        allowed="a whole number, at least 1",
        fits=lambda value: type(value) is int and value >= 1,
    )


def _phrase_argument(*usual: str, pattern: Callable[[str], str] = re.escape) -> Argument:
    """A text, by chance one of the usual; `pattern` makes of it what the check searches for."""
    return Argument(
        drawn=lambda chance, words: chance.choice(usual),
        allowed=f"a text that can stand in a regular expression, such as {usual[0]!r}",
        fits=lambda value: isinstance(value, str) and bool(value.strip()) and _compiles(pattern(value.strip())),
        tidy=str.strip,
    )


def _compiles(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError):
        return False
    return True


_RELATION = Argument(
    drawn=lambda chance, words: chance.choice(NUMBER_RELATIONS),
    allowed=" or ".join(map(repr, NUMBER_RELATIONS)),
    fits=lambda value: isinstance(value, str) and value in NUMBER_RELATIONS,
)

_TWO_WORDS = Argument(
    drawn=lambda chance, words: chance.sample(words, 2),
    allowed="a list of texts that are regular expressions",
    fits=lambda value: (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(each, str) and bool(each) and _compiles(each) for each in value)
    ),
    tidy=sorted,
)

_FORMATTING = "Text formatting"
_CONTENT = "Including required content"
_FORMAT = "Specific format"
_LENGTH = "Length limit"
_OTHER = "Other"

INSTRUCTIONS: dict[str, Instruction] = {
    each.id: each
    for each in (
        Instruction(
            task=1,
            id="punctuation:no_comma",
            name="no comma",
            group=_FORMATTING,
            text="In your entire response, refrain from the use of any commas.",
            followed=_no_comma,
        ),
        Instruction(
            task=2,
            id="change_case:english_lowercase",
            name="lowercase",
            group=_FORMATTING,
            text="Your entire response should be in English, and in all lowercase letters. No capital letters are "
            "allowed.",
            followed=_lowercase,
        ),
        Instruction(
            task=3,
            id="change_case:english_capital",
            name="uppercase",
            group=_FORMATTING,
            text="Your entire response should be in English, and in all capital letters.",
            followed=_uppercase,
        ),
        Instruction(
            task=4,
            id="detectable_content:number_placeholders",
            name="placeholders",
            group=_CONTENT,
            text="The response must contain at least {num_placeholders} placeholders represented by square brackets, "
            "such as [address].",
            followed=_placeholders,
            arguments={"num_placeholders": _number_argument(1, 4)},
        ),
        Instruction(
            task=5,
            id="detectable_content:postscript",
            name="postscript",
            group=_CONTENT,
            text="At the end of your response, please explicitly add a postscript starting with {postscript_marker}",
            followed=_postscript,
            arguments={"postscript_marker": _phrase_argument("P.S.", "P.P.S", pattern=_postscript_pattern)},
        ),
        Instruction(
            task=6,
            id="detectable_format:title",
            name="title",
            group=_CONTENT,
            text="Your answer must contain a title, wrapped in double angular brackets, such as <<poem of joy>>.",
            followed=_title,
        ),
        Instruction(
            task=7,
            id="keywords:existence",
            name="keywords",
            group=_CONTENT,
            text="Include keywords {keywords} in the response.",
            followed=_keywords,
            arguments={"keywords": _TWO_WORDS},
        ),
        Instruction(
            task=8,
            id="detectable_format:number_highlighted_sections",
            name="highlights",
            group=_FORMAT,
            text="Highlight at least {num_highlights} sections in your answer with markdown, i.e. *highlighted "
            "section*.",
            followed=_highlights,
            arguments={"num_highlights": _number_argument(1, 4)},
        ),
        Instruction(
            task=9,
            id="detectable_format:json_format",
            name="json",
            group=_FORMAT,
            text="Entire output should be wrapped in JSON format. You can use markdown ticks such as ```.",
            followed=_json,
        ),
        Instruction(
            task=10,
            id="detectable_format:multiple_sections",
            name="sections",
            group=_FORMAT,
            text="Your response must have {num_sections} sections. Mark the beginning of each section with "
            "{section_spliter} X, such as:\n{section_spliter} 1\n[content of section 1]\n{section_spliter} 2\n"
            "[content of section 2]",
            followed=_sections,
            arguments={
                "section_spliter": _phrase_argument("Section", "SECTION", pattern=_section_pattern),
                "num_sections": _number_argument(1, 5),
            },
        ),
        Instruction(
            task=11,
            id="detectable_format:number_bullet_lists",
            name="bullets",
            group=_FORMAT,
            text="Your answer must contain exactly {num_bullets} bullet points. Use the markdown bullet points such "
            "as:\n* This is point 1. \n* This is point 2",
            followed=_bullets,
            arguments={"num_bullets": _number_argument(1, 5)},
        ),
        Instruction(
            task=12,
            id="length_constraints:number_sentences",
            name="sentences",
            group=_LENGTH,
            text="Your response should contain {relation} {num_sentences} sentences.",
            followed=_sentences,
            arguments={"num_sentences": _number_argument(1, 20), "relation": _RELATION},
        ),
        Instruction(
            task=13,
            id="length_constraints:number_words",
            name="words",
            group=_LENGTH,
            text="Answer with {relation} {num_words} words.",
            followed=_words,
            arguments={"num_words": _number_argument(100, 500), "relation": _RELATION},
        ),
        Instruction(
            task=14,
            id="combination:two_responses",
            name="two responses",
            group=_OTHER,
            text="Give two different responses. Responses and only responses should be separated by 6 asterisk "
            "symbols: ******.",
            followed=_two_responses,
        ),
        Instruction(
            task=15,
            id="startend:end_checker",
            name="ending",
            group=_OTHER,
            text="Finish your response with this exact phrase {end_phrase}. No other words should follow this phrase.",
            followed=_ending,
            arguments={
                "end_phrase": _phrase_argument("Any other questions?", "Is there anything else I can help with?")
            },
        ),
        Instruction(
            task=16,
            id="multi-turn:constrained_start",
            name="start",
            group=_OTHER,
            text="During the conversation, when it is your turn, please always start with {starter}",
            followed=_start,
            arguments={"starter": _phrase_argument(*STARTERS, pattern=_start_pattern)},
        ),
    )
}
"""The sixteen by IFEval's id, in the paper's order."""
