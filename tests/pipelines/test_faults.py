"""Runs through faults end as the undisturbed run does: the same losses, samples and weights, nothing left behind.

Each is a whole stage on a real Ray: Ray Train's workers, DeepSpeed, Ray Data's readers, the recorder.  Checkpoints are
two steps apart.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from ray.util.placement_group import placement_group_table
from safetensors.torch import load_file

from pipelines import checkpoint, ledger, storage, train
from pipelines.stage import Plan
from tests.pipelines.faults import Fault
from tests.pipelines.small import STAGE, STEPS

pytestmark = pytest.mark.usefixtures("ray_cluster")
NewPlan = Callable[..., Plan]


def lines(plan: Plan, file: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (plan.run / file).read_text().splitlines()]


def losses(plan: Plan) -> list[tuple[int, float | None]]:
    return [(entry["step"], entry["loss"]) for entry in lines(plan, "metrics.jsonl")]


def account(plan: Plan) -> ledger.Account:
    return ledger.read(plan.run).account


@pytest.fixture(scope="module")
def undisturbed(new_plan: NewPlan) -> Plan:
    plan = new_plan()
    train.fit(plan)
    return plan


@pytest.fixture(autouse=True)
def clean(undisturbed: Plan) -> Iterator[None]:
    """Nothing outlives a run: no worker, no placement group."""
    yield
    groups = [one for one in placement_group_table().values() if one["state"] != "REMOVED"]
    assert not groups
    started = psutil.Process().children(recursive=True)
    names = [" ".join(one.cmdline()) for one in started if one.status() != psutil.STATUS_ZOMBIE]
    assert not [name for name in names if "RayTrainWorker" in name or "Recorder" in name]


def assert_same_end(plan: Plan, undisturbed: Plan) -> None:
    """Bit for bit: losses, samples, weights; and no file that the undisturbed run has not."""
    assert losses(plan) == losses(undisturbed)
    assert lines(plan, "consumed.jsonl") == lines(undisturbed, "consumed.jsonl")
    mine, theirs = (load_file(Path(one.result) / "model.safetensors") for one in (plan, undisturbed))
    assert mine.keys() == theirs.keys()
    assert all(mine[name].equal(theirs[name]) for name in mine)
    assert files(plan) == files(undisturbed)


def files(plan: Plan) -> set[str]:
    found = {str(path.relative_to(plan.folder)) for path in Path(plan.folder).rglob("*") if path.is_file()}
    assert not [name for name in found if name.endswith(storage.PARTIAL)]
    return found


def test_an_undisturbed_run_has_each_step_once_and_keeps_the_newest_checkpoints(undisturbed: Plan) -> None:
    assert [step for step, _ in losses(undisturbed)] == list(range(1, STEPS + 1))
    there = [
        one.manifest.cursor for one in checkpoint.candidates(undisturbed.folder) if isinstance(one, checkpoint.Saved)
    ]
    assert there == [8, 6]
    spent = account(undisturbed)
    assert (spent.restarts, spent.lost_steps, spent.lost, spent.restart) == (0, 0, 0, 0)
    assert spent.productive > 0


def test_a_run_through_one_fault_after_the_other_ends_the_same(
    undisturbed: Plan, new_plan: NewPlan, tmp_path: Path
) -> None:
    """An exception, os._exit and SIGKILL, on one rank or the other, each past a checkpoint."""
    plan = new_plan()
    kinds = [("raise", 3, 1), ("exit", 5, 0), ("SIGKILL", 7, 1)]
    train.fit(plan, [Fault(kind, step, rank, tmp_path) for kind, step, rank in kinds])
    assert len(list(tmp_path.iterdir())) == 3
    assert_same_end(plan, undisturbed)
    spent = account(plan)
    assert spent.restarts == 3
    assert spent.lost_steps <= 3 * STAGE.checkpoint_every
    assert spent.lost > 0
    assert spent.restart > 0
