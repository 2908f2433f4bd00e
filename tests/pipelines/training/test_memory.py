"""Tests of memory estimates: they equal the measured peaks of DeepSpeed's steps on two ranks within a tenth."""

from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines.training import memory
from pipelines.training.memory import ModelShape
from pipelines.training.plan import StagePlan
from pipelines.training.stage import Stage
from pipelines.training.step_trace import SampleShape
from redux.conversation import IGNORE_INDEX, IMAGE_TOKEN
from tests.pipelines import ranks
from tests.pipelines.training.measured import STEPS, measure_all
from tests.pipelines.training.memory_cases import CASES, make_plan

TOLERANCE = 0.1

FAST_CASES = ("zero 2, bf16", "stage 2 of LLaVA, zero 3")
"""Cases that are measured in every run of the tests; all are measured with -m slow."""


def list_shapes(plan: StagePlan) -> list[list[SampleShape]]:
    """List the sizes of the samples in each micro-batch of rank 0 in the measured step."""
    assert plan.workers
    workers, reader = plan.workers[0], plan.build_reader()
    image_id = reader.get_tokenizer().convert_tokens_to_ids(IMAGE_TOKEN)
    accumulation = plan.stage.count_accumulation_steps(workers)
    result = []
    for turn in range((STEPS - 1) * accumulation, STEPS * accumulation):
        batch = reader(turn * workers)
        is_caption = "labels" not in batch
        labels = batch["input_ids"] if is_caption else batch["labels"]
        result.append(
            [
                SampleShape(int(mask.sum()), int((row[1:] != IGNORE_INDEX).sum()), is_caption or image_id in ids)
                for ids, row, mask in zip(batch["input_ids"], labels, batch["attention_mask"], strict=True)
            ]
        )
    return result


def estimate_total(plan: StagePlan) -> int:
    assert plan.workers
    shape = memory.build_shape(plan, None)
    return max(memory.estimate_memory(shape, samples, plan.workers[0], "cpu").total for samples in list_shapes(plan))


def compare(plans: dict[str, StagePlan], folder: Path) -> dict[str, tuple[int, int]]:
    """Return estimate and measurement of each plan."""
    result = {}
    for workers in (2, 1):
        names = [name for name, plan in plans.items() if plan.workers == (workers, workers)]
        if names:
            measured = ranks.run_on_ranks(folder, workers, measure_all, [plans[name] for name in names])[0]
            for name, found in zip(names, measured, strict=True):
                result[name] = estimate_total(plans[name]), found.peak
    return result


@pytest.mark.integration
@pytest.mark.parametrize("names", [FAST_CASES, pytest.param(tuple(CASES), marks=pytest.mark.slow)])
def test_estimates_are_near_the_measured_peaks(
    names: tuple[str, ...], new_plan: Callable[..., StagePlan], tmp_path: Path
) -> None:
    found = compare({name: make_plan(new_plan, name) for name in names}, tmp_path)
    errors = {name: estimate / measured - 1 for name, (estimate, measured) in found.items()}
    print({name: f"{error:+.1%}" for name, error in errors.items()})
    wrong = {name: error for name, error in errors.items() if abs(error) > TOLERANCE}
    assert wrong == {}


@pytest.fixture(scope="module")
def shape(new_plan: Callable[..., StagePlan]) -> ModelShape:
    return memory.build_shape(make_plan(new_plan, "zero 2, bf16"), None)


def test_the_largest_micro_batch_fits_and_the_next_does_not(shape: ModelShape) -> None:
    samples = [SampleShape(120, 30, True), SampleShape(60, 10, False)]
    estimate, find_largest = memory.plan_memory(shape, samples, 2, "cpu")
    stage: Stage = shape.plan.stage
    assert memory.list_micro_batches(shape.plan, 2) == [1, 2, 4, 8]
    assert stage.micro_batch_size == 8
    capacity = round(estimate.total / (1 - memory.SPARE_SHARE)) + 1
    assert find_largest(capacity) == 8
    assert find_largest(capacity - 1000) == 4
    assert find_largest(1000) is None


def test_sizes_of_micro_batches_are_interpolated_exactly(shape: ModelShape) -> None:
    samples = [SampleShape(120, 30, True)]
    steps = [memory.trace(shape, samples * count, "cuda", True) for count in (2, 4, 8)]
    interpolated = memory._interpolate((steps[0], steps[2]), (2, 8), 4)
    for expected, found in zip(steps[1], interpolated, strict=True):
        assert found == pytest.approx(expected, rel=0.01)
