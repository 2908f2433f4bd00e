"""Ranks with 0, 1 and 4 images in a step, and steps of text alone, train as one rank with the whole batch does."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from pipelines.data import shard_writer
from pipelines.data.ingest import Reader
from pipelines.data.options import ShardOptions
from pipelines.data.packing import Packing
from pipelines.training import engine, worker
from pipelines.training.plan import StagePlan
from tests.pipelines import ranks

pytestmark = pytest.mark.integration

ROWS, RANKS = 4, 3
IMAGE_COUNTS = ((0, 1, 4), (0, 0, 0), (4, 0, 1), (1, 0, 0))
"""Images of each rank in each step."""

TRAINED = {
    "all": {"tower": 1e-3, "projector": 1e-3, "language": 1e-3},
    "frozen tower": {"projector": 1e-3, "language": 1e-3},
}
LAYOUTS = [
    (zero_stage, packs, trained) for zero_stage in (0, 1, 2, 3) for packs in (False, True) for trained in TRAINED
]
TOLERANCE = 1e-6
"""Relative difference of losses in fp32, which are sums in another order."""


@pytest.fixture
def skewed_set(
    in_process: Callable[[], AbstractContextManager[None]], records: list[dict], pictures: Path, tmp_path: Path
) -> str:
    """A set whose samples in stored order are the micro-batches of IMAGE_COUNTS."""
    chosen = []
    for images in (images for counts in IMAGE_COUNTS for images in counts):
        for row in range(ROWS):
            number = len(chosen)
            record = {**records[number % len(records)], "id": str(number)}
            if row >= images:
                first, *others = record["conversations"]
                text = {**first, "value": first["value"].replace("<image>\n", "")}
                record = {"id": record["id"], "conversations": [text, *others]}
            chosen.append(record)
    folder = tmp_path / "skewed"
    with in_process():
        shard_writer.make_shards(chosen, str(pictures), str(folder), ShardOptions(samples_per_shard=20))
    return str(folder)


def build_ordered_reader(plan: StagePlan) -> Reader:
    """Build a reader whose micro-batches are the stored samples in their order, also with packing."""
    reader = plan.build_reader()
    # Packing divides a global batch by length; here each micro-batch is one.
    return replace(reader, order=replace(reader.order, global_batch_size=plan.stage.micro_batch_size))


def train_all(plans: list[StagePlan]) -> list[tuple[list[list[float]], dict[str, torch.Tensor]]]:
    """Train each plan on this rank. Returns images, loss and norm of each step, and weights and moments."""
    results = []
    make_config = engine.make_config

    def make_dividing_config(plan: StagePlan) -> dict[str, Any]:
        config = make_config(plan)
        # ZeRO 3 would keep small parameters whole on each rank, and gather none.
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        return config

    for plan in plans:
        with patch.object(engine, "make_config", make_dividing_config):
            deepspeed_engine = engine.build_engine(plan, ranks.count_workers())
        reader, steps = build_ordered_reader(plan), []
        for step in range(len(IMAGE_COUNTS)):
            # A schedule without warmup begins with the peak.
            engine.set_learning_rate(deepspeed_engine, engine.LearningRateSchedule(len(IMAGE_COUNTS), 0.0), 1)
            batch = reader(step * ranks.count_workers() + deepspeed_engine.global_rank)
            update = worker.train_global_batch(deepspeed_engine, plan, [batch])
            loss = worker.all_reduce_stats({"loss": update.loss}, deepspeed_engine.device)["loss"]
            steps.append([len(batch["pixel_values"]), loss, update.grad_norm])
        results.append((steps, ranks.gather_state(deepspeed_engine)))
        engine.free_engine(deepspeed_engine)
    return results


def test_skewed_ranks_train_as_one_rank_with_the_whole_batch(
    skewed_set: str, new_plan: Callable[..., StagePlan], tmp_path: Path
) -> None:
    plans = [
        new_plan(
            {"sets": {"set": skewed_set}},
            zero_stage=zero_stage,
            packing=Packing(max_length=256) if packs else None,
            learning_rate=TRAINED[trained],
            shuffle="none",
            global_batch_size=ROWS * RANKS,
            micro_batch_size=ROWS,
        )
        for zero_stage, packs, trained in LAYOUTS
    ]
    skewed = ranks.run_on_ranks(tmp_path, RANKS, train_all, plans)
    whole = [
        replace(plan, stage=replace(plan.stage, micro_batch_size=ROWS * RANKS, packing=None))
        for plan in plans[: len(TRAINED)]
    ]
    references = dict(zip(TRAINED, ranks.run_on_ranks(tmp_path, 1, train_all, whole)[0], strict=True))
    for number, (zero_stage, packs, trained) in enumerate(LAYOUTS):
        case = (zero_stage, packs, trained)
        images = [[step[0] for step in rank[number][0]] for rank in skewed]
        assert list(zip(*images, strict=True)) == list(IMAGE_COUNTS), case
        steps, state = skewed[0][number]
        expected, expected_state = references[trained]
        assert [step[-2] for step in steps] == pytest.approx([step[-2] for step in expected], rel=TOLERANCE), case
        assert [step[-1] for step in steps] == pytest.approx([step[-1] for step in expected], rel=1e-5), case
        assert state.keys() == expected_state.keys()
        for name in (name for name in state if name.endswith("exp_avg")):
            difference = (state[name] - expected_state[name]).norm()
            assert difference <= 1e-5 * expected_state[name].norm() + 1e-8, (case, name)
