"""The validation loss is the mean loss of the held-out samples, for every ZeRO stage and number of workers."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines.data.consumed import CONSUMED_FILE, verify_coverage
from pipelines.data.held_out import select_held_out
from pipelines.data.shard_index import Shards
from pipelines.training import driver
from pipelines.training.files import METRICS_FILE
from pipelines.training.metrics import VALIDATION_LOSS, read_validation_loss
from pipelines.training.plan import StagePlan
from pipelines.training.stage import Lora
from redux.conversation import IGNORE_INDEX
from tests.pipelines import ranks
from tests.pipelines.small import STEPS

pytestmark = pytest.mark.integration

NewPlan = Callable[..., StagePlan]

HOLD_OUT = 0.4
HELD_OUT = select_held_out(22, HOLD_OUT, "set").tolist()


def train(plan: StagePlan, validates: bool) -> tuple[list[float], dict[int, float]]:
    """Train on this rank. Returns the losses of all steps and the validation losses by step; 0 is before training."""
    from pipelines.training import engine, validation

    deepspeed_engine = engine.build_engine(plan, ranks.count_workers())
    reader = plan.build_reader()
    hook = validation.ValidationHook(deepspeed_engine, plan, reader)
    found: dict[int, float] = {}
    if validates:
        found[0] = validation.compute_validation_loss(deepspeed_engine, plan, hook.readers)
    losses = []
    for step in ranks.run_steps(deepspeed_engine, plan, 0, STEPS):
        if validates:
            hook.on_step_end(step)
        assert deepspeed_engine.module.training
        losses.append(step.values["loss"])
        if VALIDATION_LOSS in step.values:
            found[step.number] = step.values[VALIDATION_LOSS]
    # ZeRO 3 replaces functions of torch until then.
    engine.free_engine(deepspeed_engine)
    return losses, found


def train_all(jobs: list[tuple[StagePlan, bool]]) -> list[Any]:
    return [train(*job) for job in jobs]


def compute_reference(plan: StagePlan) -> float:
    """Compute the loss of the untrained model, sample by sample, without DeepSpeed."""
    from pipelines.training import engine

    module, _ = engine.build_module(plan, torch.device("cpu"))
    module.eval()
    reader = plan.build_reader()
    means, totals, tokens = [], [], []
    samples = [
        sample
        for name, shards in reader.sources.items()
        for sample in shards.read_samples(select_held_out(len(shards), plan.hold_out, name))
    ]
    for sample in samples:
        row, image = reader._encode(sample, 0)
        labels = torch.from_numpy(row["labels"])[None]
        batch = {"input_ids": torch.from_numpy(row["input_ids"])[None], "labels": labels}
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        if image is not None:
            pixels = torch.from_numpy(image.transpose(2, 0, 1).copy())[None]
        else:
            pixels = torch.empty(0, 3, reader.image_size, reader.image_size, dtype=torch.uint8)
        with torch.no_grad():
            loss = module(**batch, pixel_values=engine.normalize_pixels(pixels), weight=torch.ones(1)).item()
        count = int((labels[:, 1:] != IGNORE_INDEX).sum())
        means.append(loss / count)
        totals.append(loss)
        tokens.append(count)
    return sum(means) / len(means) if plan.stage.loss_reduction == "sample" else sum(totals) / sum(tokens)


def test_the_validation_loss_is_that_of_a_plain_loop_on_any_ranks(new_plan: NewPlan, tmp_path: Path) -> None:
    """A micro-batch of 4 does not divide the held-out samples, and its number does not divide among two ranks."""
    plans = [
        new_plan({"hold_out": HOLD_OUT}, zero_stage=zero_stage, validate_steps=3, micro_batch_size=4, **changes)
        for zero_stage, changes in (
            (0, {}), (1, {"loss_reduction": "sample"}), (2, {}), (3, {}), (3, {"activation_checkpointing": True}),
        )
    ]  # fmt: skip
    jobs = [(plan, True) for plan in plans]
    two = ranks.run_on_ranks(tmp_path, 2, train_all, [*jobs, (plans[0], False), (plans[3], False)])
    assert two[0] == two[1], "all ranks know the same values"
    one = ranks.run_on_ranks(tmp_path, 1, train_all, jobs[:2])[0]
    results = [found for _, found in two[0]]
    for plan, found in zip(plans, results, strict=False):
        assert list(found) == [0, 3, 6, 8], "every three steps, and the last one"
        assert found[0] == pytest.approx(compute_reference(plan), rel=1e-5)
        assert found[8] < found[0]
    for found in results[2:5]:
        assert found == pytest.approx(results[0], rel=1e-4), "the same for each ZeRO stage"
    for (_, found), other in zip(one, results, strict=False):
        assert found == pytest.approx(other, rel=1e-4), "the same on one rank"
    # Training does not notice the validation.
    assert two[0][5] == (two[0][0][0], {})
    assert two[0][6] == (two[0][3][0], {})


def test_several_sets_bf16_and_adapters_have_the_loss_of_a_plain_loop(
    new_plan: NewPlan, stored: Shards, tmp_path: Path
) -> None:
    """The two sets have different shares of a batch, but all their held-out samples count alike."""
    plan = new_plan({"hold_out": HOLD_OUT}, micro_batch_size=4, validate_steps=STEPS)
    sets = {**plan.sets, "other": stored.folder}
    cases = {
        "sets": (replace(plan, sets=sets, stage=replace(plan.stage, data={"set": 0.25, "other": 0.75})), 1e-5),
        "bf16": (replace(plan, stage=replace(plan.stage, zero_stage=2, precision="bf16")), 0.02),
        "adapters": (replace(plan, stage=replace(plan.stage, lora=Lora(rank=4, alpha=8, dropout=0.5))), 1e-5),
    }
    two = ranks.run_on_ranks(tmp_path, 2, train_all, [(case, True) for case, _ in cases.values()])
    assert two[0] == two[1], "all ranks know the same values"
    expected = {name: compute_reference(case) for name, (case, _) in cases.items()}
    for (name, (_, tolerance)), (_, found) in zip(cases.items(), two[0], strict=True):
        assert list(found) == [0, STEPS], name
        assert found[0] == pytest.approx(expected[name], rel=tolerance), name
        assert found[STEPS] < found[0], name
    assert expected["sets"] != pytest.approx(expected["bf16"], rel=1e-3), "the second set counts"


@pytest.mark.usefixtures("ray_cluster")
def test_a_stage_records_the_validation_loss_and_leaves_out_the_samples(new_plan: NewPlan) -> None:
    plan = new_plan({"hold_out": HOLD_OUT})
    driver.train_stage(plan)
    rows = [json.loads(line) for line in (plan.run / METRICS_FILE).read_text().splitlines()]
    found = {row["step"]: row[VALIDATION_LOSS] for row in rows if VALIDATION_LOSS in row}
    assert list(found) == [2, 4, 6, 8], "at each checkpoint"
    assert found[8] < found[2]
    assert read_validation_loss(plan.run, "small") == found[8]
    with (plan.run / CONSUMED_FILE).open("rb") as log:
        [coverage], errors = verify_coverage(log, CONSUMED_FILE, "set", 22, HELD_OUT)
    assert (errors, coverage.samples) == ([], 64)
