"""A global batch's loss and gradient are those that a slow reference computes sample by sample, however it is cut.

The ranks are played by one process, which knows the sum that they would reduce; real ones are in test_layouts.py.
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
from pipelines.training import driver
from pipelines.training.engine import Language
from pipelines.training.plan import Plan
from redux import model
from redux.conversation import IGNORE_INDEX
from tests.pipelines import small

SAMPLES = 8
CUTS = [(8, 1), (2, 1), (4, 2), (1, 4)]
"""Micro-batch and ranks."""

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def plans(new_plan: Callable[..., Plan]) -> dict[tuple[int, str], Plan]:
    sizes = {micro for micro, _ in CUTS}
    return {
        (micro, loss): new_plan(global_batch_size=SAMPLES, micro_batch_size=micro, loss=loss)
        for micro in sizes
        for loss in ("token", "sample")
    }


@pytest.fixture(scope="module")
def language(plans: dict[tuple[int, str], Plan]) -> Iterator[Language]:
    """In double precision, so that only mistakes make a difference."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(plans[1, "token"].tokenizer)
    yield Language(model.build_model(small.MODEL, tokenizer)).double().train()
    torch.set_num_threads(before)


def masks(seed: int) -> np.ndarray:
    """Which tokens of each sample are learned; of some samples none, of some a few, of some all."""
    chance = np.random.default_rng(seed)
    return chance.random((SAMPLES, 512)) < chance.choice([0, 0, 0.1, 0.5, 1], (SAMPLES, 1))


def cut(plan: Plan, learned: np.ndarray) -> list[Batch]:
    """The global batch in micro-batches, with these labels."""
    micro = plan.stage.micro_batch_size
    batches = [plan.reader()(number) for number in range(SAMPLES // micro)]
    for number, batch in enumerate(batches):
        mask = learned[number * micro :][:micro, : batch["input_ids"].shape[1]]
        batch["labels"] = np.where(mask & (batch["attention_mask"] == 1), batch["input_ids"], IGNORE_INDEX)
    return batches


def gradients(language: Language) -> dict[str, Tensor]:
    """Of the loss computed last; they are cleared."""
    found = {name: one.grad for name, one in language.named_parameters() if one.grad is not None}
    language.zero_grad()
    return found


def slow(language: Language, plan: Plan, learned: np.ndarray) -> tuple[float, dict[str, Tensor], int]:
    """Loss, gradient and number of learned tokens: each sample alone, and all its logits."""
    samples = []
    for batch in cut(plan, learned):
        inputs = tensors(language, batch)
        labels = inputs.pop("labels")[0, 1:]
        chances = language.llava(**inputs).logits[0, :-1].log_softmax(-1)
        samples.append([-chances[place, label] for place, label in enumerate(labels.tolist()) if label != IGNORE_INDEX])
    tokens = [loss for losses in samples for loss in losses]
    if plan.stage.loss_reduction == "token":
        total = torch.stack(tokens).mean()
    else:
        total = torch.stack([torch.stack(losses).mean() for losses in samples if losses]).sum() / SAMPLES
    total.backward()
    return total.item(), gradients(language), len(tokens)


def tensors(language: Language, batch: Batch) -> dict[str, Tensor]:
    trained: Any = SimpleNamespace(module=language, device=CPU)
    return driver._tensors(batch, trained)


@pytest.mark.parametrize("kind", ["token", "sample"])
@pytest.mark.parametrize("seed", range(2))
def test_loss_and_gradient_are_those_of_the_slow_reference_however_the_batch_is_cut(
    kind: str,
    seed: int,
    plans: dict[tuple[int, str], Plan],
    language: Language,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    learned = masks(seed)
    expected, slope, count = slow(language, plans[1, kind], learned)
    assert count > 20
    monkeypatch.setattr(driver.dist, "all_reduce", lambda total: total.fill_(count))
    for micro, workers in CUTS:
        plan = plans[micro, kind]
        batches = cut(plan, learned)
        loss = 0.0
        for rank in range(workers):
            mine = batches[rank::workers]
            for batch, weight in zip(mine, driver._weights(mine, plan, CPU), strict=True):
                part = language(**tensors(language, batch), weight=weight)
                part.backward()
                loss += part.item()
        assert loss == pytest.approx(expected, rel=1e-6), (micro, workers)  # weights are of 32 bits
        mine = gradients(language)
        assert mine.keys() >= slope.keys()
        for name, one in mine.items():
            other = slope.get(name, torch.zeros_like(one))
            assert (one - other).norm() <= 1e-5 * other.norm() + 1e-8, name  # softmax is of 32 bits


@pytest.mark.parametrize("kind", ["token", "sample"])
def test_a_global_batch_without_a_learned_token_changes_nothing(
    kind: str, plans: dict[tuple[int, str], Plan], language: Language, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver.dist, "all_reduce", lambda total: None)
    plan = plans[4, kind]
    batches = cut(plan, np.zeros((SAMPLES, 512), bool))
    for batch, weight in zip(batches, driver._weights(batches, plan, CPU), strict=True):
        loss = language(**tensors(language, batch), weight=weight)
        loss.backward()
        assert loss.item() == 0
    assert not any(one.any() for one in gradients(language).values())


def test_each_pair_of_a_contrastive_batch_counts_the_same(new_plan: Callable[..., Plan]) -> None:
    plan = new_plan(objective="contrastive", learning_rate={"tower": 1e-3})
    batches = [{"input_ids": np.zeros((2, 5))}] * 2
    weights = driver._weights(batches, plan, CPU)
    assert torch.cat(weights).tolist() == [1 / 8] * 4
