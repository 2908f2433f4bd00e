"""Tests of the search with Ray Tune: each trial runs in a separate process, and the study gets every result."""

import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from optuna.trial import TrialState

from pipelines.search import driver
from pipelines.search import trials as trials_module
from pipelines.search.driver import LossReporter
from pipelines.search.space import Range
from pipelines.search.trials import Prune, SearchSettings, Trials, TrialSpec

pytestmark = pytest.mark.integration

STEPS = 20


def settings(**changes: Any) -> SearchSettings:
    search_settings = SearchSettings(
        num_trials=4, max_concurrent_trials=2, space={"x": Range(low=0.0, high=1.0)}, objectives={"good": "max"}
    )
    return replace(search_settings, **changes)


def test_crashes_early_stops_and_results_have_their_states(ray_cluster: Any, tmp_path: Path) -> None:
    """Trial 0 is a reference and by far the best, trials 1 and 2 crash at first."""

    def work(trial: TrialSpec, run: Path, should_stop: Any) -> dict[str, float]:
        run.mkdir(parents=True, exist_ok=True)
        tries = len(list(run.glob("try-*")))
        (run / f"try-{tries}").touch()
        if tries == 0 and trial.number == 1:
            raise OSError("no space left")
        if tries == 0 and trial.number == 2:
            os._exit(1)
        try:
            with (run / "metrics.jsonl").open("w") as file:
                for step in range(1, STEPS + 1):
                    file.write(json.dumps({"stage": "s", "step": step, "loss": 1 - trial.values["x"]}) + "\n")
                    file.flush()
                    if should_stop(run, "s", step, STEPS):
                        raise driver.StoppedError
            return {"good": trial.values["x"]}
        finally:
            (run / "left").touch()

    search_settings = settings(references={"paper": {"x": 1.0}}, prune=Prune(every=5, first=5, factor=2))
    trials = Trials(search_settings, "toy", tmp_path, lambda values: {})
    seen: list[int] = []
    driver.run_trials(trials, tmp_path, work, lambda reports: seen.append(len(reports.ended_attempts)))
    found = {trial.number: trial for trial in trials.study.trials}
    assert len(found) == 4 + 2, "two crashed and were tried again"
    assert seen[-1] == 4
    failed = [trial for trial in found.values() if trial.state == TrialState.FAIL]
    assert [trial.number for trial in failed] == [1, 2]
    assert failed[0].user_attrs["error"] == "no space left"
    assert "died" in failed[1].user_attrs["error"]
    retries = {trial.user_attrs["retry_of"]: trial for trial in found.values() if "retry_of" in trial.user_attrs}
    for number in (1, 2):
        assert retries[number].params == found[number].params
        assert retries[number].state in (TrialState.COMPLETE, TrialState.PRUNED)
        assert len(list((tmp_path / "trials" / f"{number:04}").glob("try-*"))) == 2, "in the same folder"
    assert found[0].user_attrs["reference"] == "paper"
    assert found[0].value == 1.0
    stopped = [trial for trial in found.values() if trial.state == TrialState.PRUNED]
    assert stopped, "trials that start after the end of the reference lag behind it"
    for trial in stopped:
        first = trial.user_attrs.get("retry_of", trial.number)
        assert trial.user_attrs["step"] < STEPS
        run = tmp_path / "trials" / f"{first:04}"
        assert (run / "left").exists(), "it ended by itself, and left nothing running"
        recorded = len((run / "metrics.jsonl").read_text().splitlines())
        assert recorded == trial.user_attrs["step"], "it stopped at the step of the report"


def test_a_search_of_which_all_trials_fail_ends_with_the_reason(
    ray_cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(trial: TrialSpec, run: Path, should_stop: Any) -> dict[str, float]:
        raise ValueError("data.sets.a: no such bucket")

    # The number of trials has a test without their processes, in test_trials.py.
    monkeypatch.setattr(trials_module, "MAX_CONSECUTIVE_FAILURES", 1)
    trials = Trials(settings(num_trials=2, max_concurrent_trials=1, retries=0), "toy", tmp_path, lambda values: {})
    with pytest.raises(ValueError, match=r"like all before it: data\.sets\.a: no such bucket"):
        driver.run_trials(trials, tmp_path, work, lambda reports: None)
    assert all(trial.state == TrialState.FAIL for trial in trials.study.trials)


def test_mean_losses_are_those_of_whole_windows_also_after_late_calls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also after the metrics were cut back to a checkpoint, and for a run that continues in the middle."""
    reports: list[dict[str, float]] = []
    monkeypatch.setattr(driver.tune, "report", reports.append)
    monkeypatch.setattr(driver.ray, "get", lambda reference: False)

    never = SimpleNamespace(should_stop=SimpleNamespace(remote=lambda number, is_training: False))

    def record(steps: int) -> None:
        lines = [json.dumps({"stage": "s", "step": step, "loss": float(step)}) for step in range(1, steps + 1)]
        (tmp_path / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))

    reporter = LossReporter(10, 0, never)
    record(9)
    reporter(tmp_path, "s", 9, 40)
    record(15)
    reporter(tmp_path, "s", 23, 40)
    record(31)
    reporter(tmp_path, "s", 31, 40)
    assert reports == [{"step": 10 * n, "steps": 40, "loss": 10 * n - 4.5} for n in (1, 2, 3)]
