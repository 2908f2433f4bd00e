"""Fused kernels of CMAI in decoding: three launches replace the attention of one layer.

1. `_score_keys`: scores of the new token for each head and key, and the parts of each head's log-sum-exp.
2. `_score_focus`: mean over heads, the token's row of A_t2i (written into the cache), and the focus of each column.
3. `_attend_kept`: the focus at the quantile's rank, by bisection over the bits of the scores, then the attention of the
   keys that stay. The softmax renormalises, so weights before and after inhibition share their scores.

Every program of the third kernel computes the rank again, which is cheaper than a launch. A program reads keys up to
the token's position, which lies on the device: keys to come of a StaticCache cost nothing. No result depends on the
order of programs. Scores are float32 here, where the plain code rounds them to the dtype of the query.
"""

from typing import TYPE_CHECKING, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Bool, Float
from torch import Tensor

from redux.kernels.masked_attention import unit_stride
from redux.rounding import divide_up, next_power_of_two

if TYPE_CHECKING:
    from redux.decoding import DecodingStep

BLOCK_KEYS = 64
"""Keys of one program, or of one turn of its loop."""

MIN_PROGRAMS = 264
"""Programs that fill a GPU of 132 multiprocessors twice; below that, a head's dimensions are split."""


@triton.jit(do_not_specialize=["scores_size", "keys"])
@no_type_check
def _score_keys(
    query, key, visible, position, scores, scale, keys, scores_size, query_batch, query_head, key_batch, key_head,
    key_row, visible_batch, visible_key,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):  # fmt: skip
    """Score the keys of one block, for all query heads of a key head.

    Grid: (blocks, batch x kv_heads).

    Args:
        query, key: (batch, heads, head_dim) and (batch, kv_heads, keys, head_dim).
        visible: (batch, keys), with a stride of 0 if all sequences share the row.
        position: () position of the token, which is the last key.
        scores: written, (batch, heads, blocks x BLOCK_KEYS); from scores_size on, maximum and sum of exponentials of
            each block, (batch, heads, blocks, 2).
    """
    block = tl.program_id(0)
    batch = (tl.program_id(1) // KV_HEADS).to(tl.int64)
    kv_head = tl.program_id(1) % KV_HEADS
    blocks = tl.num_programs(0)
    last = tl.load(position).to(tl.int32)
    if block * BLOCK_KEYS <= last:
        rows = block * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
        dims = tl.arange(0, BLOCK_DIM)
        inside = (rows <= last) & (rows < keys)
        seen = tl.load(visible + batch * visible_batch + rows * visible_key, mask=inside, other=0) != 0
        tile = tl.load(
            key + batch * key_batch + kv_head * key_head + rows[:, None] * key_row + dims[None, :],
            mask=inside[:, None] & (dims[None, :] < HEAD_DIM),
            other=0.0,
        ).to(tl.float32)
        # The query heads that share these keys, which are loaded once for all of them.
        for group in tl.static_range(HEADS // KV_HEADS):
            head = kv_head * (HEADS // KV_HEADS) + group
            vector = tl.load(
                query + batch * query_batch + head * query_head + dims, mask=dims < HEAD_DIM, other=0.0
            ).to(tl.float32)
            score = tl.where(seen, tl.sum(tile * vector[None, :], axis=1) * scale, -float("inf"))
            largest = tl.max(score, axis=0)
            total = tl.sum(tl.where(seen, tl.exp(score - largest), 0.0), axis=0)
            row = batch * HEADS + head
            tl.store(scores + (row * blocks + block) * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS), score)
            parts = scores + scores_size + (row * blocks + block) * 2
            tl.store(parts, largest)
            tl.store(parts + 1, total)


@triton.jit
@no_type_check
def _load_mean(
    scores, batch, blocks, rows, inside, heads, largest, log_total, factor,
    HEADS: tl.constexpr, BLOCK_KEYS: tl.constexpr, WEIGHTS: tl.constexpr,
):  # fmt: skip
    """Load A, the mean over heads, of some keys; zero for keys that are not visible."""
    score = tl.load(
        scores + (batch * HEADS + heads[:, None]) * blocks * BLOCK_KEYS + rows[None, :],
        mask=(heads[:, None] < HEADS) & inside[None, :],
        other=-float("inf"),
    )
    hidden = score == -float("inf")
    value = tl.exp(score - largest[:, None] - log_total[:, None]) if WEIGHTS else score * factor
    return tl.sum(tl.where(hidden, 0.0, value), axis=0) / HEADS


@triton.jit(do_not_specialize=["blocks", "scores_size", "focus_offset", "keys", "start", "slots"])
@no_type_check
def _score_focus(
    scores, position, columns, valid, is_text, cached, factor, blocks, scores_size, focus_offset, keys, start,
    slots, cached_batch, cached_row,
    HEADS: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK_PARTS: tl.constexpr, BLOCK_KEYS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr, WEIGHTS: tl.constexpr, FOCUS: tl.constexpr,
):  # fmt: skip
    """Compute the token's row of A_t2i and the focus of some image tokens.

    Grid: (slots / BLOCK_COLUMNS, batch).

    Args:
        scores: buffer of `_score_keys`; from focus_offset on, the focus by key is written, (batch, keys).
        position: () position of the token.
        columns, valid: (batch, slots) positions of image tokens, and True for those in use.
        is_text: (batch, 1) True where the token is text.
        cached: (batch, rows, slots) A_t2i by token from start on; the token's row is written.
        factor: factor of raw scores.
    """
    batch = tl.program_id(1).to(tl.int64)
    last = tl.load(position).to(tl.int32)
    heads = tl.arange(0, BLOCK_HEADS)
    # Log-sum-exp of each head, from its blocks.
    part = tl.arange(0, BLOCK_PARTS)
    in_use = (heads[:, None] < HEADS) & (part[None, :] * BLOCK_KEYS <= last) & (part[None, :] < blocks)
    parts = scores + scores_size + ((batch * HEADS + heads[:, None]) * blocks + part[None, :]) * 2
    maxima = tl.load(parts, mask=in_use, other=-float("inf"))
    totals = tl.load(parts + 1, mask=in_use, other=0.0)
    largest = tl.max(maxima, axis=1)
    total = tl.sum(tl.where(totals > 0.0, totals * tl.exp(maxima - largest[:, None]), 0.0), axis=1)
    log_total = tl.log(tl.maximum(total, 1e-37))
    # A_t2i of this token.
    slot = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    inhibited = slot < slots
    inhibited = inhibited & (tl.load(valid + batch * slots + slot, mask=inhibited, other=0) != 0)
    column = tl.load(columns + batch * slots + slot, mask=inhibited, other=0).to(tl.int32)
    t2i = _load_mean(
        scores, batch, blocks, column, inhibited, heads, largest, log_total, factor, HEADS, BLOCK_KEYS, WEIGHTS
    )
    text = tl.load(is_text + batch) != 0
    t2i = tl.where(inhibited & text, t2i, 0.0)
    # Eq. 10 and 11, over the tokens before this one.
    focus = t2i
    if FOCUS != "tia":
        row_pointer = cached + batch * cached_batch + (last - start).to(tl.int64) * cached_row + slot
        tl.store(row_pointer, t2i, mask=slot < slots)
        for first in range(start, last, BLOCK_KEYS):
            row = first + tl.arange(0, BLOCK_KEYS)
            inside = row < last
            weight = _load_mean(
                scores, batch, blocks, row, inside, heads, largest, log_total, factor, HEADS, BLOCK_KEYS, WEIGHTS
            )
            if FOCUS == "sum":
                score = tl.load(scores + batch * HEADS * blocks * BLOCK_KEYS + row, mask=inside, other=-float("inf"))
                weight = tl.where(score == -float("inf"), 0.0, 1.0)
            earlier = tl.load(
                cached + batch * cached_batch + (row - start)[:, None] * cached_row + slot[None, :],
                mask=inside[:, None] & (slot[None, :] < slots),
                other=0.0,
            )
            focus += tl.sum(weight[:, None] * earlier, axis=0)
    tl.store(scores + focus_offset + batch * keys + column, focus, mask=inhibited)


@triton.jit
@no_type_check
def _order_bits(number):
    """Map float32 to uint32 of the same order; both zeros are equal."""
    bits = (number + 0.0).to(tl.int32, bitcast=True)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return bits.to(tl.uint32, bitcast=True) ^ 0x80000000


@triton.jit
@no_type_check
def _find_rank(bits, candidate, rank):
    """Find the number at a rank from 0 among the candidates; all ones if there are fewer."""
    # Bit by bit from the highest: the largest number with at most `rank` candidates below it.
    result = tl.full([], 0, tl.uint32)
    bit = tl.full([], 0x80000000, tl.uint32)
    for _ in range(32):
        trial = result | bit
        less = tl.sum((candidate & (bits < trial)).to(tl.int32), axis=0)
        result = tl.where(less <= rank, trial, result)
        bit = bit >> 1
    return result


@triton.jit(do_not_specialize=["blocks", "scores_size", "focus_offset", "keys", "slots"])
@no_type_check
def _attend_kept(
    scores, value, position, columns, valid, is_text, is_image, output, gamma_high, gamma_low, blocks, scores_size,
    focus_offset, keys, slots, value_batch, value_head, value_row, is_image_batch,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
    BLOCK_PARTS: tl.constexpr, BLOCK_KEYS: tl.constexpr, BLOCK_SLOTS: tl.constexpr, QUANTILE: tl.constexpr,
):  # fmt: skip
    """Compute the attention of the keys that stay, in some dimensions of a head.

    Grid: (head_dim / BLOCK_DIM, batch x heads).

    Args:
        scores: buffer of `_score_keys` and `_score_focus`.
        value: (batch, kv_heads, keys, head_dim).
        position, columns, valid, is_text: as for `_score_focus`.
        is_image: (batch, capacity) True for keys that are image tokens.
        output: written, (batch, heads, head_dim).
        gamma_high, gamma_low: gamma in two parts of float32.
    """
    batch = (tl.program_id(1) // HEADS).to(tl.int64)
    head = tl.program_id(1) % HEADS
    last = tl.load(position).to(tl.int32)
    row_scores = scores + (batch * HEADS + head) * blocks * BLOCK_KEYS
    focus_row = scores + focus_offset + batch * keys
    # Candidates: image tokens that the token sees.
    slot = tl.arange(0, BLOCK_SLOTS)
    candidate = slot < slots
    candidate = candidate & (tl.load(valid + batch * slots + slot, mask=candidate, other=0) != 0)
    column = tl.load(columns + batch * slots + slot, mask=candidate, other=0).to(tl.int32)
    seen = tl.load(row_scores + column, mask=candidate, other=-float("inf"))
    candidate = candidate & (seen > -float("inf"))
    bits = _order_bits(tl.load(focus_row + column, mask=candidate, other=0.0))
    count = tl.sum(candidate.to(tl.int32), axis=0)
    # Ranks in float64, as in the plain code; gamma comes in two parts of float32.
    gamma = tl.full([], 0.0, tl.float64) + gamma_high + gamma_low
    exact = gamma * count.to(tl.float64) if QUANTILE == "count" else gamma * tl.maximum(count - 1, 0).to(tl.float64)
    rank = tl.floor(exact + 1e-9).to(tl.int32)
    threshold = _find_rank(bits, candidate, rank)
    if QUANTILE == "linear":
        not_above = tl.sum((candidate & (bits <= threshold)).to(tl.int32), axis=0)
        following = tl.min(tl.where(candidate & (bits > threshold), bits.to(tl.int64), 0xFFFFFFFF), axis=0)
        below_value = _restore_float(threshold)
        above_value = _restore_float(following.to(tl.uint32))
        fraction = tl.maximum(exact - rank.to(tl.float64), 0.0).to(tl.float32)
        between = below_value + fraction * (above_value - below_value)
        threshold = tl.where((not_above >= rank + 2) | (count <= rank + 1), threshold, _order_bits(between))
    # Of equal scores, "count" drops the first.
    equal_to_drop = rank - tl.sum((candidate & (bits < threshold)).to(tl.int32), axis=0)
    # The row's maximum, from its blocks, and the softmax over the keys that stay.
    part = tl.arange(0, BLOCK_PARTS)
    parts = scores + scores_size + ((batch * HEADS + head) * blocks + part) * 2
    largest = tl.max(tl.load(parts, mask=(part < blocks) & (part * BLOCK_KEYS <= last), other=-float("inf")), axis=0)
    dims = tl.program_id(0) * BLOCK_DIM + tl.arange(0, BLOCK_DIM)
    values = value + batch * value_batch + (head // (HEADS // KV_HEADS)) * value_head + dims[None, :]
    text = tl.load(is_text + batch) != 0
    summed = tl.zeros([BLOCK_DIM], tl.float32)
    total = 0.0
    equal_so_far = 0
    for first in range(0, last + 1, BLOCK_KEYS):
        row = first + tl.arange(0, BLOCK_KEYS)
        inside = row <= last
        score = tl.load(row_scores + row, mask=inside, other=-float("inf"))
        # Only image tokens that the token sees may be dropped, and only by a text token.
        image = tl.load(is_image + batch * is_image_batch + row, mask=inside, other=0) != 0
        image = image & text & (score > -float("inf"))
        order = _order_bits(tl.load(focus_row + row, mask=image, other=0.0))
        dropped = image & (order < threshold)
        if QUANTILE == "count":
            equal = (image & (order == threshold)).to(tl.int32)
            dropped = dropped | ((equal > 0) & (equal_so_far + tl.cumsum(equal, axis=0) <= equal_to_drop))
            equal_so_far += tl.sum(equal, axis=0)
        weight = tl.where(dropped | (score == -float("inf")), 0.0, tl.exp(score - largest))
        tile = tl.load(
            values + row[:, None].to(tl.int64) * value_row,
            mask=inside[:, None] & (dims[None, :] < HEAD_DIM),
            other=0.0,
        )
        summed += tl.sum(weight[:, None] * tile.to(tl.float32), axis=0)
        total += tl.sum(weight, axis=0)
    summed = tl.where(total > 0.0, summed / total, 0.0)
    address = output + (batch * HEADS + head) * HEAD_DIM + dims
    tl.store(address, summed.to(output.dtype.element_ty), mask=dims < HEAD_DIM)


@triton.jit
@no_type_check
def _restore_float(order):
    """Undo `_order_bits`."""
    bits = (order ^ 0x80000000).to(tl.int32, bitcast=True)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return bits.to(tl.float32, bitcast=True)


def attend_decoded_token(
    query: Float[Tensor, "batch heads 1 head_dim"],
    key: Float[Tensor, "batch kv_heads keys head_dim"],
    value: Float[Tensor, "batch kv_heads keys head_dim"],
    visible: Bool[Tensor, "masks 1 1 keys"],
    is_image: Bool[Tensor, "batch capacity"],
    step: "DecodingStep",
    cached: Float[Tensor, "batch rows slots"] | None,
    gamma: float,
    scale: float,
) -> Float[Tensor, "batch 1 heads head_dim"]:
    """Compute the inhibited attention of one layer, and write the token's row of A_t2i.

    Args:
        query: query of the new token.
        key, value: keys and values of all tokens so far, perhaps with keys to come.
        visible: keys that the mask leaves.
        is_image: True for keys that are image tokens, with room for keys to come.
        step: the token, its image tokens and the settings.
        cached: rows of A_t2i of the layer, from `step.cache.start` on; None for a focus without them.
        gamma: gamma of the layer.
        scale: factor of the scores.
    """
    batch, heads, _, head_dim = query.shape
    kv_heads, keys = key.shape[1], key.shape[2]
    slots, cmai = step.columns.shape[1], step.cmai
    query, key, value = unit_stride(query), unit_stride(key), unit_stride(value)
    # One buffer for scores, parts of log-sum-exps and focus: an allocation costs as much as a launch.
    blocks = divide_up(keys, BLOCK_KEYS)
    scores_size = batch * heads * blocks * BLOCK_KEYS
    focus_offset = scores_size + batch * heads * blocks * 2
    scratch = torch.empty(focus_offset + batch * keys, dtype=torch.float32, device=query.device)
    output = torch.empty(batch, 1, heads, head_dim, dtype=query.dtype, device=query.device)
    block_dim, block_parts = next_power_of_two(head_dim), max(next_power_of_two(blocks), 16)
    shared = (len(visible) > 1) * visible.stride(0)
    _score_keys[(blocks, batch * kv_heads)](
        query, key, visible, step.position, scratch, scale, keys, scores_size,
        query.stride(0), query.stride(1), key.stride(0), key.stride(1), key.stride(2), shared, visible.stride(3),
        HEADS=heads, KV_HEADS=kv_heads, HEAD_DIM=head_dim, BLOCK_DIM=block_dim, BLOCK_KEYS=BLOCK_KEYS,
    )  # fmt: skip
    # Raw scores: "scaled" are the scores that attention uses.
    factor = 1.0 if cmai.scores != "scores" else 1.0 / scale
    rows, rows_batch, rows_row = (scratch, 0, 0) if cached is None else (cached, cached.stride(0), cached.stride(1))
    block_columns = 32 if batch < 8 else 64
    _score_focus[(divide_up(slots, block_columns), batch)](
        scratch, step.position, step.columns, step.valid, step.is_text, rows, factor,
        blocks, scores_size, focus_offset, keys, step.cache.start, slots, rows_batch, rows_row,
        HEADS=heads, BLOCK_HEADS=next_power_of_two(heads), BLOCK_PARTS=block_parts, BLOCK_KEYS=BLOCK_KEYS,
        BLOCK_COLUMNS=block_columns, WEIGHTS=cmai.scores == "weights", FOCUS=cmai.focus,
    )  # fmt: skip
    if batch * heads < MIN_PROGRAMS:
        block_dim = min(block_dim, 32)
    # The upper 24 bits of gamma, by Veltkamp's splitting.
    gamma_high = gamma * (2.0**29 + 1) - (gamma * (2.0**29 + 1) - gamma)
    _attend_kept[(divide_up(head_dim, block_dim), batch * heads)](
        scratch, value, step.position, step.columns, step.valid, step.is_text, is_image, output,
        gamma_high, gamma - gamma_high, blocks, scores_size, focus_offset, keys, slots,
        value.stride(0), value.stride(1), value.stride(2), is_image.stride(0),
        HEADS=heads, KV_HEADS=kv_heads, HEAD_DIM=head_dim, BLOCK_DIM=block_dim, BLOCK_PARTS=block_parts,
        BLOCK_KEYS=BLOCK_KEYS, BLOCK_SLOTS=next_power_of_two(slots), QUANTILE=cmai.quantile,
    )  # fmt: skip
    return output
