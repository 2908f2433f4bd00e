"""Plots of a hyperparameter search: its front, its history, and its parameters side by side.

Optuna's own plots are of another look, or want scripts, so these are drawn here, in the colours of our other pages.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple

from markupsafe import Markup
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState

from pipelines.report.page import ACCENT, BAD, FAINT, INK, LINE, STYLE, quiet, svg
from pipelines.search.snapshot import Snapshot, brief, called, feasible, listed, many, reference

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PANELS = 3
SPAN = 20
"""An axis whose values are that many times apart is logarithmic."""
ABSENT = -0.2
"""Where a line crosses the axis of a parameter that its trial does not have; values lie in 0..1."""
BEYOND = {1.0: (4, "bottom"), 0.0: (-4, "top"), ABSENT: (-4, "top")}
"""Words at the ends of an axis stand so many points beyond them, the others beside it."""


class Drawn(NamedTuple):
    """A plot, what is written beside it, and from which width in pixels on it can be read."""

    title: str
    svg: Markup
    note: str = ""
    width: int = 0


class Scale(NamedTuple):
    """An axis of the parallel coordinates: trials by number, and words, at places of 0..1 or ABSENT."""

    name: str
    places: dict[int, float]
    ticks: dict[float, str]


def fronts(search: Snapshot) -> list[Drawn]:
    """The first objective against each of the others."""
    others = range(1, min(len(search.names), PANELS + 1))
    return [_front(search, other) for other in others] if search.drawn else []


def _front(search: Snapshot, other: int) -> Drawn:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    up, across = search.names[0], search.names[other]
    at = {trial.number: (trial.values[other], trial.values[0]) for trial in search.drawn}
    best = sorted(at[trial.number] for trial in search.front if trial.number in at)
    with rc_context(STYLE):
        figure = Figure(figsize=(4.4, 3.5), layout="constrained")
        axes = figure.add_subplot()
        if best and len(search.names) == 2:  # of more objectives a plane shows no staircase
            axes.step(
                *zip(*best, strict=True),
                where="post" if search.signs[other] > 0 else "pre",
                color=ACCENT,
                linewidth=1.2,
            )
        _dots(axes, search, at)
        _label(axes, "x", f"{across}: {_better(search, other)}", [x for x, _ in at.values()])
        _label(axes, "y", f"{up}: {_better(search, 0)}", [y for _, y in at.values()])
        axes.grid(axis="x", color=LINE, linewidth=0.6)
        quiet(axes)
        figure.draw_without_rendering()
        _name(axes, search, at)
        told = "; ".join(f"{called(trial)}: {search.told(trial)}" for trial in search.front)
        drawn = svg(figure, f"front-{other}-", f"{up} against {across}. On the front: {told}")
    return Drawn(f"{up} against {across}", drawn)


def _better(search: Snapshot, place: int) -> str:
    return "more is better" if search.signs[place] < 0 else "less is better"


def histories(search: Snapshot) -> list[Drawn]:
    """Each objective over the trials, in the order in which they were asked for."""
    return [_history(search, place) for place in range(len(search.names))] if search.drawn else []


def _history(search: Snapshot, place: int) -> Drawn:
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    name, sign = search.names[place], search.signs[place]
    at = {trial.number: (trial.number, trial.values[place]) for trial in search.drawn}
    kept = [trial for trial in search.searched if feasible(trial)]
    best = [sign * loss for loss in accumulate((search.losses(trial)[place] for trial in kept), min)]
    with rc_context(STYLE):
        figure = Figure(figsize=(4.4, 2.8), layout="constrained")
        axes = figure.add_subplot()
        if best:
            last = search.trials[-1].number
            numbers = [*(trial.number for trial in kept), last]
            axes.step(numbers, [*best, best[-1]], where="post", color=ACCENT, linewidth=1.2)
        _dots(axes, search, at)
        _ends(axes, search)
        _label(axes, "y", name, [value for _, value in at.values()])
        axes.set_xlabel("trial", color=INK)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        quiet(axes)
        told = f", at best {brief(best[-1])}" if best else ""
        drawn = svg(figure, f"history-{place}-", f"{name} of {many(len(at), 'trial')}{told}")
    return Drawn(name, drawn, _better(search, place))


def _dots(axes: "Axes", search: Snapshot, at: Mapping[int, tuple[float, float]]) -> None:
    """A mark a trial: references are diamonds, what is outside of a constraint is hollow, the front stands out."""
    for trial in search.drawn:
        kind = search.kind(trial)
        shade = {"front": ACCENT, "reference": INK}.get(kind, FAINT)
        axes.plot(
            *at[trial.number], marker="D" if reference(trial) else "o", markersize=5 if shade != FAINT else 4,
            color=shade, markerfacecolor=shade if feasible(trial) else "none", linestyle="none",
            markeredgewidth=0 if feasible(trial) else 1,
            alpha=0.55 if shade == FAINT else 1, zorder=2 if shade == FAINT else 3,
        )  # fmt: skip


def _ends(axes: "Axes", search: Snapshot) -> None:
    """Trials without values, at the foot."""
    for state, marker, shade in ((TrialState.PRUNED, "|", FAINT), (TrialState.FAIL, "x", BAD)):
        numbers = [trial.number for trial in search.trials if trial.state == state]
        axes.plot(
            numbers, [0.03] * len(numbers), marker, color=shade, markersize=6 if marker == "|" else 4,
            transform=axes.get_xaxis_transform(),
        )  # fmt: skip


def _label(axes: "Axes", which: str, name: str, values: Sequence[float]) -> None:
    """An axis of plain numbers, logarithmic where they lie far apart."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    far = min(values) > 0 and max(values) > SPAN * min(values)
    axes.set(**{f"{which}scale": "log" if far else "linear"})
    axis = getattr(axes, f"{which}axis")
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)) if far else MaxNLocator(6))
    axis.set_major_formatter(FuncFormatter(lambda value, _: brief(value)))
    axis.set_minor_formatter(NullFormatter())
    axis.set_label_text(name, color=INK, parse_math=False)


def _name(axes: "Axes", search: Snapshot, at: Mapping[int, tuple[float, float]]) -> None:
    """The names of references, and numbers of the front as far as they cover nothing: the table has them all."""
    from matplotlib.transforms import Bbox

    taken = [Bbox.from_bounds(x - 3, y - 3, 6, 6) for x, y in axes.transData.transform(list(at.values()))]
    front = {trial.number: str(trial.number) for trial in search.front}
    named = {trial.number: name for name, trial in search.references.items()}
    for number, text in (named | front | named).items():  # references choose first
        if number in at:
            shade = ACCENT if number in front else INK
            taken += _put(axes, _short(text, 24), at[number], shade, [taken, []] if number in named else [taken])


def _put(axes: "Axes", text: str, point: tuple[float, float], shade: str, crowds: Sequence[Sequence[Any]]) -> list[Any]:
    """A text beside a point at the first place that is free of a crowd, or of the next; the box it takes, if any."""
    frame = axes.get_window_extent()
    for crowd in crowds:
        for x, y in ((x, y) for y in (4, -11, 14, -21, 24, -31) for x in (6, -6)):
            note = axes.annotate(
                text, point, (x, y), textcoords="offset points", ha="left" if x > 0 else "right", fontsize=8,
                color=shade, parse_math=False, in_layout=False,
            )  # fmt: skip
            box = note.get_window_extent()
            inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
            if inside and not any(box.overlaps(other) for other in crowd):
                return [box]
            note.remove()
    return []


def scales(search: Snapshot) -> list[Scale]:
    """Parameters that differ between trials, then the objectives, on which up is better."""
    params = [_parameter(name, search.searched) for name in search.params]
    numbers = [trial.number for trial in search.searched]
    objectives = []
    for name, sign, values in zip(search.names, search.signs, _columns(search), strict=True):
        worst, best = (max(values), min(values)) if sign > 0 else (min(values), max(values))
        places = {number: _share(value, worst, best) for number, value in zip(numbers, values, strict=True)}
        ticks = {_share(value, worst, best): brief(value) for value in (worst, best)}
        objectives.append(Scale(name, places, ticks))
    return [*(scale for scale in params if len(set(scale.places.values())) > 1), *objectives]


def _columns(search: Snapshot) -> list[tuple[float, ...]]:
    return list(zip(*(trial.values for trial in search.searched), strict=True))


def _parameter(name: str, trials: Sequence[FrozenTrial]) -> Scale:
    """Numbers between the bounds of their distribution, on its scale; choices one above the other."""
    having = [trial for trial in trials if name in trial.params]
    kinds = [trial.distributions[name] for trial in having]
    ranges = [kind for kind in kinds if isinstance(kind, FloatDistribution | IntDistribution)]
    if having and len(ranges) == len(kinds):
        low, high = min(kind.low for kind in ranges), max(kind.high for kind in ranges)
        bend: Callable[[float], float] = math.log if all(kind.log for kind in ranges) else float
        place = {trial.number: _share(*map(bend, (trial.params[name], low, high))) for trial in having}
        ticks = {_share(*map(bend, (value, low, high))): brief(value) for value in (low, high)}
    else:
        choices = [choice for kind in kinds if isinstance(kind, CategoricalDistribution) for choice in kind.choices]
        words = list(dict.fromkeys(brief(value) for value in [*choices, *(trial.params[name] for trial in having)]))
        spots = {word: _share(spot, 0, len(words) - 1) for spot, word in enumerate(words)}
        place = {trial.number: spots[brief(trial.params[name])] for trial in having}
        ticks = {spot: word for word, spot in spots.items()}
    if len(having) < len(trials):
        ticks[ABSENT] = "absent"
    return Scale(name, {trial.number: place.get(trial.number, ABSENT) for trial in trials}, ticks)


def _share(value: float, low: float, high: float) -> float:
    return 0.5 if low == high else (value - low) / (high - low)


def parallel(search: Snapshot) -> Drawn | None:
    """Each trial as a line through its parameters and values; None without any parameter that varies."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    stands = scales(search) if search.searched else []
    if len(stands) <= len(search.names):
        return None
    best = {trial.number for trial in search.front}
    width = max(9.0, 0.85 * len(stands))
    with rc_context(STYLE):
        figure = Figure(figsize=(width, 4), layout="constrained")
        axes = figure.add_subplot()
        for trial in sorted(search.searched, key=lambda trial: trial.number in best):
            shade, weight, alpha = (ACCENT, 1.6, 1) if trial.number in best else (FAINT, 0.8, 0.4)
            axes.plot([scale.places[trial.number] for scale in stands], color=shade, linewidth=weight, alpha=alpha)
        for place, scale in enumerate(stands):
            _stand(axes, place, scale)
        axes.set_xlim(-0.5, len(stands) - 0.5)
        axes.set_axis_off()
        told = f"{many(len(search.searched), 'trial')} as lines through {listed(scale.name for scale in stands)}"
        return Drawn("", svg(figure, "parallel-", told), width=round(90 * width))


def _stand(axes: "Axes", place: int, scale: Scale) -> None:
    """An upright axis: its name above, word for word; its ends written beyond it and what lies between beside it."""
    axes.plot([place, place], [0, 1], color=LINE, linewidth=1.2, zorder=1)
    words: dict[str, Any] = {"fontsize": 8, "parse_math": False, "textcoords": "offset points"}
    for spot, word in scale.ticks.items():
        away, edge = BEYOND.get(spot, (0, "center"))
        at, side = ((0, away), "center") if away else ((4, 0), "left")
        axes.annotate(_short(word, 14), (place, spot), at, ha=side, va=edge, color=INK, **words)
    name = ".\n".join(_short(part, 14) for part in scale.name.split("."))
    axes.annotate(name, (place, 1), (0, 18), ha="center", va="bottom", color=FAINT, **words)


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
