"""What a stage refuses and derives, how its learning rate goes, and when it has nothing to do.

The training itself runs as a whole in tests/jobs/test_run.py.
"""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import ray

from jobs import schema
from pipelines import cluster
from pipelines.train import Plan, Schedule, Stage, fit

QUICKSTART = Path(__file__).parents[2] / "jobs" / "quickstart.yaml"
STAGE = Stage(
    objective="language",
    data="conversations",
    epochs=1,
    global_batch=64,
    micro_batch=8,
    learning_rate={"language": 1e-3},
)


def stage(**changes: Any) -> Stage:
    return replace(STAGE, **changes)


def test_workers_and_accumulation_make_up_the_global_batch():
    for micro in (1, 2, 4, 8, 16, 32, 64):
        for workers in (1, 2, 4, 8):
            if micro * workers <= 64:
                assert stage(micro_batch=micro).accumulation(workers) * micro * workers == 64


@pytest.mark.parametrize(("micro", "workers", "multiple"), [(8, 3, 24), (32, 4, 128), (7, 1, 7)])
def test_a_global_batch_that_workers_cannot_share_is_refused_with_what_would_do(
    micro: int, workers: int, multiple: int
):
    allowed = f"global_batch: got 64, allowed: a multiple of {multiple}, {workers} workers x micro_batch {micro}"
    with pytest.raises(ValueError, match=allowed):
        stage(micro_batch=micro).accumulation(workers)


def test_a_stage_that_trains_nothing_is_refused():
    with pytest.raises(ValueError, match=r"learning_rate: got {}, allowed: .*tower, projector, language"):
        stage(learning_rate={})


@pytest.mark.parametrize("rates", [{"language": 1e-3}, {"tower": 1e-3, "projector": 1e-3}])
def test_the_contrastive_objective_trains_the_tower_and_nothing_else(rates: dict[str, float]):
    with pytest.raises(ValueError, match=r"learning_rate: got .*, allowed: tower alone"):
        stage(objective="contrastive", learning_rate=rates)
    stage(objective="contrastive", learning_rate={"tower": 1e-3})


@pytest.mark.parametrize("parts", [("tower",), ("projector",), ("language",), ("tower", "projector", "language")])
def test_the_language_objective_trains_any_parts(parts: tuple[str, ...]):
    assert set(stage(learning_rate=dict.fromkeys(parts, 1e-3)).learning_rate) == set(parts)


@pytest.mark.parametrize("steps", [2, 3, 10, 101, 1000])
@pytest.mark.parametrize("warmup", [0, 0.03, 0.1, 0.5])
def test_the_rate_rises_to_its_peak_and_falls_to_nothing(steps: int, warmup: float):
    rates = [Schedule(steps, warmup)(step) for step in range(steps + 1)]
    rising = rates.index(1) + 1
    assert rising == pytest.approx(max(steps * warmup, 1), abs=0.5)
    assert all(before < after for before, after in pairwise(rates[:rising]))
    assert all(before > after for before, after in pairwise(rates[rising:]))
    assert max(rates) == 1
    assert min(rates[:-1]) > 0, "no step without learning"
    assert rates[-1] == 0


def test_the_warm_up_is_a_line_and_the_fall_half_a_cosine():
    rate = Schedule(steps=110, warmup=10 / 110)
    assert [rate(step) for step in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1])
    assert [rate(10 + step) for step in (0, 25, 50, 75, 100)] == pytest.approx(
        [1, 0.853553, 0.5, 0.146447, 0], abs=1e-6
    )


def test_the_rate_stays_down_after_the_last_step():
    rate = Schedule(steps=20, warmup=0.1)
    assert [rate(step) for step in (20, 21, 1000)] == pytest.approx([0, 0, 0], abs=1e-12)


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
        sets={"captions": str(tmp_path / "none")},
        tolerance=0,
        tokenizer=tmp_path / "none",
        start=None,
    )
    with pytest.raises(ValueError, match="no shards here"):
        fit(plan)
    plan.result.mkdir(parents=True)
    monkeypatch.setattr(ray, "cluster_resources", lambda: pytest.fail("asked Ray"))
    fit(plan)


@pytest.mark.usefixtures("ray_cluster")
def test_what_this_machine_has_no_room_for_is_refused_instead_of_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    have = ray.cluster_resources()["CPU"]
    cluster.require(have, "all of it")
    with pytest.raises(ValueError, match=rf"train.tower with workers = 99 needs {have + 1:g} CPUs, allowed: {have:g}"):
        cluster.require(have + 1, "train.tower with workers = 99")
    monkeypatch.setenv("RAY_ADDRESS", "a cluster that may grow")
    cluster.require(have + 1, "train.tower with workers = 99")
