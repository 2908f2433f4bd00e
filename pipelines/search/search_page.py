"""What a hyperparameter search has found so far, as sentences, one page and one table, from its Optuna study alone.

Which trials are good and how much a parameter matters is for Optuna to say: `study.best_trials`, which knows
constraints, and PED-ANOVA.

A reference, that is a setting which is run for comparison, counts as any trial does: it can dominate, and lie on the
front.  It has no parameters, so where these are shown it is left out.

Cost: every trial is a row of the page and a mark of its plots; 40 trials of 12 parameters take one second and 130 kB,
400 take three and 600 kB.
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

from pipelines.report import page
from pipelines.report.page import duration, percent
from pipelines.search import search_plots
from pipelines.search.snapshot import Snapshot, amount, brief, called, feasible, listed, many, reference

STATES = {
    TrialState.COMPLETE: "done",
    TrialState.PRUNED: "stopped early",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "running",
    TrialState.WAITING: "waiting",
}
OWN = ("number", "state", "reference", "retry_of")
EFFORT = ("step", "steps", "wall_s", "error")
TOP = 5
"""How many trials stand for a good result when parameters are weighed; Optuna's documentation wants no fewer."""
LISTED = 5


class Line(NamedTuple):
    """A row of the table of trials, in words; what there is not is empty."""

    kind: str
    number: int
    about: str
    state: str
    error: str
    values: list[str]
    constraints: list[str]
    wall: str
    params: list[str]


def front(study: Study) -> list[FrozenTrial]:
    """Feasible complete trials that no other dominates, references among them; best in the first objective first."""
    return Snapshot.of(study).front


def dominating(study: Study, name: str) -> list[FrozenTrial]:
    """Feasible trials as good as a reference in every objective and better in one; best in the first objective first.

    ValueError if no complete trial is a reference of that name.
    """
    return Snapshot.of(study).dominating(name)


def summary(study: Study) -> list[str]:
    """What came out so far, in sentences."""
    return _summary(Snapshot.of(study))


def write(study: Study, folder: Path) -> Path:
    """Write `folder/search.html` and `folder/trials.csv`; a reader of the old ones never sees half of the new.

    Returns the page.  The table has a row a trial; those that did not run to their end have no objectives in it.
    """
    search = Snapshot.of(study)
    text, table = _render(study, search), _table(search)
    folder.mkdir(parents=True, exist_ok=True)
    page.write(folder / "trials.csv", table)
    return page.write(folder / "search.html", text)


def _render(study: Study, search: Snapshot) -> str:
    planned, left = search.steps
    return page.render(
        "search.html.j2",
        search=search,
        states=_states(search),
        best=(brief(search.front[0].values[0]), called(search.front[0])) if search.front else None,
        saved=left / planned if planned else 0,
        summary=_summary(search),
        fronts=search_plots.fronts(search),
        histories=search_plots.histories(search),
        importances=_importances(study, search),
        top=TOP,
        parallel=search_plots.parallel(search),
        lines=_lines(search),
    )


def _summary(search: Snapshot) -> list[str]:
    return [_counted(search), _found(search), *_compared(search), *_spent(search), *_caution(search)]


def _counted(search: Snapshot) -> str:
    if not search.trials:
        return "No trial has been asked for yet."
    number = len(search.trials)
    again = sum(trial.user_attrs.get("retry_of") is not None for trial in search.trials)
    beside = sum(reference(trial) is not None for trial in search.trials)
    told = f"{many(number, 'trial')} {'was' if number == 1 else 'were'} asked for: {listed(_states(search))}."
    apart = [f"{again} given again after a crash"] * bool(again) + [f"{beside} run as reference"] * bool(beside)
    return f"{told} Among them: {listed(apart)}." if apart else told


def _states(search: Snapshot) -> list[str]:
    counts = Counter(trial.state for trial in search.trials)
    return [f"{counts[state]} {word}" for state, word in STATES.items() if counts[state]]


def _found(search: Snapshot) -> str:
    """Which trials are best, and which were not let in."""
    if not search.done:
        return "None has run to its end yet, so there is nothing to compare."
    if not search.kept:
        return f"None of those done keeps every constraint ({listed(search.constraints)}), so none is recommended."
    best, broken = search.front, len(search.done) - len(search.kept)
    if len(search.names) == 1:
        more = f" and {len(best) - LISTED} more" if len(best) > LISTED else ""
        told = f"The best {search.told(best[0])} is of {listed(map(called, best[:LISTED]))}{more}."
    else:
        told = (
            f"{len(best)} of {many(len(search.kept), 'trial')} {'is' if len(best) == 1 else 'are'} on the front: "
            f"no other is as good in {listed(search.names)} and better in one of them."
        )
    if not broken:
        return told
    verb = "is" if broken == 1 else "are"
    return (
        f"{told} {many(broken, 'trial')} more {verb} done, but outside of a constraint ({listed(search.constraints)})."
    )


def _compared(search: Snapshot) -> list[str]:
    """Each reference, and what the search has that is better."""
    told = []
    for name in dict.fromkeys(name for trial in search.trials if (name := reference(trial))):
        if name not in search.references:
            told.append(f"{name} has no values yet to compare with.")
            continue
        trial, better = search.references[name], search.dominating(name)
        values = search.told(trial) + ("" if feasible(trial) else "; outside of a constraint")
        verb = "beaten" if len(search.names) == 1 else "dominated"
        if not better:
            told.append(f"{name} ({values}) is {verb} by no trial.")
            continue
        first = listed(map(called, better[:LISTED]))
        more = f", and {len(better) - LISTED} more" if len(better) > LISTED else ""
        told.append(f"{name} ({values}) is {verb} by {first}{more}.")
    return told


def _spent(search: Snapshot) -> list[str]:
    planned, left = search.steps
    took = f"The trials took {duration(search.wall_s)} together." if search.wall_s else ""
    share = percent(left / planned, 0) if planned else ""
    saved = (
        f"Stopping early left out {left:,} of {planned:,} training steps that were planned, {share}." if planned else ""
    )
    return [" ".join(filter(None, (took, saved)))] if took or saved else []


def _caution(search: Snapshot) -> list[str]:
    if len(search.kept) < 2:
        return []
    return [
        "All values are of the questions that the search looked at. "
        f"The best of {len(search.kept)} trials is partly the luckiest of them, so its value is too good: "
        "measure it afresh, on questions and seeds that the search has not seen."
    ]


def _table(search: Snapshot) -> str:
    """As CSV: numbers as they are, in columns that depend on the names alone."""
    taken = {*OWN, *search.names, *search.constraints, *search.params, *EFFORT}
    measured = sorted({name for trial in search.trials for name in _metrics(trial)} - taken)
    columns = [*OWN, *search.names, *search.constraints, *measured, *search.params, *EFFORT]
    file = io.StringIO()
    writer = csv.DictWriter(file, list(dict.fromkeys(columns)), lineterminator="\n")
    writer.writeheader()
    for trial in search.trials:
        attributes = {name: trial.user_attrs.get(name) for name in (*OWN[2:], *EFFORT)}
        values = dict(zip(search.names, trial.values, strict=True)) if trial.state == TrialState.COMPLETE else {}
        others = {name: value for name, value in _metrics(trial).items() if name in measured}
        own = {"number": trial.number, "state": trial.state.name}
        writer.writerow(others | trial.params | trial.constraints | values | attributes | own)
    return file.getvalue()


def _metrics(trial: FrozenTrial) -> Mapping[str, float]:
    return trial.user_attrs.get("metrics") or {}


def _lines(search: Snapshot) -> list[Line]:
    """The front first, the others by number."""
    best = {trial.number for trial in search.front}
    ordered = [*search.front, *(trial for trial in search.trials if trial.number not in best)]
    repeats = {trial.user_attrs.get("retry_of"): trial.number for trial in search.trials}
    return [_line(search, trial, repeats.get(trial.number)) for trial in ordered]


def _line(search: Snapshot, trial: FrozenTrial, repeat: int | None) -> Line:
    kind, attributes = search.kind(trial), trial.user_attrs
    about = [
        *(["best" if len(search.names) == 1 else "on the front"] if kind == "front" else []),
        *([name] if (name := reference(trial)) else []),
        *([f"{of} again"] if (of := attributes.get("retry_of")) is not None else []),
    ]
    done = trial.state == TrialState.COMPLETE
    return Line(
        kind,
        trial.number,
        ", ".join(about),
        _state(trial) + (f", given again as {repeat}" if repeat is not None else ""),
        str(attributes.get("error") or ""),
        [brief(value) for value in trial.values] if done else [""] * len(search.names),
        [_verdict(trial.constraints.get(name)) for name in search.constraints],
        duration(wall_s) if (wall_s := amount(trial, "wall_s")) else "",
        [brief(trial.params[name]) if name in trial.params else "" for name in search.params],
    )


def _state(trial: FrozenTrial) -> str:
    word, steps = STATES[trial.state], int(amount(trial, "steps"))
    if not steps or trial.state in (TrialState.COMPLETE, TrialState.WAITING):
        return word
    return f"{word} at step {int(amount(trial, 'step')):,} of {steps:,}"


def _verdict(value: float | None) -> str:
    if value is None:
        return ""
    return "kept" if value <= 0 else f"missed by {brief(value)}"


def _importances(study: Study, search: Snapshot) -> dict[str, dict[str, float]]:
    """Of each objective the parameters' shares, the largest first; none where too little is known to tell."""
    return {name: _importance(study, search, place) for place, name in enumerate(search.names)}


def _importance(study: Study, search: Snapshot, place: int) -> dict[str, float]:
    """How much each parameter sets the best tenth apart, at least TOP trials, from all: PED-ANOVA, arXiv 2304.10255."""

    def loss(trial: FrozenTrial) -> float:
        return math.nan if reference(trial) else search.losses(trial)[place]  # Optuna leaves out what is not finite

    losses = [loss(trial) for trial in search.searched]
    top = max(TOP, math.ceil(len(losses) / 10))
    varied = {name for trial in search.searched for name, values in trial.distributions.items() if not values.single()}
    # where the worst are among the best nothing sets these apart
    if not varied or len(losses) < 2 * TOP or sum(each < max(losses) for each in losses) < top:
        return {}
    evaluator = PedAnovaImportanceEvaluator(target_quantile=(top - 0.5) / len(losses))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that less is better, and that is meant
        shares = get_param_importances(study, evaluator=evaluator, params=sorted(varied), target=loss)
    return dict(sorted(shares.items(), key=lambda share: (-share[1], share[0])))
