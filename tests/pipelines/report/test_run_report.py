"""Tests of the report: it agrees with the run folder, needs no other file, and never runs a script."""

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipelines.evaluation.answer_files import PROVENANCE_FILE
from pipelines.evaluation.evaluate import Example
from pipelines.report import run_report
from pipelines.report.run_report import smooth_curve, wilson_interval, write_report

VOID = {"meta", "img", "br", "link", "input", "hr"}
ATTACK = "<script>alert(1)</script>"
TYPES = {"yes/no": (61, 70), "shape": (19, 20), "colour": (10, 10)}  # right, asked


class Page(HTMLParser):
    """Elements, attributes and table rows of a page; a tag that is closed out of order is an error."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.words = ""
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th") and self.rows:
            self.rows[-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        self.words += data
        if self.rows and self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data

    def row(self, first: str) -> list[str]:
        return next(row for row in self.rows if row and row[0] == first)

    def attributes(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


def steps(stage: str, count: int, **changes: Any) -> list[dict[str, Any]]:
    return [
        {"stage": stage, "step": step, "loss": 4.0 / step, "learning_rate": 1e-3 / step, "grad_norm": 1.0,
         "samples": 32, "tokens": 3200, "data_s": 0.1, "compute_s": 0.3} | changes
        for step in range(1, count + 1)
    ]  # fmt: skip


def answers() -> list[dict[str, Any]]:
    rows = []
    for kind, (right, asked) in TYPES.items():
        for number in range(asked):
            correct = number < right
            rows.append(
                {"id": f"{kind}-{number}", "unit": "0", "image": "0", "prompt": "?", "answer": f"the {kind}",
                 "type": kind, "response": f"the {kind}" if correct else f"not the {kind}"}
            )  # fmt: skip
    return rows


def events() -> list[dict[str, Any]]:
    """Make the events of two steps, a crash 20 seconds later, and one repeated step: 100 seconds in total."""
    times: list[tuple[float, str, dict[str, Any]]] = [
        (0, "launch", {}), (4, "start", {"cursor": 0}), (20, "step", {"step": 1, "data_s": 1, "compute_s": 10}),
        (35, "step", {"step": 2, "data_s": 2, "compute_s": 13}), (55, "start", {"cursor": 1}),
        (80, "step", {"step": 2, "data_s": 8, "compute_s": 15}), (95, "evaluate", {"wall_s": 12.5}), (100, "end", {}),
    ]  # fmt: skip
    return [{"at": 1.7e9 + at, "event": event, "stage": "tower", "stall_s": 0, **more} for at, event, more in times]


def jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def example(**changes: Any) -> Example:
    slot = np.concatenate([np.arange(6), 6 + np.arange(8) % 3, np.full(2, -1)])
    fields = {"question": "what shape?", "answer": "circle", "response": "circle", "correct": True} | changes
    return Example(Image.new("RGB", (64, 64), "teal"), slot=slot, merged=slot >= 6, **fields)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "job.yaml").write_text("name: quick & small\nseed: 7\n")
    jsonl(folder / "metrics.jsonl", steps("tower", 40) + steps("instruct", 80))
    (folder / "answers").mkdir()
    jsonl(folder / "answers/easy_vqa.jsonl", answers())
    metrics = {"easy_vqa.accuracy": 0.9, "easy_vqa.questions": 100, "wall_s": 700.0, "wall_s.tower": 100.0,
               "wall_s.instruct": 595.0, "goodput.unheard_of": 0.875}  # fmt: skip
    (folder / "metrics.json").write_text(json.dumps(metrics))
    return folder


def page(run: Path, examples: Sequence[Example] = ()) -> Page:
    return Page(write_report(run, examples).read_text(encoding="utf-8"))


def test_accuracy_by_type_equals_a_hand_count(run: Path):
    read = page(run)
    assert read.row("yes/no")[1:4] == ["70", "61", "87.1 %"]
    assert read.row("shape")[1:4] == ["20", "19", "95.0 %"]
    assert read.row("colour")[1:5] == ["10", "10", "100.0 %", "72.2 % – 100.0 %"]
    assert read.row("all")[1:4] == ["100", "90", "90.0 %"]


def test_instructions_are_shown_one_by_one_and_together(run: Path):
    said = {"punctuation:no_comma": ["red", "yes, red"], "detectable_format:json_format": ['{"answer": "red"}', "red"]}
    rows = [
        {"unit": f"q{number}", "task": task, "instruction_id": id, "kwargs": {}, "answer": "red", "response": response}
        for task, (id, responses) in zip((1, 9), said.items(), strict=True)
        for number in range(40)
        for response in [responses[number >= 10]]
    ]
    jsonl(run / "answers" / "instructions.jsonl", rows)
    (run / "answers" / PROVENANCE_FILE).write_text('{"splitter": "regex"}')
    read = page(run)
    assert read.row("json")[1:4] == ["40", "10", "25.0 %"]
    assert read.row("no comma")[1:4] == ["40", "10", "25.0 %"]
    assert read.row("all, strict")[1:4] == ["80", "20", "25.0 %"]
    assert read.row("all, and correct")[1:4] == ["80", "20", "25.0 %"]
    low, high = (float(end.split()[0]) for end in read.row("all, strict")[4].split("–"))
    assert high - low > 25, "forty questions, not eighty"
    assert "regular expressions, not by Punkt" in read.words


def test_wrong_answers_are_counted_most_frequent_first(run: Path):
    rows = page(run).rows
    wrong = [row for row in rows if len(row) == 4 and row[1].startswith("not ")]
    assert wrong == [["the yes/no", "not the yes/no", "9", "12.9 %"], ["the shape", "not the shape", "1", "5.0 %"]]


def test_header_holds_name_accuracy_interval_and_wall_time(run: Path):
    words = page(run).words
    assert "quick & small" in words
    assert re.search(r"90\.0 %\s+82\.6 % to 94\.5 %, n = 100", words)
    assert "11 min 40 s" in words


def test_the_training_loop_has_the_seconds_of_the_account(run: Path):
    """Waiting for the first batch of a stage counts as starting up in both tables."""
    steps = [
        {"event": "step", "stage": "instruct", "step": number, "at": at, "data_s": data, "compute_s": 6, "stall_s": 1}
        for number, at, data in ((1, 40.0, 24.0), (2, 50.0, 2.0), (3, 60.0, 3.0))
    ]
    launch = {"event": "launch", "stage": "instruct", "at": 0.0}
    jsonl(run / "ledger.jsonl", [launch, *steps, {"event": "end", "stage": "instruct", "at": 60.0}])
    read = page(run)
    assert read.row("computing")[1] == read.row("Instruction tuning")[4] == "18.0 s"
    assert read.row("waiting for data")[1] == read.row("Instruction tuning")[5] == "5.0 s"
    assert read.row("checkpoints")[1] == "3.0 s"
    assert read.row("starting up")[1] == "33.0 s"
    assert read.row("Instruction tuning")[6] == "19.2 %"  # 5 of 26 seconds


def test_wall_time_is_split_among_the_steps_and_what_is_left(run: Path):
    read = page(run)
    assert read.row("instruct")[2:] == ["9 min 55 s", "85 %"]
    assert read.row("between steps")[2:] == ["5.0 s", "1 %"]


def test_the_parts_of_the_wall_time_are_told_and_drawn(run: Path):
    assert "Goodput" not in page(run).words
    jsonl(run / "ledger.jsonl", events())
    read = page(run)
    expected = {
        "computing": 25, "evaluating": 12.5, "waiting for data": 0, "checkpoints": 0, "starting up": 10,
        "other": 7.5, "restarting": 30, "repeated steps": 15
    }  # fmt: skip
    assert {name: read.row(name)[1:] for name in expected} == {
        name: [f"{seconds:.1f} s", f"{seconds:.1f} %"] for name, seconds in expected.items()
    }
    assert ["all", "1 min 40 s", ""] in read.rows
    assert "Goodput 25.0 %" in read.words
    assert "1 restart, 1 step repeated" in " ".join(read.words.split())
    bars = [attrs for attrs in read.attributes("rect") if "var(--" in (attrs.get("fill") or "")]
    assert [float(bar["width"] or 0) for bar in bars] == [seconds for seconds in expected.values() if seconds]
    places = [(float(bar["x"] or 0), float(bar["width"] or 0)) for bar in bars]
    assert all(x + width == after for (x, width), (after, _) in pairwise([*places, (100.0, 0.0)]))


def test_a_ledger_in_which_no_time_has_passed_shows_nothing(run: Path):
    jsonl(run / "ledger.jsonl", events()[:1])
    assert "Goodput" not in page(run).words


def test_numbers_nobody_foresaw_are_shown(run: Path):
    assert page(run).row("goodput.unheard_of") == ["goodput.unheard_of", "0.875"]


def test_nothing_comes_from_elsewhere_and_nothing_runs(run: Path):
    jsonl(run / "ledger.jsonl", events())
    read = page(run, [example()])
    for tag, attrs in read.tags:
        for name in ("src", "href", "xlink:href", "srcset", "data"):
            assert (attrs.get(name) or "#").startswith(("#", "data:image/png;base64,")), (tag, attrs)
        assert not [name for name in attrs if name.startswith("on")]
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in read.tags}
    assert any("default-src 'none'" in (attrs.get("content") or "") for attrs in read.attributes("meta"))


def test_texts_are_escaped(run: Path):
    (run / "job.yaml").write_text(f'name: "{ATTACK}"\n')
    row = {"id": "0", "image": "0", "question": ATTACK, "answer": ATTACK, "response": ATTACK + "!", "correct": False}
    jsonl(run / "answers/easy_vqa.jsonl", [row | {"type": ATTACK}])
    jsonl(run / "metrics.jsonl", steps(ATTACK, 3))
    read = page(run, [example(question=ATTACK, answer=ATTACK, response=ATTACK)])
    assert "script" not in {tag for tag, _ in read.tags}
    assert read.words.count(ATTACK) >= 8


def test_examples_show_counts_and_verdicts(run: Path):
    read = page(run, [example(), example(), example(response="square", correct=False), example(correct=False)])
    assert (read.words.count("✓ correct"), read.words.count("✗ wrong")) == (2, 2)
    words = " ".join(read.words.split())
    assert words.count("16 → 9 visual tokens: 6 kept, 8 merged into 3, 2 dropped") == 4
    assert "44 % removed" in words
    images = read.attributes("img")
    assert len(images) == 8
    assert all(attrs["alt"] for attrs in images)
    assert "6 kept, 8 merged into 3, 2 dropped" in (images[1]["alt"] or "")


def test_page_can_be_read_aloud(run: Path):
    jsonl(run / "ledger.jsonl", events())
    read = page(run, [example()])
    assert read.attributes("html")[0]["lang"] == "en"
    assert all(attrs.get("scope") in ("row", "col") for attrs in read.attributes("th"))
    assert all(attrs.get("role") == "img" and attrs.get("aria-label") for attrs in read.attributes("svg"))
    assert len(read.attributes("svg")) == 3


def test_ids_are_unique_and_every_reference_within_the_page_is_met(run: Path):
    jsonl(run / "ledger.jsonl", events())
    text = write_report(run, [example()]).read_text(encoding="utf-8")
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="#|url\(#|aria-labelledby=")([^")]+)', text)) <= set(ids)


@pytest.mark.parametrize(
    "files", [(), ("job.yaml",), ("metrics.jsonl",), ("answers/easy_vqa.jsonl",), ("metrics.json",), ("ledger.jsonl",)]
)
def test_a_run_folder_with_pieces_missing_has_a_report(run: Path, files: tuple[str, ...]):
    jsonl(run / "ledger.jsonl", events())
    for file in run.rglob("*.*"):
        if str(file.relative_to(run)) not in files:
            file.unlink()
    read = page(run)
    assert ("quick & small" if "job.yaml" in files else "folder") in read.words


@pytest.mark.parametrize(
    "rows",
    [
        steps("tower", 1),
        steps("tower", 2, loss=float("nan")),
        steps("tower", 5, learning_rate=0.0, loss=-1.0),
        steps("tower", 5, data_s=0.0, compute_s=0.0),
        [{"stage": "odd one", "step": 1, "loss": 1.0}],
    ],
)
def test_odd_stages_are_drawn(run: Path, rows: list[dict[str, Any]]):
    jsonl(run / "metrics.jsonl", rows)
    assert len(page(run).attributes("svg")) == 1


def test_the_same_run_gives_the_same_bytes_and_leaves_no_other_file(run: Path):
    before = {file.name for file in run.iterdir()}
    first = write_report(run, [example()]).read_bytes()
    assert write_report(run, [example()]).read_bytes() == first
    assert {file.name for file in run.iterdir()} == before | {"report.html"}


def test_a_report_that_fails_leaves_the_old_one(run: Path):
    old = write_report(run, []).read_bytes()
    (run / "metrics.jsonl").write_text("{half a line\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl: line 1: got"):
        write_report(run, [])
    assert (run / "report.html").read_bytes() == old


# Newcombe 1998, Statistics in Medicine 17, p. 857-872, table I, method 3
@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_interval_of_published_tables(successes: int, n: int, low: float, high: float):
    assert wilson_interval(successes, n) == pytest.approx((low, high), abs=5e-5)
    assert wilson_interval(n - successes, n) == pytest.approx((1 - high, 1 - low), abs=5e-5)


def test_wilson_interval_of_no_trials_is_everything():
    assert wilson_interval(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize("length", [1, 2, 49, 50, 1000])
def test_smoothing_keeps_a_constant_and_skips_what_is_no_number(length: int):
    values = np.full(length, 2.5)
    assert smooth_curve(values) == pytest.approx(values)
    if length > 50:
        values[length // 2] = np.nan
        assert smooth_curve(values) == pytest.approx(np.full(length, 2.5))


def test_importing_the_settings_loads_nothing_heavy():
    heavy = {"torch", "ray", "matplotlib", "numpy", "PIL", "jinja2"}
    code = f"import sys, pipelines.report.run_report; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_the_loss_plot_shows_the_losses_of_validated_steps() -> None:
    rows = [row | ({"validation_loss": 8.0 / row["step"]} if row["step"] % 2 == 0 else {}) for row in steps("tower", 4)]
    plain, validated = run_report._plot_loss("tower", steps("tower", 4)), run_report._plot_loss("tower", rows)
    assert "; validation loss 2" in validated.svg
    assert "validation" not in plain.svg
    assert validated.last == plain.last
