"""A shipped job uses the CPUs and GPUs of a machine; numbers that do not fit are refused before the first shard."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import ray

from jobs import model_parts, run, schema
from jobs.resources import find_shortage
from jobs.schema import Job
from pipelines.core import cluster
from pipelines.evaluation import evaluate

pytestmark = pytest.mark.integration

JOBS = Path(__file__).parents[2] / "jobs" / "recipes"
QUICKSTART = JOBS / "quickstart.yaml"


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch):
    """Replace the numbers of CPUs and GPUs that Ray reports."""

    def set_resources(cpus: int, gpus: int) -> None:
        monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": cpus, "GPU": gpus} if gpus else {"CPU": cpus})
        monkeypatch.setattr(cluster, "is_private", lambda: True)

    return set_resources


def count_workers(job: Job) -> dict[str, int]:
    plans = run.plan_stages(job, Path("/runs/x"))
    decided = {name: plan.with_workers(cluster.count_model_processes(plan.gpu_share)) for name, plan in plans.items()}
    return {name: plan.workers[0] for name, plan in decided.items() if plan.workers}


def list_all_phases(job: Job) -> list[str]:
    return ["shards", *job.train, "evaluate", "report"]


@pytest.mark.parametrize(
    ("cpus", "gpus", "workers", "actors"),
    [
        (2, 0, {"tower": 2, "pretrain": 2, "instruct": 2}, 2),
        (64, 0, {"tower": 2, "pretrain": 2, "instruct": 2}, 2),
        (16, 1, {"tower": 1, "pretrain": 1, "instruct": 1}, 1),
        (16, 2, {"tower": 2, "pretrain": 2, "instruct": 2}, 2),
        (16, 8, {"tower": 2, "pretrain": 2, "instruct": 2}, 8),
        (3, 8, {"tower": 2, "pretrain": 2, "instruct": 2}, 4),
    ],
)
def test_the_quickstart_uses_the_machine(machine, cpus: int, gpus: int, workers: dict[str, int], actors: int) -> None:
    """Its stages have two micro-batches each, so a third worker would have nothing to do."""
    machine(cpus, gpus)
    job = schema.load(QUICKSTART)
    run._check_resources(job, list_all_phases(job))
    assert count_workers(job) == workers
    assert job.evaluate
    assert evaluate.count_actors(job.evaluate, job.gpu_share, batches=100) == actors


@pytest.mark.parametrize(("gpu_share", "processes"), [(1, 2), (0.7, 2), (0.5, 4), (0.4, 4), (1 / 3, 6), (1 / 93, 126)])
def test_a_process_has_its_share_of_one_gpu(machine, gpu_share: float, processes: int) -> None:
    """0.4 of two GPUs is there four times: what is left of them is on two GPUs."""
    machine(64, 2)
    assert cluster.count_model_processes(gpu_share) == processes


@pytest.mark.parametrize(("gpus", "workers"), [(1, 1), (2, 2), (6, 4), (8, 8)])
@pytest.mark.parametrize("name", ["llava-1.5-7b", "llava-1.5-13b-redux"])
def test_a_recipe_uses_gpus_that_divide_its_batch(
    machine, monkeypatch: pytest.MonkeyPatch, name: str, gpus: int, workers: int
) -> None:
    machine(32, gpus)
    monkeypatch.setattr(model_parts, "measure_image", lambda model, folder: (336, 288))
    job = schema.load(JOBS / f"{name}.yaml")
    run._check_resources(job, list_all_phases(job))
    assert count_workers(job) == {"pretrain": workers, "instruct": workers}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["num_workers=2"], "quickstart: needs 2 GPUs, found 1; set num_workers=1, or auto"),
        (
            ["num_workers=2", "evaluate.num_actors=2"],
            "needs 2 GPUs, found 1; set num_workers=1 evaluate.num_actors=1, or auto",
        ),
        (["evaluate.num_actors=4"], "needs 4 GPUs, found 1; set evaluate.num_actors=1, or auto"),
        (["num_workers=[2, 8]"], "needs 2 GPUs, found 1; set num_workers=1, or auto"),
    ],
)
def test_the_error_names_numbers_that_fit(machine, overrides: list[str], message: str) -> None:
    machine(16, 1)
    job = schema.load(QUICKSTART, overrides)
    with pytest.raises(ValueError, match=message):
        run._check_resources(job, list_all_phases(job))
    run._check_resources(job, ["shards", "report"])  # finished phases need nothing


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["num_workers=4", "evaluate=null"], ""),  # half a CPU each, and one for readers
        (["num_workers=5", "evaluate=null"], "needs 3.5 CPUs, found 3; set num_workers=3, or auto"),
        (["num_workers=[3, 8]", "evaluate=null"], ""),  # whole CPUs, and none for readers
        (["num_workers=[4, 8]", "evaluate=null"], "needs 4 CPUs, found 3; set num_workers=3, or auto"),
        (["evaluate.num_actors=5"], "needs 3.5 CPUs, found 3; set evaluate.num_actors=3, or auto"),
    ],
)
def test_cpus_are_those_that_ray_is_asked_for(machine, overrides: list[str], message: str) -> None:
    machine(3, 0)
    batches = [f"train.{name}.global_batch_size=960" for name in ("tower", "pretrain", "instruct")]
    sizes = [f"train.{name}.micro_batch_size=2" for name in ("tower", "pretrain", "instruct")]
    job = schema.load(QUICKSTART, [*batches, *sizes, *overrides])
    if message:
        with pytest.raises(ValueError, match=message):
            run._check_resources(job, list_all_phases(job))
    else:
        run._check_resources(job, list_all_phases(job))


@pytest.mark.parametrize(
    ("cpus", "gpus", "trials", "shortage"),
    [
        (3, 0, 2, None),
        (2, 0, 2, ("CPU", 3, 2)),
        (16, 1, 1, ("GPU", 2, 1)),
        (16, 2, 1, None),
        (16, 2, 2, ("GPU", 4, 2)),
    ],
)
def test_trials_at_the_same_time_need_the_resources_of_each(
    machine, cpus: int, gpus: int, trials: int, shortage: tuple[str, float, float] | None
) -> None:
    machine(cpus, gpus)
    job = schema.load(QUICKSTART, ["num_workers=2"])
    assert find_shortage(job, workers=2, actors=1, runs=trials) == shortage


def test_shares_of_several_gpus_do_not_add_up(machine) -> None:
    machine(16, 2)
    job = schema.load(QUICKSTART, ["gpu_share=0.4"])
    assert find_shortage(job, workers=1, actors=1, runs=4) is None
    assert find_shortage(job, workers=1, actors=1, runs=5) == ("GPU", 2, 2)


def test_the_proposed_number_fits_every_stage(machine) -> None:
    """Stages that have four and six micro-batches have two workers in common, on three GPUs."""
    machine(16, 3)
    batches = [
        "train.tower.global_batch_size=128",
        "train.pretrain.global_batch_size=96",
        "train.instruct.global_batch_size=48",
    ]
    job = schema.load(QUICKSTART, [*batches, "num_workers=[4, 8]"])
    with pytest.raises(ValueError, match="needs 4 GPUs, found 3; set num_workers=2, or auto"):
        run._check_resources(job, list_all_phases(job))
    schema.load(QUICKSTART, [*batches, "num_workers=2"])


def test_a_share_of_a_gpu_allows_one_worker(machine) -> None:
    machine(16, 1)
    job = schema.load(QUICKSTART, ["gpu_share=0.25"])
    assert set(count_workers(job).values()) == {1}
    assert job.evaluate
    assert evaluate.count_actors(job.evaluate, job.gpu_share, batches=100) == 4


def test_a_real_ray_with_one_gpu_refuses_two_workers_before_any_shard(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    ended = subprocess.run(
        [sys.executable, "-m", "jobs.command", "run", str(QUICKSTART), "num_workers=2", "--runs-dir", str(tmp_path)],
        env={**environment, "RAY_OVERRIDE_RESOURCES": '{"GPU": 1}'}, capture_output=True, text=True,
    )  # fmt: skip
    assert ended.returncode == 2
    assert "redux: quickstart: needs 2 GPUs, found 1; set num_workers=1, or auto\n" in ended.stderr
    assert not (tmp_path / "quickstart" / "shards").exists()
