"""Image tokens and cost of each preset, as a table for the terminal (`redux cost`)."""

import json
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError

from redux.configuration import ReduxConfig
from redux.cost import compute_cost
from redux.hub import describe_missing
from redux.presets import PRESETS, VICUNA_SIZES, Preset, build_llava_config
from redux.settings import METHODS

COST_ROW_FORMAT = "{:<18} {:>6}  {:<40} {:>8} {:>6} {:>7}  {}"


def format_costs(names: Sequence[str], model: str, text: int) -> str:
    """Format one row per preset, for a prompt with one image.

    Args:
        names: names of presets; empty takes all.
        model: "7b" or "13b" for LLaVA-1.5, or the folder of a LLaVA, whose saved settings become the first row.
        text: text tokens of the prompt.

    Raises:
        ValueError: a preset or the folder does not exist, or a preset does not fit the model.
    """
    if unknown := [name for name in names if name not in PRESETS]:
        raise ValueError(f"preset: got {unknown[0]}, allowed: {', '.join(PRESETS)}")
    rows = {name: PRESETS[name] for name in names or PRESETS}
    saved = None if model in VICUNA_SIZES else _read_config(Path(model))
    if saved:
        methods = {name: saved.method_settings(name) for name in METHODS}
        rows = {"(as saved)": Preset(description="settings of the folder", **methods), **rows}

    def build_config(preset: Preset) -> ReduxConfig:
        return ReduxConfig(**{**saved.to_dict(), **preset.methods}) if saved else build_llava_config(model, preset)

    # The base of the shares: the same model without the methods.
    llava_cost = compute_cost(build_config(PRESETS["llava"]), text)
    lines = [
        COST_ROW_FORMAT.format("preset", "tokens", "block: kept + clusters", "GFLOPs", "share", "KV MiB", "description")
    ]
    for name, preset in rows.items():
        try:
            lines.append(_format_row(name, preset.description, build_config(preset), text, llava_cost.flops))
        except ValueError as error:
            # A preset that the user named is an error; in the list of all it is a line.
            if name in names:
                raise ValueError(f"{name}: {error}") from None
            lines.append(f"{name:<18} does not fit: {error}")
    return "\n".join(lines)


def _format_row(name: str, description: str, config: ReduxConfig, text: int, llava_flops: float) -> str:
    """Format the row of a configuration; ValueError if its compression does not fit the tower."""
    cost = compute_cost(config, text)
    stages = ", ".join(f"{stage.block}: {stage.kept}+{stage.clusters}" for stage in config.compression_stages.values())
    return COST_ROW_FORMAT.format(
        name,
        config.image_seq_length,
        stages or "-",
        _format_number(cost.flops / 1e9),
        f"{cost.flops / llava_flops:.0%}",
        _format_number(cost.kv_bytes / 2**20),
        description,
    )


def _format_number(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def _read_config(folder: Path) -> ReduxConfig:
    try:
        if json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"] == "llava":
            return ReduxConfig.from_pretrained(folder)
    except (OSError, LookupError, TypeError, ValueError, StrictDataclassError):
        pass  # No file, or not the object of a LLaVA; transformers' error for a wrong type is none of Python's
    missing = "" if folder.is_dir() else f"; {describe_missing(folder)}"
    raise ValueError(
        f"--model: got {folder}, allowed: {', '.join(VICUNA_SIZES)}, or the folder of a LLaVA, with its config.json"
        f"{missing}"
    )
