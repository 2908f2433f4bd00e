"""Tests of the report: it agrees with the run folder, needs no other file, and never runs a script."""

import functools
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from PIL import Image

from pipelines.evaluation.answer_files import PROVENANCE_FILE
from pipelines.evaluation.tasks import TaskSettings
from pipelines.report import run_report
from pipelines.report.environment import ENVIRONMENT_FILE
from pipelines.report.gallery import select_rows
from pipelines.report.run_report import Report, ReportedModel, smooth_curve, write_run_report
from pipelines.report.scores import JudgedRow, describe_scores, wilson_interval
from redux.architecture import LanguageSizes, ModelSettings, TowerSizes
from redux.configuration import build_config
from redux.settings import CMAI, VMTC
from redux.trace import ImageTrace

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
                {"id": f"{kind}-{number}", "unit": f"{kind}-{number}", "image": "test/images/0.png", "prompt": "?",
                 "answer": f"the {kind}",
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


def trace(images: Sequence[bytes]) -> list[ImageTrace]:
    """Trace images of 4 x 4 patches: 6 are kept, 8 are merged into 3 tokens, 2 are dropped."""
    slot = np.concatenate([np.arange(6), 6 + np.arange(8) % 3, np.full(2, -1)])
    return [ImageTrace(Image.new("RGB", (64, 64), "teal"), slot, slot >= 6) for _ in images]


def llava() -> ReportedModel:
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16}
    settings = ModelSettings(
        tower=TowerSizes(image_size=16, patch_size=4, num_hidden_layers=4, **sizes),
        language=LanguageSizes(num_hidden_layers=2, **sizes),
        vmtc=VMTC(tokens=8, stages=1),
        cmai=CMAI(),
    )
    return ReportedModel(path="model", config=build_config(settings, 100), trace=trace)


def own_questions(folder: Path, count: int, **changes: Any) -> list[dict[str, Any]]:
    """Make rows of questions of a user about two images in a folder; every fourth response is wrong."""
    folder.mkdir(exist_ok=True)
    for number, colour in enumerate(("red", "green")):
        Image.new("RGB", (900, 600), colour).save(folder / f"{number}.jpg")
    return [
        {"id": str(number), "unit": f"{number % 2}.jpg", "prompt": f"colour {number}?", "image": f"{number % 2}.jpg",
         "answers": [("red", "green")[number % 2]], "type": ("near", "far")[number % 4 // 2], "metric": "exact",
         "response": ("red", "green")[number % 2] if number % 4 else "purple"} | changes
        for number in range(count)
    ]  # fmt: skip


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


plot_loss = run_report._plot_loss


@functools.cache
def plot_loss_once(stage: str, rows: str) -> run_report.LossPlot:
    """Draw a loss curve, which many tests share. The rows are JSON."""
    return plot_loss(stage, json.loads(rows))


def page(run: Path, model: ReportedModel | None = None, **options: Any) -> Page:
    with patch.object(run_report, "_plot_loss", lambda stage, rows: plot_loss_once(stage, json.dumps(rows))):
        return Page(write_run_report(run, model=model, **options).path.read_text(encoding="utf-8"))


def test_accuracy_by_type_equals_a_hand_count(run: Path):
    read = page(run)
    assert read.row("yes/no")[1:3] == ["70", "87.1 %"]
    assert read.row("shape")[1:3] == ["20", "95.0 %"]
    assert read.row("colour")[1:4] == ["10", "100.0 %", "72.2 – 100.0 %"]
    assert read.row("accuracy")[1:3] == ["100", "90.0 %"]


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
    assert read.row("json")[1:3] == ["40", "25.0 %"]
    assert read.row("no comma")[1:3] == ["40", "25.0 %"]
    assert read.row("followed (strict)")[1:3] == ["80", "25.0 %"]
    assert read.row("followed and correct")[1:3] == ["80", "25.0 %"]
    low, high = (float(end.split()[0]) for end in read.row("followed (strict)")[3].split("–"))
    assert high - low > 25, "forty questions, not eighty"
    assert "regular expressions, not by Punkt" in read.words


def test_a_matrix_counts_the_responses_to_each_reference_answer(run: Path):
    read = page(run)
    # Columns are the references by type, then other responses.
    assert read.row("the colour")[1:] == ["10", "0", "0", "0"]
    assert read.row("the shape")[1:] == ["0", "19", "0", "1"]
    assert read.row("the yes/no")[1:] == ["0", "0", "61", "9"]


def test_many_reference_answers_have_a_list_of_confusions(run: Path):
    rows = [{**row, "answer": f"{number % 30}", "response": f"{number % 30 + number % 2}"}
            for number, row in enumerate(answers() * 3)]  # fmt: skip
    for number, row in enumerate(rows):
        row["id"] = str(number)
    jsonl(run / "answers/easy_vqa.jsonl", rows)
    wrong = [row for row in page(run).rows if len(row) == 4 and row[3] == "100.0 %"]
    assert len(wrong) == 8
    assert all(int(row[1]) == int(row[0]) + 1 and row[2] == "10" for row in wrong)


def test_header_holds_name_accuracy_interval_and_wall_time(run: Path):
    words = " ".join(page(run).words.split())
    assert "quick & small" in words
    found = re.search(r"easy-VQA, accuracy 90\.0 % 95 %: (\S+) to (\S+) % 100 questions", words)
    assert found
    assert float(found[1]) == pytest.approx(82.6, abs=2)
    assert float(found[2]) == pytest.approx(94.5, abs=2)
    assert "11 min 40 s" in words


def test_scores_are_described_in_a_line_for_each_task(run: Path, tmp_path: Path):
    jsonl(run / "answers/mine.jsonl", own_questions(tmp_path / "scans", 8))
    jsonl(run / "answers/open.jsonl", [{"id": "1", "unit": "1", "prompt": "?", "response": "a", "metric": "exact"}])
    lines = describe_scores(run)
    assert re.fullmatch(r"easy-VQA, accuracy: 90\.0 % \(95 % interval 8\d\.\d to 9\d\.\d %\), 100 questions", lines[0])
    assert re.fullmatch(r"mine, accuracy: 75\.0 % \(95 % interval \d+\.\d to \d+\.\d %\), 8 questions", lines[1])
    assert lines[2].startswith("open: no score of 1 question. ")


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
    (run / "metrics.json").write_text('{"wall_s": 100.0, "wall_s.tower": 100.0}')
    read = page(run)
    expected = {
        "computing": 25, "evaluating": 12.5, "waiting for data": 0, "checkpoints": 0, "starting up": 10,
        "other": 7.5, "starting again": 30, "repeated steps": 15
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


@pytest.mark.parametrize(
    ("recorded", "shown"),
    [(700.0, "11 min 40 s"), (60.0, "1 min 40 s"), (None, "1 min 40 s")],
    ids=["with shards and report", "with a crash of the command", "unfinished"],
)
def test_a_report_shows_one_wall_time(run: Path, recorded: float | None, shown: str) -> None:
    """In the header, as the sum of the parts, and as the sum of the steps of the job."""
    jsonl(run / "ledger.jsonl", events())
    if recorded is None:
        (run / "metrics.json").unlink()
    else:
        (run / "metrics.json").write_text(json.dumps({"wall_s": recorded, "wall_s.tower": recorded - 10}))
    read = page(run)
    assert ["all", shown, ""] in read.rows
    if recorded:
        assert f"Wall time {shown}" in " ".join(read.words.split())
    outside = [row for row in read.rows if row[0] == "before and after training"]
    assert [row[1] for row in outside] == (["10 min 00 s"] if recorded == 700 else [])


def test_an_own_stop_is_no_restart(run: Path) -> None:
    stopped = [event for event in events() if event["at"] <= 1.7e9 + 35] + [
        {"at": 1.7e9 + 40, "event": "stop", "stage": "tower"},
        {"at": 1.7e9 + 90_000, "event": "launch", "stage": "tower"},
        {"at": 1.7e9 + 90_010, "event": "start", "stage": "tower", "cursor": 2},
        {"at": 1.7e9 + 90_020, "event": "step", "stage": "tower", "step": 3, "data_s": 0, "compute_s": 9, "stall_s": 0},
    ]
    jsonl(run / "ledger.jsonl", stopped)
    assert "0 restarts, resumed once after a stop, 0 steps repeated" in " ".join(page(run).words.split())


def test_a_ledger_in_which_no_time_has_passed_shows_nothing(run: Path):
    jsonl(run / "ledger.jsonl", events()[:1])
    assert "Goodput" not in page(run).words


def test_numbers_nobody_foresaw_are_shown(run: Path):
    assert page(run).row("goodput.unheard_of") == ["goodput.unheard_of", "0.875"]


def test_nothing_comes_from_elsewhere_and_nothing_runs(run: Path):
    jsonl(run / "ledger.jsonl", events())
    read = page(run, llava())
    for tag, attrs in read.tags:
        for name in ("src", "href", "xlink:href", "srcset", "data"):
            assert (attrs.get(name) or "#").startswith(("#", "data:image/png;base64,", "data:image/jpeg;base64,")), (
                tag,
                attrs,
            )
        assert not [name for name in attrs if name.startswith("on")]
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in read.tags}
    assert any("default-src 'none'" in (attrs.get("content") or "") for attrs in read.attributes("meta"))


def test_texts_are_escaped(run: Path):
    (run / "job.yaml").write_text(f'name: "{ATTACK}"\n')
    row = {"id": "0", "unit": ATTACK, "image": ATTACK, "prompt": ATTACK, "answer": ATTACK, "response": ATTACK + "!"}
    jsonl(run / "answers/easy_vqa.jsonl", [row | {"type": ATTACK}])
    jsonl(run / f"answers/{ATTACK.replace('/', '')}.jsonl", own_questions(run / "images", 4, type=ATTACK))
    jsonl(run / "metrics.jsonl", steps(ATTACK, 3))
    read = page(run, llava())
    assert "script" not in {tag for tag, _ in read.tags}
    assert read.words.count(ATTACK) >= 8


def test_hostile_texts_leave_the_page_whole_and_small(run: Path):
    texts = ["</style></dd><b>" * 40_000, "\u202eمرحبا" * 50_000, "x" * 1_000_000, "\ud800 \x00", "", None]
    rows = [
        row | {"prompt": text or "?", "response": text, "type": (text or "none")[:100_000]}
        for row, text in zip(own_questions(run / "images", len(texts)), texts, strict=True)
    ]
    jsonl(run / "answers/mine.jsonl", rows)
    settings = {"mine": TaskSettings(file="mine.jsonl", metric="exact", images=str(run / "images"))}
    written = write_run_report(run, tasks=settings, model=llava())
    assert written.path.stat().st_size < 1_000_000
    read = Page(written.path.read_text(encoding="utf-8"))
    assert {"b", "script"}.isdisjoint(tag for tag, attrs in read.tags if not attrs) or read.words.count("→")
    assert "(1,000,000 characters)" in read.words
    assert all(attrs.get("dir") == "auto" for attrs in read.attributes("dd") if "long" in (attrs.get("class") or ""))


# --- own questions ---------------------------------------------------------------------------------------------------


def test_own_questions_have_a_score_types_a_matrix_and_pictures(run: Path):
    jsonl(run / "answers/mine.jsonl", own_questions(run / "images", 40))
    settings = {"mine": TaskSettings(file="mine.jsonl", metric="exact", images=str(run / "images"))}
    read = page(run, tasks=settings)
    words = " ".join(read.words.split())
    assert "mine, accuracy 75.0 %" in words
    assert read.row("near")[1:3] == ["20", "50.0 %"]
    assert read.row("far")[1:4] == ["20", "100.0 %", "34.2 – 100.0 %"]  # Wilson's interval of two images
    assert read.row("red")[1:] == ["0", "10", "10"]  # of green, red and other
    images = read.attributes("img")
    assert len(images) == 24 + 24
    assert all((image["src"] or "").startswith("data:image/") for image in images)
    assert words.count("no image:") == 0


def test_wrong_answers_come_first_and_right_ones_are_not_missing():
    rows = [JudgedRow({"id": number}, float(number % 2), "ab"[number % 3 == 0], ()) for number in range(100)]
    selected = select_rows(rows, 12)
    assert [judged.score for judged in selected] == [0.0] * 9 + [1.0] * 3
    assert {judged.kind for judged in selected[:9]} == {judged.kind for judged in selected[9:]} == {"a", "b"}
    assert len(select_rows(rows[:6], 12)) == 6
    assert select_rows(rows, 0) == []


def test_missing_images_leave_a_placeholder(run: Path):
    rows = own_questions(run / "images", 6)
    rows[0]["image"], rows[1]["image"] = "absent.jpg", None
    (run / "images/broken.jpg").write_bytes(b"no image")
    rows[2]["image"] = "broken.jpg"
    jsonl(run / "answers/mine.jsonl", rows)
    settings = {"mine": TaskSettings(file="gone.jsonl", metric="exact", images=str(run / "images"))}
    read = page(run, llava(), tasks=settings)
    words = " ".join(read.words.split())
    assert "no image: absent.jpg: not found" in words
    assert "no image: not an image that can be read" in words
    assert "text without an image" in words


def test_a_task_whose_files_are_gone_is_shown_without_images(run: Path):
    rows = [
        {"id": f"{n}", "unit": "i", "prompt": "?", "answer": "yes", "balanced": True, "response": "yes"}
        for n in range(3)
    ]
    jsonl(run / "answers/gqa.jsonl", rows)
    words = " ".join(page(run, tasks={"gqa": TaskSettings(files=("gone.json",))}).words.split())
    assert "GQA, accuracy 100.0 %" in words
    assert words.count("no image: the questions cannot be read again") == 3


def test_answers_that_cannot_be_scored_are_shown(run: Path):
    jsonl(run / "answers/mme.jsonl", [{"id": "0", "prompt": "is it red?", "response": "yes"}])
    words = page(run).words
    assert "The answers cannot be scored: KeyError" in words
    assert "is it red?" in words


def test_points_are_shown_with_their_maximum(run: Path):
    rows = [
        {"id": f"{image}/{number}", "unit": f"existence/{image}", "prompt": "?", "subtask": "existence",
         "answer": "yes", "response": "Yes" if number or image % 2 else "No"}
        for image in range(10) for number in range(2)
    ]  # fmt: skip
    jsonl(run / "answers/mme.jsonl", rows)
    assert re.search(r"MME, perception, points 125 95 %: \d+ to \d+ of 200", " ".join(page(run).words.split()))


def test_the_page_stays_small_with_many_photos(run: Path):
    rows = own_questions(run / "images", 200)
    noise = np.random.default_rng(0)
    for number in range(2):
        photo = Image.fromarray(noise.integers(0, 256, (45, 60, 3), dtype=np.uint8)).resize((1200, 900))
        photo.save(run / f"images/{number}.jpg")
    for task in ("one", "two", "three", "four", "five", "six"):
        jsonl(run / f"answers/{task}.jsonl", rows)
    settings = {path.stem: TaskSettings(file="x.jsonl", metric="exact", images=str(run / "images"))
                for path in (run / "answers").iterdir() if path.stem != "easy_vqa"}  # fmt: skip
    written = write_run_report(run, tasks=settings, model=llava())
    assert len(written.pictures) == 6 * 2 + 1, "two images of each own task, one of easy-VQA"
    assert written.path.stat().st_size < 4_000_000


def test_filters_need_no_script(run: Path):
    jsonl(run / "answers/mine.jsonl", own_questions(run / "images", 8))
    text = write_run_report(run).path.read_text(encoding="utf-8")
    read = Page(text)
    radios = {attrs["id"]: attrs["name"] for attrs in read.attributes("input")}
    assert {"task-1", "task-2", "only-wrong", "type-2-1", "type-2-2"} <= radios.keys()
    for id in radios:
        assert id.endswith("-all") or f"#{id}:checked" in text, id
    assert len([attrs for attrs in read.attributes("input") if "checked" in attrs]) == len(set(radios.values()))


# --- other runs ------------------------------------------------------------------------------------------------------


def test_an_unfinished_run_shows_what_there_is(run: Path):
    for name in ("metrics.json", "answers/easy_vqa.jsonl"):
        (run / name).unlink()
    jsonl(run / "progress.jsonl", [{"step": "shards", "wall_s": 1.0}, {"step": "tower", "wall_s": 2.0}])
    (run / "answers/.easy_vqa.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in answers()[:65]) + '{"id": "ha'
    )
    words = " ".join(page(run).words.split())
    assert "not finished finished phases: shards, tower" in words
    assert "65 questions so far" in words
    assert f"redux run {run}/job.yaml" in words or "job.yaml --runs-dir" in words


def test_a_finished_run_says_what_comes_next(run: Path):
    (run / "job.yaml").write_text("name: mine\ntrain: {instruct: {}}\nevaluate: {tasks: {easy_vqa: {}}}\n")
    words = page(run, llava()).words
    for verb in ("ask", "chat", "serve", "export", "tables", "report"):
        assert f"redux {verb} " in words
    assert "name=mine-cmai-off" in words
    assert "--compare" in words
    assert "redux ask" not in page(run).words, "there is no model"


def test_cost_is_compared_with_llava(run: Path):
    read = page(run, llava())
    assert read.row("Image tokens")[1:] == ["8", "16", "0.50"]
    assert float(read.row("FLOPs of a prompt with 64 text tokens")[3]) < 1
    assert "16 → 8" in read.words


def test_the_machine_and_the_code_of_all_launches_are_named(run: Path):
    launch = {"at": 1.7e9, "commit": "a" * 40, "is_modified": True, "cpu": "Processor 9", "cpus": 8, "nodes": 1,
              "gpus": {"H100": 2}, "system": "Linux", "versions": {"torch": "2.13.0"}}  # fmt: skip
    jsonl(run / ENVIRONMENT_FILE, [launch, launch | {"gpus": {}, "at": 1.8e9}])
    read = page(run)
    assert read.row("started")[1] == "2023-11-14 22:13 UTC"
    assert read.row("GPUs")[1] == "2 × H100"
    assert read.row("launches")[1] == "2"
    assert read.row("commit")[1] == "a" * 40 + " with changes"


def test_a_model_that_cannot_be_loaded_leaves_a_note(run: Path):
    def fail(images: Sequence[bytes]) -> list[ImageTrace]:
        raise ValueError("model.safetensors is damaged")

    model = ReportedModel(path="model", config=llava().config, trace=fail)
    assert "The patches are not shown: model.safetensors is damaged" in page(run, model).words


def test_patches_show_counts_and_verdicts(run: Path):
    jsonl(run / "answers/mine.jsonl", own_questions(run / "images", 8))
    settings = {"mine": TaskSettings(file="mine.jsonl", metric="exact", images=str(run / "images"))}
    read = page(run, llava(), tasks=settings, report=Report(examples=2))
    words = " ".join(read.words.split())
    assert (
        words.count("16 → 9 image tokens: 6 kept, 8 merged into 3, 2 dropped") == 3
    )  # two images, and one of easy-VQA
    patches = [image for image in read.attributes("img") if (image["alt"] or "").startswith("Patches")]
    assert len(patches) == 3
    assert "6 kept, 8 merged into 3, 2 dropped" in (patches[0]["alt"] or "")


def test_page_can_be_read_aloud(run: Path):
    jsonl(run / "ledger.jsonl", events())
    read = page(run, llava())
    assert read.attributes("html")[0]["lang"] == "en"
    assert all(attrs.get("scope") in ("row", "col") for attrs in read.attributes("th"))
    assert all(attrs.get("role") == "img" and attrs.get("aria-label") for attrs in read.attributes("svg"))
    assert len(read.attributes("svg")) == 5


def test_ids_are_unique_and_every_reference_within_the_page_is_met(run: Path):
    jsonl(run / "ledger.jsonl", events())
    text = write_run_report(run, model=llava()).path.read_text(encoding="utf-8")
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
    first = write_run_report(run, model=llava()).path.read_bytes()
    assert write_run_report(run, model=llava()).path.read_bytes() == first
    assert {file.name for file in run.iterdir()} == before | {"report.html"}


def test_a_report_that_fails_leaves_the_old_one(run: Path):
    old = write_run_report(run).path.read_bytes()
    (run / "metrics.jsonl").write_text("{half a line\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl: line 1: got"):
        write_run_report(run)
    assert (run / "report.html").read_bytes() == old


# Newcombe 1998, Statistics in Medicine 17, p. 857-872, table I, method 3.
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


@pytest.mark.integration
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
