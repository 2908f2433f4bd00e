"""Lost, preempted and added machines change neither losses nor samples.

Each test runs a scenario of cluster_day.py in a separate process with its own cluster, and then reads the run folder.
"""

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipelines.training import ledger
from pipelines.training.plan import StagePlan
from pipelines.training.stage import Recovery
from tests.pipelines import ranks
from tests.pipelines.training.test_faults import assert_same_end, read_account, read_lines, read_losses

NewPlan = Callable[..., StagePlan]

SAVE_STEPS = 4
"""Steps between checkpoints."""

LOSS_TOLERANCE = 1e-5
"""Difference of the loss between runs with different numbers of workers."""


@pytest.fixture(scope="module")
def without_faults(new_plan: NewPlan, tmp_path_factory: pytest.TempPathFactory) -> StagePlan:
    return ranks.train_without_ray(new_plan(save_steps=SAVE_STEPS), tmp_path_factory.mktemp("ranks"))


def run_scenario(plan: StagePlan, scenario: str, folder: Path) -> tuple[StagePlan, dict[str, Any]]:
    """Run a scenario, check that no process and no temporary file remains, and return its plan and its output."""
    for name in ("run", "tmp", "ray"):
        (folder / name).mkdir()
    moved = replace(plan, run=folder / "run", checkpoints=str(folder / "run" / "checkpoints"))
    (folder / "plan.pickle").write_bytes(pickle.dumps(moved))
    folders = {"TMPDIR": str(folder / "tmp"), "RAY_TMPDIR": str(folder / "ray")}
    fast = {"RAY_gcs_rpc_server_reconnect_timeout_s": "5"}  # Ray's default is a minute
    with (folder / "output.txt").open("w") as output:
        command = [sys.executable, "-m", "tests.pipelines.cluster_day", scenario, str(folder)]
        ended = subprocess.run(command, env=os.environ | fast | folders, stdout=output, stderr=output, timeout=500)
    text = (folder / "output.txt").read_text()
    assert ended.returncode == 0, text[-4000:]
    _, remaining = psutil.wait_procs(find_processes(folders["TMPDIR"]), timeout=20)
    assert not remaining
    assert not list((folder / "tmp").iterdir())
    return moved, json.loads(text.splitlines()[-1])


def find_processes(folder: str) -> list[psutil.Process]:
    """Find processes whose TMPDIR is this folder."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("TMPDIR") == folder and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def measure_recovery(plan: StagePlan, at: float) -> float:
    """Return the seconds from a time to the first step of workers that started after it."""
    later = [event for event in read_lines(plan, ledger.LEDGER_FILE) if event["at"] > at]
    start = next(index for index, event in enumerate(later) if event["event"] == "start")
    return next(event["at"] for event in later[start:] if event["event"] == "step") - at


@pytest.mark.slow
def test_a_machine_that_dies_costs_no_more_than_a_checkpoint_interval(
    without_faults: StagePlan, short_folder: Path
) -> None:
    plan, output = run_scenario(without_faults, "killed", short_folder)
    assert_same_end(plan, without_faults)
    spent = read_account(plan)
    assert spent.restarts == 1
    assert 0 < spent.lost_steps <= SAVE_STEPS
    assert measure_recovery(plan, output["at"]) < 120


@pytest.mark.slow
def test_a_preemption_notice_triggers_a_checkpoint(without_faults: StagePlan, short_folder: Path) -> None:
    """No checkpoint is due at that step. A third worker is idle and must not delay the others."""
    stage = replace(without_faults.stage, save_steps=100)
    plan, output = run_scenario(replace(without_faults, stage=stage, workers=(3, 3)), "preempted", short_folder)
    [saved] = output["saved"]
    assert saved in ("step-000003", "step-000004")  # the announcement came before step 4
    assert read_losses(plan) == read_losses(without_faults)
    assert read_lines(plan, "consumed.jsonl") == read_lines(without_faults, "consumed.jsonl")
    spent = read_account(plan)
    assert spent.restarts == 1
    assert 0 < spent.lost_steps <= 4
    assert measure_recovery(plan, output["at"]) < 120


@pytest.mark.slow
def test_a_driver_ends_without_its_head_and_the_same_command_resumes_elsewhere(
    without_faults: StagePlan, short_folder: Path
) -> None:
    plan, output = run_scenario(without_faults, "head_killed", short_folder)
    assert output["code"] != 0
    assert output["ended"] - output["at"] < 60
    assert_same_end(plan, without_faults)
    assert read_account(plan).lost_steps <= SAVE_STEPS


@pytest.mark.slow
def test_workers_follow_machines_that_come_and_go(new_plan: NewPlan, short_folder: Path, tmp_path: Path) -> None:
    without_faults = ranks.train_without_ray(new_plan(save_steps=SAVE_STEPS, global_batch_size=12), tmp_path)
    elastic = replace(without_faults, workers=(1, 3), recovery=Recovery(resize_s=1))
    plan, output = run_scenario(elastic, "resized", short_folder)
    groups = [event["workers"] for event in read_lines(plan, ledger.LEDGER_FILE) if event["event"] == "start"]
    assert groups == [2, 3, 2]
    steps, expected = zip(*read_losses(without_faults), strict=True)
    assert [step for step, _ in read_losses(plan)] == list(steps)
    assert [loss for _, loss in read_losses(plan)] == pytest.approx(expected, abs=LOSS_TOLERANCE)
    assert read_lines(plan, "consumed.jsonl") == read_lines(without_faults, "consumed.jsonl")
    spent = read_account(plan)
    assert spent.restarts == 2
    assert spent.lost_steps <= 2 * SAVE_STEPS
    assert measure_recovery(plan, output["at"]) < 120
