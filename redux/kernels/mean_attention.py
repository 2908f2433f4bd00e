"""Mean attention of text rows over all heads, without a map of every head, in Triton.

Two kernels for weights, one for raw scores:

1. The log-sum-exp of each (head, row): a flash attention's forward pass without values.
2. A tile of (rows, keys) of A stays in registers while a program loops over the heads. It writes what CMAI reads: A of
   earlier keys from the first text row on, strictly below the diagonal, and A_t2i with image tokens side by side.

Tiles above the diagonal, and tiles of keys that CMAI does not read, cost nothing.
"""

from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from redux.kernels.masked_attention import LOG2_E, Tiles, launch_options, load_rows, unit_stride, visible_pairs
from redux.rounding import divide_up, round_up

LOG_SUM_EXP_TILES = {2: Tiles(64, 64, 4, 3), 4: Tiles(64, 32, 4, 2)}
MEAN_TILES = {2: Tiles(64, 64, 4, 3), 4: Tiles(64, 32, 4, 2)}
"""Tiles of the kernels, by the bytes of an element; those of two bytes were the fastest of eight on an H200.

The first key of a tile is a multiple of its keys.
"""


@triton.jit
@no_type_check
def _add_exponentials(
    q, row_max, row_sum, k_head, k_stride, padding, rows, first, last, length, dims, factor,
    diagonal: tl.constexpr, padded: tl.constexpr, head_dim: tl.constexpr, block_dim: tl.constexpr,
    block_keys: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """Add keys first to last to the running maximum and sum of a tile of rows."""
    for start in range(first, last, block_keys):
        keys = start + tl.arange(0, block_keys)
        k = load_rows(k_head, k_stride, keys, length, dims, head_dim, block_dim)
        scores = tl.dot(q, tl.trans(k), input_precision=precision) * factor
        if diagonal or padded:
            stays = visible_pairs(rows[:, None], keys[None, :], length, padding, None, 0, diagonal, padded)
            scores = tl.where(stays, scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        row_sum = row_sum * tl.exp2(row_max - shift) + tl.sum(tl.exp2(scores - shift[:, None]), 1)
        row_max = new_max
    return row_max, row_sum


@triton.jit(do_not_specialize=["length", "first_row"])
@no_type_check
def _log_sum_exp(
    q, k, lse, padding,
    q_batch, q_head, q_row, k_batch, k_head, k_row, heads, groups, length, first_row, factor,
    head_dim: tl.constexpr, block_dim: tl.constexpr, block_rows: tl.constexpr, block_keys: tl.constexpr,
    precision: tl.constexpr,
):  # fmt: skip
    """Compute log2(sum(2^score)) of one tile of rows of one head; infinity for a row that sees no key.

    Grid: (text / block_rows, batch x heads).

    Args:
        q, k: (batch, heads or kv_heads, length, head_dim).
        lse: written, (batch, heads, text), for rows from first_row on.
        padding: (batch, length) 0 for keys that no row sees; None without padding.
    """
    row_start = first_row + (tl.num_programs(0) - 1 - tl.program_id(0)) * block_rows
    batch = tl.program_id(1) // heads
    head = tl.program_id(1) % heads
    # 64 bits, so that offsets into large tensors do not overflow.
    batch_index = batch.to(tl.int64)
    q += batch_index * q_batch + head * q_head
    k += batch_index * k_batch + head // groups * k_head
    lse += (batch_index * heads + head) * (length - first_row)
    rows = row_start + tl.arange(0, block_rows)
    dims = tl.arange(0, block_dim)
    padded: tl.constexpr = padding is not None
    if padded:
        padding += batch_index * length
    q_tile = load_rows(q, q_row, rows, length, dims, head_dim, block_dim)
    row_max = tl.full([block_rows], float("-inf"), tl.float32)
    row_sum = tl.zeros([block_rows], tl.float32)
    # Tiles below the diagonal need no causal mask.
    diagonal = row_start // block_keys * block_keys
    row_max, row_sum = _add_exponentials(
        q_tile, row_max, row_sum, k, k_row, padding, rows, 0, diagonal, length, dims, factor, False, padded,
        head_dim, block_dim, block_keys, precision,
    )  # fmt: skip
    row_max, row_sum = _add_exponentials(
        q_tile, row_max, row_sum, k, k_row, padding, rows, diagonal, tl.minimum(row_start + block_rows, length), length,
        dims, factor, True, padded, head_dim, block_dim, block_keys, precision,
    )  # fmt: skip
    sees_none = row_sum == 0.0
    row_sum = tl.where(sees_none, 1.0, row_sum)
    tl.store(lse + rows - first_row, tl.where(sees_none, float("inf"), row_max + tl.log2(row_sum)), mask=rows < length)


@triton.jit(do_not_specialize=["length", "first_row", "t2i_batch", "t2i_row"])
@no_type_check
def _mean(
    q, k, lse, image_index, padding, t2t, t2i,
    q_batch, q_head, q_row, k_batch, k_head, k_row, t2t_row, t2i_batch, t2i_row,
    heads, groups, length, first_row, factor, share,
    weights: tl.constexpr, neighbours: tl.constexpr,
    head_dim: tl.constexpr, block_dim: tl.constexpr, block_rows: tl.constexpr, block_keys: tl.constexpr,
    precision: tl.constexpr,
):  # fmt: skip
    """Compute one tile of A, for one sequence.

    Grid: (length / block_keys, text / block_rows, batch).

    Args:
        q, k, lse, padding: as for `_log_sum_exp`.
        image_index: (batch, length) index of each image token; -1 for text.
        t2t: written, (batch, text, text); None without neighbours.
        t2i: written, (batch, text, image).
        share: factor of the sum over heads.
    """
    key_start = tl.program_id(0) * block_keys
    row_start = first_row + tl.program_id(1) * block_rows
    batch = tl.program_id(2).to(tl.int64)
    num_rows = length - first_row
    rows = row_start + tl.arange(0, block_rows)
    keys = key_start + tl.arange(0, block_keys)
    dims = tl.arange(0, block_dim)
    padded: tl.constexpr = padding is not None
    if padded:
        padding += batch * length
    image_index += batch * length
    index_of_key = tl.load(image_index + keys, mask=keys < length, other=-1)
    has_image = tl.max(index_of_key, 0) >= 0
    has_neighbours = neighbours and key_start + block_keys > first_row
    below = key_start < row_start + block_rows
    mean = tl.zeros([block_rows, block_keys], tl.float32)
    if below & (has_image | has_neighbours):
        q += batch * q_batch
        k += batch * k_batch
        lse += batch * heads * num_rows
        for head in range(heads):
            q_tile = load_rows(q + head * q_head, q_row, rows, length, dims, head_dim, block_dim)
            k_tile = load_rows(k + head // groups * k_head, k_row, keys, length, dims, head_dim, block_dim)
            if weights:
                # A pair that is not visible may overflow; it is set to zero below.
                scores = tl.dot(q_tile, tl.trans(k_tile), input_precision=precision)
                lse_rows = tl.load(lse + head * num_rows + rows - first_row, mask=rows < length, other=float("inf"))
                mean += tl.exp2(scores * factor - lse_rows[:, None])
            else:
                mean = tl.dot(q_tile, tl.trans(k_tile), mean, input_precision=precision)
        stays = visible_pairs(rows[:, None], keys[None, :], length, padding, None, 0, True, padded)
        mean = tl.where(stays, mean * share, 0.0)
        is_text_row = tl.load(image_index + rows, mask=rows < length, other=0) < 0
        to_t2i = t2i + batch * t2i_batch + (rows[:, None] - first_row) * t2i_row + index_of_key[None, :]
        is_image_key = (rows[:, None] < length) & (index_of_key[None, :] >= 0)
        tl.store(to_t2i, tl.where(is_text_row[:, None], mean, 0.0), mask=is_image_key)
    if neighbours:
        # Zeros on and above the diagonal; columns reach up to the row stride of t2t.
        column = keys - first_row
        mean = tl.where(keys[None, :] < rows[:, None], mean, 0.0)
        to_t2t = t2t + (batch * num_rows + rows[:, None] - first_row) * t2t_row + column[None, :]
        tl.store(to_t2t, mean, mask=(rows[:, None] < length) & (column[None, :] >= 0) & (keys[None, :] < length))


def mean_attention(
    query: Float[Tensor, "batch heads rows head_dim"],
    key: Float[Tensor, "batch kv_heads rows head_dim"],
    image_index: Int[Tensor, "batch rows"],
    t2i: Float[Tensor, "batch text image"],
    first_row: int,
    scale: float,
    weights: bool,
    neighbours: bool,
    padding: UInt8[Tensor, "batch rows"] | None = None,
) -> Float[Tensor, "batch text text"] | None:
    """Compute the parts of A, of eq. 9, that a focus score reads, under a causal mask and padding.

    Args:
        query, key: of all tokens.
        image_index: index of each image token in its sequence; -1 for text.
        t2i: rows to write A_t2i into. Columns beyond the image tokens of a sequence stay as they are.
        first_row: first row of interest; `text` counts rows from it on.
        scale: factor of the scores.
        weights: true for weights after the softmax, false for raw scores.
        neighbours: true if the focus score reads A of earlier text.
        padding: 0 for keys that no row sees; None if there are none.

    Returns:
        A of the tokens before the row's own, from first_row on; None without neighbours.
    """
    query, key = unit_stride(query), unit_stride(key)
    batch, heads, length, _ = query.shape
    rows, groups = length - first_row, heads // key.shape[1]
    strides = (*query.stride()[:3], *key.stride()[:3])
    lse = (
        query.new_empty(batch, heads, rows, dtype=torch.float32) if weights else query.new_empty(0, dtype=torch.float32)
    )
    if weights:
        tiles = LOG_SUM_EXP_TILES[query.element_size()]
        _log_sum_exp[(divide_up(rows, tiles.rows), batch * heads)](
            query, key, lse, padding, *strides, heads, groups, length, first_row, scale * LOG2_E,
            **launch_options(query, tiles),
        )  # fmt: skip
    # Rows begin at multiples of 64 bytes, so that loads in the product of eq. 10 stay wide.
    stride = round_up(rows, 16)
    t2t = query.new_empty(batch, rows, stride, dtype=torch.float32) if neighbours else None
    tiles = MEAN_TILES[query.element_size()]
    _mean[(divide_up(length, tiles.keys), divide_up(rows, tiles.rows), batch)](
        query, key, lse, image_index, padding, t2t, t2i, *strides, stride, *t2i.stride()[:2],
        heads, groups, length, first_row, scale * LOG2_E, _share(heads, scale, weights),
        weights=weights, neighbours=neighbours, **launch_options(query, tiles),
    )  # fmt: skip
    return t2t[:, :, :rows] if t2t is not None else None


def _share(heads: int, scale: float, weights: bool) -> Any:
    """Return the factor of the sum over heads."""
    return (1.0 if weights else scale) / heads
