"""Tests of the trials in a study: every end has its state, and a new driver continues without a difference."""

import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState

from pipelines.search.space import Range, Values
from pipelines.search.trials import MAX_CONSECUTIVE_FAILURES, Limit, Prune, SearchSettings, Trials, load_study

SPACE = {"x": Range(low=0.0, high=1.0), "y": Range(low=0.0, high=1.0)}


def settings(**changes: Any) -> SearchSettings:
    return SearchSettings(
        **({"num_trials": 12, "max_concurrent_trials": 2, "space": SPACE, "objectives": {"good": "max"}} | changes)
    )


def forecast(values: Values) -> dict[str, float]:
    return {"flops": 100 * values.get("x", 0.5)}


@pytest.fixture
def opened(tmp_path: Path) -> Callable[..., Trials]:
    """Open the same search again at each call."""

    def open_again(**changes: Any) -> Trials:
        return Trials(settings(**changes), "search", tmp_path, forecast)

    return open_again


def state(trials: Trials, number: int) -> TrialState:
    return trials.study.trials[number].state


def finish(trials: Trials, good: Callable[[Values], float] = lambda values: values.get("x", 0.5)) -> None:
    while not trials.is_finished:
        trial = trials.next_trial("key")
        assert trial
        trials.finish("key", {"good": good(trial.values)})


def test_each_end_is_told_as_what_it_was(opened: Callable[..., Trials]) -> None:
    trials = opened(max_concurrent_trials=9, retries=0, prune=Prune(every=5, first=5))
    for key in "abcde":
        trials.next_trial(key)
    assert not trials.report_loss("a", 5, 50, 1.0)
    assert trials.report_loss("b", 5, 50, 2.0), "the better of two goes on"
    trials.finish("a", {"good": 0.7})
    trials.finish("b", {})
    trials.finish("c", {}, "OSError: no space")
    trials.finish("d", {"better": 0.9})
    trials.finish("e", {"good": math.nan})
    states = [trial.state.name for trial in trials.study.trials]
    assert states == ["COMPLETE", "PRUNED", "FAIL", "FAIL", "FAIL"]
    complete, pruned, *failed = trials.study.trials
    assert complete.value == 0.7
    assert pruned.values is None, "a low-budget value must not pass for a result"
    assert (pruned.user_attrs["step"], pruned.user_attrs["steps"], pruned.user_attrs["losses"]) == (5, 50, {"5": 2.0})
    assert [trial.user_attrs["error"] for trial in failed] == [
        "OSError: no space", "good was not reported, only better, flops", "good was nan",
    ]  # fmt: skip


def test_a_trial_that_lags_is_stopped_even_by_a_crash_but_not_one_that_was_done_all_the_same(
    opened: Callable[..., Trials],
) -> None:
    trials = opened(max_concurrent_trials=9, prune=Prune(every=5, first=5))
    for key in "abc":
        trials.next_trial(key)
    trials.report_loss("a", 5, 50, 1.0)
    assert trials.report_loss("b", 5, 50, 2.0)
    assert trials.report_loss("c", 5, 50, 3.0)
    trials.finish("b", {}, "OSError: while it stopped")
    trials.finish("c", {"good": 0.9})
    assert [trial.state.name for trial in trials.study.trials] == ["RUNNING", "PRUNED", "COMPLETE"]


def test_a_study_in_a_database_is_that_of_one_folder(tmp_path: Path) -> None:
    search_settings = settings(storage=f"sqlite:///{tmp_path}/study.db")
    Trials(search_settings, "search", tmp_path / "one", forecast)
    with pytest.raises(ValueError, match=r"name: got search, whose study in storage is that of .*:.*/one, allowed: an"):
        Trials(search_settings, "search", tmp_path / "two", forecast)


def test_no_more_run_than_asked_for(opened: Callable[..., Trials]) -> None:
    trials = opened(num_trials=3)
    assert [trials.next_trial(key) is None for key in "abc"] == [False, False, True]
    trials.finish("a", {"good": 1})
    assert trials.next_trial("c")
    trials.finish("b", {"good": 1})
    assert trials.next_trial("d") is None
    assert not trials.is_finished
    trials.finish("c", {"good": 1})
    assert trials.is_finished


def test_a_crash_is_tried_again_from_where_it_was(opened: Callable[..., Trials]) -> None:
    trials = opened(num_trials=2, retries=2)
    first = trials.next_trial("a")
    assert first
    trials.report_loss("a", 50, 100, 1.5)
    trials.finish("a", {}, "boom")
    again = trials.next_trial("b")
    assert again == first, "the same settings, and the folder of the first try"
    trials.finish("b", {}, "boom")
    trials = opened(num_trials=2, retries=2)
    assert trials.next_trial("c") == first
    trials.finish("c", {}, "boom")
    finish(trials)
    kinds = [(trial.state.name, trial.user_attrs.get("retry_of")) for trial in trials.study.trials]
    assert kinds == [("FAIL", None), ("FAIL", 0), ("FAIL", 0), ("COMPLETE", None)]
    assert trials.study.trials[2].user_attrs["losses"] == {"50": 1.5}


@pytest.mark.parametrize("storage", [None, "sqlite:///{}/study.db"])
def test_a_dead_drivers_trials_come_first_and_the_total_is_as_asked(
    opened: Callable[..., Trials], tmp_path: Path, storage: str | None
) -> None:
    where = {"storage": storage.format(tmp_path)} if storage else {}
    trials = opened(**where)
    started = [trials.next_trial("a"), trials.next_trial("b")]
    trials.finish("a", {"good": 0.3})
    started.append(trials.next_trial("c"))
    again = opened(**where)
    assert [trial.state.name for trial in again.study.trials] == ["COMPLETE", "WAITING", "WAITING"]
    assert [again.next_trial("d"), again.next_trial("e")] == started[1:]
    again.finish("d", {"good": 0.4})
    again.finish("e", {"good": 0.5})
    finish(again)
    assert [trial.state for trial in again.study.trials] == [TrialState.COMPLETE] * 12
    assert again.study.trials[0].value == 0.3


def test_a_driver_that_ends_in_order_leaves_none_running_and_none_failed(opened: Callable[..., Trials]) -> None:
    trials = opened()
    trials.next_trial("a")
    trials.close()
    trials.finish("a", {}, "its process was taken along")
    assert [trial.state.name for trial in trials.study.trials] == ["WAITING"]
    assert trials.next_trial("b") is None


def test_a_half_drawn_trial_is_drawn_to_its_end(opened: Callable[..., Trials]) -> None:
    trials = opened()
    half = trials.study.ask().suggest_float("x", 0.0, 1.0)
    trial = opened().next_trial("a")
    assert trial
    assert (trial.number, trial.values["x"], trial.values.keys()) == (0, half, SPACE.keys())


def test_rungs_are_there_again(tmp_path: Path) -> None:
    """A search that is opened again before each report stops the same trials as one that never ended."""
    generator = random.Random(0)
    losses = [[generator.random() for _ in range(4)] for _ in range(30)]

    def stopped(folder: Path, again: bool) -> list[int]:
        def open_() -> Trials:
            return Trials(
                settings(num_trials=30, max_concurrent_trials=1, prune=Prune(every=10, first=10, factor=2)),
                "s",
                folder,
                forecast,
            )

        folder.mkdir()
        trials = open_()
        for each in losses:
            trial = trials.next_trial("a")
            for step, loss in enumerate(each, start=1):
                if again:
                    trials = open_()
                    assert trials.next_trial("a") == trial
                    for before in range(1, step):
                        assert not trials.report_loss("a", 10 * before, 40, each[before - 1]), (
                            "earlier reports are repeated"
                        )
                stop = trials.report_loss("a", 10 * step, 40, loss)
                if again:
                    trials = open_()
                    trials.next_trial("a")
                    assert trials.report_loss("a", 10 * step, 40, loss) == stop, "a verdict outlives who gave it"
                if stop:
                    break
            trials.finish("a", {} if stop else {"good": -each[-1]})
        return [trial.number for trial in trials.study.trials if trial.state == TrialState.PRUNED]

    undisturbed = stopped(tmp_path / "one", again=False)
    assert 10 < len(undisturbed) < 30
    assert stopped(tmp_path / "two", again=True) == undisturbed


def test_references_come_first_and_are_never_stopped(opened: Callable[..., Trials]) -> None:
    trials = opened(num_trials=4, references={"paper": {"x": 0.25}, "plain": {}}, prune=Prune(every=1, first=1))
    first, second = trials.next_trial("a"), trials.next_trial("b")
    assert first
    assert second
    assert (first.values, second.values) == ({"x": 0.25}, {})
    assert not trials.report_loss("a", 1, 9, 1.0)
    assert not trials.report_loss("b", 1, 9, 5.0)
    trials.finish("a", {"good": 1})
    trials.finish("b", {"good": 0})
    finish(opened(num_trials=4, references={"paper": {"x": 0.25}, "plain": {}}))
    states = [trial.user_attrs.get("reference") for trial in opened(num_trials=4).study.trials]
    assert states == ["paper", "plain", None, None]


def test_a_limit_on_what_is_known_is_never_broken_and_one_on_what_is_measured_is_told(
    opened: Callable[..., Trials],
) -> None:
    trials = opened(limits={"flops": Limit(at_most=30), "speed": Limit(at_least=5)}, num_trials=20)
    while not trials.is_finished:
        trial = trials.next_trial("a")
        assert trial
        assert trial.values["x"] <= 0.3
        trials.finish("a", {"good": trial.values["x"], "speed": 10 * trial.values["y"]})
    for trial in trials.study.trials:
        assert trial.constraints["flops <= 30"] == pytest.approx(100 * trial.params["x"] - 30)
        assert trial.constraints["speed >= 5"] == pytest.approx(5 - 10 * trial.params["y"])
    assert trials.study.best_trial.params["y"] >= 0.5


def test_where_nothing_works_the_search_ends_and_says_why(opened: Callable[..., Trials]) -> None:
    trials = opened(retries=1, max_concurrent_trials=1)
    for _ in range(2 * MAX_CONSECUTIVE_FAILURES):
        assert trials.next_trial("a")
        trials.finish("a", {}, "ValueError: no such bucket")
    assert trials.is_finished
    assert "ValueError: no such bucket" in trials.failure_reason


def test_a_study_of_other_objectives_is_left_alone(opened: Callable[..., Trials]) -> None:
    finish(opened(num_trials=1))
    with pytest.raises(ValueError, match=r"name: got search, whose stored study has .*good.*maximize"):
        opened(objectives={"good": "min"})
    with pytest.raises(ValueError, match="name: got search, whose stored study"):
        opened(objectives={"better": "max"})


def test_a_storage_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    for storage in ("nonsense://a", "sqlite:////no/such/folder/study.db"):
        with pytest.raises(ValueError, match=r"^storage: [^\n]+$"):
            Trials(settings(storage=storage), "search", tmp_path, forecast)
    with pytest.raises(ValueError, match=r"no study search in .*study\.journal"):
        load_study(settings(), "search", tmp_path)


def test_the_front_that_is_found_covers_the_known_one(tmp_path: Path) -> None:
    """ZDT1 in three dimensions (Zitzler, Deb and Thiele 2000): on its front x2 = x3 = 0 and f2 = 1 - sqrt(f1).

    Asked of each of three seeds: 65 % of the front's hypervolume, reference point (1.1, 1.1), in 120 trials, and half
    as much again as chance finds.  Optuna's own loop with the same sampler comes to 74 to 82 %.
    """
    whole = area([(x / 1000, 1 - math.sqrt(x / 1000)) for x in range(1001)])

    def found(sampler: str, seed: int) -> float:
        folder = tmp_path / f"{sampler}-{seed}"
        folder.mkdir()
        space = {name: Range(low=0.0, high=1.0) for name in ("x1", "x2", "x3")}
        search_settings = settings(
            num_trials=120, space=space, objectives={"f1": "min", "f2": "min"}, seed=seed, sampler=sampler
        )
        trials = Trials(search_settings, "zdt1", folder, lambda values: {})
        while not trials.is_finished:
            trial = trials.next_trial("a")
            assert trial
            f1, *others = trial.values.values()
            g = 1 + 9 * sum(others) / len(others)
            trials.finish("a", {"f1": f1, "f2": g * (1 - math.sqrt(f1 / g))})
        return area([trial.values for trial in trials.study.best_trials]) / whole

    for seed in range(3):
        assert found("tpe", seed) > max(0.65, 1.5 * found("random", seed))


def area(points: Sequence[Any], corner: float = 1.1) -> float:
    """Compute the area that the points dominate, up to the corner; both objectives are minimised."""
    result, below = 0.0, corner
    for x, y in sorted(points):
        if x < corner and y < below:
            result += (corner - x) * (below - y)
            below = y
    return result
