"""Tests of the search space: draws are valid jobs, depend on seed and history, and have the types of a job file."""

import json
from pathlib import Path
from typing import Any

import optuna
import pytest

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


def falling(values: Values) -> None:
    """Check that k + c of a stage is at most the tokens of the stage before; the first has 64."""
    outs = [64, *(values[f"kept.{stage}"] + values[f"clusters.{stage}"] for stage in (0, 1))]
    if sorted(outs, reverse=True) != outs:
        raise ValueError(f"kept: got {outs}, allowed: fewer at each stage")


def study(space: Space, name: Any, seed: int = 0, **where: Any) -> optuna.Study:
    return optuna.create_study(
        directions=["minimize", "minimize"],
        sampler=FeasibleSampler(space, name, seed, falling if space is STAGES else lambda values: None),
        load_if_exists=True,
        **where,
    )


def go_on(of: optuna.Study, space: Space, trials: int) -> list[Values]:
    drawn = []
    for _ in range(trials):
        trial = of.ask()
        values = space.suggest(trial)
        of.tell(trial, [values["kept.0"], 100 - values["kept.1"]])
        drawn.append(values)
    return drawn


@pytest.mark.parametrize("name", SAMPLERS)
def test_what_makes_no_job_is_never_drawn(name: str) -> None:
    drawn = go_on(study(STAGES, name), STAGES, 40)
    for values in drawn:
        falling(values)
        assert ("discount" in values) == (values["schedule"] == "step")
    assert len({json.dumps(values) for values in drawn}) > 30


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_search_that_is_opened_again_draws_on_as_if_it_had_never_stopped(name: str, tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path}/study.db"
    whole = go_on(study(STAGES, name, seed=3), STAGES, 24)
    parts = [go_on(study(STAGES, name, seed=3, storage=storage, study_name="parts"), STAGES, 6) for _ in range(4)]
    assert [values for part in parts for values in part] == whole
    assert go_on(study(STAGES, name, seed=4), STAGES, 3) != whole[:3]


def test_the_model_finds_what_chance_does_not() -> None:
    space = Space({f"x{place}": Range(low=0.0, high=1.0) for place in range(6)})
    best = {}
    names: tuple[SamplerName, ...] = ("tpe", "random")
    for name in names:
        of = optuna.create_study(sampler=FeasibleSampler(space, name, 0, lambda values: None))
        for _ in range(60):
            trial = of.ask()
            of.tell(trial, sum((value - 0.3) ** 2 for value in space.suggest(trial).values()))
        best[name] = of.best_value
    assert best["tpe"] < best["random"] / 2


def test_sections_lists_and_scalars_come_back_as_they_were() -> None:
    values = (None, True, 1, 0.5, "step", {"ratio": 0.5, "stages": [1, 2]}, [1, 2])
    space = Space({"a": Choice(choices=values), "b": Choice(choices=({"c": 1},), when={"a": ([1, 2],)})})
    of = optuna.create_study(sampler=FeasibleSampler(space, "random", 0, lambda values: None))
    drawn = [space.suggest(of.ask()) for _ in range(60)]
    assert {json.dumps(values_of_trial["a"]) for values_of_trial in drawn} == set(map(json.dumps, values))
    assert all(
        values_of_trial.get("b") == ({"c": 1} if values_of_trial["a"] == [1, 2] else None) for values_of_trial in drawn
    )


def test_a_space_without_any_job_is_said_to_be_at_fault() -> None:
    space = Space({"a": Range(low=0, high=9)})

    def never(values: Values) -> None:
        raise ValueError(f"a: got {values['a']}")

    of = optuna.create_study(sampler=FeasibleSampler(space, "tpe", 0, never))
    with pytest.raises(ValueError, match=rf"space: got no valid job in {MAX_DRAWS} draws, .*; last error: a: got \d"):
        space.suggest(of.ask())


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
def test_a_place_or_a_choice_that_no_job_has_is_named(params: dict[str, Any], message: str) -> None:
    def check_values(values: Values) -> None:
        if unknown := values.keys() - {"kind", "kept"}:
            raise ValueError(f"{min(unknown)}: unknown")
        if values.get("kind") == "c":
            raise ValueError("kind: got c")
        if values.get("kept", 0) > 64:
            raise ValueError(f"kept: got {values['kept']}, allowed: up to 64")

    with pytest.raises(ValueError, match=f"^{message}$"):
        check_space(Space(params), check_values)


def test_a_range_of_which_a_part_goes_with_the_others_is_no_mistake() -> None:
    check_space(STAGES, falling)


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
def test_what_is_no_range_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
