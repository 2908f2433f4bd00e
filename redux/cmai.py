"""Cross-Modality Attention Inhibition: the pairs of text and image tokens that a layer may not attend to.

In every layer of the language model a text token may attend only to the image tokens that matter to it: those whose
focus score F = A_n2i + A_t2i (`redux.focus`) reaches the gamma-th quantile of its row. The other pairs get minus
infinity before the softmax (`redux.attention`), which then renormalises the row. The mask is a threshold, so no
gradient flows through F. A pair at the threshold stays. The mask has no random part, so recomputed activations give the
same mask. Rows up to the first text after an image lose nothing and are skipped. A `FocusCache` keeps the rows of A_t2i
with the keys and values, so decoding (`redux.decoding`) equals the full forward pass. `redux.plugin` finds the image
tokens.

`CMAI` has an option wherever the paper is silent or contradicts itself. The paper calls QK^T the attention score and
then treats A as weights. A product of signed scores is not a weighting, so the default is weights. One mask serves
all heads, since the paper's A is a mean, and a mask for each head would be the heads x text x image map avoided here.
`heads` makes such masks for comparison, by plain code: each head of a sequence counts as a sequence. Neighbours
include text of earlier turns and text about other images.

Shapes: batch, heads, kv_heads, rows (queries of this call), keys (all tokens so far), image (columns of image tokens),
masks (batch, or 1 if all sequences share a mask).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from redux.decoding import DecodingStep
from redux.focus import (
    focus_score,
    mean_attention_scores,
    mean_attention_weights,
    select_above_quantile,
)
from redux.focus_cache import FocusRows
from redux.headwise_mask import HeadwiseMask
from redux.parallel import mean_over_ranks
from redux.settings import CMAI

Decisions = dict[int, Bool[Tensor, "batch mask_heads keys keys"]]
"""Pairs that stay, by layer, one mask for all heads or one for each; layers that inhibit nothing are missing."""

_recorded: ContextVar[Decisions | None] = ContextVar("recorded decisions", default=None)


@contextmanager
def record_decisions() -> Iterator[Decisions]:
    """Record which pairs stay in each layer of the forward passes within the block, by plain code.

    Such a pass must have all tokens of its sequences, without a cache.
    """
    decisions: Decisions = {}
    token = _recorded.set(decisions)
    try:
        yield decisions
    finally:
        _recorded.reset(token)


def is_recording() -> bool:
    """Return True if `record_decisions` is active, so that decisions must be made by plain code."""
    return _recorded.get() is not None


@dataclass(frozen=True, kw_only=True)
class Inhibition(HeadwiseMask):
    """The inhibition of one forward pass, shared by all layers.

    Args:
        cmai: settings.
        gammas: gamma of each layer.
        is_image: True for keys that are image tokens.
        columns: positions of image tokens, left-aligned. Sequences with fewer image tokens are padded.
        valid: False for padding in `columns`.
        first_text_row: position of the first text token after an image, in any sequence of the batch.
        cache: cache of the call, `FocusRows`, or `HeadRows` for masks of single heads; None without one.
        copies: this inhibition on other devices, for a model that lies on several.
    """

    SEQUENCE_FIELDS = ("is_image", "columns", "valid")

    is_image: Bool[Tensor, "batch keys"]
    first_text_row: int

    @classmethod
    def for_forward(
        cls,
        cmai: CMAI,
        num_layers: int,
        is_image: Bool[Tensor, "batch rows"],
        cache: FocusRows | None,
        training: bool,
    ) -> "Inhibition | DecodingStep | None":
        """Build the inhibition of a forward pass and add its tokens to the cache.

        Args:
            cmai: settings.
            num_layers: layers of the language model.
            is_image: True for new tokens that are image tokens.
            cache: cache of the call; None without one.
            training: True if the model trains.

        Returns:
            A `DecodingStep` if the call is one token on a cache; None if no pair can be inhibited.
        """
        decoding = cache is not None and cache.has_tokens()
        is_active = cmai.active != ("inference" if training else "training") and (cmai.generated or not decoding)
        # A decoded token, whose image tokens are known.
        if cache is not None and cache.needs_count(is_image.shape[1]):
            assert cache.is_image is not None
            cache.set_columns(*_locate_image_tokens(cache.is_image))
        if cache is not None and cache.is_ready(is_image.shape[1]):
            step = DecodingStep.begin(cmai, cmai.compute_gammas(num_layers), cache, is_image)
            return step if is_active else None
        # Many tokens: the cache counts them even if CMAI is not active.
        if cache is not None:
            is_image = cache.add_tokens(is_image)
        if not is_active:
            return None
        columns, count, first_text_row = _locate_image_tokens(is_image)
        if cache is not None:
            cache.set_columns(columns, count, first_text_row)
        if first_text_row == is_image.shape[1]:
            return None
        return cls(
            cmai=cmai,
            gammas=cmai.compute_gammas(num_layers),
            cache=cache,
            is_image=is_image,
            columns=columns,
            valid=is_image.gather(1, columns),
            first_text_row=first_text_row,
        )

    @cached_property
    def image_index(self) -> Int[Tensor, "batch keys"]:
        """Index of each image token among those of its sequence; -1 for text. Computed once for all layers."""
        return (self.is_image.cumsum(dim=1) - 1).masked_fill(~self.is_image, -1).int()

    @cached_property
    def image_span(self) -> Int[Tensor, "batch 2"]:
        """First image token, and token after the last one, of each sequence; 0 and 0 without an image."""
        end = ((self.columns + 1) * self.valid).amax(dim=1)
        return torch.stack([self.columns[:, 0] * self.valid[:, 0], end], dim=1).int()

    @torch.no_grad()
    def compute_mask(self, layer: int, *args: Any, **kwargs: Any) -> Bool[Tensor, "batch mask_heads rows keys"]:
        """Compute the pairs that stay as `HeadwiseMask.compute_mask`, and record them in `record_decisions`."""
        mask = super().compute_mask(layer, *args, **kwargs)
        if (decisions := _recorded.get()) is not None:
            decisions[layer] = mask
        return mask

    def _compute_shared_mask(
        self,
        layer: int,
        query: Float[Tensor, "batch heads rows head_dim"],
        key: Float[Tensor, "batch kv_heads keys head_dim"],
        visible: Bool[Tensor, "masks 1 rows keys"],
        scale: float,
        bias: Float[Tensor, "masks 1 rows keys"] | None,
        mesh: Any,
    ) -> Bool[Tensor, "batch 1 rows keys"]:
        """Compute one mask for all heads, from the mean of their attention."""
        batch, _, rows, _ = query.shape
        keys = key.shape[2]
        mask = visible.new_ones(batch, rows, keys)
        # Rows before the first text after an image lose nothing.
        start = max(self.first_text_row - (keys - rows), 0)
        query = query[:, :, start:]
        visible_rows = visible[:, 0].expand(batch, rows, keys)[:, start:]
        if bias is not None:
            bias = bias[:, 0].expand(batch, rows, keys)[:, start:]
        # A, and its columns of image tokens.
        attention = self._mean_attention(query, key, visible_rows, scale, bias, mesh)
        is_text_row = ~self.is_image[:, keys - rows + start :]
        columns = self.columns.unsqueeze(1).expand(-1, rows - start, -1)
        t2i = attention.gather(2, columns) * (is_text_row.unsqueeze(-1) & self.valid.unsqueeze(1))
        # The focus score, and its quantile in each row.
        focus = t2i
        if self.cmai.focus != "tia":
            focus = focus_score(self._text_to_text(attention, visible_rows), t2i, self._cached_t2i(layer, t2i))
        candidates = visible_rows.gather(2, columns) & self.valid.unsqueeze(1)
        kept = select_above_quantile(focus, candidates, self.gammas[layer], self.cmai.quantile)
        # Padded columns point at text keys, which are never inhibited.
        kept = kept | ~is_text_row.unsqueeze(-1) | ~self.valid.unsqueeze(1)
        mask[:, start:].scatter_(2, columns, kept)
        return mask.unsqueeze(1)

    @torch.no_grad()
    def compute_key_mask(
        self,
        layer: int,
        query: Float[Tensor, "batch heads rows head_dim"],
        key: Float[Tensor, "batch kv_heads rows head_dim"],
        padding: UInt8[Tensor, "batch rows"] | None,
        scale: float,
        mesh: Any = None,
    ) -> Any:
        """Compute the pairs that stay in one layer with fused kernels, under a causal mask without earlier tokens.

        Args:
            layer: index of the layer.
            query, key: of all tokens.
            padding: 0 for keys that no row sees; None if there are none.
            scale: factor of the scores.
            mesh: ranks that share the heads, see `redux.parallel`.

        Returns:
            A `redux.kernels.masked_attention.KeyMask`.
        """
        from redux.kernels.masked_attention import KeyMask, make_key_mask
        from redux.kernels.mean_attention import mean_attention
        from redux.kernels.selection import drop_below_quantile

        start = self.first_text_row
        length = query.shape[2]
        num_columns = self.columns.shape[1]
        cache = None if self.cmai.focus == "tia" else self.cache
        if cache is None or mesh is not None:
            t2i = query.new_zeros(len(query), length - start, num_columns, dtype=torch.float32)
        else:
            # The kernel writes where the cache keeps the rows, which saves two launches; unused columns are zero there.
            t2i = cache.prepare_rows(layer, length, query)[:, :, :num_columns]
        factor = 1.0 if self.cmai.scores == "scores" else scale
        weights, neighbours = self.cmai.scores == "weights", self.cmai.focus == "neighbourhood"
        t2t = mean_attention(query, key, self.image_index, t2i, start, factor, weights, neighbours, padding)
        if mesh is not None:
            t2i = mean_over_ranks(t2i, mesh)
            if cache is not None:
                cache.append_rows(layer, t2i)
        focus = t2i
        if t2t is not None:
            focus = torch.baddbmm(t2i, mean_over_ranks(t2t, mesh), t2i)  # Eq. 9, 10, 11
        elif self.cmai.focus != "tia":
            visible = build_causal_mask(padding, length, query.device).expand(len(t2i), 1, -1, -1)[:, 0, start:]
            focus = focus_score(self._text_to_text(visible.to(t2i.dtype), visible), t2i, t2i)
        pairs = make_key_mask(len(t2i), length, query.device)
        drop_below_quantile(
            pairs, focus, self.columns, self.valid, self.image_index, self.gammas[layer], self.cmai.quantile, padding
        )
        return KeyMask(pairs, self.image_span, start)

    def _mean_attention(
        self,
        query: Float[Tensor, "batch heads rows head_dim"],
        key: Float[Tensor, "batch kv_heads keys head_dim"],
        visible: Bool[Tensor, "batch rows keys"],
        scale: float,
        bias: Float[Tensor, "batch rows keys"] | None,
        mesh: Any,
    ) -> Float[Tensor, "batch rows keys"]:
        """Compute A, of the kind that `CMAI.scores` names."""
        if self.cmai.scores != "weights":
            scores = mean_attention_scores(query, key, visible, scale if self.cmai.scores == "scaled" else 1.0)
            return mean_over_ranks(scores, mesh)
        weights = mean_over_ranks(mean_attention_weights(query, key, visible, scale, bias), mesh)
        if self.cmai.preamble:
            return weights
        # Without the preamble, weights from the first visible image on; packed rows hold several conversations.
        weights = weights * ((visible & self.is_image.unsqueeze(1)).cumsum(dim=2) > 0)
        return weights / weights.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)

    def _text_to_text(
        self, attention: Float[Tensor, "batch rows keys"], visible: Bool[Tensor, "batch rows keys"]
    ) -> Float[Tensor, "batch rows keys"]:
        """Compute the weight of each earlier text token in a row's focus: A_t2n of eq. 9, or that of a baseline."""
        match self.cmai.focus:
            case "sum":
                return visible.to(attention.dtype)
            case "discounted":
                # Count text tokens only; the row's own token is the last that it sees.
                position = (visible & ~self.is_image.unsqueeze(1)).cumsum(dim=2)
                distance = (position[:, :, -1:] - position).to(attention.dtype)
                return self.cmai.discount**distance * visible
        return attention

    def _cached_t2i(self, layer: int, t2i: Float[Tensor, "batch rows image"]) -> Float[Tensor, "batch earlier image"]:
        """Add new rows of A_t2i to the cache, if there is one, and return all rows of the layer."""
        return t2i if self.cache is None else self.cache.append_rows(layer, t2i)


def _locate_image_tokens(
    is_image: Bool[Tensor, "batch keys"],
) -> tuple[Int[Tensor, "batch image"], Int[Tensor, "batch 1"], int]:
    """Locate image tokens, with the only wait of the host for the device: once for all layers.

    Returns:
        Positions of image tokens, left-aligned; their number in each sequence; and the position of the first text after
        an image, in any sequence.
    """
    text_after_image = (~is_image & (is_image.cumsum(dim=1) > 0)).any(dim=0)
    count = is_image.sum(dim=1, keepdim=True)
    num_columns, first_text_row = torch.stack([count.max(), (~text_after_image).cumprod(dim=0).sum()]).tolist()
    # A stable sort of the flags lists image positions first, in their order.
    columns = is_image.long().argsort(dim=1, descending=True, stable=True)[:, :num_columns].contiguous()
    return columns, count, first_text_row


def build_causal_mask(
    padding: UInt8[Tensor, "masks keys"] | None, keys: int, device: torch.device
) -> Bool[Tensor, "masks 1 keys keys"]:
    """Build a causal mask with padding, 0 for keys that no row sees."""
    causal = torch.ones(1, 1, keys, keys, dtype=torch.bool, device=device).tril_()
    return causal if padding is None else causal & padding.bool()[:, None, None]
