"""Cross-Modality Attention Inhibition: eq. 9-11 of the paper, as an attention function of transformers.

In every layer of the language model each text token may look only at the image tokens that matter to it: those whose
focus score F = A_n2i + A_t2i reaches the gamma-th quantile of its row.  Inhibited pairs get minus infinity before the
softmax, so the row renormalises.  The mask is a threshold: no gradient flows through F, and a pair whose score equals
the threshold stays, so equal inputs give equal masks however often activations are recomputed.

A is a mean over heads of the un-inhibited map.  Of attention weights it is added up head by head where maps are large,
of raw scores it is one product over the heads laid side by side.  So a few (text x keys) maps of one layer are alive at
a time, never heads x text x keys: at 32 heads and 576 + 512 tokens an eighth of the memory (jobs/bench/inhibition.py).
Rows up to the first text behind an image can lose nothing and are left out.  Generated tokens are text tokens; a
`FocusCache` keeps their rows of A_t2i beside the keys and values, so decoding equals the full forward pass.

Where the paper is silent or speaks against itself, `CMAI` has an option.  It calls QK^T the attention score and then
speaks of A as weights; a product of signed scores is no weighting, so the default is weights.  One mask serves all
heads, since the paper's A is an average and a mask a head would be the heads x text x image map that is avoided here.
Text of earlier turns, and text about other images, is a neighbour like any other.

Shapes: batch, heads, kv_heads, rows (queries of this call), keys (all so far), image (columns of image tokens), masks
(batch, or 1 where all sequences share a mask).
"""

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from redux.parallel import head_mesh, mean_over_ranks
from redux.settings import CMAI

ATTENTION = "cmai"

HIDDEN = -1e4
"""A pair whose score a float mask lowers by so much, or more, is hidden: its weight is zero."""

AT_ONCE = 2**20
"""Attention weights that may be alive at a time, of all heads together: those of a decoded token, not of a prompt."""


class FocusCache(DynamicCache):
    """Keys and values as in transformers, and beside them what CMAI needs of earlier tokens.

    image: which of the keys so far are image tokens, (batch, keys).
    rows: by layer, A_t2i of the latest tokens, (batch, earlier, image); those before see no image or are part of one.
    """

    image: Tensor | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.rows: dict[int, Tensor] = {}

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._select(lambda kept: kept.index_select(0, beam_idx.to(kept.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._select(lambda kept: kept.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._select(lambda kept: kept[indices.to(kept.device)])

    def reset(self) -> None:
        super().reset()
        self.image, self.rows = None, {}

    def crop(self, tokens_to_remove: int) -> None:
        before = self.get_seq_length()
        super().crop(tokens_to_remove)
        removed = before - self.get_seq_length()
        self._select(lambda kept: kept[:, : max(kept.shape[1] - removed, 0)])

    def _select(self, choose: Any) -> None:
        if self.image is not None:
            self.image = choose(self.image)
        self.rows = {layer: choose(rows) for layer, rows in self.rows.items()}


TENSORS = ("image", "columns", "valid")
"""Fields of an `Inhibition` that lie on a device."""


@dataclass(frozen=True)
class Inhibition:
    """One forward pass as the attention function sees it.

    ratios: gamma of each layer.
    image: which keys are image tokens.
    columns, valid: their positions, left-aligned; rows with fewer image tokens are filled up, and not valid there.
    first: position of the first text token behind an image, in any sequence of the batch.
    elsewhere: the same on other devices, where a model lies on several.
    """

    cmai: CMAI
    ratios: tuple[float, ...]
    image: Bool[Tensor, "batch keys"]
    columns: Int[Tensor, "batch image"]
    valid: Bool[Tensor, "batch image"]
    first: int
    cache: FocusCache | None
    elsewhere: dict[torch.device, "Inhibition"] = field(default_factory=dict, repr=False, compare=False)

    def to(self, device: Any, non_blocking: bool = False) -> "Inhibition":
        """The same on another device, copied once for all layers there; accelerate's hooks call it."""
        if (device := torch.device(device)) == self.columns.device:
            return self
        if device not in self.elsewhere:
            tensors = {name: getattr(self, name).to(device, non_blocking=non_blocking) for name in TENSORS}
            self.elsewhere[device] = replace(self, **tensors)
        return self.elsewhere[device]

    @classmethod
    def of(
        cls, cmai: CMAI, layers: int, image: Bool[Tensor, "batch rows"], cache: FocusCache | None, training: bool
    ) -> "Inhibition | None":
        """The inhibition for new tokens of which `image` are image tokens; None where there is nothing to inhibit."""
        decoding = cache is not None and cache.image is not None
        if cache is not None:
            before = image[:, :0] if cache.image is None else cache.image.to(image.device)
            cache.image = image = torch.cat([before, image], dim=1)
        if cmai.active == ("inference" if training else "training") or (decoding and not cmai.generated):
            return None
        behind = (~image & (image.cumsum(dim=1) > 0)).any(dim=0)
        # the one place where a GPU waits for the host, once for all layers
        width, first = torch.stack([image.sum(dim=1).max(), (~behind).cumprod(dim=0).sum()]).tolist()
        if first == image.shape[1]:
            return None
        columns = image.long().argsort(dim=1, descending=True, stable=True)[:, :width]
        return cls(cmai, cmai.ratios(layers), image, columns, image.gather(1, columns), first, cache)

    @torch.no_grad()
    def keep(
        self,
        layer: int,
        query: Float[Tensor, "batch heads rows head_dim"],
        key: Float[Tensor, "batch kv_heads keys head_dim"],
        visible: Bool[Tensor, "masks 1 rows keys"],
        scale: float,
        bias: Float[Tensor, "masks 1 rows keys"] | None = None,
        mesh: Any = None,
    ) -> Bool[Tensor, "batch 1 rows keys"]:
        """Which pairs stay: every pair but those of a text row and an image key that falls below the row's quantile.

        visible, bias: of each pair, or of each pair in any sequence; bias is added to its score.
        mesh: of the ranks that share the heads, see `redux.parallel`.
        """
        batch, _, rows, _ = query.shape
        keys = key.shape[2]
        result = visible.new_ones(batch, rows, keys)
        start = max(self.first - (keys - rows), 0)
        query, seen = query[:, :, start:], visible[:, 0].expand(batch, rows, keys)[:, start:]
        if bias is not None:
            bias = bias[:, 0].expand(batch, rows, keys)[:, start:]
        attention = self._attention(query, key, seen, scale, bias, mesh)
        text_row = ~self.image[:, keys - rows + start :]
        columns = self.columns.unsqueeze(1).expand(-1, rows - start, -1)
        t2i = attention.gather(2, columns) * (text_row.unsqueeze(-1) & self.valid.unsqueeze(1))
        focus = t2i
        if self.cmai.focus != "tia":
            focus = focus_score(self._others(attention, seen), t2i, self._earlier(layer, t2i))
        choices = seen.gather(2, columns) & self.valid.unsqueeze(1)
        kept = above_quantile(focus, choices, self.ratios[layer], self.cmai.quantile)
        # filled-up columns point at text keys; True there leaves those alone
        kept = kept | ~text_row.unsqueeze(-1) | ~self.valid.unsqueeze(1)
        result[:, start:].scatter_(2, columns, kept)
        return result.unsqueeze(1)

    def _attention(
        self,
        query: Float[Tensor, "batch heads rows head_dim"],
        key: Float[Tensor, "batch kv_heads keys head_dim"],
        seen: Bool[Tensor, "batch rows keys"],
        scale: float,
        bias: Float[Tensor, "batch rows keys"] | None,
        mesh: Any,
    ) -> Float[Tensor, "batch rows keys"]:
        """A of the chosen kind."""
        if self.cmai.scores != "weights":
            part = mean_scores(query, key, seen, scale if self.cmai.scores == "scaled" else 1.0)
            return mean_over_ranks(part, mesh)
        weights = mean_over_ranks(mean_weights(query, key, seen, scale, bias), mesh)
        if self.cmai.preamble:
            return weights
        # the first image that a row sees: packed rows hold several conversations
        weights = weights * ((seen & self.image.unsqueeze(1)).cumsum(dim=2) > 0)
        return weights / weights.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)

    def _others(
        self, attention: Float[Tensor, "batch rows keys"], seen: Bool[Tensor, "batch rows keys"]
    ) -> Float[Tensor, "batch rows keys"]:
        """What the A_t2i of each earlier text token counts for in a row's focus: A_t2n of eq. 9, or a rival of it."""
        match self.cmai.focus:
            case "sum":
                return seen.to(attention.dtype)
            case "discounted":
                place = (seen & ~self.image.unsqueeze(1)).cumsum(
                    dim=2
                )  # among the text that the row sees; it is the last
                return self.cmai.discount ** (place[:, :, -1:] - place).to(attention.dtype) * seen
        return attention

    def _earlier(self, layer: int, t2i: Float[Tensor, "batch rows image"]) -> Float[Tensor, "batch earlier image"]:
        """A_t2i of the tokens so far that see an image: those of the cache, which takes up the new ones, and these."""
        if self.cache is None:
            return t2i
        past = self.cache.rows.get(layer, t2i[:, :0])
        past = F.pad(past, (0, t2i.shape[2] - past.shape[2]))  # no earlier token saw a later image
        self.cache.rows[layer] = earlier = torch.cat([past, t2i], dim=1)
        return earlier


def mean_weights(
    query: Float[Tensor, "batch heads rows head_dim"],
    key: Float[Tensor, "batch kv_heads keys head_dim"],
    seen: Bool[Tensor, "batch rows keys"],
    scale: float,
    bias: Float[Tensor, "batch rows keys"] | None = None,
) -> Float[Tensor, "batch rows keys"]:
    """A: attention weights, mean over heads; head by head beyond AT_ONCE.  A row that sees no key is all zero.

    bias: added to the score of each pair.
    """
    (batch, heads, rows, _), keys = query.shape, key.shape[2]
    if bias is None:
        bias = torch.zeros(seen.shape, dtype=query.dtype, device=query.device)
    else:
        bias = bias.to(query.dtype, copy=True, memory_format=torch.contiguous_format)
    # finite, so that a row that sees nothing has no NaN; added by the product itself, which saves two passes
    bias.masked_fill_(~seen, torch.finfo(query.dtype).min)
    if batch * heads * rows * keys <= AT_ONCE:
        shared = query.unflatten(1, (key.shape[1], -1)) @ key.unsqueeze(2).transpose(3, 4) * scale
        total = (shared.flatten(1, 2) + bias.unsqueeze(1)).softmax(dim=-1, dtype=torch.float32).sum(dim=1)
    else:
        total = torch.zeros_like(bias, dtype=torch.float32)
        for head in range(heads):
            scores = torch.baddbmm(bias, query[:, head], key[:, head * key.shape[1] // heads].mT, alpha=scale)
            total += scores.softmax(dim=-1, dtype=torch.float32)
    return total.div_(heads).masked_fill_(~seen, 0.0)


def mean_scores(
    query: Float[Tensor, "batch heads rows head_dim"],
    key: Float[Tensor, "batch kv_heads keys head_dim"],
    seen: Bool[Tensor, "batch rows keys"],
    scale: float,
) -> Float[Tensor, "batch rows keys"]:
    """A: scale QK^T, mean over heads; zero where a row does not see a key.

    The sum over heads is one product of the heads side by side; queries that share a key head are added up before.
    """
    queries = query.unflatten(1, (key.shape[1], -1)).sum(dim=2)
    product = queries.transpose(1, 2).flatten(2) @ key.transpose(1, 2).flatten(2).transpose(1, 2)
    return (product.float() * (scale / query.shape[1])).masked_fill_(~seen, 0.0)


def focus_score(
    others: Float[Tensor, "batch rows keys"],
    t2i: Float[Tensor, "batch rows image"],
    earlier: Float[Tensor, "batch earlier image"],
) -> Float[Tensor, "batch rows image"]:
    """F_t2i of eq. 11 for the last `rows` of `keys` tokens; `earlier` holds A_t2i of the last ones, others have none.

    Eq. 9 takes the text keys before the row's own position: rows of `earlier` that belong to image tokens are zero, so
    only text neighbours count in the one matrix product of eq. 10.

    The last of six tokens, two of the image (1, 2) and four of text (3 to 6), where token 4 alone looked at the image:

    >>> t2i = torch.tensor([[[0.0, 0.0], [0.0, 0.0], [0.2, 0.1], [0.6, 0.2], [0.1, 0.3], [0.1, 0.2]]])
    >>> attention = torch.tensor([[[0.1, 0.2, 0.1, 0.5, 0.0, 0.1]]])
    >>> focus_score(attention, t2i[:, -1:], t2i)  # 0.1 * 0.2 + 0.5 * 0.6 + 0.1, 0.1 * 0.1 + 0.5 * 0.2 + 0.2
    tensor([[[0.4200, 0.3100]]])

    By its own attention (0.1, 0.2) the last token would lose the first image token; with its neighbours', the second.
    """
    rows, keys = others.shape[1:]
    return others.tril(keys - rows - 1)[:, :, keys - earlier.shape[1] :] @ earlier + t2i  # eq. 9, 10, 11


def above_quantile(
    focus: Float[Tensor, "batch rows image"],
    seen: Bool[Tensor, "batch rows image"],
    ratio: float,
    quantile: Literal["lower", "linear", "count"] = "lower",
) -> Bool[Tensor, "batch rows image"]:
    """Pairs at or above the ratio-th quantile of the n image tokens that the row sees.

    By "lower", floor(ratio (n - 1)) distinct scores fall; a row of equal scores loses none.  By "count" floor(ratio n)
    fall whatever they are, of equal scores the first.

    >>> focus = torch.tensor([[[0.1, 0.2, 0.3, 0.4, 0.5, 0.6]]])
    >>> above_quantile(focus, focus > 0, 0.5).int()  # from the score at rank floor(0.5 * 5) on
    tensor([[[0, 0, 1, 1, 1, 1]]], dtype=torch.int32)
    >>> above_quantile(focus, focus > 0, 0.5, "linear").int()  # from 0.35 on
    tensor([[[0, 0, 0, 1, 1, 1]]], dtype=torch.int32)
    """
    count = seen.sum(dim=-1, keepdim=True)
    ordered, order = focus.masked_fill(~seen, torch.inf).sort(dim=-1, stable=True)
    # in float64 and a trifle more, so that what is a whole number on paper is not rounded below it
    if quantile == "count":
        return order.argsort(dim=-1) >= (ratio * count.double() + 1e-9).floor()
    rank = ratio * (count - 1).clamp_min(0).double()
    below = (rank + 1e-9).floor().long()
    threshold = ordered.gather(2, below)
    if quantile == "linear":
        above = ordered.gather(2, torch.minimum(below + 1, (count - 1).clamp_min(0)))
        part = (rank - below).clamp_min(0).to(focus.dtype)
        # a row that sees no image has only infinities here, and nothing to lose
        threshold = threshold.where(above == threshold, threshold + part * (above - threshold))
    return focus >= threshold


def attention(
    module: nn.Module,
    query: Float[Tensor, "batch heads rows head_dim"],
    key: Float[Tensor, "batch kv_heads keys head_dim"],
    value: Float[Tensor, "batch kv_heads keys head_dim"],
    attention_mask: Shaped[Tensor, "masks one rows keys"],
    inhibition: Inhibition | None = None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Float[Tensor, "batch rows heads head_dim"], None]:
    """Scaled-dot-product attention under the causal mask and, where there is one, the layer's inhibition.

    The mask is transformers' own, of booleans, or a caller's: booleans, or floats that are added to the scores.
    """
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    if inhibition is not None:
        visible, bias = _read(attention_mask)
        if inhibition.ratios[layer] > 0:
            scale = query.shape[-1] ** -0.5 if scaling is None else scaling
            mesh = head_mesh(module, query.shape[1])
            kept = inhibition.to(query.device).keep(layer, query, key, visible, scale, bias, mesh)
            attention_mask = visible & kept if bias is None else bias.masked_fill(~kept, torch.finfo(bias.dtype).min)
    return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)


def _read(
    mask: Shaped[Tensor, "masks one rows keys"],
) -> tuple[Bool[Tensor, "masks one rows keys"], Float[Tensor, "masks one rows keys"] | None]:
    """Which pairs a mask leaves, and what it adds to their scores; ValueError for a mask that CMAI cannot read."""
    if mask.shape[1] != 1 or not (mask.dtype == torch.bool or mask.is_floating_point()):
        raise ValueError(
            f"attention_mask: got {mask.dtype} of shape {tuple(mask.shape)}, "
            "allowed: booleans or floats of shape (batch, 1, rows, keys), one mask for all heads"
        )
    return (mask, None) if mask.dtype == torch.bool else (mask > HIDDEN, mask)


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """sdpa_mask, always explicit: CMAI adds to it."""
    return sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})


AttentionInterface.register(ATTENTION, attention)
AttentionMaskInterface.register(ATTENTION, _mask)
