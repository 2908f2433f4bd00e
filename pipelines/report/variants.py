"""Comparison of a user's own runs: scores of each variant on each task, and their loss curves.

A variant is a set of runs that differ only in the seed. Its label is the variant of the study, or the keys of its job
that differ from the other variants. All scores are compared with the first variant: that of the study file, or that of
the first run.

Cost: a bootstrap for each score and one for each difference (`pipelines.evaluation.statistics`).
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import yaml

from pipelines.core import jsonl
from pipelines.core.settings import flatten_dict, is_in_sections
from pipelines.evaluation import statistics
from pipelines.evaluation.statistics import Difference, Interval
from pipelines.report.plots import ACCENT, BAD, FAINT, GOOD, INK, STYLE, Plot, shorten_label, style_axes, to_svg
from pipelines.report.runs import METHOD_KEYS, UNCOMPARED_KEYS, FinishedRun, name_tasks
from pipelines.report.scores import METRIC_TITLES, find_title
from pipelines.training.files import METRICS_FILE, STUDY_FILE
from redux.benchmarks import Metric
from redux.settings import METHODS

SETTINGS_LABEL_LENGTH = 200
SHORT_LENGTH = 32
LINE_COLOURS = (ACCENT, BAD, GOOD, INK, FAINT)
LINE_STYLES = ("-", "--", ":", "-.")
MAX_POINTS = 400
"""Points of a loss curve in the page."""


@dataclass(frozen=True, eq=False)
class Variant:
    """Runs that differ only in the seed.

    Args:
        label: name on the page.
        short_label: its name in plots.
        settings: keys in which variants differ, with the values of this one.
        runs: the runs, by seed.
    """

    label: str
    short_label: str
    settings: str
    runs: tuple[FinishedRun, ...]

    def metrics(self, name: str) -> list[Metric]:
        """One metric per run that has it."""
        return [run.metrics[name] for run in self.runs if name in run.metrics]


class VariantCell(NamedTuple):
    """Score of a variant on a task.

    Args:
        value: mean over the seeds.
        seeds: the score of each seed.
        interval: 95 % interval of the mean over items; None if the seeds have different items.
        difference: difference to the first variant; None for that one, or without common items.
        positions: each seed, the mean and the ends of the interval as shares of the column's range, for a drawing.
    """

    value: float
    seeds: tuple[float, ...]
    interval: Interval | None
    difference: Difference | None
    positions: "CellPositions"


class CellPositions(NamedTuple):
    """Positions from 0 to 100 in the drawing of a cell."""

    seeds: tuple[float, ...]
    mean: float
    low: float
    high: float


class VariantColumn(NamedTuple):
    """A task with its main metric.

    Args:
        source: name of the metric, such as "easy_vqa.accuracy".
        title: task and metric.
        factor: factor from the metric to the number that is shown.
        low: left end of the drawings of its cells.
        high: right end.
    """

    source: str
    title: str
    factor: float
    low: float
    high: float


@dataclass(frozen=True)
class VariantTable:
    """Scores of the variants by column.

    Args:
        variants: the variants, the first is the base.
        columns: the tasks.
        cells: by variant and column; None for a task that a variant has not.
        plots: loss curves by stage.
    """

    variants: tuple[Variant, ...]
    columns: tuple[VariantColumn, ...]
    cells: tuple[tuple[VariantCell | None, ...], ...]
    plots: tuple[Plot, ...]


def compare_variants(runs: Sequence[FinishedRun], samples: int = 10_000) -> VariantTable | None:
    """Compare runs; None if they are all one variant or have no scores."""
    variants = group_variants(runs)
    sources = _list_main_metrics(runs)
    if len(variants) < 2 or not sources:
        return None
    drafts = [[_draft_cell(variant, variants[0], source, samples) for source in sources] for variant in variants]
    columns = tuple(_make_column(source, [row[index] for row in drafts]) for index, source in enumerate(sources))
    cells = tuple(
        tuple(cell and _scale_cell(cell, column) for cell, column in zip(row, columns, strict=True)) for row in drafts
    )
    return VariantTable(variants, columns, cells, tuple(_plot_losses(variants)))


def group_variants(runs: Sequence[FinishedRun]) -> tuple[Variant, ...]:
    """Group runs by all settings but the seed, in the order of the study, or else of the runs."""
    all_settings = [methods | _read_settings(run) for run, methods in zip(runs, _list_methods(runs), strict=True)]
    groups: dict[str, list[int]] = {}
    for index, (run, settings) in enumerate(zip(runs, _drop_common(all_settings), strict=True)):
        # Runs of two variants of a study with equal settings stay two variants.
        groups.setdefault(json.dumps([settings, _find_study_variant(run)]), []).append(index)
    described = _drop_common(name_tasks(all_settings))
    order = _read_order(runs)
    variants = []
    for key, indices in groups.items():
        _, name = json.loads(key)
        differing = described[indices[0]]
        text = shorten_label(", ".join(f"{path} = {value}" for path, value in differing.items()), SETTINGS_LABEL_LENGTH)
        last = ", ".join(f"{path.rpartition('.')[2]} = {value}" for path, value in differing.items())
        label = name or text or "same settings"
        short_label = shorten_label(name or last or label, SHORT_LENGTH)
        variant_runs = _sort_by_seed([runs[index] for index in indices])
        variants.append(Variant(label, short_label, text if name else "", tuple(variant_runs)))
    variants.sort(key=lambda variant: order.get(variant.label, len(order)))
    return tuple(variants)


def _drop_common(settings: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Keep the keys whose values differ, with the values as text."""
    keys = dict.fromkeys(key for run_settings in settings for key in run_settings)
    differing = [key for key in keys if len({_write(run_settings.get(key)) for run_settings in settings}) > 1]
    return [{key: _write(run_settings.get(key)) for key in differing} for run_settings in settings]


def _sort_by_seed(runs: Sequence[FinishedRun]) -> list[FinishedRun]:
    return sorted(runs, key=lambda run: run.seed)


def _read_settings(run: FinishedRun) -> dict[str, Any]:
    """Read the settings that decide the result; a run that evaluates the model of another run has those of that run."""
    settings = flatten_dict({**run.source_job, "evaluate": run.job.get("evaluate")})
    ignored = [*UNCOMPARED_KEYS, *METHOD_KEYS]
    if run.source_job is run.job and run.job.get("train"):
        ignored.append("model.checkpoint")
    return {key: value for key, value in settings.items() if not is_in_sections(key, ignored)}


def _list_methods(runs: Sequence[FinishedRun]) -> list[dict[str, str]]:
    """List the methods of each run as the evaluation has set them, and those of the training if they differ."""
    result: list[dict[str, str]] = [{} for _ in runs]
    for name in METHODS:
        applied = [run.methods.methods[name] for run in runs]
        trained = [run.trained_with.methods[name] for run in runs]
        texts = _write_methods([*applied, *trained])
        for number, written in enumerate(result):
            text, trained_text = texts[number], texts[len(runs) + number]
            is_same = applied[number] == trained[number] or runs[number].is_foreign
            written[f"model.{name}"] = text if is_same else f"{text} (trained with {trained_text})"
    return result


def _write_methods(methods: Sequence[Any]) -> list[str]:
    """Write settings of one method: "off", or "on" with the fields in which they differ."""
    values = [None if method is None else asdict(method) for method in methods]
    values_by_index = {index: fields for index, fields in enumerate(values) if fields is not None}
    texts = ["off"] * len(values)
    for index, differing in zip(values_by_index, _drop_common(list(values_by_index.values())), strict=True):
        text = ", ".join(f"{key}: {value}" for key, value in differing.items())
        texts[index] = f"{{{text}}}" if text else "on"
    return texts


def _find_study_variant(run: FinishedRun) -> str:
    """Return the name of the variant in the study that a run belongs to, "" without a study."""
    name, _, seed = run.folder.name.rpartition("-")
    return name if name in _read_study(run) and seed.isdigit() else ""


def _read_study(run: FinishedRun) -> Mapping[str, Any]:
    """Read the variants of the study that a run belongs to, trained ones first."""
    path = run.folder.parent / STUDY_FILE
    try:
        study = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    parts = [study.get(key) for key in ("variants", "applied")] if isinstance(study, dict) else []
    return {name: changes for part in parts if isinstance(part, dict) for name, changes in part.items()}


def _read_order(runs: Sequence[FinishedRun]) -> dict[str, int]:
    names = dict.fromkeys(name for run in runs for name in _read_study(run))
    return {name: position for position, name in enumerate(names)}


def _write(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _list_main_metrics(runs: Sequence[FinishedRun]) -> list[str]:
    """List the first metric of each task."""
    mains: dict[str, str] = {}
    for run in runs:
        for name in run.metrics:
            mains.setdefault(name.partition(".")[0], name)
    return list(mains.values())


def _draft_cell(variant: Variant, base: Variant, source: str, samples: int) -> VariantCell | None:
    """Compute a cell without its drawing."""
    metrics = variant.metrics(source)
    if not metrics:
        return None
    seeds = tuple(metric.score for metric in metrics)
    nowhere = CellPositions((), 0, 0, 0)
    try:
        interval = statistics.bootstrap_interval(metrics, samples)
    except ValueError:  # Seeds with different items
        return VariantCell(sum(seeds) / len(seeds), seeds, None, None, nowhere)
    difference = None
    if variant is not base and base.metrics(source):
        try:
            difference = statistics.bootstrap_difference(metrics, base.metrics(source), samples)
        except ValueError:  # Other items than those of the base
            difference = None
    return VariantCell(interval.value, seeds, interval, difference, nowhere)


def _make_column(source: str, cells: Sequence[VariantCell | None]) -> VariantColumn:
    """Make a column whose drawings have one scale for all variants."""
    present = [cell for cell in cells if cell]
    numbers = [number for cell in present for number in (*cell.seeds, *_list_ends(cell))]
    low, high = min(numbers), max(numbers)
    margin = (high - low) * 0.08 or 0.01
    task, _, metric = source.partition(".")
    is_share = high <= 1
    title = f"{find_title(task)}, {METRIC_TITLES.get(metric, metric)}" + (" %" if is_share else "")
    return VariantColumn(source, title, 100.0 if is_share else 1.0, low - margin, high + margin)


def _list_ends(cell: VariantCell) -> tuple[float, ...]:
    return (cell.interval.low, cell.interval.high) if cell.interval else ()


def _scale_cell(cell: VariantCell, column: VariantColumn) -> VariantCell:
    """Scale a cell to the numbers that are shown, and add the positions of its drawing."""

    def position(number: float) -> float:
        return 100 * (number - column.low) / (column.high - column.low)

    low, high = _list_ends(cell) or (cell.value, cell.value)
    positions = CellPositions(tuple(map(position, cell.seeds)), position(cell.value), position(low), position(high))
    return VariantCell(
        cell.value * column.factor,
        tuple(seed * column.factor for seed in cell.seeds),
        cell.interval and cell.interval.scale(column.factor),
        cell.difference and cell.difference.scale(column.factor),
        positions,
    )


# --- loss curves -----------------------------------------------------------------------------------------------------


def _plot_losses(variants: Sequence[Variant]) -> Iterator[Plot]:
    """Plot the smoothed loss of all runs, one plot per stage and one colour per variant."""
    curves: dict[str, list[tuple[int, list[Mapping[str, Any]]]]] = {}
    for number, variant in enumerate(variants):
        for run in variant.runs:
            for stage, rows in _read_losses(run).items():
                curves.setdefault(stage, []).append((number, rows))
    for stage, stage_curves in curves.items():
        if len({number for number, _ in stage_curves}) > 1:
            yield _plot_stage(stage, stage_curves, variants)


def _read_losses(run: FinishedRun) -> dict[str, list[Mapping[str, Any]]]:
    by_stage: dict[str, list[Mapping[str, Any]]] = {}
    for row in jsonl.read(run.folder / METRICS_FILE):
        if isinstance(row.get("loss"), int | float):
            by_stage.setdefault(str(row["stage"]), []).append(row)
    return by_stage


def _plot_stage(stage: str, curves: Sequence[tuple[int, list[Mapping[str, Any]]]], variants: Sequence[Variant]) -> Plot:
    import numpy as np
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    from pipelines.report.run_report import smooth_curve

    with rc_context(STYLE):
        figure = Figure(figsize=(5.2, 3.0), layout="constrained")
        axes = figure.add_subplot()
        labelled = set[int]()
        ends = []
        for number, rows in curves:
            loss = smooth_curve(np.array([row["loss"] for row in rows], dtype=float))
            every = max(len(rows) // MAX_POINTS, 1)
            axes.plot(
                [row["step"] for row in rows][::every], loss[::every], linewidth=1.3, alpha=0.9,
                color=LINE_COLOURS[number % len(LINE_COLOURS)],
                linestyle=LINE_STYLES[number // len(LINE_COLOURS) % len(LINE_STYLES)],
                label=None if number in labelled else variants[number].short_label,
            )  # fmt: skip
            labelled.add(number)
            ends.append(f"{variants[number].short_label} {loss[-1]:.3g}")
        axes.set_xlabel("step", color=INK)
        axes.set_ylabel("loss", color=INK)
        for text in axes.legend(frameon=False, labelcolor=INK, fontsize=8).get_texts():
            text.set_parse_math(False)  # Labels are of users
        style_axes(axes)
        return Plot(stage, to_svg(figure, f"variants-{stage}-", f"loss of {stage} at the end: {'; '.join(ends)}"))
