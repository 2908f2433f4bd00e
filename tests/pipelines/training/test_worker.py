"""Steps that are not finite are skipped or repeated on all ranks, and a full disk does not stop training.

DeepSpeed ranks without Ray; test_faults.py has whole stages on Ray.
"""

import resource
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from pipelines.training import checkpoint, engine, worker
from pipelines.training.plan import StagePlan
from tests.pipelines import ranks
from tests.pipelines.faults import InjectedFault
from tests.pipelines.small import STEPS

pytestmark = pytest.mark.integration

NewPlan = Callable[..., StagePlan]
LAYOUTS = [(zero_stage, precision) for zero_stage in (0, 1, 2, 3) for precision in ("fp32", "bf16")]
NAN_STEP, LAST_STEP = 3, 4


def train_through_nan(plan: StagePlan, marks: Path, rolled_back: set[int]) -> tuple[list[Any], list[Any], int]:
    """Train on this rank while the loss of rank 1 is NaN at NAN_STEP.

    Returns:
        Metrics and state after each step, and the step that must be rolled back or 0.
    """
    deepspeed_engine = engine.build_engine(plan, ranks.count_workers())
    fault = InjectedFault("nan", NAN_STEP - 1, 1, marks)(deepspeed_engine, plan)
    batches = ranks.read_micro_batches(deepspeed_engine, plan, 0, LAST_STEP)
    metrics, states = [], []
    try:
        for step in worker.run_training_steps(deepspeed_engine, plan, batches, 0, LAST_STEP, (), rolled_back):
            fault.on_step_end(step)
            metrics.append(step.values)
            states.append(ranks.gather_state(deepspeed_engine))
    except worker.NotFiniteError as error:
        return metrics, states, error.step
    return metrics, states, 0


def train_all(jobs: list[tuple[StagePlan, Path, set[int]]]) -> list[Any]:
    return [train_through_nan(*job) for job in jobs]


def run_jobs(folder: Path, jobs: list[tuple[StagePlan, set[int]]]) -> list[list[Any]]:
    """Run `train_through_nan` for each plan and set of rolled-back steps on two ranks. Returns results by rank."""
    folders = [folder / f"marks-{number}" for number in range(len(jobs))]
    for marks in folders:
        marks.mkdir()
    arguments = [(plan, marks, rolled_back) for (plan, rolled_back), marks in zip(jobs, folders, strict=True)]
    return ranks.run_on_ranks(folder, 2, train_all, arguments)


def test_a_step_that_is_not_finite_on_one_rank_changes_nothing_on_all_ranks(new_plan: NewPlan, tmp_path: Path) -> None:
    plans = [new_plan(zero_stage=zero_stage, precision=precision) for zero_stage, precision in LAYOUTS]
    for results in run_jobs(tmp_path, [(plan, set()) for plan in plans]):
        for layout, (metrics, states, rolled_back) in zip(LAYOUTS, results, strict=True):
            assert not rolled_back
            assert [values["skipped"] for values in metrics] == [0, 0, 1, 0], layout
            are_finite = [torch.tensor([values["loss"], values["grad_norm"]]).isfinite().all() for values in metrics]
            assert are_finite == [True, True, False, True], layout
            changes = [
                any(not after[name].equal(before[name]) for name in before) for before, after in pairwise(states)
            ]
            assert changes == [True, False, True], layout


def test_a_rollback_is_requested_on_all_ranks_and_once_for_each_step(new_plan: NewPlan, tmp_path: Path) -> None:
    plan = new_plan(on_nonfinite="rollback")
    for first, repeated in run_jobs(tmp_path, [(plan, set()), (plan, {NAN_STEP})]):
        assert (len(first[0]), first[2]) == (NAN_STEP - 1, NAN_STEP)
        assert ([values["skipped"] for values in repeated[0]], repeated[2]) == ([0, 0, 1, 0], 0)


def train_on_a_full_disk(plan: StagePlan) -> tuple[list[float], list[str]]:
    """Train on this rank. The disk of rank 1 is full from the end of step 3 to the end of step 5.

    Returns:
        Losses, and messages about checkpoints.
    """
    deepspeed_engine = engine.build_engine(plan, ranks.count_workers())
    hook, messages = ranks.make_checkpoint_hook(deepspeed_engine, plan)
    limits = {3: 1024, 5: resource.RLIM_INFINITY}
    losses = []
    for step in ranks.run_steps(deepspeed_engine, plan, 0, STEPS, [hook]):
        hook.on_step_end(step)
        losses.append(step.values["loss"])
        if limit := limits.get(step.number):
            hook.finish()
            if dist.get_rank() == 1:
                # A write beyond the limit fails like one on a full disk.
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    hook.close()
    return losses, messages


def test_a_full_disk_does_not_stop_training_and_a_later_checkpoint_succeeds(new_plan: NewPlan, tmp_path: Path) -> None:
    plan = new_plan(save_total_limit=9)
    losses, messages = ranks.run_on_ranks(tmp_path, 2, train_on_a_full_disk, plan)[0]
    steps = ranks.run_on_ranks(tmp_path, 2, ranks.train_with_checkpoints, new_plan())[0]
    assert losses == [step.values["loss"] for step in steps]
    [message] = messages
    assert message.startswith("small: no checkpoint after step 4: rank 1: ")
    assert "too large" in message
    cursors = [
        saved.manifest.cursor
        for saved in checkpoint.list_newest_first(plan.folder)
        if isinstance(saved, checkpoint.SavedCheckpoint)
    ]
    assert cursors == [8, 6, 2]
    names = {path.parent.name for path in Path(plan.folder).glob("step-*/*")}
    assert names == set(map(checkpoint.format_step_name, cursors))
