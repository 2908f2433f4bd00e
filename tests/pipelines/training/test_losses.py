"""Loss and gradient of a global batch equal those of a slow reference, for every division into micro-batches.

One process computes all ranks and knows the sum that they would reduce. test_layouts.py has real ranks.
"""

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

from pipelines.data.ingest import Batch
from pipelines.training import worker
from pipelines.training.engine import LlavaWithLoss
from pipelines.training.plan import StagePlan
from redux import model
from redux.conversation import IGNORE_INDEX
from tests.pipelines import small

SAMPLES = 8
CUTS = [(8, 1), (2, 1), (4, 2), (1, 4)]
"""Micro-batch and ranks."""

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def plans(new_plan: Callable[..., StagePlan]) -> dict[tuple[int, str], StagePlan]:
    sizes = {micro for micro, _ in CUTS}
    return {
        (micro, loss): new_plan(global_batch_size=SAMPLES, micro_batch_size=micro, loss_reduction=loss)
        for micro in sizes
        for loss in ("token", "sample")
    }


@pytest.fixture(scope="module")
def language(plans: dict[tuple[int, str], StagePlan]) -> Iterator[LlavaWithLoss]:
    """Build the model in double precision, so that rounding errors stay small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(plans[1, "token"].tokenizer)
    yield LlavaWithLoss(model.build_model(small.MODEL, tokenizer)).double().train()
    torch.set_num_threads(before)


def draw_masks(seed: int) -> np.ndarray:
    """Draw a mask of learned tokens: none, a few, or all of a sample. Shape (samples, 512)."""
    rng = np.random.default_rng(seed)
    return rng.random((SAMPLES, 512)) < rng.choice([0, 0, 0.1, 0.5, 1], (SAMPLES, 1))


def cut_batches(plan: StagePlan, learned: np.ndarray) -> list[Batch]:
    """Cut the global batch into micro-batches with these labels."""
    micro = plan.stage.micro_batch_size
    batches = [plan.build_reader()(number) for number in range(SAMPLES // micro)]
    for number, batch in enumerate(batches):
        mask = learned[number * micro :][:micro, : batch["input_ids"].shape[1]]
        batch["labels"] = np.where(mask & (batch["attention_mask"] == 1), batch["input_ids"], IGNORE_INDEX)
    return batches


def pop_gradients(language: LlavaWithLoss) -> dict[str, Tensor]:
    """Return the gradients of the last loss, and clear them."""
    found = {name: parameter.grad for name, parameter in language.named_parameters() if parameter.grad is not None}
    language.zero_grad()
    return found


def compute_slowly(
    language: LlavaWithLoss, plan: StagePlan, learned: np.ndarray
) -> tuple[float, dict[str, Tensor], int]:
    """Compute loss, gradient and number of learned tokens from all logits of one sample at a time."""
    samples = []
    for batch in cut_batches(plan, learned):
        inputs = make_tensors(language, batch)
        labels = inputs.pop("labels")[0, 1:]
        log_probs = language.llava(**inputs).logits[0, :-1].log_softmax(-1)
        samples.append(
            [-log_probs[position, label] for position, label in enumerate(labels.tolist()) if label != IGNORE_INDEX]
        )
    tokens = [loss for losses in samples for loss in losses]
    if plan.stage.loss_reduction == "token":
        total = torch.stack(tokens).mean()
    else:
        total = torch.stack([torch.stack(losses).mean() for losses in samples if losses]).sum() / SAMPLES
    total.backward()
    return total.item(), pop_gradients(language), len(tokens)


def make_tensors(language: LlavaWithLoss, batch: Batch) -> dict[str, Tensor]:
    engine: Any = SimpleNamespace(module=language, device=CPU)
    return worker.move_to_device(batch, engine)


@pytest.mark.parametrize("kind", ["token", "sample"])
@pytest.mark.parametrize("seed", range(2))
def test_loss_and_gradient_equal_the_slow_reference_for_every_division(
    kind: str,
    seed: int,
    plans: dict[tuple[int, str], StagePlan],
    language: LlavaWithLoss,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    learned = draw_masks(seed)
    expected, expected_gradients, count = compute_slowly(language, plans[1, kind], learned)
    assert count > 20
    monkeypatch.setattr(worker.dist, "all_reduce", lambda total: total.fill_(count))
    for micro, workers in CUTS:
        plan = plans[micro, kind]
        batches = cut_batches(plan, learned)
        loss = 0.0
        for rank in range(workers):
            local = batches[rank::workers]
            for batch, weight in zip(local, worker.compute_sample_weights(local, plan, CPU), strict=True):
                part = language(**make_tensors(language, batch), weight=weight)
                part.backward()
                loss += part.item()
        assert loss == pytest.approx(expected, rel=1e-6), (micro, workers)  # weights are of 32 bits
        found = pop_gradients(language)
        assert found.keys() >= expected_gradients.keys()
        for name, gradient in found.items():
            reference = expected_gradients.get(name, torch.zeros_like(gradient))
            assert (gradient - reference).norm() <= 1e-5 * reference.norm() + 1e-8, name  # softmax is of 32 bits


@pytest.mark.parametrize("kind", ["token", "sample"])
def test_a_global_batch_without_a_learned_token_changes_nothing(
    kind: str, plans: dict[tuple[int, str], StagePlan], language: LlavaWithLoss, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker.dist, "all_reduce", lambda total: None)
    plan = plans[4, kind]
    batches = cut_batches(plan, np.zeros((SAMPLES, 512), bool))
    for batch, weight in zip(batches, worker.compute_sample_weights(batches, plan, CPU), strict=True):
        loss = language(**make_tensors(language, batch), weight=weight)
        loss.backward()
        assert loss.item() == 0
    assert not any(gradient.any() for gradient in pop_gradients(language).values())


def test_each_pair_of_a_contrastive_batch_counts_the_same(new_plan: Callable[..., StagePlan]) -> None:
    plan = new_plan(objective="contrastive", learning_rate={"tower": 1e-3})
    batches = [{"input_ids": np.zeros((2, 5))}] * 2
    weights = worker.compute_sample_weights(batches, plan, CPU)
    assert torch.cat(weights).tolist() == [1 / 8] * 4
