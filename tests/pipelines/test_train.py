"""What a stage does besides the training itself, which tests/jobs/test_run.py runs as a whole."""

from pathlib import Path

import pytest
import ray

from jobs import schema
from pipelines import cluster
from pipelines.train import Plan, Schedule, fit

QUICKSTART = Path(__file__).parents[2] / "jobs" / "quickstart.yaml"


def test_a_stage_that_has_its_model_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted between the saving of the model and the job's own record of it: no Ray is asked for anything."""
    job = schema.load(QUICKSTART)
    plan = Plan(
        name="pretrain",
        stage=job.train["pretrain"],
        model=job.model,
        seed=0,
        workers=1,
        run=tmp_path,
        shards=tmp_path / "none",
        tokenizer=tmp_path / "none",
        start=None,
    )
    with pytest.raises(ValueError, match="no shards here"):
        fit(plan)
    plan.result.mkdir(parents=True)
    monkeypatch.setattr(ray, "cluster_resources", lambda: pytest.fail("asked Ray"))
    fit(plan)


@pytest.mark.parametrize(("steps", "warmup"), [(100, 0.1), (1, 0.0), (1, 1.0), (7, 0.5)])
def test_the_rate_rises_to_its_peak_and_falls_to_nothing(steps: int, warmup: float) -> None:
    schedule = Schedule(steps, warmup)
    rates = [schedule(step) for step in range(steps)]
    peak = rates.index(max(rates))
    assert max(rates) == 1.0
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert min(rates) > 0
    assert schedule(steps) in (0.0, 1.0) if peak == steps - 1 else schedule(steps) == 0.0


@pytest.mark.usefixtures("ray_cluster")
def test_what_this_machine_has_no_room_for_is_refused_instead_of_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    have = ray.cluster_resources()["CPU"]
    cluster.require(have, "all of it")
    with pytest.raises(ValueError, match=rf"train.tower with workers = 99 needs {have + 1:g} CPUs, allowed: {have:g}"):
        cluster.require(have + 1, "train.tower with workers = 99")
    monkeypatch.setenv("RAY_ADDRESS", "a cluster that may grow")
    cluster.require(have + 1, "train.tower with workers = 99")
