"""Tests of the search space: draws are valid jobs, depend on seed and history, and have the types of a job file."""

import json
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from pipelines.search.space import (
    MAX_DRAWS,
    SAMPLERS,
    Choice,
    FeasibleSampler,
    Range,
    SamplerName,
    Space,
    Values,
    check_space,
)

STAGES = Space(
    {
        "kept.0": Range(low=1, high=64),
        "clusters.0": Range(low=0, high=64),
        "kept.1": Range(low=1, high=64),
        "clusters.1": Range(low=0, high=64),
        "schedule": Choice(choices=("linear", "step")),
        "discount": Range(low=0.5, high=1.0, when={"schedule": ("step",)}),
    }
)


def check_token_counts(values: Values) -> None:
    """Check that k + c of a stage is at most the tokens of the stage before; the first has 64."""
    outs = [64, *(values[f"kept.{stage}"] + values[f"clusters.{stage}"] for stage in (0, 1))]
    if sorted(outs, reverse=True) != outs:
        raise ValueError(f"kept: got {outs}, allowed: fewer at each stage")


def study(space: Space, name: Any, seed: int = 0, **where: Any) -> optuna.Study:
    return optuna.create_study(
        directions=["minimize", "minimize"],
        sampler=FeasibleSampler(space, name, seed, check_token_counts if space is STAGES else lambda values: None),
        load_if_exists=True,
        **where,
    )


def draw_trials(search: optuna.Study, space: Space, trials: int) -> list[Values]:
    drawn = []
    for _ in range(trials):
        trial = search.ask()
        values = space.suggest(trial)
        search.tell(trial, [values["kept.0"], 100 - values["kept.1"]])
        drawn.append(values)
    return drawn


@pytest.mark.parametrize("name", SAMPLERS)
def test_invalid_jobs_are_never_drawn(name: str) -> None:
    drawn = draw_trials(study(STAGES, name), STAGES, 40)
    for values in drawn:
        check_token_counts(values)
        assert ("discount" in values) == (values["schedule"] == "step")
    assert len({json.dumps(values) for values in drawn}) > 30


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_reopened_search_draws_the_same_values_as_one_that_never_stopped(name: str, tmp_path: Path) -> None:
    """The storage is that of a search; after ten trials TPE has a model."""

    def reopen() -> optuna.Study:
        storage = JournalStorage(JournalFileBackend(str(tmp_path / "study.journal")))
        return study(STAGES, name, seed=3, storage=storage, study_name="parts")

    whole = draw_trials(study(STAGES, name, seed=3), STAGES, 16)
    parts = [draw_trials(reopen(), STAGES, 4) for _ in range(4)]
    assert [values for part in parts for values in part] == whole
    assert draw_trials(study(STAGES, name, seed=4), STAGES, 3) != whole[:3]


def test_the_model_of_tpe_finds_better_values_than_random_draws() -> None:
    space = Space({f"x{place}": Range(low=0.0, high=1.0) for place in range(6)})
    best = {}
    names: tuple[SamplerName, ...] = ("tpe", "random")
    for name in names:
        search = optuna.create_study(sampler=FeasibleSampler(space, name, 0, lambda values: None))
        for _ in range(60):
            trial = search.ask()
            search.tell(trial, sum((value - 0.3) ** 2 for value in space.suggest(trial).values()))
        best[name] = search.best_value
    assert best["tpe"] < best["random"] / 2


def test_sections_lists_and_scalars_are_drawn_unchanged() -> None:
    values = (None, True, 1, 0.5, "step", {"ratio": 0.5, "stages": [1, 2]}, [1, 2])
    space = Space({"a": Choice(choices=values), "b": Choice(choices=({"c": 1},), when={"a": ([1, 2],)})})
    search = optuna.create_study(sampler=FeasibleSampler(space, "random", 0, lambda values: None))
    drawn = [space.suggest(search.ask()) for _ in range(60)]
    assert {json.dumps(values_of_trial["a"]) for values_of_trial in drawn} == set(map(json.dumps, values))
    assert all(
        values_of_trial.get("b") == ({"c": 1} if values_of_trial["a"] == [1, 2] else None) for values_of_trial in drawn
    )


def test_a_space_without_any_valid_job_is_an_error() -> None:
    space = Space({"a": Range(low=0, high=9)})

    def never(values: Values) -> None:
        raise ValueError(f"a: got {values['a']}")

    search = optuna.create_study(sampler=FeasibleSampler(space, "tpe", 0, never))
    with pytest.raises(ValueError, match=rf"space: got no valid job in {MAX_DRAWS} draws, .*; last error: a: got \d"):
        space.suggest(search.ask())


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (
            {"kept": Range(low=65, high=70)},
            "space.kept: got 65 to 70, allowed: values of a valid job; "
            "no job of 2000 draws is valid: kept: got .., allowed: .*",
        ),
        (
            {"kpt": Range(low=1, high=2)},
            "space.kpt: got 1 to 2, allowed: values of a valid job; no job of 2000 draws is valid: kpt: unknown",
        ),
        (
            {"kind": Choice(choices=("a", "c"))},
            'space.kind: got "c", allowed: values of a valid job; no job of 2000 draws is valid: kind: got c',
        ),
        (
            {"kind": Choice(choices=("a", "b")), "kept": Range(low=1, high=2, when={"kind": ("c",)})},
            "space.kept: .*: its when is never true",
        ),
    ],
)
def test_a_range_or_a_choice_that_no_job_has_is_named(params: dict[str, Any], message: str) -> None:
    def check_values(values: Values) -> None:
        if unknown := values.keys() - {"kind", "kept"}:
            raise ValueError(f"{min(unknown)}: unknown")
        if values.get("kind") == "c":
            raise ValueError("kind: got c")
        if values.get("kept", 0) > 64:
            raise ValueError(f"kept: got {values['kept']}, allowed: up to 64")

    with pytest.raises(ValueError, match=f"^{message}$"):
        check_space(Space(params), check_values)


def test_a_range_may_be_invalid_in_part() -> None:
    check_space(STAGES, check_token_counts)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Range(low=3, high=3), "low: got 3, allowed: less than high, 3, or the range is empty"),
        (lambda: Range(low=1, high=3, step=4), "step: got 4, allowed: up to high - low, 2"),
        (lambda: Range(low=0, high=3, log=True), "log: got true, with low 0"),
        (lambda: Choice(choices=({"a": 1}, {"a": 1})), "choices: got .*, allowed: each once"),
        (
            lambda: Space({"a": Choice(choices=(1,), when={"b": (1,)})}),
            "space.a.when: got b, allowed: parameters before it",
        ),
    ],
)
def test_invalid_ranges_and_choices_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
