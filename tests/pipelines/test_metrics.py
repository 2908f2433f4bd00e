"""The record of a run has every step once, whatever the crash, and TensorBoard reads the same numbers."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pipelines import consumed
from pipelines.consumed import Used
from pipelines.metrics import FILE, Metrics, last


def write(run: Path, stage: str, cursor: int, stop: int, shift: float = 0) -> None:
    """Steps cursor+1..stop of a stage; their values are floats of 32 bits."""
    record = Metrics(run, stage, cursor)
    for step in range(cursor + 1, stop + 1):
        record.write(step, {"loss": 1 / 2**step + shift, "replaced": step % 2}, used(step))
    record.close()


def used(step: int) -> Used:
    """Two samples, every other step one of them in place of another."""
    entry = {"set": "a", "at": 1, "due": step, "used": 2 * step, "reason": "broken image"}
    return Used({"a": [3 * step, 2 * step]}, [entry] * (step % 2))


def entries(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / FILE).read_text().splitlines()]


def steps(run: Path) -> list[tuple[str, int]]:
    return [(entry["stage"], entry["step"]) for entry in entries(run)]


def append(run: Path, text: str) -> None:
    with (run / FILE).open("a") as file:
        file.write(text)


def test_a_line_holds_the_stage_the_step_and_what_was_written(tmp_path: Path):
    write(tmp_path, "tower", 0, 2)
    assert entries(tmp_path) == [
        {"stage": "tower", "step": 1, "loss": 0.5, "replaced": 1},
        {"stage": "tower", "step": 2, "loss": 0.25, "replaced": 0},
    ]


def test_a_line_can_be_read_as_soon_as_it_is_written(tmp_path: Path):
    record = Metrics(tmp_path, "tower", 0)
    for step in range(1, 4):
        record.write(step, {"loss": step}, used(step))
        assert last(tmp_path) == {"stage": "tower", "step": step, "loss": step}
    record.close()


@pytest.mark.parametrize("cursor", [0, 3, 7, 10])
def test_a_resumed_record_has_each_step_once_and_the_later_values(tmp_path: Path, cursor: int):
    write(tmp_path, "tower", 0, 10)
    write(tmp_path, "tower", cursor, 12, shift=4)
    assert steps(tmp_path) == [("tower", step) for step in range(1, 13)]
    assert [entry["loss"] > 4 for entry in entries(tmp_path)] == [step > cursor for step in range(1, 13)]


def test_the_lines_of_other_stages_stay(tmp_path: Path):
    write(tmp_path, "tower", 0, 5)
    write(tmp_path, "instruct", 0, 4)
    before = entries(tmp_path)[:5]
    write(tmp_path, "instruct", 2, 3)
    assert entries(tmp_path)[:5] == before
    assert steps(tmp_path)[5:] == [("instruct", 1), ("instruct", 2), ("instruct", 3)]


def test_a_line_torn_at_any_place_is_cut(tmp_path: Path):
    write(tmp_path, "tower", 0, 4)
    whole = (tmp_path / FILE).read_bytes()
    start = whole[:-1].rindex(b"\n") + 1
    for stop in range(start, len(whole)):
        (tmp_path / FILE).write_bytes(whole[:stop])
        assert last(tmp_path) == json.loads(whole[:start].splitlines()[-1])
        write(tmp_path, "tower", 3, 4)
        assert (tmp_path / FILE).read_bytes() == whole, stop


@pytest.mark.parametrize("cursor", [0, 3, 7, 10])
def test_samples_stand_once_a_step_too_and_replaced_ones_are_counted_on(tmp_path: Path, cursor: int):
    write(tmp_path, "tower", 0, 10)
    with (tmp_path / consumed.FILE).open("a") as file:
        file.write('{"stage": "tower", "step": 11, "sam')
    record = Metrics(tmp_path, "tower", cursor)
    assert record.replaced == (cursor + 1) // 2
    for step in range(cursor + 1, 13):
        record.write(step, {"loss": 0, "replaced": step % 2}, used(step))
    record.close()
    assert record.replaced == 6
    lines = [json.loads(line) for line in (tmp_path / consumed.FILE).read_text().splitlines()]
    assert lines == [{"stage": "tower", "step": step, **asdict(used(step))} for step in range(1, 13)]


def test_a_line_torn_in_another_stage_is_cut_too(tmp_path: Path):
    write(tmp_path, "tower", 0, 2)
    append(tmp_path, '{"stage": "tower", "st')
    write(tmp_path, "instruct", 0, 1)
    assert steps(tmp_path) == [("tower", 1), ("tower", 2), ("instruct", 1)]


def test_before_the_first_line_there_is_no_last(tmp_path: Path):
    assert last(tmp_path) is None
    append(tmp_path, "")
    assert last(tmp_path) is None
    append(tmp_path, '{"stage": "tow')
    assert last(tmp_path) is None


def test_the_last_line_is_found_at_the_end_of_a_long_record(tmp_path: Path):
    write(tmp_path, "tower", 0, 500)
    assert (tmp_path / FILE).stat().st_size > 3 * 4096
    assert steps(tmp_path)[-1] == ("tower", 500)
    assert last(tmp_path) == entries(tmp_path)[-1]


def scalars(run: Path, stage: str) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(run / "tensorboard" / stage), size_guidance={"scalars": 0}).Reload()
    return {name: [(event.step, event.value) for event in events.Scalars(name)] for name in events.Tags()["scalars"]}


def test_tensorboard_reads_the_numbers_of_the_record(tmp_path: Path):
    for stage, stop in (("tower", 20), ("instruct", 7)):
        write(tmp_path, stage, 0, stop)
    for stage in ("tower", "instruct"):
        lines = [entry for entry in entries(tmp_path) if entry["stage"] == stage]
        assert scalars(tmp_path, stage) == {
            name: [(entry["step"], entry[name]) for entry in lines] for name in ("loss", "replaced")
        }


def test_tensorboard_reads_a_resumed_record_with_each_step_once(tmp_path: Path):
    write(tmp_path, "tower", 0, 10)
    write(tmp_path, "tower", 6, 12, shift=4)
    assert scalars(tmp_path, "tower")["loss"] == [(entry["step"], entry["loss"]) for entry in entries(tmp_path)]
