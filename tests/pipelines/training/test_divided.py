"""Under ZeRO 3 a model is loaded in parts, one for each rank; offloading changes only the place of the states."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from transformers import AutoTokenizer

from pipelines.training.plan import StagePlan
from redux import model
from redux.architecture import ModelSettings
from tests.pipelines import ranks

pytestmark = pytest.mark.integration

SAVED_STEP, STEPS = 2, 4

OFFLOADED = [
    (1, "fp32", ("offload_optimizer",)),
    (2, "bf16", ("offload_optimizer",)),
    (3, "fp32", ("offload_parameters",)),
    (3, "bf16", ("offload_optimizer", "offload_parameters")),
]


def train(plan: StagePlan, is_divided: bool) -> tuple[list[float], dict[str, torch.Tensor], int]:
    """Train on this rank. Returns losses, weights and moments, and parameter elements after loading."""
    from pipelines.training import engine

    results: list[Any] = []
    build = engine.build_module

    def build_module(plan: StagePlan, device: Any, zero_config: Any) -> Any:
        results.append(build(plan, device, zero_config if is_divided else None))
        results.append(sum(parameter.numel() for parameter in results[0][0].parameters()))
        return results[0]

    with patch.object(engine, "build_module", build_module):
        deepspeed_engine = engine.build_engine(plan, ranks.count_workers())
    losses = [step.values["loss"] for step in ranks.run_steps(deepspeed_engine, plan, 0, STEPS)]
    return losses, ranks.gather_state(deepspeed_engine), results[1]


def train_all(jobs: list[tuple[Any, ...]]) -> list[Any]:
    return [train(*job) for job in jobs]


@pytest.fixture(scope="module")
def start(new_plan: Callable[..., StagePlan], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model from which stages start."""
    plan = new_plan()
    assert isinstance(plan.model, ModelSettings)
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("start")
    model.build_model(plan.model, AutoTokenizer.from_pretrained(plan.tokenizer)).save_pretrained(folder)
    return folder


def test_a_model_divided_among_ranks_trains_like_a_whole_one(
    start: Path, new_plan: Callable[..., StagePlan], tmp_path: Path
) -> None:
    plans = [
        new_plan(
            {"start": str(start)}, steps=STEPS, zero_stage=3, precision=precision, activation_checkpointing=recomputes
        )
        for precision, recomputes in (("fp32", False), ("bf16", True))
    ]
    jobs = [(plan, is_divided) for plan in plans for is_divided in (True, False)]
    results = ranks.run_on_ranks(tmp_path, 2, train_all, jobs)[0]
    for parts, whole in zip(results[::2], results[1::2], strict=True):
        assert parts[0] == whole[0]
        assert parts[1].keys() == whole[1].keys()
        assert all(parts[1][name].equal(whole[1][name]) for name in parts[1])
        # DeepSpeed leaves an empty tensor in place of a parameter.
        assert parts[2] == 0 < whole[2]


def train_and_resume(jobs: list[tuple[StagePlan, str]]) -> list[Any]:
    """Train each plan in one go, and again with a checkpoint in between that a plan without offloading continues."""
    import itertools

    from pipelines.training import checkpoint, engine, fragments

    results = []
    for plan, folder in jobs:
        plain = replace(plan, stage=replace(plan.stage, offload_optimizer=False, offload_parameters=False))
        runs = []
        for first, continuations in ((plain, (plain,)), (plan, (plan, plain))):
            saved = replace(first, checkpoints=f"{folder}/{len(runs)}")
            deepspeed_engine = engine.build_engine(first, ranks.count_workers())
            steps = itertools.islice(ranks.run_steps(deepspeed_engine, first, 0, STEPS), SAVED_STEP)
            losses = [step.values["loss"] for step in steps]
            ranks.save_checkpoint(deepspeed_engine, saved, SAVED_STEP)
            del deepspeed_engine
            for second in continuations:
                resumed = engine.build_engine(second, ranks.count_workers())
                local = fragments.local_fragments(resumed)
                manifest, _ = checkpoint.restore_newest(saved.folder, local, lambda url, manifest: None)
                assert manifest
                fragments.copy_masters_to_model(resumed, manifest.updates)
                later = [step.values["loss"] for step in ranks.run_steps(resumed, second, SAVED_STEP, STEPS)]
                runs.append((losses + later, ranks.gather_state(resumed)))
        results.append(runs)
    return results


def test_checkpoints_of_offloaded_states_continue_with_and_without_offloading(
    new_plan: Callable[..., StagePlan], tmp_path: Path
) -> None:
    plans = [
        new_plan(steps=STEPS, zero_stage=zero_stage, precision=precision, **dict.fromkeys(names, True))
        for zero_stage, precision, names in OFFLOADED
    ]
    jobs = [(plan, str(tmp_path / str(number))) for number, plan in enumerate(plans)]
    for layout, runs in zip(OFFLOADED, ranks.run_on_ranks(tmp_path, 2, train_and_resume, jobs)[0], strict=True):
        for losses, state in runs[1:]:
            assert losses == pytest.approx(runs[0][0], rel=1e-5 if layout[1] == "fp32" else 0.02), layout
            assert state.keys() == runs[0][1].keys(), layout
