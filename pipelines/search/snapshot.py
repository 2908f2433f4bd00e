"""Snapshot of an Optuna study, from which all sentences, tables and plots of its page are made.

A running study changes between two reads, so it is read once, and the page shows one point in time. Optuna decides
which trials are best: the front is `study.best_trials`, which respects constraints.

`user_attrs` of a trial may have `reference` (name of a setting that is run for comparison, without parameters),
`retry_of` (number of a crashed trial), `metrics` {name: number}, `step` and `steps` (done and planned), `wall_s` and
`error`.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

from pipelines.report.page import format_number

SIGNIFICANT_DIGITS = 4


@dataclass(frozen=True)
class Snapshot:
    """A study at the time it was read.

    Args:
        name: name of the study.
        objectives: names of the objectives.
        signs: 1 for each objective that is minimised, -1 for each that is maximised.
        trials: all trials.
        front: feasible complete trials that no other trial dominates, sorted by the first objective, the best first.
    """

    name: str
    objectives: list[str]
    signs: list[int]
    trials: list[FrozenTrial]
    front: list[FrozenTrial]

    @classmethod
    def from_study(cls, study: Study) -> Self:
        # Optuna allows objectives without names.
        objectives = study.metric_names or [f"objective {number}" for number in range(1, len(study.directions) + 1)]
        signs = [-1 if direction == StudyDirection.MAXIMIZE else 1 for direction in study.directions]
        # A copy, so it may be sorted.
        front = study.best_trials
        snapshot = cls(study.study_name, objectives, signs, study.get_trials(deepcopy=False), front)
        front.sort(key=snapshot.sort_key)
        return snapshot

    def minimized_values(self, trial: FrozenTrial) -> list[float]:
        """Values of a trial with the sign changed where more is better, so that less is better."""
        return [sign * value for sign, value in zip(self.signs, trial.values, strict=True)]

    def format_objectives(self, trial: FrozenTrial) -> str:
        values = zip(self.objectives, trial.values, strict=True)
        return ", ".join(f"{name} {format_parameter(value)}" for name, value in values)

    def sort_key(self, trial: FrozenTrial) -> tuple[list[float], int]:
        """Sort key of a trial: the first objective, the best first, then the next objectives, then the number."""
        return self.minimized_values(trial), trial.number

    def find_dominating(self, name: str) -> list[FrozenTrial]:
        """Find the feasible trials that dominate a reference, sorted by the first objective, the best first."""
        if name not in self.references:
            allowed = ", ".join(self.references) or "none yet"
            raise ValueError(f"study {self.name}: got {name!r}, allowed: a reference that has values ({allowed})")
        reference = self.minimized_values(self.references[name])

        def dominates(trial: FrozenTrial) -> bool:
            pairs = list(zip(self.minimized_values(trial), reference, strict=True))
            return all(loss <= limit for loss, limit in pairs) and any(loss < limit for loss, limit in pairs)

        return sorted(filter(dominates, self.feasible), key=self.sort_key)

    def classify(self, trial: FrozenTrial) -> str:
        """Classify a trial as "front", "reference", or its state in lower case."""
        if any(trial.number == best.number for best in self.front):
            return "front"
        return "reference" if get_reference(trial) else trial.state.name.lower()

    @property
    def completed(self) -> list[FrozenTrial]:
        return [trial for trial in self.trials if trial.state == TrialState.COMPLETE]

    @property
    def feasible(self) -> list[FrozenTrial]:
        """Completed trials within all constraints."""
        return [trial for trial in self.completed if is_feasible(trial)]

    @property
    def plottable(self) -> list[FrozenTrial]:
        """Completed trials with finite values."""
        return [trial for trial in self.completed if all(map(math.isfinite, trial.values))]

    @property
    def sampled(self) -> list[FrozenTrial]:
        """Plottable trials with parameters that the search has sampled, without references."""
        return [trial for trial in self.plottable if not get_reference(trial)]

    @property
    def references(self) -> dict[str, FrozenTrial]:
        """Completed references by name; of several trials of a reference, the last one."""
        return {name: trial for trial in self.completed if (name := get_reference(trial))}

    @property
    def constraints(self) -> list[str]:
        return sorted({name for trial in self.trials for name in trial.constraints})

    @property
    def params(self) -> list[str]:
        return sorted({name for trial in self.trials for name in trial.params})

    @property
    def steps(self) -> tuple[int, int]:
        """Planned training steps of all trials, and the steps that early stopping saved."""
        # Completed trials have done all steps, failed ones are retried.
        pruned = [trial for trial in self.trials if trial.state == TrialState.PRUNED]
        planned = sum(int(get_number(trial, "steps")) for trial in self.last_attempts)
        return planned, sum(int(get_number(trial, "steps") - get_number(trial, "step")) for trial in pruned)

    @property
    def wall_s(self) -> float:
        return sum(get_number(trial, "wall_s") for trial in self.last_attempts)

    @property
    def last_attempts(self) -> list[FrozenTrial]:
        """The last trial of each setting; its time and steps include those of earlier attempts."""
        # Later trials replace earlier ones of the same setting.
        return list({trial.user_attrs.get("retry_of", trial.number): trial for trial in self.trials}.values())


def is_feasible(trial: FrozenTrial) -> bool:
    return all(value <= 0 for value in trial.constraints.values())


def get_reference(trial: FrozenTrial) -> str | None:
    """Name of the reference that a trial is a run of, or None."""
    return trial.user_attrs.get("reference")


def get_number(trial: FrozenTrial, name: str) -> float:
    """A number of the trial's `user_attrs`, 0 if there is none."""
    return trial.user_attrs.get(name) or 0


def label_trial(trial: FrozenTrial) -> str:
    return get_reference(trial) or f"trial {trial.number}"


def format_parameter(value: object) -> str:
    """Format a parameter or an objective with four significant digits."""
    return format_number(value, SIGNIFICANT_DIGITS)


def join_words(words: Iterable[str]) -> str:
    """Join words with commas and "and".

    >>> join_words(["a", "b", "c"])
    'a, b and c'
    """
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last
