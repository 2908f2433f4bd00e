"""Fixtures: files of the benchmarks in their official forms."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from redux.benchmarks import BENCHMARKS, Question
from tests.redux.benchmarks.official_files import SUBTASKS, Write


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
