"""Tests of held-out samples: the selection is fixed, and the order, replacements and the log never use them."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipelines.data import ingest, shard_writer
from pipelines.data.consumed import verify_coverage
from pipelines.data.held_out import select_held_out
from pipelines.data.options import ShardOptions
from pipelines.data.order import Order
from pipelines.training.plan import StagePlan
from pipelines.training.stage import Stage

NewPlan = Callable[..., StagePlan]

KINDS: dict[str, dict] = {
    "global": {},
    "window": {"shuffle": "window", "window": 2},
    "none": {"shuffle": "none"},
    "groups": {"group_by_length": 2},
}


def test_the_selection_has_the_share_and_depends_on_nothing_else() -> None:
    for samples, share in ((100, 0.01), (22, 0.2), (2, 0.5), (665_298, 0.01)):
        rows = select_held_out(samples, share, "a")
        assert len(rows) == round(share * samples)
        assert (np.diff(rows) > 0).all()
        assert rows.min() >= 0
        assert rows.max() < samples
        assert np.array_equal(rows, select_held_out(samples, share, "b"))
    # Spread over the set, as a random sample is.
    tenths = np.histogram(select_held_out(665_298, 0.01, "a"), 10, (0, 665_298))[0]
    assert tenths.min() > 0.8 * tenths.mean()
    # Later versions must hold out the same samples, because earlier models were not trained on them.
    assert select_held_out(1000, 0.005, "a").tolist() == [39, 180, 318, 448, 821]


@pytest.mark.parametrize(("samples", "share"), [(49, 0.01), (1, 0.5), (2, 0.9), (0, 0.5)])
def test_a_share_that_leaves_no_sample_on_one_side_is_refused(samples: int, share: float) -> None:
    with pytest.raises(ValueError, match=rf"data\.hold_out: got {share}, which is \d of the {samples} samples of mine"):
        select_held_out(samples, share, "mine")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("global_batch_size", [2, 8])
def test_training_uses_each_other_sample_once_an_epoch(new_plan: NewPlan, kind: str, global_batch_size: int) -> None:
    order = new_plan({"hold_out": 0.2}, global_batch_size=global_batch_size, **KINDS[kind]).build_reader().order
    held = select_held_out(22, 0.2, "set").tolist()
    flat = np.concatenate([order.get_batch(number)[1] for number in range(order.count_batches(3))])
    rest = sorted(set(range(22)) - set(held))
    assert order.samples == (18,)
    for epoch in range(3):
        assert sorted(flat[epoch * 18 : (epoch + 1) * 18]) == rest, epoch
    # The log of such a run passes the check that does not know the order.
    batches = flat[: len(flat) // global_batch_size * global_batch_size].reshape(-1, global_batch_size).tolist()
    log = [
        json.dumps({"stage": "small", "step": step, "samples": {"set": batch}, "replaced": []}).encode() + b"\n"
        for step, batch in enumerate(batches, 1)
    ]
    [coverage], errors = verify_coverage(log, "log", "set", 22, held)
    assert errors == []
    assert (coverage.epochs, coverage.partial_samples) == divmod(len(batches) * global_batch_size, 18)
    # Without the knowledge of held-out samples it fails, and it finds one that was used.
    assert verify_coverage(log, "log", "set", 22)[1]
    assert f"used held-out samples {batches[0][0]}" in verify_coverage(log, "log", "set", 22, [batches[0][0]])[1][0]


def test_without_held_out_samples_the_order_is_as_before(new_plan: NewPlan) -> None:
    order = new_plan().build_reader().order
    plain = Order(samples=(22,), global_batch_size=8, seed=0)
    for number in range(9):
        assert np.array_equal(order.get_batch(number)[1], plain.get_batch(number)[1])


def test_the_held_out_samples_are_read_once_in_their_order(new_plan: NewPlan) -> None:
    plan = new_plan({"hold_out": 0.25}, random_flip=True, max_rounds=1, data={"set": 0.7})
    reader = plan.build_reader()
    [validation] = plan.build_validation_readers(reader)
    held = select_held_out(22, 0.25, "set").tolist()
    assert len(held) % plan.stage.micro_batch_size == 0
    batches = [validation(number) for number in range(validation.order.count_batches(1))]
    assert [sample for batch in batches for sample in batch["sample"]] == held
    # Whole conversations and no mirrored images, whatever the stage draws.
    plain = replace(reader, random_flip=False, max_rounds=None)
    by_sample = {}
    for number in range(4 * 9):
        batch = plain(number)
        by_sample |= dict(zip(batch["sample"].tolist(), batch["attention_mask"].sum(1).tolist(), strict=True))
    assert not by_sample.keys() & set(held)


def test_replacements_of_broken_samples_are_not_held_out(
    local_ray_data: None, pictures: Path, records: list[dict], tokenizer: Path, tmp_path: Path, new_plan: NewPlan
) -> None:
    """Half of the samples do not fit the model, so that many are replaced."""
    long = [record if number % 2 else _lengthen(record) for number, record in enumerate(records)]
    shard_writer.make_shards(long, str(pictures), str(tmp_path), ShardOptions(samples_per_shard=5))
    plan = new_plan({"hold_out": 0.3, "sets": {"set": str(tmp_path)}})
    reader = plan.build_reader()
    held = set(select_held_out(22, 0.3, "set").tolist())
    used, replaced = set[int](), 0
    for number in range(100):
        batch = reader(number)
        used |= set(batch["sample"].tolist())
        replaced += len(json.loads(batch["replaced"]))
    assert replaced > 20
    assert not used & held
    [validation] = plan.build_validation_readers(reader)
    assert isinstance(validation, ingest.Reader)
    for number in range(validation.order.count_batches(1)):
        assert set(validation(number)["sample"].tolist()) <= held


def _lengthen(record: dict) -> dict:
    first, *others = record["conversations"]
    return {**record, "conversations": [{**first, "value": first["value"] + " shape" * 200}, *others]}


def test_validate_steps_is_a_whole_number() -> None:
    fields = {"objective": "language", "data": "a", "steps": 1, "global_batch_size": 1, "micro_batch_size": 1}
    assert Stage(**fields, learning_rate={"projector": 1.0}).validate_steps is None
