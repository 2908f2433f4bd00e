"""Cross-Modality Attention Inhibition: eq. 9-11 of the paper, as an attention function of transformers.

In every layer of the language model each text token may look only at the image tokens that matter to it: those whose
focus score F = A_n2i + A_t2i reaches the gamma-th quantile of its row.  Inhibited pairs get minus infinity before the
softmax, so the row renormalises.  The mask is a threshold: no gradient flows through F, and a pair whose score equals
the threshold stays, so equal inputs give equal masks however often activations are recomputed.

A is the mean over heads of the attention weights of the un-inhibited map, added up head by head: one (text x keys) map
a layer is alive at a time, never heads x text x keys.  Generated tokens are text tokens; a `FocusCache` keeps their
rows of A_t2i beside the keys and values, so decoding equals the full forward pass.

Shapes: batch, heads, kv_heads, rows (queries of this call), keys (all so far), image (columns of image tokens).
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ATTENTION = "cmai"


@dataclass(frozen=True, kw_only=True)
class CMAI:
    """Settings of the inhibition.

    maximum: ratio of image tokens inhibited for each text token in the last layer, 0 <= maximum < 1.  The ratio rises
        linearly from 0 in the first layer.
    """

    maximum: float = 0.6

    def __post_init__(self) -> None:
        if not 0 <= self.maximum < 1:
            raise ValueError(f"maximum: got {self.maximum!r}, allowed: 0 <= maximum < 1")

    def ratios(self, layers: int) -> tuple[float, ...]:
        """gamma of each layer, linear from 0 to `maximum`."""
        return tuple(self.maximum * layer / max(layers - 1, 1) for layer in range(layers))


class FocusCache(DynamicCache):
    """Keys and values as in transformers, and beside them what CMAI needs of earlier tokens.

    image: which of the keys so far are image tokens, (batch, keys).
    rows: by layer, A_t2i of every token so far, (batch, keys, image); the rows of image tokens are zero.
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
        self._select(lambda kept: kept[indices])

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        length = self.get_seq_length()
        self._select(lambda kept: kept[:, :length])

    def _select(self, choose: Any) -> None:
        if self.image is not None:
            self.image = choose(self.image)
        self.rows = {layer: choose(rows) for layer, rows in self.rows.items()}


@dataclass(frozen=True)
class Inhibition:
    """One forward pass as the attention function sees it.

    ratios: gamma of each layer.
    image: which keys are image tokens.
    columns, valid: their positions, left-aligned; rows with fewer image tokens are filled up, and not valid there.
    """

    ratios: tuple[float, ...]
    image: Bool[Tensor, "batch keys"]
    columns: Int[Tensor, "batch image"]
    valid: Bool[Tensor, "batch image"]
    cache: FocusCache | None

    @classmethod
    def of(
        cls, ratios: tuple[float, ...], image: Bool[Tensor, "batch rows"], cache: FocusCache | None
    ) -> "Inhibition | None":
        """The inhibition for new tokens of which `image` are image tokens; None where no image is in sight."""
        if cache is not None:
            cache.image = image = image if cache.image is None else torch.cat([cache.image, image], dim=1)
        width = int(image.sum(dim=1).max())
        if width == 0:
            return None
        columns = image.long().argsort(dim=1, descending=True, stable=True)[:, :width]
        return cls(ratios, image, columns, image.gather(1, columns), cache)

    @torch.no_grad()
    def keep(
        self,
        layer: int,
        query: Float[Tensor, "batch heads rows head_dim"],
        key: Float[Tensor, "batch kv_heads keys head_dim"],
        visible: Bool[Tensor, "batch 1 rows keys"],
        scale: float,
    ) -> Bool[Tensor, "batch 1 rows keys"]:
        """Which pairs stay: every pair but those of a text row and an image key below the row's threshold."""
        rows, keys = query.shape[2], key.shape[2]
        weights = mean_weights(query, key, visible, scale)
        text_row = ~self.image[:, keys - rows :]
        columns = self.columns.unsqueeze(1).expand(-1, rows, -1)
        t2i = weights.gather(2, columns) * (text_row.unsqueeze(-1) & self.valid.unsqueeze(1))
        earlier = t2i
        if self.cache is not None:
            past = self.cache.rows.get(layer, t2i[:, :0])
            # text before an image attends to none of it: what the cache lacks, rows and columns, is zero
            past = F.pad(past, (0, t2i.shape[2] - past.shape[2], keys - rows - past.shape[1], 0))
            self.cache.rows[layer] = earlier = torch.cat([past, t2i], dim=1)
        focus = focus_score(weights, t2i, earlier)
        seen = visible[:, 0].expand(-1, rows, -1).gather(2, columns) & self.valid.unsqueeze(1)
        kept = above_quantile(focus, seen, self.ratios[layer]) | ~text_row.unsqueeze(-1) | ~self.valid.unsqueeze(1)
        # filled-up columns point at text keys; True there leaves those alone
        full = torch.ones_like(weights, dtype=torch.bool)
        return full.scatter(2, columns, kept).unsqueeze(1)


def mean_weights(
    query: Float[Tensor, "batch heads rows head_dim"],
    key: Float[Tensor, "batch kv_heads keys head_dim"],
    visible: Bool[Tensor, "batch 1 rows keys"],
    scale: float,
) -> Float[Tensor, "batch rows keys"]:
    """A: attention weights, mean over heads, added up head by head.  A row that sees no key is all zero."""
    heads, groups = query.shape[1], query.shape[1] // key.shape[1]
    hidden = ~visible[:, 0].expand(query.shape[0], query.shape[2], -1)
    # finite, so that a row that sees nothing has no NaN; added by the product itself, which saves two passes
    bias = torch.zeros(hidden.shape, dtype=query.dtype, device=query.device)
    bias.masked_fill_(hidden, torch.finfo(query.dtype).min)
    total = torch.zeros_like(bias, dtype=torch.float32)
    for head in range(heads):
        scores = torch.baddbmm(bias, query[:, head], key[:, head // groups].transpose(1, 2), alpha=scale)
        total += scores.softmax(dim=-1, dtype=torch.float32)
    return (total / heads).masked_fill_(hidden, 0.0)


def focus_score(
    weights: Float[Tensor, "batch rows keys"],
    t2i: Float[Tensor, "batch rows image"],
    earlier: Float[Tensor, "batch keys image"],
) -> Float[Tensor, "batch rows image"]:
    """F_t2i of eq. 11 for the last `rows` of `keys` tokens; `earlier` holds A_t2i of all of them.

    Eq. 9 takes the text keys before the row's own position: rows of `earlier` that belong to image tokens are zero, so
    only text neighbours count in the one matrix product of eq. 10.
    """
    rows, keys = weights.shape[1:]
    return weights.tril(keys - rows - 1) @ earlier + t2i  # eq. 9, 10, 11


def above_quantile(
    focus: Float[Tensor, "batch rows image"], seen: Bool[Tensor, "batch rows image"], ratio: float
) -> Bool[Tensor, "batch rows image"]:
    """Pairs at or above the ratio-th quantile (lower) of the image tokens that the row sees.

    With n seen and distinct scores, floor(ratio (n - 1)) fall; a row of equal scores loses none.
    """
    ordered = focus.masked_fill(~seen, torch.inf).sort(dim=-1).values
    rank = (ratio * (seen.sum(dim=-1, keepdim=True) - 1)).floor().long().clamp_min(0)
    return focus >= ordered.gather(2, rank)


def attention(
    module: nn.Module,
    query: Float[Tensor, "batch heads rows head_dim"],
    key: Float[Tensor, "batch kv_heads keys head_dim"],
    value: Float[Tensor, "batch kv_heads keys head_dim"],
    attention_mask: Bool[Tensor, "batch 1 rows keys"],
    inhibition: Inhibition | None = None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Float[Tensor, "batch rows heads head_dim"], None]:
    """Scaled-dot-product attention under the causal mask and, where there is one, the layer's inhibition."""
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    if inhibition is not None and inhibition.ratios[layer] > 0:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        attention_mask = attention_mask & inhibition.keep(layer, query, key, attention_mask, scale)
    return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """sdpa_mask, always explicit: CMAI adds to it."""
    return sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False})


AttentionInterface.register(ATTENTION, attention)
AttentionMaskInterface.register(ATTENTION, _mask)
