"""What our pages share: one HTML file each, which needs neither its folder nor a network, and runs no script.

Plots are SVG inside the page and take their colours from its variables, so that they follow its light and dark scheme;
texts are escaped, whatever the template is called.  The look itself is `page.html.j2`, which the templates extend.

Importing this module costs nothing: matplotlib and Jinja are imported by the functions that need them.
"""

from __future__ import annotations

import io
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.core import failures

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# matplotlib accepts no variable, so it draws in stand-ins
COLOURS = {
    "#010203": "var(--ink)",
    "#040506": "var(--faint)",
    "#070809": "var(--line)",
    "#0a0b0c": "var(--accent)",
    "#0d0e0f": "var(--good)",
    "#101112": "var(--bad)",
}
INK, FAINT, LINE, ACCENT, GOOD, BAD = COLOURS
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "redux", "font.family": "sans-serif", "font.size": 9}


def render(template: str, **values: Any) -> str:
    """A template of this folder, filled in."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parents[1] / "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters.update(percent=percent, number=number, duration=duration)
    return environment.get_template(template).render(**values)


def write(path: Path, text: str) -> Path:
    """A reader of the old file never sees half of the new one."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with failures.locate_errors(path):
            part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return path


def quiet(axes: Axes) -> None:
    """Faint lines across, no box around."""
    axes.grid(axis="y", color=LINE, linewidth=0.6)
    axes.tick_params(which="both", color=LINE, labelcolor=INK, length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(LINE)


def svg(figure: Figure, prefix: str, label: str) -> Markup:
    """The figure as an element to put in the page: its ids its own, its colours the page's."""
    from markupsafe import Markup, escape

    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = file.getvalue()
    text = text[text.index("<svg") :].replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1)
    prefix = "".join(letter if letter.isalnum() else "-" for letter in prefix)
    for mark in ('id="', 'href="#', "url(#"):
        text = text.replace(mark, mark + prefix)
    for stand_in, variable in COLOURS.items():
        text = text.replace(stand_in, variable)
    return Markup(text)


def percent(share: float, digits: int = 1) -> str:
    return "–" if math.isnan(share) else f"{100 * share:.{digits}f} %"


def number(value: float) -> str:
    """Three digits, more only before the decimal point: 9,673, 41.2, 0.0312."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if not math.isfinite(value):
        return "–"
    if isinstance(value, int) or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s"
