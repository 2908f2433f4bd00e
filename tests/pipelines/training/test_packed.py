"""Packed rows train as the same conversations do alone, at any number of ranks and after a restart."""

import itertools
import json
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

from pipelines.data.consumed import verify_coverage
from pipelines.data.ingest import Batch
from pipelines.data.packing import Packing
from pipelines.training import worker
from pipelines.training.engine import LlavaWithLoss
from pipelines.training.plan import StagePlan
from pipelines.training.stage import Lora
from redux import model
from redux.settings import CMAI, VMTC
from tests.pipelines import ranks, small

SAMPLES = 12
STEPS, SAVED_STEP = 4, 2
PACKING = Packing(max_length=64)
TOLERANCE = 1e-6
"""Relative difference of losses and gradient norms in fp32, which are sums in another order."""

METHODS: dict[str, dict[str, Any]] = {
    "VMTC and CMAI": {"vmtc": VMTC(), "cmai": CMAI(gamma_max=0.8, gamma_min=0.5)},
    "VMTC": {"vmtc": VMTC(), "cmai": None},
    "CMAI": {"vmtc": None, "cmai": CMAI(gamma_max=0.8, gamma_min=0.5)},
    "neither": {"vmtc": None, "cmai": None},
}


@pytest.fixture(scope="module")
def plans(new_plan: Callable[..., StagePlan]) -> dict[bool, StagePlan]:
    """Plans of a stage with packing and without."""
    return {
        packs: new_plan(global_batch_size=SAMPLES, micro_batch_size=2, steps=STEPS, packing=PACKING if packs else None)
        for packs in (True, False)
    }


def compute_step(plan: StagePlan, language: LlavaWithLoss) -> tuple[float, dict[str, Tensor]]:
    """Compute loss and gradient of the first global batch, as the ranks together would."""
    cpu = torch.device("cpu")
    engine: Any = SimpleNamespace(module=language, device=cpu)
    reader = plan.build_reader()
    batches = [reader(number) for number in range(SAMPLES // plan.stage.micro_batch_size)]
    loss = 0.0
    for batch, weight in zip(batches, worker.compute_sample_weights(batches, plan, cpu), strict=True):
        part = language(**worker.move_to_device(batch, engine), weight=weight)
        part.backward()
        loss += part.item()
    gradients = {name: parameter.grad for name, parameter in language.named_parameters() if parameter.grad is not None}
    language.zero_grad()
    return loss, gradients


CASES = [*((methods, reduction, False) for methods in METHODS for reduction in ("token", "sample"))]
CASES.append(("VMTC and CMAI", "token", True))


@pytest.mark.parametrize(("methods", "reduction", "checkpointing"), CASES)
def test_loss_and_gradient_are_those_without_packing(
    methods: str,
    reduction: str,
    checkpointing: bool,
    plans: dict[bool, StagePlan],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(worker.dist, "all_reduce", lambda total: None)
    settings = replace(small.MODEL, **METHODS[methods])
    torch.manual_seed(0)
    llava = model.build_model(settings, AutoTokenizer.from_pretrained(plans[True].tokenizer)).train()
    if checkpointing:
        llava.gradient_checkpointing_enable({"use_reentrant": False})
    language = LlavaWithLoss(llava)
    results = []
    for packs in (True, False):
        stage = replace(plans[packs].stage, loss_reduction=reduction)
        plan = replace(plans[packs], stage=stage, model=settings, image_tokens=llava.config.image_seq_length)
        results.append(compute_step(plan, language))
    (loss, gradients), (expected, reference) = results
    assert loss == pytest.approx(expected, rel=TOLERANCE)
    assert gradients.keys() == reference.keys()
    for name, gradient in gradients.items():
        # A sum of almost equal terms of both signs has a larger relative error.
        assert (gradient - reference[name]).norm() <= TOLERANCE * reference[name].norm() + 1e-8, name


Step = tuple[float, float, list[int]]
"""Loss, norm of the gradient, and samples of a step."""


def train_part(plan: StagePlan, cursor: int, stop: int, killed_rank: int | None = None) -> list[Step]:
    """Run steps cursor+1..stop on this rank, from the newest checkpoint if there is one.

    Args:
        plan: plan of the stage.
        cursor: step of the newest checkpoint, 0 without one.
        stop: last step.
        killed_rank: rank that saves a checkpoint after SAVED_STEP with the others, and is killed within the next step.
    """
    from pipelines.training import checkpoint, engine, fragments

    deepspeed_engine = engine.build_engine(plan, ranks.count_workers())
    if cursor:
        manifest, _ = checkpoint.restore_newest(
            plan.folder, fragments.local_fragments(deepspeed_engine), lambda url, manifest: None
        )
        assert manifest
        assert manifest.cursor == cursor
        fragments.copy_masters_to_model(deepspeed_engine, manifest.updates)
    batches = ranks.read_micro_batches(deepspeed_engine, plan, cursor, stop)
    if deepspeed_engine.global_rank == killed_rank:
        count = SAVED_STEP * plan.stage.count_accumulation_steps(ranks.count_workers()) + 1
        batches = stop_by_signal(batches, count)
    steps = []
    for step in worker.run_training_steps(deepspeed_engine, plan, batches, cursor, STEPS, [], set()):
        steps.append((step.values["loss"], step.values["grad_norm"], step.used.samples["set"]))
        if step.number == SAVED_STEP and killed_rank is not None:
            ranks.save_checkpoint(deepspeed_engine, plan, SAVED_STEP)
        if step.number == stop:
            break
    return steps


def stop_by_signal(batches: Iterator[Batch], count: int) -> Iterator[Batch]:
    """Yield so many micro-batches, then kill this process."""
    yield from itertools.islice(batches, count)
    os.kill(os.getpid(), signal.SIGKILL)


def assert_same_steps(steps: list[Step], expected: list[Step], tolerance: float = TOLERANCE) -> None:
    losses, norms, samples = zip(*steps, strict=True)
    expected_losses, expected_norms, expected_samples = zip(*expected, strict=True)
    assert losses == pytest.approx(expected_losses, rel=tolerance)
    assert norms == pytest.approx(expected_norms, rel=10 * tolerance)
    assert samples == expected_samples


LAYOUTS: dict[str, dict[str, Any]] = {
    **{f"ZeRO {zero_stage}": {"zero_stage": zero_stage} for zero_stage in (0, 1, 2, 3)},
    "LoRA": {"lora": Lora(rank=2, alpha=4, dropout=0), "learning_rate": {"language": 1e-2}},
    "bf16": {"precision": "bf16"},
}
BF16_TOLERANCE = 1e-3


def train_all(plans: list[StagePlan]) -> list[list[Step]]:
    """Train two steps of each plan on this rank."""
    return [train_part(plan, 0, 2) for plan in plans]


@pytest.mark.integration
def test_every_layout_trains_packed_rows_as_without_packing(plans: dict[bool, StagePlan], tmp_path: Path) -> None:
    all_plans = [
        replace(plans[packs], stage=replace(plans[packs].stage, **layout))
        for layout in LAYOUTS.values()
        for packs in (True, False)
    ]
    runs = ranks.run_on_ranks(tmp_path, 2, train_all, all_plans)[0]
    for name, packed, unpacked in zip(LAYOUTS, runs[::2], runs[1::2], strict=True):
        assert_same_steps(packed, unpacked, BF16_TOLERANCE if name == "bf16" else TOLERANCE)


@pytest.mark.integration
def test_a_run_killed_on_two_ranks_resumes_on_three_as_on_one(plans: dict[bool, StagePlan], tmp_path: Path) -> None:
    """Losses, gradients and samples are also those without packing."""
    plan = plans[True]
    expected = ranks.run_on_ranks(tmp_path, 1, train_part, plan, 0, STEPS)[0]
    with pytest.raises(AssertionError, match="exit code"):
        ranks.run_on_ranks(tmp_path, 2, train_part, plan, 0, STEPS, 1)
    resumed = ranks.run_on_ranks(tmp_path, 3, train_part, plan, SAVED_STEP, STEPS)[0]
    assert_same_steps(resumed, expected[SAVED_STEP:])
    unpacked = ranks.run_on_ranks(tmp_path, 2, train_part, plans[False], 0, STEPS)[0]
    assert_same_steps(expected, unpacked)
    lines = [
        json.dumps({"stage": "small", "step": number, "samples": {"set": samples}, "replaced": []}).encode() + b"\n"
        for number, (_, _, samples) in enumerate(expected[:SAVED_STEP] + resumed, start=1)
    ]
    coverage, errors = verify_coverage(lines, "consumed.jsonl", "set", 22)
    assert not errors
    assert coverage[0].epochs == STEPS * SAMPLES // 22
