"""Results of a hyperparameter search as sentences, one page and one table, from its Optuna study alone.

Optuna decides which trials are best and how important a parameter is: `study.best_trials`, which respects constraints,
and PED-ANOVA.

A reference is a setting that is run for comparison. It counts like any trial: it can dominate others and be on the
front. It has no parameters, so plots and tables of parameters leave it out.

Cost: each trial is a row of the page and a mark of its plots. 40 trials of 12 parameters take one second and 130 kB,
400 trials three seconds and 600 kB.
"""

import csv
import io
import math
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from pipelines.core.words import pluralize
from pipelines.report import page
from pipelines.report.page import format_duration, format_percent
from pipelines.search import search_plots
from pipelines.search.snapshot import (
    Snapshot,
    format_parameter,
    get_number,
    get_reference,
    is_feasible,
    join_words,
    label_trial,
)
from redux.rounding import divide_up

STATE_WORDS = {
    TrialState.COMPLETE: "completed",
    TrialState.PRUNED: "stopped early",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "running",
    TrialState.WAITING: "waiting",
}
IDENTITY_FIELDS = ("number", "state", "reference", "retry_of")
EFFORT_FIELDS = ("step", "steps", "wall_s", "error")
MIN_TOP_TRIALS = 5
"""Minimum number of good trials for the importance of parameters, as Optuna's documentation recommends."""
MAX_LISTED_TRIALS = 5
"""Maximum number of trials that a sentence names."""


class TrialRow(NamedTuple):
    """A row of the table of trials, as texts; "" for what a trial lacks.

    Args:
        kind: "front", "reference" or a state in lower case, see `Snapshot.classify`.
        number: number of the trial.
        remarks: front, name of the reference, and trial that it retries.
        state: state, and step for a trial that did not complete.
        error: error message.
        values: one per objective.
        constraints: one per constraint.
        wall: time.
        params: one per parameter.
    """

    kind: str
    number: int
    remarks: str
    state: str
    error: str
    values: list[str]
    constraints: list[str]
    wall: str
    params: list[str]


def find_front(study: Study) -> list[FrozenTrial]:
    """Find the feasible complete trials, including references, that no other trial dominates.

    Returns:
        The trials, sorted by the first objective, the best first.
    """
    return Snapshot.from_study(study).front


def find_dominating(study: Study, name: str) -> list[FrozenTrial]:
    """Find the feasible trials at least as good as a reference in all objectives and better in one.

    Returns:
        The trials, sorted by the first objective, the best first.

    Raises:
        ValueError: no complete trial is a reference of this name.
    """
    return Snapshot.from_study(study).find_dominating(name)


def summarize_search(study: Study) -> list[str]:
    """Write the results so far as sentences."""
    return _write_summary(Snapshot.from_study(study))


def write_page(study: Study, folder: Path) -> Path:
    """Write `folder/search.html` and `folder/trials.csv`, each in one atomic step, and return the path of the page.

    The table has a row per trial. Trials that did not complete have no objectives in it.
    """
    snapshot = Snapshot.from_study(study)
    # Render both before writing: an error must not leave a page and a table of different times.
    text = _render(study, snapshot)
    table = _write_csv(snapshot)
    folder.mkdir(parents=True, exist_ok=True)
    page.write(folder / "trials.csv", table)
    return page.write(folder / "search.html", text)


def _render(study: Study, snapshot: Snapshot) -> str:
    planned, saved = snapshot.steps
    best = snapshot.front[0] if snapshot.front else None
    return page.render(
        "search.html.j2",
        search=snapshot,
        states=_count_states(snapshot),
        best=(format_parameter(best.values[0]), label_trial(best)) if best else None,
        saved=saved / planned if planned else 0,
        summary=_write_summary(snapshot),
        fronts=search_plots.plot_fronts(snapshot),
        histories=search_plots.plot_histories(snapshot),
        importances=_compute_importances(study, snapshot),
        top=MIN_TOP_TRIALS,
        parallel=search_plots.plot_parallel(snapshot),
        rows=_make_rows(snapshot),
    )


def _write_summary(snapshot: Snapshot) -> list[str]:
    return [
        _describe_trials(snapshot),
        _describe_best(snapshot),
        *_compare_references(snapshot),
        *_describe_effort(snapshot),
        *_warn_about_selection_bias(snapshot),
    ]


def _describe_trials(snapshot: Snapshot) -> str:
    if not snapshot.trials:
        return "There are no trials yet."
    retries = sum(trial.user_attrs.get("retry_of") is not None for trial in snapshot.trials)
    references = sum(get_reference(trial) is not None for trial in snapshot.trials)
    text = f"{pluralize(len(snapshot.trials), 'trial')}: {join_words(_count_states(snapshot))}."
    parts = []
    if retries:
        parts.append("1 retry of a crashed trial" if retries == 1 else f"{retries} retries of crashed trials")
    if references:
        parts.append(pluralize(references, "reference"))
    return f"{text} Among them: {join_words(parts)}." if parts else text


def _count_states(snapshot: Snapshot) -> list[str]:
    counts = Counter(trial.state for trial in snapshot.trials)
    return [f"{counts[state]} {word}" for state, word in STATE_WORDS.items() if counts[state]]


def _describe_best(snapshot: Snapshot) -> str:
    """Describe the best trials, and the trials outside the constraints."""
    constraints = join_words(snapshot.constraints) if snapshot.constraints else ""
    # Without a result to recommend, only the reason.
    if not snapshot.completed:
        return "No trial has completed yet, so there is nothing to compare."
    if not snapshot.feasible:
        return f"No completed trial is within all constraints ({constraints}), so none is recommended."
    front = snapshot.front
    if len(snapshot.objectives) == 1:
        text = f"Best: {_list_trials(front)} with {snapshot.format_objectives(front[0])}."
    else:
        verb = "is" if len(front) == 1 else "are"
        text = (
            f"{len(front)} of {pluralize(len(snapshot.feasible), 'trial')} {verb} on the front: "
            f"no other trial is at least as good in {join_words(snapshot.objectives)} and better in one of them."
        )
    infeasible = len(snapshot.completed) - len(snapshot.feasible)
    if infeasible:
        verb = "is" if infeasible == 1 else "are"
        text += f" {pluralize(infeasible, 'completed trial')} {verb} outside the constraints ({constraints})."
    return text


def _list_trials(trials: list[FrozenTrial]) -> str:
    names = [label_trial(trial) for trial in trials[:MAX_LISTED_TRIALS]]
    num_unlisted = len(trials) - MAX_LISTED_TRIALS
    return join_words([*names, f"{num_unlisted} more"] if num_unlisted > 0 else names)


def _compare_references(snapshot: Snapshot) -> list[str]:
    """Compare each reference with the trials that dominate it."""
    sentences = []
    for name in dict.fromkeys(name for trial in snapshot.trials if (name := get_reference(trial))):
        if name not in snapshot.references:
            sentences.append(f"Reference {name} has no values yet.")
            continue
        reference = snapshot.references[name]
        values = snapshot.format_objectives(reference)
        if not is_feasible(reference):
            values += "; outside the constraints"
        # With one objective, a trial that dominates is simply better.
        dominating = snapshot.find_dominating(name)
        is_plural = len(dominating) > 1
        if len(snapshot.objectives) == 1:
            verb = "are better" if is_plural else "is better"
        else:
            verb = "dominate it" if is_plural else "dominates it"
        count = pluralize(len(dominating), "trial") if dominating else "no trial"
        trials = f": {_list_trials(dominating)}" if dominating else ""
        sentences.append(f"Reference {name} ({values}): {count} {verb}{trials}.")
    return sentences


def _describe_effort(snapshot: Snapshot) -> list[str]:
    planned, saved = snapshot.steps
    sentences = []
    if snapshot.wall_s:
        sentences.append(f"All trials took {format_duration(snapshot.wall_s)} in total.")
    if planned:
        saved_percent = format_percent(saved / planned, 0)
        sentences.append(f"Early stopping saved {saved:,} of {planned:,} planned training steps, {saved_percent}.")
    return [" ".join(sentences)] if sentences else []


def _warn_about_selection_bias(snapshot: Snapshot) -> list[str]:
    if len(snapshot.feasible) < 2:
        return []
    return [
        "All values are from the questions that the search has used. "
        f"The best of {len(snapshot.feasible)} trials is partly the luckiest, so its value is too optimistic: "
        "evaluate it again, with questions and seeds that the search has not used."
    ]


def _write_csv(snapshot: Snapshot) -> str:
    """Write all trials as CSV: numbers with all digits, columns that depend only on names."""
    other_columns = {*IDENTITY_FIELDS, *snapshot.objectives, *snapshot.constraints, *snapshot.params, *EFFORT_FIELDS}
    metrics = sorted({name for trial in snapshot.trials for name in _get_metrics(trial)} - other_columns)
    # Metrics of the trials that are not objectives come after objectives and constraints.
    columns = [
        *IDENTITY_FIELDS,
        *snapshot.objectives,
        *snapshot.constraints,
        *metrics,
        *snapshot.params,
        *EFFORT_FIELDS,
    ]
    file = io.StringIO()
    writer = csv.DictWriter(file, list(dict.fromkeys(columns)), lineterminator="\n")
    writer.writeheader()
    for trial in snapshot.trials:
        attributes = {name: trial.user_attrs.get(name) for name in (*IDENTITY_FIELDS[2:], *EFFORT_FIELDS)}
        # Optuna keeps the last reported value of a pruned trial as its value; it is not a result.
        is_complete = trial.state == TrialState.COMPLETE
        values = dict(zip(snapshot.objectives, trial.values, strict=True)) if is_complete else {}
        other_metrics = {name: value for name, value in _get_metrics(trial).items() if name in metrics}
        identity = {"number": trial.number, "state": trial.state.name}
        # Of equal names the last one counts.
        writer.writerow(other_metrics | trial.params | trial.constraints | values | attributes | identity)
    return file.getvalue()


def _get_metrics(trial: FrozenTrial) -> Mapping[str, float]:
    return trial.user_attrs.get("metrics") or {}


def _make_rows(snapshot: Snapshot) -> list[TrialRow]:
    """Make the rows of the table: the front first, then the others by number."""
    # The front is sorted by the first objective.
    front = {trial.number for trial in snapshot.front}
    ordered = [*snapshot.front, *(trial for trial in snapshot.trials if trial.number not in front)]
    retries = {trial.user_attrs.get("retry_of"): trial.number for trial in snapshot.trials}
    return [_make_row(snapshot, trial, retries.get(trial.number)) for trial in ordered]


def _make_row(snapshot: Snapshot, trial: FrozenTrial, retry: int | None) -> TrialRow:
    """Make the row of a trial; `retry` is the number of the trial that retries it."""
    kind = snapshot.classify(trial)
    remarks = []
    if kind == "front":
        remarks.append("best" if len(snapshot.objectives) == 1 else "on the front")
    if name := get_reference(trial):
        remarks.append(name)
    if (retried_number := trial.user_attrs.get("retry_of")) is not None:
        remarks.append(f"retry of {retried_number}")
    # Optuna keeps the last reported value of a pruned trial as its value; it is not a result.
    is_complete = trial.state == TrialState.COMPLETE
    wall_s = get_number(trial, "wall_s")
    return TrialRow(
        kind=kind,
        number=trial.number,
        remarks=", ".join(remarks),
        state=_describe_state(trial) + (f", retried as {retry}" if retry is not None else ""),
        error=str(trial.user_attrs.get("error") or ""),
        values=[format_parameter(value) for value in trial.values] if is_complete else [""] * len(snapshot.objectives),
        constraints=[_describe_constraint(trial.constraints.get(name)) for name in snapshot.constraints],
        wall=format_duration(wall_s) if wall_s else "",
        params=[format_parameter(trial.params[name]) if name in trial.params else "" for name in snapshot.params],
    )


def _describe_state(trial: FrozenTrial) -> str:
    word = STATE_WORDS[trial.state]
    steps = int(get_number(trial, "steps"))
    if not steps or trial.state in (TrialState.COMPLETE, TrialState.WAITING):
        return word
    return f"{word} at step {int(get_number(trial, 'step')):,} of {steps:,}"


def _describe_constraint(excess: float | None) -> str:
    if excess is None:
        return ""
    return "met" if excess <= 0 else f"exceeded by {format_parameter(excess)}"


def _compute_importances(study: Study, snapshot: Snapshot) -> dict[str, dict[str, float]]:
    """Compute the importance of the parameters for each objective, the largest first; {} with too few trials."""
    return {name: _compute_importance(study, snapshot, index) for index, name in enumerate(snapshot.objectives)}


def _compute_importance(study: Study, snapshot: Snapshot, objective: int) -> dict[str, float]:
    """Compute how much each parameter separates the best tenth of the trials from all: PED-ANOVA, arXiv 2304.10255."""

    def loss(trial: FrozenTrial) -> float:
        # Optuna ignores trials with a loss that is not finite.
        return math.nan if get_reference(trial) else snapshot.minimized_values(trial)[objective]

    losses = [loss(trial) for trial in snapshot.sampled]
    top = max(MIN_TOP_TRIALS, divide_up(len(losses), 10))
    varied = {
        name
        for trial in snapshot.sampled
        for name, distribution in trial.distributions.items()
        if not distribution.single()
    }
    # If the worst value is among the best tenth, nothing separates the two.
    if not varied or len(losses) < 2 * MIN_TOP_TRIALS or sum(value < max(losses) for value in losses) < top:
        return {}
    # The quantile lies between two trials, so that exactly `top` are in the best part.
    evaluator = PedAnovaImportanceEvaluator(target_quantile=(top - 0.5) / len(losses))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Optuna warns that less is better, as intended here
        shares = get_param_importances(study, evaluator=evaluator, params=sorted(varied), target=loss)
    return dict(sorted(shares.items(), key=lambda share: (-share[1], share[0])))
