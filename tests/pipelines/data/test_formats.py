"""Tests of formats: responses follow their instruction and are correct; wordings differ from the evaluation's."""

import random
import re

import pytest

from pipelines.data import easy_vqa, formats
from redux import instructions
from redux.benchmarks.instructions import contains_answer
from redux.conversation import TEMPLATES, train_word_tokenizer


@pytest.fixture(scope="module")
def taught_examples() -> list[tuple[str, dict, str, str, str]]:
    """Make (instruction, arguments, answer, prompt, response) of records."""
    result, draw = [], formats._draw_arguments
    told = [("there is a shape.", "what is it?", list(easy_vqa.QUESTION_TYPES)[number % 13]) for number in range(1600)]
    rng = random.Random(0)
    for (_, _, answer), record in zip(told, formats.make_records(told), strict=True):
        name = list(formats.INSTRUCTION_FORMS)[len(result) % 16]
        given = draw(name, rng)
        rng.choice(formats.INSTRUCTION_FORMS[name][0])
        formats.INSTRUCTION_FORMS[name][1](answer, given, rng)
        human, gpt = (turn["value"] for turn in record["conversations"])
        result.append((name, given, answer, human, gpt))
    return result


def words(text: str) -> list[str]:
    return re.findall(r"[\w{}]+", text.lower())


def test_each_answer_follows_its_instruction_and_is_right(
    taught_examples: list[tuple[str, dict, str, str, str]],
) -> None:
    for name, given, answer, human, gpt in taught_examples:
        assert instructions.follows_strictly(name, given, gpt), (name, given, human, gpt)
        assert contains_answer(answer, gpt), (answer, gpt)


def test_arguments_are_part_of_what_is_asked(taught_examples: list[tuple[str, dict, str, str, str]]) -> None:
    for _, given, _, human, _ in taught_examples:
        for value in given.values():
            assert all(str(each) in human for each in (value if isinstance(value, list) else [value]))


def test_all_instructions_are_taught_alike_and_in_words_that_no_evaluation_uses(
    taught_examples: list[tuple[str, dict, str, str, str]],
) -> None:
    assert formats.INSTRUCTION_FORMS.keys() == instructions.INSTRUCTIONS.keys()
    for name, (wordings, _) in formats.INSTRUCTION_FORMS.items():
        evaluated = words(instructions.INSTRUCTIONS[name].text)
        for wording in wordings:
            own = words(wording)
            runs = {tuple(own[place : place + 5]) for place in range(len(own) - 4)}
            same = runs & {tuple(evaluated[place : place + 5]) for place in range(len(evaluated) - 4)}
            assert not same, f"{wording}: five words in a row are those of the evaluation"
            assert own != evaluated
    assert (
        {name for name, *_ in taught_examples[:16]}
        == {name for name, *_ in taught_examples[-16:]}
        == set(formats.INSTRUCTION_FORMS)
    )


def test_what_a_word_tokenizer_makes_of_an_answer_still_follows(
    taught_examples: list[tuple[str, dict, str, str, str]],
) -> None:
    """The tokenizer puts blanks between tokens, so marks that belong together must be one token."""
    template = TEMPLATES["vicuna_bare"]
    turns = [
        [{"from": "human", "value": human}, {"from": "gpt", "value": gpt}] for _, _, _, human, gpt in taught_examples
    ]
    texts = ["".join(piece for piece, _ in template.split_spans(each)) for each in turns]
    tokenizer = train_word_tokenizer(texts, 512)
    for name, given, answer, _, gpt in taught_examples:
        said = tokenizer.decode(tokenizer(gpt)["input_ids"], skip_special_tokens=True)
        assert instructions.follows_strictly(name, given, said), (name, given, said)
        assert contains_answer(answer, said), (answer, said)


def test_four_instructions_are_also_taught_beside_images() -> None:
    said = [record["conversations"] for record in easy_vqa.make_image_instructions()]
    assert len(said) == 4000
    assert all(turns[0]["value"].startswith("<image>\n") and len(turns) == 4 for turns in said)
    wordings = {
        name: [wording.split("{")[0] for wording in formats.INSTRUCTION_FORMS[name][0]]
        for name in formats.INSTRUCTION_FORMS
    }
    for turns in said:
        for turn in turns[::2]:
            found = {name for name, each in wordings.items() if any(f" {one}" in turn["value"] for one in each)}
            assert found & set(easy_vqa.INSTRUCTIONS_WITH_IMAGES), turn


def test_easy_vqas_are_text_about_training_images_alone() -> None:
    records = easy_vqa.make_text_instructions()
    assert len(records) == 8000
    assert not [record for record in records if "image" in record]
    descriptions = {easy_vqa.derive_caption(asked) for _, _, asked in easy_vqa._load_images("train")}
    asked = [record["conversations"][0]["value"].removeprefix("there is ") for record in records]
    assert {question.partition(".")[0] for question in asked} <= descriptions
    assert records == easy_vqa.make_text_instructions()
