"""What happens to a cluster's machines does not show in what is trained: the same losses and samples.

Each test is a script of its own, with a cluster of its own (cluster_day.py), and looks at the run folder afterwards.
"""

import json
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipelines.training import driver, ledger
from pipelines.training.plan import StagePlan
from pipelines.training.stage import Recovery
from tests.pipelines.training.test_faults import account, assert_same_end, lines, losses

NewPlan = Callable[..., StagePlan]

EVERY = 4
"""Steps between checkpoints."""

BOUND = 1e-5
"""Of the loss, by which runs of other numbers of workers differ."""


def done(plan: StagePlan) -> StagePlan:
    driver.train_stage(plan)
    return plan


@pytest.fixture(scope="module")
def undisturbed(new_plan: NewPlan) -> StagePlan:
    return done(new_plan(save_steps=EVERY))


@pytest.fixture
def folder() -> Iterator[Path]:
    """With a short name, since Ray's sockets lie in it."""
    made = Path(tempfile.mkdtemp(prefix="day-", dir="/tmp"))
    yield made
    shutil.rmtree(made)


def spend(plan: StagePlan, scenario: str, folder: Path) -> tuple[StagePlan, dict[str, Any]]:
    """The plan as the scenario's driver had it, and what the scenario says; nothing of it is left."""
    for name in ("run", "tmp", "ray"):
        (folder / name).mkdir()
    moved = replace(plan, run=folder / "run", checkpoints=str(folder / "run" / "checkpoints"))
    (folder / "plan.pickle").write_bytes(pickle.dumps(moved))
    own = {"TMPDIR": str(folder / "tmp"), "RAY_TMPDIR": str(folder / "ray")}
    quick = {"RAY_gcs_rpc_server_reconnect_timeout_s": "5"}  # a minute by Ray's own settings
    with (folder / "said.txt").open("w") as said:
        command = [sys.executable, "-m", "tests.pipelines.cluster_day", scenario, str(folder)]
        ended = subprocess.run(command, env=os.environ | quick | own, stdout=said, stderr=said, timeout=500)
    text = (folder / "said.txt").read_text()
    assert ended.returncode == 0, text[-4000:]
    _, left = psutil.wait_procs(running(own["TMPDIR"]), timeout=20)
    assert not left
    assert not list((folder / "tmp").iterdir())
    return moved, json.loads(text.splitlines()[-1])


def running(folder: str) -> list[psutil.Process]:
    """What was started with this folder for temporary files."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("TMPDIR") == folder and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def recovered(plan: StagePlan, at: float) -> float:
    """Seconds from then to the next step of workers that started later."""
    later = [one for one in lines(plan, ledger.LEDGER_FILE) if one["at"] > at]
    started = next(number for number, one in enumerate(later) if one["event"] == "start")
    return next(one["at"] for one in later[started:] if one["event"] == "step") - at


@pytest.mark.slow
def test_a_machine_that_dies_costs_no_more_than_a_checkpoint_interval(undisturbed: StagePlan, folder: Path) -> None:
    plan, said = spend(undisturbed, "killed", folder)
    assert_same_end(plan, undisturbed)
    spent = account(plan)
    assert spent.restarts == 1
    assert 0 < spent.lost_steps <= EVERY
    assert recovered(plan, said["at"]) < 120


@pytest.mark.slow
def test_a_machine_that_gives_notice_is_left_with_a_checkpoint(undisturbed: StagePlan, folder: Path) -> None:
    """None was due; and a third worker, whom the global batch has nothing for, keeps nobody waiting."""
    stage = replace(undisturbed.stage, save_steps=100)
    plan, said = spend(replace(undisturbed, stage=stage, workers=(3, 3)), "preempted", folder)
    [saved] = said["saved"]
    assert saved in ("step-000003", "step-000004")  # notice came before step 4
    assert losses(plan) == losses(undisturbed)
    assert lines(plan, "consumed.jsonl") == lines(undisturbed, "consumed.jsonl")
    spent = account(plan)
    assert spent.restarts == 1
    assert 0 < spent.lost_steps <= 4
    assert recovered(plan, said["at"]) < 120


@pytest.mark.slow
def test_without_its_head_a_driver_ends_and_the_same_command_goes_on_elsewhere(
    undisturbed: StagePlan, folder: Path
) -> None:
    plan, said = spend(undisturbed, "head_killed", folder)
    assert said["code"] != 0
    assert said["ended"] - said["at"] < 60
    assert_same_end(plan, undisturbed)
    assert account(plan).lost_steps <= EVERY


@pytest.mark.slow
def test_workers_follow_machines_that_come_and_go(new_plan: NewPlan, folder: Path) -> None:
    undisturbed = done(new_plan(save_steps=EVERY, global_batch_size=12))
    elastic = replace(undisturbed, workers=(1, 3), recovery=Recovery(resize_s=1))
    plan, said = spend(elastic, "resized", folder)
    groups = [one["workers"] for one in lines(plan, ledger.LEDGER_FILE) if one["event"] == "start"]
    assert groups == [2, 3, 2]
    steps, expected = zip(*losses(undisturbed), strict=True)
    assert [step for step, _ in losses(plan)] == list(steps)
    assert [loss for _, loss in losses(plan)] == pytest.approx(expected, abs=BOUND)
    assert lines(plan, "consumed.jsonl") == lines(undisturbed, "consumed.jsonl")
    spent = account(plan)
    assert spent.restarts == 2
    assert spent.lost_steps <= 2 * EVERY
    assert recovered(plan, said["at"]) < 120
