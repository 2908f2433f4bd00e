"""Fused merging of tokens: eq. 7 and 8 of VMTC and their order in three launches, and two for the gradient.

One launch finds the first patch of each output token, one sorts the patches by output token and computes merge weights,
and one sums the patches of each output token. A kept token is a sum of one, with weight 1, and so is copied exactly.
All sums run in float32 and in a fixed order.

Shapes: batch, patches (input tokens), out (output tokens), dim.
"""

from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Bool, Float, Int
from torch import Tensor

from redux.rounding import divide_up, next_power_of_two
from redux.settings import VMTC, CompressionStage

_RAW, _NORMALIZED, _TOTAL = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
_TINY = tl.constexpr(torch.finfo(torch.float32).tiny)


def merge_tokens(
    tokens: Float[Tensor, "batch patches dim"],
    ips: Float[Tensor, "batch patches"],
    ranked: Int[Tensor, "batch patches"],
    label: Int[Tensor, "batch redundant"] | None,
    stage: CompressionStage,
    vmtc: VMTC,
) -> tuple[Float[Tensor, "batch out dim"], Int[Tensor, "batch patches"], Bool[Tensor, "batch out"]]:
    """Keep and merge tokens; arguments and results are those of `redux.vmtc.compress_tokens`.

    Args:
        tokens: patch tokens.
        ips: importance score of each.
        ranked: patches by falling importance.
        label: cluster of each patch from `stage.kept` on, in the order of `ranked`; None drops them.
        stage: numbers of kept tokens and clusters.
        vmtc: settings.
    """
    batch, patches, _ = tokens.shape
    out = stage.num_tokens_out
    first = ranked.new_empty(batch, out, dtype=torch.int32)
    key = ranked.new_empty(batch, patches, dtype=torch.int32)
    by_rank = torch.empty_like(key)
    members, begin, length = torch.empty_like(key), torch.empty_like(first), torch.empty_like(first)
    token_of_patch = torch.empty_like(ranked, memory_format=torch.contiguous_format)
    cluster = torch.empty(batch, out, dtype=torch.bool, device=tokens.device)
    weight, scale = (torch.empty(batch, patches, dtype=torch.float32, device=tokens.device) for _ in range(2))
    # The plan has no gradient; `_Merge` gives the importance one.
    score = ips.detach().contiguous()
    block_p = max(16, next_power_of_two(patches))
    with torch.cuda.device_of(tokens):
        _locate_kernel[(batch,)](
            ranked.contiguous(), ranked if label is None else label, first, by_rank, key, patches, stage.kept, out,
            DROPS=label is None, SPATIAL=vmtc.order == "spatial", BLOCK_P=block_p, num_warps=4,
        )  # fmt: skip
        _arrange_kernel[(batch, divide_up(patches, 16))](
            score, by_rank, key, token_of_patch, members, begin, length, cluster, weight, scale, patches, stage.kept,
            out, SPATIAL=vmtc.order == "spatial",
            WEIGHTS={"raw": _RAW, "normalized": _NORMALIZED, "total": _TOTAL}[vmtc.weights], BLOCK=16,
            BLOCK_P=block_p, num_warps=4,
        )  # fmt: skip
    plan = token_of_patch, members, begin, length, weight, scale
    return _Merge.apply(tokens, ips, plan, vmtc.weights), token_of_patch, cluster


class _Merge(torch.autograd.Function):
    """Weighted sums of the patches of each output token, and their gradients of tokens and importance."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, ips: Tensor, plan: tuple[Tensor, ...], weights: str) -> Tensor:
        _, members, begin, length, weight, _ = plan
        batch, out = begin.shape
        dim = tokens.shape[2]
        merged = tokens.new_empty(batch, out, dim)
        block = min(1024, next_power_of_two(dim))
        with torch.cuda.device_of(tokens):
            _merge_kernel[(batch, out, divide_up(dim, block))](
                tokens, members, begin, length, weight, merged, tokens.stride(0), tokens.stride(1), tokens.shape[1],
                out, dim,
                ROWS=4, BLOCK=block, num_warps=4,
            )  # fmt: skip
        ctx.weights, ctx.ips_dtype = weights, ips.dtype
        # The plan is a few integers a patch, so the backward pass keeps it instead of sorting again.
        ctx.save_for_backward(tokens, *plan)
        return merged

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        tokens, token_of_patch, members, begin, length, weight, scale = ctx.saved_tensors
        gradient = gradient.contiguous()
        batch, patches, dim = tokens.shape
        tokens_gradient = tokens.new_empty(batch, patches, dim)
        ips_gradient = torch.empty_like(weight)
        block = min(1024, next_power_of_two(dim))
        with torch.cuda.device_of(tokens):
            _merge_gradient_kernel[(batch, patches)](
                tokens, gradient, token_of_patch, weight, scale, tokens_gradient, ips_gradient, tokens.stride(0),
                tokens.stride(1), patches, begin.shape[1],
                DIM=dim, BLOCK=block, num_warps=4,
            )  # fmt: skip
            # ips_gradient treats divisors as constants so far.
            if ctx.weights == "normalized":
                _divisor_gradient_kernel[begin.shape](
                    members, begin, length, weight, scale, ips_gradient, patches, begin.shape[1], BLOCK=32, num_warps=1
                )
        if ctx.weights == "total":
            # All merged patches share the divisor.
            shared = (ips_gradient * weight).sum(dim=1, keepdim=True)
            ips_gradient = ips_gradient - torch.where(
                (scale > 0) & (scale < 1 / torch.finfo(scale.dtype).tiny), shared, 0
            )
        return tokens_gradient, ips_gradient.to(ctx.ips_dtype), None, None


def follow_patches(
    previous: Int[Tensor, "batch patches"],
    merged: Bool[Tensor, "batch patches"],
    token_of_patch: Int[Tensor, "batch tokens"],
    cluster: Bool[Tensor, "batch out"],
) -> tuple[Int[Tensor, "batch patches"], Bool[Tensor, "batch patches"]]:
    """Follow the patches through one more compressing block: `redux.vmtc.PatchAssignment.then` in one launch."""
    batch, patches = previous.shape
    current = torch.empty(batch, patches, dtype=torch.long, device=token_of_patch.device)
    now_merged = torch.empty(batch, patches, dtype=torch.bool, device=token_of_patch.device)
    with torch.cuda.device_of(token_of_patch):
        _follow_kernel[(batch, divide_up(patches, 256))](
            previous, merged, token_of_patch.contiguous(), cluster.contiguous(), current, now_merged,
            *previous.stride(), *merged.stride(), patches, token_of_patch.shape[1], cluster.shape[1],
            BLOCK=256, num_warps=4,
        )  # fmt: skip
    return current, now_merged


@triton.jit(do_not_specialize=["patches", "kept", "out"])
@no_type_check
def _locate_kernel(
    ranked, label, first, by_rank, key, patches, kept, out,
    DROPS: tl.constexpr, SPATIAL: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Store the output token of each patch by rank, and a key by which output tokens are sorted.

    Grid: (batch,).

    Args:
        ranked: (batch, patches) patches by falling importance.
        label: (batch, patches - kept) cluster of each redundant patch, by rank; any pointer if they are dropped.
        first: scratch, (batch, out), first patch of each output token.
        by_rank, key: written, (batch, patches).
    """
    image = tl.program_id(0).to(tl.int64)
    first += image * out
    number = tl.arange(0, BLOCK_P)
    inside = number < patches
    tl.store(first + number, patches, mask=number < out)
    tl.debug_barrier()
    patch = tl.load(ranked + image * patches + number, mask=inside, other=0)
    if DROPS:
        output_token = tl.where(number < kept, number, -1)
    else:
        redundant = inside & (number >= kept)
        output_token = tl.load(label + image * (patches - kept) + number - kept, mask=redundant, other=0).to(tl.int32)
        output_token = tl.where(number < kept, number, kept + output_token)
    tl.store(by_rank + image * patches + patch, output_token, mask=inside)
    # Whole numbers: the minimum does not depend on the order.
    tl.atomic_min(first + output_token, patch.to(tl.int32), mask=inside & (output_token >= 0))
    tl.debug_barrier()
    sorts_by = output_token
    if SPATIAL:
        sorts_by = tl.load(first + output_token, mask=inside & (output_token >= 0), other=0)
    tl.store(key + image * patches + patch, tl.where(output_token >= 0, sorts_by, patches), mask=inside)


@triton.jit(do_not_specialize=["patches", "kept", "out"])
@no_type_check
def _arrange_kernel(
    score, by_rank, key, token_of_patch, members, begin, length, cluster, weight, scale, patches, kept, out,
    SPATIAL: tl.constexpr, WEIGHTS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Compare some patches with all of the image: positions of output tokens, their members, and merge weights.

    Grid: (batch, patches / BLOCK).

    Args:
        score: (batch, patches) importance.
        by_rank, key: (batch, patches) output token by rank, and sort key, of `_locate_kernel`.
        token_of_patch, members, weight, scale: written, (batch, patches): output token; patches sorted by output token;
            merge weight; derivative of the weight by the importance, as if the divisor were constant.
        begin, length, cluster: written, (batch, out): range of each output token in members; True if it is merged.
    """
    image = tl.program_id(0).to(tl.int64)
    patch = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = patch < patches
    other = tl.arange(0, BLOCK_P)
    row = image * patches
    # Dropped patches come last, and columns beyond the image after them.
    key_of_other = tl.load(key + row + other, mask=other < patches, other=2147483647)
    key_of_patch = tl.load(key + row + patch, mask=inside, other=2147483647)
    rank_of_other = tl.load(by_rank + row + other, mask=other < patches, other=-1)
    rank_of_patch = tl.load(by_rank + row + patch, mask=inside, other=-1)
    score_of_other = tl.load(score + row + other, mask=other < patches, other=0.0).to(tl.float32)
    score_of_patch = tl.load(score + row + patch, mask=inside, other=0.0).to(tl.float32)
    same = key_of_other[None, :] == key_of_patch[:, None]
    lower = key_of_other[None, :] < key_of_patch[:, None]
    earlier = same & (other[None, :] < patch[:, None])
    position = tl.sum((lower | earlier).to(tl.int32), axis=1)
    number = key_of_patch
    if SPATIAL:
        # The key of an output token is its first patch; count the first patches before it.
        number = tl.sum((lower & (key_of_other == other)[None, :]).to(tl.int32), axis=1)
    in_cluster = inside & (rank_of_patch >= kept)
    is_first = inside & (rank_of_patch >= 0) & (tl.sum(earlier.to(tl.int32), axis=1) == 0)
    tl.store(token_of_patch + row + patch, tl.where(rank_of_patch >= 0, number, -1).to(tl.int64), mask=inside)
    tl.store(members + row + position, patch, mask=inside)
    tl.store(begin + image * out + number, position, mask=is_first)
    tl.store(length + image * out + number, tl.sum(same.to(tl.int32), axis=1), mask=is_first)
    tl.store(cluster + image * out + number, in_cluster, mask=is_first)
    divisor = tl.full((BLOCK,), 1.0, tl.float32)
    if WEIGHTS == _NORMALIZED:
        divisor = tl.maximum(tl.sum(tl.where(same, score_of_other[None, :], 0.0), axis=1), _TINY)
    if WEIGHTS == _TOTAL:
        total = tl.sum(tl.where(rank_of_other >= kept, score_of_other, 0.0), axis=0)
        divisor = tl.maximum(divisor * total, _TINY)
    tl.store(weight + row + patch, tl.where(in_cluster, score_of_patch / divisor, 1.0), mask=inside)
    tl.store(scale + row + patch, tl.where(in_cluster, 1 / divisor, 0.0), mask=inside)


@triton.jit(do_not_specialize=["patches", "out"])
@no_type_check
def _merge_kernel(
    tokens, members, begin, length, weight, merged, stride_batch, stride_token, patches, out, dim,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sum the weighted patches of one output token, by position in the image.

    Grid: (batch, out, dim / BLOCK).

    Args:
        tokens: (batch, patches, dim).
        members, begin, length, weight: as `_arrange_kernel` writes them.
        merged: written, (batch, out, dim).
    """
    image = tl.program_id(0).to(tl.int64)
    number = tl.program_id(1)
    column = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    inside = column < dim
    position = tl.load(begin + image * out + number)
    end = position + tl.load(length + image * out + number)
    total = tl.zeros((BLOCK,), tl.float32)
    # One program adds all members in their order: atomic additions would round differently in each run.
    while position < end:
        step = position + tl.arange(0, ROWS)
        patch = tl.load(members + image * patches + step, mask=step < end, other=0)
        factor = tl.load(weight + image * patches + patch, mask=step < end, other=0.0)
        here = tokens + image * stride_batch + patch.to(tl.int64)[:, None] * stride_token + column[None, :]
        value = tl.load(here, mask=(step < end)[:, None] & inside[None, :], other=0.0).to(tl.float32)
        total += tl.sum(value * factor[:, None], axis=0)
        position += ROWS
    tl.store(merged + (image * out + number) * dim + column, total.to(merged.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["patches", "out"])
@no_type_check
def _merge_gradient_kernel(
    tokens, gradient, token_of_patch, weight, scale, tokens_gradient, ips_gradient, stride_batch, stride_token,
    patches, out, DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of one patch and of its importance, the latter as if divisors were constants.

    Grid: (batch, patches).

    Args:
        tokens, gradient: (batch, patches, dim) and gradient of the output, (batch, out, dim).
        token_of_patch, weight, scale: as `_arrange_kernel` writes them.
        tokens_gradient, ips_gradient: written, (batch, patches, dim) and (batch, patches).
    """
    image = tl.program_id(0).to(tl.int64)
    patch = tl.program_id(1)
    here = image * patches + patch
    number = tl.load(token_of_patch + here)
    factor = tl.load(weight + here)
    factor_of_score = tl.load(scale + here)
    has_token = number >= 0
    along = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, DIM, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < DIM
        there = (image * out + number) * DIM + column
        slope = tl.load(gradient + there, mask=inside & has_token, other=0.0).to(tl.float32)
        tl.store(
            tokens_gradient + here * DIM + column, (slope * factor).to(tokens_gradient.dtype.element_ty), mask=inside
        )
        value = tl.load(
            tokens + image * stride_batch + patch.to(tl.int64) * stride_token + column, mask=inside, other=0.0
        ).to(tl.float32)
        along += slope * value
    # A kept or dropped patch has a scale of 0, and its importance no gradient.
    tl.store(ips_gradient + here, tl.where(factor_of_score > 0, tl.sum(along, axis=0) * factor_of_score, 0.0))


@triton.jit(do_not_specialize=["patches", "out"])
@no_type_check
def _divisor_gradient_kernel(members, begin, length, weight, scale, ips_gradient, patches, out, BLOCK: tl.constexpr):
    """Add the gradient through the divisor that the patches of one output token share.

    Grid: (batch, out).

    Args:
        members, begin, length, weight, scale: as `_arrange_kernel` writes them.
        ips_gradient: (batch, patches) gradient of the importance, changed in place.
    """
    image = tl.program_id(0).to(tl.int64)
    number = tl.program_id(1)
    first = tl.load(begin + image * out + number)
    end = first + tl.load(length + image * out + number)
    divisor = tl.load(scale + image * patches + tl.load(members + image * patches + first))
    # A kept token has no divisor, and one as small as `tiny` is a constant.
    if (divisor > 0) & (divisor < 1 / _TINY):
        shared = tl.zeros((BLOCK,), tl.float32)
        position = first
        while position < end:
            step = position + tl.arange(0, BLOCK)
            patch = image * patches + tl.load(members + image * patches + step, mask=step < end, other=0)
            factor = tl.load(weight + patch, mask=step < end, other=0.0)
            shared += factor * tl.load(ips_gradient + patch, mask=step < end, other=0.0)
            position += BLOCK
        total = tl.sum(shared, axis=0)
        position = first
        while position < end:
            step = position + tl.arange(0, BLOCK)
            patch = image * patches + tl.load(members + image * patches + step, mask=step < end, other=0)
            value = tl.load(ips_gradient + patch, mask=step < end, other=0.0)
            tl.store(ips_gradient + patch, value - total, mask=step < end)
            position += BLOCK


@triton.jit(do_not_specialize=["patches", "tokens", "out"])
@no_type_check
def _follow_kernel(
    previous, merged, token_of_patch, cluster, current, now_merged, stride_previous, stride_previous_patch,
    stride_merged, stride_merged_patch, patches, tokens, out,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Follow some patches of an image through one more compressing block.

    Grid: (batch, patches / BLOCK).

    Args:
        previous, merged: (batch, patches) token and flag of each patch so far.
        token_of_patch, cluster: (batch, tokens) and (batch, out), results of the block.
        current, now_merged: written, (batch, patches).
    """
    image = tl.program_id(0).to(tl.int64)
    patch = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = patch < patches
    before = tl.load(previous + image * stride_previous + patch * stride_previous_patch, mask=inside, other=-1)
    after = tl.load(token_of_patch + image * tokens + before, mask=before >= 0, other=-1)
    was_merged = tl.load(merged + image * stride_merged + patch * stride_merged_patch, mask=inside, other=0) != 0
    in_cluster = tl.load(cluster + image * out + after, mask=after >= 0, other=0) != 0
    tl.store(current + image * patches + patch, after, mask=inside)
    tl.store(now_merged + image * patches + patch, was_merged | in_cluster, mask=inside)
