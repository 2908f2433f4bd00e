"""Fused kernels of CMAI drop the pairs that the plain code drops, and train a layer alike."""

import random
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from redux.attention import inhibited_attention
from redux.cmai import Inhibition, build_causal_mask
from redux.kernels import masked_attention as attention
from redux.kernels import mean_attention, set_kernels
from redux.kernels.masked_attention import Tiles
from redux.settings import CMAI
from tests.redux.kernels.comparison import DEVICE

VARIANTS = {
    "paper": (CMAI(gamma_max=0.5), 13),
    "paper, no padding": (CMAI(gamma_max=0.8), 12),
    "scores, linear": (CMAI(scores="scores", quantile="linear", gamma_max=0.8), 14),
    "scaled, count": (CMAI(scores="scaled", quantile="count", gamma_max=0.5), 13),
    "tia": (CMAI(focus="tia", gamma_max=0.8), 4),
    "sum, no padding": (CMAI(focus="sum", quantile="count", gamma_max=0.5), 3),
    "discounted": (CMAI(focus="discounted", quantile="linear", gamma_max=0.8), 11),
}
"""Settings, and the seed of queries, keys and images; at a multiple of three there is no padding."""


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles that a short sequence fills several times; the interpreter takes time for each."""
    if DEVICE.type == "cpu":
        tiles = dict.fromkeys((2, 4), Tiles(32, 16, 4, 2))
        monkeypatch.setattr(mean_attention, "LOG_SUM_EXP_TILES", tiles)
        monkeypatch.setattr(mean_attention, "MEAN_TILES", tiles)
        monkeypatch.setattr(attention, "FORWARD_TILES", tiles)
        monkeypatch.setattr(attention, "QUERY_GRADIENT_TILES", tiles)
        monkeypatch.setattr(attention, "KEY_GRADIENT_TILES", dict.fromkeys((2, 4), Tiles(16, 32, 4, 2)))
    warnings.filterwarnings("ignore", category=RuntimeWarning, module="triton")


def draw_call(seed: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Draw queries, keys, values, image tokens anywhere, and padding on either side."""
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    length, kv_heads, groups, dim = draw.randint(20, 45), draw.randint(1, 2), draw.randint(1, 2), draw.choice([16, 20])
    query, key, value = (
        torch.randn(2, length, heads, dim, generator=generator).to(DEVICE, dtype).transpose(1, 2)
        for heads in (kv_heads * groups, kv_heads, kv_heads)
    )
    is_image = torch.rand(2, length, generator=generator) < 0.4
    is_image[0, length // 2 :] = False
    is_image[1, : draw.randint(0, 9)], is_image[1, -1] = False, False
    padding = None
    if seed % 3:
        padding = torch.ones(2, length, dtype=torch.uint8, device=DEVICE)
        padding[0, : draw.randint(0, 6)], padding[1, length - draw.randint(0, 5) :] = 0, 0
    return query, key, value, is_image.to(DEVICE), padding


def both_masks(cmai: CMAI, call: tuple[Any, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the pairs that stay by the kernels and by the plain code, and those that are visible."""
    query, key, _, is_image, padding = call
    inhibition = Inhibition.for_forward(cmai, 2, is_image, None, training=True)
    assert inhibition is not None
    visible = build_causal_mask(padding, query.shape[2], query.device).expand(2, -1, -1, -1)
    fused = inhibition.compute_key_mask(1, query, key, padding, 0.3).pairs.unsqueeze(1)
    return fused & visible, inhibition.compute_mask(1, query, key, visible, 0.3) & visible, visible


@pytest.mark.parametrize(("cmai", "seed"), VARIANTS.values(), ids=VARIANTS)
def test_kernels_drop_the_same_pairs(cmai: CMAI, seed: int) -> None:
    fused, plain, visible = both_masks(cmai, draw_call(seed))
    assert torch.equal(fused, plain)
    assert not torch.equal(plain, visible)


@pytest.mark.parametrize("scores", ["weights", "scores"])
def test_in_bfloat16_few_pairs_change_sides(scores: Any) -> None:
    """The kernels keep scores in float32, the plain code rounds them: stated bound, 5 % of the visible pairs."""
    fused, plain, visible = both_masks(CMAI(scores=scores), draw_call(2, torch.bfloat16))
    assert (fused != plain).sum() < 0.05 * visible.sum()


class Attention(torch.nn.Module):
    """An attention module as transformers makes them."""

    is_causal = True

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.layer_idx, self.num_key_value_groups = 1, groups


def attend(kernels: Any, call: tuple[Any, ...], recompute: bool = False) -> list[Tensor]:
    """Return the output of an inhibited layer, and the gradients of query, key and value."""
    set_kernels(kernels)
    query, key, value, is_image, padding = call
    inhibition = Inhibition.for_forward(CMAI(), 2, is_image, None, training=True)
    mask = padding[:, None, None] if padding is not None else None
    module = Attention(query.shape[1] // key.shape[1])
    inputs = [tensor.detach().requires_grad_() for tensor in (query, key, value)]

    def forward(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return inhibited_attention(module, query, key, value, mask, inhibition)[0]

    out = checkpoint(forward, *inputs, use_reentrant=False) if recompute else forward(*inputs)
    change = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(out)
    return [out, *torch.autograd.grad(out, inputs, change)]


def test_a_layer_has_the_outputs_and_gradients_of_plain_code_also_where_recomputed() -> None:
    for seed in (3, 4):
        fused, plain = (attend(kernels, draw_call(seed)) for kernels in ("fused", "plain"))
        for tensor, expected in zip(fused, plain, strict=True):
            torch.testing.assert_close(tensor, expected, rtol=1e-5, atol=1e-5)
    recomputed = attend("fused", draw_call(seed), recompute=True)
    assert all(torch.equal(stored, again) for stored, again in zip(fused, recomputed, strict=True))


def test_a_row_without_an_image_attends_to_each_key_once() -> None:
    query, key, value, is_image, padding = draw_call(6)  # 45 tokens, more than a tile has
    is_image[1] = False
    call = query, key, value, is_image, padding
    for fused, plain in zip(*(attend(kernels, call) for kernels in ("fused", "plain")), strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-5)


def test_autocast_changes_no_decision() -> None:
    call = draw_call(1, torch.bfloat16)
    expected = attend("fused", call)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        for result, want in zip(attend("fused", call), expected, strict=True):
            assert torch.equal(result, want)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"attention_mask": torch.ones(2, 1, 30, 30, dtype=torch.bool)}, "not causal with padding"),
        ({"dropout": 0.1}, "dropout"),
        ({"position_bias": torch.zeros(1)}, "position_bias"),
        ({"query": torch.zeros(2, 2, 3, 16)}, "earlier tokens"),
        ({"cmai": CMAI(preamble=False)}, "preamble"),
        ({"query": torch.zeros(2, 2, 30, 16, dtype=torch.float64)}, "float64"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_call_without_a_kernel_is_refused_with_its_reason(changes: dict[str, Any], reason: str) -> None:
    set_kernels("fused")
    is_image = (torch.arange(30) < 9).expand(2, -1)
    arguments = SimpleNamespace(
        **{"query": torch.zeros(2, 2, 30, 16), "attention_mask": None, "cmai": CMAI()} | changes
    )
    inhibition = Inhibition.for_forward(arguments.cmai, 2, is_image, None, training=True)
    others = {name: changes[name] for name in ("dropout", "position_bias") if name in changes}
    key = torch.zeros(2, 2, 30, 16)
    with pytest.raises(ValueError, match=f"allowed for CMAI: auto or plain, because .*{reason}"):
        inhibited_attention(Attention(1), arguments.query, key, key, arguments.attention_mask, inhibition, **others)
