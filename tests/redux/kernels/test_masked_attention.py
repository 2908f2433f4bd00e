"""Masked attention in Triton equals scaled-dot-product attention with an explicit mask, gradients included."""

import warnings

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from redux.kernels import masked_attention as kernels
from redux.kernels.masked_attention import KeyMask, Tiles, make_key_mask, masked_attention
from tests.redux.kernels.comparison import DEVICE

LENGTH = 43


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles that a short sequence fills several times; the interpreter takes time for each."""
    if DEVICE.type == "cpu":
        for name, tiles in (("FORWARD", (32, 16)), ("QUERY_GRADIENT", (32, 16)), ("KEY_GRADIENT", (16, 32))):
            monkeypatch.setattr(kernels, f"{name}_TILES", dict.fromkeys((2, 4), Tiles(*tiles, 4, 2)))
    # The logarithm of a row that sees no key is replaced afterwards.
    warnings.filterwarnings("ignore", category=RuntimeWarning, module="triton")


def noise(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return values.to(DEVICE, dtype).transpose(1, 2).requires_grad_()


def random_mask(batch: int, spans: list[tuple[int, int]], first_row: int) -> KeyMask:
    generator = torch.Generator().manual_seed(1)
    pairs = make_key_mask(batch, LENGTH, DEVICE)
    for sequence, (first, last) in enumerate(spans):
        dropped = torch.rand(LENGTH - first_row, last - first, generator=generator) < 0.6
        pairs[sequence, first_row:, first:last] = ~dropped.to(DEVICE)
    return KeyMask(pairs, torch.tensor(spans, dtype=torch.int32, device=DEVICE), first_row)


CASES = {
    "causal": (2, 2, 16, torch.float32, False, None),
    "padding on both sides, shared heads": (4, 2, 24, torch.float32, True, None),
    "mask": (2, 2, 16, torch.float32, False, ([(5, 20), (0, 31)], 21)),
    "mask from row 0, padding, shared heads": (4, 1, 20, torch.float32, True, ([(9, 40), (43, 43)], 0)),
    "bfloat16": (2, 1, 16, torch.bfloat16, True, ([(3, 17), (2, 40)], 18)),
}


@pytest.mark.parametrize("case", CASES)
def test_masked_attention_equals_attention_with_an_explicit_mask(case: str) -> None:
    heads, kv_heads, dim, dtype, padded, masked = CASES[case]
    query = noise(2, LENGTH, heads, dim, dtype=dtype)
    key, value = (noise(2, LENGTH, kv_heads, dim, dtype=dtype, seed=seed) for seed in (1, 2))
    visible = torch.ones(LENGTH, LENGTH, dtype=torch.bool, device=DEVICE).tril().expand(2, 1, -1, -1)
    padding = mask = None
    if padded:
        padding = torch.ones(2, LENGTH, dtype=torch.uint8, device=DEVICE)
        padding[0, :7], padding[1, -4:] = 0, 0
        visible = visible & padding.bool()[:, None, None]
    if masked is not None:
        mask = random_mask(2, *masked)
        visible = visible & mask.pairs.unsqueeze(1)
    out = masked_attention(query, key, value, 0.3, padding, mask)
    shared = (tensor.repeat_interleave(heads // kv_heads, dim=1) for tensor in (key, value))
    with sdpa_kernel(SDPBackend.MATH):  # Fast kernels give rows that see no key other values than zero
        expected = F.scaled_dot_product_attention(query, *shared, attn_mask=visible, scale=0.3)
    change = noise(2, LENGTH, heads, dim, dtype=dtype, seed=3).detach()
    results = [out, *torch.autograd.grad(out, (query, key, value), change)]
    wanted = [expected, *torch.autograd.grad(expected, (query, key, value), change)]
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    for result, want in zip(results, wanted, strict=True):
        torch.testing.assert_close(result, want, rtol=tolerance, atol=tolerance)
    if padded:  # Rows that see no key
        assert (out[0, :, :7] == 0).all()


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("dim", [64, 80, 96, 128])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_a_gpu_computes_every_head_size(dim: int, dtype: torch.dtype) -> None:
    query, key, value = (noise(2, 300, 4, dim, dtype=dtype, seed=seed) for seed in range(3))
    out = masked_attention(query, key, value, dim**-0.5)
    expected = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    tolerance = 1e-4 if dtype == torch.float32 else 0.02
    change = torch.randn_like(out)
    results = [out, *torch.autograd.grad(out, (query, key, value), change)]
    wanted = [expected, *torch.autograd.grad(expected, (query, key, value), change)]
    for result, want in zip(results, wanted, strict=True):
        torch.testing.assert_close(result, want, rtol=tolerance, atol=tolerance)
