"""Fused decoding gives the attention of the plain code, and writes the same rows into the cache."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from redux.attention import inhibited_attention
from redux.cmai import Inhibition
from redux.decoding import DecodingStep
from redux.focus_cache import FocusCache, FocusRows
from redux.kernels import set_kernels
from redux.settings import CMAI
from tests.redux.kernels.comparison import DEVICE

BATCH, PROMPT, NEW, DIM = 2, 70, 2, 12
FUSED: list[tuple[Any, Any, Any, str, int]] = [
    ("weights", "neighbourhood", "lower", "left", 2),
    ("weights", "tia", "linear", "right", 1),
    ("weights", "sum", "count", "image", 4),
    ("scores", "neighbourhood", "linear", "image", 4),
    ("scores", "tia", "count", "left", 2),
    ("scores", "sum", "lower", "right", 1),
    ("scaled", "neighbourhood", "count", "right", 1),
    ("scaled", "tia", "lower", "image", 4),
    ("scaled", "sum", "linear", "left", 2),
]
"""Scores, focus, quantile, padded or masked keys, and key heads, such that any two settings occur together."""

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


def make_image_mask(generated: bool) -> Tensor:
    """One image and two; with `generated`, the first new token of the second sequence is an image token."""
    image = torch.zeros(BATCH, PROMPT + NEW, dtype=torch.bool)
    image[0, 3:50] = True
    image[1, 5:20] = image[1, 40:55] = True
    image[1, PROMPT] = generated
    return image.to(DEVICE)


def decode(
    kernels: Any,
    cmai: CMAI,
    padding: str = "left",
    kv_heads: int = 2,
    dtype: torch.dtype = torch.float32,
    generated: bool = False,
    ties: bool = False,
) -> tuple[Tensor, FocusRows]:
    """Compute the attention of the tokens after a prompt, and their cache; the prompt is always plain."""
    total, heads = PROMPT + NEW, 4
    query, key, value = (
        draw(BATCH, count, total, DIM, seed=count + number) for number, count in enumerate((heads, 2, 2))
    )
    key, value = (tensor[:, :1].expand(-1, kv_heads, -1, -1).to(dtype) for tensor in (key, value))
    query = torch.zeros_like(query, dtype=dtype) if ties else query.to(dtype)
    image = make_image_mask(generated)
    visible = torch.ones(BATCH, 1, total, total, dtype=torch.bool, device=DEVICE).tril()
    hidden = {"left": slice(0, 4), "right": slice(60, 66), "image": slice(8, 12)}[padding]
    visible[1, :, :, hidden] = False
    module, cache, outputs = attention_module(heads // kv_heads), FocusCache(), []
    pieces = [(0, PROMPT), *((position, position + 1) for position in range(PROMPT, total))]
    for start, end in pieces:
        set_kernels("plain" if end - start > 1 else kernels)
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
    plain, fused = (decode(kernels, cmai, **options) for kernels in ("plain", "fused"))
    torch.testing.assert_close(fused[0], plain[0], rtol=tolerance, atol=tolerance)
    assert fused[1].t2i.keys() == plain[1].t2i.keys()
    for layer, rows in plain[1].t2i.items():
        torch.testing.assert_close(fused[1].t2i[layer], rows, rtol=1e-4, atol=tolerance)


@pytest.mark.parametrize(("scores", "focus", "quantile", "padding", "kv_heads"), FUSED)
def test_fused_decoding_equals_plain_decoding(
    scores: Any, focus: Any, quantile: Any, padding: str, kv_heads: int
) -> None:
    cmai = CMAI(gamma_max=0.6, scores=scores, focus=focus, quantile=quantile)
    assert_equal_to_plain(cmai, padding=padding, kv_heads=kv_heads)


@pytest.mark.parametrize("focus", ["neighbourhood", "sum"])
def test_generated_image_tokens_are_inhibited_like_those_of_the_prompt(focus: Any) -> None:
    assert_equal_to_plain(CMAI(focus=focus, gamma_max=0.8), generated=True)


@pytest.mark.parametrize("quantile", ["lower", "linear", "count"])
def test_of_equal_scores_the_same_are_dropped(quantile: Any) -> None:
    assert_equal_to_plain(CMAI(quantile=quantile, focus="tia"), ties=True)


def test_gamma_of_zero_or_nearly_one() -> None:
    for gamma in (0.0, 0.99):
        assert_equal_to_plain(CMAI(gamma_max=gamma))


def test_in_bfloat16_outputs_differ_by_little() -> None:
    plain, fused = (decode(kernels, CMAI(focus="tia"), dtype=torch.bfloat16)[0] for kernels in ("plain", "fused"))
    assert fused.dtype == torch.bfloat16
    assert (plain - fused).float().abs().mean() < 0.02


@pytest.mark.parametrize(("cmai", "reason"), PLAIN_ONLY, ids=lambda value: str(value)[:20])
def test_settings_without_a_kernel_are_refused_by_name(cmai: CMAI, reason: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"allowed for CMAI in decoding: auto or plain, because {reason}")):
        decode("fused", cmai)


def test_a_mask_of_floats_has_no_kernel() -> None:
    cache = FocusCache()
    image = make_image_mask(generated=False)
    Inhibition.for_forward(CMAI(), 2, image[:, :PROMPT], cache, training=False)
    step = Inhibition.for_forward(CMAI(), 2, image[:, PROMPT : PROMPT + 1], cache, training=False)
    query, key = draw(BATCH, 4, 1, DIM, seed=0), draw(BATCH, 4, PROMPT + 1, DIM, seed=1)
    set_kernels("fused")
    with pytest.raises(ValueError, match="because the mask has floats"):
        inhibited_attention(attention_module(1), query, key, key, torch.zeros(1, 1, 1, PROMPT + 1).to(DEVICE), step)
