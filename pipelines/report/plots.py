"""Plots as SVG elements of an HTML page, in the colours of the page.

The colours are CSS variables of the page, so plots follow its light and dark scheme.

Importing this module is cheap: matplotlib is imported by the functions that need it.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Matplotlib accepts no CSS variables, so it draws in these colours and to_svg replaces them.
VARIABLE_BY_COLOUR = {
    "#010203": "var(--ink)",
    "#040506": "var(--faint)",
    "#070809": "var(--line)",
    "#0a0b0c": "var(--accent)",
    "#0d0e0f": "var(--good)",
    "#101112": "var(--bad)",
}
INK, FAINT, LINE, ACCENT, GOOD, BAD = VARIABLE_BY_COLOUR
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "redux", "font.family": "sans-serif", "font.size": 9}

POINT_RADIUS = 4
"""Half of the side of a square around a data point that no label may cover, in pixels."""

LABEL_OFFSETS = tuple((x, y) for y in (4, -11, 14, -21, 24, -31) for x in (6, -6))
"""Positions of a label relative to its data point in typographic points, in the order in which they are tried."""


class Plot(NamedTuple):
    """A plot of a page.

    Args:
        title: heading of the plot.
        svg: the SVG element.
        note: text next to the heading or below the plot.
        width: minimum width in pixels at which it can be read; 0 for any.
    """

    title: str
    svg: Markup
    note: str = ""
    width: int = 0


def style_axes(axes: Axes) -> None:
    """Draw faint horizontal grid lines and no frame."""
    axes.grid(axis="y", color=LINE, linewidth=0.6)
    axes.tick_params(which="both", color=LINE, labelcolor=INK, length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(LINE)


def to_svg(figure: Figure, prefix: str, label: str) -> Markup:
    """Render a figure as an SVG element.

    Args:
        figure: the figure, drawn in the colours of VARIABLE_BY_COLOUR.
        prefix: start of all element ids, unique in the page.
        label: description for screen readers.
    """
    from markupsafe import Markup, escape

    # Without date and version, so that the same run gives the same bytes.
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = file.getvalue()
    text = text[text.index("<svg") :].replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1)
    # Ids of several plots in a page must differ, also where they are referenced.
    prefix = "".join(letter if letter.isalnum() else "-" for letter in prefix)
    for mark in ('id="', 'href="#', "url(#"):
        text = text.replace(mark, mark + prefix)
    for colour, variable in VARIABLE_BY_COLOUR.items():
        text = text.replace(colour, variable)
    return Markup(text)


def find_point_boxes(axes: Axes, points: list[tuple[float, float]]) -> list[Any]:
    """Find the areas of the page that data points cover; the figure must be drawn."""
    from matplotlib.transforms import Bbox

    side = 2 * POINT_RADIUS
    pixels = axes.transData.transform(points)
    return [Bbox.from_bounds(x - POINT_RADIUS, y - POINT_RADIUS, side, side) for x, y in pixels]


def place_label(
    axes: Axes, text: str, point: tuple[float, float], colour: str, occupied: list[Any], required: bool
) -> None:
    """Write a label next to a data point, at the first position that is free and inside the axes.

    Args:
        axes: the axes; the figure must be drawn, because positions are in pixels.
        text: the label, never read as a formula.
        point: the data point.
        colour: colour of the text.
        occupied: areas that are already covered; the area of the label is appended.
        required: if no position is free, use the first one inside the axes, else leave the label out.
    """
    # A required label tries all positions a second time, then with nothing to avoid.
    frame = axes.get_window_extent()
    for avoided in [occupied, []] if required else [occupied]:
        for x, y in LABEL_OFFSETS:
            note = axes.annotate(
                text, point, (x, y), textcoords="offset points", ha="left" if x > 0 else "right", fontsize=8,
                color=colour, parse_math=False, in_layout=False,
            )  # fmt: skip
            # Only matplotlib knows the size of a text, so it is drawn and removed again if it does not fit.
            box = note.get_window_extent()
            is_inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
            if is_inside and not any(box.overlaps(other) for other in avoided):
                occupied.append(box)
                return
            note.remove()


def shorten_label(text: str, length: int) -> str:
    """Cut a text to at most `length` characters, with an ellipsis at the end.

    >>> shorten_label("instructions", 6)
    'instr…'
    """
    return text if len(text) <= length else text[: length - 1] + "…"
