"""Several runs on one page: what came out in a sentence, the trade-off in a picture, and the tables below.

The page is one file as the report is: no script, nothing from elsewhere, texts of models escaped.  The sentence is made
of the numbers alone, so it also says that nothing can be said.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from markupsafe import Markup

from pipelines.report import page
from pipelines.report.page import ACCENT, BAD, FAINT, GOOD, INK, LINE, STYLE, quiet, svg
from pipelines.report.tables import BENCHMARKS, IF, KINDS, PILOT, Column, Line, Prompt, Table

UNDERSTANDING = {column.name for column in BENCHMARKS}

SHADES = {"both": ACCENT, "llava": INK, "vmtc": GOOD, "cmai": BAD}
"""Colours of the rows that matter most; the others are faint."""


class Drawn(NamedTuple):
    """A plot, and what is written above and below it."""

    title: str
    svg: Markup
    note: str


def summary(tables: Sequence[Table]) -> list[str]:
    """For each family, how VMTC + CMAI compares with LLaVA; or why that cannot be said."""
    [table] = [table for table in tables if table.key == "models"]
    told = {label: _told(table, rows) for label, rows in table.blocks.items()}
    return [f"{label}: {text}" if len(told) > 1 else text for label, text in told.items()]


def _told(table: Table, rows: Sequence[Line]) -> str:
    halved = [row for row in rows if row.kind == "both" and row.removed is not None]
    ours = min(halved, key=lambda row: abs((row.removed or 0) - 0.5), default=None)
    base = next((row for row in rows if row.kind == "llava"), None)
    if ours is None or base is None:
        absent = " and ".join(KINDS[name] for name, row in (("both", ours), ("llava", base)) if row is None)
        return f"There is no run of {absent} yet, so the method cannot be compared with what it started from."
    names = {IF.name: "of instructions are followed", "both": "are followed and answered right"}
    names |= {name: f"are right on {name}" for name in UNDERSTANDING} | {"MME": "points of MME are reached"}
    parts = [
        _compared(column, names[column.name], row, other)
        for column, row, other in zip(table.columns, ours.cells, base.cells, strict=True)
        if row and other and row.difference and column.name in names
    ]
    if not parts:
        return "VMTC + CMAI and LLaVA-1.5 left no answers to the same questions, so they cannot be compared."
    seeds = " and ".join(dict.fromkeys(row.about.split(",")[0] for row in (ours, base)))
    return f"With VMTC + CMAI, {', '.join(parts)}. Intervals are over items; {seeds} say little about training again."


def _compared(column: Column, what: str, ours: Any, base: Any) -> str:
    unit, more = " %" if column.factor == 100 else "", ours.difference
    verdict = "within noise" if more.noise else f"interval {more.low:+.1f} to {more.high:+.1f}"
    return f"{ours.value:.1f}{unit} {what} instead of LLaVA-1.5's {base.value:.1f}{unit} ({more.value:+.1f}, {verdict})"


def render(tables: Sequence[Table], notes: Sequence[str], prompts: Mapping[str, Sequence[Prompt]]) -> str:
    """The page."""
    by_key = {table.key: table for table in tables}
    return page.render(
        "tables.html.j2",
        summary=summary(tables),
        tables=[table for table in tables if any(table.blocks.values())],
        tradeoffs=list(_tradeoffs(by_key["models"])),
        ladders={key: list(_ladders(by_key[key])) for key in ("figure-2", "ratios")},
        prompts={label: asked for label, asked in prompts.items() if asked},
        notes=notes,
    )


def _tradeoffs(table: Table) -> list[Drawn]:
    """Understanding against instruction following, a point a model, for each family that has both."""
    up = table.columns.index(next(column for column in table.columns if column.source == IF.source))
    drawn = []
    for label, rows in table.blocks.items():
        for across, column in enumerate(table.columns):
            points = [row for row in rows if row.cells[across] and row.cells[up]]
            if column.name in UNDERSTANDING and points:
                drawn.append(_tradeoff(label, column, points, across, up))
                break
    return drawn


def _tradeoff(family: str, column: Column, rows: Sequence[Line], across: int, up: int) -> Drawn:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=(4.4, 3.5), layout="constrained")
        axes = figure.add_subplot()
        for row in rows:
            x, y = row.cells[across], row.cells[up]
            assert x is not None
            assert y is not None
            shade = SHADES.get(str(row.kind), FAINT)
            axes.errorbar(
                x.value, y.value, xerr=_reach(x), yerr=_reach(y),
                fmt="o", color=shade, ecolor=shade, elinewidth=0.8, markersize=5,
            )  # fmt: skip
        axes.set_xlabel(f"understanding: {column.name}", color=INK)
        axes.set_ylabel("instructions followed, %", color=INK)
        axes.grid(axis="x", color=LINE, linewidth=0.6)
        quiet(axes)
        _name_points(axes, rows, across, up)
        told = "; ".join(f"{row.label} {row.cells[across].value:.1f}, {row.cells[up].value:.1f}" for row in rows)  # type: ignore[union-attr]
        return Drawn(
            "Understanding against instruction following",
            svg(figure, f"tradeoff-{family}-", f"{column.name} and instructions followed: {told}"),
            f"{family}. Up and to the right is better; bars are 95 % intervals.",
        )


def _reach(cell: Any) -> list[list[float]] | None:
    """How far an interval goes down and up, as matplotlib wants it."""
    if cell.interval is None:
        return None
    return [[max(cell.value - cell.interval.low, 0)], [max(cell.interval.high - cell.value, 0)]]


def _name_points(axes: Any, rows: Sequence[Line], across: int, up: int) -> None:
    """Each point's name beside it, at the first of some places where it covers no other name and no point."""
    places = [(x, y, "left" if x > 0 else "right") for y in (4, -11, 16, -22, 28, -34) for x in (7, -7)]
    axes.figure.draw_without_rendering()
    frame = axes.get_window_extent()
    at = [(row.cells[across].value, row.cells[up].value) for row in rows]  # type: ignore[union-attr]
    taken = [_around(*axes.transData.transform(point)) for point in at]
    for row, point in zip(rows, at, strict=True):
        for place, (x, y, side) in enumerate(places):
            text = axes.annotate(
                _short(row.label), point, (x, y), textcoords="offset points", ha=side, fontsize=8,
                color=SHADES.get(str(row.kind), FAINT),
            )  # fmt: skip
            box = text.get_window_extent()
            inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
            if (inside and not any(box.overlaps(other) for other in taken)) or place == len(places) - 1:
                taken.append(box)
                break
            text.remove()


def _short(label: str) -> str:
    return label if len(label) <= 30 else label[:29] + "…"


def _around(x: float, y: float) -> Any:
    from matplotlib.transforms import Bbox

    return Bbox.from_extents(x - 4, y - 4, x + 4, y + 4)


def _ladders(table: Table) -> list[Drawn]:
    """Each column against the share of tokens left out, a line a kind; all of them begin with LLaVA."""
    shown = {*(column.name for column in PILOT), IF.name, "both", *UNDERSTANDING}
    drawn = []
    for family, rows in table.blocks.items():
        for place, column in enumerate(table.columns):
            points = [row for row in rows if row.source == "ours" and row.cells[place]]
            if column.name in shown and len({row.removed for row in points}) > 1:
                drawn.append(
                    _ladder(f"{table.key}-{family}", family if len(table.blocks) > 1 else "", column, points, place)
                )
    return drawn


def _ladder(prefix: str, family: str, column: Column, rows: Sequence[Line], place: int) -> Drawn:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    kinds = dict.fromkeys(row.kind for row in rows if row.kind != "llava")
    markers = dict(zip(kinds, "os^DvPX", strict=False))
    with rc_context(STYLE):
        figure = Figure(figsize=(3.7, 2.8), layout="constrained")
        axes = figure.add_subplot()
        for name in kinds:
            line = sorted((row for row in rows if row.kind == name), key=lambda row: row.removed or 0)
            if len(line) > 1:  # one point is no line, and none is drawn to it
                line = [*(row for row in rows if row.kind == "llava"), *line]
            x = [100 * (row.removed or 0) for row in line]
            y = [row.cells[place].value for row in line]  # type: ignore[union-attr]
            reach = [_reach(row.cells[place]) or [[0], [0]] for row in line]
            ends = [[each[side][0] for each in reach] for side in (0, 1)]
            shade = SHADES.get(str(name), FAINT)
            axes.errorbar(
                x, y, yerr=ends, color=shade, marker=markers[name], markersize=4, linewidth=1.4, elinewidth=0.8,
                label=KINDS[str(name)],
            )  # fmt: skip
        axes.set_xlabel("tokens left out, %", color=INK)
        axes.set_ylabel(_unit(column), color=INK)
        axes.legend(frameon=False, labelcolor=INK, fontsize=8)
        quiet(axes)
        told = "; ".join(f"{row.label} {row.cells[place].value:.1f}" for row in rows)  # type: ignore[union-attr]
        return Drawn(_words(column), svg(figure, f"{prefix}-{column.name}-", f"{_words(column)}: {told}"), family)


def _unit(column: Column) -> str:
    return "%" if column.factor == 100 else "points"


def _words(column: Column) -> str:
    known = {"JSON": "JSON format", IF.name: "Instructions followed", "both": "Followed and right"}
    return known.get(column.name, column.name)
