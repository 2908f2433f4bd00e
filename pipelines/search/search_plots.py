"""Plots of a hyperparameter search: front, history, and parallel coordinates.

Optuna's own plots have another look or need scripts, so these are drawn with `pipelines/report/plots.py`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple

from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState

from pipelines.core.words import pluralize
from pipelines.report.plots import (
    ACCENT,
    BAD,
    FAINT,
    INK,
    LINE,
    STYLE,
    Plot,
    find_point_boxes,
    place_label,
    shorten_label,
    style_axes,
    to_svg,
)
from pipelines.search.snapshot import (
    Snapshot,
    format_parameter,
    get_reference,
    is_feasible,
    join_words,
    label_trial,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_FRONT_PLOTS = 3
LOG_SCALE_RATIO = 20
"""An axis is logarithmic if its largest value is more than this multiple of its smallest."""
ABSENT_POSITION = -0.2
"""Position on an axis of a parameter that a trial does not have; values are in 0..1."""
END_OFFSETS = {1.0: (4, "bottom"), 0.0: (-4, "top"), ABSENT_POSITION: (-4, "top")}
"""Vertical offset in points and alignment of the labels at the ends of an axis; other labels are next to the axis."""


class ParallelAxis(NamedTuple):
    """An axis of the parallel coordinates.

    Args:
        name: parameter or objective.
        positions: position of each trial in 0..1 or ABSENT_POSITION, by number of the trial.
        ticks: labels by position.
    """

    name: str
    positions: dict[int, float]
    ticks: dict[float, str]


def plot_fronts(snapshot: Snapshot) -> list[Plot]:
    """Plot the first objective over each of the others, up to MAX_FRONT_PLOTS."""
    indices = range(1, min(len(snapshot.objectives), MAX_FRONT_PLOTS + 1))
    return [_plot_front(snapshot, index) for index in indices] if snapshot.plottable else []


def _plot_front(snapshot: Snapshot, other: int) -> Plot:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    # The line of the front is drawn below the marks.
    y_name, x_name = snapshot.objectives[0], snapshot.objectives[other]
    points = {trial.number: (trial.values[other], trial.values[0]) for trial in snapshot.plottable}
    front = sorted(points[trial.number] for trial in snapshot.front if trial.number in points)
    with rc_context(STYLE):
        figure = Figure(figsize=(4.4, 3.5), layout="constrained")
        axes = figure.add_subplot()
        if front and len(snapshot.objectives) == 2:  # With more objectives the front is not a line in this plane
            axes.step(
                *zip(*front, strict=True),
                where="post" if snapshot.signs[other] > 0 else "pre",
                color=ACCENT,
                linewidth=1.2,
            )
        # Marks, axes and grid.
        _plot_trials(axes, snapshot, points)
        _scale_axis(axes, "x", f"{x_name}: {_describe_direction(snapshot, other)}", [x for x, _ in points.values()])
        _scale_axis(axes, "y", f"{y_name}: {_describe_direction(snapshot, 0)}", [y for _, y in points.values()])
        axes.grid(axis="x", color=LINE, linewidth=0.6)
        style_axes(axes)
        # Labels need the final positions of the points in pixels.
        figure.draw_without_rendering()
        _label_points(axes, snapshot, points)
        values = "; ".join(f"{label_trial(trial)}: {snapshot.format_objectives(trial)}" for trial in snapshot.front)
        element = to_svg(figure, f"front-{other}-", f"{y_name} over {x_name}. On the front: {values}")
    return Plot(f"{y_name} over {x_name}", element)


def _describe_direction(snapshot: Snapshot, objective: int) -> str:
    return "more is better" if snapshot.signs[objective] < 0 else "less is better"


def plot_histories(snapshot: Snapshot) -> list[Plot]:
    """Plot each objective over the trials, in the order of their numbers."""
    return [_plot_history(snapshot, index) for index in range(len(snapshot.objectives))] if snapshot.plottable else []


def _plot_history(snapshot: Snapshot, objective: int) -> Plot:
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    name = snapshot.objectives[objective]
    sign = snapshot.signs[objective]
    points = {trial.number: (trial.number, trial.values[objective]) for trial in snapshot.plottable}
    # References and infeasible trials have marks, but do not improve the best value.
    feasible = [trial for trial in snapshot.sampled if is_feasible(trial)]
    losses = (snapshot.minimized_values(trial)[objective] for trial in feasible)
    best_so_far = [sign * loss for loss in accumulate(losses, min)]
    with rc_context(STYLE):
        figure = Figure(figsize=(4.4, 2.8), layout="constrained")
        axes = figure.add_subplot()
        if best_so_far:
            # Continue the line to the last trial.
            numbers = [*(trial.number for trial in feasible), snapshot.trials[-1].number]
            axes.step(numbers, [*best_so_far, best_so_far[-1]], where="post", color=ACCENT, linewidth=1.2)
        _plot_trials(axes, snapshot, points)
        _mark_incomplete_trials(axes, snapshot)
        _scale_axis(axes, "y", name, [value for _, value in points.values()])
        axes.set_xlabel("trial", color=INK)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        style_axes(axes)
        best_text = f", best {format_parameter(best_so_far[-1])}" if best_so_far else ""
        element = to_svg(figure, f"history-{objective}-", f"{name} of {pluralize(len(points), 'trial')}{best_text}")
    return Plot(name, element, _describe_direction(snapshot, objective))


def _plot_trials(axes: "Axes", snapshot: Snapshot, points: Mapping[int, tuple[float, float]]) -> None:
    """Draw a mark per trial: diamonds for references, hollow outside the constraints, strong colour for the front."""
    for trial in snapshot.plottable:
        colour = {"front": ACCENT, "reference": INK}.get(snapshot.classify(trial), FAINT)
        is_filled = is_feasible(trial)
        axes.plot(
            *points[trial.number], marker="D" if get_reference(trial) else "o", markersize=4 if colour == FAINT else 5,
            color=colour, markerfacecolor=colour if is_filled else "none", linestyle="none",
            markeredgewidth=0 if is_filled else 1,
            alpha=0.55 if colour == FAINT else 1, zorder=2 if colour == FAINT else 3,
        )  # fmt: skip


def _mark_incomplete_trials(axes: "Axes", snapshot: Snapshot) -> None:
    """Mark trials without values at the bottom of the axes."""
    for state, marker, colour in ((TrialState.PRUNED, "|", FAINT), (TrialState.FAIL, "x", BAD)):
        # These trials have no values, so they have a fixed height in the coordinates of the axes.
        numbers = [trial.number for trial in snapshot.trials if trial.state == state]
        axes.plot(
            numbers, [0.03] * len(numbers), marker, color=colour, markersize=6 if marker == "|" else 4,
            transform=axes.get_xaxis_transform(),
        )  # fmt: skip


def _scale_axis(axes: "Axes", axis_name: str, name: str, values: Sequence[float]) -> None:
    """Label the x or y axis with plain numbers; logarithmic if the values span more than LOG_SCALE_RATIO."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    is_log = min(values) > 0 and max(values) > LOG_SCALE_RATIO * min(values)
    axes.set(**{f"{axis_name}scale": "log" if is_log else "linear"})
    axis = getattr(axes, f"{axis_name}axis")
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)) if is_log else MaxNLocator(6))
    axis.set_major_formatter(FuncFormatter(lambda value, _: format_parameter(value)))
    axis.set_minor_formatter(NullFormatter())
    axis.set_label_text(name, color=INK, parse_math=False)


def _label_points(axes: "Axes", snapshot: Snapshot, points: Mapping[int, tuple[float, float]]) -> None:
    """Label all references, and the trials of the front that have space for a label."""
    occupied = find_point_boxes(axes, list(points.values()))
    references = {trial.number: name for name, trial in snapshot.references.items()}
    front = {trial.number: str(trial.number) for trial in snapshot.front}
    # References come first, because their labels are required.
    for number, text in (references | front | references).items():
        if number in points:
            colour = ACCENT if number in front else INK
            place_label(axes, shorten_label(text, 24), points[number], colour, occupied, required=number in references)


def build_axes(snapshot: Snapshot) -> list[ParallelAxis]:
    """Build the axes of the parameters that vary, then those of the objectives, on which up is better."""
    params = [_build_param_axis(name, snapshot.sampled) for name in snapshot.params]
    numbers = [trial.number for trial in snapshot.sampled]
    objectives = []
    for index, (name, sign) in enumerate(zip(snapshot.objectives, snapshot.signs, strict=True)):
        values = [trial.values[index] for trial in snapshot.sampled]
        # Turn the axis so that the best value is at the top.
        worst, best = (max(values), min(values)) if sign > 0 else (min(values), max(values))
        positions = {number: _position(value, worst, best) for number, value in zip(numbers, values, strict=True)}
        ticks = {_position(value, worst, best): format_parameter(value) for value in (worst, best)}
        objectives.append(ParallelAxis(name, positions, ticks))
    return [*(axis for axis in params if len(set(axis.positions.values())) > 1), *objectives]


def _build_param_axis(name: str, trials: Sequence[FrozenTrial]) -> ParallelAxis:
    """Build the axis of a parameter: numbers on the scale of their distribution, choices at equal distances."""
    having = [trial for trial in trials if name in trial.params]
    distributions = [trial.distributions[name] for trial in having]
    ranges = [item for item in distributions if isinstance(item, FloatDistribution | IntDistribution)]
    if having and len(ranges) == len(distributions):
        # All trials sampled a number: the bounds of the distributions are the ends of the axis.
        low, high = min(item.low for item in ranges), max(item.high for item in ranges)
        scale: Callable[[float], float] = math.log if all(item.log for item in ranges) else float
        positions = {trial.number: _position(*map(scale, (trial.params[name], low, high))) for trial in having}
        ticks = {_position(*map(scale, (value, low, high))): format_parameter(value) for value in (low, high)}
    else:
        # Choices, or a parameter that was a number in some trials and a choice in others.
        choices = [
            choice for item in distributions if isinstance(item, CategoricalDistribution) for choice in item.choices
        ]
        values = [*choices, *(trial.params[name] for trial in having)]
        texts = list(dict.fromkeys(format_parameter(value) for value in values))
        position_by_text = {text: _position(index, 0, len(texts) - 1) for index, text in enumerate(texts)}
        positions = {trial.number: position_by_text[format_parameter(trial.params[name])] for trial in having}
        ticks = {position: word for word, position in position_by_text.items()}
    if len(having) < len(trials):
        ticks[ABSENT_POSITION] = "absent"
    return ParallelAxis(name, {trial.number: positions.get(trial.number, ABSENT_POSITION) for trial in trials}, ticks)


def _position(value: float, low: float, high: float) -> float:
    return 0.5 if low == high else (value - low) / (high - low)


def plot_parallel(snapshot: Snapshot) -> Plot | None:
    """Plot each trial as a line through its parameters and objectives; None if no parameter varies."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    all_axes = build_axes(snapshot) if snapshot.sampled else []
    if len(all_axes) <= len(snapshot.objectives):
        return None
    front = {trial.number for trial in snapshot.front}
    width = max(9.0, 0.85 * len(all_axes))
    with rc_context(STYLE):
        figure = Figure(figsize=(width, 4), layout="constrained")
        axes = figure.add_subplot()
        # The front is drawn last, so that it is on top.
        for trial in sorted(snapshot.sampled, key=lambda trial: trial.number in front):
            colour, line_width, alpha = (ACCENT, 1.6, 1) if trial.number in front else (FAINT, 0.8, 0.4)
            positions = [axis.positions[trial.number] for axis in all_axes]
            axes.plot(positions, color=colour, linewidth=line_width, alpha=alpha)
        for x, axis in enumerate(all_axes):
            _plot_parallel_axis(axes, x, axis)
        axes.set_xlim(-0.5, len(all_axes) - 0.5)
        axes.set_axis_off()
        names = join_words(axis.name for axis in all_axes)
        label = f"{pluralize(len(snapshot.sampled), 'trial')} as lines through {names}"
        return Plot("", to_svg(figure, "parallel-", label), width=round(90 * width))


def _plot_parallel_axis(axes: "Axes", x: int, axis: ParallelAxis) -> None:
    """Draw a vertical axis with its name on top, labels of the ends beyond them, and other labels on the right."""
    axes.plot([x, x], [0, 1], color=LINE, linewidth=1.2, zorder=1)
    style: dict[str, Any] = {"fontsize": 8, "parse_math": False, "textcoords": "offset points"}
    for position, word in axis.ticks.items():
        away, vertical = END_OFFSETS.get(position, (0, "center"))
        offset, horizontal = ((0, away), "center") if away else ((4, 0), "left")
        axes.annotate(shorten_label(word, 14), (x, position), offset, ha=horizontal, va=vertical, color=INK, **style)
    name = ".\n".join(shorten_label(part, 14) for part in axis.name.split("."))
    axes.annotate(name, (x, 1), (0, 18), ha="center", va="bottom", color=FAINT, **style)
