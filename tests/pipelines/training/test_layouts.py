"""Checkpoints of every ZeRO stage and number of workers resume with every other; DeepSpeed ranks without Ray."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from pipelines.training.plan import StagePlan
from tests.pipelines import ranks

pytestmark = pytest.mark.integration

Layout = tuple[int, str]
"""ZeRO stage and precision."""

LAYOUTS: list[Layout] = [(zero_stage, precision) for precision in ("fp32", "bf16") for zero_stage in (0, 1, 2, 3)]
LOSS_TOLERANCE = {"fp32": 1e-6, "bf16": 0.02}
"""Difference of the loss between layouts, which add in another order."""

SAVED_STEP, STEPS = 2, 4


def train_part(plan: StagePlan, cursor: int, stop: int) -> list[float]:
    """Run steps cursor+1..stop on this rank from the newest checkpoint, and save one. Returns the losses."""
    from pipelines.training import checkpoint, engine, fragments

    deepspeed_engine = engine.build_engine(plan, ranks.count_workers())
    if cursor:
        local_fragments = fragments.local_fragments(deepspeed_engine)
        manifest, skipped = checkpoint.restore_newest(plan.folder, local_fragments, lambda url, manifest: None)
        assert manifest
        assert (manifest.cursor, skipped) == (cursor, [])
        fragments.copy_masters_to_model(deepspeed_engine, manifest.updates)
    steps = list(itertools.islice(ranks.run_steps(deepspeed_engine, plan, cursor, STEPS), stop - cursor))
    ranks.save_checkpoint(deepspeed_engine, plan, stop)
    return [step.values["loss"] for step in steps]


@pytest.fixture(scope="module")
def plans(new_plan: Callable[..., StagePlan]) -> dict[Layout, StagePlan]:
    return {
        (zero_stage, precision): new_plan(zero_stage=zero_stage, precision=precision)
        for zero_stage, precision in LAYOUTS
    }


@dataclass(frozen=True)
class Uninterrupted:
    """An uninterrupted run on two ranks.

    Args:
        losses: losses of all steps.
        norms: gradient norms of all steps.
        saved: weights and moments after SAVED_STEP, when it saved a checkpoint.
    """

    losses: list[float]
    norms: list[float]
    saved: dict[str, torch.Tensor]


def train_and_save(plans: list[StagePlan]) -> list[Uninterrupted]:
    """Train each plan on this rank."""
    from pipelines.training import engine

    runs = []
    for plan in plans:
        deepspeed_engine = engine.build_engine(plan, ranks.count_workers())
        steps, saved = [], {}
        for step in ranks.run_steps(deepspeed_engine, plan, 0, STEPS):
            steps.append(step.values)
            if step.number == SAVED_STEP:
                ranks.save_checkpoint(deepspeed_engine, plan, SAVED_STEP)
                saved = ranks.gather_state(deepspeed_engine)
        runs.append(Uninterrupted([step["loss"] for step in steps], [step["grad_norm"] for step in steps], saved))
    return runs


@pytest.fixture(scope="module")
def uninterrupted(
    plans: dict[Layout, StagePlan], tmp_path_factory: pytest.TempPathFactory
) -> dict[Layout, Uninterrupted]:
    folder = tmp_path_factory.mktemp("uninterrupted")
    runs = ranks.run_on_ranks(folder, 2, train_and_save, [plans[layout] for layout in LAYOUTS])[0]
    return dict(zip(LAYOUTS, runs, strict=True))


def list_sources(target: Layout) -> list[Layout]:
    """List the layouts of the same precision, the ZeRO stage below that of the target first."""
    zero_stage, precision = target
    return [((zero_stage + 3 - turn) % 4, precision) for turn in range(4)]


@dataclass(frozen=True)
class Resumed:
    """Runs of one layout that continue checkpoints of all layouts.

    Args:
        losses: losses of the steps after SAVED_STEP, from the checkpoint of the first source.
        loaded: weights and moments that were loaded from each source.
    """

    losses: list[float]
    loaded: list[dict[str, torch.Tensor]]


def load_and_resume(jobs: list[tuple[StagePlan, list[str]]]) -> list[Resumed]:
    """Load checkpoints into one engine for each plan, on this rank, and continue from the first checkpoint.

    Args:
        jobs: a plan, and the folders of checkpoints that its engine loads one after the other.
    """
    from pipelines.training import checkpoint, engine, fragments

    runs = []
    for plan, folders in jobs:
        deepspeed_engine = engine.build_engine(plan, ranks.count_workers())
        run = Resumed([], [])
        for folder in folders:
            local_fragments = fragments.local_fragments(deepspeed_engine)
            # A tensor that is not loaded must not keep the values of the previous checkpoint.
            for tensor in (tensor for fragment in local_fragments for tensor in fragment.states.values()):
                tensor.data.fill_(torch.nan)
            manifest, skipped = checkpoint.restore_newest(folder, local_fragments, lambda url, manifest: None)
            assert manifest
            assert (manifest.cursor, skipped) == (SAVED_STEP, [])
            fragments.copy_masters_to_model(deepspeed_engine, manifest.updates)
            loaded = ranks.gather_state(deepspeed_engine)
            if dist.get_rank() == 0:
                # The other ranks have gathered the same.
                run.loaded.append(loaded)
            if not run.losses:
                steps = ranks.run_steps(deepspeed_engine, plan, SAVED_STEP, STEPS)
                run.losses.extend(step.values["loss"] for step in steps)
        runs.append(run)
    return runs


@pytest.fixture(scope="module", params=[1, 4])
def resumed(
    request: pytest.FixtureRequest,
    plans: dict[Layout, StagePlan],
    uninterrupted: dict[Layout, Uninterrupted],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[Layout, Resumed]:
    """Runs on one rank and on four ranks that continue the checkpoints of two ranks."""
    jobs = [(plans[target], [plans[source].folder for source in list_sources(target)]) for target in LAYOUTS]
    runs = ranks.run_on_ranks(tmp_path_factory.mktemp("resumed"), request.param, load_and_resume, jobs)[0]
    return dict(zip(LAYOUTS, runs, strict=True))


def test_every_layout_computes_the_same(uninterrupted: dict[Layout, Uninterrupted]) -> None:
    """Includes updates, clipping and gradient norms; with ZeRO 0, parts of these are not DeepSpeed's."""
    for layout in LAYOUTS:
        run, reference = uninterrupted[layout], uninterrupted[2, layout[1]]
        assert run.losses == pytest.approx(reference.losses, abs=LOSS_TOLERANCE[layout[1]]), layout
        assert run.norms == pytest.approx(reference.norms, rel=LOSS_TOLERANCE[layout[1]]), layout


def test_any_layout_loads_any_other(resumed: dict[Layout, Resumed], uninterrupted: dict[Layout, Uninterrupted]) -> None:
    """Every weight and moment that two ranks saved is loaded bit for bit."""
    for target in LAYOUTS:
        for source, loaded in zip(list_sources(target), resumed[target].loaded, strict=True):
            saved = uninterrupted[source].saved
            assert saved.keys() == loaded.keys()
            assert all(torch.equal(saved[name], loaded[name]) for name in saved), (source, target)


def test_any_layout_resumes_from_another(
    resumed: dict[Layout, Resumed], uninterrupted: dict[Layout, Uninterrupted]
) -> None:
    """One or four ranks of one ZeRO stage resume after two ranks of the stage below."""
    for target in LAYOUTS:
        expected = uninterrupted[target].losses[SAVED_STEP:]
        assert resumed[target].losses == pytest.approx(expected, abs=LOSS_TOLERANCE[target[1]]), target


def test_a_run_on_four_then_two_then_three_workers_is_the_run_on_one(
    new_plan: Callable[..., StagePlan], tmp_path: Path
) -> None:
    plan = new_plan(global_batch_size=12, micro_batch_size=1, zero_stage=3)
    single = replace(plan, checkpoints=str(tmp_path / "single"))
    expected = ranks.run_on_ranks(tmp_path, 1, train_part, single, 0, 3)[0]
    losses = []
    for workers, cursor, stop in [(4, 0, 1), (2, 1, 2), (3, 2, 3)]:
        losses += ranks.run_on_ranks(tmp_path, workers, train_part, plan, cursor, stop)[0]
    assert losses == pytest.approx(expected, abs=LOSS_TOLERANCE["fp32"])
