"""MME: official files in, LLaVA's prompts and official scores out.

The reference follows the official scorer step by step.
"""

import random
from pathlib import Path

import pytest

from redux.benchmarks import mme
from tests.redux.benchmarks.official_files import SUBTASKS, Write, scores


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
        for pair in (lines[start : start + 2] for start in range(0, len(lines), 2)):
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


def test_a_bad_line_of_mmes_official_form_is_named(write: Write, mme_folder: str) -> None:
    questions = mme.read_questions(mme_folder)
    write("results/existence.txt", "0001.png\tIs this existence 1? Please answer yes or no.\tYes\tYes\nx\ty\n")
    with pytest.raises(ValueError, match=r"existence\.txt: line 2: got 2 fields, allowed: image, question"):
        mme.read_answers(str(Path(write("results/count.txt", "")).parent), questions)
    write("results/existence.txt", "0009.png\tIs it? Please answer yes or no.\tYes\tYes\n")
    with pytest.raises(ValueError, match=r"existence\.txt: line 1: got an answer to 'existence/0009/Is it\?'"):
        mme.read_answers(str(Path(write("results/count.txt", "")).parent), questions)
