"""The paper's sixteen verifiable instructions: their arguments, texts and checks.

They are IFEval's (Zhou et al. 2023, arXiv 2311.07911). Texts, ranges of arguments and regular expressions come from
google-research/instruction_following_eval, which EleutherAI/lm-evaluation-harness maintains (lm_eval/tasks/ifeval,
commit 0d2cf3b); both Apache-2.0. The texts are benchmark data, so they are copied word for word, with their mistakes.
T16 is IFEval's "multi-turn:constrained_start", which its registry comments out. It is IFEval's only check of a start,
and the paper has such a task.

Checks are as lenient and as odd as IFEval's, so that scores are comparable: ***bold*** counts as two highlights, a bare
number is JSON, 1,000 has a comma, and a start may be that of any line. Keywords, markers, splitters and starters are
regular expressions. There are only these differences:

- langdetect has the same seed for every text, in a detector of this module, so that order, threads and other users of
  langdetect change nothing. IFEval sets no seed: "a man and a dog" is English in seven of ten cases.
- All arguments must be present and valid, counts at least 1; otherwise a ValueError is raised. IFEval samples a
  missing argument, and lm-eval drops an argument of 0, so that the number checked was not in the prompt.
- Brackets nested too deeply for Python's JSON reader are not JSON. In IFEval they end the evaluation.

All functions also take the constraints of `redux.held_out_instructions`, which are not part of IFEval.

`redux.sentences` splits sentences. Words are matches of the library `regex`, as in NLTK since 3.10, which lm-eval
uses: in Unicode a combining mark belongs to its word. Older NLTK matches with `re`.

Cost: a few milliseconds for a check of upper or lower case, which detects the language; microseconds for the others.
"""

import json
import random
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import regex
from langdetect import LangDetectException
from langdetect.detector_factory import PROFILES_DIRECTORY, DetectorFactory

from redux.held_out_instructions import HELD_OUT_INSTRUCTIONS
from redux.instruction_form import Instruction, InstructionArgument, Keywords, number_argument
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
"""Words to sample keywords from: common words, none part of another, no colours or shapes.

IFEval's list of about 1,500 words is not copied: it is a work of its authors, and many of its words fit no image.
"""


def draw_arguments(id: str, rng: random.Random, words: Keywords = KEYWORDS) -> dict[str, Any]:
    """Sample the arguments of an instruction from IFEval's ranges.

    Args:
        id: IFEval's id.
        rng: source of randomness.
        words: words to sample two keywords from.

    Returns:
        Values by IFEval's names.

    Raises:
        ValueError: `words` has fewer than two different words, or one that is not a regular expression.
    """
    instruction = _find_instruction(id)
    unique_words = list(dict.fromkeys(words))
    if len(unique_words) < 2:
        raise ValueError(f"words: got {unique_words}, allowed: at least two different words")
    return _check_arguments(
        instruction, {name: argument.sample(rng, unique_words) for name, argument in instruction.arguments.items()}
    )


def render_instruction(id: str, kwargs: Mapping[str, Any]) -> str:
    """Render IFEval's text with its arguments.

    >>> render_instruction("detectable_content:postscript", {"postscript_marker": "P.S."})
    'At the end of your response, please explicitly add a postscript starting with P.S.'
    """
    instruction = _find_instruction(id)
    return instruction.text.format(**_check_arguments(instruction, kwargs))


def follows_strictly(id: str, kwargs: Mapping[str, Any], response: str) -> bool:
    """Return True if the unchanged response follows the instruction. An empty response follows none.

    Args:
        id: IFEval's id.
        kwargs: exactly the instruction's arguments. None counts as missing, since tables of IFEval have a column for
            each argument of any instruction.
        response: response of a model.

    Raises:
        ValueError: the id is unknown, or an argument is missing, unknown or invalid.
    """
    return _any_follows(id, kwargs, [response])


def follows_loosely(id: str, kwargs: Mapping[str, Any], response: str) -> bool:
    """Return True if any of eight variants follows the instruction, as IFEval's loose accuracy.

    The variants are the response without its first line, its last line, both or neither, each with and without
    asterisks. Arguments and errors are those of `follows_strictly`.
    """
    lines = response.split("\n")
    cut = [response, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
    return _any_follows(id, kwargs, list(dict.fromkeys(cut + [text.replace("*", "") for text in cut])))


def _any_follows(id: str, kwargs: Mapping[str, Any], responses: Sequence[str]) -> bool:
    instruction = _find_instruction(id)
    arguments = _check_arguments(instruction, kwargs)
    return any(text.strip() and instruction.check(text, **arguments) for text in responses)


def _find_instruction(id: str) -> Instruction:
    if id not in ALL_INSTRUCTIONS:
        raise ValueError(f"instruction_id: got {id!r}, allowed: {', '.join(ALL_INSTRUCTIONS)}")
    return ALL_INSTRUCTIONS[id]


def _check_arguments(instruction: Instruction, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Check the arguments of an instruction and normalize them; ValueError for one missing, unknown or invalid."""
    arguments, id = instruction.arguments, instruction.id
    values = {name: value for name, value in kwargs.items() if value is not None}
    if unknown := [name for name in values if name not in arguments]:
        raise ValueError(f"{id}: kwargs: got {unknown[0]!r}, allowed: {', '.join(arguments) or 'none'}")
    for name, argument in arguments.items():
        if name not in values or not argument.is_valid(values[name]):
            got = repr(values[name]) if name in values else "nothing"
            raise ValueError(f"{id}: {name}: got {got}, allowed: {argument.allowed}")
    return {name: argument.normalize(values[name]) for name, argument in arguments.items()}


# --- checks ----------------------------------------------------------------------------------------------------------


def _has_no_comma(response: str) -> bool:
    return "," not in response


def _is_lowercase(response: str) -> bool:
    return response.islower() and _is_english(response)


def _is_uppercase(response: str) -> bool:
    return response.isupper() and _is_english(response)


def _is_english(text: str) -> bool:
    """Return True if langdetect finds English; a text without features of a language counts as English (IFEval)."""
    detector = _load_language_detectors().create()
    try:
        detector.append(text)
        return detector.detect() == "en"
    except LangDetectException:
        return True


@cache
def _load_language_detectors() -> Any:
    """Load a factory for this module: langdetect's own factory and seed are shared by the whole process."""
    factory = DetectorFactory()
    factory.set_seed(0)
    profiles = [path for path in sorted(Path(PROFILES_DIRECTORY).iterdir()) if path.is_file()]
    factory.load_json_profile([path.read_text(encoding="utf-8") for path in profiles])
    return factory


def _has_placeholders(response: str, num_placeholders: int) -> bool:
    return len(re.findall(r"\[.*?\]", response)) >= num_placeholders


def _has_postscript(response: str, postscript_marker: str) -> bool:
    return re.search(_build_postscript_pattern(postscript_marker), response.lower(), re.MULTILINE) is not None


def _build_postscript_pattern(marker: str) -> str:
    patterns = {"P.S.": r"p\.\s?s\.", "P.P.S": r"p\.\s?p\.\s?s"}
    return rf"\s*{patterns.get(marker, marker.lower())}.*$"


def _has_title(response: str) -> bool:
    return any(title.lstrip("<").rstrip(">").strip() for title in re.findall(r"<<[^\n]+>>", response))


def _has_keywords(response: str, keywords: Sequence[str]) -> bool:
    return all(re.search(keyword, response, re.IGNORECASE) for keyword in keywords)


def _has_highlights(response: str, num_highlights: int) -> bool:
    single, double = (re.findall(pattern, response) for pattern in (r"\*([^\n*]*)\*", r"\*\*([^\n*]*)\*\*"))
    return sum(1 for text in single + double if text.strip()) >= num_highlights


def _is_json(response: str) -> bool:
    text = response.strip()
    for fence in ("```json", "```Json", "```JSON", "```"):
        text = text.removeprefix(fence)
    try:
        json.loads(text.removesuffix("```").strip())
    except (ValueError, RecursionError):
        return False
    return True


def _has_sections(response: str, section_spliter: str, num_sections: int) -> bool:
    return len(re.split(_build_section_pattern(section_spliter), response)) - 1 >= num_sections


def _build_section_pattern(spliter: str) -> str:
    return rf"\s?{spliter}\s?\d+\s?"


def _has_bullets(response: str, num_bullets: int) -> bool:
    stars, dashes = (re.findall(pattern, response, re.MULTILINE) for pattern in (r"^\s*\*[^\*].*$", r"^\s*-.*$"))
    return len(stars) + len(dashes) == num_bullets


def _has_sentence_count(response: str, num_sentences: int, relation: str) -> bool:
    return _compare_count(len(SPLITTERS[choose_splitter()](response)), relation, num_sentences)


def _has_word_count(response: str, num_words: int, relation: str) -> bool:
    # NLTK 3.10 matches with this library, which keeps combining marks inside words; `re` ends a word before them.
    return _compare_count(count_words(response), relation, num_words)


def count_words(response: str) -> int:
    """Count the words of a response, as the instruction on their number does."""
    return len(regex.findall(r"\w+", response))


def _compare_count(count: int, relation: str, bound: int) -> bool:
    return count < bound if relation == "less than" else count >= bound


def _has_two_responses(response: str) -> bool:
    parts = [part.strip() for part in response.split("******")]
    responses = [part for part in parts if part]
    return all(parts[1:-1]) and len(responses) == 2 and responses[0] != responses[1]


def _has_ending(response: str, end_phrase: str) -> bool:
    return response.strip().strip('"').lower().endswith(end_phrase.lower())


def _has_start(response: str, starter: str) -> bool:
    return re.search(_build_start_pattern(starter), response, re.MULTILINE) is not None


def _build_start_pattern(starter: str) -> str:
    return rf"^\s*{starter}.*$"


# --- instructions ----------------------------------------------------------------------------------------------------


def _phrase_argument(*usual: str, pattern: Callable[[str], str] = re.escape) -> InstructionArgument:
    """Build an argument of text, sampled from the usual ones; `pattern` turns it into the check's expression."""
    return InstructionArgument(
        sample=lambda rng, words: rng.choice(usual),
        allowed=f"a text that can stand in a regular expression, such as {usual[0]!r}",
        is_valid=lambda value: isinstance(value, str) and bool(value.strip()) and _compiles(pattern(value.strip())),
        normalize=str.strip,
    )


def _compiles(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError):
        return False
    return True


_RELATION = InstructionArgument(
    sample=lambda rng, words: rng.choice(NUMBER_RELATIONS),
    allowed=" or ".join(map(repr, NUMBER_RELATIONS)),
    is_valid=lambda value: isinstance(value, str) and value in NUMBER_RELATIONS,
)

_TWO_WORDS = InstructionArgument(
    sample=lambda rng, words: rng.sample(words, 2),
    allowed="a list of texts that are regular expressions",
    is_valid=lambda value: (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(keyword, str) and bool(keyword) and _compiles(keyword) for keyword in value)
    ),
    normalize=sorted,
)

_FORMATTING = "Text formatting"
_CONTENT = "Including required content"
_FORMAT = "Specific format"
_LENGTH = "Length limit"
_OTHER = "Other"

INSTRUCTIONS: dict[str, Instruction] = {
    instruction.id: instruction
    for instruction in (
        Instruction(
            task=1,
            id="punctuation:no_comma",
            name="no comma",
            group=_FORMATTING,
            text="In your entire response, refrain from the use of any commas.",
            check=_has_no_comma,
        ),
        Instruction(
            task=2,
            id="change_case:english_lowercase",
            name="lowercase",
            group=_FORMATTING,
            text="Your entire response should be in English, and in all lowercase letters. No capital letters are "
            "allowed.",
            check=_is_lowercase,
        ),
        Instruction(
            task=3,
            id="change_case:english_capital",
            name="uppercase",
            group=_FORMATTING,
            text="Your entire response should be in English, and in all capital letters.",
            check=_is_uppercase,
        ),
        Instruction(
            task=4,
            id="detectable_content:number_placeholders",
            name="placeholders",
            group=_CONTENT,
            text="The response must contain at least {num_placeholders} placeholders represented by square brackets, "
            "such as [address].",
            check=_has_placeholders,
            arguments={"num_placeholders": number_argument(1, 4)},
        ),
        Instruction(
            task=5,
            id="detectable_content:postscript",
            name="postscript",
            group=_CONTENT,
            text="At the end of your response, please explicitly add a postscript starting with {postscript_marker}",
            check=_has_postscript,
            arguments={"postscript_marker": _phrase_argument("P.S.", "P.P.S", pattern=_build_postscript_pattern)},
        ),
        Instruction(
            task=6,
            id="detectable_format:title",
            name="title",
            group=_CONTENT,
            text="Your answer must contain a title, wrapped in double angular brackets, such as <<poem of joy>>.",
            check=_has_title,
        ),
        Instruction(
            task=7,
            id="keywords:existence",
            name="keywords",
            group=_CONTENT,
            text="Include keywords {keywords} in the response.",
            check=_has_keywords,
            arguments={"keywords": _TWO_WORDS},
        ),
        Instruction(
            task=8,
            id="detectable_format:number_highlighted_sections",
            name="highlights",
            group=_FORMAT,
            text="Highlight at least {num_highlights} sections in your answer with markdown, i.e. *highlighted "
            "section*.",
            check=_has_highlights,
            arguments={"num_highlights": number_argument(1, 4)},
        ),
        Instruction(
            task=9,
            id="detectable_format:json_format",
            name="json",
            group=_FORMAT,
            text="Entire output should be wrapped in JSON format. You can use markdown ticks such as ```.",
            check=_is_json,
        ),
        Instruction(
            task=10,
            id="detectable_format:multiple_sections",
            name="sections",
            group=_FORMAT,
            text="Your response must have {num_sections} sections. Mark the beginning of each section with "
            "{section_spliter} X, such as:\n{section_spliter} 1\n[content of section 1]\n{section_spliter} 2\n"
            "[content of section 2]",
            check=_has_sections,
            arguments={
                "section_spliter": _phrase_argument("Section", "SECTION", pattern=_build_section_pattern),
                "num_sections": number_argument(1, 5),
            },
        ),
        Instruction(
            task=11,
            id="detectable_format:number_bullet_lists",
            name="bullets",
            group=_FORMAT,
            text="Your answer must contain exactly {num_bullets} bullet points. Use the markdown bullet points such "
            "as:\n* This is point 1. \n* This is point 2",
            check=_has_bullets,
            arguments={"num_bullets": number_argument(1, 5)},
        ),
        Instruction(
            task=12,
            id="length_constraints:number_sentences",
            name="sentences",
            group=_LENGTH,
            text="Your response should contain {relation} {num_sentences} sentences.",
            check=_has_sentence_count,
            arguments={"num_sentences": number_argument(1, 20), "relation": _RELATION},
        ),
        Instruction(
            task=13,
            id="length_constraints:number_words",
            name="words",
            group=_LENGTH,
            text="Answer with {relation} {num_words} words.",
            check=_has_word_count,
            arguments={"num_words": number_argument(100, 500), "relation": _RELATION},
        ),
        Instruction(
            task=14,
            id="combination:two_responses",
            name="two responses",
            group=_OTHER,
            text="Give two different responses. Responses and only responses should be separated by 6 asterisk "
            "symbols: ******.",
            check=_has_two_responses,
        ),
        Instruction(
            task=15,
            id="startend:end_checker",
            name="ending",
            group=_OTHER,
            text="Finish your response with this exact phrase {end_phrase}. No other words should follow this phrase.",
            check=_has_ending,
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
            check=_has_start,
            arguments={"starter": _phrase_argument(*STARTERS, pattern=_build_start_pattern)},
        ),
    )
}
"""The sixteen instructions by IFEval's id, in the paper's order."""

ALL_INSTRUCTIONS: dict[str, Instruction] = INSTRUCTIONS | HELD_OUT_INSTRUCTIONS
"""The sixteen instructions, then the constraints of `redux.held_out_instructions`, by id."""

INSTRUCTION_PAIRS: tuple[tuple[str, str], ...] = (
    ("punctuation:no_comma", "detectable_format:json_format"),
    ("change_case:english_lowercase", "detectable_format:number_bullet_lists"),
    ("change_case:english_capital", "detectable_format:title"),
    ("detectable_content:number_placeholders", "multi-turn:constrained_start"),
    ("detectable_format:number_highlighted_sections", "detectable_content:postscript"),
    ("keywords:existence", "length_constraints:number_sentences"),
    ("detectable_format:multiple_sections", "length_constraints:number_words"),
    ("combination:two_responses", "startend:end_checker"),
)
"""Pairs of instructions that one response can follow both; each of the sixteen is in one pair."""
