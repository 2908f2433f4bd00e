"""Page that compares several runs: a summary sentence, plots of the trade-off, and the tables.

Like the report, the page is one file: no script, nothing loaded from elsewhere, texts of models escaped. The summary is
made from the numbers alone, so it also says when they allow no conclusion. Only what has rows is shown.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence

from pipelines.report import page
from pipelines.report.columns import COLUMN_BY_BENCHMARK, IF_COLUMN, PILOT_COLUMNS, Column
from pipelines.report.plots import (
    ACCENT,
    BAD,
    FAINT,
    GOOD,
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
from pipelines.report.table_rows import KIND_TITLES
from pipelines.report.tables import Cell, ComparedPrompt, ResultRow, ResultTable, keep_filled
from pipelines.report.variants import VariantTable
from pipelines.report.verdicts import (
    PAPER_ITEMS,
    SEED_DEVIATIONS,
    FamilyVerdicts,
    analyse_power,
    find_smallest_paper_effect,
)

COLOUR_BY_KIND = {"both": ACCENT, "llava": INK, "vmtc": GOOD, "cmai": BAD}
"""Colours of the main kinds of models; all others are faint."""

LABEL_LENGTH = 30
"""Maximum length of a label in a plot, in characters."""


def write_summary(tables: Sequence[ResultTable]) -> list[str]:
    """Write a sentence for each family with runs of both, which compares VMTC + CMAI with LLaVA."""
    [table] = [table for table in tables if table.key == "models"]
    texts = {label: _compare_with_llava(table, rows) for label, rows in table.blocks.items()}
    return [f"{label}: {text}" if len(texts) > 1 else text for label, text in texts.items() if text]


def _compare_with_llava(table: ResultTable, rows: Sequence[ResultRow]) -> str:
    """Compare VMTC + CMAI with LLaVA in a sentence; "" without a run of one of them, because runs may vary anything."""
    # Of several budgets, the one nearest to the paper's half of the tokens.
    candidates = [row for row in rows if row.kind == "both" and row.removed is not None]
    ours = min(candidates, key=lambda row: abs((row.removed or 0) - 0.5), default=None)
    base = next((row for row in rows if row.kind == "llava"), None)
    if ours is None or base is None:
        return ""
    phrases = {
        name: f"{'points' if column.counts_points else 'correct'} on {name}"
        for name, column in COLUMN_BY_BENCHMARK.items()
    }
    phrases |= {IF_COLUMN.name: "of instructions followed", "both": "followed and correct"}
    parts = [
        _compare_cells(column, phrases[column.name], our_cell, base_cell)
        for column, our_cell, base_cell in zip(table.columns, ours.cells, base.cells, strict=True)
        if our_cell and base_cell and our_cell.difference and column.name in phrases
    ]
    if not parts:
        return "VMTC + CMAI and LLaVA-1.5 have no answers to the same questions, so they cannot be compared."
    seeds = " and ".join(dict.fromkeys(row.about.split(",")[0] for row in (ours, base)))
    return (
        f"With VMTC + CMAI: {'; '.join(parts)}. "
        f"Intervals are over items; {seeds} say little about another training run."
    )


def _compare_cells(column: Column, phrase: str, ours: Cell, base: Cell) -> str:
    difference = ours.difference
    assert difference is not None
    unit = " %" if column.factor == 100 else ""
    verdict = "within noise" if difference.is_noise else f"interval {difference.low:+.1f} to {difference.high:+.1f}"
    return (
        f"{ours.value:.1f}{unit} {phrase}, LLaVA-1.5 {base.value:.1f}{unit} "
        f"(difference {difference.value:+.1f}, {verdict})"
    )


def render(
    tables: Sequence[ResultTable],
    notes: Sequence[str],
    prompts: Mapping[str, Sequence[ComparedPrompt]],
    variants: VariantTable | None = None,
    verdicts: Sequence[FamilyVerdicts] = (),
) -> str:
    """Render the page. Rows without a run are only in the Markdown file.

    Args:
        tables: all tables.
        notes: remarks about runs that are left out.
        prompts: responses to the same prompts, by label of the family.
        variants: comparison of own variants; None for a single one.
        verdicts: verdicts on the claims of the paper, of families that can judge at least one.
    """
    by_key = {table.key: table for table in tables}
    # Plots find their columns in whole tables; the page shows what is filled.
    filled_tables = [filled for table in tables if (filled := keep_filled(table)).blocks]
    rows = [row for table in filled_tables for family_rows in table.blocks.values() for row in family_rows]
    return page.render(
        "tables.html.j2",
        summary=write_summary(tables),
        variants=variants,
        verdicts=verdicts,
        powers=analyse_power() if verdicts else [],
        seed_deviations=SEED_DEVIATIONS,
        smallest_effect=find_smallest_paper_effect(),
        paper_items=PAPER_ITEMS,
        tables=filled_tables,
        has_scores=any(cell and cell.interval for row in rows for cell in row.cells),
        has_paper_rows=any(row.source == "paper" for row in rows),
        tradeoffs=_plot_tradeoffs(by_key["models"]),
        ratio_plots={key: _plot_ratios(by_key[key]) for key in ("figure-2", "ratios")},
        prompts={label: compared for label, compared in prompts.items() if compared},
        notes=notes,
    )


def _plot_tradeoffs(table: ResultTable) -> list[Plot]:
    """Plot instruction following over the first benchmark of each family, one point per model."""
    up = next(index for index, column in enumerate(table.columns) if column.source == IF_COLUMN.source)
    plots = []
    for family, rows in table.blocks.items():
        for across, column in enumerate(table.columns):
            points = [row for row in rows if row.cells[across] and row.cells[up]]
            if column.name in COLUMN_BY_BENCHMARK and points:
                plots.append(_plot_tradeoff(family, column, points, across, up))
                break
    return plots


def _plot_tradeoff(family: str, column: Column, rows: Sequence[ResultRow], across: int, up: int) -> Plot:
    """Plot the scores of two columns against each other.

    Args:
        family: label of the family.
        column: the column of the x axis.
        rows: the models, with numbers in both columns.
        across: index of the column of the x axis.
        up: index of the column of the y axis.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=(4.4, 3.5), layout="constrained")
        axes = figure.add_subplot()
        points = []
        for row in rows:
            # Every row has a number in both columns, see _plot_tradeoffs.
            x, y = _get_cell(row, across), _get_cell(row, up)
            points.append((x.value, y.value))
            colour = _colour_of(row.kind)
            axes.errorbar(
                x.value, y.value, xerr=_error_bar(x), yerr=_error_bar(y),
                fmt="o", color=colour, ecolor=colour, elinewidth=0.8, markersize=5,
            )  # fmt: skip
        # Axes and grid.
        axes.set_xlabel(f"understanding: {column.name}", color=INK)
        axes.set_ylabel("instructions followed, %", color=INK)
        axes.grid(axis="x", color=LINE, linewidth=0.6)
        style_axes(axes)
        # Labels need the final positions of the points in pixels.
        figure.draw_without_rendering()
        occupied = find_point_boxes(axes, points)
        models_by_point = defaultdict[tuple[float, float], list[int]](list)
        for index, point in enumerate(points):
            models_by_point[point].append(index)
        labels = _shorten_model_labels([row.label for row in rows])
        for point, indices in models_by_point.items():
            label = shorten_label("; ".join(labels[index] for index in indices), LABEL_LENGTH)
            place_label(axes, label, point, _colour_of(rows[indices[0]].kind), occupied, required=True)
        # The numbers are the description for screen readers.
        values = "; ".join(f"{row.label} {x:.1f}, {y:.1f}" for row, (x, y) in zip(rows, points, strict=True))
        return Plot(
            "Understanding and instruction following",
            to_svg(figure, f"tradeoff-{family}-", f"{column.name} and instructions followed: {values}"),
            f"{family}. Up and to the right is better; bars are 95 % intervals.",
        )


def _shorten_model_labels(labels: Sequence[str]) -> list[str]:
    """Leave out the trained model in labels if all models that were asked otherwise were trained alike.

    >>> _shorten_model_labels(["LLaVA-1.5", "LLaVA-1.5, asked with CMAI", "LLaVA-1.5, asked with VMTC"])
    ['LLaVA-1.5', 'CMAI', 'VMTC']
    """
    parts = [label.partition(", asked with ") for label in labels]
    trained = {before for before, _, changes in parts if changes}
    if len(trained) > 1:
        return list(labels)
    return [changes or label for label, (_, _, changes) in zip(labels, parts, strict=True)]


def _get_cell(row: ResultRow, column: int) -> Cell:
    cell = row.cells[column]
    assert cell is not None
    return cell


def _colour_of(kind: str | None) -> str:
    return COLOUR_BY_KIND.get(str(kind), FAINT)


def _error_bar(cell: Cell) -> list[list[float]] | None:
    """Compute the lengths of an error bar below and above the value, as matplotlib takes them."""
    if cell.interval is None:
        return None
    return [[max(cell.value - cell.interval.low, 0)], [max(cell.interval.high - cell.value, 0)]]


def _plot_ratios(table: ResultTable) -> list[Plot]:
    """Plot the main columns over the share of removed tokens, one line per kind; every line starts at LLaVA."""
    names = {*(column.name for column in PILOT_COLUMNS), IF_COLUMN.name, "both", *COLUMN_BY_BENCHMARK}
    plots = []
    for family, rows in table.blocks.items():
        title = family if len(table.blocks) > 1 else ""
        for index, column in enumerate(table.columns):
            points = [row for row in rows if row.source == "ours" and row.cells[index]]
            if column.name in names and len({row.removed for row in points}) > 1:
                plots.append(_plot_ratio(f"{table.key}-{family}", title, column, points, index))
    return plots


def _plot_ratio(prefix: str, family: str, column: Column, rows: Sequence[ResultRow], index: int) -> Plot:
    """Plot a column over the share of removed tokens.

    Args:
        prefix: start of the element ids.
        family: label of the family, "" if there is only one.
        column: the column of the y axis.
        rows: the models, with numbers in the column.
        index: index of the column.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    # Markers also separate kinds that share the faint colour.
    kinds = dict.fromkeys(row.kind for row in rows if row.kind != "llava")
    markers = dict(zip(kinds, "os^DvPX", strict=False))
    with rc_context(STYLE):
        figure = Figure(figsize=(3.7, 2.8), layout="constrained")
        axes = figure.add_subplot()
        for kind in kinds:
            line = sorted((row for row in rows if row.kind == kind), key=lambda row: row.removed or 0)
            if len(line) > 1:  # A single model stays a point
                line = [*(row for row in rows if row.kind == "llava"), *line]
            # Matplotlib takes error bars as one list of lengths below and one of lengths above.
            cells = [_get_cell(row, index) for row in line]
            bars = [_error_bar(cell) or [[0], [0]] for cell in cells]
            colour = _colour_of(kind)
            axes.errorbar(
                [100 * (row.removed or 0) for row in line], [cell.value for cell in cells],
                yerr=[[bar[side][0] for bar in bars] for side in (0, 1)],
                color=colour, marker=markers[kind], markersize=4, linewidth=1.4, elinewidth=0.8,
                label=KIND_TITLES[str(kind)],
            )  # fmt: skip
        axes.set_xlabel("removed tokens, %", color=INK)
        axes.set_ylabel("%" if column.factor == 100 else "points", color=INK)
        axes.legend(frameon=False, labelcolor=INK, fontsize=8)
        style_axes(axes)
        # The numbers are the description for screen readers.
        title = _title_of(column)
        values = "; ".join(f"{row.label} {_get_cell(row, index).value:.1f}" for row in rows)
        return Plot(title, to_svg(figure, f"{prefix}-{column.name}-", f"{title}: {values}"), family)


def _title_of(column: Column) -> str:
    titles = {"JSON": "JSON format", IF_COLUMN.name: "Instructions followed", "both": "Followed and correct"}
    return titles.get(column.name, column.name)
