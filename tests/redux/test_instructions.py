"""Each check counts what IFEval counts, oddities included; the language is the same whoever asks, and when."""

import random
import re
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from typing import Any

import langdetect
import pytest

from redux import instructions, sentences
from redux.instructions import (
    INSTRUCTIONS,
    KEYWORDS,
    NUMBER_RELATIONS,
    STARTERS,
    draw_arguments,
    follows_loosely,
    follows_strictly,
    render_instruction,
)
from redux.sentences import SPLITTERS, choose_splitter

NAMES = {each.name: id for id, each in INSTRUCTIONS.items()}

CASES: list[tuple[str, dict[str, Any], str, bool]] = [
    ("no comma", {}, "It is red. And blue.", True),
    ("no comma", {}, "There are 1,000 of them.", False),
    ("no comma", {}, "红，蓝", True),  # A comma of another script is none
    ("lowercase", {}, "there is a red circle in the middle of the image.", True),
    ("lowercase", {}, "There is a red circle in the middle of the image.", False),
    ("lowercase", {}, "es gibt einen roten kreis in der mitte des bildes.", False),
    ("lowercase", {}, "12 345", False),  # Nothing in it has a case
    ("lowercase", {}, "https://example.com", True),  # langdetect leaves addresses out, and finds nothing
    ("uppercase", {}, "THERE IS A RED CIRCLE IN THE MIDDLE OF THE IMAGE.", True),
    ("uppercase", {}, "THERE IS A RED CIRCLE IN THE MIDDLE OF THE IMAGE. yes", False),
    ("placeholders", {"num_placeholders": 2}, "[name] lives in [].", True),
    ("placeholders", {"num_placeholders": 2}, "[[name]]", False),
    ("placeholders", {"num_placeholders": 1}, "[na\nme]", False),
    ("postscript", {"postscript_marker": "P.S."}, "It is red.\n\nP. S. it is round", True),
    ("postscript", {"postscript_marker": "P.S."}, "It is red. p.s. in the middle of a line", True),
    ("postscript", {"postscript_marker": "P.S."}, "It is red. PS: round", False),
    ("postscript", {"postscript_marker": "P.P.S"}, "P.P.S. round", True),
    ("postscript", {"postscript_marker": "P.P.S"}, "P.S. round", False),
    ("title", {}, "<<poem>>\nIt is red.", True),
    ("title", {}, "<< >> It is red.", False),
    ("title", {}, "<<po\nem>>", False),
    ("keywords", {"keywords": ["river", "dog"]}, "Dogs swim in RIVERS.", True),  # Within words, in any case
    ("keywords", {"keywords": ["river", "dog"]}, "Dogs swim.", False),
    ("highlights", {"num_highlights": 2}, "*red* and *blue*", True),
    ("highlights", {"num_highlights": 2}, "It is **red**.", False),  # The single ones there are empty
    ("highlights", {"num_highlights": 2}, "It is ***red***.", True),  # One of either kind
    ("highlights", {"num_highlights": 1}, "****** red ***", True),  # Between rules
    ("highlights", {"num_highlights": 1}, "******\n* *\n***", False),
    ("json", {}, '{"answer": "red"}', True),
    ("json", {}, '```json\n{"answer": "red"}\n```', True),
    ("json", {}, '```JSON {"answer": "red"}```', True),
    ("json", {}, 'Sure:\n```json\n{"answer": "red"}\n```', False),
    ("json", {}, "3", True),
    ("json", {}, '"red"', True),
    ("json", {}, "red", False),
    ("json", {}, "{'answer': 'red'}", False),
    ("json", {}, "[" * 100_000, False),
    ("sections", {"section_spliter": "Section", "num_sections": 2}, "Section 1\nred\nSection 2\nround", True),
    ("sections", {"section_spliter": "Section", "num_sections": 2}, "Section 1, Section2, Section 3", True),
    ("sections", {"section_spliter": "Section", "num_sections": 2}, "SECTION 1\nred\nSECTION 2\nround", False),
    ("sections", {"section_spliter": "Section", "num_sections": 1}, "Section A", False),
    ("bullets", {"num_bullets": 2}, "* red\n* round", True),
    ("bullets", {"num_bullets": 2}, "Two:\n  - red\n*round", True),
    ("bullets", {"num_bullets": 2}, "* red\n* round\n* small", False),  # Exactly so many
    ("bullets", {"num_bullets": 1}, "**red**", False),
    ("sentences", {"num_sentences": 2, "relation": "less than"}, "It is red.", True),
    ("sentences", {"num_sentences": 2, "relation": "less than"}, "It is red. It is round.", False),
    ("sentences", {"num_sentences": 2, "relation": "at least"}, "It is red. It is round.", True),
    ("sentences", {"num_sentences": 2, "relation": "at least"}, "Mr. Smith is here.", False),
    ("words", {"num_words": 3, "relation": "at least"}, "well-known thing", True),
    ("words", {"num_words": 3, "relation": "less than"}, "well-known thing", False),
    ("words", {"num_words": 3, "relation": "less than"}, "two words", True),
    ("two responses", {}, "Red.\n******\nBlue.", True),
    ("two responses", {}, "******\nRed.\n******\nBlue.\n******", True),  # Rules at the ends separate nothing
    ("two responses", {}, "Red. ****** Red.", False),
    ("two responses", {}, "Red. ****** ****** Blue.", False),
    ("two responses", {}, "Red. ****** Blue. ****** Green.", False),
    ("two responses", {}, "Red.", False),
    ("ending", {"end_phrase": "Any other questions?"}, 'It is red. any other questions?" ', True),
    ("ending", {"end_phrase": "Any other questions?"}, "Any other questions? No.", False),
    ("start", {"starter": "I think"}, "  I think it is red.", True),
    ("start", {"starter": "I think"}, "Well.\nI think it is red.", True),  # Of any line
    ("start", {"starter": "I think"}, "Well, I think it is red.", False),
    ("start", {"starter": "I think"}, "i think it is red.", False),
]


@pytest.mark.parametrize(("name", "kwargs", "response", "follows"), CASES)
def test_each_check_counts_what_ifeval_counts(name: str, kwargs: dict, response: str, follows: bool) -> None:
    assert follows_strictly(NAMES[name], kwargs, response) is follows


def test_the_cases_show_each_instruction_followed_and_not() -> None:
    assert {(name, follows) for name, _, _, follows in CASES} == {
        (name, end) for name in NAMES for end in (True, False)
    }


@pytest.mark.parametrize("id", INSTRUCTIONS)
def test_an_empty_response_follows_nothing(id: str) -> None:
    kwargs = draw_arguments(id, random.Random(0))
    for response in ("", " \n\t", "\u3000"):
        assert not follows_strictly(id, kwargs, response)
        assert not follows_loosely(id, kwargs, response)


def test_the_sixteen_are_the_papers() -> None:
    assert [each.task for each in INSTRUCTIONS.values()] == list(range(1, 17))
    assert len({each.name for each in INSTRUCTIONS.values()}) == 16
    groups = [each.group for each in INSTRUCTIONS.values()]
    assert [groups.count(group) for group in dict.fromkeys(groups)] == [3, 4, 4, 2, 3]


# --- loose -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "response"),
    [
        ("json", "Here you are:\n{}"),  # Without the first line
        ("json", "{}\nThat is all."),  # Without the last
        ("json", "Here you are:\n{}\nThat is all."),  # Without both
        ("json", "*{}*"),  # Without asterisks
        ("json", "Here you are:\n**{}**"),
        ("json", "*{*}*\nThat is all."),
        ("json", "Here you are:\n* {}\nThat is all."),
    ],
)
def test_loose_forgives_first_and_last_lines_and_asterisks(name: str, response: str) -> None:
    assert not follows_strictly(NAMES[name], {}, response)
    assert follows_loosely(NAMES[name], {}, response)


def test_loose_forgives_nothing_else() -> None:
    assert not follows_loosely(NAMES["json"], {}, "Here\nyou are:\n{}")
    assert not follows_loosely(NAMES["json"], {}, "{}\nThat\nis all.")
    assert not follows_loosely(NAMES["json"], {}, "_{}_")


def test_what_is_strict_is_loose() -> None:
    for name, kwargs, response, follows in CASES:
        assert follows_loosely(NAMES[name], kwargs, response) >= follows


# --- asking ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("id", INSTRUCTIONS)
def test_drawn_arguments_are_asked_for(id: str) -> None:
    for seed in range(20):
        kwargs = draw_arguments(id, random.Random(seed))
        assert kwargs == draw_arguments(id, random.Random(seed))
        assert set(kwargs) == set(INSTRUCTIONS[id].arguments)
        asked = render_instruction(id, kwargs)
        assert "{" not in asked
        assert all(str(value) in asked for value in kwargs.values())


def test_keywords_are_asked_for_in_order() -> None:
    asked = "Include keywords ['moon', 'sun'] in the response."
    assert render_instruction("keywords:existence", {"keywords": ["sun", "moon"]}) == asked


def test_arguments_are_drawn_from_all_of_ifevals_ranges() -> None:
    chance = random.Random(0)
    drawn: dict[str, set] = {}
    for id in INSTRUCTIONS:
        for _ in range(5000 if "words" in id else 500):
            for name, value in draw_arguments(id, chance).items():
                drawn.setdefault(name, set()).update(value if isinstance(value, list) else [value])
    assert drawn == {
        "num_placeholders": set(range(1, 5)),
        "postscript_marker": {"P.S.", "P.P.S"},
        "keywords": set(KEYWORDS),
        "num_highlights": set(range(1, 5)),
        "section_spliter": {"Section", "SECTION"},
        "num_sections": set(range(1, 6)),
        "num_bullets": set(range(1, 6)),
        "num_sentences": set(range(1, 21)),
        "relation": set(NUMBER_RELATIONS),
        "num_words": set(range(100, 501)),
        "end_phrase": {"Any other questions?", "Is there anything else I can help with?"},
        "starter": set(STARTERS),
    }


def test_keywords_are_two_different_words_of_any_list() -> None:
    assert draw_arguments("keywords:existence", random.Random(0), ["sun", "moon", "sun"]) == {
        "keywords": ["moon", "sun"]
    }
    for few in ([], ["sun"], ["sun", "sun"]):
        with pytest.raises(ValueError, match=r"words: got .*two different"):
            draw_arguments("keywords:existence", random.Random(0), few)


def test_no_keyword_is_within_another() -> None:
    assert len(set(KEYWORDS)) == len(KEYWORDS) >= 100
    assert not [(a, b) for a in KEYWORDS for b in KEYWORDS if a != b and a in b]


@pytest.mark.parametrize(
    ("id", "kwargs", "message"),
    [
        ("startend:quotation", {}, "instruction_id: got 'startend:quotation', allowed: punctuation:no_comma, "),
        ("punctuation:no_comma", {"n": 1}, "punctuation:no_comma: kwargs: got 'n', allowed: none"),
        (NAMES["placeholders"], {}, "num_placeholders: got nothing, allowed: a whole number, at least 1"),
        (NAMES["placeholders"], {"num_placeholders": None}, "num_placeholders: got nothing, allowed: "),
        (NAMES["placeholders"], {"num_placeholders": 0}, "num_placeholders: got 0, allowed: "),
        (NAMES["placeholders"], {"num_placeholders": True}, "num_placeholders: got True, allowed: "),
        (NAMES["placeholders"], {"num_placeholders": 2.0}, "num_placeholders: got 2.0, allowed: "),
        (NAMES["words"], {"num_words": 9, "relation": "exactly"}, "relation: got 'exactly', allowed: 'less than' or "),
        (NAMES["keywords"], {"keywords": "red"}, "keywords: got 'red', allowed: a list of "),
        (NAMES["keywords"], {"keywords": []}, "keywords: got [], allowed: a list of "),
        (NAMES["keywords"], {"keywords": ["(sun"]}, "keywords: got ['(sun'], allowed: a list of "),
        (NAMES["start"], {"starter": "I (think"}, "starter: got 'I (think', allowed: a text that can stand in "),
        (NAMES["start"], {"starter": " "}, "starter: got ' ', allowed: a text that can stand in "),
    ],
)
def test_what_cannot_be_asked_is_named(id: str, kwargs: dict, message: str) -> None:
    for function in (
        lambda: render_instruction(id, kwargs),
        lambda: follows_strictly(id, kwargs, "red"),
        lambda: follows_loosely(id, kwargs, "red"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            function()


def test_arguments_of_other_instructions_may_be_there_as_none() -> None:
    assert follows_strictly("punctuation:no_comma", {"num_words": None, "relation": None}, "red")


# --- language --------------------------------------------------------------------------------------------------------

# Found to be English, or another language, depending on langdetect's seed.
WOBBLY = ["a man and a dog", "a man in a hat", "ein man in a hat", "es ist a man", "on a hat", "is a man", "a dog man"]


def told(texts: list[str]) -> list[bool]:
    return [follows_strictly(NAMES["lowercase"], {}, text) for text in texts]


def test_the_language_depends_on_the_text_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = dict(zip(WOBBLY, told(WOBBLY), strict=True))
    assert set(alone.values()) == {True, False}
    many = WOBBLY * 20
    for seed in range(3):
        random.Random(seed).shuffle(many)
        random.seed(seed)
        monkeypatch.setattr(langdetect.DetectorFactory, "seed", seed)
        langdetect.detect("un autre usage")
        assert told(many) == [alone[text] for text in many]


def test_the_language_is_the_same_in_every_thread() -> None:
    instructions._load_language_detectors.cache_clear()
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda text: told([text])[0], WOBBLY * 20))
    assert found == told(WOBBLY) * 20


def test_langdetects_own_state_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(langdetect.DetectorFactory, "seed", "untouched")
    monkeypatch.setattr(langdetect.detector_factory, "_factory", None)
    instructions._load_language_detectors.cache_clear()
    told(WOBBLY)
    assert langdetect.DetectorFactory.seed == "untouched"
    assert langdetect.detector_factory._factory is None


# --- sentences -------------------------------------------------------------------------------------------------------

SENTENCES = {
    "": [],
    "It is red. It is round!": ["It is red.", "It is round!"],
    "It is red": ["It is red"],
    "Mr. Smith paid $3.50.": ["Mr. Smith paid $3.50."],
}


@pytest.mark.parametrize("text", SENTENCES)
def test_both_splitters_agree_where_it_is_easy(text: str) -> None:
    for split in [SPLITTERS[name] for name in {"regex", choose_splitter()}]:
        assert split(text) == SENTENCES[text]


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("She is a Ph.D. and he is not.", ["She is a Ph.D. and he is not."]),
        ("Wait ... what?", ["Wait ...", "what?"]),
        ("Really?!", ["Really?", "!"]),
        ('He said "no." Then he left.', ['He said "no".', "Then he left."]),
        ("See example.com for more.", ["See example.com for more."]),
        ("It is\nred. J. Doe said so.", ["It is red.", "J. Doe said so."]),
        ("Doe Inc. It is here.", ["Doe Inc", "It is here."]),
    ],
)
def test_without_punkt_sentences_are_split_by_ifevals_expressions(text: str, sentences: list[str]) -> None:
    assert SPLITTERS["regex"](text) == sentences


def test_what_counts_sentences_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    response, kwargs = "He lives in the U.K. and pays approx. 3 pounds.", {"num_sentences": 2, "relation": "less than"}
    counted = {name: len(SPLITTERS[name](response)) for name in {"regex", choose_splitter()}}
    assert follows_strictly(NAMES["sentences"], kwargs, response) == (counted[choose_splitter()] < 2)
    monkeypatch.setattr(sentences, "find_spec", lambda name: None)
    assert choose_splitter() == "regex"
    assert follows_strictly(NAMES["sentences"], kwargs, response) == (counted["regex"] < 2)


@pytest.mark.skipif(choose_splitter() != "punkt", reason="needs Punkt: pip install -e '.[instructions]'")
def test_punkt_splits_as_nltk_does() -> None:
    assert SPLITTERS["punkt"]("Red!! . . Or e.g. blue.") == ["Red!!", ".", ".", "Or e.g.", "blue."]


@pytest.mark.skipif(find_spec("nltk") is None, reason="needs nltk: the extra instructions")
def test_words_of_any_script_are_those_of_nltk() -> None:
    """Every character amid a word, behind one and alone."""
    from nltk.tokenize import RegexpTokenizer

    count = RegexpTokenizer(r"\w+").tokenize
    for first in range(0, 0x20000, 16):
        response = " ".join(f"a{mark}b c{mark} {mark}" for mark in map(chr, range(first, first + 16)))
        told = ("length_constraints:number_words", {"num_words": len(count(response)) or 1, "relation": "at least"})
        assert follows_strictly(*told, response) == bool(count(response)), hex(first)
        more = {"num_words": len(count(response)) + 1, "relation": "at least"}
        assert not follows_strictly("length_constraints:number_words", more, response), hex(first)
