"""The presets are the paper's rows: their budgets, what each row adds to the one before, and models that they build."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

import redux
from redux.configuration import ReduxConfig
from redux.model import ReduxForConditionalGeneration
from redux.presets import PRESETS, VICUNA_SIZES, build_llava_config
from redux.settings import CMAI, VMTC

Tiny = Callable[..., ReduxForConditionalGeneration]
TOKENS = {"llava": 576, "cmai": 576, "tokens-64": 64, "tokens-36": 36, "spd": 144, "resize": 144, "prumerge": 36}


@pytest.mark.parametrize("size", VICUNA_SIZES)
@pytest.mark.parametrize("name", PRESETS)
def test_each_leaves_the_papers_number_of_tokens(name: str, size: str) -> None:
    assert build_llava_config(size, PRESETS[name]).image_seq_length == TOKENS.get(name, 288)


def test_literal_and_default_differ_where_the_paper_is_silent_or_speaks_against_itself() -> None:
    literal, default = PRESETS["paper-literal"], PRESETS["default"]
    assert (default.vmtc, default.cmai) == (VMTC(), CMAI())
    assert literal.vmtc == replace(VMTC(), weights="raw", order="rank")
    assert literal.cmai == replace(CMAI(), scores="scores")


def test_the_rows_of_table_4_add_one_thing_each() -> None:
    last, layers, merged, clustered = (PRESETS[name].vmtc for name in ("llp", "lwp", "lwp-mg", "lwp-mg-clst"))
    assert last
    assert layers
    assert merged
    assert replace(last, stages=3) == layers
    assert replace(layers, clusters=1) == merged
    assert replace(merged, clusters=None) == clustered
    assert all(PRESETS[name].cmai == CMAI() for name in ("llp", "lwp", "lwp-mg", "lwp-mg-clst"))


def test_the_rows_of_table_5_differ_in_focus_alone() -> None:
    for name, focus in {"tia": "tia", "sum-tia": "sum", "discounted-sum-tia": "discounted"}.items():
        assert PRESETS[name].vmtc == VMTC()
        assert PRESETS[name].cmai == replace(CMAI(), focus=focus)


@pytest.mark.parametrize("name", PRESETS)
def test_each_builds_a_model_that_learns(name: str, tiny: Tiny, sample: Callable[..., dict[str, Any]]) -> None:
    """At 16 patches the budgets of the paper are its share of them."""
    preset = PRESETS[name]
    small = {36: 4, 64: 4}
    vmtc = preset.vmtc and replace(preset.vmtc, tokens=preset.vmtc.tokens and small[preset.vmtc.tokens])
    reduction = preset.reduction and replace(
        preset.reduction, tokens=preset.reduction.tokens and small[preset.reduction.tokens]
    )
    config = tiny(vmtc=None, cmai=None).config.to_dict()
    torch.manual_seed(0)
    model = ReduxForConditionalGeneration(
        ReduxConfig(**{**config, **preset.methods, "vmtc": vmtc, "reduction": reduction})
    )
    inputs = sample(model)
    loss = model.train()(**inputs, labels=inputs["input_ids"]).loss
    loss.backward()
    assert loss.isfinite()
    weight = model.model.vision_tower.encoder.layers[0].mlp.fc1.weight
    assert weight.grad is not None
    assert weight.grad.isfinite().all()
    assert weight.grad.ne(0).any()


def test_the_library_offers_what_its_first_page_names() -> None:
    for name in dir(redux):
        assert getattr(redux, name) is not None
    assert redux.PRESETS is PRESETS
    with pytest.raises(AttributeError, match="module 'redux' has no attribute 'VMTCC'"):
        _ = redux.VMTCC
