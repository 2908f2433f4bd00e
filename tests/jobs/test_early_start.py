"""Workers start before the first stage if steps before it are left, on a private Ray only."""

from pathlib import Path

import pytest

from jobs import run, schema
from pipelines.training import driver
from pipelines.training.plan import StagePlan

RECIPE = Path("jobs/recipes/quickstart.yaml")


class EarlyStarts(driver.WorkerGroup):
    """Group that records for which stages workers were started early."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def start_early(self, plan: StagePlan) -> None:
        self.names.append(plan.name)


@pytest.mark.parametrize(
    ("remaining", "names"),
    [
        (["shards", "tower", "pretrain"], ["tower"]),
        (["shards", "pretrain"], ["pretrain"]),
        (["tower", "pretrain"], []),
        (["shards", "evaluate"], []),
        (["report"], []),
    ],
)
def test_workers_start_while_earlier_steps_run(
    remaining: list[str], names: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = schema.load(RECIPE)
    group = EarlyStarts()
    monkeypatch.setenv("RAY_ADDRESS", "cluster:6379")
    run._start_workers_early(job, tmp_path, False, remaining, group)
    assert group.names == [], "others may use the resources of a cluster"
    monkeypatch.delenv("RAY_ADDRESS")
    run._start_workers_early(job, tmp_path, False, remaining, group)
    assert group.names == names
