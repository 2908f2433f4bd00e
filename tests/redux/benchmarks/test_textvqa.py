"""TextVQA: official files in, LLaVA's prompts and official scores out."""

import random

import pytest

from redux.benchmarks import textvqa
from tests.redux.benchmarks.official_files import Write, official_evalai, scores, texts


def test_textvqa_asks_as_llava_does_with_and_without_ocr(textvqa_files: list[str]) -> None:
    for files in (textvqa_files, textvqa_files[::-1]):
        assert [question.prompt for question in textvqa.read_questions(*files)] == [
            "What is the brand of this camera?\nReference OCR token: DAKOTA, DIGITAL, Single-Use\n"
            "Answer the question using a single word or phrase.",
            "Is it digital?\nReference OCR token: DAKOTA, DIGITAL, Single-Use\n"
            "Answer the question using a single word or phrase.",
            "What number is it?\nReference OCR token: \nAnswer the question using a single word or phrase.",
        ]
    for given in (textvqa.read_questions(*textvqa_files, ocr=False), textvqa.read_questions(textvqa_files[0])):
        assert (
            given[0].prompt == "What is the brand of this camera?\nAnswer the question using a single word or phrase."
        )
    assert given[0].image == "003a8ae2ef43b901.jpg"
    with pytest.raises(ValueError, match=r"TextVQA: got .*val\.json, allowed: one of questions, and one of OCR tokens"):
        textvqa.read_questions(textvqa_files[0], ocr=True)


def test_textvqa_is_soft_accuracy_and_tells_llavas_questions_apart_by_prompt(
    write: Write, textvqa_files: list[str]
) -> None:
    questions = textvqa.read_questions(*textvqa_files)
    said = ["Dakota digital", "Yes", "two"]
    lines = [
        {"question_id": question.unit, "prompt": question.prompt, "text": text, "answer_id": "x", "metadata": {}}
        for question, text in zip(questions, said, strict=True)
    ]
    answers = textvqa.read_answers(write("llava.jsonl", lines=lines), questions)
    assert answers == dict(zip(["34602", "34603", "34604"], said, strict=True))
    official = [{"question_id": int(key), "answer": text} for key, text in answers.items()]
    assert textvqa.read_answers(write("results.json", official), questions) == answers
    # Three people said it, because three said 2 or two.
    assert scores("textvqa", questions, answers) == {"accuracy": pytest.approx((0.9 + 1 + 0.9) / 3)}


@pytest.mark.parametrize(
    "form",
    [
        "{question}\nAnswer the question using a single word or phrase.",
        "{question}\nReference OCR token: A, B\nAnswer the question using a single word or phrase.",
        "Reference OCR token: A, B\n{question}\nAnswer the question using a single word or phrase.",
        "OCR tokens: A, B, Question: {question} Short answer:",
        "OCR tokens: A\nB. Question: {question} Short answer: ",
    ],
)
def test_textvqa_reads_each_form_of_prompt_that_llava_reads(write: Write, textvqa_files: list[str], form: str) -> None:
    questions = textvqa.read_questions(textvqa_files[0])
    asked = [("What is the brand of this camera?", "dakota"), ("is it digital?", "yes")]
    lines = [
        {"question_id": "003a8ae2ef43b901", "prompt": form.format(question=question), "text": text}
        for question, text in asked
    ]
    assert textvqa.read_answers(write("llava.jsonl", lines=lines), questions) == {"34602": "dakota", "34603": "yes"}


def test_textvqa_equals_the_official_steps() -> None:
    rng, pool = random.Random(2), texts(2, 300)
    for _ in range(500):
        few = rng.sample(pool, rng.randrange(1, 4))
        people, response = rng.choices(few, k=10), rng.choice([*few, rng.choice(pool)])
        given = [official_evalai(person) for person in people]
        by_answer = {}  # M4C scores every answer that people gave, then looks the response up
        for answer in set(given):
            shares = [min(1, sum(o == answer for j, o in enumerate(given) if j != i) / 3) for i in range(10)]
            by_answer[answer] = sum(shares) / 10
        assert textvqa.soft_accuracy(response, people) == pytest.approx(by_answer.get(official_evalai(response), 0.0))
