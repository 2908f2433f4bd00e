"""What a search may choose: values of a job file by dotted path, drawn together, and again where they make no job.

Whether values go together (k and c with what an earlier stage left, heads with a width, …) is for the job's own checks
to say, so the draw asks them, before Optuna hears of it: what cannot be is never a trial.  What a trial gets follows
from seed, its number and the trials before it, so a search that is started again draws on as if it had never stopped.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import numpy as np
from annotated_types import Gt, MinLen
from optuna import Study, create_study, logging
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial

logging.set_verbosity(logging.ERROR)  # what Optuna says of each trial, the page of a search does

DRAWS = 10_000
"""In a row that make no job, after which the space is said to be at fault."""

THOUGHTFUL = 40
"""Of these draws, over which all places are left to chance, one after the other."""

CHECKS = 2_000
"""Draws, in one of which each range, and each choice, must be fit."""

SAMPLERS: dict[str, Callable[[int], BaseSampler]] = {
    "tpe": lambda seed: TPESampler(seed=seed),
    "nsga2": lambda seed: NSGAIISampler(seed=seed),
    "random": lambda seed: RandomSampler(seed=seed),
}
SamplerName = Literal["tpe", "nsga2", "random"]

Values = dict[str, Any]
"""Of a job file, by dotted path."""

When = dict[str, Annotated[tuple[Any, ...], MinLen(1)]]
"""Another place further up in the space, and the values there with which this one is asked for at all."""


@dataclass(frozen=True, kw_only=True)
class Range:
    """Numbers from low to high, both included; whole ones where all of them are written as such.

    step: from one to the next.  log: as many between 1 and 10 as between 10 and 100.
    """

    low: int | float
    high: int | float
    step: Annotated[int | float, Gt(0)] | None = None
    log: bool = False
    when: When = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise ValueError(f"low: got {self.low}, allowed: less than high, {self.high}, or the range is empty")
        if self.step is not None and self.step > self.high - self.low:
            raise ValueError(f"step: got {self.step}, allowed: up to high - low, {self.high - self.low}")
        if self.log and (self.low <= 0 or self.step is not None):
            raise ValueError(f"log: got true, with low {self.low}, step {self.step}, allowed: low > 0 and no step")

    @property
    def distribution(self) -> BaseDistribution:
        """As Optuna has it."""
        if all(isinstance(number, int) for number in (self.low, self.high, self.step or 0)):
            return IntDistribution(int(self.low), int(self.high), log=self.log, step=int(self.step or 1))
        return FloatDistribution(self.low, self.high, log=self.log, step=self.step)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One of several values, which may be sections or lists as well."""

    choices: Annotated[tuple[Any, ...], MinLen(1)]
    when: When = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(set(map(json.dumps, self.choices))) < len(self.choices):
            raise ValueError(f"choices: got {json.dumps(self.choices)}, allowed: each once")

    @property
    def distribution(self) -> BaseDistribution:
        """As Optuna has it."""
        return CategoricalDistribution([_kept(value) for value in self.choices])


def _kept(value: Any) -> Any:
    """A value as Optuna keeps it: JSON in place of a section or list."""
    return json.dumps(value) if isinstance(value, dict | list) else value


@dataclass(frozen=True)
class Space:
    """The places that are searched, in the order in which a job file is given their values."""

    places: Mapping[str, Range | Choice]

    def __post_init__(self) -> None:
        above = set[str]()
        for name, place in self.places.items():
            if missing := place.when.keys() - above:
                known = ", ".join(above) or "none"
                raise ValueError(f"space.{name}.when: got {min(missing)}, allowed: places further up, {known}")
            above.add(name)

    def asked(self, drawn: Mapping[str, Any]) -> Iterator[tuple[str, BaseDistribution]]:
        """The places that are asked for, given what is drawn for those further up; `drawn` may grow on the way."""
        for name, place in self.places.items():
            if all(other in drawn and drawn[other] in map(_kept, values) for other, values in place.when.items()):
                yield name, place.distribution

    def suggest(self, trial: Trial) -> Values:
        """A trial's values."""
        drawn = Values()
        for name, distribution in self.asked(drawn):
            drawn[name] = _suggest(trial, name, distribution)
        return self.values(drawn)

    def values(self, drawn: Mapping[str, Any]) -> Values:
        """What Optuna keeps, as a job file has it."""
        choices = {
            (name, json.dumps(_kept(value))): value
            for name, place in self.places.items()
            if isinstance(place, Choice)
            for value in place.choices
        }
        return {name: choices.get((name, json.dumps(value)), value) for name, value in drawn.items()}


def _suggest(trial: Trial, name: str, distribution: BaseDistribution) -> Any:
    if isinstance(distribution, CategoricalDistribution):
        return trial.suggest_categorical(name, distribution.choices)
    if isinstance(distribution, IntDistribution):
        return trial.suggest_int(
            name, distribution.low, distribution.high, step=distribution.step, log=distribution.log
        )
    assert isinstance(distribution, FloatDistribution)
    return trial.suggest_float(name, distribution.low, distribution.high, step=distribution.step, log=distribution.log)


class Drawing(BaseSampler):
    """Another sampler's draws, of all places together, again and again until they are fit.

    What a model of good values thinks best may be just what makes no job, however often it is asked; so each draw
    leaves more to chance than the one before.

    fit: of values; ValueError, saying why, where they are not.
    """

    def __init__(self, space: Space, name: SamplerName, seed: int, fit: Callable[[Values], object]) -> None:
        self.space, self.make, self.seed, self.fit = space, SAMPLERS[name], seed, fit

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return {name: place.distribution for name, place in self.space.places.items()}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        inner, chance = self._inner(trial), RandomSampler(seed=self._seed(trial))
        problem: ValueError | None = None
        for number in range(DRAWS):
            drawn = self._draw(inner, chance, number / THOUGHTFUL, study, trial)
            try:
                self.fit(self.space.values(drawn))
            except ValueError as error:
                problem = error
            else:
                return drawn
        raise ValueError(f"space: got {DRAWS} draws that make no job, allowed: one that some do; the last: {problem}")

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self._inner(trial).sample_independent(study, trial, param_name, param_distribution)

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None) -> None:
        self._inner(trial).after_trial(study, trial, state, values)

    def _inner(self, trial: FrozenTrial) -> BaseSampler:
        return self.make(self._seed(trial))

    def _seed(self, trial: FrozenTrial) -> int:
        return int(np.random.SeedSequence([self.seed, trial.number]).generate_state(1)[0])

    def _draw(
        self, inner: BaseSampler, chance: BaseSampler, share: float, study: Study, trial: FrozenTrial
    ) -> dict[str, Any]:
        """One draw of all places, of which chance has its share.

        What the trial has already, from a driver that died while it asked, stays.
        """
        coin = FloatDistribution(0, 1)
        places = inner.infer_relative_search_space(study, trial) if share < 1 else {}
        related = inner.sample_relative(study, trial, places)
        drawn: dict[str, Any] = {}
        for name, distribution in self.space.asked(drawn):
            if name in trial.params:
                drawn[name] = trial.params[name]
            elif chance.sample_independent(study, trial, name, coin) < share:
                drawn[name] = chance.sample_independent(study, trial, name, distribution)
            elif name in related:
                drawn[name] = related[name]
            else:
                drawn[name] = inner.sample_independent(study, trial, name, distribution)
        return drawn


def check(space: Space, fit: Callable[[Values], object]) -> None:
    """ValueError, naming the place, where none of its values, or one of its choices, is in any draw that is fit.

    That is how a place is found that no job has, and a range that lies beyond what there can be.
    """
    chance, blank = RandomSampler(seed=0), create_study()
    trial = create_trial(state=TrialState.RUNNING)

    def draw(fixed: Mapping[str, Any]) -> dict[str, Any]:
        drawn: dict[str, Any] = {}
        for name, distribution in space.asked(drawn):
            drawn[name] = fixed[name] if name in fixed else chance.sample_independent(blank, trial, name, distribution)
        return drawn

    for name, place in space.places.items():
        asked = [{name: _kept(value)} for value in place.choices] if isinstance(place, Choice) else [{}]
        for fixed in asked:
            if problem := _problem(space, fit, name, (draw(fixed) for _ in range(CHECKS))):
                got = f"{place.low} to {place.high}" if isinstance(place, Range) else json.dumps(fixed[name])
                raise ValueError(f"space.{name}: got {got}, with which no draw in {CHECKS} is a job: {problem}")


def _problem(space: Space, fit: Callable[[Values], object], name: str, draws: Iterable[dict[str, Any]]) -> str:
    """Why none of the draws that ask for the place is fit, "" if one is."""
    problem = "its when is never true"
    for drawn in draws:
        if name not in drawn:
            continue
        try:
            fit(space.values(drawn))
        except ValueError as error:
            problem = str(error)
        else:
            return ""
    return problem
