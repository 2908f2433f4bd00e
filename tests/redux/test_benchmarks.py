"""The five benchmarks: official files in, LLaVA's prompts and the official scores out.

References follow the official scorers step by step; their tables of words are the library's own, checked by examples.
"""

import base64
import io
import json
import math
import random
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from redux.benchmarks import BENCHMARKS, Metric, Outcome, Question, join_answers, mmbench, mme, textvqa, vqav2
from redux.benchmarks.benchmark import SubmittedAnswer
from redux.benchmarks.benchmark import compute_scores as benchmark_scores
from redux.benchmarks.vqa_text import (
    ARTICLES,
    CONTRACTIONS,
    NUMBER_WORDS,
    PUNCTUATION,
    normalize_answer,
    normalize_as_evalai,
)

Write = Callable[..., str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes text, or a value as JSON, or lines of JSON, to a file of that name; returns its path."""

    def to(name: str, content: Any = None, lines: Iterable[Any] | None = None) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if lines is not None:
            content = "".join(f"{json.dumps(line)}\n" for line in lines)
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return str(path)

    return to


def scored(name: str, questions: list[Question], answers: dict[str, str]) -> tuple[dict[str, Metric], int]:
    """(metrics, missing), as `redux score` has them."""
    rows, missing = join_answers(questions, answers)
    return BENCHMARKS[name].compute_metrics(rows), missing


def scores(name: str, questions: list[Question], answers: dict[str, str]) -> dict[str, float]:
    return {name: metric.score for name, metric in scored(name, questions, answers)[0].items()}


# --- metrics ----------------------------------------------------------------------------------------------------------


def test_a_metric_is_the_weighted_sum_of_the_means_of_groups() -> None:
    outcomes = [Outcome("a", "1", 1.0), Outcome("a", "2", 0.0), Outcome("b", "1", 0.25)]
    assert Metric(outcomes).score == 0.75
    assert Metric(outcomes, weight=100.0).score == 75
    assert Metric([]).score == 0


@pytest.mark.parametrize("metrics", [{}, {"accuracy": Metric([])}, {"accuracy": Metric([Outcome("", "1", math.nan)])}])
def test_what_was_not_scored_is_an_error(metrics: dict[str, Metric]) -> None:
    with pytest.raises(ValueError, match=r"^mine: got .*, allowed: "):
        benchmark_scores(metrics, "mine")


# --- VQAv2 ------------------------------------------------------------------------------------------------------------


def asked_vqav2(write: Write, people: list[list[str]], split: str = "val2014") -> list[Question]:
    """Questions 10, 20, … about image 1, 2, …, answered by these people; types yes/no and other by turns."""
    asked = [
        {"image_id": number, "question": f"What is {number}?", "question_id": 10 * number}
        for number, _ in enumerate(people, 1)
    ]
    answered = [
        {
            "question_id": 10 * number,
            "image_id": number,
            "question_type": "what is",
            "answer_type": ("yes/no", "other")[number % 2],
            "multiple_choice_answer": given[0],
            "answers": [{"answer": a, "answer_confidence": "yes", "answer_id": i} for i, a in enumerate(given, 1)],
        }
        for number, given in enumerate(people, 1)
    ]
    files = [write("questions.json", {"data_subtype": split, "questions": asked})]
    if split == "val2014":
        files.insert(0, write("annotations.json", {"data_subtype": split, "annotations": answered}))
    return vqav2.read_questions(*files)


def official_text(text: str) -> str:
    """vqaEval's processPunctuation, then processDigitArticle."""
    out = text
    for mark in PUNCTUATION:
        if (mark + " " in text or " " + mark in text) or re.search(r"(\d)(\,)(\d)", text) is not None:
            out = out.replace(mark, "")
        else:
            out = out.replace(mark, " ")
    out = re.sub(r"(?!<=\d)(\.)(?!\d)", "", out, count=32)
    kept = []
    for word in out.lower().split():
        digit = NUMBER_WORDS.get(word, word)
        if digit not in ARTICLES:
            kept.append(digit)
    for place, word in enumerate(kept):
        if word in CONTRACTIONS:
            kept[place] = CONTRACTIONS[word]
    return " ".join(kept)


def official_vqa(answer: str, people: list[str]) -> float:
    """vqaEval's accuracy: leave each person out in turn."""

    def one_line(text: str) -> str:
        return text.replace("\n", " ").replace("\t", " ").strip()

    given, answer = [one_line(person) for person in people], one_line(answer)
    if len(set(given)) > 1:
        given, answer = [official_text(person) for person in given], official_text(answer)
    shares = []
    for place in range(len(given)):
        others = given[:place] + given[place + 1 :]
        shares.append(min(1, len([other for other in others if other == answer]) / 3))
    return sum(shares) / len(shares)


def official_evalai(text: str) -> str:
    word = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return official_text(word.replace("\n", " ").replace("\t", " ").strip())


def texts(seed: int, count: int) -> list[str]:
    """Words, numbers and marks at random, among them all that the processors know."""
    rng = random.Random(seed)
    words = [
        *CONTRACTIONS,
        *NUMBER_WORDS,
        *ARTICLES,
        "Yes",
        "dog's",
        "1,000",
        "3.5",
        "U.S.",
        "a.b",
        ".",
        "x\ty",
        "\n",
        "cat",
    ]
    parts = [*words, *PUNCTUATION, " ", " ", ", ", "; "]
    return ["".join(rng.choice(parts) for _ in range(rng.randrange(1, 7))) for _ in range(count)]


@pytest.mark.parametrize(
    ("text", "official", "handed_in"),
    [
        ("The Dog.", "dog", "dog"),
        ("two", "2", "2"),
        ("dont", "don't", "don't"),
        ("none of them", "0 of them", "0 of them"),
        ("1,000", "1000", "1000"),
        ("yes, it is", "yes it is", "yes it is"),
        ("black-white", "black white", "black white"),
        ("black - white", "black white", "black white"),
        ("3.5", "3.5", "3.5"),
        ("man's hat", "man's hat", "man 's hat"),
        ("red,blue", "red blue", "redblue"),
        ("a", "", ""),
        ("." * 40, "." * 8, "." * 8),
    ],
)
def test_words_are_compared_in_the_official_form(text: str, official: str, handed_in: str) -> None:
    assert normalize_answer(text) == official
    assert normalize_as_evalai(text) == handed_in


def test_processors_equal_the_official_steps() -> None:
    for text in texts(0, 3000):
        assert normalize_answer(text) == official_text(text)
        assert normalize_as_evalai(text) == official_evalai(text)


def test_vqav2_asks_as_llava_does(write: Write) -> None:
    [question] = asked_vqav2(write, [["yes"] * 10])
    assert question.prompt == "What is 1?\nAnswer the question using a single word or phrase."
    assert (question.id, question.unit, question.image) == ("10", "1", "COCO_val2014_000000000001.jpg")
    [question] = asked_vqav2(write, [["yes"] * 10], split="test-dev2015")
    assert question.image == "COCO_test2015_000000000001.jpg"
    assert question.reference == {}
    assert scored("vqav2", [question], {"10": "yes"}) == ({}, 0)


@pytest.mark.parametrize(
    ("annotation", "said"),
    [
        ({"answers": ["yes"], "answer_type": "other"}, "item 1, answers: item 1: got a str, allowed: an object"),
        ({"answers": [{"answer": 1}], "answer_type": "other"}, "item 1, answers: item 1: got answer = '1'"),
        ({"answers": [], "answer_type": "other"}, "item 1: got no answers, allowed: those of ten people"),
        ({"answers": [{"answer": "yes"}]}, "item 1: got keys question_id, answers, allowed: answer_type, a text"),
        ({"question_id": 5, "answers": [{"answer": "yes"}], "answer_type": "other"}, "got question 10 without an ann"),
    ],
)
def test_a_bad_annotation_of_vqav2_is_named(write: Write, annotation: dict[str, Any], said: str) -> None:
    asked_vqav2(write, [["yes"]], split="test2015")
    annotations = write("annotations.json", {"annotations": [{"question_id": 10} | annotation]})
    with pytest.raises(ValueError, match=said):
        vqav2.read_questions(str(Path(annotations).with_name("questions.json")), annotations)


def test_vqav2_counts_people_who_agree(write: Write) -> None:
    """An answer of 2 people: 1/3 for each of them left out, 2/3 for the eight others; of 3: 2/3 and 1; of 4: 1."""
    people = ["red"] * 4 + ["blue"] * 3 + ["green"] * 2 + ["Gray"]
    questions = asked_vqav2(write, [people] * 5)
    answers = {"10": "Red.", "20": "blue", "30": "the green", "40": "gray", "50": "pink"}
    single = [1.0, (3 * 2 / 3 + 7) / 10, (2 / 3 + 8 * 2 / 3) / 10, 9 / 30, 0.0]
    assert scores("vqav2", questions, answers) == pytest.approx(
        {
            "accuracy": sum(single) / 5,
            "accuracy.other": (single[0] + single[2] + single[4]) / 3,
            "accuracy.yes/no": (single[1] + single[3]) / 2,
        }
    )


def test_vqav2_equals_the_official_scorer_on_responses_and_on_result_files(write: Write) -> None:
    rng, pool = random.Random(1), texts(1, 400)
    few = [rng.sample(pool, rng.randrange(1, 4)) for _ in range(400)]
    people = [rng.choices(group, k=10) for group in few]
    said = {str(10 * number): rng.choice([*group, rng.choice(pool)]) for number, group in enumerate(few, 1)}
    questions = asked_vqav2(write, people)
    as_responses = sum(map(official_vqa, map(official_evalai, said.values()), people)) / 400
    assert scores("vqav2", questions, said)["accuracy"] == pytest.approx(as_responses)
    official = write("results.json", [{"question_id": int(key), "answer": text} for key, text in said.items()])
    to_the_letter = sum(map(official_vqa, said.values(), people)) / 400
    assert scores("vqav2", questions, vqav2.read_answers(official, questions))["accuracy"] == pytest.approx(
        to_the_letter
    )
    assert to_the_letter != pytest.approx(as_responses)


def test_where_all_people_agree_only_a_response_is_converted() -> None:
    assert vqav2.official_accuracy("Yes.", ["yes"] * 10) == 1
    assert vqav2.official_accuracy(SubmittedAnswer("Yes."), ["yes"] * 10) == 0
    assert vqav2.official_accuracy(SubmittedAnswer("Yes."), ["yes"] * 9 + ["no"]) == 1


def test_a_submission_has_every_question_of_the_split_in_order(write: Write) -> None:
    questions = asked_vqav2(write, [["x"]] * 3, split="test2015")
    rows, missing = join_answers(questions, {"30": "Two dogs.", "10": "No"})
    assert missing == 1
    assert vqav2.build_submission(rows) == [
        {"question_id": 10, "answer": "no"},
        {"question_id": 20, "answer": ""},
        {"question_id": 30, "answer": "2 dogs"},
    ]


# --- GQA --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def gqa(write: Write) -> list[Question]:
    def entry(answer: str, structural: str, semantic: str, balanced: bool = True) -> dict[str, Any]:
        return {
            "question": "Is it overcast?", "imageId": "n161313", "answer": answer, "isBalanced": balanced,
            "types": {"structural": structural, "semantic": semantic, "detailed": "weatherVerify"},
        }  # fmt: skip

    entries = {
        "201": entry("no", "verify", "global"),
        "202": entry("woman", "query", "rel"),
        "203": entry("red", "choose", "attr"),
        "204": entry("table", "query", "obj"),
        "205": entry("table", "query", "obj", balanced=False),
    }
    return BENCHMARKS["gqa"].read_questions(write("testdev_balanced_questions.json", entries))


def test_gqa_asks_as_llava_does(gqa: list[Question]) -> None:
    assert gqa[0].prompt == "Is it overcast?\nAnswer the question using a single word or phrase."
    assert (gqa[0].id, gqa[0].image, gqa[0].unit) == ("201", "n161313.jpg", "n161313")


def test_gqa_counts_equal_words_over_balanced_questions(gqa: list[Question]) -> None:
    answers = {"201": "No.", "202": "Woman", "203": " red", "204": "a table", "205": "table"}
    assert scores("gqa", gqa, answers) == {
        "accuracy": 2 / 4,
        "binary": 1 / 2,
        "structural.verify": 1,
        "semantic.global": 1,
        "open": 1 / 2,
        "structural.query": 1 / 2,
        "semantic.rel": 1,
        "structural.choose": 0,
        "semantic.attr": 0,
        "semantic.obj": 0,
    }


# --- TextVQA ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def textvqa_files(write: Write) -> list[str]:
    def entry(number: int, image: str, question: str, people: list[str]) -> dict[str, Any]:
        return {
            "question_id": number, "image_id": image, "question": question, "answers": people, "set_name": "val",
            "image_width": 1024, "image_height": 664, "flickr_300k_url": "", "question_tokens": question.split(),
        }  # fmt: skip

    entries = [
        entry(34602, "003a8ae2ef43b901", "what is the brand of this camera?", ["dakota"] * 7 + ["Dakota Digital"] * 3),
        entry(34603, "003a8ae2ef43b901", "is it DIGITAL?", ["yes"] * 10),
        entry(34604, "97b1112b17015396", "what number is it?", ["two", "2", "2", *"abcdefg"]),
    ]
    tokens = [
        {"image_id": "003a8ae2ef43b901", "ocr_tokens": ["DAKOTA", "DIGITAL", "Single-Use"], "ocr_info": []},
        {"image_id": "97b1112b17015396", "ocr_tokens": [], "ocr_info": []},
    ]
    return [
        write("TextVQA_0.5.1_val.json", {"dataset_type": "val", "data": entries}),
        write("TextVQA_Rosetta_OCR_v0.2_val.json", {"data": tokens}),
    ]


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
    # three people said it, as three said 2 or two
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


# --- MME --------------------------------------------------------------------------------------------------------------

SUBTASKS = {"artwork": True, "existence": False, "OCR": False, "code_reasoning": False}  # whether with subfolders


@pytest.fixture
def mme_folder(tmp_path: Path) -> str:
    """Two images a subtask, each with a question for Yes and one for No, in both of the official layouts."""
    root = tmp_path / "MME_Benchmark_release_version"
    for subtask, apart in SUBTASKS.items():
        images = root / subtask / ("images" if apart else "")
        texts = root / subtask / ("questions_answers_YN" if apart else "")
        images.mkdir(parents=True)
        texts.mkdir(exist_ok=True)
        for number in (1, 2):
            Image.new("RGB", (4, 4)).save(images / f"000{number}.png")
            space = " " * number
            (texts / f"000{number}.txt").write_text(
                f"Is this {subtask} {number}?{space}Please answer yes or no.\tYes\n"
                f"Is this nothing?{space}Please answer yes or no.\tNo\n"
            )
    (root / "eval_tool").mkdir()
    (root / "eval_tool" / "readme.txt").write_text("no questions")
    return str(root)


def test_mme_asks_as_llava_does_in_both_layouts(mme_folder: str) -> None:
    questions = mme.read_questions(mme_folder)
    assert len(questions) == 16
    by_image = {question.image: question for question in questions if "nothing" not in question.prompt}
    assert sorted(by_image)[:3] == ["OCR/0001.png", "OCR/0002.png", "artwork/images/0001.png"]
    for number, image in ((1, "artwork/images/0001.png"), (2, "artwork/images/0002.png")):
        assert by_image[image].prompt == (
            f"Is this artwork {number}?\nAnswer the question using a single word or phrase."
        )
    assert {question.unit for question in questions} == {f"{task}/000{n}" for task in SUBTASKS for n in (1, 2)}


def official_mme(folder: Path) -> tuple[dict[str, float], float]:
    """calculation.py's score of each subtask, and their sum."""
    points = {}
    for file in sorted(folder.glob("*.txt")):
        lines = file.read_text().splitlines(keepends=True)
        right, pairs = 0, 0
        for pair in (lines[at : at + 2] for at in range(0, len(lines), 2)):
            correct = 0
            for line in pair:
                _, _, truth, said = line.lower().split("\t")
                label = "yes" if "yes" in said[:4] else "no" if "no" in said[:4] else "other"
                correct += label == truth
            right, pairs = right + correct, pairs + (correct == 2)
        points[file.stem] = 100 * right / len(lines) + 100 * pairs / (len(lines) / 2)
    return points, sum(points.values())


@pytest.mark.parametrize("seed", range(5))
def test_mme_equals_the_official_scorer(tmp_path: Path, mme_folder: str, seed: int) -> None:
    rng, questions = random.Random(seed), mme.read_questions(mme_folder)
    results = tmp_path / "results"
    results.mkdir()
    for subtask in SUBTASKS:
        with (results / f"{subtask}.txt").open("w") as file:
            for question in questions:
                if question.reference["subtask"] == subtask:
                    asked = question.prompt.partition("\n")[0]
                    said = rng.choice(
                        ["Yes", "No", "yes.", "no, it is not", "Not at all", "It yes", "It is yes", "", "Maybe"]
                    )
                    name, truth = question.unit.partition("/")[2], question.reference["answer"].title()
                    file.write(f"{name}.txt\t{asked} Please answer yes or no.\t{truth}\t{said}\n")
    points, total = official_mme(results)
    got = scores("mme", questions, mme.read_answers(str(results), questions))
    assert {subtask: got[subtask] for subtask in SUBTASKS} == pytest.approx(points)
    assert got["cognition"] == pytest.approx(points["code_reasoning"])
    assert got["perception"] + got["cognition"] == pytest.approx(total)


@pytest.mark.parametrize(
    ("response", "verdict"),
    [("Yes", "yes"), ("no.", "no"), ("Not", "no"), ("I yes", "other"), (" yes", "yes"), ("", "other"), (None, "other")],
)
def test_mme_reads_the_first_four_characters(response: str | None, verdict: str) -> None:
    assert mme.read_verdict(response) == verdict


def test_mme_counts_questions_and_images(mme_folder: str) -> None:
    """Everything right but one question of existence: 3/4 of its questions, 1/2 of its images."""
    questions = mme.read_questions(mme_folder)
    answers = {question.id: question.reference["answer"].title() for question in questions}
    wrong = next(question.id for question in questions if question.reference["subtask"] == "existence")
    got = scores("mme", questions, answers | {wrong: "I do not know"})
    assert (got["existence.acc"], got["existence.acc_plus"], got["existence"]) == (0.75, 0.5, 125)
    assert (got["perception"], got["cognition"]) == (525, 200)


def test_mme_reads_llavas_answers_by_image_and_prompt(write: Write, mme_folder: str) -> None:
    questions = mme.read_questions(mme_folder)
    lines = [
        {"question_id": question.image, "prompt": question.prompt, "text": question.reference["answer"]}
        for question in questions
    ]
    answers = mme.read_answers(write("llava.jsonl", lines=lines), questions)
    assert scores("mme", questions, answers)["perception"] == 600


# --- MMBench ----------------------------------------------------------------------------------------------------------


def picture() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, "PNG")
    return buffer.getvalue()


COLUMNS = ("index", "question", "hint", "A", "B", "C", "D", "answer", "category", "l2-category", "image", "split")


def tsv(rows: list[dict[str, Any]]) -> str:
    """Tab-separated as pandas writes it: cells with line breaks or quotes are quoted."""

    def cell(value: Any) -> str:
        text = str(value)
        return '"' + text.replace('"', '""') + '"' if any(mark in text for mark in '\n\t"') else text

    table = [COLUMNS, *(tuple(row.get(column, "") for column in COLUMNS) for row in rows)]
    return "".join("\t".join(map(cell, row)) + "\n" for row in table)


def mmbench_row(index: int, answer: str, *options: str, **others: str) -> dict[str, Any]:
    code = base64.b64encode(picture() + bytes(200_000)).decode()  # longer than the field limit of Python's csv
    shown = dict(zip("ABCD", options, strict=False))
    return {
        "index": index, "question": f"what is {index % 1_000_000}?", "answer": answer, **shown, "image": code,
        "category": "ocr", "l2-category": "perception", "split": "dev", **others,
    }  # fmt: skip


def test_mmbench_asks_as_llava_does(write: Write) -> None:
    rows = [
        mmbench_row(1, "B", "square", "circle", hint='A "hint"\nof two lines'),
        mmbench_row(1_000_001, "A", "circle", "square", hint="nan"),
    ]
    first, second = mmbench.read_questions(write("dev.tsv", tsv(rows)))
    assert first.prompt == (
        'A "hint"\nof two lines\nwhat is 1?\nA. square\nB. circle\n'
        "Answer with the option's letter from the given choices directly."
    )
    assert second.prompt == (
        "what is 1?\nA. circle\nB. square\nAnswer with the option's letter from the given choices directly."
    )
    assert (first.id, second.id) == ("1", "1000001")
    assert first.unit == second.unit
    assert isinstance(first.image, bytes)
    assert Image.open(io.BytesIO(first.image)).size == (4, 4)


def test_mmbench_rotations_are_made_where_the_file_has_none(write: Write) -> None:
    questions = mmbench.read_questions(write("dev.tsv", tsv([mmbench_row(7, "C", "x", "y", "z")])))
    assert [question.id for question in questions] == ["7", "1000007", "2000007"]
    assert [list(question.reference["options"].values()) for question in questions] == [[*"xyz"], [*"yzx"], [*"zxy"]]
    for question in questions:
        assert question.reference["options"][question.reference["answer"]] == "z"
        for letter, option in question.reference["options"].items():
            assert f"\n{letter}. {option}\n" in question.prompt
    lines = [{"question_id": 7, "round_id": turn, "text": "BAC"[turn]} for turn in range(3)]
    assert mmbench.read_answers(write("llava.jsonl", lines=lines), questions) == {
        "7": "B",
        "1000007": "A",
        "2000007": "C",
    }


def test_mmbench_counts_a_question_only_if_all_its_rotations_are_right(write: Write) -> None:
    rows = [
        mmbench_row(1, "B", "square", "circle"),
        mmbench_row(1_000_001, "A", "circle", "square"),
        mmbench_row(2, "A", "red", "blue", **{"category": "color"}),
        mmbench_row(1_000_002, "B", "blue", "red", **{"category": "color"}),
    ]
    questions = mmbench.read_questions(write("dev.tsv", tsv(rows)))
    answers = {"1": "B", "1000001": "(A) circle", "2": "A", "1000002": "A"}
    assert scores("mmbench", questions, answers) == {
        "accuracy": 0.5,
        "l2-category.perception": 0.5,
        "category.ocr": 1.0,
        "category.color": 0.0,
    }
    assert scores("mmbench", questions, answers | {"1000002": "B"})["accuracy"] == 1


@pytest.mark.parametrize(
    ("response", "letter"),
    [
        ("B", "B"),
        ("b", None),
        ("B.", "B"),
        ("(B) a cat", "B"),
        ("The answer is: B", "B"),
        ("A or B", None),
        ("A cat sits on the red mat", None),  # the letter is too far from the end, and two options are quoted
        ("it is Red", "C"),
        ("Z", None),
        ("a cat, a dog", None),
        ("Sorry, I can't help with images of people yet. B", None),
        ("red " * 20, None),
        ("", None),
        (None, None),
    ],
)
def test_letters_are_read_by_the_official_rules(response: str | None, letter: str | None) -> None:
    assert mmbench.read_letter(response, {"A": "a dog", "B": "a cat", "C": "red", "D": "3"}) == letter


@pytest.mark.parametrize("separator", [",", "\t"])
def test_mmbench_reads_tables_of_predictions(write: Write, separator: str) -> None:
    questions = mmbench.read_questions(write("dev.tsv", tsv([mmbench_row(1, "B", "x", "y")])))
    table = separator.join(("index", "question", "prediction")) + "\n"
    table += separator.join(("1", '"a ""b"",\nc"', "B")) + "\n" + separator.join(("1000001", "d", "A")) + "\n"
    assert mmbench.read_answers(write("predictions", table), questions) == {"1": "B", "1000001": "A"}


# --- what holds for all -----------------------------------------------------------------------------------------------


def asked(name: str, write: Write, request: pytest.FixtureRequest) -> tuple[list[Question], dict[str, str]]:
    """Questions of a benchmark, with answers that are all right."""
    if name == "vqav2":
        questions = asked_vqav2(write, [["a"] * 5 + ["cat"] * 5, ["dog"] * 10, ["2"] * 10])
        return questions, {"10": "cat", "20": "dog", "30": "two"}
    if name == "gqa":
        questions = request.getfixturevalue("gqa")
        return questions, {question.id: question.reference["answer"] for question in questions}
    if name == "textvqa":
        questions = textvqa.read_questions(*request.getfixturevalue("textvqa_files"))[:2]
        return questions, {"34602": "dakota", "34603": "yes"}
    if name == "mme":
        questions = mme.read_questions(request.getfixturevalue("mme_folder"))
    else:
        rows = [mmbench_row(1, "B", "square", "circle"), mmbench_row(2, "A", "red", "blue", "green")]
        questions = mmbench.read_questions(write("dev.tsv", tsv(rows)))
    return questions, {question.id: question.reference["answer"] for question in questions}


MAIN = {"vqav2": "accuracy", "gqa": "accuracy", "textvqa": "accuracy", "mme": "perception", "mmbench": "accuracy"}
OFFICIAL = {"vqav2": "question_id answer", "gqa": "questionId prediction", "textvqa": "question_id answer",
            "mme": "question_id text", "mmbench": "index prediction"}  # fmt: skip


@pytest.mark.parametrize("name", BENCHMARKS)
def test_scrambled_answers_score_less_and_none_score_nothing(
    name: str, write: Write, request: pytest.FixtureRequest
) -> None:
    questions, right = asked(name, write, request)
    best, missing = scored(name, questions, right)
    assert missing == 0
    assert best[MAIN[name]].score == {"mme": 600}.get(name, 1)
    moved = dict(zip(right, [*list(right.values())[1:], "?"], strict=True))
    assert scores(name, questions, moved)[MAIN[name]] < best[MAIN[name]].score
    for empty in ("", "\n"):
        nothing = BENCHMARKS[name].read_answers(write("empty", empty), questions)
        metrics, missing = scored(name, questions, nothing)
        assert missing == len(questions)
        assert metrics.keys() == best.keys()
        assert {metric.score for metric in metrics.values()} == {0}


@pytest.mark.parametrize("name", BENCHMARKS)
def test_our_own_lines_and_the_official_form_say_the_same(
    name: str, write: Write, request: pytest.FixtureRequest
) -> None:
    questions, right = asked(name, write, request)
    key, value = OFFICIAL[name].split()
    ours = write("answers.jsonl", lines=[{"id": i, "response": text, "unit": "x"} for i, text in right.items()])
    official = write("results.json", [{key: i, value: text} for i, text in right.items()])
    assert BENCHMARKS[name].read_answers(ours, questions) == right
    assert BENCHMARKS[name].read_answers(official, questions) == right


@pytest.mark.parametrize("name", BENCHMARKS)
@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"id": "@", "response": "x"}\n\n{"id": ', r"answers: line 3: not JSON: .*, at character \d+"),
        ('{"id": "@", "response": "x"}\n{"id": "no", "response": "x"}', "answers: line 2: got an answer to 'no'"),
        ('{"id": "@", "response": "x"}\n{"id": "@", "response": "x"}', "answers: line 2: got a second answer"),
        ('{"id": "@", "reply": "x"}', "answers: line 1: got keys id, reply, allowed: .*id and response"),
        ('{"id": "@", "response": 3}', "answers: line 1: got response = '3', allowed: response, a text"),
        ('{"id": 1.5, "response": "x"}', "answers: line 1: got id = '1.5'"),
        ('[{"id": "@", "response": "x"}, 7]', "answers: item 2: got a int, allowed: an object"),
        ('[{"id": "@", "response": "x"},\n', "answers: line 2: not JSON"),
        ("what is this", "answers: line 1: got keys what is this, allowed: "),
        ("id,response\n@,x,y\n", "answers: not a table: .*Expected 2 columns, got 3"),
    ],
)  # fmt: skip
def test_a_bad_answer_is_named_with_file_and_place(
    name: str, content: str, said: str, write: Write, request: pytest.FixtureRequest
) -> None:
    questions, right = asked(name, write, request)
    path = write("answers", content.replace("@", next(iter(right))))
    with pytest.raises(ValueError, match=said) as caught:
        BENCHMARKS[name].read_answers(path, questions)
    assert str(path) in str(caught.value)


def test_a_bad_line_of_mmes_official_form_is_named(write: Write, mme_folder: str) -> None:
    questions = mme.read_questions(mme_folder)
    write("results/existence.txt", "0001.png\tIs this existence 1? Please answer yes or no.\tYes\tYes\nx\ty\n")
    with pytest.raises(ValueError, match=r"existence\.txt: line 2: got 2 fields, allowed: image, question"):
        mme.read_answers(str(Path(write("results/count.txt", "")).parent), questions)
    write("results/existence.txt", "0009.png\tIs it? Please answer yes or no.\tYes\tYes\n")
    with pytest.raises(ValueError, match=r"existence\.txt: line 1: got an answer to 'existence/0009/Is it\?'"):
        mme.read_answers(str(Path(write("results/count.txt", "")).parent), questions)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("vqav2", '{"questions": [', "line 1: not JSON"),
        ("vqav2", "3", "VQAv2: got .*, 0 of them with 'questions', allowed: one of questions"),
        ("vqav2", '{"data_subtype": "val2014", "questions": [{"question_id": 1}]}', "item 1: got keys question_id"),
        ("gqa", "[]", "got a list, allowed: an object of questions by id"),
        ("gqa", '{"201": {"question": "Is it?"}}', "question 201: got keys question, allowed: imageId, a text"),
        ("textvqa", '{"data": [{"image_id": "x", "question": 3}]}', "item 1: got question = '3', allowed: question"),
        ("textvqa", '{"data": [{"image_id": "x", "question": "y", "question_id": 1, "answers": [1]}]}', "1, answers 1"),
        ("mme", "Is it?\tYes\n", "got no questions, allowed: a folder with subtasks"),
        ("mmbench", "index\tquestion\tA\timage\nx\tq\ta\tAAAA\n", "row 1: got index 'x', allowed: a whole number"),
        ("mmbench", "index\tquestion\tA\timage\n1\tq\ta\t!!\n", "row 1: got image '!!'…, allowed: base64"),
        ("mmbench", "index\tquestion\tA\tanswer\timage\n1\tq\ta\tB\tAAAA\n", "row 1: got answer 'B', allowed: A"),
        ("mmbench", "index\tquestion\timage\n1\tq\tAAAA\n", "row 1: got no option"),
    ],
)  # fmt: skip
def test_a_bad_file_of_questions_is_named_with_the_place(name: str, content: str, said: str, write: Write) -> None:
    path = write("questions", content)
    with pytest.raises(ValueError, match=said) as caught:
        BENCHMARKS[name].read_questions(path)
    assert path in str(caught.value)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_file_that_is_not_there_is_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere"):
        BENCHMARKS[name].read_questions(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="nowhere"):
        BENCHMARKS[name].read_answers(str(tmp_path / "nowhere"), [])


@pytest.mark.parametrize("name", BENCHMARKS)
def test_rows_are_json_and_score_the_same_after_a_round_trip(
    name: str, write: Write, request: pytest.FixtureRequest
) -> None:
    questions, right = asked(name, write, request)
    rows, _ = join_answers(questions, right)
    again = [json.loads(json.dumps(row)) for row in rows]
    assert BENCHMARKS[name].compute_metrics(again) == BENCHMARKS[name].compute_metrics(rows)
    assert len({question.id for question in questions}) == len(questions)


def test_an_answer_to_no_question_is_named() -> None:
    with pytest.raises(ValueError, match="got one to 'x'"):
        join_answers([], {"x": "y"})
