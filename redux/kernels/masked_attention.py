"""Causal attention with padding and a mask that all heads share, forward and backward, in Triton.

PyTorch's fast kernels take no mask. These read one only where it can matter: in tiles on the diagonal, and in tiles
of rows from `first_row` on and keys within `span`. Tiles above the diagonal are skipped, and all others are a plain
product. No sum depends on the order in which programs run, so recomputed activations are equal bit for bit.

Three kernels: the forward pass; dq, which also computes delta = sum(dout * out) of each row; and dk with dv, whose
programs add up the query heads that share a key head. A row that sees no key gives zeros.

Scores are kept in base 2: exp2(score * scale * log2(e)).
"""

import math
from typing import Any, NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from redux.rounding import divide_up, next_power_of_two, round_up


class Tiles(NamedTuple):
    """Shape of a kernel's tiles, and its launch.

    Args:
        rows: rows (queries) of a tile.
        keys: keys of a tile.
        warps: warps of a program.
        stages: stages of the software pipeline.
    """

    rows: int
    keys: int
    warps: int
    stages: int


FORWARD_TILES = {2: Tiles(64, 64, 4, 2), 4: Tiles(64, 32, 4, 2)}
QUERY_GRADIENT_TILES = {2: Tiles(64, 64, 4, 2), 4: Tiles(64, 16, 4, 2)}
KEY_GRADIENT_TILES = {2: Tiles(32, 64, 4, 3), 4: Tiles(16, 64, 4, 2)}
"""Tiles of each kernel, by the bytes of an element; those of two bytes were the fastest of eight on an H200.

The longer side of a tile is a multiple of the other: rows of keys in the first two kernels, keys of rows in the third.
"""

LOG2_E = math.log2(math.e)


@triton.jit
@no_type_check
def load_rows(pointer, stride, rows, length, dims, head_dim: tl.constexpr, block_dim: tl.constexpr):
    """Load a (rows, head_dim) tile; zeros beyond the sequence and beyond head_dim."""
    pointers = pointer + rows[:, None] * stride + dims[None, :]
    if head_dim == block_dim:
        return tl.load(pointers, mask=rows[:, None] < length, other=0.0)
    return tl.load(pointers, mask=(rows[:, None] < length) & (dims[None, :] < head_dim), other=0.0)


@triton.jit
@no_type_check
def store_rows(pointer, stride, rows, length, dims, tile, head_dim: tl.constexpr, block_dim: tl.constexpr):
    """Store a (rows, head_dim) tile."""
    pointers = pointer + rows[:, None] * stride + dims[None, :]
    if head_dim == block_dim:
        tl.store(pointers, tile, mask=rows[:, None] < length)
    else:
        tl.store(pointers, tile, mask=(rows[:, None] < length) & (dims[None, :] < head_dim))


@triton.jit
@no_type_check
def visible_pairs(rows, keys, length, padding, mask, mask_stride, diagonal: tl.constexpr, padded: tl.constexpr):
    """Compute the pairs of a tile that stay; rows and keys carry their broadcast shape."""
    stays = (rows >= 0) & (keys < length)
    if diagonal:
        stays = stays & (keys <= rows)
    if padded:
        stays = stays & (tl.load(padding + keys, mask=keys < length, other=0) != 0)
    if mask is not None:
        # Columns are bounded by the stride, a multiple of 16, so that loads stay wide.
        inside = (rows < length) & (keys < mask_stride)
        stays = stays & (tl.load(mask + rows * mask_stride + keys, mask=inside, other=0) != 0)
    return stays


@triton.jit
@no_type_check
def _attend(
    q, accumulator, row_max, row_sum, k_head, v_head, k_stride, v_stride, padding, mask, mask_stride,
    rows, first, last, length, dims, factor,
    diagonal: tl.constexpr, padded: tl.constexpr, head_dim: tl.constexpr, block_dim: tl.constexpr,
    block_keys: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """Add keys first to last to the running softmax of a tile of rows."""
    for start in range(first, last, block_keys):
        keys = start + tl.arange(0, block_keys)
        k = load_rows(k_head, k_stride, keys, length, dims, head_dim, block_dim)
        scores = tl.dot(q, tl.trans(k), input_precision=precision) * factor
        if diagonal or padded or mask is not None:
            stays = visible_pairs(rows[:, None], keys[None, :], length, padding, mask, mask_stride, diagonal, padded)
            scores = tl.where(stays, scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        # A row that has seen no key yet has no finite maximum.
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        weights = tl.exp2(scores - shift[:, None])
        decay = tl.exp2(row_max - shift)
        row_sum = row_sum * decay + tl.sum(weights, 1)
        v = load_rows(v_head, v_stride, keys, length, dims, head_dim, block_dim)
        accumulator = accumulator * decay[:, None]
        accumulator = tl.dot(weights.to(v.dtype), v, accumulator, input_precision=precision)
        row_max = new_max
    return accumulator, row_max, row_sum


@triton.jit
@no_type_check
def masked_span(span, batch, row_start, first_row, block_rows: tl.constexpr, block_keys: tl.constexpr):
    """Compute the keys before the diagonal tile for which a tile of rows reads the mask, in whole tiles.

    There are none for rows before first_row.
    """
    low = tl.load(span + batch * 2) // block_keys * block_keys
    high = tl.cdiv(tl.load(span + batch * 2 + 1), block_keys) * block_keys
    if row_start + block_rows <= first_row:
        low = 0
        high = 0
    return tl.minimum(low, row_start), tl.minimum(high, row_start)


@triton.jit(do_not_specialize=["length", "first_row"])
@no_type_check
def _forward(
    q, k, v, out, lse, padding, mask, span,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, out_batch, out_head, out_row,
    mask_stride, heads, groups, length, first_row, factor,
    head_dim: tl.constexpr, block_dim: tl.constexpr, block_rows: tl.constexpr, block_keys: tl.constexpr,
    precision: tl.constexpr,
):  # fmt: skip
    """Attend from one tile of rows of one head; the tiles with the most keys start first.

    Grid: (length / block_rows, batch x heads).

    Args:
        q, k, v, out: (batch, heads or kv_heads, length, head_dim); out is written.
        lse: written, (batch, heads, length), log2 of the sum of exponentials.
        padding: (batch, length) 0 for keys that no row sees; None without padding.
        mask, span: pairs and span of a `KeyMask`; None without one.
    """
    row_start = (tl.num_programs(0) - 1 - tl.program_id(0)) * block_rows
    batch = tl.program_id(1) // heads
    head = tl.program_id(1) % heads
    # 64 bits, so that offsets into large tensors do not overflow.
    batch_index = batch.to(tl.int64)
    q += batch_index * q_batch + head * q_head
    k += batch_index * k_batch + head // groups * k_head
    v += batch_index * v_batch + head // groups * v_head
    out += batch_index * out_batch + head * out_head
    lse += (batch_index * heads + head) * length
    rows = row_start + tl.arange(0, block_rows)
    dims = tl.arange(0, block_dim)
    padded: tl.constexpr = padding is not None
    if padded:
        padding += batch_index * length
    low = 0
    high = 0
    if mask is not None:
        mask += batch_index * length * mask_stride
        low, high = masked_span(span, batch, row_start, first_row, block_rows, block_keys)
    q_tile = load_rows(q, q_row, rows, length, dims, head_dim, block_dim)
    accumulator = tl.zeros([block_rows, block_dim], tl.float32)
    row_max = tl.full([block_rows], float("-inf"), tl.float32)
    row_sum = tl.zeros([block_rows], tl.float32)
    # Keys before the span and within it; then those between it and the diagonal tile; then that tile.
    if mask is not None:
        accumulator, row_max, row_sum = _attend(
            q_tile, accumulator, row_max, row_sum, k, v, k_row, v_row, padding, None, mask_stride, rows, 0, low,
            length, dims, factor, False, padded, head_dim, block_dim, block_keys, precision,
        )  # fmt: skip
        accumulator, row_max, row_sum = _attend(
            q_tile, accumulator, row_max, row_sum, k, v, k_row, v_row, padding, mask, mask_stride, rows, low, high,
            length, dims, factor, False, padded, head_dim, block_dim, block_keys, precision,
        )  # fmt: skip
    accumulator, row_max, row_sum = _attend(
        q_tile, accumulator, row_max, row_sum, k, v, k_row, v_row, padding, None, mask_stride, rows, high, row_start,
        length, dims, factor, False, padded, head_dim, block_dim, block_keys, precision,
    )  # fmt: skip
    end = tl.minimum(row_start + block_rows, length)
    accumulator, row_max, row_sum = _attend(
        q_tile, accumulator, row_max, row_sum, k, v, k_row, v_row, padding, mask, mask_stride, rows, row_start, end,
        length, dims, factor, True, padded, head_dim, block_dim, block_keys, precision,
    )  # fmt: skip
    sees_none = row_sum == 0.0
    accumulator = accumulator / tl.where(sees_none, 1.0, row_sum)[:, None]
    # Infinity makes every weight of such a row zero in the backward pass.
    tl.store(lse + rows, tl.where(sees_none, float("inf"), row_max + tl.log2(row_sum)), mask=rows < length)
    store_rows(out, out_row, rows, length, dims, accumulator.to(out.dtype.element_ty), head_dim, block_dim)


@triton.jit
@no_type_check
def _add_query_gradient(
    q, dout, gradient, lse, delta, k_head, v_head, k_stride, v_stride, padding, mask, mask_stride,
    rows, first, last, length, dims, factor,
    diagonal: tl.constexpr, padded: tl.constexpr, head_dim: tl.constexpr, block_dim: tl.constexpr,
    block_keys: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """Add the share of keys first to last to dq of a tile of rows."""
    for start in range(first, last, block_keys):
        keys = start + tl.arange(0, block_keys)
        k = load_rows(k_head, k_stride, keys, length, dims, head_dim, block_dim)
        v = load_rows(v_head, v_stride, keys, length, dims, head_dim, block_dim)
        weights = tl.exp2(tl.dot(q, tl.trans(k), input_precision=precision) * factor - lse[:, None])
        if diagonal or padded or mask is not None:
            stays = visible_pairs(rows[:, None], keys[None, :], length, padding, mask, mask_stride, diagonal, padded)
            weights = tl.where(stays, weights, 0.0)
        score_gradient = weights * (tl.dot(dout, tl.trans(v), input_precision=precision) - delta[:, None])
        gradient = tl.dot(score_gradient.to(k.dtype), k, gradient, input_precision=precision)
    return gradient


@triton.jit(do_not_specialize=["length", "first_row"])
@no_type_check
def _query_gradient(
    q, k, v, out, dout, dq, lse, delta, padding, mask, span,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, out_batch, out_head, out_row,
    dout_batch, dout_head, dout_row, dq_batch, dq_head, dq_row,
    mask_stride, heads, groups, length, first_row, factor, scale,
    head_dim: tl.constexpr, block_dim: tl.constexpr, block_rows: tl.constexpr, block_keys: tl.constexpr,
    precision: tl.constexpr,
):  # fmt: skip
    """Compute delta and dq of one tile of rows of one head.

    Grid: (length / block_rows, batch x heads).

    Args:
        q, k, v, out, lse, padding, mask, span: as for `_forward`.
        dout: gradient of out.
        dq, delta: written; delta is sum(dout * out), (batch, heads, length).
    """
    row_start = (tl.num_programs(0) - 1 - tl.program_id(0)) * block_rows
    batch = tl.program_id(1) // heads
    head = tl.program_id(1) % heads
    # 64 bits, so that offsets into large tensors do not overflow.
    batch_index = batch.to(tl.int64)
    q += batch_index * q_batch + head * q_head
    k += batch_index * k_batch + head // groups * k_head
    v += batch_index * v_batch + head // groups * v_head
    out += batch_index * out_batch + head * out_head
    dout += batch_index * dout_batch + head * dout_head
    dq += batch_index * dq_batch + head * dq_head
    lse += (batch_index * heads + head) * length
    delta += (batch_index * heads + head) * length
    rows = row_start + tl.arange(0, block_rows)
    dims = tl.arange(0, block_dim)
    padded: tl.constexpr = padding is not None
    if padded:
        padding += batch_index * length
    low = 0
    high = 0
    if mask is not None:
        mask += batch_index * length * mask_stride
        low, high = masked_span(span, batch, row_start, first_row, block_rows, block_keys)
    q_tile = load_rows(q, q_row, rows, length, dims, head_dim, block_dim)
    dout_tile = load_rows(dout, dout_row, rows, length, dims, head_dim, block_dim)
    out_tile = load_rows(out, out_row, rows, length, dims, head_dim, block_dim)
    # Stored, because the kernel of dk and dv needs delta, too.
    delta_rows = tl.sum(out_tile.to(tl.float32) * dout_tile.to(tl.float32), 1)
    tl.store(delta + rows, delta_rows, mask=rows < length)
    lse_rows = tl.load(lse + rows, mask=rows < length, other=float("inf"))
    gradient = tl.zeros([block_rows, block_dim], tl.float32)
    # Keys before the span and within it; then those between it and the diagonal tile; then that tile.
    if mask is not None:
        gradient = _add_query_gradient(
            q_tile, dout_tile, gradient, lse_rows, delta_rows, k, v, k_row, v_row, padding, None, mask_stride, rows,
            0, low, length, dims, factor, False, padded, head_dim, block_dim, block_keys, precision,
        )  # fmt: skip
        gradient = _add_query_gradient(
            q_tile, dout_tile, gradient, lse_rows, delta_rows, k, v, k_row, v_row, padding, mask, mask_stride, rows,
            low, high, length, dims, factor, False, padded, head_dim, block_dim, block_keys, precision,
        )  # fmt: skip
    gradient = _add_query_gradient(
        q_tile, dout_tile, gradient, lse_rows, delta_rows, k, v, k_row, v_row, padding, None, mask_stride, rows,
        high, row_start, length, dims, factor, False, padded, head_dim, block_dim, block_keys, precision,
    )  # fmt: skip
    end = tl.minimum(row_start + block_rows, length)
    gradient = _add_query_gradient(
        q_tile, dout_tile, gradient, lse_rows, delta_rows, k, v, k_row, v_row, padding, mask, mask_stride, rows,
        row_start, end, length, dims, factor, True, padded, head_dim, block_dim, block_keys, precision,
    )  # fmt: skip
    store_rows(dq, dq_row, rows, length, dims, (gradient * scale).to(dq.dtype.element_ty), head_dim, block_dim)


@triton.jit
@no_type_check
def _add_key_gradients(
    k, v, dk, dv, q_head, dout_head, q_stride, dout_stride, lse, delta, padding, mask, mask_stride,
    keys, first, last, length, dims, factor,
    diagonal: tl.constexpr, padded: tl.constexpr, head_dim: tl.constexpr, block_dim: tl.constexpr,
    block_rows: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """Add the share of rows first to last to dk and dv of a tile of keys. Its products are (keys, rows)."""
    for start in range(first, last, block_rows):
        rows = start + tl.arange(0, block_rows)
        q = load_rows(q_head, q_stride, rows, length, dims, head_dim, block_dim)
        lse_rows = tl.load(lse + rows, mask=rows < length, other=float("inf"))
        weights = tl.exp2(tl.dot(k, tl.trans(q), input_precision=precision) * factor - lse_rows[None, :])
        if diagonal or padded or mask is not None:
            stays = visible_pairs(rows[None, :], keys[:, None], length, padding, mask, mask_stride, diagonal, padded)
            weights = tl.where(stays, weights, 0.0)
        dout = load_rows(dout_head, dout_stride, rows, length, dims, head_dim, block_dim)
        dv = tl.dot(weights.to(dout.dtype), dout, dv, input_precision=precision)
        delta_rows = tl.load(delta + rows, mask=rows < length, other=0.0)
        score_gradient = weights * (tl.dot(v, tl.trans(dout), input_precision=precision) - delta_rows[None, :])
        dk = tl.dot(score_gradient.to(q.dtype), q, dk, input_precision=precision)
    return dk, dv


@triton.jit(do_not_specialize=["length", "first_row"])
@no_type_check
def _key_gradients(
    q, k, v, dout, dk, dv, lse, delta, padding, mask, span,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    dout_batch, dout_head, dout_row, dk_batch, dk_head, dk_row, dv_batch, dv_head, dv_row,
    mask_stride, kv_heads, groups, length, first_row, factor, scale,
    head_dim: tl.constexpr, block_dim: tl.constexpr, block_rows: tl.constexpr, block_keys: tl.constexpr,
    precision: tl.constexpr,
):  # fmt: skip
    """Compute dk and dv of one tile of keys of one key head; the first keys, seen by most rows, start first.

    Grid: (length / block_keys, batch x kv_heads).

    Args:
        q, k, v, dout, lse, delta, padding, mask, span: as for `_query_gradient`.
        dk, dv: written.
    """
    key_start = tl.program_id(0) * block_keys
    batch = tl.program_id(1) // kv_heads
    kv_head = tl.program_id(1) % kv_heads
    # 64 bits, so that offsets into large tensors do not overflow.
    batch_index = batch.to(tl.int64)
    k += batch_index * k_batch + kv_head * k_head
    v += batch_index * v_batch + kv_head * v_head
    dk += batch_index * dk_batch + kv_head * dk_head
    dv += batch_index * dv_batch + kv_head * dv_head
    keys = key_start + tl.arange(0, block_keys)
    dims = tl.arange(0, block_dim)
    padded: tl.constexpr = padding is not None
    if padded:
        padding += batch_index * length
    # Rows below the diagonal tile: without the mask up to masked_from, with it from there on.
    below = key_start + block_keys
    masked_from = length
    if mask is not None:
        mask += batch_index * length * mask_stride
        if (tl.load(span + batch * 2) < below) & (tl.load(span + batch * 2 + 1) > key_start):
            masked_from = tl.maximum(first_row // block_rows * block_rows, below)
    # Query heads in a fixed order, so that their sum is the same in each run.
    k_tile = load_rows(k, k_row, keys, length, dims, head_dim, block_dim)
    v_tile = load_rows(v, v_row, keys, length, dims, head_dim, block_dim)
    dk_tile = tl.zeros([block_keys, block_dim], tl.float32)
    dv_tile = tl.zeros([block_keys, block_dim], tl.float32)
    for group in range(groups):
        head = kv_head * groups + group
        q_head_pointer = q + batch_index * q_batch + head * q_head
        dout_head_pointer = dout + batch_index * dout_batch + head * dout_head
        lse_head = lse + (batch_index * kv_heads * groups + head) * length
        delta_head = delta + (batch_index * kv_heads * groups + head) * length
        dk_tile, dv_tile = _add_key_gradients(
            k_tile, v_tile, dk_tile, dv_tile, q_head_pointer, dout_head_pointer, q_row, dout_row, lse_head, delta_head,
            padding, mask, mask_stride, keys, key_start, tl.minimum(below, length), length, dims, factor,
            True, padded, head_dim, block_dim, block_rows, precision,
        )  # fmt: skip
        dk_tile, dv_tile = _add_key_gradients(
            k_tile, v_tile, dk_tile, dv_tile, q_head_pointer, dout_head_pointer, q_row, dout_row, lse_head, delta_head,
            padding, None, mask_stride, keys, below, tl.minimum(masked_from, length), length, dims, factor,
            False, padded, head_dim, block_dim, block_rows, precision,
        )  # fmt: skip
        if mask is not None:
            dk_tile, dv_tile = _add_key_gradients(
                k_tile, v_tile, dk_tile, dv_tile, q_head_pointer, dout_head_pointer, q_row, dout_row, lse_head,
                delta_head, padding, mask, mask_stride, keys, masked_from, length, length, dims, factor,
                False, padded, head_dim, block_dim, block_rows, precision,
            )  # fmt: skip
    store_rows(dk, dk_row, keys, length, dims, (dk_tile * scale).to(dk.dtype.element_ty), head_dim, block_dim)
    store_rows(dv, dv_row, keys, length, dims, dv_tile.to(dv.dtype.element_ty), head_dim, block_dim)


class KeyMask(NamedTuple):
    """Mask that all heads share, and the pairs outside of which it is True.

    Args:
        pairs: False for pairs that are dropped. Rows lie `pairs.stride(1)` apart, a multiple of 16.
        span: first key, and key after the last one, of each sequence for which the mask is read; never falling.
        first_row: first row for which the mask is read.
    """

    pairs: Bool[Tensor, "batch rows keys"]
    span: Int[Tensor, "batch 2"]
    first_row: int


def make_key_mask(batch: int, length: int, device: torch.device) -> Bool[Tensor, "batch rows keys"]:
    """Make a mask that drops no pair, with the row stride that the kernels need."""
    stride = round_up(length, 16)
    return torch.ones(batch, length, stride, dtype=torch.bool, device=device)[:, :, :length]


def masked_attention(
    query: Float[Tensor, "batch heads rows head_dim"],
    key: Float[Tensor, "batch kv_heads rows head_dim"],
    value: Float[Tensor, "batch kv_heads rows head_dim"],
    scale: float,
    padding: UInt8[Tensor, "batch rows"] | None = None,
    mask: KeyMask | None = None,
) -> Float[Tensor, "batch heads rows head_dim"]:
    """Compute causal attention under padding and a mask, differentiably.

    Args:
        query, key, value: of all tokens.
        scale: factor of the scores.
        padding: 0 for keys that no row sees; None if there are none.
        mask: further pairs that are dropped; None if there are none.
    """
    pairs, span, first_row = mask if mask is not None else (None, None, 0)
    return _MaskedAttention.apply(query, key, value, scale, padding, pairs, span, first_row)


class _MaskedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        padding: Tensor | None,
        pairs: Tensor | None,
        span: Tensor | None,
        first_row: int,
    ) -> Tensor:
        query, key, value = (unit_stride(tensor) for tensor in (query, key, value))
        padding = padding.contiguous() if padding is not None else None
        batch, heads, length, head_dim = query.shape
        # In memory as (batch, rows, heads, head_dim), which the next projection reads without a copy.
        out = query.new_empty(batch, length, heads, head_dim).transpose(1, 2)
        lse = query.new_empty(batch, heads, length, dtype=torch.float32)
        tiles = FORWARD_TILES[query.element_size()]
        _forward[(divide_up(length, tiles.rows), batch * heads)](
            query, key, value, out, lse, padding, pairs, span,
            *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *out.stride()[:3],
            pairs.stride(1) if pairs is not None else 16, heads, heads // key.shape[1], length, first_row,
            scale * LOG2_E, **launch_options(query, tiles),
        )  # fmt: skip
        ctx.save_for_backward(query, key, value, out, lse, padding, pairs, span)
        ctx.scale, ctx.first_row = scale, first_row
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse, padding, pairs, span = ctx.saved_tensors
        dout = unit_stride(dout)
        dq, dk, dv = (torch.empty_like(tensor) for tensor in (query, key, value))
        delta = torch.empty_like(lse)
        batch, heads, length, _ = query.shape
        kv_heads = key.shape[1]
        inputs = [*query.stride()[:3], *key.stride()[:3], *value.stride()[:3]]
        mask_stride = pairs.stride(1) if pairs is not None else 16
        scalars = (heads // kv_heads, length, ctx.first_row, ctx.scale * LOG2_E, ctx.scale)
        tiles = QUERY_GRADIENT_TILES[query.element_size()]
        _query_gradient[(divide_up(length, tiles.rows), batch * heads)](
            query, key, value, out, dout, dq, lse, delta, padding, pairs, span,
            *inputs, *out.stride()[:3], *dout.stride()[:3], *dq.stride()[:3],
            mask_stride, heads, *scalars, **launch_options(query, tiles),
        )  # fmt: skip
        # After dq, which computes delta.
        tiles = KEY_GRADIENT_TILES[query.element_size()]
        _key_gradients[(divide_up(length, tiles.keys), batch * kv_heads)](
            query, key, value, dout, dk, dv, lse, delta, padding, pairs, span,
            *inputs, *dout.stride()[:3], *dk.stride()[:3], *dv.stride()[:3],
            mask_stride, kv_heads, *scalars, **launch_options(query, tiles),
        )  # fmt: skip
        return dq, dk, dv, None, None, None, None, None


def unit_stride(tensor: Tensor) -> Tensor:
    """Return a tensor whose last dimension is contiguous."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def launch_options(query: Tensor, tiles: Tiles) -> dict[str, Any]:
    """Make the compile-time arguments that kernels on heads share."""
    return {
        "head_dim": query.shape[-1],
        "block_dim": max(next_power_of_two(query.shape[-1]), 16),
        "block_rows": tiles.rows,
        "block_keys": tiles.keys,
        # Three products of tensor cores come close to one of float32.
        "precision": "tf32x3" if query.dtype == torch.float32 else None,
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
    }
