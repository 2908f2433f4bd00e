"""The fused importance score and its gradients equal the plain ones."""

import pytest
import torch

from redux.kernels import set_kernels
from redux.vmtc import importance_score
from tests.redux.kernels.comparison import PLAIN_AND_FUSED, noise


@pytest.mark.parametrize("is_biased", [False, True])
@pytest.mark.parametrize("dim", [8, 24])
def test_equals_the_plain_score_and_its_gradients(is_biased: bool, dim: int) -> None:
    bias = noise(2, 21, seed=2) if is_biased else None
    results = []
    for choice in PLAIN_AND_FUSED:
        set_kernels(choice)
        query, keys = noise(2, 21, 3, dim).requires_grad_(), noise(2, 21, 3, dim, seed=1).requires_grad_()
        ips = importance_score(query.transpose(1, 2)[:, :, :1], keys.transpose(1, 2), 0.3, bias)
        results.append((ips, *torch.autograd.grad((ips * noise(2, 20, seed=3)).sum(), [query, keys])))
    for plain, fused in zip(*results, strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-6)


def test_bfloat16_scores_are_not_rounded() -> None:
    query, keys = noise(2, 3, 1, 16).bfloat16(), noise(2, 3, 30, 16, seed=1).bfloat16()
    set_kernels("plain")
    exact = importance_score(query.float(), keys.float(), 0.25)
    set_kernels("fused")
    torch.testing.assert_close(importance_score(query, keys, 0.25), exact, rtol=1e-5, atol=1e-7)
