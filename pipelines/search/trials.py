"""A search's trials, kept in an Optuna study: which comes next, which lags behind, and how each one ended.

The study in its storage is all that a search remembers.  Whoever opens it goes on: what ended stays, what was under way
waits to be asked for first, with the number and values that it had, and the rungs of early stopping are there again.

    COMPLETE   has all objectives        PRUNED   stopped early, as it lagged behind
    FAIL       crashed, or lacks one     WAITING  not begun, or its driver ended

OptunaSearch, Ray's own bridge, tells a trial that was stopped early as COMPLETE with the value it then had, forgets the
rungs, and leaves trials of a dead driver RUNNING for good; so the study is asked and told here.
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
from pipelines.search.space import Choice, Drawing, Range, SamplerName, Space, Values

JOURNAL = "study.journal"
ENDED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
KEPT = ("reference", "losses", "step", "steps", "wall_s", "lags")
"""Of what is noted beside a trial, what goes on in the next try."""

HOPELESS = 3
"""Trials in a row that fail for good, before any succeeds, after which a search ends: it is not their values' fault."""


@dataclass(frozen=True, kw_only=True)
class Limit:
    """A bound for a metric: at_most or at_least."""

    at_most: float | None = None
    at_least: float | None = None

    def __post_init__(self) -> None:
        if (self.at_most is None) == (self.at_least is None):
            raise ValueError(f"at_most: got {self.at_most}, and at_least {self.at_least}, allowed: one of the two")

    @property
    def words(self) -> str:
        """Its sign and number."""
        return f"<= {self.at_most:g}" if self.at_most is not None else f">= {self.at_least:g}"

    def excess(self, value: float) -> float:
        """By how much the bound is broken; kept where that is 0 or less."""
        return value - self.at_most if self.at_most is not None else (self.at_least or 0) - value


@dataclass(frozen=True, kw_only=True)
class Prune:
    """When a trial is stopped early, by the loss of its last stage at the same step as others had.

    Only the loss counts, so it goes with objectives that follow the loss; what is worse but cheaper is stopped as well.

    method: "asha", asynchronous successive halving (arXiv 1810.05934): of those that came to a rung, the best one in
        `factor` goes on; rungs are at steps first, first x factor, first x factor^2, …  "median": those whose lowest
        loss so far is no higher than the median that complete trials had at that step, once there are five.
    every: steps between looks; the loss is the mean over them.
    """

    method: Literal["asha", "median"] = "asha"
    every: Annotated[int, Ge(1)] = 50
    first: Annotated[int, Ge(1)] = 100
    factor: Annotated[int, Ge(2)] = 3

    def __post_init__(self) -> None:
        if self.first % self.every:
            raise ValueError(f"first: got {self.first}, allowed: a multiple of every, {self.every}")

    def pruner(self) -> BasePruner:
        """Optuna's."""
        if self.method == "asha":
            return SuccessiveHalvingPruner(min_resource=self.first, reduction_factor=self.factor)
        return MedianPruner(n_warmup_steps=self.first - 1)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is searched, and how.

    num_trials: settings that are tried in all, references among them.
    max_concurrent_trials: trials under way at a time.
    seed: of the sampler; that of the job decides what every trial trains on, the same samples in the same order.
    sampler: "tpe" models which values are good (Optuna's), "nsga2" is evolution, "random" the yardstick for both.
    space: by dotted path of the job, in the order in which values are put there.
    references: settings to compare with, by name, each as values by dotted path.
    objectives: metrics, to be made as large or as small as can be.
    limits: of metrics.  One of what is known beforehand (flops, kv_bytes, …) is not drawn at all where it is broken.
    prune: null trains every trial to its end.
    retries: of a trial that crashes, from its own last checkpoint.
    storage: of the study, a URL as Optuna and its dashboard take; null is a journal in the search's folder.
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
class Try:
    """One trial to be run.  number: that of its first try, if it crashed before; what it left is under that."""

    number: int
    values: Values


Forecast = Callable[[Values], Mapping[str, float]]
"""From values to the metrics that are known beforehand; ValueError where the values make no job."""


def fit(settings: Settings, forecast: Forecast, values: Values) -> None:
    """ValueError where values make no job, or break a limit on what is known beforehand."""
    known = forecast(values)
    for name, limit in settings.limits.items():
        if name in known and limit.excess(known[name]) > 0:
            raise ValueError(f"{name}: got {known[name]:g}, allowed: {limit.words}")


class Trials:
    """The trials of one search, for the one driver that has it open."""

    def __init__(self, settings: Settings, name: str, folder: Path, forecast: Forecast) -> None:
        self.settings, self.forecast, self.space = settings, forecast, Space(settings.space)
        jsonl.drop_partial_line(folder / JOURNAL)
        self.storage = opened(settings, folder)
        self.study = _study(settings, name, self.storage, folder)
        self.study.sampler = Drawing(self.space, settings.sampler, settings.seed, partial(fit, settings, forecast))
        self.rungs = _Rungs(settings.prune, self._all()) if settings.prune else None
        self.live: dict[str, Trial] = {}
        self.begun: dict[str, float] = {}
        self.hopeless = ""
        self.open = True
        self.lock = threading.RLock()  # Tune has a thread of its own
        self._park()
        self._enqueue_references()
        self._enqueue_retries()

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune writes down what it is given, to restore it; here that is the study's part."""
        return {}

    def next(self, key: str) -> Try | None:
        """What to run next, under a key of the caller's; None where nothing is for now, or ever: see `finished`."""
        with self.lock:
            if len(self.live) >= self.settings.max_concurrent_trials or not self._left():
                return None
            trial = self.study.ask()
            reference = trial.user_attrs.get("reference")
            values = self.settings.references[reference] if reference else self.space.suggest(trial)
            self._note(trial, self.forecast(values))
            self.live[key], self.begun[key] = trial, time.monotonic()
            return Try(number=_first(trial), values=values)

    @property
    def finished(self) -> bool:
        """Whether nothing is under way, and nothing will be."""
        return not (self.live or self._left())

    def report(self, key: str, step: int, steps: int, loss: float) -> bool:
        """A trial has the loss at a step, of `steps`; returns whether it is to be stopped, as it lags behind."""
        with self.lock:
            if not self.open:
                return False
            trial = self.live[key]
            losses = trial.user_attrs.get("losses", {})
            if str(step) not in losses:  # a trial that goes on says again what it had said
                lags = self.rungs is not None and self.rungs.lags(_first(trial), step, loss)
                # a reference is there to be compared with, and after the last step there is little left to be saved
                if lags and "reference" not in trial.user_attrs and step < steps:
                    trial.set_user_attr("lags", True)
                told = {"losses": {**losses, str(step): loss}, "step": step, "steps": steps, "wall_s": self._spent(key)}
                for name, value in told.items():
                    trial.set_user_attr(name, value)
            return bool(trial.user_attrs.get("lags", False))

    def end(self, key: str, metrics: Mapping[str, float], error: str = "") -> None:
        """A trial is over: with these metrics, or stopped as it lagged behind, or by an error."""
        with self.lock:
            if not self.open:  # a driver that ends takes its trials along; they only wait
                return
            spent = self._spent(key)
            trial = self.live.pop(key)
            trial.set_user_attr("wall_s", spent)
            if trial.user_attrs.get("lags", False) and not metrics:
                self._tell(trial, TrialState.PRUNED)
                return
            if not error:
                metrics = {**trial.user_attrs.get("metrics", {}), **metrics}  # some are known since it was drawn
                self._note(trial, metrics)
                error = _lack(metrics, [*self.settings.objectives, *self.settings.limits])
            if error:
                self._fail(trial, error)
            else:
                self._tell(trial, TrialState.COMPLETE, [metrics[name] for name in self.settings.objectives])

    def close(self) -> None:
        """The driver ends; from here on nothing is told, and what is under way waits."""
        with self.lock:
            for key, trial in self.live.items():
                trial.set_user_attr("wall_s", self._spent(key))
            self.open = False
            self._park()

    @property
    def ended(self) -> list[list[FrozenTrial]]:
        """The tries of each setting that needs no more of them."""
        with self.lock:
            return [tries for tries in self._tries() if all(trial.state in ENDED for trial in tries)]

    def _all(self) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False)

    def _tries(self) -> list[list[FrozenTrial]]:
        """Trials of the same setting together: one, and those that tried it again."""
        result: dict[int, list[FrozenTrial]] = {}
        for trial in self._all():
            result.setdefault(_first(trial), []).append(trial)
        return list(result.values())

    def _left(self) -> bool:
        """Whether there is anything to run that is not under way."""
        if self.hopeless or not self.open:
            return False
        waiting = any(trial.state == TrialState.WAITING for trial in self._all())
        return waiting or len(self._tries()) < self.settings.num_trials

    def _park(self) -> None:
        """What is RUNNING waits: its driver is dead, or about to be."""
        for trial in self._all():
            if trial.state == TrialState.RUNNING:
                self.storage.set_trial_state_values(trial._trial_id, TrialState.WAITING)  # a study has no way to say so

    def _enqueue_references(self) -> None:
        there = {trial.user_attrs.get("reference") for trial in self._all()}
        for name in self.settings.references:
            if name not in there:
                self.study.enqueue_trial({}, user_attrs={"reference": name})

    def _enqueue_retries(self) -> None:
        """Those that failed are tried again, as often as they may be, under another number but from where they were."""
        for tries in self._tries():
            failed = tries[-1]
            if failed.state == TrialState.FAIL and len(tries) <= self.settings.retries:
                kept = {name: value for name, value in failed.user_attrs.items() if name in KEPT}
                self.study.enqueue_trial(failed.params, user_attrs={**kept, "retry_of": _first(failed)})

    def _note(self, trial: Trial, metrics: Mapping[str, float]) -> None:
        """Keep metrics beside the trial, and tell Optuna of limits on them as constraints."""
        trial.set_user_attr("metrics", dict(metrics))
        for name, limit in self.settings.limits.items():
            constraint = f"{name} {limit.words}"
            if math.isfinite(metrics.get(name, math.nan)) and constraint not in trial.constraints:
                trial.set_constraint(constraint, limit.excess(metrics[name]))

    def _spent(self, key: str) -> float:
        """Seconds that a trial has taken so far, under all drivers."""
        trial, now = self.live[key], time.monotonic()
        spent, self.begun[key] = now - self.begun[key], now
        return round(trial.user_attrs.get("wall_s", 0.0) + spent, 3)

    def _fail(self, trial: Trial, error: str) -> None:
        trial.set_user_attr("error", error)
        self._tell(trial, TrialState.FAIL)
        self._enqueue_retries()
        if all(tries[-1].state == TrialState.FAIL for tries in self.ended) and len(self.ended) >= HOPELESS:
            self.hopeless = f"trial {trial.number}, as all before it: {error}"

    def _tell(self, trial: Trial, state: TrialState, values: list[float] | None = None) -> None:
        self.study.tell(trial, values, state)
        if self.rungs:
            self.rungs.end(_first(trial), state)


class _Rungs:
    """Which trials lag behind, by Optuna's pruner.

    It has a study of losses to itself, in memory: objectives are others than the loss, and several have no pruning at
    all in Optuna.  The losses stand in the real study, from which it is filled again.
    """

    def __init__(self, prune: Prune, before: Sequence[FrozenTrial]) -> None:
        self.study = optuna.create_study(pruner=prune.pruner())
        self.trials: dict[int, Trial] = {}
        for trial in before:
            for step, loss in trial.user_attrs.get("losses", {}).items():
                self.lags(_first(trial), int(step), loss)
        for trial in before:
            self.end(_first(trial), trial.state)

    def lags(self, number: int, step: int, loss: float) -> bool:
        """Whether a trial with this loss is to be stopped; as of its number a trial says a step once."""
        if number not in self.trials:
            self.trials[number] = self.study.ask()
        trial = self.trials[number]
        known = self.study.trials[trial.number].intermediate_values
        if step in known:
            return False
        trial.report(loss, step)
        return trial.should_prune()

    def end(self, number: int, state: TrialState) -> None:
        """A trial is COMPLETE or PRUNED; one that failed is tried again or never was."""
        if number in self.trials and state in (TrialState.COMPLETE, TrialState.PRUNED):
            trial = self.trials[number]
            losses = self.study.trials[trial.number].intermediate_values
            self.study.tell(trial, losses[max(losses)] if state == TrialState.COMPLETE else None, state)


def opened(settings: Settings, folder: Path) -> BaseStorage:
    """Where the study is kept; ValueError where that cannot be opened."""
    if settings.storage is None:
        return JournalStorage(JournalFileBackend(str(folder / JOURNAL)))
    try:
        return get_storage(settings.storage)
    except Exception as error:  # SQLAlchemy's many: of the address, the driver, the password
        raise ValueError(f"storage: {' '.join(str(error).split())[:200]}") from None


def _study(settings: Settings, name: str, storage: BaseStorage, folder: Path) -> Study:
    """The study under a name, a new one or that of before; ValueError where that one is of another search."""
    names = list(settings.objectives)
    ways: dict[str, Literal["maximize", "minimize"]] = {"max": "maximize", "min": "minimize"}
    directions = [ways[way] for way in settings.objectives.values()]
    study = optuna.create_study(study_name=name, storage=storage, directions=directions, load_if_exists=True)
    there = dict(zip(study.metric_names or names, (way.name.lower() for way in study.directions), strict=False))
    if there != dict(zip(names, directions, strict=True)):
        raise ValueError(
            f"name: got {name}, whose study in storage is of {there}, allowed: another name, or its objectives"
        )
    with warnings.catch_warnings(action="ignore", category=optuna.exceptions.ExperimentalWarning):
        study.set_metric_names(names)
    place = _place(folder)
    if (theirs := study.user_attrs.setdefault("folder", place)) != place:
        raise ValueError(f"name: got {name}, whose study in storage is that of {theirs}, allowed: another name")
    study.set_user_attr("folder", place)
    return study


def _place(folder: Path) -> str:
    """Return the address of a search's folder, by which its study in a shared storage is known."""
    return f"{socket.gethostname()}:{folder}"


def discard(settings: Settings, name: str, folder: Path) -> None:
    """Delete the study of this search, if there is one and none of its trials has begun."""
    if settings.storage is None and not (folder / JOURNAL).exists():
        return
    storage = opened(settings, folder)
    try:
        study = optuna.load_study(study_name=name, storage=storage)
    except KeyError:
        return
    waiting = all(trial.state == TrialState.WAITING for trial in study.get_trials(deepcopy=False))
    if waiting and study.user_attrs.get("folder") == _place(folder):
        optuna.delete_study(study_name=name, storage=storage)


def find(settings: Settings, name: str, folder: Path) -> Study:
    """The study of a search, to be looked at; ValueError where there is none."""
    try:
        return optuna.load_study(study_name=name, storage=opened(settings, folder))
    except KeyError:
        raise ValueError(f"{folder}: no study {name} in {settings.storage or folder / JOURNAL}") from None


def _first(trial: FrozenTrial | Trial) -> int:
    """The number of a setting's first try."""
    return int(trial.user_attrs.get("retry_of", trial.number))


def _lack(metrics: Mapping[str, float], names: Sequence[str]) -> str:
    """What is not as it should be with the metrics of these names, or ""."""
    for name in names:
        if name not in metrics:
            return f"{name} was not reported, only {', '.join(sorted(metrics))}"
        if not math.isfinite(metrics[name]):
            return f"{name} was {metrics[name]}"
    return ""
