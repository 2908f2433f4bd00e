"""Focus scores of image tokens, and their quantile: eq. 9-11 of the paper.

A is the mean over heads of the attention map before inhibition. Attention weights are added up head by head if maps
are large; raw scores are one product of the concatenated heads. So a few (text x keys) maps of one layer are in memory
at a time, never heads x text x keys. At 32 heads and 576 + 512 tokens that is an eighth of the memory
(jobs/bench/inhibition.py).

Shapes: batch, heads, kv_heads, rows (queries of this call), keys (all tokens so far), image (columns of image tokens).
"""

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

MAX_WEIGHTS_AT_ONCE = 2**20
"""Limit of attention weights of all heads in memory; it admits a decoded token and excludes a prompt."""


def mean_attention_weights(
    query: Float[Tensor, "batch heads rows head_dim"],
    key: Float[Tensor, "batch kv_heads keys head_dim"],
    visible: Bool[Tensor, "batch rows keys"],
    scale: float,
    bias: Float[Tensor, "batch rows keys"] | None = None,
) -> Float[Tensor, "batch rows keys"]:
    """A of eq. 9: attention weights, mean over heads. A row that sees no key is all zero.

    Beyond MAX_WEIGHTS_AT_ONCE the mean adds up head by head.

    Args:
        query: queries of the new tokens.
        key: keys of all tokens so far.
        visible: pairs that the mask leaves.
        scale: factor of the scores.
        bias: values to add to the score of each pair.
    """
    (batch, heads, rows, _), keys = query.shape, key.shape[2]
    if bias is None:
        bias = torch.zeros(visible.shape, dtype=query.dtype, device=query.device)
    else:
        bias = bias.to(query.dtype, copy=True, memory_format=torch.contiguous_format)
    # A finite minimum gives no NaN in a row that sees no key. The product itself adds it, which saves two passes.
    bias.masked_fill_(~visible, torch.finfo(query.dtype).min)
    if batch * heads * rows * keys <= MAX_WEIGHTS_AT_ONCE:
        shared = query.unflatten(1, (key.shape[1], -1)) @ key.unsqueeze(2).transpose(3, 4) * scale
        total = (shared.flatten(1, 2) + bias.unsqueeze(1)).softmax(dim=-1, dtype=torch.float32).sum(dim=1)
    else:
        total = torch.zeros_like(bias, dtype=torch.float32)
        for head in range(heads):
            scores = torch.baddbmm(bias, query[:, head], key[:, head * key.shape[1] // heads].mT, alpha=scale)
            total += scores.softmax(dim=-1, dtype=torch.float32)
    return total.div_(heads).masked_fill_(~visible, 0.0)


def mean_attention_scores(
    query: Float[Tensor, "batch heads rows head_dim"],
    key: Float[Tensor, "batch kv_heads keys head_dim"],
    visible: Bool[Tensor, "batch rows keys"],
    scale: float,
) -> Float[Tensor, "batch rows keys"]:
    """A as raw scores: scale QK^T, mean over heads; zero for pairs that are not visible.

    One product of the concatenated heads sums over heads. Queries that share a key head are added up first.
    """
    queries = query.unflatten(1, (key.shape[1], -1)).sum(dim=2)
    product = queries.transpose(1, 2).flatten(2) @ key.transpose(1, 2).flatten(2).transpose(1, 2)
    return (product.float() * (scale / query.shape[1])).masked_fill_(~visible, 0.0)


def focus_score(
    t2n: Float[Tensor, "batch rows keys"],
    t2i: Float[Tensor, "batch rows image"],
    earlier: Float[Tensor, "batch earlier image"],
) -> Float[Tensor, "batch rows image"]:
    """F_t2i of eq. 11 for the last `rows` of `keys` tokens.

    Eq. 9 takes the text keys before the row's own position. Rows of `earlier` that belong to image tokens are zero, so
    only text neighbours count in the matrix product of eq. 10.

    Args:
        t2n: A_t2n, the weight of each key in a row.
        t2i: A_t2i of the rows.
        earlier: A_t2i of the last tokens so far; all tokens before them have none.

    Six tokens, two of the image (1, 2) and four of text (3 to 6); token 4 attends to the image most:

    >>> t2i = torch.tensor([[[0.0, 0.0], [0.0, 0.0], [0.2, 0.1], [0.6, 0.2], [0.1, 0.3], [0.1, 0.2]]])
    >>> attention = torch.tensor([[[0.1, 0.2, 0.1, 0.5, 0.0, 0.1]]])
    >>> focus_score(attention, t2i[:, -1:], t2i)  # 0.1 * 0.2 + 0.5 * 0.6 + 0.1, 0.1 * 0.1 + 0.5 * 0.2 + 0.2
    tensor([[[0.4200, 0.3100]]])

    Its own attention (0.1, 0.2) would drop the first image token; with its neighbours' attention the second drops.
    """
    rows, keys = t2n.shape[1:]
    return t2n.tril(keys - rows - 1)[:, :, keys - earlier.shape[1] :] @ earlier + t2i  # Eq. 9, 10, 11


def fold_heads(
    query: Float[Tensor, "batch heads rows head_dim"],
    key: Float[Tensor, "batch kv_heads keys head_dim"],
    heads: Sequence[int],
) -> tuple[Float[Tensor, "sequences 1 rows head_dim"], Float[Tensor, "sequences 1 keys head_dim"]]:
    """Make each of some heads of each sequence a sequence with one head, so that a mean over heads is that head's A.

    Args:
        query, key: of all heads.
        heads: numbers of the heads.

    Returns:
        Queries and keys of sequence 0 with each of the heads, then of sequence 1, and so on.
    """
    group = query.shape[1] // key.shape[1]
    # Views of single heads, because an index of numbers would be copied to the device.
    queries = torch.stack([query[:, head] for head in heads], dim=1)
    keys = torch.stack([key[:, head // group] for head in heads], dim=1)
    return queries.flatten(0, 1).unsqueeze(1), keys.flatten(0, 1).unsqueeze(1)


def unfold_heads(
    kept: Bool[Tensor, "sequences 1 rows keys"], heads: Sequence[int], num_heads: int
) -> Bool[Tensor, "batch num_heads rows keys"]:
    """Lay the masks of the sequences of `fold_heads` side by side; all pairs of other heads stay."""
    head_masks = kept.squeeze(1).unflatten(0, (-1, len(heads)))
    others = torch.ones_like(head_masks[:, 0])
    masks = dict(zip(heads, head_masks.unbind(dim=1), strict=True))
    return torch.stack([masks.get(head, others) for head in range(num_heads)], dim=1)


def select_above_quantile(
    focus: Float[Tensor, "batch rows image"],
    visible: Bool[Tensor, "batch rows image"],
    gamma: float,
    quantile: Literal["lower", "linear", "count"] = "lower",
) -> Bool[Tensor, "batch rows image"]:
    """Select pairs at or above the gamma-th quantile of the n image tokens that the row sees.

    Args:
        focus: focus scores.
        visible: image tokens that the row sees.
        gamma: ratio of image tokens to inhibit.
        quantile: "lower" drops floor(gamma (n - 1)) distinct scores, and none of equal scores. "linear" interpolates
            between two ranks. "count" drops floor(gamma n) pairs, of equal scores the first.

    >>> focus = torch.tensor([[[0.1, 0.2, 0.3, 0.4, 0.5, 0.6]]])
    >>> select_above_quantile(focus, focus > 0, 0.5).int()  # from the score at rank floor(0.5 * 5) on
    tensor([[[0, 0, 1, 1, 1, 1]]], dtype=torch.int32)
    >>> select_above_quantile(focus, focus > 0, 0.5, "linear").int()  # from 0.35 on
    tensor([[[0, 0, 0, 1, 1, 1]]], dtype=torch.int32)
    """
    count = visible.sum(dim=-1, keepdim=True)
    ordered, order = focus.masked_fill(~visible, torch.inf).sort(dim=-1, stable=True)
    # float64 and 1e-9 keep an exact whole number from being rounded down.
    if quantile == "count":
        return order.argsort(dim=-1) >= (gamma * count.double() + 1e-9).floor()
    rank = gamma * (count - 1).clamp_min(0).double()
    below = (rank + 1e-9).floor().long()
    threshold = ordered.gather(2, below)
    if quantile == "linear":
        above = ordered.gather(2, torch.minimum(below + 1, (count - 1).clamp_min(0)))
        fraction = (rank - below).clamp_min(0).to(focus.dtype)
        # A row that sees no image has only infinities here, whose difference would be NaN.
        threshold = threshold.where(above == threshold, threshold + fraction * (above - threshold))
    return focus >= threshold
