"""The table of ratios: its rows with their goals, and how a ratio is computed and printed."""

import statistics
from typing import Any, NamedTuple

from jobs.bench.gpu_speed.shapes import Shapes
from jobs.bench.gpu_speed.timing import CHOICES, Bench, TimedChoice, format_medians


class Goal(NamedTuple):
    """One row of the table: a ratio of two variants of a group.

    Args:
        group: key of the results.
        variant: the variant; its plain and fused versions are two columns.
        base: the variant to which it is compared.
        goal: ratio to reach; None without one.
        floor: what fewer tokens allow; None if unknown.
        is_speed: True for base time ÷ variant time, where more is better.
    """

    group: str
    variant: str
    base: str
    goal: float | None
    floor: float | None
    is_speed: bool = False


def list_goals(shapes: Shapes) -> list[Goal]:
    """List the rows of the table; counts of tokens in names are those of the full shapes."""
    # Floors are what fewer tokens would give if the compression itself were free.
    floors = {"288": 0.74, "64": 0.47, "36": 0.41}
    goals = {"288": 0.80, "64": 0.55, "36": 0.50}
    rows = [Goal("tower inference", tokens, "off", goals[tokens], floors[tokens]) for tokens in floors]
    rows += [Goal("tower inference", tokens, "transformers", None, None) for tokens in floors]
    rows += [Goal("tower forward+backward", tokens, "off", None, floors[tokens]) for tokens in floors]
    limits = ((1.06, 1.04, 1.02), (1.10, 1.06, 1.03))
    for (image, text), (weights, scores, floor) in zip(shapes.layer_sequences, limits, strict=True):
        group = f"layer {image}+{text}"
        rows.append(Goal(group, "masked SDPA", "causal SDPA", None, None))
        rows.append(Goal(group, "CMAI weights", "causal SDPA", weights, floor))
        rows.append(Goal(group, "CMAI scores", "causal SDPA", scores, floor))
    for group, half in (("train", 0.78), ("train checkpointing", 0.80)):
        rows.append(Goal(group, "VMTC 288", "LLaVA", None, 0.72))
        rows.append(Goal(group, "CMAI 576", "LLaVA", None, 1.0))
        rows.append(Goal(group, "VMTC+CMAI 288", "LLaVA", half, 0.72))
        rows.append(Goal(group, "VMTC+CMAI 288 scores", "LLaVA", None, 0.72))
        rows.append(Goal(group, "VMTC+CMAI 64", "LLaVA", 0.56, 0.50))
    # The floors of decoding are VMTC alone, as measured on an H200.
    for batch, speed, speed_floor in zip(shapes.decode_batches, (1.2, 1.4), (1.47, 1.59), strict=True):
        for group in (f"batch {batch}", f"graph batch {batch}"):
            for variant in ("VMTC 288", "VMTC+CMAI 288", "VMTC+CMAI 64"):
                is_goal = variant == "VMTC+CMAI 288"
                bounds: tuple[float | None, float | None] = (speed, speed_floor) if is_goal else (None, None)
                rows.append(Goal(f"decode {group}", variant, "LLaVA", bounds[0], bounds[1], is_speed=True))
                bounds = (0.9, 0.7) if is_goal and batch == 1 else (None, None)
                rows.append(Goal(f"prefill {group}", variant, "LLaVA", bounds[0], bounds[1]))
    for variant in ("VMTC 288", "VMTC+CMAI 288"):
        rows.append(Goal("decode compiled", variant, "LLaVA", None, None, is_speed=True))
    return rows


def find_base_times(result: dict[str, Any], goal: Goal) -> list[float]:
    """Return the milliseconds of the base; by CUDA graph it has one variant, with the same choice as the others."""
    return result["ms"].get(f"{goal.base}/plain") or result["ms"].get(f"{goal.base}/fused", [])


def compute_ratio(result: dict[str, Any], goal: Goal, choice: TimedChoice) -> tuple[float, float, float] | None:
    """Compute quartiles of the ratio over rounds: (first, median, third); None if a variant has no times."""
    times = result["ms"].get(f"{goal.variant}/{choice}", [])
    base = find_base_times(result, goal)
    # Of one round each, so that a clock that changes between rounds cancels out.
    pairs = [
        (below / above if goal.is_speed else above / below)
        for above, below in zip(times, base, strict=False)
        if above > 0 and below > 0
    ]
    if not pairs:
        return None
    if len(pairs) == 1:
        return pairs[0], pairs[0], pairs[0]
    lower, median, upper = statistics.quantiles(pairs, n=4, method="inclusive")
    return lower, median, upper


def format_ratio(quartiles: tuple[float, float, float] | None) -> str:
    return "" if quartiles is None else "{1:.3f} ({0:.3f}-{2:.3f})".format(*quartiles)


def build_table(bench: Bench) -> list[dict[str, Any]]:
    """Build the rows of the table from the results so far."""
    rows = []
    for goal in list_goals(bench.shapes):
        result = bench.results.get(goal.group, {})
        if "ms" not in result:
            continue
        row: dict[str, Any] = {"row": f"{goal.group}: {goal.variant} {'speed ' if goal.is_speed else ''}/ {goal.base}"}
        for choice in CHOICES:
            if quartiles := compute_ratio(result, goal, choice):
                row[choice] = [round(value, 4) for value in quartiles]
        rows.append({**row, "goal": goal.goal, "floor": goal.floor, "is_speed": goal.is_speed})
    for group in ("train", "train checkpointing"):
        utilisation = bench.results.get(group, {}).get("utilisation", {})
        for name in ("LLaVA", "VMTC+CMAI 288"):
            values = {
                choice: [utilisation[f"{name}/{choice}"]] * 3 for choice in CHOICES if f"{name}/{choice}" in utilisation
            }
            if values:
                goal_value = 0.5 if name != "LLaVA" and group == "train" else None
                rows.append(
                    {"row": f"{group}: {name} model FLOPs utilisation", **values, "goal": goal_value, "floor": None}
                    | {"is_speed": True}
                )
    return rows


def print_table(bench: Bench) -> None:
    """Print the table, then the milliseconds of each variant and the errors."""
    print(f"\n{'':60} {'plain':>22} {'fused':>22} {'goal':>7} {'floor':>6}")
    for row in build_table(bench):
        sign = ">=" if row["is_speed"] else "<="
        goal = "" if row["goal"] is None else f"{sign}{row['goal']:.2f}"
        floor = "" if row["floor"] is None else f"{row['floor']:.2f}"
        plain, fused = (format_ratio(tuple(row[choice]) if choice in row else None) for choice in CHOICES)
        best = row.get("fused", row.get("plain"))
        is_met = (
            best is not None and row["goal"] is not None and (best[1] - row["goal"]) * (1 if sign == ">=" else -1) >= 0
        )
        print(f"{row['row']:60} {plain:>22} {fused:>22} {goal:>7} {floor:>6} {'met' if is_met else ''}")
    for group, result in bench.results.items():
        details = {name: value for name, value in result.items() if name != "ms" and value}
        print(f"\n{group}: {format_medians(result) if 'ms' in result else ''}")
        for name, value in details.items():
            print(f"  {name}: {value}")
    print(flush=True)
