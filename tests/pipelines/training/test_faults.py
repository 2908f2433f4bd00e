"""Stages with faults end like a stage without faults: same losses, samples and weights, and no leftovers.

They run on a real Ray: Ray Train's workers, DeepSpeed, Ray Data's readers, the recorder. The stage without faults runs
on the same number of ranks without Ray. Checkpoints are two steps apart. test_group.py has stages without faults on
Ray, test_worker.py faults on ranks without Ray.
"""

import json
import os
import random
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch.distributed as dist
from ray._common.test_utils import wait_for_condition
from ray.util.placement_group import placement_group_table
from safetensors.torch import load, load_file

from pipelines.core import storage
from pipelines.core.storage import Retry
from pipelines.training import checkpoint, driver, ledger
from pipelines.training.checkpoint import SavedCheckpoint
from pipelines.training.files import is_complete
from pipelines.training.hooks import Hook, StepResult
from pipelines.training.plan import StagePlan
from pipelines.training.stage import Recovery
from tests.pipelines import ranks
from tests.pipelines.faults import InjectedFault
from tests.pipelines.small import STAGE

pytestmark = pytest.mark.usefixtures("ray_cluster")
NewPlan = Callable[..., StagePlan]


def read_lines(plan: StagePlan, file: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (plan.run / file).read_text().splitlines()]


def read_losses(plan: StagePlan) -> list[tuple[int, float | None]]:
    return [(entry["step"], entry["loss"]) for entry in read_lines(plan, "metrics.jsonl")]


def read_account(plan: StagePlan) -> ledger.Account:
    return ledger.read_ledger(plan.run).account


@pytest.fixture(scope="module")
def without_faults(new_plan: NewPlan, tmp_path_factory: pytest.TempPathFactory) -> StagePlan:
    return ranks.train_without_ray(new_plan(), tmp_path_factory.mktemp("ranks"))


@pytest.fixture(autouse=True)
def check_leftovers() -> Iterator[None]:
    """Check that no worker, recorder or placement group outlives a run."""
    yield
    wait_for_condition(lambda: not list_leftovers(), timeout=20)


def list_leftovers() -> list[str]:
    groups = [name for name, group in placement_group_table().items() if group["state"] != "REMOVED"]
    processes = [process.name() for process in psutil.Process().children(recursive=True) if process.is_running()]
    return groups + [name for name in processes if "RayTrain" in name or "Recorder" in name or "SplitCoord" in name]


def assert_same_end(plan: StagePlan, without_faults: StagePlan) -> None:
    """Compare losses, samples and weights bit for bit, and the names of the files."""
    assert read_losses(plan) == read_losses(without_faults)
    assert read_lines(plan, "consumed.jsonl") == read_lines(without_faults, "consumed.jsonl")
    found, expected = (load_file(Path(run.result) / "model.safetensors") for run in (plan, without_faults))
    assert found.keys() == expected.keys()
    assert all(found[name].equal(expected[name]) for name in found)
    assert list_files(plan) == list_files(without_faults)


def list_files(plan: StagePlan) -> set[str]:
    found = {str(path.relative_to(plan.folder)) for path in Path(plan.folder).rglob("*") if path.is_file()}
    assert not [name for name in found if name.endswith(storage.PARTIAL_SUFFIX)]
    return found


def test_stages_with_faults_of_machines_equal_one_without(
    without_faults: StagePlan, new_plan: NewPlan, tmp_path: Path
) -> None:
    """A loss that is not finite, an exception, os._exit and SIGKILL, on either rank; all but the first after a
    checkpoint. The rollback repeats the step whose loss was not finite.
    """
    plan = new_plan(on_nonfinite="rollback")
    kinds = [("nan", 2, 0), ("raise", 3, 1), ("exit", 5, 0), ("SIGKILL", 7, 1)]
    driver.train_stage(plan, [InjectedFault(kind, step, rank, tmp_path) for kind, step, rank in kinds])
    assert len(list(tmp_path.iterdir())) == len(kinds)
    assert_same_end(plan, without_faults)
    spent = read_account(plan)
    assert spent.restarts == len(kinds)
    assert spent.lost_steps <= len(kinds) * STAGE.save_steps
    assert spent.lost > 0
    assert spent.restart > 0


def test_a_step_that_stays_not_finite_is_skipped_and_too_many_end_the_stage(
    new_plan: NewPlan, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The rollback comes first. The step is then in the record, and one line names it."""
    reference = ranks.train_without_ray(new_plan({"workers": (1, 1)}), tmp_path)
    plan = new_plan({"workers": (1, 1)}, on_nonfinite="rollback", max_nonfinite_steps=0)
    marks = tmp_path / "marks"
    marks.mkdir()
    with pytest.raises(
        ValueError, match=r"train\.small\.max_nonfinite_steps: loss or gradient of 1 steps .* at step 5"
    ):
        driver.train_stage(plan, [InjectedFault("nan", 4, 0, marks, times=2)])
    entries = read_lines(plan, "metrics.jsonl")
    assert [entry["step"] for entry in entries if entry["skipped"]] == [5]
    assert entries[4]["loss"] is None
    assert read_losses(plan)[:4] == read_losses(reference)[:4]
    assert read_account(plan).restarts == 1
    assert "small: loss or gradient of step 5 was not finite" in capfd.readouterr().out


@pytest.mark.slow
def test_a_rank_that_hangs_is_found(without_faults: StagePlan, new_plan: NewPlan, tmp_path: Path) -> None:
    """SIGSTOP also stops the watchdog of its rank; the watchdog of the other rank ends the workers."""
    plan = new_plan({"recovery": Recovery(watchdog_s=45)})
    driver.train_stage(plan, [InjectedFault("SIGSTOP", 3, 1, tmp_path)])
    assert_same_end(plan, without_faults)
    [stacks] = (plan.run / "stacks" / plan.name).iterdir()
    assert stacks.name.startswith("rank-0-")
    assert "pipelines/training/worker.py" in stacks.read_text()


@pytest.mark.slow
def test_workers_without_progress_end_the_run(new_plan: NewPlan, tmp_path: Path) -> None:
    plan = new_plan({"recovery": Recovery(restarts=9)})
    with pytest.raises(
        ValueError, match=r"the same fault twice after step 3: rank 1: .*made for the test; .* step 2 is safe"
    ):
        driver.train_stage(plan, [InjectedFault("raise", 3, 1, tmp_path, times=9)])


@pytest.mark.slow
def test_a_slow_rank_is_reported_and_is_no_fault(without_faults: StagePlan, new_plan: NewPlan, tmp_path: Path) -> None:
    plan = new_plan()
    driver.train_stage(plan, [InjectedFault("slow", 2, 1, tmp_path)])
    assert_same_end(plan, without_faults)
    late = read_lines(plan, "metrics.jsonl")[2:]
    assert all(entry["slowest_rank"] == 1 and entry["slowest_s"] > 0.1 for entry in late)
    assert read_account(plan).restarts == 0


class SetS3Environment:
    """Factory of an empty hook that carries the S3 settings of this test to workers that were started before it."""

    def __reduce__(self) -> Any:
        environment = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
        return _set_environment, (environment, storage.RETRY)

    def __call__(self, engine: Any, plan: StagePlan) -> Hook:
        return Hook()


def _set_environment(environment: dict[str, str], retry: Retry) -> SetS3Environment:
    os.environ.update(environment)
    storage.RETRY = retry
    return SetS3Environment()


@dataclass(frozen=True)
class RaiseOnceStored:
    """Factory of a hook that raises once, on rank 1, at the first step with a committed checkpoint."""

    marks: Path

    def __call__(self, engine: Any, plan: StagePlan) -> Hook:
        return _RaiseHook(self.marks, plan.folder)


class _RaiseHook(Hook):
    def __init__(self, marks: Path, folder: str) -> None:
        self.marks, self.folder = marks, folder

    def on_step_end(self, step: StepResult) -> None:
        if dist.get_rank() != 1 or list(self.marks.iterdir()):
            return
        if any(isinstance(saved, SavedCheckpoint) for saved in checkpoint.list_newest_first(self.folder)):
            (self.marks / str(step.number)).touch()
            raise RuntimeError("made for the test")


@pytest.mark.slow
def test_a_stage_resumes_from_a_faulty_bucket(
    without_faults: StagePlan,
    new_plan: NewPlan,
    proxy: Any,
    bucket: str,
    fast: Retry,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """The store refuses, drops, truncates and delays uploads, restores after a restart, and the model at the end."""
    monkeypatch.setattr(storage, "RETRY", replace(fast, tries=30, deadline_s=60, read_timeout_s=0.5))
    plan = new_plan({"checkpoints": bucket})
    kinds = ["SlowDown", "InternalError", "drop", "cut"] * 8 + ["stall"] * 4 + [""] * 40
    proxy.faults = deque(random.Random(0).sample(kinds, len(kinds)))
    driver.train_stage(plan, [SetS3Environment(), RaiseOnceStored(tmp_path)])
    [broken] = tmp_path.iterdir()
    assert len(proxy.faults) < 30, "most were served"
    proxy.clear()
    assert read_losses(plan) == read_losses(without_faults)
    assert read_account(plan).lost_steps <= int(broken.name) - STAGE.save_steps, "it resumed from a checkpoint"
    assert storage.list_folders(plan.folder) == ["model", "step-000006", "step-000008"]
    assert is_complete(plan.result)
    name = "model.safetensors"
    found = load(storage.read(storage.join(plan.result, name)))
    expected = load_file(Path(without_faults.result) / name)
    assert found.keys() == expected.keys()
    assert all(found[name].equal(expected[name]) for name in found)
    before = len(proxy.asked)
    driver.train_stage(plan)
    assert [request.split()[0] for request in proxy.asked[before:]] == ["HEAD"], "a finished stage has nothing to do"
