"""What one ZeRO stage and number of workers saved, any other goes on with: on real DeepSpeed ranks, without Ray."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines.training.plan import StagePlan
from tests.pipelines import ranks

Layout = tuple[int, str]
"""ZeRO stage and precision."""

LAYOUTS: list[Layout] = [(zero, precision) for precision in ("fp32", "bf16") for zero in (0, 1, 2, 3)]
BOUND = {"fp32": 1e-6, "bf16": 0.02}
"""Of the loss, by which runs in other layouts differ: sums are taken in another order."""

SAVED, STEPS = 2, 4


def train(plan: StagePlan, cursor: int, stop: int, into: str | None) -> tuple[list[float], list[float], dict[str, Any]]:
    """On a rank: steps cursor+1..stop of STEPS; (losses, norms, all weights and moments at the end as checkpointed)."""
    from pipelines.training import checkpoint, engine, fragments

    trained = engine.build_engine(plan, ranks.workers())
    if cursor:
        manifest, passed = checkpoint.restore_newest(
            plan.folder, fragments.local_fragments(trained), lambda url, manifest: None
        )
        assert manifest
        assert manifest.cursor == cursor
        assert not passed
        fragments.copy_masters_to_model(trained, manifest.updates)
    steps = list(itertools.islice(ranks.steps(trained, plan, cursor, STEPS), stop - cursor))
    if into:
        ranks.save(trained, replace(plan, checkpoints=into), stop)
    losses = [step.values["loss"] for step in steps]
    return losses, [step.values["grad_norm"] for step in steps], ranks.state(trained)


def each(jobs: list[tuple[Any, ...]]) -> list[Any]:
    return [train(*job) for job in jobs]


@pytest.fixture(scope="module")
def plans(new_plan: Callable[..., StagePlan]) -> dict[Layout, StagePlan]:
    return {(zero, precision): new_plan(zero_stage=zero, precision=precision) for zero, precision in LAYOUTS}


@pytest.fixture(scope="module")
def whole(plans: dict[Layout, StagePlan], tmp_path_factory: pytest.TempPathFactory) -> dict[Layout, Any]:
    """Runs that were not interrupted, on two ranks."""
    done = ranks.run(tmp_path_factory.mktemp("whole"), 2, each, [(plans[one], 0, STEPS, None) for one in LAYOUTS])
    return dict(zip(LAYOUTS, done[0], strict=True))


@pytest.fixture(scope="module")
def halves(plans: dict[Layout, StagePlan], tmp_path_factory: pytest.TempPathFactory) -> dict[Layout, Any]:
    """The same, saved after SAVED steps; their state then."""
    folder = tmp_path_factory.mktemp("halves")
    jobs = [(plans[one], 0, SAVED, plans[one].checkpoints) for one in LAYOUTS]
    return dict(zip(LAYOUTS, ranks.run(folder, 2, each, jobs)[0], strict=True))


def test_every_layout_computes_the_same(whole: dict[Layout, Any]) -> None:
    """Updates, clipping and the gradient's norm too; with ZeRO 0 DeepSpeed leaves some of that to us."""
    for layout in LAYOUTS:
        losses, norms, _ = whole[layout]
        reference_losses, reference_norms, _ = whole[2, layout[1]]
        assert losses == pytest.approx(reference_losses, abs=BOUND[layout[1]]), layout
        assert norms == pytest.approx(reference_norms, rel=BOUND[layout[1]]), layout


@pytest.mark.parametrize("workers", [1, 4])
def test_any_layout_loads_any_other(
    workers: int, plans: dict[Layout, StagePlan], halves: dict[Layout, Any], tmp_path: Path
) -> None:
    """Saved by two ranks: every weight and moment, bit for bit."""
    pairs = [(one, other) for one in LAYOUTS for other in LAYOUTS if one[1] == other[1]]
    jobs = [(replace(plans[other], checkpoints=plans[one].checkpoints), SAVED, SAVED, None) for one, other in pairs]
    for (one, other), (_, _, loaded) in zip(pairs, ranks.run(tmp_path, workers, each, jobs)[0], strict=True):
        saved = halves[one][2]
        assert saved.keys() == loaded.keys()
        assert all(torch.equal(saved[name], loaded[name]) for name in saved), (one, other)


def test_any_layout_goes_on_from_another(
    plans: dict[Layout, StagePlan], whole: dict[Layout, Any], halves: dict[Layout, Any], tmp_path: Path
) -> None:
    """Four ranks of one ZeRO stage after two of the one below."""
    pairs = [((zero, precision), ((zero + 1) % 4, precision)) for zero, precision in LAYOUTS]
    jobs = [(replace(plans[other], checkpoints=plans[one].checkpoints), SAVED, STEPS, None) for one, other in pairs]
    for (one, other), (losses, _, _) in zip(pairs, ranks.run(tmp_path, 4, each, jobs)[0], strict=True):
        assert losses == pytest.approx(whole[other][0][SAVED:], abs=BOUND[one[1]]), (one, other)


def test_a_run_on_four_then_two_then_three_workers_is_the_run_on_one(
    new_plan: Callable[..., StagePlan], tmp_path: Path
) -> None:
    plan = new_plan(global_batch_size=12, micro_batch_size=1, zero_stage=3)
    [undisturbed] = ranks.run(tmp_path, 1, each, [(replace(plan, checkpoints=str(tmp_path / "one")), 0, STEPS, None)])[
        0
    ]
    losses = []
    for workers, cursor, stop in [(4, 0, 1), (2, 1, 2), (3, 2, STEPS)]:
        [[part, *_]] = ranks.run(tmp_path, workers, each, [(plan, cursor, stop, plan.checkpoints)])[0]
        losses += part
    assert losses == pytest.approx(undisturbed[0], abs=BOUND["fp32"])
