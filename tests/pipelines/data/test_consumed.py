"""Tests of the log of consumed samples: the check accepts one use per epoch, and finds every deviation."""

import json
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from pipelines.data.consumed import Coverage, verify_coverage
from pipelines.data.order import Order


def run(
    samples: int = 10, batch: int = 4, steps: int = 9, stage: str = "instruct", seed: int = 0
) -> list[dict[str, Any]]:
    """Make the log of a run that draws two samples of set "a" for each sample of set "b"."""
    order = Order(samples=(samples, 7), global_batch_size=batch + batch // 2, weights=(2, 1), seed=seed)
    log = []
    for step in range(1, steps + 1):
        sources, numbers = order.get_batch(step - 1)
        used = {name: numbers[sources == source].tolist() for source, name in enumerate("ab")}
        log.append({"stage": stage, "step": step, "samples": used, "replaced": []})
    return log


def lines(log: list[dict[str, Any]]) -> list[bytes]:
    return [json.dumps(step).encode() + b"\n" for step in log]


def find_errors(log: list[dict[str, Any]], samples: int = 10) -> list[str]:
    return verify_coverage(lines(log), "consumed.jsonl", "a", samples)[1]


def replace(log: list[dict[str, Any]], step: int, place: int, by: int) -> None:
    """Replace a sample, as a run does with unusable ones."""
    numbers = log[step]["samples"]["a"]
    entry = {"set": "a", "index": place, "scheduled": numbers[place], "used": by, "reason": "broken image"}
    log[step]["replaced"].append(entry)
    numbers[place] = by


@pytest.mark.parametrize(("samples", "batch"), [(10, 4), (12, 4), (3, 8), (1, 2), (1000, 2)])
def test_a_run_that_used_every_sample_once_an_epoch_is_shown_to(samples: int, batch: int):
    log = run(samples, batch) + run(samples, batch, steps=2, stage="align", seed=1)
    used, wrong = verify_coverage(lines(log), "consumed.jsonl", "a", samples)
    assert wrong == []
    assert used == [
        Coverage(stage, steps, steps * batch, steps * batch // samples, steps * batch % samples)
        for stage, steps in (("instruct", 9), ("align", 2))
    ]
    assert verify_coverage(lines(log), "consumed.jsonl", "b", 7)[1] == []


@pytest.mark.parametrize("seed", range(20))
def test_samples_that_were_replaced_count_as_those_that_were_due(seed: int):
    """A replacement may also be scheduled in the same step, before or after the end of an epoch."""
    log, rng = run(seed=seed), np.random.default_rng(seed)
    bad, good = np.split(rng.permutation(10), [4])
    count = 0
    for step in range(len(log)):
        for place, number in enumerate(log[step]["samples"]["a"]):
            if number in bad:
                replace(log, step, place, int(rng.choice(good)))
                count += 1
    used, wrong = verify_coverage(lines(log), "consumed.jsonl", "a", 10)
    assert wrong == []
    assert used == [Coverage("instruct", 9, 36, 3, 6, count)]
    next(step for step in log if step["replaced"])["replaced"].clear()
    assert find_errors(log)


def test_a_log_of_an_older_version_is_read_by_its_former_names():
    log = run()
    replace(log, 2, 1, 7)
    former = [line.replace(b'"index"', b'"at"').replace(b'"scheduled"', b'"due"') for line in lines(log)]
    assert former != lines(log)
    assert verify_coverage(former, "consumed.jsonl", "a", 10) == verify_coverage(lines(log), "consumed.jsonl", "a", 10)
    assert verify_coverage(former, "consumed.jsonl", "a", 10)[0][0].replaced == 1


def lose(log: list[dict[str, Any]]) -> None:
    log[4]["samples"]["a"].pop(1)


def repeat(log: list[dict[str, Any]]) -> None:
    log[0]["samples"]["a"][0] = log[0]["samples"]["a"][1]


def repeat_in_the_last_epoch(log: list[dict[str, Any]]) -> None:
    log[-1]["samples"]["a"][0] = log[-1]["samples"]["a"][1]


def swap_across_epochs(log: list[dict[str, Any]]) -> None:
    first, second = log[2]["samples"]["a"], log[3]["samples"]["a"]
    place = next(place for place in (2, 3) if first[place] != second[0])
    first[1], first[place] = first[place], first[1]


def leave_out_a_step(log: list[dict[str, Any]]) -> None:
    del log[6]


def leave_out_the_first_step(log: list[dict[str, Any]]) -> None:
    del log[0]


def repeat_a_step(log: list[dict[str, Any]]) -> None:
    log.insert(6, log[5])


def use_a_number_of_no_sample(log: list[dict[str, Any]]) -> None:
    log[8]["samples"]["a"][2] = 10


def use_a_number_below_zero(log: list[dict[str, Any]]) -> None:
    log[8]["samples"]["a"][2] = -1


def name_another_replacement(log: list[dict[str, Any]]) -> None:
    replace(log, 8, 1, 3)
    log[8]["replaced"][0]["used"] = next(n for n in range(10) if n not in log[8]["samples"]["a"])


def name_another_index(log: list[dict[str, Any]]) -> None:
    replace(log, 8, 1, 3)
    log[8]["replaced"][0]["index"] = 99


def use_more_than_a_batch(log: list[dict[str, Any]]) -> None:
    log[3]["samples"]["b"].append(0)


def name_another_scheduled_sample(log: list[dict[str, Any]]) -> None:
    replace(log, 0, 1, log[0]["samples"]["a"][0])
    log[0]["replaced"][0]["scheduled"] = log[0]["samples"]["a"][2]


def name_another_set(log: list[dict[str, Any]]) -> None:
    replace(log, 0, 1, log[0]["samples"]["a"][0])
    log[0]["replaced"][0]["set"] = "b"


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lose, r"epoch 1: 1 samples were repeated: \d"),
        (lose, r"epoch 1: 1 samples are missing: \d"),
        (repeat, r"epoch 0: 1 samples were repeated: \d"),
        (repeat, r"epoch 0: 1 samples are missing: \d"),
        (repeat_in_the_last_epoch, r"epoch 3: 1 samples were repeated: \d"),
        (swap_across_epochs, r"epoch 0: 1 samples are missing: \d"),
        (leave_out_a_step, "step 8 follows step 6, allowed: 7"),
        (leave_out_the_first_step, "step 2 follows step 0, allowed: 1"),
        (repeat_a_step, "step 6 follows step 6, allowed: 7"),
        (repeat_a_step, r"epoch 2: \d samples were repeated: "),
        (use_a_number_of_no_sample, "step 9: samples 10, allowed: 0 to 9"),
        (use_a_number_below_zero, "step 9: samples -1, allowed: 0 to 9"),
        (name_another_replacement, r"step 9: sample \d is listed as a replacement, but was not used there"),
        (name_another_index, r"step 9: sample 3 is listed as a replacement, but was not used there"),
        (use_more_than_a_batch, "step 4: 7 samples, allowed: 6, as in the first"),
        (name_another_scheduled_sample, r"epoch 0: 1 samples were repeated: \d"),
        (name_another_set, r"epoch 0: 1 samples were repeated: \d"),
    ],
)
def test_a_log_that_was_spoilt_has_faults(spoil: Callable[[list[dict[str, Any]]], None], said: str):
    log = run()
    assert find_errors(log) == []
    spoil(log)
    found = find_errors(log)
    assert any(re.fullmatch(f"consumed.jsonl: stage instruct: {said}.*", line) for line in found), found


def test_a_fault_names_few_of_many_samples():
    log = [{"stage": "instruct", "step": 1, "samples": {"a": [0] * 1000}, "replaced": []}]
    assert find_errors(log, 1000) == [
        "consumed.jsonl: stage instruct: epoch 0: 999 samples were repeated: 0, 0, 0, 0, 0, ...",
        "consumed.jsonl: stage instruct: epoch 0: 999 samples are missing: 1, 2, 3, 4, 5, ...",
    ]


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"{",
        b"\xff",
        b"[]",
        b'{"stage": "instruct", "step": 9}',
        b'{"stage": "instruct", "step": "9", "samples": {}, "replaced": []}',
        b'{"stage": "instruct", "step": true, "samples": {}, "replaced": []}',
        b'{"stage": 1, "step": 9, "samples": {}, "replaced": []}',
        b'{"stage": "instruct", "step": 9, "samples": [1], "replaced": []}',
        b'{"stage": "instruct", "step": 9, "samples": {"a": 1}, "replaced": []}',
        b'{"stage": "instruct", "step": 9, "samples": {"a": [1.0]}, "replaced": []}',
        b'{"stage": "instruct", "step": 9, "samples": {"a": [true]}, "replaced": []}',
        b'{"stage": "instruct", "step": 9, "samples": {"a": [1]}, "replaced": {}}',
        b'{"stage": "instruct", "step": 9, "samples": {"a": [1]}, "replaced": [1]}',
        b'{"stage": "instruct", "step": 9, "samples": {"a": [1]}, "replaced": [{"set": "a", "index": 0, "used": 2}]}',
    ],
    ids=str,
)
def test_a_line_that_is_no_step_is_named(line: bytes):
    given = [*lines(run(steps=8)), line + b"\n"]
    used, (wrong,) = verify_coverage(given, "runs/x/consumed.jsonl", "a", 10)
    assert wrong == "runs/x/consumed.jsonl: line 9: no step, allowed: an object with stage, step, samples of each set"
    assert used[0].steps == 8


@pytest.mark.parametrize("length", [0, 1, 30, 60])
def test_a_line_that_a_crash_left_is_not_counted(length: int):
    given = lines(run())
    torn = [*given[:8], given[8][:length]]
    assert verify_coverage(torn, "consumed.jsonl", "a", 10) == verify_coverage(given[:8], "consumed.jsonl", "a", 10)
    assert verify_coverage([*given[:8], given[8][:-1]], "consumed.jsonl", "a", 10)[0][0].steps == 8


def test_a_set_that_no_step_used_is_named():
    assert verify_coverage(lines(run()), "consumed.jsonl", "c", 10) == (
        [],
        ["consumed.jsonl: no step used a sample of c"],
    )
