"""Rows of the paper's tables: their models, the runs that match them, and the command that fills a missing row.

A row is a configuration of `redux.PRESETS`. A model matches a row if its methods are of the same kind and keep the same
share of the tokens. Sizes and other options do not matter: 32 of 64 patches match the paper's 288 of 576.
"""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from pipelines.report import paper
from pipelines.report.runs import CLIP_PATCHES, ComparedModel, Family, count_remaining_tokens, select_changed_fields
from pipelines.training.files import JOB_FILE
from redux.presets import PRESETS, Preset
from redux.settings import METHODS, SPATIAL_METHODS, VMTC, Reduction

KIND_BY_METHODS = {
    (None, None): "llava",
    (None, "neighbourhood"): "cmai",
    ("lwp-mg-clst", None): "vmtc",
    ("lwp-mg-clst", "neighbourhood"): "both",
    ("llp", "neighbourhood"): "llp",
    ("lwp", "neighbourhood"): "lwp",
    ("lwp-mg", "neighbourhood"): "lwp-mg",
    ("lwp-mg-clst", "tia"): "tia",
    ("lwp-mg-clst", "sum"): "sum",
    ("lwp-mg-clst", "discounted"): "discounted",
}
"""Rows of Tables 3, 4 and 5, by the parts of VMTC and the focus score of CMAI."""


@dataclass(frozen=True)
class TableRow:
    """A row of a table.

    Args:
        label: name of the row in our tables.
        preset: its methods, for the sizes of CLIP ViT-L/14; None if this project cannot fill the row.
        paper: name of the row in the paper, with {size} if the paper has both sizes.
        uses_captions: the model sees a caption in place of the image.
        checkpoint: Hub id of the model, for a row of another model than LLaVA.
    """

    label: str
    preset: Preset | None
    paper: str | None = None
    uses_captions: bool = False
    checkpoint: str | None = None


LLAVA_ROW = TableRow("LLaVA-1.5", PRESETS["llava"], "LLaVA-1.5-{size}")
BOTH_ROW = TableRow("VMTC + CMAI", PRESETS["default"], "Ours-{size}")
TABLE_ROWS = {
    "table-1": (
        LLAVA_ROW,
        TableRow("SPD", PRESETS["spd"], "SPD-{size}"),
        TableRow("Upper limit", PRESETS["llava"], "Upper Limit-{size}", uses_captions=True),
        BOTH_ROW,
    ),
    "table-2": (
        *(TableRow(name, None, name) for name in list(paper.TABLE_2.rows)[:9]),
        LLAVA_ROW,
        BOTH_ROW,
        TableRow("InstructBLIP-7B", None, "InstructBLIP-7B, 64 tokens", checkpoint="Salesforce/instructblip-vicuna-7b"),
        TableRow(
            "InstructBLIP-13B", None, "InstructBLIP-13B, 64 tokens", checkpoint="Salesforce/instructblip-vicuna-13b"
        ),
        TableRow("VMTC + CMAI, 64 of 576 tokens", PRESETS["tokens-64"], "Ours-{size}, 64 tokens"),
        TableRow("BLIP-2-13B", None, "BLIP-2-13B, 36 tokens"),
        TableRow("PruMerge, 36 of 576 tokens", PRESETS["prumerge"], "LLaVA-Prumerge-{size}, 36 tokens"),
        TableRow("VMTC + CMAI, 36 of 576 tokens", PRESETS["tokens-36"], "Ours-{size}, 36 tokens"),
        TableRow("Random patches", PRESETS["random"]),
    ),
    "table-3": (
        TableRow("neither", PRESETS["llava"], "neither"),
        TableRow("VMTC", PRESETS["vmtc"], "VMTC"),
        TableRow("CMAI", PRESETS["cmai"], "CMAI"),
        TableRow("VMTC + CMAI", PRESETS["default"], "VMTC, CMAI"),
    ),
    "table-4": (
        TableRow("no VMTC", PRESETS["cmai"], "none"),
        TableRow("LLP", PRESETS["llp"], "LLP"),
        TableRow("LWP", PRESETS["lwp"], "LWP"),
        TableRow("LWP + MG", PRESETS["lwp-mg"], "LWP, MG"),
        TableRow("LWP + MG + CLST", PRESETS["lwp-mg-clst"], "LWP, MG, CLST"),
    ),
    "table-5": (
        TableRow("no CMAI", PRESETS["vmtc"], "No CMAI"),
        TableRow("TIA", PRESETS["tia"], "+ TIA"),
        TableRow("Sum TIA", PRESETS["sum-tia"], "+ Sum TIA"),
        TableRow("Discounted Sum TIA", PRESETS["discounted-sum-tia"], "+ Discounted Sum TIA"),
        TableRow("Neighbourhood", PRESETS["default"], "Ours"),
    ),
}
"""Rows of each table of the paper."""

KIND_TITLES = {
    "llava": "LLaVA-1.5",
    "both": "VMTC + CMAI",
    "vmtc": "VMTC",
    "cmai": "CMAI",
    "average": "SPD, average",
    "stride": "SPD, stride",
    "bilinear": "SPD, bilinear",
    "resize": "SPD, smaller image",
    "random": "Random patches",
    "prumerge": "PruMerge",
    "llp": "LLP + CMAI",
    "lwp": "LWP + CMAI",
    "lwp-mg": "LWP + MG + CMAI",
    "tia": "VMTC + TIA",
    "sum": "VMTC + Sum TIA",
    "discounted": "VMTC + Discounted Sum TIA",
    "upper-limit": "Upper limit",
}
"""Names of the kinds of models, in the order of the tables."""

SPD_RATIOS = (0.25, 0.5, 0.75, 0.9)
SWEEP_RATIOS = tuple(round(0.1 * tenth, 1) for tenth in range(10))


def find_kind(methods: Preset, uses_captions: bool = False) -> str | None:
    """Find the paper's name for methods; None if the paper has no such row.

    >>> [find_kind(PRESETS[name]) for name in ("default", "llava", "lwp-mg", "tokens-64", "spd", "evit")]
    ['both', 'llava', 'lwp-mg', 'both', 'average', None]
    """
    if uses_captions:
        return "upper-limit" if methods.methods == PRESETS["llava"].methods else None
    if (methods.cmai and methods.cmai.heads != "mean") or (methods.vmtc and methods.vmtc.sink_norm):
        return None
    if methods.reduction:
        return None if methods.cmai else methods.reduction.method
    parts = _name_vmtc_parts(methods.vmtc) if methods.vmtc else None
    return KIND_BY_METHODS.get((parts, methods.cmai.focus if methods.cmai else None))


def _name_vmtc_parts(vmtc: VMTC) -> str:
    """Name the parts of VMTC that are in use, as in the rows of Table 4."""
    # No clusters is pruning (LLP, LWP), one cluster is merging (MG), more are clustering (CLST).
    clusters = set(vmtc.clusters) if isinstance(vmtc.clusters, tuple) else {vmtc.clusters}
    if clusters == {0} or (clusters == {None} and not vmtc.cluster_share):
        return "llp" if vmtc.stages == (-1,) else "lwp"
    return "lwp-mg" if clusters == {1} else "lwp-mg-clst"


def matches(model: ComparedModel, row: TableRow) -> bool:
    """Return True if a model has the kind of a row and keeps the same share of the tokens."""
    if row.checkpoint:
        return model.is_foreign and Path(model.checkpoint).name == Path(row.checkpoint).name
    # Rows of the paper are models that were trained with the method.
    if row.preset is None or not model.trained_as_evaluated:
        return False
    model_kind = find_kind(model.methods, model.uses_captions)
    row_kind = find_kind(row.preset, row.uses_captions)
    if row_kind in SPATIAL_METHODS and model_kind in SPATIAL_METHODS:
        # Spatial reductions round the tokens to a square, so their number is compared without rescaling the budget.
        return model.num_tokens == count_remaining_tokens(row.preset, model.num_patches)
    rescaled = rescale_budget(row.preset, model.num_patches)
    tokens = count_remaining_tokens(rescaled, model.num_patches, model.num_blocks)
    return model_kind == row_kind and model.num_tokens == tokens


def rescale_budget(preset: Preset, patches: int) -> Preset:
    """Rescale a preset to a tower with another number of patches: a budget in tokens keeps its share of the patches."""
    # Ratios need no change, only budgets in tokens.
    vmtc = preset.vmtc
    reduction = preset.reduction
    if vmtc and vmtc.tokens:
        vmtc = replace(vmtc, tokens=max(round(vmtc.tokens * patches / CLIP_PATCHES), 1))
    if reduction and reduction.tokens:
        reduction = replace(reduction, tokens=max(round(reduction.tokens * patches / CLIP_PATCHES), 2))
    return replace(preset, vmtc=vmtc, reduction=reduction)


def write_command(row: TableRow, family: Family) -> str:
    """Write the `redux run` command that fills a row.

    The command runs the job of a run of this family under another name, in the same folder, with overrides. Budget and
    parts of the methods come from the preset of the row; other options come from the models of the family.
    """
    ranked = _rank_templates(family)
    if command := _write_evaluation_command(row, ranked):
        return command
    assert row.preset is not None
    template = ranked[0]
    completed = _complete_preset(row.preset, ranked)
    overrides = [f"name={_job_name(template)}-{_run_suffix(row)}"]
    # Override only what differs, so that the command stays short.
    for part in METHODS:
        if completed.methods[part] != template.methods.methods[part]:
            overrides.append(f"model.{part}={_write_flow_yaml(completed.methods[part])}")
    if row.uses_captions != template.uses_captions:
        overrides.append(f"evaluate.image_input={'caption' if row.uses_captions else 'pixels'}")
    return _write_run_command(template, overrides)


def _write_evaluation_command(row: TableRow, ranked: Sequence[ComparedModel]) -> str:
    """Write the command for a row without training: another model, or LLaVA with captions; "" for other rows."""
    llava = next((model for model in ranked if not model.is_foreign and find_kind(model.methods) == "llava"), None)
    template = ranked[0] if row.checkpoint else llava
    checkpoint = row.checkpoint or (row.uses_captions and llava and llava.trained_model)
    if template is None or not checkpoint:
        return ""
    suffix = Path(row.checkpoint).name if row.checkpoint else _run_suffix(row)
    overrides = [f"name={_job_name(template)}-{suffix}", "train={}", f"model={{checkpoint: {checkpoint}}}"]
    if row.uses_captions:
        overrides.append("evaluate.image_input=caption")
    return _write_run_command(template, overrides)


def _write_run_command(template: ComparedModel, overrides: Sequence[str]) -> str:
    folder = template.runs[0].folder
    return shlex.join(["redux", "run", str(folder / JOB_FILE), *overrides, "--runs-dir", str(folder.parent)])


def _job_name(model: ComparedModel) -> str:
    return str(model.job.get("name", model.runs[0].folder.name))


def _rank_templates(family: Family) -> list[ComparedModel]:
    """Rank the models of a family as templates of a new job: trained LLaVA models first, with more methods first."""
    order = ("both", "vmtc", "cmai", "llava")

    def sort_key(model: ComparedModel) -> tuple[bool, bool, int]:
        kind = find_kind(model.methods, model.uses_captions)
        is_evaluation_only = not model.job.get("train")
        return model.is_foreign, is_evaluation_only, order.index(kind) if kind in order else len(order)

    return sorted(family.models, key=sort_key)


def _complete_preset(preset: Preset, ranked: Sequence[ComparedModel]) -> Preset:
    """Complete a preset: fields at their defaults get the values of the family's models."""
    preset = rescale_budget(preset, ranked[0].num_patches)
    vmtc = next((model.methods.vmtc for model in ranked if model.methods.vmtc), None)
    cmai = next((model.methods.cmai for model in ranked if model.methods.cmai), None)
    if vmtc and preset.vmtc:
        # The budget, the parts and the stages of LLP are properties of the row, not options of the family.
        stages = VMTC().stages if _name_vmtc_parts(vmtc) == "llp" else vmtc.stages
        options = replace(vmtc, ratio=None, tokens=None, kept=None, clusters=None, stages=stages)
        preset = replace(preset, vmtc=replace(options, **select_changed_fields(preset.vmtc)))
    if cmai and preset.cmai:
        options_of_cmai = replace(cmai, focus="neighbourhood")
        preset = replace(preset, cmai=replace(options_of_cmai, **select_changed_fields(preset.cmai)))
    return preset


def _write_flow_yaml(settings: Any) -> str:
    """Write settings as YAML on one line, without fields at their defaults."""
    if settings is None:
        return "null"
    changed = select_changed_fields(settings)
    values = {key: list(value) if isinstance(value, tuple) else value for key, value in changed.items()}
    return str(yaml.safe_dump(values, default_flow_style=True, width=10_000, sort_keys=False)).strip()


def _run_suffix(row: TableRow) -> str:
    """Make the end of a run's name, the same in every table with this row."""
    if row.uses_captions:
        return "captions"
    assert row.preset is not None
    # The name of the preset, or the label of the row in lower case.
    presets = (name for name, preset in PRESETS.items() if preset.methods == row.preset.methods)
    parts = "".join(letter if letter.isalnum() else " " for letter in row.label.lower()).split()
    return next(presets, "-".join(parts))


def make_spd_rows() -> list[TableRow]:
    """Make the rows of Figure 2. The paper does not print its ratios, so SPD_RATIOS are a choice of this project."""
    reductions = {ratio: Reduction(method="average", ratio=ratio) for ratio in SPD_RATIOS}
    return [
        TableRow(f"SPD {ratio:.0%}", Preset(description="", vmtc=None, cmai=None, reduction=reduction))
        for ratio, reduction in reductions.items()
    ]


def make_sweep_rows() -> list[TableRow]:
    presets = {ratio: Preset(description="", vmtc=VMTC(ratio=ratio)) for ratio in SWEEP_RATIOS} | {
        0.5: PRESETS["default"]
    }
    return [TableRow(f"VMTC + CMAI {ratio:.0%}", preset) for ratio, preset in presets.items()]
