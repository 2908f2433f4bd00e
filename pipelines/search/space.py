"""Search space: values of a job file by dotted path, sampled together until they are a valid job.

The job's own checks decide if values fit together (k and c with the tokens of an earlier stage, heads with a width, …).
The sampler runs them before Optuna creates a trial, so no trial is an invalid job. The values of a trial depend on the
seed, its number, and earlier trials, so a search that is stopped and continued samples the same values.
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

logging.set_verbosity(logging.ERROR)  # The page of the search shows what Optuna would log

MAX_DRAWS = 10_000
"""Number of invalid draws in a row after which the space is an error."""

GUIDED_DRAWS = 40
"""Number of draws over which the share of random values rises from 0 to 1."""

CHECK_DRAWS = 2_000
"""Number of random draws in which each range and each choice must be valid once."""

SAMPLERS: dict[str, Callable[[int], BaseSampler]] = {
    "tpe": lambda seed: TPESampler(seed=seed),
    "nsga2": lambda seed: NSGAIISampler(seed=seed),
    "random": lambda seed: RandomSampler(seed=seed),
}
SamplerName = Literal["tpe", "nsga2", "random"]

Values = dict[str, Any]
"""Values of a job file by dotted path."""

Condition = dict[str, Annotated[tuple[Any, ...], MinLen(1)]]
"""Allowed values of earlier parameters, by dotted path."""

CheckValues = Callable[[Values], object]
"""Function that raises ValueError with the reason if values are not a valid job."""


@dataclass(frozen=True, kw_only=True)
class Range:
    """Range of numbers; integers if low, high and step are integers.

    Args:
        low: smallest value of a range.
        high: largest value of a range, included.
        step: distance between two values of a range. null allows every value.
        log: sample a range on a logarithmic scale; requires low > 0 and no step.
        when: values that earlier parameters must have, by dotted path, or this one is not sampled.
    """

    low: int | float
    high: int | float
    step: Annotated[int | float, Gt(0)] | None = None
    log: bool = False
    when: Condition = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise ValueError(f"low: got {self.low}, allowed: less than high, {self.high}, or the range is empty")
        if self.step is not None and self.step > self.high - self.low:
            raise ValueError(f"step: got {self.step}, allowed: up to high - low, {self.high - self.low}")
        if self.log and (self.low <= 0 or self.step is not None):
            raise ValueError(f"log: got true, with low {self.low}, step {self.step}, allowed: low > 0 and no step")

    @property
    def distribution(self) -> BaseDistribution:
        """The range as a distribution of Optuna."""
        # YAML writes 1 and 1.0 differently, and the difference is meant.
        if all(isinstance(number, int) for number in (self.low, self.high, self.step or 0)):
            return IntDistribution(int(self.low), int(self.high), log=self.log, step=int(self.step or 1))
        return FloatDistribution(self.low, self.high, log=self.log, step=self.step)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Choice of one of several values.

    Args:
        choices: list of values, instead of a range. A value may be a section or a list.
        when: values that earlier parameters must have, by dotted path, or this one is not sampled.
    """

    choices: Annotated[tuple[Any, ...], MinLen(1)]
    when: Condition = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(set(map(json.dumps, self.choices))) < len(self.choices):
            raise ValueError(f"choices: got {json.dumps(self.choices)}, allowed: each once")

    @property
    def distribution(self) -> BaseDistribution:
        """The choice as a distribution of Optuna."""
        return CategoricalDistribution([_to_optuna(value) for value in self.choices])


def _to_optuna(value: Any) -> Any:
    """Convert a value to one that Optuna can store: JSON for a section or a list."""
    return json.dumps(value) if isinstance(value, dict | list) else value


@dataclass(frozen=True)
class Space:
    """The parameters of a search by dotted path, in the order in which they are sampled."""

    params: Mapping[str, Range | Choice]

    def __post_init__(self) -> None:
        # A condition on a later parameter could never be true.
        earlier = set[str]()
        for name, param in self.params.items():
            if missing := param.when.keys() - earlier:
                allowed = ", ".join(earlier) or "none"
                raise ValueError(f"space.{name}.when: got {min(missing)}, allowed: parameters before it, {allowed}")
            earlier.add(name)

    def active_params(self, params: Mapping[str, Any]) -> Iterator[tuple[str, BaseDistribution]]:
        """Yield the parameters whose `when` is true; `params` may grow during the iteration."""
        for name, param in self.params.items():
            if all(
                other in params and params[other] in map(_to_optuna, values) for other, values in param.when.items()
            ):
                yield name, param.distribution

    def suggest(self, trial: Trial) -> Values:
        """Sample the values of a trial."""
        params = Values()
        # active_params reads `params`, so each value decides which parameters follow.
        for name, distribution in self.active_params(params):
            params[name] = _suggest(trial, name, distribution)
        return self.values(params)

    def values(self, params: Mapping[str, Any]) -> Values:
        """Convert the parameters of a trial, as Optuna stores them, to values of a job file."""
        # Optuna stores sections and lists as JSON; JSON as key also separates 1 from true.
        choices = {
            (name, json.dumps(_to_optuna(value))): value
            for name, param in self.params.items()
            if isinstance(param, Choice)
            for value in param.choices
        }
        return {name: choices.get((name, json.dumps(value)), value) for name, value in params.items()}


def _suggest(trial: Trial, name: str, distribution: BaseDistribution) -> Any:
    if isinstance(distribution, CategoricalDistribution):
        return trial.suggest_categorical(name, distribution.choices)
    if isinstance(distribution, IntDistribution):
        return trial.suggest_int(
            name, distribution.low, distribution.high, step=distribution.step, log=distribution.log
        )
    assert isinstance(distribution, FloatDistribution)
    return trial.suggest_float(name, distribution.low, distribution.high, step=distribution.step, log=distribution.log)


class FeasibleSampler(BaseSampler):
    """Sampler that draws all parameters together with another sampler, until they are a valid job.

    A sampler that models the objectives may propose invalid values again and again. So each further draw takes more of
    its values at random.

    Args:
        space: the search space.
        name: name of the other sampler.
        seed: seed of the search.
        check_values: raises ValueError if values are not a valid job.
    """

    def __init__(self, space: Space, name: SamplerName, seed: int, check_values: CheckValues) -> None:
        self.space = space
        self.make_sampler = SAMPLERS[name]
        self.seed = seed
        self.check_values = check_values

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return {name: param.distribution for name, param in self.space.params.items()}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Draw all parameters until they are a valid job; ValueError after MAX_DRAWS."""
        guided = self._make_sampler(trial)
        random = RandomSampler(seed=self._derive_seed(trial))
        problem: ValueError | None = None
        for number in range(MAX_DRAWS):
            params = self._draw(guided, random, number / GUIDED_DRAWS, study, trial)
            try:
                self.check_values(self.space.values(params))
            except ValueError as error:
                problem = error
            else:
                return params
        raise ValueError(
            f"space: got no valid job in {MAX_DRAWS} draws, allowed: a space with valid jobs; last error: {problem}"
        )

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self._make_sampler(trial).sample_independent(study, trial, param_name, param_distribution)

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None) -> None:
        self._make_sampler(trial).after_trial(study, trial, state, values)

    def _make_sampler(self, trial: FrozenTrial) -> BaseSampler:
        """Make a fresh sampler for each trial, because a continued search has no state of the earlier one."""
        return self.make_sampler(self._derive_seed(trial))

    def _derive_seed(self, trial: FrozenTrial) -> int:
        return int(np.random.SeedSequence([self.seed, trial.number]).generate_state(1)[0])

    def _draw(
        self, guided: BaseSampler, random: BaseSampler, random_share: float, study: Study, trial: FrozenTrial
    ) -> dict[str, Any]:
        """Draw all parameters once.

        Parameters that the trial has already, from a driver that ended while it sampled, keep their values.

        Args:
            guided: the sampler of the search.
            random: the random sampler.
            random_share: probability that a parameter is random; 1 or more for all.
            study: the study.
            trial: the trial.
        """
        # The random decisions come from the seeded sampler too, so a continued search repeats them.
        coin = FloatDistribution(0, 1)
        search_space = guided.infer_relative_search_space(study, trial) if random_share < 1 else {}
        relative = guided.sample_relative(study, trial, search_space)
        params: dict[str, Any] = {}
        for name, distribution in self.space.active_params(params):
            if name in trial.params:
                params[name] = trial.params[name]
            elif random.sample_independent(study, trial, name, coin) < random_share:
                params[name] = random.sample_independent(study, trial, name, distribution)
            elif name in relative:
                params[name] = relative[name]
            else:
                params[name] = guided.sample_independent(study, trial, name, distribution)
        return params


def check_space(space: Space, check_values: CheckValues) -> None:
    """Check that each range and each choice is part of a valid job in CHECK_DRAWS random draws.

    Finds keys that no job has, and ranges outside of what is possible.

    Args:
        space: the search space.
        check_values: raises ValueError if values are not a valid job.

    Raises:
        ValueError: a range or a choice is part of no valid job.
    """
    random = RandomSampler(seed=0)
    study = create_study()
    trial = create_trial(state=TrialState.RUNNING)

    def draw(fixed: Mapping[str, Any]) -> dict[str, Any]:
        params: dict[str, Any] = {}
        for name, distribution in space.active_params(params):
            params[name] = fixed[name] if name in fixed else random.sample_independent(study, trial, name, distribution)
        return params

    for name, param in space.params.items():
        # Each choice on its own, but a range as a whole: part of it may be invalid.
        cases = [{name: _to_optuna(value)} for value in param.choices] if isinstance(param, Choice) else [{}]
        for fixed in cases:
            draws = (draw(fixed) for _ in range(CHECK_DRAWS))
            if problem := _find_problem(space, check_values, name, draws):
                got = f"{param.low} to {param.high}" if isinstance(param, Range) else json.dumps(fixed[name])
                raise ValueError(
                    f"space.{name}: got {got}, allowed: values of a valid job; no job of {CHECK_DRAWS} draws is valid: "
                    f"{problem}"
                )


def _find_problem(space: Space, check_values: CheckValues, name: str, draws: Iterable[dict[str, Any]]) -> str:
    """Find why no draw with this parameter is a valid job; "" if one is."""
    problem = "its when is never true"
    for params in draws:
        # Its `when` is not true in this draw.
        if name not in params:
            continue
        try:
            check_values(space.values(params))
        except ValueError as error:
            problem = str(error)
        else:
            return ""
    return problem
