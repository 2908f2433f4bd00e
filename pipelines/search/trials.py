"""Trials of a search in an Optuna study: the next trial, early stopping, and results.

The study in its storage is the only state of a search, so any driver can continue it. Finished trials stay. Trials that
were running wait and come first, with the same number and values. The rungs of early stopping are restored.

    COMPLETE   has all objectives          PRUNED   stopped early
    FAIL       crashed or lacks a metric   WAITING  not started, or its driver ended

Ray's OptunaSearch is not used. It marks a trial that was stopped early as COMPLETE with its last value, forgets the
rungs, and leaves trials of a dead driver in state RUNNING.
"""

import math
import socket
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import optuna
from annotated_types import Ge, Lt, MinLen
from optuna import Study
from optuna.pruners import BasePruner, MedianPruner, SuccessiveHalvingPruner
from optuna.storages import BaseStorage, JournalStorage, get_storage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, Trial, TrialState

from pipelines.core import jsonl
from pipelines.search.space import Choice, FeasibleSampler, Range, SamplerName, Space, Values

JOURNAL_FILE = "study.journal"
ENDED_STATES = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
STOP_EARLY = "lags"
"""Key in the `user_attrs` of a trial that is to be stopped early."""

RETRIED_ATTRIBUTES = ("reference", "losses", "step", "steps", "wall_s", STOP_EARLY)
"""`user_attrs` of a failed trial that its retry continues with."""

MAX_CONSECUTIVE_FAILURES = 3
"""Number of settings that may fail, before any succeeds, until the search ends: the cause is not in their values."""


@dataclass(frozen=True, kw_only=True)
class Limit:
    """Limit of a metric. Exactly one of the two keys is set.

    Args:
        at_most: largest allowed value.
        at_least: smallest allowed value.
    """

    at_most: float | None = None
    at_least: float | None = None

    def __post_init__(self) -> None:
        if (self.at_most is None) == (self.at_least is None):
            raise ValueError(f"at_most: got {self.at_most}, and at_least {self.at_least}, allowed: one of the two")

    @property
    def text(self) -> str:
        """The limit as a comparison, such as "<= 30"."""
        return f"<= {self.at_most:g}" if self.at_most is not None else f">= {self.at_least:g}"

    def excess(self, value: float) -> float:
        """Compute by how much a value exceeds the limit; 0 or less if it does not."""
        return value - self.at_most if self.at_most is not None else (self.at_least or 0) - value


@dataclass(frozen=True, kw_only=True)
class Prune:
    """Early stopping of trials, by the loss of their last stage at the same step.

    Only the loss counts, so early stopping suits objectives that follow the loss. It also stops trials that have a
    higher loss but lower costs.

    Args:
        method: "asha" (arXiv 1810.05934) continues the best 1 / `factor` of the trials at the steps first, first x
            factor, first x factor^2, … "median" stops trials whose lowest loss so far is above the median of the
            completed trials at that step, once there are five.
        every: number of steps between two checks; the loss is the mean over them.
        first: step of the first check, a multiple of `every`.
        factor: reduction factor of "asha".
    """

    method: Literal["asha", "median"] = "asha"
    every: Annotated[int, Ge(1)] = 50
    first: Annotated[int, Ge(1)] = 100
    factor: Annotated[int, Ge(2)] = 3

    def __post_init__(self) -> None:
        if self.first % self.every:
            raise ValueError(f"first: got {self.first}, allowed: a multiple of every, {self.every}")

    def make_pruner(self) -> BasePruner:
        """Make the pruner of Optuna."""
        if self.method == "asha":
            return SuccessiveHalvingPruner(min_resource=self.first, reduction_factor=self.factor)
        return MedianPruner(n_warmup_steps=self.first - 1)


@dataclass(frozen=True, kw_only=True)
class SearchSettings:
    """Search space, objectives and resources of a search.

    Args:
        num_trials: number of settings that are tried, including references; retries do not count.
        max_concurrent_trials: number of trials that run at the same time.
        seed: seed of the sampler. The seed of the job decides the training data, the same for all trials.
        sampler: "tpe" models which values are good (Optuna's default), "nsga2" is an evolutionary algorithm, "random"
            samples at random, as a baseline for both.
        space: the parameters by dotted path of a key of the job, in the order in which they are sampled.
        references: trials to compare with, by name, each as values by dotted path. They run first.
        objectives: metrics and their direction, "max" or "min".
        limits: limits of metrics. If a limit is on a cost of the model (flops, kv_bytes, …), only values within it are
            sampled.
        prune: early stopping. null trains every trial to its end.
        retries: number of retries of a crashed trial, from its last checkpoint.
        storage: URL of the storage of the Optuna study. null is a journal file in the folder of the search.
    """

    num_trials: Annotated[int, Ge(1)]
    max_concurrent_trials: Annotated[int, Ge(1)] = 1
    seed: Annotated[int, Ge(0), Lt(2**32)] = 0
    sampler: SamplerName = "tpe"
    space: Annotated[dict[str, Range | Choice], MinLen(1)]
    references: dict[str, Values] = field(default_factory=dict)
    objectives: Annotated[dict[str, Literal["max", "min"]], MinLen(1)]
    limits: dict[str, Limit] = field(default_factory=dict)
    prune: Prune | None = None
    retries: Annotated[int, Ge(0)] = 1
    storage: str | None = None

    def __post_init__(self) -> None:
        Space(self.space)
        if self.num_trials <= len(self.references):
            raise ValueError(
                f"num_trials: got {self.num_trials}, allowed: more than the {len(self.references)} references"
            )


@dataclass(frozen=True, kw_only=True)
class TrialSpec:
    """A trial to run.

    Args:
        number: number of the first attempt at this setting, which names the run folder.
        values: values of the job by dotted path.
    """

    number: int
    values: Values


ComputeCosts = Callable[[Values], Mapping[str, float]]
"""Function from values to the metrics that are known before training; ValueError if the values are not a valid job."""


def check_feasible(settings: SearchSettings, compute_costs: ComputeCosts, values: Values) -> None:
    """Raise ValueError if values are not a valid job, or exceed a limit of a metric that is known before training."""
    costs = compute_costs(values)
    for name, limit in settings.limits.items():
        if name in costs and limit.excess(costs[name]) > 0:
            raise ValueError(f"{name}: got {costs[name]:g}, allowed: {limit.text}")


class Trials:
    """The trials of a search. Only one driver may have it open.

    Args:
        settings: settings of the search.
        name: name of the study.
        folder: folder of the search.
        compute_costs: computes the metrics that are known before training.
    """

    def __init__(self, settings: SearchSettings, name: str, folder: Path, compute_costs: ComputeCosts) -> None:
        self.settings = settings
        self.compute_costs = compute_costs
        self.space = Space(settings.space)
        # A driver that was killed may leave half a line.
        jsonl.drop_partial_line(folder / JOURNAL_FILE)
        self.storage = open_storage(settings, folder)
        self.study = _open_study(settings, name, self.storage, folder)
        check_values = partial(check_feasible, settings, compute_costs)
        self.study.sampler = FeasibleSampler(self.space, settings.sampler, settings.seed, check_values)
        self.rungs = _Rungs(settings.prune, self._all_trials()) if settings.prune else None
        self.running: dict[str, Trial] = {}
        self.started_at: dict[str, float] = {}
        self.failure_reason = ""
        self.is_open = True
        self.lock = threading.RLock()  # Tune calls from a thread of its own
        # The order decides which trials come first: interrupted ones, then references, then retries.
        self._requeue_running()
        self._enqueue_references()
        self._enqueue_retries()

    def __getstate__(self) -> dict[str, Any]:
        """Pickle nothing: Tune saves its searcher to restore it, but here the study is restored from its storage."""
        return {}

    def next_trial(self, key: str) -> TrialSpec | None:
        """Start the next trial under a key of the caller; None if there is none now, or ever: see `is_finished`."""
        with self.lock:
            if len(self.running) >= self.settings.max_concurrent_trials or not self._has_remaining():
                return None
            trial = self.study.ask()
            reference = trial.user_attrs.get("reference")
            values = self.settings.references[reference] if reference else self.space.suggest(trial)
            self._set_metrics(trial, self.compute_costs(values))
            self.running[key] = trial
            self.started_at[key] = time.monotonic()
            return TrialSpec(number=_first_number(trial), values=values)

    @property
    def is_finished(self) -> bool:
        """True if no trial is running or remains."""
        return not (self.running or self._has_remaining())

    def report_loss(self, key: str, step: int, steps: int, loss: float) -> bool:
        """Report the loss of a running trial.

        Args:
            key: key of the trial.
            step: current step.
            steps: number of all steps.
            loss: mean loss since the last report.

        Returns:
            True if the trial is to be stopped early.
        """
        with self.lock:
            if not self.is_open:
                return False
            trial = self.running[key]
            losses = trial.user_attrs.get("losses", {})
            if str(step) not in losses:  # A continued trial repeats its earlier reports
                should_stop = self.rungs is not None and self.rungs.should_stop(_first_number(trial), step, loss)
                # References are needed for comparison; after the last step nothing is saved.
                if should_stop and "reference" not in trial.user_attrs and step < steps:
                    trial.set_user_attr(STOP_EARLY, True)
                wall_s = self._measure_time(key)
                attributes = {"losses": {**losses, str(step): loss}, "step": step, "steps": steps, "wall_s": wall_s}
                for name, value in attributes.items():
                    trial.set_user_attr(name, value)
            return bool(trial.user_attrs.get(STOP_EARLY, False))

    def finish(self, key: str, metrics: Mapping[str, float], error: str = "") -> None:
        """Finish a running trial as COMPLETE, PRUNED or FAIL.

        Args:
            key: key of the trial.
            metrics: its metrics; {} if it was stopped early or failed.
            error: error message.
        """
        with self.lock:
            if not self.is_open:  # The driver is ending and its trials end with it; they wait for the next driver
                return
            wall_s = self._measure_time(key)
            trial = self.running.pop(key)
            trial.set_user_attr("wall_s", wall_s)
            # A trial may crash while it stops early: that is not a failure.
            if trial.user_attrs.get(STOP_EARLY, False) and not metrics:
                self._finish_in_study(trial, TrialState.PRUNED)
                return
            if not error:
                metrics = {**trial.user_attrs.get("metrics", {}), **metrics}  # Costs are known since the trial started
                self._set_metrics(trial, metrics)
                error = _describe_missing(metrics, [*self.settings.objectives, *self.settings.limits])
            if error:
                self._fail(trial, error)
            else:
                self._finish_in_study(trial, TrialState.COMPLETE, [metrics[name] for name in self.settings.objectives])

    def close(self) -> None:
        """End this driver: running trials wait for the next one, and later calls of `finish` have no effect."""
        with self.lock:
            for key, trial in self.running.items():
                trial.set_user_attr("wall_s", self._measure_time(key))
            self.is_open = False
            self._requeue_running()

    @property
    def ended_attempts(self) -> list[list[FrozenTrial]]:
        """All attempts of each setting that needs no further attempt."""
        with self.lock:
            return [
                attempts
                for attempts in self._group_attempts()
                if all(trial.state in ENDED_STATES for trial in attempts)
            ]

    def _all_trials(self) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False)

    def _group_attempts(self) -> list[list[FrozenTrial]]:
        """Group the trials by setting: the first attempt and its retries."""
        attempts: dict[int, list[FrozenTrial]] = {}
        for trial in self._all_trials():
            attempts.setdefault(_first_number(trial), []).append(trial)
        return list(attempts.values())

    def _has_remaining(self) -> bool:
        """Return True if there is a trial to run that is not running."""
        if self.failure_reason or not self.is_open:
            return False
        is_waiting = any(trial.state == TrialState.WAITING for trial in self._all_trials())
        return is_waiting or len(self._group_attempts()) < self.settings.num_trials

    def _requeue_running(self) -> None:
        """Set RUNNING trials to WAITING, because their driver has ended or is ending."""
        for trial in self._all_trials():
            if trial.state == TrialState.RUNNING:
                # Optuna's Study has no public method for this.
                self.storage.set_trial_state_values(trial._trial_id, TrialState.WAITING)

    def _enqueue_references(self) -> None:
        existing = {trial.user_attrs.get("reference") for trial in self._all_trials()}
        for name in self.settings.references:
            if name not in existing:
                self.study.enqueue_trial({}, user_attrs={"reference": name})

    def _enqueue_retries(self) -> None:
        """Enqueue failed trials again, up to `retries` times, with a new number and the run folder of the first."""
        for attempts in self._group_attempts():
            last = attempts[-1]
            if last.state == TrialState.FAIL and len(attempts) <= self.settings.retries:
                attributes = {name: value for name, value in last.user_attrs.items() if name in RETRIED_ATTRIBUTES}
                self.study.enqueue_trial(last.params, user_attrs={**attributes, "retry_of": _first_number(last)})

    def _set_metrics(self, trial: Trial, metrics: Mapping[str, float]) -> None:
        """Store metrics of a trial, and the limits on them as constraints of Optuna."""
        trial.set_user_attr("metrics", dict(metrics))
        for name, limit in self.settings.limits.items():
            constraint = f"{name} {limit.text}"
            if math.isfinite(metrics.get(name, math.nan)) and constraint not in trial.constraints:
                trial.set_constraint(constraint, limit.excess(metrics[name]))

    def _measure_time(self, key: str) -> float:
        """Measure the seconds of a trial so far, under all drivers."""
        trial = self.running[key]
        current = time.monotonic()
        elapsed = current - self.started_at[key]
        self.started_at[key] = current
        return round(trial.user_attrs.get("wall_s", 0.0) + elapsed, 3)

    def _fail(self, trial: Trial, error: str) -> None:
        trial.set_user_attr("error", error)
        self._finish_in_study(trial, TrialState.FAIL)
        self._enqueue_retries()
        ended_attempts = self.ended_attempts
        all_failed = all(attempts[-1].state == TrialState.FAIL for attempts in ended_attempts)
        if all_failed and len(ended_attempts) >= MAX_CONSECUTIVE_FAILURES:
            self.failure_reason = f"trial {trial.number}, like all before it: {error}"

    def _finish_in_study(self, trial: Trial, state: TrialState, values: list[float] | None = None) -> None:
        self.study.tell(trial, values, state)
        if self.rungs:
            self.rungs.finish(_first_number(trial), state)


class _Rungs:
    """Early stopping by a pruner of Optuna, on an in-memory study of losses.

    The pruner needs a study of its own: the objectives of the search are not the loss, and Optuna has no pruning for
    several objectives. The real study stores the losses, from which this study is filled again.
    """

    def __init__(self, prune: Prune, trials: Sequence[FrozenTrial]) -> None:
        self.study = optuna.create_study(pruner=prune.make_pruner())
        self.trials: dict[int, Trial] = {}
        # First all losses, then all ends: the decisions of the pruner are stored in the real study.
        for trial in trials:
            for step, loss in trial.user_attrs.get("losses", {}).items():
                self.should_stop(_first_number(trial), int(step), loss)
        for trial in trials:
            self.finish(_first_number(trial), trial.state)

    def should_stop(self, number: int, step: int, loss: float) -> bool:
        """Return True if a trial with this loss is to be stopped; False for a step that was already reported."""
        if number not in self.trials:
            self.trials[number] = self.study.ask()
        trial = self.trials[number]
        reported = self.study.trials[trial.number].intermediate_values
        if step in reported:
            return False
        trial.report(loss, step)
        return trial.should_prune()

    def finish(self, number: int, state: TrialState) -> None:
        """Finish a trial that is COMPLETE or PRUNED; a failed one stays, because it may be retried."""
        if number in self.trials and state in (TrialState.COMPLETE, TrialState.PRUNED):
            trial = self.trials[number]
            losses = self.study.trials[trial.number].intermediate_values
            self.study.tell(trial, losses[max(losses)] if state == TrialState.COMPLETE else None, state)


def open_storage(settings: SearchSettings, folder: Path) -> BaseStorage:
    """Open the storage of the study; ValueError if that fails."""
    if settings.storage is None:
        return JournalStorage(JournalFileBackend(str(folder / JOURNAL_FILE)))
    try:
        return get_storage(settings.storage)
    except Exception as error:  # SQLAlchemy raises many classes: for the address, the driver, the password
        raise ValueError(f"storage: {' '.join(str(error).split())[:200]}") from None


def _open_study(settings: SearchSettings, name: str, storage: BaseStorage, folder: Path) -> Study:
    """Open the study of this name or create it; ValueError if it belongs to another search."""
    objectives = list(settings.objectives)
    optuna_names: dict[str, Literal["maximize", "minimize"]] = {"max": "maximize", "min": "minimize"}
    directions = [optuna_names[direction] for direction in settings.objectives.values()]
    study = optuna.create_study(study_name=name, storage=storage, directions=directions, load_if_exists=True)
    # An existing study keeps its objectives, so compare them.
    stored_directions = (direction.name.lower() for direction in study.directions)
    stored_objectives = dict(zip(study.metric_names or objectives, stored_directions, strict=False))
    if stored_objectives != dict(zip(objectives, directions, strict=True)):
        raise ValueError(
            f"name: got {name}, whose stored study has {stored_objectives}, allowed: another name, or its objectives"
        )
    with warnings.catch_warnings(action="ignore", category=optuna.exceptions.ExperimentalWarning):
        study.set_metric_names(objectives)
    # A shared storage may have a study of the same name from another folder.
    address = _folder_address(folder)
    owner = study.user_attrs.setdefault("folder", address)
    if owner != address:
        raise ValueError(f"name: got {name}, whose study in storage is that of {owner}, allowed: another name")
    study.set_user_attr("folder", address)
    return study


def _folder_address(folder: Path) -> str:
    """Make the address of a search folder, which identifies its study in a shared storage."""
    return f"{socket.gethostname()}:{folder}"


def discard_study(settings: SearchSettings, name: str, folder: Path) -> None:
    """Delete the study of this search, if there is one and none of its trials has started."""
    if settings.storage is None and not (folder / JOURNAL_FILE).exists():
        return
    storage = open_storage(settings, folder)
    try:
        study = optuna.load_study(study_name=name, storage=storage)
    except KeyError:
        return
    all_waiting = all(trial.state == TrialState.WAITING for trial in study.get_trials(deepcopy=False))
    if all_waiting and study.user_attrs.get("folder") == _folder_address(folder):
        optuna.delete_study(study_name=name, storage=storage)


def load_study(settings: SearchSettings, name: str, folder: Path) -> Study:
    """Load the study of a search to read it; ValueError if there is none."""
    try:
        return optuna.load_study(study_name=name, storage=open_storage(settings, folder))
    except KeyError:
        raise ValueError(f"{folder}: no study {name} in {settings.storage or folder / JOURNAL_FILE}") from None


def _first_number(trial: FrozenTrial | Trial) -> int:
    """Number of the first attempt at the setting of a trial."""
    return int(trial.user_attrs.get("retry_of", trial.number))


def _describe_missing(metrics: Mapping[str, float], names: Sequence[str]) -> str:
    """Describe the first of these metrics that is missing or not finite; "" if there is none."""
    for name in names:
        if name not in metrics:
            return f"{name} was not reported, only {', '.join(sorted(metrics))}"
        if not math.isfinite(metrics[name]):
            return f"{name} was {metrics[name]}"
    return ""
