"""The fused compression equals the plain one in tokens, slots and gradients, for every option."""

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from redux.kernels import set_kernels
from redux.settings import VMTC, CompressionStage
from redux.vmtc import PatchAssignment, compress_tokens
from tests.redux.kernels.comparison import DEVICE, PLAIN_AND_FUSED, noise


def compress_both(tokens: Tensor, ips: Tensor, stage: CompressionStage, vmtc: VMTC, **options: Any) -> list[Any]:
    """Results and gradients of the plain and of the fused version."""
    results = []
    for choice in PLAIN_AND_FUSED:
        set_kernels(choice)
        leaves = [tokens.clone().requires_grad_(), ips.clone().requires_grad_()]
        # As in the tower, the patches are a view behind the class token.
        padded = torch.cat([leaves[0][:, :1], leaves[0]], dim=1)
        merged, slot, cluster = compress_tokens(padded[:, 1:], leaves[1], stage, vmtc, **options)
        slope = noise(*merged.shape, seed=9).to(merged.dtype)
        gradients = torch.autograd.grad((merged * slope).sum(), leaves, allow_unused=True, materialize_grads=True)
        results.append((merged.detach(), slot, cluster, *gradients))
    return results


@pytest.mark.parametrize("seed", range(8))
def test_equals_the_plain_version_at_random_shapes_and_settings(seed: int) -> None:
    draw = random.Random(seed)
    patches, dim = draw.randint(2, 40), draw.choice([4, 8, 24])
    kept = draw.randint(0, patches - 1)
    clusters = draw.randint(0 if kept else 1, patches - kept)
    options: dict[str, Any] = {
        "weights": ("raw", "normalized", "total")[seed % 3],
        "order": ("rank", "spatial")[seed % 2],
        "seeds": ("strided", "farthest", "random")[seed // 3],
    }
    vmtc = VMTC(**options, iterations=draw.randint(1, 3))
    tokens, ips = noise(2, patches, dim, seed=seed), noise(2, patches + 1, seed=seed + 1).softmax(dim=-1)[:, 1:]
    plain, fused = compress_both(tokens, ips, CompressionStage(0, kept, clusters), vmtc)
    assert torch.equal(fused[1], plain[1])
    assert torch.equal(fused[2], plain[2])
    torch.testing.assert_close(fused[0], plain[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(fused[3], plain[3], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(fused[4], plain[4], rtol=1e-4, atol=3e-4)  # Differences of values up to 100


def test_bfloat16_tokens_equal_the_plain_version_up_to_rounding() -> None:
    tokens, ips = noise(2, 30, 16).bfloat16(), noise(2, 31, seed=1).softmax(dim=-1)[:, 1:]
    plain, fused = compress_both(tokens, ips, CompressionStage(0, 12, 5), VMTC(iterations=3))
    assert torch.equal(fused[1], plain[1])
    torch.testing.assert_close(fused[0], plain[0], rtol=0.01, atol=0.01)
    kept = ~plain[2]
    assert torch.equal(fused[0][kept], plain[0][kept])
    torch.testing.assert_close(fused[3], plain[3], rtol=0.02, atol=0.02)
    torch.testing.assert_close(fused[4], plain[4], rtol=0.02, atol=0.05)


@pytest.mark.parametrize("weight", [1 / 21, 0.0])
def test_a_constant_image_gives_numbers(weight: float) -> None:
    tokens, ips = torch.ones(1, 12, 8, device=DEVICE), torch.full((1, 12), weight, device=DEVICE)
    set_kernels("fused")
    leaves = [tokens.requires_grad_(), ips.requires_grad_()]
    merged, slot, _ = compress_tokens(*leaves, CompressionStage(0, 5, 3), VMTC(iterations=1))
    merged.square().sum().backward()
    assert merged.isfinite().all()
    assert all(leaf.grad is not None and leaf.grad.isfinite().all() for leaf in leaves)
    assert slot.unique().tolist() == list(range(8))


def test_other_features_may_be_clustered() -> None:
    tokens, keys, ips = noise(2, 20, 8), noise(2, 21, 5, seed=3)[:, 1:], noise(2, 20, seed=1).softmax(dim=-1)
    plain, fused = compress_both(tokens, ips, CompressionStage(0, 9, 4), VMTC(iterations=2), cluster_features=keys)
    assert torch.equal(fused[1], plain[1])


def test_patches_are_followed_through_a_stage_as_by_plain_code() -> None:
    slot = torch.tensor([[0, -1, 1, 2], [2, 1, 0, -1]], device=DEVICE)
    cluster = torch.tensor([[True, False, True], [False] * 3], device=DEVICE)
    before = torch.tensor([[3, -1, 1, 0, 2, 2], [0, 1, 2, 3, -1, 1]], device=DEVICE)
    previous = PatchAssignment(before, torch.arange(12, device=DEVICE).view(2, 6) > 9)
    results = []
    for choice in PLAIN_AND_FUSED:
        set_kernels(choice)
        results.append(previous.then(slot, cluster))
    assert torch.equal(results[0].token_of_patch, results[1].token_of_patch)
    assert torch.equal(results[0].merged, results[1].merged)
