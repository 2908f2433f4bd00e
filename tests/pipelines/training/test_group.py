"""One group of workers trains several stages like ranks that are started for each of them without Ray."""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from safetensors.torch import load_file

from pipelines.data.packing import Packing
from pipelines.training import checkpoint, driver, ledger
from pipelines.training.hooks import Hook
from pipelines.training.plan import StagePlan
from tests.pipelines import ranks
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


def make_plans(plan: StagePlan) -> list[StagePlan]:
    """Make the plans of four stages of one run, each from the model of the one before, with other batches.

    The second stage packs conversations.
    """
    packing = Packing(max_length=64)
    changes: Sequence[tuple[str, dict[str, Any]]] = (
        ("first", {"steps": 4}),
        (
            "second",
            {
                "steps": 6,
                "micro_batch_size": 4,
                "packing": packing,
                "learning_rate": {"projector": 1e-3},
                "zero_stage": 3,
            },
        ),
        ("third", {"steps": 4, "random_flip": True}),
        ("fourth", {"steps": 2}),
    )
    plans: list[StagePlan] = []
    for name, stage in changes:
        start = plans[-1].result if plans else None
        plans.append(replace(plan, name=name, start=start, stage=replace(plan.stage, **stage)))
    return plans


@dataclass(frozen=True)
class GroupRun:
    """Two groups of workers that train four stages, with a fault in the second stage.

    Args:
        plans: the stages.
        references: the same stages, trained without Ray.
        processes: folder with the processes of rank 0 of each stage.
        account: account of the run after the first stage.
    """

    plans: list[StagePlan]
    references: list[StagePlan]
    processes: Path
    account: ledger.Account

    def read_processes(self, stage: str) -> list[str]:
        return (self.processes / stage).read_text().split()


@pytest.fixture(scope="module")
def group_run(new_plan: Callable[..., StagePlan], tmp_path_factory: pytest.TempPathFactory) -> GroupRun:
    """Train the stages without Ray, and with two groups of workers. The first group ends before the last stage."""
    folder = tmp_path_factory.mktemp("ranks")
    references = [ranks.train_without_ray(plan, folder) for plan in make_plans(new_plan())]
    plans = make_plans(new_plan())
    # The first stage has no step 5.
    hooks = [WriteProcess(folder), InjectedFault("raise", 5, 1, folder)]
    with driver.WorkerGroup() as group:
        # These workers start before they know their stages.
        group.start_early(plans[0])
        assert group.started_for == plans[0]
        driver.train_stage(plans[0], hooks, group=group, later=plans[1:])
        account = ledger.read_ledger(plans[0].run).account
        for number in (1, 2):
            driver.train_stage(plans[number], hooks, group=group, later=plans[number + 1 :])
        assert group.expects(plans[3])
    assert group.client is None
    assert group.future.done()
    # The same command continues: it skips the stages that have a model.
    with driver.WorkerGroup() as group:
        for number, plan in enumerate(plans, start=1):
            driver.train_stage(plan, hooks, group=group, later=plans[number:])
    return GroupRun(plans, references, folder, account)


def read_record(plan: StagePlan) -> list[Any]:
    entries = [json.loads(line) for line in (plan.run / "metrics.jsonl").read_text().splitlines()]
    return [(entry["stage"], entry["step"], entry["loss"], entry["grad_norm"]) for entry in entries]


def test_the_record_equals_that_of_training_without_ray(group_run: GroupRun) -> None:
    plan, reference = group_run.plans[0], group_run.references[0]
    record = read_record(plan)
    assert record == read_record(reference)
    assert [entry[:2] for entry in record] == [
        (plan.name, step) for plan in group_run.plans for step in range(1, plan.stage.steps + 1)
    ]
    assert (plan.run / "consumed.jsonl").read_text() == (reference.run / "consumed.jsonl").read_text()


def test_every_model_equals_that_of_training_without_ray(group_run: GroupRun) -> None:
    for plan, reference in zip(group_run.plans, group_run.references, strict=True):
        weights, expected = (load_file(Path(stage.result) / "model.safetensors") for stage in (plan, reference))
        assert weights.keys() == expected.keys()
        assert all(weights[name].equal(expected[name]) for name in weights), plan.name


def test_a_stage_without_faults_loses_nothing_and_keeps_the_newest_checkpoints(group_run: GroupRun) -> None:
    account = group_run.account
    assert (account.restarts, account.lost_steps, account.lost, account.restart) == (0, 0, 0, 0)
    assert account.productive > 0
    cursors = [
        [
            saved.manifest.cursor
            for saved in checkpoint.list_newest_first(plan.folder)
            if isinstance(saved, checkpoint.SavedCheckpoint)
        ]
        for plan in group_run.plans
    ]
    assert cursors == [[4, 2], [6, 4], [4, 2], [2]]


def test_a_process_trains_stage_after_stage_until_a_fault_or_the_end_of_its_group(group_run: GroupRun) -> None:
    first, second, third, fourth = (group_run.read_processes(plan.name) for plan in group_run.plans)
    assert len(first) == len(third) == len(fourth) == 1
    assert second == [first[0], third[0]]
    assert len({first[0], third[0], fourth[0]}) == 3
