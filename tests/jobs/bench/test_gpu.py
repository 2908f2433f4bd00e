"""The benchmark of a GPU runs as a whole in tiny shapes, and leaves a record of what it measured before it failed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.bench import gpu
from jobs.bench.gpu_speed.shapes import TINY_SHAPES
from jobs.bench.gpu_speed.table import Goal, compute_ratio, find_base_times, list_goals
from jobs.bench.gpu_speed.timing import CHOICES, Bench, TimedVariant

ROOT = Path(__file__).parents[3]


@pytest.mark.integration
def test_the_script_runs_without_an_installed_package(tmp_path: Path) -> None:
    out = tmp_path / "gpu.jsonl"
    out.write_text("an earlier line\n")
    command = [sys.executable, str(ROOT / "jobs" / "bench" / "gpu.py"), "--tiny", "--limit", "3600", "--out", str(out)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [*command, "--only", "tower", "layer", "train", "decode", "compiled"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    earlier, line = out.read_text().splitlines()
    record = json.loads(line)
    assert earlier == "an earlier line"
    assert set(record["seconds"]) == {"tower", "layer", "train", "decode", "compiled"}
    for goal in list_goals(TINY_SHAPES):
        result = record["results"][goal.group]
        assert find_base_times(result, goal)
        known = {**result["ms"], **{label.replace("|all", ""): text for label, text in result["errors"].items()}}
        assert any(f"{goal.variant}/{choice}" in known for choice in CHOICES), goal
    assert len(record["table"]) == len(list_goals(TINY_SHAPES)) + 4
    assert "tower inference: 288 / off" in done.stdout


def test_a_section_that_fails_leaves_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(bench: Bench) -> None:
        raise RuntimeError("no such card")

    def write(bench: Bench) -> None:
        bench.results["later"] = {"summary": "done"}

    monkeypatch.setattr(gpu, "SECTIONS", {"first": fail, "later": write})
    assert gpu.main(["--tiny", "--out", str(tmp_path / "gpu.jsonl")]) == 1
    [line] = (tmp_path / "gpu.jsonl").read_text().splitlines()
    assert json.loads(line)["results"] == {
        "first": {"error": "RuntimeError: no such card"},
        "later": {"summary": "done"},
    }


def test_a_variant_that_fails_leaves_the_others() -> None:
    bench = Bench(TINY_SHAPES, "cpu")
    calls: list[str] = []

    def fail() -> None:
        calls.append("fails")
        raise ValueError("kernels: got fused")

    variants = [TimedVariant("works", "plain", lambda: calls.append("works")), TimedVariant("fails", "fused", fail)]
    bench.time_variants("group", variants)
    result = bench.results["group"]
    assert len(result["ms"]["works/plain"]) >= TINY_SHAPES.rounds
    assert result["errors"] == {"fails/fused": "ValueError: kernels: got fused"}
    assert calls.count("fails") == 1


def test_a_ratio_pairs_the_times_of_a_round() -> None:
    goal = Goal("group", "ours", "LLaVA", None, None)
    result = {"ms": {"ours/plain": [2.0, 8.0, 6.0], "LLaVA/plain": [1.0, 2.0, 2.0]}}
    assert compute_ratio(result, goal, "plain") == (2.5, 3.0, 3.5)
    assert compute_ratio(result, goal._replace(is_speed=True), "plain") == pytest.approx((7 / 24, 1 / 3, 5 / 12))
    assert compute_ratio(result, goal, "fused") is None
