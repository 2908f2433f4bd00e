"""An Optuna study as it stood when it was read: what `front` tells of it and `panels` draws.

A study under way changes from one look to the next, so it is read once, and everything on a page is of that moment.
Which trials are good is for Optuna to say: the front is `study.best_trials`, which knows constraints.

A trial's `user_attrs` may hold `reference`, the name of a setting which is run for comparison and has no parameters,
`retry_of`, the number of a trial that crashed, `metrics` {name: number}, `step` and `steps`, done and planned, `wall_s`
and `error`.
"""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Self

from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

LETTERS = {"T": 1e12, "G": 1e9, "M": 1e6}


@dataclass(frozen=True)
class Snapshot:
    """A study as it stood when it was read.

    names, signs: how each objective is called, and what makes less of it better: 1, or -1 where it is maximised.
    front: feasible complete trials that no other dominates, the best in the first objective first.
    """

    name: str
    names: list[str]
    signs: list[int]
    trials: list[FrozenTrial]
    front: list[FrozenTrial]

    @classmethod
    def of(cls, study: Study) -> Self:
        names = study.metric_names or [f"objective {place}" for place in range(1, len(study.directions) + 1)]
        signs = [-1 if direction == StudyDirection.MAXIMIZE else 1 for direction in study.directions]
        best = study.best_trials
        found = cls(study.study_name, names, signs, study.get_trials(deepcopy=False), best)
        best.sort(key=found.rank)
        return found

    def losses(self, trial: FrozenTrial) -> list[float]:
        """Its values, turned so that less is better."""
        return [sign * value for sign, value in zip(self.signs, trial.values, strict=True)]

    def told(self, trial: FrozenTrial) -> str:
        return ", ".join(f"{name} {brief(value)}" for name, value in zip(self.names, trial.values, strict=True))

    def rank(self, trial: FrozenTrial) -> tuple[list[float], int]:
        """Sorts by the first objective, the best first; trials that are alike by the next, at last by number."""
        return self.losses(trial), trial.number

    def dominating(self, name: str) -> list[FrozenTrial]:
        """As `front.dominating`."""
        if name not in self.references:
            known = ", ".join(self.references) or "none yet"
            raise ValueError(f"study {self.name}: got {name!r}, allowed: a reference that has values ({known})")
        bar = self.losses(self.references[name])

        def better(trial: FrozenTrial) -> bool:
            pairs = list(zip(self.losses(trial), bar, strict=True))
            return all(ours <= theirs for ours, theirs in pairs) and any(ours < theirs for ours, theirs in pairs)

        return sorted(filter(better, self.kept), key=self.rank)

    def kind(self, trial: FrozenTrial) -> str:
        """front, reference, or what became of it."""
        if any(trial.number == best.number for best in self.front):
            return "front"
        return "reference" if reference(trial) else trial.state.name.lower()

    @property
    def done(self) -> list[FrozenTrial]:
        return [trial for trial in self.trials if trial.state == TrialState.COMPLETE]

    @property
    def kept(self) -> list[FrozenTrial]:
        """Done, and within every constraint."""
        return [trial for trial in self.done if feasible(trial)]

    @property
    def drawn(self) -> list[FrozenTrial]:
        """Done, with values that have a place in a plot."""
        return [trial for trial in self.done if all(map(math.isfinite, trial.values))]

    @property
    def searched(self) -> list[FrozenTrial]:
        """Those drawn which the search chose itself."""
        return [trial for trial in self.drawn if not reference(trial)]

    @property
    def references(self) -> dict[str, FrozenTrial]:
        """By name; of one that was run several times the last that is done."""
        return {name: trial for trial in self.done if (name := reference(trial))}

    @property
    def constraints(self) -> list[str]:
        return sorted({name for trial in self.trials for name in trial.constraints})

    @property
    def params(self) -> list[str]:
        return sorted({name for trial in self.trials for name in trial.params})

    @property
    def steps(self) -> tuple[int, int]:
        """Training steps that all trials planned, and how many of these stopping early left out."""
        early = [trial for trial in self.trials if trial.state == TrialState.PRUNED]
        planned = sum(int(amount(trial, "steps")) for trial in self.last_tries)
        return planned, sum(int(amount(trial, "steps") - amount(trial, "step")) for trial in early)

    @property
    def wall_s(self) -> float:
        return sum(amount(trial, "wall_s") for trial in self.last_tries)

    @property
    def last_tries(self) -> list[FrozenTrial]:
        """Of each setting the last trial: what those before it spent counts in that one."""
        return list({trial.user_attrs.get("retry_of", trial.number): trial for trial in self.trials}.values())


def feasible(trial: FrozenTrial) -> bool:
    return all(value <= 0 for value in trial.constraints.values())


def reference(trial: FrozenTrial) -> str | None:
    return trial.user_attrs.get("reference")


def amount(trial: FrozenTrial, name: str) -> float:
    """A number of its `user_attrs`, 0 where there is none."""
    return trial.user_attrs.get(name) or 0


def called(trial: FrozenTrial) -> str:
    return reference(trial) or f"trial {trial.number}"


def brief(value: Any) -> str:
    """Four digits, millions and more by their letter, other values as in a job file: 0.9134, 9,673, 212.3 M, true."""
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    if not isinstance(value, int | float) or not math.isfinite(value):
        return str(value)
    for letter, size in LETTERS.items():
        if abs(value) >= size:
            return f"{value / size:.4g} {letter}"
    return f"{value:,.0f}" if isinstance(value, int) or abs(value) >= 1000 else f"{value:.4g}"


def listed(words: Iterable[str]) -> str:
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last


def many(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"
