"""Cost of a model beside that of a LLaVA of the same sizes, computed from the configuration alone."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from redux.configuration import ReduxConfig
from redux.cost import Cost, compute_cost, compute_step_cost
from redux.settings import METHODS

TEXT_TOKENS = 64
"""Text tokens of the prompt whose cost is shown."""

# Parts of the FLOPs: title, colour and opacity.
FLOPS_PARTS = {
    "tower": ("image tower", "accent", 1.0),
    "compression": ("VMTC or another reduction", "bad", 1.0),
    "projector": ("projector", "accent", 0.4),
    "language": ("language model", "good", 1.0),
    "inhibition": ("CMAI", "bad", 0.55),
}


class CostLine(NamedTuple):
    """A cost of the model and of LLaVA, as text and as a ratio."""

    title: str
    ours: str
    llava: str
    ratio: float


class FlopsPart(NamedTuple):
    """A part of the FLOPs of a prompt: a segment of a bar, in shares of the larger of the two models.

    Args:
        title: name of the part.
        share: its length.
        start: length of all parts before it.
        colour: CSS variable of its colour.
        opacity: opacity of its colour.
    """

    title: str
    share: float
    start: float
    colour: str
    opacity: float


class CostComparison(NamedTuple):
    """Costs, and the FLOPs of a prompt by part as a bar for each of the two models.

    Args:
        lines: the costs.
        bars: title of the model and its parts.
        legend: parts that occur in one of the bars.
        has_method: the model has VMTC, CMAI or another reduction.
        image_tokens: image tokens of the model and of LLaVA.
    """

    lines: tuple[CostLine, ...]
    bars: tuple[tuple[str, str, tuple[FlopsPart, ...]], ...]
    legend: tuple[FlopsPart, ...]
    has_method: bool
    image_tokens: tuple[int, int]


def compare_cost(config: ReduxConfig) -> CostComparison:
    """Compare the cost of a prompt with one image; ValueError if the cost of this model cannot be computed."""
    llava = ReduxConfig(**{**config.to_dict(), **dict.fromkeys(METHODS)})
    costs = [compute_cost(model, TEXT_TOKENS) for model in (config, llava)]
    steps = [compute_step_cost(model, TEXT_TOKENS) for model in (config, llava)]
    lines = (
        _make_line("Image tokens", [config.image_seq_length, llava.image_seq_length]),
        _make_line(f"FLOPs of a prompt with {TEXT_TOKENS} text tokens", [cost.flops for cost in costs]),
        _make_line("FLOPs of the next token", [step.flops for step in steps]),
        _make_line("KV cache and CMAI's cache", [cost.kv_bytes + cost.focus_bytes for cost in costs], _format_bytes),
    )
    longest = max(cost.flops for cost in costs)
    bars = tuple(
        (title, _format(cost.flops), _split_flops(cost, longest))
        for title, cost in zip(("this model", "LLaVA"), costs, strict=True)
    )
    parts = {part.title: part for _, _, bar in reversed(bars) for part in bar if part.share}
    order = [title for title, _, _ in FLOPS_PARTS.values() if title in parts]
    has_method = any(config.method_settings(name) for name in METHODS)
    tokens = config.image_seq_length, llava.image_seq_length
    return CostComparison(lines, bars, tuple(parts[title] for title in order), has_method, tokens)


def _make_line(title: str, costs: Sequence[int], write: Callable[[float], str] | None = None) -> CostLine:
    """Make the line of a cost of the model and of LLaVA."""
    ours, llava = costs
    write = write or _format
    return CostLine(title, write(ours), write(llava), ours / llava)


def _split_flops(cost: Cost, longest: int) -> tuple[FlopsPart, ...]:
    parts = []
    start = 0.0
    for name, (title, colour, opacity) in FLOPS_PARTS.items():
        share = getattr(cost, name) / longest
        parts.append(FlopsPart(title, share, start, colour, opacity))
        start += share
    return tuple(parts)


def _format(number: float) -> str:
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:,.0f}"


def _format_bytes(number: float) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f} B"
