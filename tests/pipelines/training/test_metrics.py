"""The record of a run has every step once, whatever the crash."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from pipelines.data import consumed
from pipelines.data.consumed import ConsumedSamples
from pipelines.training import metrics
from pipelines.training.files import METRICS_FILE
from pipelines.training.metrics import MetricsWriter


def write(run: Path, stage: str, cursor: int, stop: int, shift: float = 0) -> None:
    """Write steps cursor+1..stop of a stage. Every fourth update was skipped."""
    record = MetricsWriter(run, stage, cursor)
    for step in range(cursor + 1, stop + 1):
        record.write(step, make_values(step, shift), make_samples(step))
    record.close()


def make_values(step: int, shift: float = 0) -> dict[str, float | None]:
    return {"loss": 1 / 2**step + shift, "replaced": step % 2, "skipped": int(step % 4 == 0)}


def make_samples(step: int) -> ConsumedSamples:
    """Return two samples; in every other step, one of them replaces another."""
    entry = {"set": "a", "index": 1, "scheduled": step, "used": 2 * step, "reason": "broken image"}
    return ConsumedSamples({"a": [3 * step, 2 * step]}, [entry] * (step % 2))


def read_entries(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / METRICS_FILE).read_text().splitlines()]


def list_steps(run: Path) -> list[tuple[str, int]]:
    return [(entry["stage"], entry["step"]) for entry in read_entries(run)]


def append(run: Path, text: str) -> None:
    with (run / METRICS_FILE).open("a") as file:
        file.write(text)


def test_a_line_has_the_stage_the_step_and_the_written_values(tmp_path: Path):
    write(tmp_path, "tower", 0, 2)
    assert read_entries(tmp_path) == [
        {"stage": "tower", "step": 1, "loss": 0.5, "replaced": 1, "skipped": 0},
        {"stage": "tower", "step": 2, "loss": 0.25, "replaced": 0, "skipped": 0},
    ]


def test_a_line_can_be_read_as_soon_as_it_is_written(tmp_path: Path):
    record = MetricsWriter(tmp_path, "tower", 0)
    for step in range(1, 4):
        record.write(step, make_values(step), make_samples(step))
        assert read_entries(tmp_path)[-1] == {"stage": "tower", "step": step, **make_values(step)}
    record.close()


@pytest.mark.parametrize("cursor", [0, 3, 7, 10])
def test_a_resumed_record_has_each_step_once_and_the_later_values(tmp_path: Path, cursor: int):
    write(tmp_path, "tower", 0, 10)
    write(tmp_path, "tower", cursor, 12, shift=4)
    assert list_steps(tmp_path) == [("tower", step) for step in range(1, 13)]
    assert [entry["loss"] > 4 for entry in read_entries(tmp_path)] == [step > cursor for step in range(1, 13)]


def test_the_lines_of_other_stages_stay(tmp_path: Path):
    write(tmp_path, "tower", 0, 5)
    write(tmp_path, "instruct", 0, 4)
    before = read_entries(tmp_path)[:5]
    write(tmp_path, "instruct", 2, 3)
    assert read_entries(tmp_path)[:5] == before
    assert list_steps(tmp_path)[5:] == [("instruct", 1), ("instruct", 2), ("instruct", 3)]


def test_a_line_truncated_at_any_byte_is_removed(tmp_path: Path):
    write(tmp_path, "tower", 0, 4)
    whole = (tmp_path / METRICS_FILE).read_bytes()
    start = whole[:-1].rindex(b"\n") + 1
    for stop in range(start, len(whole)):
        (tmp_path / METRICS_FILE).write_bytes(whole[:stop])
        write(tmp_path, "tower", 3, 4)
        assert (tmp_path / METRICS_FILE).read_bytes() == whole, stop


@pytest.mark.parametrize("cursor", [0, 3, 7, 10])
def test_samples_are_recorded_once_per_step_and_counts_continue(tmp_path: Path, cursor: int):
    write(tmp_path, "tower", 0, 10)
    with (tmp_path / consumed.CONSUMED_FILE).open("a") as file:
        file.write('{"stage": "tower", "step": 11, "sam')
    record = MetricsWriter(tmp_path, "tower", cursor)
    assert (record.replaced, record.skipped) == ((cursor + 1) // 2, cursor // 4)
    for step in range(cursor + 1, 13):
        record.write(step, make_values(step), make_samples(step))
    record.close()
    assert (record.replaced, record.skipped) == (6, 3)
    lines = [json.loads(line) for line in (tmp_path / consumed.CONSUMED_FILE).read_text().splitlines()]
    assert lines == [{"stage": "tower", "step": step, **asdict(make_samples(step))} for step in range(1, 13)]


def test_a_truncated_line_of_another_stage_is_removed(tmp_path: Path):
    write(tmp_path, "tower", 0, 2)
    append(tmp_path, '{"stage": "tower", "st')
    write(tmp_path, "instruct", 0, 1)
    assert list_steps(tmp_path) == [("tower", 1), ("tower", 2), ("instruct", 1)]


def test_values_that_are_not_finite_are_refused(tmp_path: Path):
    record = MetricsWriter(tmp_path, "tower", 0)
    with pytest.raises(ValueError, match="not JSON compliant"):
        record.write(1, make_values(1) | {"loss": float("nan")}, make_samples(1))
    record.close()
    write(tmp_path, "tower", 0, 2)
    assert list_steps(tmp_path) == [("tower", 1), ("tower", 2)]


def test_counts_belong_to_the_stage(tmp_path: Path):
    write(tmp_path, "tower", 0, 8)
    record = MetricsWriter(tmp_path, "instruct", 0)
    assert (record.replaced, record.skipped) == (0, 0)
    record.close()


def test_the_last_recorded_step_belongs_to_the_stage(tmp_path: Path):
    write(tmp_path, "tower", 0, 5)
    write(tmp_path, "instruct", 0, 2)
    assert [metrics.read_last_step(tmp_path, stage) for stage in ("tower", "instruct", "another")] == [5, 2, 0]


def test_the_first_step_does_not_count_as_speed(tmp_path: Path) -> None:
    """Unless it is the only one."""
    steps = [
        {"stage": "instruct", "step": 1, "tokens": 60, "compute_s": 28.0, "data_s": 1.0, "stall_s": 1.0},
        {"stage": "instruct", "step": 2, "tokens": 60, "compute_s": 1.0, "data_s": 1.0, "stall_s": 1.0},
    ]
    (tmp_path / METRICS_FILE).write_text("".join(json.dumps(step) + "\n" for step in steps))
    assert metrics.compute_tokens_per_s(tmp_path, "instruct") == 20
    (tmp_path / METRICS_FILE).write_text(json.dumps(steps[0]) + "\n")
    assert metrics.compute_tokens_per_s(tmp_path, "instruct") == 2
