"""Base of all HTML pages: each is one file that needs neither its folder nor a network and runs no script.

Texts are escaped by Jinja, whatever the template is called. The style sheet is in `page.html.j2`, which the templates
extend. Plots come from `pipelines/report/plots.py`.

Importing this module is cheap: Jinja is imported by the function that needs it.
"""

from __future__ import annotations

import base64
import functools
import io
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.core import storage

if TYPE_CHECKING:
    import jinja2
    import PIL.Image

JPEG_QUALITY = 75
TEXT_LENGTH = 1200
"""Longest text of a question or an answer in a page, in characters."""

UNITS = {"T": 1e12, "G": 1e9, "M": 1e6}


def render(template: str, **values: Any) -> str:
    """Render a template of pipelines/templates."""
    return _load_environment().get_template(template).render(**values)


@functools.cache
def _load_environment() -> jinja2.Environment:
    """Load Jinja. The environment keeps compiled templates, which take longer to compile than to render."""
    import jinja2

    # StrictUndefined: a misspelled name in a template is an error, not an empty text.
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parents[1] / "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters.update(percent=format_percent, number=format_number, duration=format_duration, cut=cut_text)
    return environment


def write(path: Path, text: str) -> Path:
    """Write a file in one atomic step, so that a reader sees the old or the new one as a whole; return its path."""
    # Texts of models may have half of a surrogate pair, which UTF-8 cannot write.
    storage.write(str(path), text.encode(errors="replace"))
    return path


def encode_image(image: PIL.Image.Image) -> str:
    """Encode an image as a data URI, as PNG or JPEG, whichever is smaller: drawings are PNG, photos JPEG."""
    files = []
    for kind, options in (("png", {"optimize": True}), ("jpeg", {"quality": JPEG_QUALITY, "optimize": True})):
        file = io.BytesIO()
        image.save(file, kind, **options)
        files.append((len(file.getvalue()), kind, file.getvalue()))
    _, kind, content = min(files)
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def cut_text(text: Any, length: int = TEXT_LENGTH) -> str:
    """Cut a long text, and say how long it was; "" for None."""
    text = "" if text is None else str(text)
    return text if len(text) <= length else f"{text[:length]}… ({len(text):,} characters)"


def format_percent(fraction: float, digits: int = 1) -> str:
    return "–" if math.isnan(fraction) else f"{100 * fraction:.{digits}f} %"


def format_number(value: Any, digits: int = 3) -> str:
    """Format a number with few significant digits; other values as in a job file.

    All digits before the decimal point are shown up to a million; larger numbers have the unit M, G or T.

    >>> [format_number(value) for value in (9673, 41.23, 0.03118, 212_345_678, float("nan"))]
    ['9,673', '41.2', '0.0312', '212 M', '–']
    >>> [format_number(value, digits=4) for value in (0.913412, True, None, "linear")]
    ['0.9134', 'true', 'null', 'linear']
    """
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    if not isinstance(value, int | float) or math.isinf(value):
        return str(value)
    if math.isnan(value):
        return "–"
    for unit, size in UNITS.items():
        if abs(value) >= size:
            return f"{value / size:.{digits}g} {unit}"
    # Digits before the decimal point are never rounded away.
    is_whole = isinstance(value, int) or abs(value) >= 10 ** (digits - 1)
    return f"{value:,.0f}" if is_whole else f"{value:.{digits}g}"


def format_duration(seconds: float) -> str:
    """Format seconds.

    >>> [format_duration(seconds) for seconds in (5.04, 700, 4680)]
    ['5.0 s', '11 min 40 s', '1 h 18 min']
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s"
