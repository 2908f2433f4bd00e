"""Fused decoding gives the attention of the plain code, and writes the same rows into the cache."""

import re
from typing import Any, get_args, get_type_hints

import pytest
import torch
from torch import Tensor, nn

from redux.attention import inhibited_attention
from redux.cmai import Inhibition
from redux.decoding import DecodingStep
from redux.focus_cache import FocusCache, FocusRows
from redux.kernels import set_kernels
from redux.settings import CMAI

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BATCH, PROMPT, NEW, DIM = 2, 70, 3, 12
HINTS = get_type_hints(CMAI)
FUSED = [
    CMAI(gamma_max=0.6, scores=scores, focus=focus)
    for scores in get_args(HINTS["scores"])
    for focus in ("neighbourhood", "tia", "sum")
] + [CMAI(gamma_max=0.6, quantile=quantile) for quantile in ("linear", "count")]
PLAIN_ONLY = [
    (CMAI(focus="discounted"), "focus is discounted"),
    (CMAI(preamble=False), "preamble is false"),
]


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def attention_module(groups: int) -> Any:
    module: Any = nn.Module()
    module.layer_idx, module.is_causal, module.num_key_value_groups = 1, True, groups
    return module


def images_of(generated: bool) -> Tensor:
    """One image and two; with `generated`, the second sequence's first new token is an image token."""
    image = torch.zeros(BATCH, PROMPT + NEW, dtype=torch.bool)
    image[0, 3:50] = True
    image[1, 5:20] = image[1, 40:55] = True
    image[1, PROMPT] = generated
    return image.to(DEVICE)


def decode(
    kind: Any,
    cmai: CMAI,
    padding: str = "left",
    kv_heads: int = 2,
    dtype: torch.dtype = torch.float32,
    generated: bool = False,
    ties: bool = False,
) -> tuple[Tensor, FocusRows]:
    """Attention of the tokens after a prompt, and the cache; the prompt is always plain."""
    total, heads = PROMPT + NEW, 4
    query, key, value = (draw(BATCH, count, total, DIM, seed=count + at) for at, count in enumerate((heads, 2, 2)))
    key, value = (tensor[:, :1].expand(-1, kv_heads, -1, -1).to(dtype) for tensor in (key, value))
    query = torch.zeros_like(query, dtype=dtype) if ties else query.to(dtype)
    image = images_of(generated)
    visible = torch.ones(BATCH, 1, total, total, dtype=torch.bool, device=DEVICE).tril()
    hidden = {"left": slice(0, 4), "right": slice(60, 66), "image": slice(8, 12)}[padding]
    visible[1, :, :, hidden] = False
    module, cache, outputs = attention_module(heads // kv_heads), FocusCache(), []
    pieces = [(0, PROMPT), *((at, at + 1) for at in range(PROMPT, total))]
    for start, end in pieces:
        set_kernels("plain" if end - start > 1 else kind)
        inhibition = Inhibition.for_forward(cmai, 2, image[:, start:end], cache, training=False)
        assert isinstance(inhibition, DecodingStep) == (start > 0)
        outputs.append(
            inhibited_attention(
                module,
                query[:, :, start:end],
                key[:, :, :end],
                value[:, :, :end],
                visible[:, :, start:end, :end],
                inhibition,
            )[0]
        )
    return torch.cat(outputs[1:], dim=1), cache


def assert_equal_to_plain(cmai: CMAI, tolerance: float = 1e-5, **options: Any) -> None:
    plain, fused = (decode(kind, cmai, **options) for kind in ("plain", "fused"))
    torch.testing.assert_close(fused[0], plain[0], rtol=tolerance, atol=tolerance)
    assert fused[1].t2i.keys() == plain[1].t2i.keys()
    for layer, rows in plain[1].t2i.items():
        torch.testing.assert_close(fused[1].t2i[layer], rows, rtol=1e-4, atol=tolerance)


@pytest.mark.parametrize("cmai", FUSED, ids=str)
def test_fused_decoding_equals_plain_decoding(cmai: CMAI) -> None:
    assert_equal_to_plain(cmai)


@pytest.mark.parametrize("padding", ["right", "image"])
@pytest.mark.parametrize("quantile", ["lower", "count"])
def test_keys_out_of_sight_count_neither_for_focus_nor_for_the_quantile(padding: str, quantile: Any) -> None:
    assert_equal_to_plain(CMAI(quantile=quantile), padding=padding)


@pytest.mark.parametrize("kv_heads", [1, 4])
def test_heads_that_share_keys(kv_heads: int) -> None:
    assert_equal_to_plain(CMAI(), kv_heads=kv_heads)


@pytest.mark.parametrize("focus", ["neighbourhood", "sum"])
def test_an_image_token_that_the_model_generates_is_one_of_the_image(focus: Any) -> None:
    assert_equal_to_plain(CMAI(focus=focus, gamma_max=0.8), generated=True)


@pytest.mark.parametrize("quantile", ["lower", "linear", "count"])
def test_ties_are_kept_or_fall_by_position(quantile: Any) -> None:
    assert_equal_to_plain(CMAI(quantile=quantile, focus="tia"), ties=True)


def test_gamma_of_zero_or_nearly_one() -> None:
    for gamma in (0.0, 0.99):
        assert_equal_to_plain(CMAI(gamma_max=gamma))


def test_in_bfloat16_outputs_differ_by_little() -> None:
    plain, fused = (decode(kind, CMAI(focus="tia"), dtype=torch.bfloat16)[0] for kind in ("plain", "fused"))
    assert fused.dtype == torch.bfloat16
    assert (plain - fused).float().abs().mean() < 0.02


@pytest.mark.parametrize(("cmai", "reason"), PLAIN_ONLY, ids=lambda value: str(value)[:20])
def test_settings_without_a_kernel_are_refused_by_name(cmai: CMAI, reason: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"allowed for CMAI in decoding: auto or plain, because {reason}")):
        decode("fused", cmai)


def test_a_mask_of_floats_has_no_kernel() -> None:
    cache = FocusCache()
    image = images_of(generated=False)
    Inhibition.for_forward(CMAI(), 2, image[:, :PROMPT], cache, training=False)
    step = Inhibition.for_forward(CMAI(), 2, image[:, PROMPT : PROMPT + 1], cache, training=False)
    query, key = draw(BATCH, 4, 1, DIM, seed=0), draw(BATCH, 4, PROMPT + 1, DIM, seed=1)
    set_kernels("fused")
    with pytest.raises(ValueError, match="because the mask has floats"):
        inhibited_attention(attention_module(1), query, key, key, torch.zeros(1, 1, 1, PROMPT + 1).to(DEVICE), step)
