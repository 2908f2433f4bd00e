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


BEGUN = [launch(1000), start(1008), step(1013, 1, 3, 1)]  # 12 of starting up, 1 of computing
RUNNING = [*BEGUN, step(1019, 2, 1, 4, 0.5), step(1024, 3, 1, 4)]


def test_a_stage_that_nothing_disturbs():
    events = [*RUNNING, evaluate(1034, 9), end(1036)]
    assert parts(*events) == {
        "startup": 12, "productive": 9, "data": 2, "checkpoint": 0.5, "evaluation": 9, "other": 3.5
    }  # fmt: skip
    assert account(*events).total == 36
    assert account(*events).goodput == 9 / 36


def test_workers_that_fail_lose_the_steps_after_the_cursor_and_the_time_until_the_next_step():
    again = [start(1124, cursor=1), step(1130, 2, 2, 4), step(1135, 3, 1, 4)]
    assert parts(*RUNNING, *again) == {
        "startup": 12, "productive": 9, "data": 1, "lost": 11, "restart": 102, "restarts": 1, "lost_steps": 2
    }  # fmt: skip


def test_a_driver_that_dies_costs_from_its_last_event_on():
    again = [launch(1120), start(1124, cursor=3), step(1130, 4, 2, 4)]
    assert parts(*RUNNING, *again) == parts(*RUNNING) | {"restart": 102, "restarts": 1, "productive": 13}


def test_after_an_orderly_stop_time_does_not_count_until_the_next_launch():
    late = [step(1026, 4, 0, 1), evaluate(1050, 20)]
    again = [launch(9000), start(9004, cursor=3), step(9010, 4, 2, 4)]
    expected = parts(*RUNNING) | {"restart": 6, "restarts": 1, "productive": 13, "other": 1.5}
    assert parts(*RUNNING, stop(1025), *late, *again) == expected
    assert account(*RUNNING, stop(1025), *late).total == 25


def test_workers_that_fail_before_the_first_step_are_a_restart():
    assert parts(launch(0), start(5), start(25), step(30, 1, 2, 1)) == {
        "startup": 5, "restart": 24, "productive": 1, "restarts": 1
    }  # fmt: skip


def test_every_stage_starts_up_and_only_its_own_steps_are_undone():
    second = [end(1025), launch(1030, "b"), start(1032, 0, "b"), step(1040, 1, 1, 5, stage="b")]
    undone = [start(1140, 0, "b"), step(1150, 1, 5, 5, stage="b")]
    assert parts(*RUNNING, *second) == parts(*RUNNING) | {"startup": 17, "productive": 14, "other": 6.5}
    assert parts(*RUNNING, *second, *undone) == parts(*RUNNING, *second) | {
        "lost": 5, "restart": 105, "restarts": 1, "lost_steps": 1
    }  # fmt: skip


def test_a_step_can_be_lost_more_than_once():
    events = [*BEGUN, *(event for at in (1020, 1040) for event in (start(at), step(at + 10, 1, 1, 8)))]
    assert parts(*events) == {
        "startup": 12, "restart": 21, "productive": 8, "lost": 9, "restarts": 2, "lost_steps": 2
    }  # fmt: skip


def test_steps_done_again_are_lost_though_the_start_is_missing():
    assert parts(*RUNNING, step(1030, 2, 1, 5)) == {
        "startup": 12, "productive": 6, "data": 1, "lost": 11, "lost_steps": 2
    }  # fmt: skip


def test_a_clock_that_goes_back_takes_nothing_away():
    moved = [step(500, 4, 1, 4), step(506, 5, 1, 4)]
    assert parts(*RUNNING, *moved) == parts(*RUNNING) | {"productive": 13, "data": 3, "other": 1.5}


def test_a_step_that_claims_more_time_than_has_passed_is_cut_where_it_would_flatter():
    claims = step(1034, 4, 5, 100, 3)
    assert parts(*RUNNING, claims) == parts(*RUNNING) | {"data": 7, "checkpoint": 3.5, "productive": 11}
    assert parts(*RUNNING, evaluate(1034, 100)) == parts(*RUNNING) | {"evaluation": 10}


def test_nothing_has_no_goodput():
    assert asdict(account()) == dict.fromkeys([*ACCOUNT_PARTS, "restarts", "lost_steps"], 0)
    assert account().goodput == account(launch(5)).goodput == 0


def slow(events: list[Event]) -> Counter[str]:
    """Compute the same account interval by interval, from all events before and after each."""
    kept: list[Event] = []
    for event in events:
        if event["event"] == "launch" or (kept and kept[-1]["event"] != "stop"):
            kept.append(event)
    spent = Counter[str]()
    for i, event in enumerate(kept):
        kinds = [event["event"] for event in kept[:i]]
        launches = [j for j in range(i) if kinds[j] == "launch"]
        # workers other than the first of a launch are an attempt of their own
        groups = [
            j for j in range(i) if kinds[j] == "start" and "start" in kinds[max(k for k in launches if k < j) : j]
        ]
        attempt = max([*launches, *groups], default=0)
        fresh = attempt in launches and kept[attempt]["stage"] not in {kept[j]["stage"] for j in launches[:-1]}
        since = [kind for kind in kinds[attempt:] if kind in ("step", "end")]
        rest = "other" if since else "startup" if fresh else "restart"

        known = event["stage"] in {kept[j]["stage"] for j in launches}
        regroup = event["event"] == "start" and "start" in kinds[launches[-1] :]
        spent["restarts"] += (event["event"] == "launch" and known) or regroup
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


def sensible(random: random.Random) -> list[Event]:
    """Draw events of stages in a row, with failing machines and dying or stopped drivers, in multiples of 1/8 s."""
    events: list[Event] = []
    at = 0.0

    def passes(longest: int = 80) -> float:
        nonlocal at
        at += random.randrange(longest) / 8
        return at

    for stage in ("a", "b", "c"):
        cursor, failure = 0, "driver"
        while cursor < 8:
            if failure in ("driver", "stop"):
                events.append(launch(passes(), stage))
            events.append(start(passes(), cursor, stage))
            done, failure = cursor, random.choice(["", "driver", "workers", "stop"])
            for number in range(cursor + 1, random.randrange(cursor + 1, 9) if failure else 9):
                seconds = [random.randrange(16) / 8 for _ in range(3)]
                at += sum(seconds)
                events.append(step(passes(8), number, *seconds, stage))
                done = number
                if not random.randrange(4):
                    events.append(evaluate(passes() + 1, 1, stage))
                    at += 1
            if failure == "stop":
                events.append(stop(passes(), stage))
            cursor = random.randrange(cursor, done + 1) if failure else done
            passes(800)
        events.append(end(passes(), stage))
    return events


def absurd(random: random.Random) -> list[Event]:
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


@pytest.mark.parametrize("make", [sensible, absurd])
def test_the_account_is_that_of_a_slow_one_and_its_parts_add_up_exactly(make: Any):
    seen = Counter[str]()
    for seed in range(300):
        events = make(random.Random(seed))
        fast, expected = account(*events), slow(events)
        assert asdict(fast) == {name: expected[name] for name in asdict(fast)}, seed
        assert fast.total == sum(expected[part] for part in ACCOUNT_PARTS)
        seen += expected
    assert set(seen) == {*ACCOUNT_PARTS, "restarts", "lost_steps"}  # every part must occur in the drawn events


def test_the_total_is_the_time_between_first_and_last_event_but_for_the_stops():
    for seed in range(100):
        events = sensible(random.Random(seed))
        nobodys = sum(after["at"] - at["at"] for at, after in pairwise(events)
                      if at["event"] == "stop")  # fmt: skip
        assert account(*events).total == events[-1]["at"] - events[0]["at"] - nobodys


def test_no_rounding_is_left_of_what_is_taken_back():
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
        noted = append_event(tmp_path, event, "a", **values)
        assert before <= noted["at"] <= time.time()
        assert noted == {"at": noted["at"], "event": event, "stage": "a", **values}
        live.add(noted)
        assert read_ledger(tmp_path).account == live.account


def test_a_line_that_a_crash_tore_is_skipped_and_tears_no_other(tmp_path: Path):
    def write(lines: list[Event], more: str = "") -> None:
        (tmp_path / LEDGER_FILE).write_text("".join(json.dumps(line) + "\n" for line in lines) + more)

    whole = json.dumps(end(1030))
    for length in range(len(whole)):
        write(RUNNING, whole[:length])
        assert read_ledger(tmp_path).account == account(*RUNNING)
    write(RUNNING, whole[:20])
    again = append_event(tmp_path, "launch", "a")
    assert read_ledger(tmp_path).account == account(*RUNNING, again)
    assert again == json.loads((tmp_path / LEDGER_FILE).read_text().splitlines()[-1])


def test_many_may_append_at_once(tmp_path: Path):
    with ThreadPoolExecutor(8) as pool:  # each call opens the file for itself, as another process would
        noted = list(pool.map(lambda number: append_event(tmp_path, "step", "a", step=number), range(400)))
    lines = [json.loads(line) for line in (tmp_path / LEDGER_FILE).read_text().splitlines() if line]
    assert sorted(lines, key=lambda line: line["step"]) == noted


def test_gauges_hold_the_goodput_and_every_part():
    values = compute_gauges(account(*RUNNING, start(1124, cursor=1)))
    assert values["redux_goodput"] == 1 / 124
    assert values["redux_seconds_lost"] == 11
    assert (values["redux_restarts"], values["redux_lost_steps"]) == (1, 2)
    assert sum(values[f"redux_seconds_{part}"] for part in ACCOUNT_PARTS) == 124
