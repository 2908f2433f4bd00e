"""The checks and texts of all sixteen instructions are those of lm-eval, which carries IFEval on.

Where they differ on purpose, `redux.instructions` says so, and the last test here shows that list to be whole.
"""

import importlib
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from redux.instructions import INSTRUCTIONS, draw_arguments, follows_loosely, follows_strictly, render_instruction
from redux.sentences import SPLITTERS, choose_splitter

pytestmark = pytest.mark.skipif(
    find_spec("lm_eval") is None or choose_splitter() != "punkt", reason="needs lm_eval: pip install -e '.[agreement]'"
)

EACH = 250
"""Responses to each instruction."""

TEXTS = (
    "Yes, it is a red circle.",
    "there is a small blue square in the middle of the picture.",
    "THE SHAPE ON THE LEFT IS A GREEN TRIANGLE.",
    "No",
    "1,000",
    "Dr. Smith, e.g., lives in the U.S. near St. Louis. He paid $3.50!",
    "Really?! Yes!! Wait ... what?",
    'He said "no." Then he left. "Why?"',
    "“Fine.” She went home.",
    "See www.example.com or mail me@example.org.",
    "https://example.com/a,b",
    "Il y a un cercle rouge sur la table et un chien dans le jardin",
    "das ist ein roter kreis auf einem blauen grund",
    "ein kreis",
    "İstanbul ß ﬁ",
    "12 345",
    "* one\n* two",
    "  * one\n\n  - two\n-three",
    "** not one\n*** rule",
    "*light* and **bold** and ***both***",
    "****",
    "* *",
    "******",
    "\n******\n",
    "[name] and [the\naddress]",
    "[] [[x]]",
    "<<a title>>",
    "<< >>",
    "<<>> <<\n>>",
    "p.s. see you",
    "P. S. see you",
    "P.P.S more",
    "p. p. s. more",
    "Section 1 is this. SECTION2 that.\nSection 3",
    '{"answer": "red", "why": ["it is"]}',
    "3.5",
    '"quoted"',
    "NaN",
    "{'answer': 1}",
    "```",
    "```json",
    "Any other questions?",
    "Is there anything else I can help with?",
    "In my opinion it is red",
    "\t",
    "\n",
    "\u2028\x0b",
    "cafe\u0301 nai\u0308ve e\u0301\u0302 x\u20dd \u0301 alone",
    "हिन्दी में एक लाल वृत्त है",
    "ภาษาไทยไม่มีเว้นวรรค",
    "日本語のテキスト、赤い丸。 中文文本",
    "שָׁלוֹם عَرَبِيٌّ",
    "1st ²nd ³ ½ x² Ⅷ ①",
    "a_b __ a\u200db a\u200cb a\u00adb 👩\u200d💻 𝒳𝓎 𐐀",
    "",
)

LIKELY = {
    "change_case:english_lowercase": ("there is a red circle on the left of the picture", "what a nice day it is"),
    "change_case:english_capital": ("THERE IS A RED CIRCLE ON THE LEFT OF THE PICTURE", "WHAT A NICE DAY IT IS"),
    "detectable_content:number_placeholders": ("[name]", "[street] [town]", "[]"),
    "detectable_format:number_highlighted_sections": ("*this*", "**that**", "* *"),
    "detectable_format:multiple_sections": ("Section 1", "SECTION 2\n", "Section3", "section 4"),
    "detectable_format:number_bullet_lists": ("* one\n", "\n- two\n", "\n * three", "**four**"),
    "detectable_format:json_format": ("{}", "[1]", "true"),
    "combination:two_responses": ("Red.\n******\nBlue.", "Red. ****** Red."),
}
"""What many responses to an instruction are made of, so that some follow it."""

JOINTS = (" ", "\n", "\n\n", "", " ****** ", ", ")


def test_at_least_2000_responses_are_scored_the_same(original: "Original") -> None:
    """And so that each check is seen both to pass and to fail, one in twenty at least."""
    for id in INSTRUCTIONS:
        chance, seen = random.Random(id), Counter()
        for _ in range(EACH):
            kwargs = draw_arguments(id, chance)
            response = _response(chance, kwargs, LIKELY.get(id, ()))
            ours = (follows_strictly(id, kwargs, response), follows_loosely(id, kwargs, response))
            theirs = (original.strict(id, kwargs, response), original.loose(id, kwargs, response))
            assert ours == theirs, (id, kwargs, response)
            seen.update([("strict", ours[0]), ("loose", ours[1])])
        assert len(seen) == 4, (id, seen)
        assert min(seen.values()) >= EACH / 20, (id, seen)
    assert EACH * len(INSTRUCTIONS) >= 2000


def test_long_prose_is_counted_the_same(original: "Original") -> None:
    """Words and sentences of texts that are as long as bounds of 100 to 500 words."""
    for id in ("length_constraints:number_words", "length_constraints:number_sentences"):
        chance, seen = random.Random(id), Counter()
        for _ in range(100):
            kwargs = draw_arguments(id, chance)
            response = " ".join(chance.choices(TEXTS, k=chance.randint(1, 70)))
            seen[follows_strictly(id, kwargs, response)] += 1
            assert follows_strictly(id, kwargs, response) == original.strict(id, kwargs, response), (
                id,
                kwargs,
                response,
            )
        assert min(seen.values()) > 10


def test_words_of_any_script_are_counted_the_same(original: "Original") -> None:
    """Each character between two letters, with a mark behind it, and after a space."""
    id, kwargs = "length_constraints:number_words", {"num_words": 3, "relation": "at least"}
    for code in range(0x20, 0x20000, 7):
        response = f"a{chr(code)}b {chr(code)}\u0301"
        assert follows_strictly(id, kwargs, response) == original.strict(id, kwargs, response), ascii(response)


def test_sentences_are_split_at_the_same_places(original: "Original") -> None:
    chance = random.Random(0)
    for _ in range(1000):
        text = _response(chance, {})
        assert SPLITTERS["punkt"](text) == original.util._get_sentence_tokenizer().tokenize(text), text
        assert SPLITTERS["regex"](text) == original.util.split_into_sentences(text), text


def test_instructions_are_asked_in_the_same_words(original: "Original") -> None:
    for id in INSTRUCTIONS:
        chance = random.Random(id)
        for _ in range(20):
            kwargs = draw_arguments(id, chance)
            assert render_instruction(id, kwargs) == original.instruction(id).build_description(**kwargs)


def test_arguments_outside_the_usual_are_taken_the_same_way(original: "Original") -> None:
    for id, kwargs, response in (
        ("detectable_content:postscript", {"postscript_marker": " N.B. "}, "so\nnXbX yes"),
        ("detectable_content:postscript", {"postscript_marker": "P.P.S."}, "so p.p.s! yes"),
        ("detectable_format:multiple_sections", {"section_spliter": "Day|Week", "num_sections": 2}, "Day 1 Week 2"),
        ("keywords:existence", {"keywords": ["s.n$", "MOON", "Ab"]}, "ab moon\nsun"),
        ("startend:end_checker", {"end_phrase": " (Bye) "}, 'so (bye)"'),
        ("multi-turn:constrained_start", {"starter": " [JS]o"}, "what\n So it is"),
    ):
        assert render_instruction(id, kwargs) == original.instruction(id).build_description(**kwargs)
        assert follows_strictly(id, kwargs, response) == original.strict(id, kwargs, response)
        assert follows_loosely(id, kwargs, response) == original.loose(id, kwargs, response)


def test_only_what_the_docstring_lists_is_different(original: "Original", monkeypatch: pytest.MonkeyPatch) -> None:
    placeholders, json = "detectable_content:number_placeholders", "detectable_format:json_format"
    unseeded = set()
    for seed in range(20):
        monkeypatch.setattr("langdetect.DetectorFactory.seed", seed)
        told = ("change_case:english_lowercase", {}, "a man and a dog")
        unseeded.add((original.strict(*told), follows_strictly(*told)))
    assert len(unseeded) == 2, "the language that lm-eval finds depends on the seed, ours does not"
    assert len({ours for _, ours in unseeded}) == 1

    for kwargs in ({}, {"num_placeholders": 0}, {"num_placeholders": None}):
        assert {original.strict(placeholders, kwargs, "[a] [b]") for _ in range(100)} == {True, False}
        with pytest.raises(ValueError, match="num_placeholders"):
            follows_strictly(placeholders, kwargs, "[a] [b]")

    with pytest.raises(RecursionError):
        original.strict(json, {}, "[" * 100_000)
    assert not follows_strictly(json, {}, "[" * 100_000)


def _response(chance: random.Random, kwargs: dict[str, Any], likely: Sequence[str] = ()) -> str:
    """Pieces of the pool and of what is asked for, joined in some way, often in one case or in a fence."""
    asked = [text for value in kwargs.values() for text in (value if isinstance(value, list) else [value])]
    wanted = [*likely, *(text for text in asked if isinstance(text, str))]
    pool = chance.choice([TEXTS, [*TEXTS, *wanted * 20], wanted or TEXTS, TEXTS[:12]])
    text = chance.choice(JOINTS).join(chance.choices(pool, k=chance.randint(0, 6)))
    dress: list[Callable[[str], str]] = [
        str,
        str,
        str.lower,
        str.upper,
        lambda text: f"```json\n{text}\n```",
        lambda text: f"Sure:\n{text}\nThat is all.",
        lambda text: f'"{text}"',
        lambda text: text.replace(",", ""),
        lambda text: f'{{"answer": {len(text)}}}',
        lambda text: f"{text} ****** {text[::-1]}",
        lambda text: text + " word" * chance.randint(90, 510),
        lambda text: text + "\n<<title>>\nSection 1 a\nSECTION 2 b\n" + "\n".join(wanted),
    ]
    return chance.choice(dress)(text)


class Original:
    """lm-eval's modules of IFEval, as it calls them itself."""

    def __init__(self, load: Callable[[str], ModuleType]) -> None:
        self.util, self._utils = load("instructions_util"), load("utils")
        self._registry = load("instructions_registry").INSTRUCTION_DICT
        # Its registry has this one commented out.
        self._registry["multi-turn:constrained_start"] = load("instructions").ConstrainedStartChecker

    def instruction(self, id: str) -> Any:
        return self._registry[id](id)

    def strict(self, id: str, kwargs: dict[str, Any], response: str) -> bool:
        return self._utils.test_instruction_following_strict(_input(id, kwargs), response).follow_all_instructions

    def loose(self, id: str, kwargs: dict[str, Any], response: str) -> bool:
        return self._utils.test_instruction_following_loose(_input(id, kwargs), response).follow_all_instructions


def _input(id: str, kwargs: dict[str, Any]) -> SimpleNamespace:
    return SimpleNamespace(instruction_id_list=[id], kwargs=[kwargs], prompt="")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Original]:
    """Loaded without lm-eval's packages around it, which take long, and without its download."""
    import nltk

    patch = pytest.MonkeyPatch()
    patch.setattr(nltk.data, "path", [*nltk.data.path, str(_punkt_tab(tmp_path_factory.mktemp("nltk_data")))])
    patch.setattr("langdetect.DetectorFactory.seed", 0)
    found = find_spec("lm_eval")
    assert found is not None
    assert found.submodule_search_locations
    folder = Path(found.submodule_search_locations[0])
    for name in ("lm_eval", "lm_eval.tasks", "lm_eval.tasks.ifeval"):
        package = ModuleType(name)
        package.__path__ = [str(folder.joinpath(*name.split(".")[1:]))]
        patch.setitem(sys.modules, name, package)
    yield Original(lambda name: importlib.import_module(f"lm_eval.tasks.ifeval.{name}"))
    patch.undo()
    for name in [name for name in sys.modules if name.startswith("lm_eval.tasks.ifeval.")]:
        del sys.modules[name]


def _punkt_tab(folder: Path) -> Path:
    """NLTK's form of the tables; where NLTK has its own, it finds those first."""
    from punkt import load_model

    tables, english = load_model("english"), folder / "tokenizers/punkt_tab/english"
    english.mkdir(parents=True)
    for name, lines in {
        "abbrev_types.txt": tables.abbrev_types,
        "sent_starters.txt": tables.sent_starters,
        "collocations.tab": ["\t".join(pair) for pair in tables.collocations],
        "ortho_context.tab": [f"{word}\t{flags}" for word, flags in tables.ortho_context.items()],
    }.items():
        (english / name).write_text("\n".join(lines), encoding="utf-8")
    return folder
