"""Checks and derived values of stages and plans, the learning rate schedule, and checks of the driver.

test_faults.py and tests/jobs run whole stages.
"""

import random
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import ray

from pipelines.core import cluster, storage
from pipelines.data.packing import Packing
from pipelines.training import driver, recorder
from pipelines.training.files import MANIFEST
from pipelines.training.plan import LearningRateSchedule, StagePlan
from pipelines.training.stage import Lora, Stage

STAGE = Stage(
    objective="language",
    data="conversations",
    epochs=1,
    global_batch_size=64,
    micro_batch_size=8,
    learning_rate={"language": 1e-3},
)


def stage(**changes: Any) -> Stage:
    return replace(STAGE, **changes)


def test_micro_batches_workers_and_accumulation_multiply_to_the_global_batch():
    for micro in (1, 2, 4, 8, 16, 32, 64):
        for workers in (1, 2, 4, 8):
            if micro * workers <= 64:
                assert stage(micro_batch_size=micro).count_accumulation_steps(workers) * micro * workers == 64


def test_the_largest_number_of_workers_that_divides_the_global_batch_is_used():
    for seed in range(200):
        rng = random.Random(seed)
        micro, turns, workers = rng.randint(1, 9), rng.randint(1, 40), rng.randint(1, 50)
        drawn = stage(global_batch_size=micro * turns, micro_batch_size=micro)
        assert drawn.count_usable_workers(workers) == max(
            count for count in range(1, workers + 1) if turns % count == 0
        )
        assert (
            drawn.count_accumulation_steps(drawn.count_usable_workers(workers)) * drawn.count_usable_workers(workers)
            == turns
        )


@pytest.mark.parametrize(("micro", "workers", "multiple"), [(8, 3, 24), (32, 4, 128)])
def test_a_global_batch_that_workers_cannot_share_is_refused_with_the_allowed_multiple(
    micro: int, workers: int, multiple: int
):
    allowed = (
        f"global_batch_size: got 64, allowed: a multiple of {multiple}, {workers} workers x micro_batch_size {micro}"
    )
    with pytest.raises(ValueError, match=allowed):
        stage(micro_batch_size=micro).count_accumulation_steps(workers)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a batch that micro-batches do not fill": (
        {"micro_batch_size": 7},
        r"^global_batch_size: got 64, allowed: a multiple of micro_batch_size, 7$",
    ),
    "epochs and steps": ({"steps": 9}, "^epochs: got 1, and steps 9, allowed: one of the two$"),
    "neither epochs nor steps": ({"epochs": None}, "^epochs: got None, and steps None, allowed: one of the two$"),
    "groups in windows": (
        {"group_by_length": 4, "shuffle": "window"},
        "^group_by_length: got 4 with shuffle window and 1 sets, allowed: null, or shuffle global and one set$",
    ),
    "groups of a mixture": (
        {"group_by_length": 4, "data": {"a": 1, "b": 2}},
        "^group_by_length: got 4 with shuffle global and 2 sets, allowed: null, or shuffle global and one set$",
    ),
    "packed pairs": (
        {"objective": "contrastive", "learning_rate": {"tower": 1}, "packing": Packing(max_length=9)},
        "^packing: got one with objective contrastive, allowed: null, or objective language$",
    ),
    "packed groups": (
        {"group_by_length": 4, "packing": Packing(max_length=9)},
        "^packing: got one with group_by_length 4, allowed: null, or group_by_length null$",
    ),
    "rows shorter than samples": (
        {"max_length": 10, "packing": Packing(max_length=9)},
        "^packing.max_length: got 9, allowed: at least max_length, 10$",
    ),
    "comparing one sample with none": (
        {"objective": "contrastive", "micro_batch_size": 1, "learning_rate": {"tower": 1}},
        "^micro_batch_size: got 1, allowed: at least 2",
    ),
    "adapters that do not learn": (
        {"lora": Lora(), "learning_rate": {"projector": 1}},
        "^lora: requires learning_rate.language, the learning rate of the adapters$",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_contradicting_settings_are_refused_with_the_allowed_values(case: str):
    changes, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        stage(**changes)


def test_one_set_is_a_mixture_of_one():
    assert stage(data="a").mixture == {"a": 1}
    assert stage(data={"a": 3, "b": 1}).mixture == {"a": 3, "b": 1}


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
def test_the_learning_rate_rises_to_its_peak_and_falls_to_zero(steps: int, warmup: float):
    rates = [LearningRateSchedule(steps, warmup)(step) for step in range(steps + 1)]
    rising = rates.index(1) + 1
    assert rising == pytest.approx(max(steps * warmup, 1), abs=0.5)
    assert all(before < after for before, after in pairwise(rates[:rising]))
    assert all(before > after for before, after in pairwise(rates[rising:]))
    assert max(rates) == 1
    assert min(rates[:-1]) > 0, "every step has a learning rate above zero"
    assert rates[-1] == 0


def test_the_warm_up_is_linear_and_the_decay_half_a_cosine():
    rate = LearningRateSchedule(steps=110, warmup=10 / 110)
    assert [rate(step) for step in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1])
    assert [rate(10 + step) for step in (0, 25, 50, 75, 100)] == pytest.approx(
        [1, 0.853553, 0.5, 0.146447, 0], abs=1e-6
    )


def test_the_learning_rate_is_zero_after_the_last_step():
    rate = LearningRateSchedule(steps=20, warmup=0.1)
    assert [rate(step) for step in (20, 21, 1000)] == pytest.approx([0, 0, 0], abs=1e-12)


# The plan


def test_steps_follow_from_epochs_or_are_given(new_plan: Callable[..., StagePlan]) -> None:
    """22 samples in batches of 8. The end of the last epoch does not fill a batch."""
    for epochs, steps in ((1, 3), (2, 6), (0.5, 2), (8 / 22, 1)):
        plan = new_plan(epochs=epochs, steps=None)
        assert abs(plan.count_steps(plan.build_reader().order) - epochs * 22 / 8) < 1, (epochs, steps)
    plan = new_plan(steps=5)
    assert plan.count_steps(plan.build_reader().order) == 5


def test_each_stage_has_a_folder_for_its_checkpoints_and_its_model(new_plan: Callable[..., StagePlan]) -> None:
    plan = new_plan({"checkpoints": "s3://bucket/job"})
    assert (plan.folder, plan.result) == ("s3://bucket/job/small", "s3://bucket/job/small/model")


def test_the_fingerprint_depends_on_the_contents_of_the_sets_and_not_on_their_folder(
    new_plan: Callable[..., StagePlan], tmp_path: Path
) -> None:
    plan = new_plan()
    folder = Path(plan.sets["set"])
    for name in storage.list_files(str(folder)):
        storage.write(str(tmp_path / name), storage.read(str(folder / name)))
    copied = replace(plan, sets={"set": str(tmp_path)}).build_reader()
    assert copied.fingerprint_sources() == plan.build_reader().fingerprint_sources()


# The driver


@pytest.mark.usefixtures("ray_cluster")
def test_a_finished_stage_is_skipped(
    new_plan: Callable[..., StagePlan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The job was interrupted after the model was saved. Then neither sets nor Ray are used."""
    plan = new_plan({"sets": {"set": str(tmp_path / "none")}})
    with pytest.raises(ValueError, match="no shards here"):
        driver.train_stage(plan)
    storage.write(storage.join(plan.result, "model.safetensors"), b"left by a crash")
    with pytest.raises(ValueError, match="no shards here"):
        driver.train_stage(plan)
    storage.write(storage.join(plan.result, MANIFEST), b"{}")
    for module, name in ((ray, "cluster_resources"), (recorder, "start_recorder")):
        monkeypatch.setattr(module, name, lambda *_: pytest.fail("asked Ray"))
    driver.train_stage(plan)


@pytest.mark.usefixtures("ray_cluster")
def test_a_stage_without_enough_resources_starts_nothing(
    new_plan: Callable[..., StagePlan], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder, "start_recorder", lambda *_: pytest.fail("started"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ValueError, match=r"^train.small with num_workers = 8 needs 5 CPUs, allowed: 2, which"):
        driver.train_stage(new_plan({"workers": (8, 8)}))


@pytest.mark.usefixtures("ray_cluster")
def test_resources_that_the_machine_lacks_are_refused_unless_the_cluster_may_grow(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    available = ray.cluster_resources()["CPU"]
    cluster.require_resources({"CPU": available}, "all CPUs")
    with pytest.raises(
        ValueError, match=rf"train.tower with num_workers = 99 needs {available + 1:g} CPUs, allowed: {available:g}"
    ):
        cluster.require_resources({"CPU": available + 1}, "train.tower with num_workers = 99")
    monkeypatch.setenv("RAY_ADDRESS", "a cluster that may grow")
    cluster.require_resources({"CPU": available + 1}, "train.tower with num_workers = 99")


def test_offloading_requires_a_zero_stage_that_divides_the_offloaded_states() -> None:
    for zero_stage, names in ((0, ["offload_optimizer"]), (2, ["offload_parameters"])):
        with pytest.raises(ValueError, match=rf"^{names[0]}: got true with zero_stage {zero_stage}, allowed: "):
            replace(STAGE, zero_stage=zero_stage, **dict.fromkeys(names, True))
    assert replace(STAGE, zero_stage=1, offload_optimizer=True).offload_optimizer
    assert replace(STAGE, zero_stage=3, offload_parameters=True).offload_parameters
