"""Every second between first and last event belongs to one part of the account, for all sequences of failures."""

import json
import random
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from pipelines.training.ledger import (
    ACCOUNT_PARTS,
    LEDGER_FILE,
    Account,
    Ledger,
    append_event,
    compute_gauges,
    read_ledger,
)

Event = dict[str, Any]


def launch(at: float, stage: str = "a") -> Event:
    return {"at": at, "event": "launch", "stage": stage}


def start(at: float, cursor: int = 0, stage: str = "a") -> Event:
    return {"at": at, "event": "start", "stage": stage, "workers": 2, "cursor": cursor}


def step(at: float, number: int, data: float, compute: float, stall: float = 0, stage: str = "a") -> Event:
    return {"at": at, "event": "step", "stage": stage, "step": number, "data_s": data, "compute_s": compute,
            "stall_s": stall}  # fmt: skip


def end(at: float, stage: str = "a") -> Event:
    return {"at": at, "event": "end", "stage": stage}


def stop(at: float, stage: str = "a") -> Event:
    return {"at": at, "event": "stop", "stage": stage}


def evaluate(at: float, wall: float, stage: str = "a") -> Event:
    return {"at": at, "event": "evaluate", "stage": stage, "wall_s": wall}


def account(*events: Event) -> Account:
    ledger = Ledger()
    for event in events:
        ledger.add(event)
    return ledger.account


def parts(*events: Event) -> dict[str, float]:
    """Return the non-zero values of the account."""
    return {name: value for name, value in asdict(account(*events)).items() if value}


FIRST_STEP = [launch(1000), start(1008), step(1013, 1, 3, 1)]  # 12 of starting up, 1 of computing
THREE_STEPS = [*FIRST_STEP, step(1019, 2, 1, 4, 0.5), step(1024, 3, 1, 4)]


def test_a_stage_without_faults():
    events = [*THREE_STEPS, evaluate(1034, 9), end(1036)]
    assert parts(*events) == {
        "startup": 12, "productive": 9, "data": 2, "checkpoint": 0.5, "evaluation": 9, "other": 3.5
    }  # fmt: skip
    assert account(*events).total == 36
    assert account(*events).goodput == 9 / 36


def test_failed_workers_lose_the_steps_after_the_cursor_and_the_time_until_the_next_step():
    repeated = [start(1124, cursor=1), step(1130, 2, 2, 4), step(1135, 3, 1, 4)]
    assert parts(*THREE_STEPS, *repeated) == {
        "startup": 12, "productive": 9, "data": 1, "lost": 11, "restart": 102, "restarts": 1, "lost_steps": 2
    }  # fmt: skip


def test_a_lost_driver_costs_the_time_since_its_last_event():
    repeated = [launch(1120), start(1124, cursor=3), step(1130, 4, 2, 4)]
    assert parts(*THREE_STEPS, *repeated) == parts(*THREE_STEPS) | {"restart": 102, "restarts": 1, "productive": 13}


def test_after_an_orderly_stop_time_does_not_count_until_the_next_launch():
    late = [step(1026, 4, 0, 1), evaluate(1050, 20)]
    repeated = [launch(9000), start(9004, cursor=3), step(9010, 4, 2, 4)]
    expected = parts(*THREE_STEPS) | {"restart": 6, "resumes": 1, "productive": 13, "other": 1.5}
    assert parts(*THREE_STEPS, stop(1025), *late, *repeated) == expected
    assert account(*THREE_STEPS, stop(1025), *late).total == 25


def test_workers_that_fail_before_the_first_step_are_a_restart():
    assert parts(launch(0), start(5), start(25), step(30, 1, 2, 1)) == {
        "startup": 5, "restart": 24, "productive": 1, "restarts": 1
    }  # fmt: skip


def test_every_stage_has_a_start_and_only_steps_of_that_stage_are_undone():
    second = [end(1025), launch(1030, "b"), start(1032, 0, "b"), step(1040, 1, 1, 5, stage="b")]
    undone = [start(1140, 0, "b"), step(1150, 1, 5, 5, stage="b")]
    assert parts(*THREE_STEPS, *second) == parts(*THREE_STEPS) | {"startup": 17, "productive": 14, "other": 6.5}
    assert parts(*THREE_STEPS, *second, *undone) == parts(*THREE_STEPS, *second) | {
        "lost": 5, "restart": 105, "restarts": 1, "lost_steps": 1
    }  # fmt: skip


def test_a_step_can_be_lost_more_than_once():
    events = [*FIRST_STEP, *(event for at in (1020, 1040) for event in (start(at), step(at + 10, 1, 1, 8)))]
    assert parts(*events) == {
        "startup": 12, "restart": 21, "productive": 8, "lost": 9, "restarts": 2, "lost_steps": 2
    }  # fmt: skip


def test_repeated_steps_are_lost_even_if_the_start_is_missing():
    assert parts(*THREE_STEPS, step(1030, 2, 1, 5)) == {
        "startup": 12, "productive": 6, "data": 1, "lost": 11, "lost_steps": 2
    }  # fmt: skip


def test_a_clock_that_goes_back_reduces_no_part():
    moved = [step(500, 4, 1, 4), step(506, 5, 1, 4)]
    assert parts(*THREE_STEPS, *moved) == parts(*THREE_STEPS) | {"productive": 13, "data": 3, "other": 1.5}


def test_a_step_cannot_claim_more_time_than_has_passed():
    claims = step(1034, 4, 5, 100, 3)
    assert parts(*THREE_STEPS, claims) == parts(*THREE_STEPS) | {"data": 7, "checkpoint": 3.5, "productive": 11}
    assert parts(*THREE_STEPS, evaluate(1034, 100)) == parts(*THREE_STEPS) | {"evaluation": 10}


def test_an_account_without_steps_has_no_goodput():
    assert asdict(account()) == dict.fromkeys([*ACCOUNT_PARTS, "restarts", "resumes", "lost_steps"], 0)
    assert account().goodput == account(launch(5)).goodput == 0


def compute_slowly(events: list[Event]) -> Counter[str]:
    """Compute the same account interval by interval, from all events before and after each."""
    kept: list[Event] = []
    for event in events:
        if event["event"] == "launch" or (kept and kept[-1]["event"] != "stop"):
            kept.append(event)
    spent = Counter[str]()
    for i, event in enumerate(kept):
        kinds = [event["event"] for event in kept[:i]]
        launches = [j for j in range(i) if kinds[j] == "launch"]
        # Workers other than the first of a launch are an attempt of their own.
        groups = [
            j for j in range(i) if kinds[j] == "start" and "start" in kinds[max(k for k in launches if k < j) : j]
        ]
        attempt = max([*launches, *groups], default=0)
        fresh = attempt in launches and kept[attempt]["stage"] not in {kept[j]["stage"] for j in launches[:-1]}
        since = [kind for kind in kinds[attempt:] if kind in ("step", "end")]
        rest = "other" if since else "startup" if fresh else "restart"

        known = event["stage"] in {kept[j]["stage"] for j in launches}
        regroup = event["event"] == "start" and "start" in kinds[launches[-1] :]
        resumed = event["event"] == "launch" and known and kinds[-1:] == ["stop"]
        spent["resumes"] += resumed
        spent["restarts"] += ((event["event"] == "launch" and known) or regroup) and not resumed
        dead = (event["event"] == "launch" and (known or since[-1:] != ["end"])) or regroup
        void = event["event"] == "step" and any(
            later["stage"] == event["stage"]
            and later.get("cursor", later.get("step", 1 + event["step"]) - 1) < event["step"]
            for later in kept[i + 1 :]
        )
        spent["lost_steps"] += void

        if not i or kinds[-1] == "stop":
            continue
        left = max(event["at"] - kept[i - 1]["at"], 0)
        wanted = {"step": ("data", "checkpoint", "productive"), "evaluate": ("evaluation",)}.get(event["event"], ())
        keys = {"data": "data_s", "checkpoint": "stall_s", "productive": "compute_s", "evaluation": "wall_s"}
        first = event["event"] == "step" and not since
        for part in wanted:
            taken = min(event[keys[part]], left)
            left -= taken
            spent[rest if first and part == "data" else "lost" if void else part] += taken
        spent["restart" if dead else "lost" if void and not first else rest] += left
    return spent


def draw_sensible_events(random: random.Random) -> list[Event]:
    """Draw events of stages in a row, with failing machines and dying or stopped drivers, in multiples of 1/8 s."""
    events: list[Event] = []
    at = 0.0

    def advance(longest: int = 80) -> float:
        nonlocal at
        at += random.randrange(longest) / 8
        return at

    for stage in ("a", "b", "c"):
        cursor, failure = 0, "driver"
        while cursor < 8:
            if failure in ("driver", "stop"):
                events.append(launch(advance(), stage))
            events.append(start(advance(), cursor, stage))
            done, failure = cursor, random.choice(["", "driver", "workers", "stop"])
            for number in range(cursor + 1, random.randrange(cursor + 1, 9) if failure else 9):
                seconds = [random.randrange(16) / 8 for _ in range(3)]
                at += sum(seconds)
                events.append(step(advance(8), number, *seconds, stage))
                done = number
                if not random.randrange(4):
                    events.append(evaluate(advance() + 1, 1, stage))
                    at += 1
            if failure == "stop":
                events.append(stop(advance(), stage))
            cursor = random.randrange(cursor, done + 1) if failure else done
            advance(800)
        events.append(end(advance(), stage))
    return events


def draw_absurd_events(random: random.Random) -> list[Event]:
    """Draw events in any order, with jumping clocks and impossible durations."""
    events, at = [], 100.0
    for _ in range(random.randrange(40)):
        at += random.choice([1, 1, 1, -1]) * random.randrange(40) / 8
        seconds = [random.randrange(30) / 8 for _ in range(3)]
        number, stage = random.randrange(6), random.choice("ab")
        kinds = [launch(at, stage), start(at, number, stage), end(at, stage), stop(at, stage),
                 evaluate(at, seconds[0], stage), {"at": at, "event": "unheard of", "stage": stage}]  # fmt: skip
        events.append(random.choice([*kinds, *[step(at, number, *seconds, stage)] * 5]))
    return events


@pytest.mark.parametrize("make", [draw_sensible_events, draw_absurd_events])
def test_the_account_equals_the_slow_reference_and_its_parts_add_up_exactly(make: Any):
    totals = Counter[str]()
    for seed in range(300):
        events = make(random.Random(seed))
        fast, expected = account(*events), compute_slowly(events)
        assert asdict(fast) == {name: expected[name] for name in asdict(fast)}, seed
        assert fast.total == sum(expected[part] for part in ACCOUNT_PARTS)
        totals += expected
    assert set(totals) == {
        *ACCOUNT_PARTS,
        "restarts",
        "resumes",
        "lost_steps",
    }  # every part must occur in the drawn events


def test_the_total_is_the_time_between_first_and_last_event_without_the_stops():
    for seed in range(100):
        events = draw_sensible_events(random.Random(seed))
        stopped = sum(after["at"] - at["at"] for at, after in pairwise(events)
                      if at["event"] == "stop")  # fmt: skip
        assert account(*events).total == events[-1]["at"] - events[0]["at"] - stopped


def test_undone_parts_are_exactly_zero():
    times = [1.7e9 + 0.1 * number for number in range(1, 100)]
    steps = [step(at, number, 0.01 / 7, 0.06 / number, 0.003 / 7) for number, at in enumerate(times, 1)]
    undone = account(launch(1.7e9), start(1.7e9), *steps, start(1.7e9 + 20))
    assert (undone.data, undone.productive, undone.checkpoint, undone.other) == (0, 0, 0, 0)
    assert undone.lost_steps == 99
    assert undone.total == pytest.approx(20, abs=1e-5)


def test_adding_events_one_at_a_time_equals_reading_the_file(tmp_path: Path):
    live = read_ledger(tmp_path)
    assert live.account == account()
    before = time.time()
    for event, values in [
        ("launch", {}),
        ("start", {"workers": 2, "cursor": 0}),
        ("step", {"step": 1, "data_s": 0.0, "compute_s": 1e-6, "stall_s": 0.0}),
        ("evaluate", {"wall_s": 1e-6}),
        ("end", {}),
    ]:
        appended = append_event(tmp_path, event, "a", **values)
        assert before <= appended["at"] <= time.time()
        assert appended == {"at": appended["at"], "event": event, "stage": "a", **values}
        live.add(appended)
        assert read_ledger(tmp_path).account == live.account


def test_a_truncated_line_is_skipped_and_the_next_one_is_complete(tmp_path: Path):
    def write(lines: list[Event], more: str = "") -> None:
        (tmp_path / LEDGER_FILE).write_text("".join(json.dumps(line) + "\n" for line in lines) + more)

    whole = json.dumps(end(1030))
    for length in range(len(whole)):
        write(THREE_STEPS, whole[:length])
        assert read_ledger(tmp_path).account == account(*THREE_STEPS)
    write(THREE_STEPS, whole[:20])
    repeated = append_event(tmp_path, "launch", "a")
    assert read_ledger(tmp_path).account == account(*THREE_STEPS, repeated)
    assert repeated == json.loads((tmp_path / LEDGER_FILE).read_text().splitlines()[-1])


def test_several_threads_may_append_at_once(tmp_path: Path):
    with ThreadPoolExecutor(8) as pool:  # each call opens the file for itself, as another process would
        appended = list(pool.map(lambda number: append_event(tmp_path, "step", "a", step=number), range(400)))
    lines = [json.loads(line) for line in (tmp_path / LEDGER_FILE).read_text().splitlines() if line]
    assert sorted(lines, key=lambda line: line["step"]) == appended


def test_the_gauge_of_restarts_counts_faults_alone():
    """A resume after a stop is none, as in the report."""
    resumed = [stop(1025), launch(9000), start(9004, cursor=3), step(9010, 4, 2, 4)]
    assert compute_gauges(account(*THREE_STEPS, *resumed))["redux_restarts"] == 0
    assert compute_gauges(account(*THREE_STEPS, *resumed, start(9100, cursor=3)))["redux_restarts"] == 1


def test_gauges_have_the_goodput_and_every_part():
    values = compute_gauges(account(*THREE_STEPS, start(1124, cursor=1)))
    assert values["redux_goodput"] == 1 / 124
    assert values["redux_seconds_lost"] == 11
    assert (values["redux_restarts"], values["redux_lost_steps"]) == (1, 2)
    assert sum(values[f"redux_seconds_{part}"] for part in ACCOUNT_PARTS) == 124
