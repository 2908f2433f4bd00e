"""Checkpoints of every ZeRO stage and number of workers resume with every other; DeepSpeed ranks without Ray."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines.training.plan import StagePlan
from tests.pipelines import ranks

pytestmark = pytest.mark.integration

Layout = tuple[int, str]
"""ZeRO stage and precision."""

LAYOUTS: list[Layout] = [(zero_stage, precision) for precision in ("fp32", "bf16") for zero_stage in (0, 1, 2, 3)]
LOSS_TOLERANCE = {"fp32": 1e-6, "bf16": 0.02}
"""Difference of the loss between layouts, which add in another order."""

SAVED_STEP, STEPS = 2, 4


def train(
    plan: StagePlan, cursor: int, stop: int, into: str | None
) -> tuple[list[float], list[float], dict[str, torch.Tensor]]:
    """Run steps cursor+1..stop of STEPS on this rank.

    Args:
        plan: plan of the stage.
        cursor: step from which to resume; 0 starts without a checkpoint.
        stop: last step.
        into: folder for a checkpoint after the last step; None writes none.

    Returns:
        Losses, gradient norms, and all weights and moments at the end.
    """
    from pipelines.training import checkpoint, engine, fragments

    deepspeed_engine = engine.build_engine(plan, ranks.count_workers())
    if cursor:
        local_fragments = fragments.local_fragments(deepspeed_engine)
        manifest, skipped = checkpoint.restore_newest(plan.folder, local_fragments, lambda url, manifest: None)
        assert manifest
        assert manifest.cursor == cursor
        assert not skipped
        fragments.copy_masters_to_model(deepspeed_engine, manifest.updates)
    steps = list(itertools.islice(ranks.run_steps(deepspeed_engine, plan, cursor, STEPS), stop - cursor))
    if into:
        ranks.save_checkpoint(deepspeed_engine, replace(plan, checkpoints=into), stop)
    losses = [step.values["loss"] for step in steps]
    return losses, [step.values["grad_norm"] for step in steps], ranks.gather_state(deepspeed_engine)


def train_all(jobs: list[tuple[Any, ...]]) -> list[Any]:
    return [train(*job) for job in jobs]


def run_jobs(folder: Path, workers: int, jobs: list[tuple[Any, ...]]) -> list[Any]:
    """Run `train` for each tuple of arguments on so many ranks, and return the results of rank 0."""
    return ranks.run_on_ranks(folder, workers, train_all, jobs)[0]


@pytest.fixture(scope="module")
def plans(new_plan: Callable[..., StagePlan]) -> dict[Layout, StagePlan]:
    return {
        (zero_stage, precision): new_plan(zero_stage=zero_stage, precision=precision)
        for zero_stage, precision in LAYOUTS
    }


@pytest.fixture(scope="module")
def uninterrupted(plans: dict[Layout, StagePlan], tmp_path_factory: pytest.TempPathFactory) -> dict[Layout, Any]:
    """Uninterrupted runs on two ranks."""
    jobs = [(plans[layout], 0, STEPS, None) for layout in LAYOUTS]
    return dict(zip(LAYOUTS, run_jobs(tmp_path_factory.mktemp("uninterrupted"), 2, jobs), strict=True))


@pytest.fixture(scope="module")
def halves(plans: dict[Layout, StagePlan], tmp_path_factory: pytest.TempPathFactory) -> dict[Layout, Any]:
    """The same runs, saved after SAVED_STEP; with their state at that step."""
    jobs = [(plans[layout], 0, SAVED_STEP, plans[layout].checkpoints) for layout in LAYOUTS]
    return dict(zip(LAYOUTS, run_jobs(tmp_path_factory.mktemp("halves"), 2, jobs), strict=True))


def test_every_layout_computes_the_same(uninterrupted: dict[Layout, Any]) -> None:
    """Includes updates, clipping and gradient norms; with ZeRO 0, parts of these are not DeepSpeed's."""
    for layout in LAYOUTS:
        losses, norms, _ = uninterrupted[layout]
        reference_losses, reference_norms, _ = uninterrupted[2, layout[1]]
        assert losses == pytest.approx(reference_losses, abs=LOSS_TOLERANCE[layout[1]]), layout
        assert norms == pytest.approx(reference_norms, rel=LOSS_TOLERANCE[layout[1]]), layout


@pytest.mark.parametrize("workers", [1, 4])
def test_any_layout_loads_any_other(
    workers: int, plans: dict[Layout, StagePlan], halves: dict[Layout, Any], tmp_path: Path
) -> None:
    """Every weight and moment that two ranks saved is loaded bit for bit."""
    pairs = [(source, target) for source in LAYOUTS for target in LAYOUTS if source[1] == target[1]]
    jobs = [
        (replace(plans[target], checkpoints=plans[source].checkpoints), SAVED_STEP, SAVED_STEP, None)
        for source, target in pairs
    ]
    for (source, target), (_, _, loaded) in zip(pairs, run_jobs(tmp_path, workers, jobs), strict=True):
        saved = halves[source][2]
        assert saved.keys() == loaded.keys()
        assert all(torch.equal(saved[name], loaded[name]) for name in saved), (source, target)


def test_any_layout_resumes_from_another(
    plans: dict[Layout, StagePlan], uninterrupted: dict[Layout, Any], halves: dict[Layout, Any], tmp_path: Path
) -> None:
    """Four ranks of one ZeRO stage resume after two ranks of the stage below."""
    pairs = [((zero_stage, precision), ((zero_stage + 1) % 4, precision)) for zero_stage, precision in LAYOUTS]
    jobs = [
        (replace(plans[target], checkpoints=plans[source].checkpoints), SAVED_STEP, STEPS, None)
        for source, target in pairs
    ]
    for (source, target), (losses, _, _) in zip(pairs, run_jobs(tmp_path, 4, jobs), strict=True):
        expected = uninterrupted[target][0][SAVED_STEP:]
        assert losses == pytest.approx(expected, abs=LOSS_TOLERANCE[source[1]]), (source, target)


def test_a_run_on_four_then_two_then_three_workers_is_the_run_on_one(
    new_plan: Callable[..., StagePlan], tmp_path: Path
) -> None:
    plan = new_plan(global_batch_size=12, micro_batch_size=1, zero_stage=3)
    single = replace(plan, checkpoints=str(tmp_path / "one"))
    [(expected, _, _)] = run_jobs(tmp_path, 1, [(single, 0, STEPS, None)])
    losses = []
    for workers, cursor, stop in [(4, 0, 1), (2, 1, 2), (3, 2, STEPS)]:
        [(part, _, _)] = run_jobs(tmp_path, workers, [(plan, cursor, stop, plan.checkpoints)])
        losses += part
    assert losses == pytest.approx(expected, abs=LOSS_TOLERANCE["fp32"])
