"""Which row of the paper's tables a model is by its settings, and the command that would fill a row.

A row is a configuration of `redux.PRESETS`.  A model is that row if its settings are of the same kind and leave the
same share of an image, whatever its sizes and its other options: 32 of 64 patches are the paper's 288 of 576.
"""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from pipelines.report.runs import PATCHES, Family, Model, changes, left
from redux.presets import PRESETS, Preset
from redux.settings import METHODS, SPATIAL_METHODS, VMTC

KINDS = {
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
class Slot:
    """A row of a table.

    preset: its configuration, in a tower of CLIP ViT-L/14's sizes; None where there is nothing here that could fill it.
    paper: what the paper's table calls it, with {size} where it has both sizes.
    described: whether the model is told of the image instead of shown it.
    checkpoint: of a row that is another model: its hub id.
    """

    label: str
    preset: Preset | None
    paper: str | None = None
    described: bool = False
    checkpoint: str | None = None


def kind(given: Preset, described: bool = False) -> str | None:
    """What the paper has of such settings; None for nothing.

    >>> [kind(PRESETS[name]) for name in ("default", "llava", "lwp-mg", "tokens-64", "spd", "evit")]
    ['both', 'llava', 'lwp-mg', 'both', 'average', None]
    """
    if described:
        return "upper-limit" if given.methods == PRESETS["llava"].methods else None
    if given.reduction:
        return None if given.cmai else given.reduction.method
    return KINDS.get((_parts(given.vmtc) if given.vmtc else None, given.cmai.focus if given.cmai else None))


def _parts(vmtc: VMTC) -> str:
    """The row of Table 4."""
    clusters = set(vmtc.clusters) if isinstance(vmtc.clusters, tuple) else {vmtc.clusters}
    if clusters == {0} or (clusters == {None} and not vmtc.cluster_share):
        return "llp" if vmtc.stages == (-1,) else "lwp"
    return "lwp-mg" if clusters == {1} else "lwp-mg-clst"


def fills(model: Model, slot: Slot) -> bool:
    """Whether a model is of a row's kind and leaves as much of an image."""
    if slot.checkpoint:
        return model.foreign and Path(model.checkpoint).name == Path(slot.checkpoint).name
    if slot.preset is None or not model.trained:
        return False
    own, wanted = kind(model.methods, model.described), kind(slot.preset, slot.described)
    if wanted in SPATIAL_METHODS and own in SPATIAL_METHODS:  # each takes the nearest square
        return model.tokens == left(slot.preset, model.patches)
    return own == wanted and model.tokens == left(fitting(slot.preset, model.patches), model.patches, model.blocks)


def fitting(preset: Preset, patches: int) -> Preset:
    """A preset for a tower of so many patches: a budget of tokens becomes the same share of them."""
    vmtc, reduction = preset.vmtc, preset.reduction
    if vmtc and vmtc.tokens:
        vmtc = replace(vmtc, tokens=max(round(vmtc.tokens * patches / PATCHES), 1))
    if reduction and reduction.tokens:
        reduction = replace(reduction, tokens=max(round(reduction.tokens * patches / PATCHES), 2))
    return replace(preset, vmtc=vmtc, reduction=reduction)


def command(slot: Slot, family: Family) -> str:
    """`redux run` with the job of a run of this family, under another name beside it, and with what else has to be
    another.

    The row's budget and parts are the preset's, whatever it leaves open is as in the family's other models.
    """
    ranked = _ranked(family)
    if asked := _asked(slot, ranked):
        return asked
    assert slot.preset is not None
    like, wanted = ranked[0], _target(slot.preset, ranked)
    overrides = [f"name={_base(like)}-{_name(slot)}"]
    for part in METHODS:
        if wanted.methods[part] != like.methods.methods[part]:
            overrides.append(f"model.{part}={_flow(wanted.methods[part])}")
    if slot.described != like.described:
        overrides.append(f"evaluate.image_input={'described' if slot.described else 'seen'}")
    return _beside(like, overrides)


def _asked(slot: Slot, ranked: Sequence[Model]) -> str:
    """The command where nothing has to be trained: another model, or LLaVA asked in another way; else ""."""
    plain = next((model for model in ranked if not model.foreign and kind(model.methods) == "llava"), None)
    like = ranked[0] if slot.checkpoint else plain
    checkpoint = slot.checkpoint or (slot.described and plain and plain.result)
    if like is None or not checkpoint:
        return ""
    overrides = [f"name={_base(like)}-{Path(slot.checkpoint).name if slot.checkpoint else _name(slot)}"]
    overrides += ["train={}", f"model={{checkpoint: {checkpoint}}}"]
    return _beside(like, overrides + ["evaluate.image_input=caption"] * slot.described)


def _beside(like: Model, overrides: Sequence[str]) -> str:
    folder = like.runs[0].folder
    return shlex.join(["redux", "run", str(folder / "job.yaml"), *overrides, "--runs-dir", str(folder.parent)])


def _base(like: Model) -> str:
    return str(like.job.get("name", like.runs[0].folder.name))


def _ranked(family: Family) -> list[Model]:
    """Those first whose job another is best made of: trained themselves, with both modules, or one, or none."""
    order = ("both", "vmtc", "cmai", "llava")

    def distance(model: Model) -> tuple[bool, bool, int]:
        own = kind(model.methods, model.described)
        asked = not model.job.get("train")
        return model.foreign, asked, order.index(own) if own in order else len(order)

    return sorted(family.models, key=distance)


def _target(preset: Preset, ranked: Sequence[Model]) -> Preset:
    """The preset, with what its family has of options wherever it leaves them at their defaults."""
    preset = fitting(preset, ranked[0].patches)
    vmtc = next((model.methods.vmtc for model in ranked if model.methods.vmtc), None)
    cmai = next((model.methods.cmai for model in ranked if model.methods.cmai), None)
    if vmtc and preset.vmtc:
        stages = VMTC().stages if _parts(vmtc) == "llp" else vmtc.stages
        open_ = replace(vmtc, ratio=None, tokens=None, kept=None, clusters=None, stages=stages)
        preset = replace(preset, vmtc=replace(open_, **changes(preset.vmtc)))
    if cmai and preset.cmai:
        preset = replace(preset, cmai=replace(replace(cmai, focus="neighbourhood"), **changes(preset.cmai)))
    return preset


def _flow(value: Any) -> str:
    """Settings on one line of YAML, without those at their defaults."""
    if value is None:
        return "null"
    told = {key: list(each) if isinstance(each, tuple) else each for key, each in changes(value).items()}
    return str(yaml.safe_dump(told, default_flow_style=True, width=10_000, sort_keys=False)).strip()


def _name(slot: Slot) -> str:
    """Of a run, the same in every table that has the row: the preset's, or else the label in letters for a folder."""
    if slot.described:
        return "described"
    assert slot.preset is not None
    named = (name for name, preset in PRESETS.items() if preset.methods == slot.preset.methods)
    return next(named, "-".join("".join(letter if letter.isalnum() else " " for letter in slot.label.lower()).split()))
