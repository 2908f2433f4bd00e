"""What each preset leaves of an image and what it costs, as a table for the terminal."""

import json
from collections.abc import Sequence
from pathlib import Path

from redux.configuration import ReduxConfig
from redux.cost import compute_cost
from redux.presets import PRESETS, VICUNA_SIZES, Preset, build_llava_config
from redux.settings import METHODS

COLUMNS = "{:<18} {:>6}  {:<40} {:>8} {:>6} {:>7}  {}"


def table(names: Sequence[str], model: str, text: int) -> str:
    """One row a preset, for a prompt of one image and `text` tokens.

    names: of presets, all where empty.
    model: "7b" or "13b" for LLaVA-1.5, or the folder of a LLaVA, whose own settings become the first row.
    Raises ValueError for a preset or folder that is not there, or settings that do not fit the model.
    """
    if unknown := [name for name in names if name not in PRESETS]:
        raise ValueError(f"preset: got {unknown[0]}, allowed: {', '.join(PRESETS)}")
    rows = {name: PRESETS[name] for name in names or PRESETS}
    saved = None if model in VICUNA_SIZES else _saved(Path(model))
    if saved:
        own = {part: saved.method_settings(part) for part in METHODS}
        rows = {"(as saved)": Preset(description="the folder's own settings", **own), **rows}

    def sized(preset: Preset) -> ReduxConfig:
        return ReduxConfig(**{**saved.to_dict(), **preset.methods}) if saved else build_llava_config(model, preset)

    whole = compute_cost(sized(PRESETS["llava"]), text)
    lines = [COLUMNS.format("preset", "tokens", "block: kept + clusters", "GFLOPs", "share", "KV MiB", "what it is")]
    for name, preset in rows.items():
        try:
            config = sized(preset)
            spent = compute_cost(config, text)
        except ValueError as error:
            if name in names:
                raise ValueError(f"{name}: {error}") from None
            lines.append(f"{name:<18} does not fit: {error}")
            continue
        stages = ", ".join(
            f"{stage.block}: {stage.kept}+{stage.clusters}" for stage in config.compression_stages.values()
        )
        lines.append(
            COLUMNS.format(
                name,
                config.image_seq_length,
                stages or "-",
                _short(spent.flops / 1e9),
                f"{spent.flops / whole.flops:.0%}",
                _short(spent.kv_bytes / 2**20),
                preset.description,
            )
        )
    return "\n".join(lines)


def _short(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def _saved(folder: Path) -> ReduxConfig:
    try:
        if json.loads((folder / "config.json").read_text())["model_type"] == "llava":
            return ReduxConfig.from_pretrained(folder)
    except (OSError, KeyError, json.JSONDecodeError):
        pass
    raise ValueError(
        f"--model: got {folder}, allowed: {', '.join(VICUNA_SIZES)}, or the folder of a LLaVA, with its config.json"
    )
