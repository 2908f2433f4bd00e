"""Tests of the comparison of own runs: groups by settings, means over seeds, differences to the first variant."""

import json
import re
from pathlib import Path

import pytest
import yaml

from pipelines.evaluation import statistics
from pipelines.report.runs import FinishedRun, read_finished_runs
from pipelines.report.variants import compare_variants, group_variants
from tests.pipelines.report.test_tables import FIND_SCORER, write_run


def read(folder: Path) -> list[FinishedRun]:
    return read_finished_runs([folder], FIND_SCORER)[0]


def write_losses(folder: Path, last: float) -> None:
    rows = [{"stage": "instruct", "step": step, "loss": 4 - (4 - last) * step / 50} for step in range(1, 51)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Write two learning rates with two seeds each."""
    for seed in (0, 1):
        for name, rate, skill in (("slow", 1e-4, 0.2), ("fast", 1e-3, 0.5)):
            changes = {"train__instruct__learning_rate": {"projector": rate, "language": 1e-3}}
            folder = write_run(tmp_path, f"{name}{seed}", seed, skill, num_workers=seed + 1, **changes)
            write_losses(folder, rate * 1000)
    return tmp_path


def test_runs_that_differ_in_any_key_are_variants_named_by_it(runs: Path) -> None:
    variants = group_variants(read(runs))
    assert [variant.label for variant in variants] == [
        "train.instruct.learning_rate.projector = 0.001",
        "train.instruct.learning_rate.projector = 0.0001",
    ]
    assert [[run.seed for run in variant.runs] for variant in variants] == [[0, 1], [0, 1]]


def test_scores_are_means_over_seeds_and_differences_are_to_the_first(runs: Path) -> None:
    table = compare_variants(read(runs), samples=200)
    assert table
    assert [column.source for column in table.columns] == ["easy_vqa.accuracy", "instructions.strict"]
    first, second = (variant.metrics("easy_vqa.accuracy") for variant in table.variants)
    cell, other = table.cells[0][0], table.cells[1][0]
    assert cell
    assert other
    assert cell.seeds == pytest.approx([100 * metric.score for metric in first])
    assert cell.value == pytest.approx(sum(cell.seeds) / 2)
    assert cell.difference is None
    assert other.difference == statistics.bootstrap_difference(second, first, 200).scale(100)
    positions = [position for row in table.cells for cell in row if cell for position in cell.positions.seeds]
    assert all(0 < position < 100 for position in positions)
    [plot] = table.plots
    assert plot.title == "instruct"
    assert re.search(r"projector = 0.001 [\d.]+; projector = 0.001 [\d.]+; projector = 0.0001 ", plot.svg)


def test_a_study_has_its_names_and_its_order(tmp_path: Path) -> None:
    study = {"name": "study", "variants": {"second": {"model.cmai": None}, "first": {}, "same": {}}}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
    for name, cmai in (("first", {"gamma_max": 0.6}), ("second", None), ("same", {"gamma_max": 0.6})):
        for seed in (0, 1):
            write_run(tmp_path, f"{name}-{seed}", seed, model__cmai=cmai)
    variants = group_variants(read(tmp_path))
    assert [(variant.label, len(variant.runs)) for variant in variants] == [("second", 2), ("first", 2), ("same", 2)]
    assert [variant.settings for variant in variants] == ["model.cmai = off", "model.cmai = on", "model.cmai = on"]


def test_one_variant_is_not_compared_and_other_questions_have_no_difference(tmp_path: Path) -> None:
    folder = write_run(tmp_path, "a", 0)
    write_run(tmp_path, "b", 1)
    assert compare_variants(read(tmp_path), 100) is None
    write_run(tmp_path, "c", 0, data__max_bad_fraction=0.5, evaluate__tasks={"easy_vqa": {"limit": 3}})
    rows = (folder / "answers/easy_vqa.jsonl").read_text().splitlines()[:-5]
    for name in ("a", "b"):
        (tmp_path / name / "answers/easy_vqa.jsonl").write_text("\n".join(rows) + "\n")
    table = compare_variants(read(tmp_path), 100)
    assert table
    cell = table.cells[1][0]
    assert cell
    assert cell.interval
    assert cell.difference is None
