"""Fused importance score (eq. 5): attention weights of the class token, without a copy of the keys.

Scores and softmax are computed in float32; the plain version rounds scores to the dtype of queries and keys.

Shapes: batch, heads, tokens (all keys, the class token first), head_dim.
"""

from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from redux.rounding import next_power_of_two


def score_importance(
    query: Float[Tensor, "batch heads 1 head_dim"],
    keys: Float[Tensor, "batch heads tokens head_dim"],
    scale: float,
    bias: Float[Tensor, "batch tokens"] | None,
) -> Float[Tensor, "batch tokens-1"]:
    """Compute the mean over these heads of `redux.vmtc.importance_score`, in two launches."""
    return _ClassAttention.apply(query[:, :, 0], keys, scale, bias).mean(dim=1)[:, 1:]


class _ClassAttention(torch.autograd.Function):
    """Attention weights of one query per head; only queries and keys have a gradient."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, keys: Tensor, scale: float, bias: Tensor | None) -> Tensor:
        batch, heads, tokens, dim = keys.shape
        weights = torch.empty(batch, heads, tokens, dtype=torch.float32, device=keys.device)
        with torch.cuda.device_of(keys):
            _class_attention_kernel[(batch, heads)](
                query, keys, weights if bias is None else bias, weights, scale, *query.stride(), *keys.stride(),
                *((0, 0) if bias is None else bias.stride()), heads, tokens,
                DIM=dim, BIASED=bias is not None, BLOCK_T=next_power_of_two(tokens), BLOCK_D=16, num_warps=8,
            )  # fmt: skip
        ctx.scale = scale
        ctx.save_for_backward(query, keys, weights)
        return weights

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        query, keys, weights = ctx.saved_tensors
        # The derivative of a softmax; scores are float32, and products run in the dtype of the keys.
        weighted_gradient = weights * gradient
        scores_gradient = (weighted_gradient - weights * weighted_gradient.sum(dim=-1, keepdim=True)) * ctx.scale
        scores_gradient = scores_gradient.to(keys.dtype)
        query_gradient = (scores_gradient.unsqueeze(2) @ keys).squeeze(2)
        return query_gradient, scores_gradient.unsqueeze(3) * query.unsqueeze(2), None, None


@triton.jit(do_not_specialize=["tokens", "scale"])
@no_type_check
def _class_attention_kernel(
    query, keys, bias, weights, scale, stride_query, stride_query_head, stride_query_dim, stride_keys,
    stride_keys_head, stride_keys_token, stride_keys_dim, stride_bias, stride_bias_token, heads, tokens,
    DIM: tl.constexpr, BIASED: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Compute the attention weights of one head of an image.

    Grid: (batch, heads).

    Args:
        query, keys: (batch, heads, head_dim) and (batch, heads, tokens, head_dim).
        bias: (batch, tokens), added to the scores; any pointer without one.
        weights: written, (batch, heads, tokens).
    """
    image, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    query += image * stride_query + head * stride_query_head
    keys += image * stride_keys + head * stride_keys_head
    token = tl.arange(0, BLOCK_T)
    inside = token < tokens
    score = tl.zeros((BLOCK_T,), tl.float32)
    for start in range(0, DIM, BLOCK_D):
        column = start + tl.arange(0, BLOCK_D)
        part = tl.load(query + column * stride_query_dim, mask=column < DIM, other=0.0).to(tl.float32)
        here = keys + token[:, None] * stride_keys_token + column[None, :] * stride_keys_dim
        key = tl.load(here, mask=inside[:, None] & (column < DIM)[None, :], other=0.0).to(tl.float32)
        score += tl.sum(key * part[None, :], axis=1)
    score *= scale
    if BIASED:
        added = tl.load(bias + image * stride_bias + token * stride_bias_token, mask=inside, other=0.0)
        score += added.to(tl.float32)
    # A whole row of scores fits into registers, so the softmax needs one pass.
    score = tl.where(inside, score, float("-inf"))
    score = tl.exp(score - tl.max(score, axis=0))
    tl.store(weights + (image * heads + head) * tokens + token, score / tl.sum(score, axis=0), mask=inside)
