"""One group of workers trains several stages as one group for each would; on a real Ray."""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from safetensors.torch import load_file

from pipelines.training import driver, export
from pipelines.training.hooks import Hook
from pipelines.training.plan import StagePlan
from tests.pipelines.faults import InjectedFault

pytestmark = pytest.mark.usefixtures("ray_cluster")


@dataclass(frozen=True)
class WriteProcess:
    """Factory of a hook that does nothing; making it writes the process of rank 0 that trains a stage."""

    folder: Path

    def __call__(self, engine: Any, plan: StagePlan) -> Hook:
        if dist.get_rank() == 0:
            with (self.folder / plan.name).open("a") as file:
                file.write(f"{os.getpid()}\n")
        return Hook()


@pytest.fixture
def new_stages(new_plan: Callable[..., StagePlan]) -> Callable[[], list[StagePlan]]:
    """Make the plans of three stages of one run, each from the model of the one before, with other batches."""

    def make() -> list[StagePlan]:
        plan = new_plan({"workers": (2, 2)})
        changes: Sequence[tuple[str, dict[str, Any]]] = (
            ("first", {"steps": 4}),
            ("second", {"steps": 6, "micro_batch_size": 4, "learning_rate": {"projector": 1e-3}, "zero_stage": 3}),
            ("third", {"steps": 4, "random_flip": True}),
        )
        plans: list[StagePlan] = []
        for name, stage in changes:
            start = plans[-1].result if plans else None
            plans.append(replace(plan, name=name, start=start, stage=replace(plan.stage, **stage)))
        return plans

    return make


def train(plans: list[StagePlan], hooks: Sequence[Any], early: bool = False) -> None:
    with driver.WorkerGroup() as group:
        if early:
            group.start_early(plans[0])
            assert group.started_for == plans[0]
        for number, plan in enumerate(plans, start=1):
            driver.train_stage(plan, hooks, group=group, later=plans[number:])


def read_record(plan: StagePlan) -> list[Any]:
    entries = [json.loads(line) for line in (plan.run / "metrics.jsonl").read_text().splitlines()]
    return [(entry["stage"], entry["step"], entry["loss"], entry["grad_norm"]) for entry in entries]


def test_stages_of_one_group_are_those_of_three_also_after_a_fault(
    new_stages: Callable[[], list[StagePlan]], tmp_path: Path
) -> None:
    apart, together = new_stages(), new_stages()
    for plan in apart:
        driver.train_stage(plan)
    # The fault is in the second stage: the first one has no step 5.
    # These workers start before they know their stages.
    train(together, [WriteProcess(tmp_path), InjectedFault("raise", 5, 1, tmp_path)], early=True)
    assert read_record(together[0]) == read_record(apart[0])
    assert (together[0].run / "consumed.jsonl").read_text() == (apart[0].run / "consumed.jsonl").read_text()
    for one, other in zip(together, apart, strict=True):
        found, expected = (load_file(Path(plan.result) / "model.safetensors") for plan in (one, other))
        assert found.keys() == expected.keys()
        assert all(found[name].equal(expected[name]) for name in found)
    # The same process goes on with the next stage, and new ones after the fault.
    first, second, third = ((tmp_path / plan.name).read_text().split() for plan in together)
    assert len(first) == len(third) == 1
    assert second == [first[0], third[0]]
    assert first != third


def test_a_group_ends_between_two_stages_and_another_one_goes_on(
    new_stages: Callable[[], list[StagePlan]], tmp_path: Path
) -> None:
    plans = new_stages()
    with driver.WorkerGroup() as group:
        driver.train_stage(plans[0], [WriteProcess(tmp_path)], group=group, later=plans[1:])
        assert group.expects(plans[1])
    assert group.client is None
    assert group.future.done()
    train(plans, [WriteProcess(tmp_path)])
    assert all(export.is_complete(plan.result) for plan in plans)
    assert (tmp_path / "first").read_text() != (tmp_path / "second").read_text() == (tmp_path / "third").read_text()
