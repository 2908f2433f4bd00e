"""Runs through faults end as the undisturbed run does: the same losses, samples and weights, nothing left behind.

Each is a whole stage on a real Ray: Ray Train's workers, DeepSpeed, Ray Data's readers, the recorder.  Checkpoints are
two steps apart.
"""

import json
import os
import random
import re
import resource
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
from pipelines.training import checkpoint, driver, export, ledger
from pipelines.training.checkpoint import SavedCheckpoint
from pipelines.training.hooks import Hook, StepResult
from pipelines.training.plan import StagePlan
from pipelines.training.stage import Recovery
from tests.pipelines.faults import InjectedFault
from tests.pipelines.small import STAGE, STEPS

pytestmark = pytest.mark.usefixtures("ray_cluster")
NewPlan = Callable[..., StagePlan]


def lines(plan: StagePlan, file: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (plan.run / file).read_text().splitlines()]


def losses(plan: StagePlan) -> list[tuple[int, float | None]]:
    return [(entry["step"], entry["loss"]) for entry in lines(plan, "metrics.jsonl")]


def account(plan: StagePlan) -> ledger.Account:
    return ledger.read_ledger(plan.run).account


@pytest.fixture(scope="module")
def undisturbed(new_plan: NewPlan) -> StagePlan:
    plan = new_plan()
    driver.train_stage(plan)
    return plan


@pytest.fixture(autouse=True)
def clean(undisturbed: StagePlan) -> Iterator[None]:
    """Check that no worker, recorder or placement group outlives a run."""
    yield
    wait_for_condition(lambda: not left(), timeout=20)


def left() -> list[str]:
    groups = [name for name, group in placement_group_table().items() if group["state"] != "REMOVED"]
    processes = [process.name() for process in psutil.Process().children(recursive=True) if process.is_running()]
    return groups + [name for name in processes if "RayTrain" in name or "Recorder" in name or "SplitCoord" in name]


def assert_same_end(plan: StagePlan, undisturbed: StagePlan) -> None:
    """Compare losses, samples and weights bit for bit, and the names of the files."""
    assert losses(plan) == losses(undisturbed)
    assert lines(plan, "consumed.jsonl") == lines(undisturbed, "consumed.jsonl")
    found, expected = (load_file(Path(run.result) / "model.safetensors") for run in (plan, undisturbed))
    assert found.keys() == expected.keys()
    assert all(found[name].equal(expected[name]) for name in found)
    assert files(plan) == files(undisturbed)


def files(plan: StagePlan) -> set[str]:
    found = {str(path.relative_to(plan.folder)) for path in Path(plan.folder).rglob("*") if path.is_file()}
    assert not [name for name in found if name.endswith(storage.PARTIAL_SUFFIX)]
    return found


def test_an_undisturbed_run_has_each_step_once_and_keeps_the_newest_checkpoints(undisturbed: StagePlan) -> None:
    assert [step for step, _ in losses(undisturbed)] == list(range(1, STEPS + 1))
    there = [
        one.manifest.cursor
        for one in checkpoint.list_newest_first(undisturbed.folder)
        if isinstance(one, checkpoint.SavedCheckpoint)
    ]
    assert there == [8, 6]
    spent = account(undisturbed)
    assert (spent.restarts, spent.lost_steps, spent.lost, spent.restart) == (0, 0, 0, 0)
    assert spent.productive > 0


def test_a_run_with_several_faults_ends_like_an_undisturbed_one(
    undisturbed: StagePlan, new_plan: NewPlan, tmp_path: Path
) -> None:
    """An exception, os._exit and SIGKILL, on either rank, each after a checkpoint."""
    plan = new_plan()
    kinds = [("raise", 3, 1), ("exit", 5, 0), ("SIGKILL", 7, 1)]
    driver.train_stage(plan, [InjectedFault(kind, step, rank, tmp_path) for kind, step, rank in kinds])
    assert len(list(tmp_path.iterdir())) == 3
    assert_same_end(plan, undisturbed)
    spent = account(plan)
    assert spent.restarts == 3
    assert spent.lost_steps <= 3 * STAGE.save_steps
    assert spent.lost > 0
    assert spent.restart > 0


def test_a_batch_that_is_not_finite_is_named_and_skipped_or_done_again(
    undisturbed: StagePlan, new_plan: NewPlan, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A rollback undoes a fault of the machine; a repeated fault is skipped."""
    plan = new_plan(on_nonfinite="rollback")
    driver.train_stage(plan, [InjectedFault("nan", 2, 0, tmp_path)])
    assert_same_end(plan, undisturbed)

    plan = new_plan(on_nonfinite="rollback")
    driver.train_stage(plan, [InjectedFault("nan", 4, 0, tmp_path, times=2)])
    entries = lines(plan, "metrics.jsonl")
    assert [entry["step"] for entry in entries if entry["skipped"]] == [5]
    assert entries[4]["loss"] is None
    assert losses(plan)[:4] == losses(undisturbed)[:4]
    assert all(entry["loss"] is not None for entry in entries[5:])
    assert "small: loss or gradient of step 5 was not finite" in capfd.readouterr().out


def test_too_many_batches_that_are_not_finite_end_with_one_line(new_plan: NewPlan, tmp_path: Path) -> None:
    plan = new_plan(max_nonfinite_steps=0)
    with pytest.raises(
        ValueError, match=r"train\.small\.max_nonfinite_steps: loss or gradient of 1 steps .* at step 3"
    ):
        driver.train_stage(plan, [InjectedFault("nan", 2, 1, tmp_path)])


@pytest.mark.slow
def test_a_rank_that_hangs_is_found(undisturbed: StagePlan, new_plan: NewPlan, tmp_path: Path) -> None:
    """SIGSTOP also stops the watchdog of its rank; the watchdog of the other rank ends the workers."""
    plan = new_plan({"recovery": Recovery(watchdog_s=45)})
    driver.train_stage(plan, [InjectedFault("SIGSTOP", 3, 1, tmp_path)])
    assert_same_end(plan, undisturbed)
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
def test_a_slow_rank_is_reported_and_is_no_fault(undisturbed: StagePlan, new_plan: NewPlan, tmp_path: Path) -> None:
    plan = new_plan()
    driver.train_stage(plan, [InjectedFault("slow", 2, 1, tmp_path)])
    assert_same_end(plan, undisturbed)
    late = lines(plan, "metrics.jsonl")[2:]
    assert all(entry["slowest_rank"] == 1 and entry["slowest_s"] > 0.1 for entry in late)
    assert account(plan).restarts == 0


@dataclass(frozen=True)
class LimitFileSize:
    """Factory of a hook that limits files to 1 KB on rank 1, from the end of step `start` to the end of step `stop`."""

    start: int
    stop: int

    def __call__(self, engine: Any, plan: StagePlan) -> Hook:
        return _LimitFileSizeHook(self.start, self.stop)


class _LimitFileSizeHook(Hook):
    def __init__(self, start: int, stop: int) -> None:
        self.limits = {start: 1024, stop: resource.RLIM_INFINITY}

    def on_step_end(self, step: StepResult) -> None:
        if dist.get_rank() == 1 and step.number in self.limits:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.limits[step.number], resource.RLIM_INFINITY))


def test_a_full_disk_does_not_stop_training_and_a_later_checkpoint_succeeds(
    undisturbed: StagePlan, new_plan: NewPlan, capsys: pytest.CaptureFixture[str]
) -> None:
    """The checkpoint after step 6 may or may not succeed, because the limit ends after that step."""
    plan = new_plan(save_total_limit=9)
    driver.train_stage(plan, [LimitFileSize(3, 6)])
    assert losses(plan) == losses(undisturbed)
    there = {
        one.manifest.cursor
        for one in checkpoint.list_newest_first(plan.folder)
        if isinstance(one, checkpoint.SavedCheckpoint)
    }
    refused = {
        int(found) for found in re.findall(r"small: no checkpoint after step (\d): rank 1: .*too large", shown(capsys))
    }
    assert there - {6} == {2, 8}
    assert refused - {6} == {4}
    assert there | refused == {2, 4, 6, 8}
    assert not there & refused
    names = {path.parent.name for path in Path(plan.folder).glob("step-*/*")}
    assert names == set(map(checkpoint.format_name, there))


def shown(capsys: pytest.CaptureFixture[str]) -> str:
    out, err = capsys.readouterr()
    return out + err


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
    undisturbed: StagePlan,
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
    assert losses(plan) == losses(undisturbed)
    assert account(plan).lost_steps <= int(broken.name) - STAGE.save_steps, "it resumed from a checkpoint"
    assert storage.list_folders(plan.folder) == ["model", "step-000006", "step-000008"]
    assert export.is_complete(plan.result)
    name = "model.safetensors"
    found = load(storage.read(storage.join(plan.result, name)))
    expected = load_file(Path(undisturbed.result) / name)
    assert found.keys() == expected.keys()
    assert all(found[name].equal(expected[name]) for name in found)
    before = len(proxy.asked)
    driver.train_stage(plan)
    assert [request.split()[0] for request in proxy.asked[before:]] == ["HEAD"], "a finished stage has nothing to do"
