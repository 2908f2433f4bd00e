"""CMAI of decoding: one new token for each sequence, on a cache that knows the tokens before it.

All shapes are known before the call, and the host waits for nothing, so a step can be compiled and captured in a CUDA
graph. The plain code here defines the result; `redux.kernels.decoding` computes it in three launches.

Shapes: batch, heads, kv_heads, keys (in a StaticFocusCache with those to come, which no mask shows), slots (columns of
image tokens, some of them free), rows (rows of A_t2i, from position `start` on), masks (batch, or 1 for all sequences).
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from redux.focus import select_above_quantile
from redux.focus_cache import FocusRows
from redux.headwise_mask import HeadwiseMask
from redux.kernels import use_fused
from redux.parallel import mean_over_ranks
from redux.settings import CMAI

MAX_SLOTS = 8192
"""Largest number of columns that one program of the kernel holds."""


@dataclass(frozen=True, kw_only=True)
class DecodingStep(HeadwiseMask):
    """The inhibition of one decoded token, shared by all layers.

    Args:
        cmai: settings.
        gammas: gamma of each layer.
        cache: cache of the call, which counts the new token: `FocusRows`, or `HeadRows` for masks of single heads.
        position: position of the new token.
        is_text: True for sequences whose new token is text.
        columns: positions of image tokens, left-aligned; free ones are the token's own position.
        valid: False for free columns.
        copies: this step on other devices, for a model that lies on several.
    """

    SEQUENCE_FIELDS = ("is_text", "columns", "valid")
    SHARED_FIELDS = ("position",)

    position: Int[Tensor, ""]
    is_text: Bool[Tensor, "batch 1"]

    @classmethod
    def begin(
        cls, cmai: CMAI, gammas: tuple[float, ...], cache: FocusRows, is_image: Bool[Tensor, "batch 1"]
    ) -> "DecodingStep":
        """Add a token to the cache and begin its step.

        Args:
            cmai: settings.
            gammas: gamma of each layer.
            cache: a cache that is ready for a decoded token.
            is_image: True for new tokens that are image tokens.
        """
        position, is_image = cache.add_decoded_token(is_image)
        assert cache.columns is not None
        assert cache.count is not None
        slots = torch.arange(cache.columns.shape[1], device=cache.columns.device)
        valid = slots < cache.count
        return cls(
            cmai=cmai,
            gammas=gammas,
            cache=cache,
            position=position,
            is_text=~is_image,
            columns=cache.columns.where(valid, position),
            valid=valid,
        )

    def _compute_shared_mask(
        self,
        layer: int,
        query: Float[Tensor, "batch heads 1 head_dim"],
        key: Float[Tensor, "batch kv_heads keys head_dim"],
        visible: Bool[Tensor, "masks 1 1 keys"],
        scale: float,
        bias: Float[Tensor, "masks 1 1 keys"] | None,
        mesh: Any,
    ) -> Bool[Tensor, "batch 1 1 keys"]:
        """Compute one mask for all heads, from the mean of their attention."""
        batch, keys = len(query), key.shape[2]
        visible_keys = visible[:, 0, 0].expand(batch, keys)
        attention = self._mean_attention(query, key, visible, scale, bias, mesh)
        can_be_inhibited = self.valid & self.is_text
        t2i = attention.gather(1, self.columns) * can_be_inhibited
        focus = t2i
        if self.cmai.focus != "tia":
            # Eq. 10 and 11: tokens before this one count with their rows of A_t2i.
            rows = self.cache.prepare_rows(layer, keys, t2i)
            earlier = torch.arange(keys, device=key.device) < self.position
            t2n = (self._text_to_text(attention, visible_keys) * earlier)[:, keys - rows.shape[1] :]
            focus = torch.baddbmm(t2i.unsqueeze(1), t2n.unsqueeze(1), rows).squeeze(1)
            self.cache.write_row(layer, keys, (self.position - self.cache.start).reshape(1), t2i.unsqueeze(1))
        candidates = visible_keys.gather(1, self.columns) & self.valid
        kept = select_above_quantile(
            focus.unsqueeze(1), candidates.unsqueeze(1), self.gammas[layer], self.cmai.quantile
        ).squeeze(1)
        # Free columns point at the token's own key, which always stays.
        mask = torch.ones_like(visible_keys).scatter(1, self.columns, kept | ~can_be_inhibited)
        return mask[:, None, None]

    def _mean_attention(
        self,
        query: Float[Tensor, "batch heads 1 head_dim"],
        key: Float[Tensor, "batch kv_heads keys head_dim"],
        visible: Bool[Tensor, "masks 1 1 keys"],
        scale: float,
        bias: Float[Tensor, "masks 1 1 keys"] | None,
        mesh: Any,
    ) -> Float[Tensor, "batch keys"]:
        """Compute A of eq. 9, of the kind that `CMAI.scores` names."""
        queries = query.unflatten(1, (key.shape[1], -1)).squeeze(3)
        if self.cmai.scores != "weights":
            # The sum over heads of a key head is one product.
            summed = (queries.sum(dim=2, keepdim=True) @ key.mT).squeeze(2).float().sum(dim=1)
            summed = summed * ((scale if self.cmai.scores == "scaled" else 1.0) / query.shape[1])
            return mean_over_ranks(summed.masked_fill(~visible[:, 0, 0], 0.0), mesh)
        scores = queries @ key.mT
        scores = scores * scale if bias is None else scores * scale + bias
        # The finite minimum gives no NaN if no key is visible.
        weights = scores.masked_fill(~visible, torch.finfo(scores.dtype).min).softmax(dim=-1, dtype=torch.float32)
        attention = mean_over_ranks(weights.mean(dim=(1, 2)), mesh).where(visible[:, 0, 0], 0.0)
        if self.cmai.preamble:
            return attention
        is_image = self.cache.get_flags(key.shape[2]).to(key.device)
        attention = attention * ((visible[:, 0, 0] & is_image).cumsum(dim=1) > 0)
        return attention / attention.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(attention.dtype).tiny)

    def _text_to_text(
        self, attention: Float[Tensor, "batch keys"], visible: Bool[Tensor, "batch keys"]
    ) -> Float[Tensor, "batch keys"]:
        """Compute the weight of each earlier text token in the focus: A_t2n of eq. 9, or that of a baseline."""
        match self.cmai.focus:
            case "sum":
                return visible.to(attention.dtype)
            case "discounted":
                # Count text tokens only; the token itself is the last that it sees.
                text = visible & ~self.cache.get_flags(visible.shape[1]).to(visible.device)
                order = text.cumsum(dim=1)
                distance = (order[:, -1:] - order).to(attention.dtype)
                return self.cmai.discount**distance * visible
        return attention

    def attend_fused(
        self,
        layer: int,
        query: Float[Tensor, "batch heads 1 head_dim"],
        key: Float[Tensor, "batch kv_heads keys head_dim"],
        value: Float[Tensor, "batch kv_heads keys head_dim"],
        visible: Bool[Tensor, "masks 1 1 keys"],
        scale: float,
        unsupported: str,
    ) -> Float[Tensor, "batch 1 heads head_dim"] | None:
        """Compute the attention of one layer with the fused kernels; None if they do not serve this call.

        Args:
            layer: index of the layer.
            query: query of the new token.
            key, value: keys and values of all tokens so far.
            visible: keys that the causal mask leaves.
            scale: factor of the scores.
            unsupported: reason of the caller why the kernels cannot serve this call; "" if there is none.
        """
        reason = unsupported or self._missing_kernel(query, key, value)
        if not use_fused("CMAI in decoding", query.device, reason):
            return None
        from redux.kernels.decoding import attend_decoded_token  # Imports triton

        assert self.cache.flags is not None
        # Whole tensors: the kernels know where the token is, and each slice would cost the host 1 to 2 us a layer.
        rows = None if self.cmai.focus == "tia" else self.cache.reserve_rows(layer, key.shape[2], query)
        return attend_decoded_token(query, key, value, visible, self.cache.flags, self, rows, self.gammas[layer], scale)

    def _missing_kernel(self, query: Tensor, key: Tensor, value: Tensor) -> str:
        """Return why the kernels cannot serve a call, or ""."""
        if self.cmai.heads != "mean":
            return "heads have masks of their own"
        if self.cmai.focus == "discounted":
            return "focus is discounted"
        if self.cmai.scores == "weights" and not self.cmai.preamble:
            return "preamble is false"
        if query.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"numbers are {query.dtype}"
        if value.shape != key.shape:
            return "keys and values differ in shape"
        if self.columns.shape[1] > MAX_SLOTS:
            return f"there are more than {MAX_SLOTS} image tokens"
        if self.cache.flags is None or self.cache.flags.device != query.device:
            return "the model lies on several devices"
        if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
            return "gradients are recorded"
        return ""
