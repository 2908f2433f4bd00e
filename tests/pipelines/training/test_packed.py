"""Packed rows train as the same conversations do alone, at any number of ranks and after a restart."""

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
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
        packs: new_plan(
            global_batch_size=SAMPLES, micro_batch_size=2, steps=STEPS, packing=PACKING if packs else None
        )
        for packs in (True, False)
    }


def count_images(plan: StagePlan, batch: Batch, image_id: int) -> list[int]:
    """Count the images of each row of a micro-batch."""
    return ((batch["input_ids"] == image_id).sum(axis=1) // plan.image_tokens).tolist()


def compute_step(plan: StagePlan, language: LlavaWithLoss, number: int) -> tuple[float, dict[str, Tensor]]:
    """Compute loss and gradient of a global batch, as the ranks together would."""
    cpu = torch.device("cpu")
    engine: Any = SimpleNamespace(module=language, device=cpu)
    count = SAMPLES // plan.stage.micro_batch_size
    reader = plan.build_reader()
    batches = [reader(turn) for turn in range(number * count, (number + 1) * count)]
    loss = 0.0
    for batch, weight in zip(batches, worker.compute_sample_weights(batches, plan, cpu), strict=True):
        part = language(**worker.move_to_device(batch, engine), weight=weight)
        part.backward()
        loss += part.item()
    gradients = {name: parameter.grad for name, parameter in language.named_parameters() if parameter.grad is not None}
    language.zero_grad()
    return loss, gradients


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("methods", METHODS)
@pytest.mark.parametrize("reduction", ["token", "sample"])
def test_loss_and_gradient_are_those_without_packing(
    methods: str,
    reduction: str,
    checkpointing: bool,
    plans: dict[bool, StagePlan],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(worker.dist, "all_reduce", lambda total: None)
    settings = replace(small.MODEL, **METHODS[methods])
    tokenizer = AutoTokenizer.from_pretrained(plans[True].tokenizer)
    torch.manual_seed(0)
    llava = model.build_model(settings, tokenizer).train()
    if checkpointing:
        llava.gradient_checkpointing_enable({"use_reentrant": False})
    changes = {"model": settings, "image_tokens": llava.config.image_seq_length}
    language = LlavaWithLoss(llava)
    for number in range(2):
        results = []
        for packs in (True, False):
            stage = replace(plans[packs].stage, loss_reduction=reduction)
            results.append(compute_step(replace(plans[packs], stage=stage, **changes), language, number))
        (loss, gradients), (expected, reference) = results
        assert loss == pytest.approx(expected, rel=TOLERANCE)
        assert gradients.keys() == reference.keys()
        norm = torch.stack([gradient.norm() for gradient in reference.values()]).norm()
        for name, gradient in gradients.items():
            print(name, float((gradient - reference[name]).norm() / norm), float((gradient - reference[name]).norm() / (reference[name].norm()+1e-30)))
            assert (gradient - reference[name]).norm() <= TOLERANCE * norm, name
