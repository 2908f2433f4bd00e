"""Threshold of focus scores in each row, without a sort, in Triton.

One program a row. The score at a rank is found by bisection of the integers that order like the scores, so decisions
are those of a sort, ties included. 32 counts of a row in registers are all the work.
"""

from functools import lru_cache
from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from redux.rounding import next_power_of_two

WARPS: int | None = None
"""Warps of a program; None is one for up to 512 image tokens, else two."""


@triton.jit
@no_type_check
def _order_bits(bits):
    """Map the bits of a float to an integer of the same order, and back."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit(do_not_specialize=["length", "first_row", "columns"])
@no_type_check
def _drop_below(
    focus, columns_of, valid, image_index, padding, ranks, fractions, mask,
    mask_stride, length, first_row, columns,
    quantile: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Drop the image keys of one row whose score is below the row's threshold.

    Grid: (text, batch).

    Args:
        focus: (batch, text, columns) focus scores.
        columns_of, valid: (batch, columns) positions of image tokens, and True for those in use.
        image_index: (batch, length) index of each image token; -1 for text, the only rows that lose keys.
        padding: (batch, length) 0 for keys that no row sees; None without padding.
        ranks, fractions: (counts,) tables of `_rank_table`.
        mask: (batch, length, mask_stride), in which dropped pairs become False.
    """
    row = first_row + tl.program_id(0)
    batch = tl.program_id(1).to(tl.int64)
    slot = tl.arange(0, block)
    if tl.load(image_index + batch * length + row) < 0:
        column = tl.load(columns_of + batch * columns + slot, mask=slot < columns, other=0)
        seen = (slot < columns) & (column <= row)
        seen = seen & (tl.load(valid + batch * columns + slot, mask=slot < columns, other=0) != 0)
        if padding is not None:
            seen = seen & (tl.load(padding + batch * length + column, mask=slot < columns, other=0) != 0)
        score = tl.load(
            focus + (batch * (length - first_row) + tl.program_id(0)) * columns + slot, mask=seen, other=0.0
        )
        score = tl.where(score == 0.0, 0.0, score)  # One zero only
        order = tl.where(seen, _order_bits(score.to(tl.int32, bitcast=True)), 0x7FFFFFFF)
        count = tl.sum(seen.to(tl.int32), 0)
        rank = tl.load(ranks + count)
        # The smallest integer with more than `rank` scores up to it.
        low = tl.full([], -0x80000000, tl.int32)
        high = tl.full([], 0x7FFFFFFF, tl.int32)
        for _ in range(32):
            middle = (low & high) + ((low ^ high) >> 1)
            enough = tl.sum((order <= middle).to(tl.int32), 0) > rank
            high = tl.where(enough, middle, high)
            low = tl.where(enough, low, middle + 1)
        threshold = _order_bits(high).to(tl.float32, bitcast=True)
        drop = seen & (score < threshold)
        if quantile == "linear":
            # The score at the next rank, if there is one.
            up_to = tl.sum((order <= high).to(tl.int32), 0)
            above = tl.min(tl.where(order > high, order, 0x7FFFFFFF), 0)
            above = _order_bits(tl.where((up_to > rank + 1) | (rank + 1 >= count), high, above))
            above = above.to(tl.float32, bitcast=True)
            between = threshold + tl.load(fractions + count) * (above - threshold)
            drop = seen & (score < tl.where(above == threshold, threshold, between))
        if quantile == "count":
            # rank + 1 pairs in all: those below, and the first of the equal ones.
            equal = seen & (order == high)
            left = rank + 1 - tl.sum((order < high).to(tl.int32), 0)
            drop = drop | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= left))
            drop = drop & (rank >= 0)
        tl.store(mask + (batch * length + row) * mask_stride + column, tl.zeros([block], tl.int1), mask=drop)


@lru_cache(maxsize=256)
def _rank_table(
    gamma: float, quantile: str, columns: int, device: torch.device
) -> tuple[Int[Tensor, "counts"], Float[Tensor, "counts"]]:
    """Compute the rank of the threshold, and the share of the next rank, for each number of image tokens in sight.

    The arithmetic is that of `redux.focus.select_above_quantile`, so the ranks are, too.
    """
    count = torch.arange(columns + 1, device=device)
    if quantile == "count":
        dropped = (gamma * count.double() + 1e-9).floor()
        return (dropped - 1).int(), torch.zeros_like(dropped, dtype=torch.float32)
    rank = gamma * (count - 1).clamp_min(0).double()
    below = (rank + 1e-9).floor().long()
    return below.int(), (rank - below).clamp_min(0).float()


def drop_below_quantile(
    mask: Bool[Tensor, "batch rows rows"],
    focus: Float[Tensor, "batch text image"],
    columns: Int[Tensor, "batch image"],
    valid: Bool[Tensor, "batch image"],
    image_index: Int[Tensor, "batch rows"],
    gamma: float,
    quantile: str,
    padding: UInt8[Tensor, "batch rows"] | None = None,
) -> None:
    """Set pairs below the gamma-th quantile of their row to False in a mask, under a causal mask and padding.

    Args:
        mask: mask of `redux.kernels.masked_attention.make_key_mask`.
        focus: focus scores of the last `text` rows.
        columns: positions of image tokens.
        valid: False for padding in `columns`.
        image_index: index of each image token in its sequence; -1 for text.
        gamma: ratio of image tokens to inhibit.
        quantile: threshold in a row, see `redux.settings.CMAI`.
        padding: 0 for keys that no row sees; None if there are none.
    """
    batch, rows, num_columns = focus.shape
    length = mask.shape[1]
    # A power of two, so that few tables are made.
    block = next_power_of_two(max(num_columns, 32))
    # By the number of image tokens in sight, so that the kernel needs no float64.
    ranks, fractions = _rank_table(gamma, quantile, block, focus.device)
    _drop_below[(rows, batch)](
        focus.contiguous(), columns.contiguous(), valid.contiguous(), image_index, padding, ranks, fractions, mask,
        mask.stride(1), length, length - rows, num_columns,
        quantile=quantile, block=block, num_warps=WARPS or (1 if block <= 512 else 2),
        # A fused multiplication and addition would interpolate with another rounding than PyTorch.
        enable_fp_fusion=False,
    )  # fmt: skip
