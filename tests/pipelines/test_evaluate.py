"""Every question is asked alone and answered alike in any company, and the scores are what a hand counts."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from pipelines.evaluate import Answerer, Evaluate, examples, judged, questions, scores
from pipelines.ingest import pixels
from pipelines.shards import Sample, Shards
from redux.cmai import CMAI
from redux.model import Language, Model, Tower, build
from redux.vmtc import VMTC

TEMPLATE = "vicuna_bare"
PATCHES = 16


@pytest.fixture(scope="session")
def model(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with both modules on and random weights, large enough that answers differ."""
    folder, words = tmp_path_factory.mktemp("model"), AutoTokenizer.from_pretrained(tokenizer)
    size = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 48}
    torch.manual_seed(0)
    llava = build(
        Model(
            tower=Tower(image_size=16, patch_size=4, num_hidden_layers=4, **size),
            language=Language(num_hidden_layers=2, max_position_embeddings=96, **size),
            vmtc=VMTC(ratio=0.5, stages=2),
            cmai=CMAI(maximum=0.6),
        ),
        words,
    )
    with torch.no_grad():
        for parameter in llava.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
    llava.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads of a tiny model only wait for each other, long where the machine is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def answerer(model: Path, stored: Shards, images: int = 4) -> Answerer:
    return Answerer(model, stored.folder, Evaluate(images=images, actors=1024, max_new_tokens=5), TEMPLATE, "pad")


def answered(model: Path, stored: Shards, images: int) -> list[dict]:
    """All rows of all batches, as Ray Data would bring them."""
    actor, rows = answerer(model, stored, images), []
    for number in range(-(-len(stored) // images)):
        columns = actor({"id": np.array([number])})
        rows += [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return rows


def test_a_batch_gets_the_answers_that_each_question_gets_alone(model: Path, stored: Shards):
    actor, samples = answerer(model, stored), stored.read(range(12))
    asked = [(sample.key, question) for sample in samples for question, _ in questions(sample)]
    assert len({len(question.split()) for _, question in asked}) > 1, "questions of several lengths"
    together = actor.answer(samples, asked)
    by_key = {sample.key: sample for sample in samples}
    assert together == [actor.answer([by_key[key]], [(key, question)])[0] for key, question in asked]
    assert len(set(together)) > len(asked) // 3, "answers that differ, or equality says nothing"


def test_an_answer_depends_on_the_image_and_on_the_question(model: Path, stored: Shards):
    actor, samples = answerer(model, stored), stored.read(range(12))
    one_question = actor.answer(samples, [(sample.key, "is there red shape number 1?") for sample in samples])
    assert len(set(one_question)) > 1
    words = [f"is there {word} shape number 1?" for word in ("red", "blue", "green", "no red", "no no blue")]
    assert len(set(actor.answer(samples, [(samples[0].key, question) for question in words]))) > 1


def test_a_described_image_is_answered_from_its_description(model: Path, stored: Shards):
    actor, samples = answerer(model, stored), stored.read(range(12))
    asked = [(sample.key, "is there red shape number 1?") for sample in samples]
    actor.settings = replace(actor.settings, image="described")
    actor.model.generation_config.suppress_tokens = [actor.model.config.image_token_id]
    described = actor.answer(samples, asked)
    actor.settings = replace(actor.settings, image="seen")
    assert described != actor.answer(samples, asked)


def test_special_tokens_are_no_part_of_a_response(model: Path, stored: Shards):
    actor, samples = answerer(model, stored), stored.read([0])
    actor.model.lm_head.weight.data.zero_()  # equal scores: always token 0, <unk>
    assert actor.answer(samples, [(samples[0].key, "is there red shape number 1?")]) == [""]


@pytest.mark.parametrize("images", [1, 4, 5, 22, 100])
def test_every_question_is_asked_once_in_the_order_of_the_set(model: Path, stored: Shards, images: int):
    rows = answered(model, stored, images)
    expected = [
        (f"{sample.id}/{number}", sample.id, question, answer)
        for sample in stored.read(range(len(stored)))
        for number, (question, answer) in enumerate(questions(sample))
    ]
    assert [(row["id"], row["image"], row["question"], row["answer"]) for row in rows] == expected


def test_responses_do_not_depend_on_how_many_images_are_a_batch(model: Path, stored: Shards):
    assert answered(model, stored, 3) == answered(model, stored, 8)


def test_questions_are_the_rounds_of_a_conversation_without_the_image(stored: Shards, records: list[dict]):
    for record, sample in zip(records, stored.read(range(len(stored))), strict=True):
        values = [turn["value"] for turn in record["conversations"]]
        said = [text for pair in questions(sample) for text in pair]
        assert said == [values[0].removeprefix("<image>\n"), *values[1:]]


def test_a_conversation_that_ends_with_a_question_is_refused():
    turns = [{"from": "human", "value": "<image>\nis there?"}]
    with pytest.raises(ValueError, match="zip"):
        list(questions(Sample("key", b"", {"conversations": turns})))


@pytest.mark.parametrize(
    ("answer", "response", "kind", "correct"),
    [
        ("yes", "yes", "yes/no", True),
        ("no", "yes", "yes/no", False),
        ("teal", "teal", "colour", True),
        ("teal", "a teal circle", "colour", False),
        ("circle", "", "shape", False),
        ("circle", "circle circle", "shape", False),
    ],
)
def test_a_response_is_correct_if_it_is_the_answer_word_for_word(answer: str, response: str, kind: str, correct: bool):
    row = {"id": "test/0/0", "image": "test/0", "question": "?", "answer": answer, "response": response}
    assert judged(row) == {**row, "type": kind, "correct": correct}


def test_scores_are_shares_of_all_questions_and_of_each_type():
    counted = {"yes/no": (3, 4), "colour": (1, 5), "shape": (0, 1)}  # right, asked
    entries = [
        {"type": kind, "correct": number < right} for kind, (right, asked) in counted.items() for number in range(asked)
    ]
    assert scores(entries) == {
        "easy_vqa.questions": 10,
        "easy_vqa.accuracy": 0.4,
        "easy_vqa.accuracy.colour": 0.2,
        "easy_vqa.accuracy.shape": 0.0,
        "easy_vqa.accuracy.yes/no": 0.75,
    }


def test_a_type_that_was_not_asked_has_no_score():
    assert set(scores([{"type": "shape", "correct": True}])) == {
        "easy_vqa.questions",
        "easy_vqa.accuracy",
        "easy_vqa.accuracy.shape",
    }


@pytest.mark.parametrize("count", [0, 1, 5, 11, 22])
def test_examples_are_as_many_as_asked_on_different_images_with_their_own_questions(
    model: Path, stored: Shards, tmp_path: Path, count: int
):
    rows = [judged(row) for row in answered(model, stored, 8)]
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {(row["image"], row["question"], row["answer"], row["response"], row["correct"]) for row in rows}
    samples = stored.read(range(len(stored)))
    pictures = {pixels(sample.image, 16).tobytes(): sample.id for sample in samples}
    numbers, shown = {sample.id: number for number, sample in enumerate(samples)}, []
    for example in examples(model, stored.folder, tmp_path / "answers.jsonl", count):
        key = pictures[np.asarray(example.image).transpose(2, 0, 1).tobytes()]
        assert (key, example.question, example.answer, example.response, example.correct) in given
        shown.append(numbers[key])
    assert len(shown) == len(set(shown)) == count
    assert shown == sorted(shown)
    assert count < 2 or shown[-1] - shown[0] >= len(stored) // 2, "spread over the set"


def test_an_example_says_where_each_patch_went(model: Path, stored: Shards, tmp_path: Path):
    rows = [judged(row) for row in answered(model, stored, 8)]
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for example in examples(model, stored.folder, tmp_path / "answers.jsonl", 5):
        slot, merged = np.asarray(example.slot), np.asarray(example.merged)
        assert slot.shape == merged.shape == (PATCHES,)
        assert set(slot) - {-1} == set(range(PATCHES // 2)), "half of the tokens reach the language model"
        assert not merged.all()
        kept = slot[~merged & (slot >= 0)]
        assert len(kept) == len(set(kept)), "a kept patch has a token of its own"
