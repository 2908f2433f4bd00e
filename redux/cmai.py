"""Cross-Modality Attention Inhibition: eq. 9-11 of the paper, as an attention function of transformers.

In every layer of the language model a text token may attend only to the image tokens that matter to it: those whose
focus score F = A_n2i + A_t2i reaches the gamma-th quantile of its row.  The other pairs get minus infinity before the
softmax, which then renormalises the row.  The mask is a threshold, so no gradient flows through F.  A pair whose score
equals the threshold stays, so recomputed activations give the same mask.

A is the mean over heads of the attention map before inhibition.  Attention weights are added up head by head if maps
are large; raw scores are one product of the concatenated heads.  So a few (text x keys) maps of one layer are in memory
at a time, never heads x text x keys.  At 32 heads and 576 + 512 tokens that is an eighth of the memory
(jobs/bench/inhibition.py).
On a GPU, prompts and training take fused kernels (`redux.kernels`) if the mask is causal with padding: the same
decisions, and attention that reads a mask only where text meets an image.
Rows up to the first text after an image lose nothing and are skipped.  A `FocusCache` keeps the rows of A_t2i with the
keys and values, so decoding (`redux.decoding`) equals the full forward pass.

`CMAI` has an option wherever the paper is silent or contradicts itself.  The paper calls QK^T the attention score and
then treats A as weights.  A product of signed scores is no weighting, so the default is weights.  One mask serves all
heads, since the paper's A is a mean, and a mask for each head would be the heads x text x image map avoided here.  Text
of earlier turns and text about other images are neighbours like any other.

Shapes: batch, heads, kv_heads, rows (queries of this call), keys (all tokens so far), image (columns of image tokens),
masks (batch, or 1 if all sequences share a mask).
"""

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int, Shaped, UInt8
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from redux.decoding import DecodingStep
from redux.focus_cache import FocusRows
from redux.kernels import use_fused
from redux.parallel import head_mesh, mean_over_ranks
from redux.settings import CMAI

ATTENTION_NAME = "cmai"

MASKED_SCORE = -1e4
"""Bound of a float mask: a pair whose score it lowers by this much or more has weight zero."""

MAX_WEIGHTS_AT_ONCE = 2**20
"""Limit of attention weights of all heads in memory; it admits a decoded token and excludes a prompt."""


DEVICE_FIELDS = ("is_image", "columns", "valid")
"""Fields of an `Inhibition` that are tensors."""


@dataclass(frozen=True)
class Inhibition:
    """The inhibition of one forward pass, shared by all layers.

    Args:
        cmai: settings.
        gammas: gamma of each layer.
        is_image: True for keys that are image tokens.
        columns: positions of image tokens, left-aligned. Sequences with fewer image tokens are padded.
        valid: False for padding in `columns`.
        first_text_row: position of the first text token after an image, in any sequence of the batch.
        cache: cache of the call; None without one.
        copies: this inhibition on other devices, for a model that lies on several.
    """

    cmai: CMAI
    gammas: tuple[float, ...]
    is_image: Bool[Tensor, "batch keys"]
    columns: Int[Tensor, "batch image"]
    valid: Bool[Tensor, "batch image"]
    first_text_row: int
    cache: FocusRows | None
    copies: dict[torch.device, "Inhibition"] = field(default_factory=dict, repr=False, compare=False)

    def to(self, device: Any, non_blocking: bool = False) -> "Inhibition":
        """Return the inhibition on another device, copied once for all layers there.  accelerate's hooks call it."""
        if (device := torch.device(device)) == self.columns.device:
            return self
        if device not in self.copies:
            tensors = {name: getattr(self, name).to(device, non_blocking=non_blocking) for name in DEVICE_FIELDS}
            self.copies[device] = replace(self, **tensors)
        return self.copies[device]

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
        if cache is not None and cache.needs_count(is_image.shape[1]):
            assert cache.is_image is not None
            cache.set_columns(*_locate_image_tokens(cache.is_image))
        if cache is not None and cache.is_ready(is_image.shape[1]):
            step = DecodingStep.begin(cmai, cmai.compute_gammas(num_layers), cache, is_image)
            return step if is_active else None
        if cache is not None:
            is_image = cache.add_tokens(is_image)
        if not is_active:
            return None
        columns, count, first_text_row = _locate_image_tokens(is_image)
        if cache is not None:
            cache.set_columns(columns, count, first_text_row)
        if first_text_row == is_image.shape[1]:
            return None
        valid = is_image.gather(1, columns)
        return cls(cmai, cmai.compute_gammas(num_layers), is_image, columns, valid, first_text_row, cache)

    @cached_property
    def slots(self) -> Int[Tensor, "batch keys"]:
        """Number of each image token in its sequence; -1 for text.  Computed once for all layers."""
        return (self.is_image.cumsum(dim=1) - 1).masked_fill(~self.is_image, -1).int()

    @cached_property
    def image_span(self) -> Int[Tensor, "batch 2"]:
        """First image token, and token after the last one, of each sequence; empty without an image."""
        keys = self.is_image.shape[1]
        first = self.columns[:, 0].masked_fill(~self.valid[:, 0], keys)
        return torch.stack([first, ((self.columns + 1) * self.valid).amax(dim=1)], dim=1).int()

    @torch.no_grad()
    def compute_mask(
        self,
        layer: int,
        query: Float[Tensor, "batch heads rows head_dim"],
        key: Float[Tensor, "batch kv_heads keys head_dim"],
        visible: Bool[Tensor, "masks 1 rows keys"],
        scale: float,
        bias: Float[Tensor, "masks 1 rows keys"] | None = None,
        mesh: Any = None,
    ) -> Bool[Tensor, "batch 1 rows keys"]:
        """Compute the pairs that stay in one layer.

        Args:
            layer: number of the layer.
            query: queries of the new tokens.
            key: keys of all tokens so far.
            visible: pairs that the causal mask leaves.
            scale: factor of the scores.
            bias: values to add to the scores.
            mesh: ranks that share the heads, see `redux.parallel`.

        Returns:
            False for pairs of a text row and an image key whose focus is below the row's quantile, else True.
        """
        batch, _, rows, _ = query.shape
        keys = key.shape[2]
        mask = visible.new_ones(batch, rows, keys)
        # rows before the first text after an image lose nothing
        start = max(self.first_text_row - (keys - rows), 0)
        query = query[:, :, start:]
        visible_rows = visible[:, 0].expand(batch, rows, keys)[:, start:]
        if bias is not None:
            bias = bias[:, 0].expand(batch, rows, keys)[:, start:]
        # A, and its columns of image tokens
        attention = self._mean_attention(query, key, visible_rows, scale, bias, mesh)
        is_text_row = ~self.is_image[:, keys - rows + start :]
        columns = self.columns.unsqueeze(1).expand(-1, rows - start, -1)
        t2i = attention.gather(2, columns) * (is_text_row.unsqueeze(-1) & self.valid.unsqueeze(1))
        # the focus score, and its quantile in each row
        focus = t2i
        if self.cmai.focus != "tia":
            focus = focus_score(self._text_to_text(attention, visible_rows), t2i, self._cached_t2i(layer, t2i))
        candidates = visible_rows.gather(2, columns) & self.valid.unsqueeze(1)
        kept = select_above_quantile(focus, candidates, self.gammas[layer], self.cmai.quantile)
        # padded columns point at text keys, which are never inhibited
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
            layer: number of the layer.
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

        start, length = self.first_text_row, query.shape[2]
        factor = 1.0 if self.cmai.scores == "scores" else scale
        weights, neighbours = self.cmai.scores == "weights", self.cmai.focus == "neighbourhood"
        t2t, t2i = mean_attention(
            query, key, self.slots, self.columns.shape[1], start, factor, weights, neighbours, padding
        )
        focus = t2i = mean_over_ranks(t2i, mesh)
        earlier = self._cached_t2i(layer, t2i)
        if t2t is not None:
            focus = torch.baddbmm(t2i, mean_over_ranks(t2t, mesh), t2i)  # eq. 9, 10, 11
        elif self.cmai.focus != "tia":
            visible = _explicit_mask(padding, length, query.device).expand(len(t2i), 1, -1, -1)[:, 0, start:]
            focus = focus_score(self._text_to_text(visible.to(t2i.dtype), visible), t2i, earlier)
        pairs = make_key_mask(len(t2i), length, query.device)
        drop_below_quantile(
            pairs, focus, self.columns, self.valid, self.slots, self.gammas[layer], self.cmai.quantile, padding
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
        # without the preamble, weights from the first visible image on; packed rows hold several conversations
        weights = weights * ((visible & self.is_image.unsqueeze(1)).cumsum(dim=2) > 0)
        return weights / weights.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)

    def _text_to_text(
        self, attention: Float[Tensor, "batch rows keys"], visible: Bool[Tensor, "batch rows keys"]
    ) -> Float[Tensor, "batch rows keys"]:
        """Compute the weight of each earlier text token in a row's focus: A_t2n of eq. 9, or that of a rival."""
        match self.cmai.focus:
            case "sum":
                return visible.to(attention.dtype)
            case "discounted":
                # count text tokens only; the row's own token is the last that it sees
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
    # a stable sort of the flags lists image positions first, in their order
    columns = is_image.long().argsort(dim=1, descending=True, stable=True)[:, :num_columns]
    return columns, count, first_text_row


def mean_attention_weights(
    query: Float[Tensor, "batch heads rows head_dim"],
    key: Float[Tensor, "batch kv_heads keys head_dim"],
    visible: Bool[Tensor, "batch rows keys"],
    scale: float,
    bias: Float[Tensor, "batch rows keys"] | None = None,
) -> Float[Tensor, "batch rows keys"]:
    """A of eq. 9: attention weights, mean over heads.  A row that sees no key is all zero.

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
    # A finite minimum gives no NaN in a row that sees no key.  The product itself adds it, which saves two passes.
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

    One product of the concatenated heads sums over heads.  Queries that share a key head are added up first.
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

    Eq. 9 takes the text keys before the row's own position.  Rows of `earlier` that belong to image tokens are zero, so
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
    return t2n.tril(keys - rows - 1)[:, :, keys - earlier.shape[1] :] @ earlier + t2i  # eq. 9, 10, 11


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
    # float64 and 1e-9 keep an exact whole number from being rounded down
    if quantile == "count":
        return order.argsort(dim=-1) >= (gamma * count.double() + 1e-9).floor()
    rank = gamma * (count - 1).clamp_min(0).double()
    below = (rank + 1e-9).floor().long()
    threshold = ordered.gather(2, below)
    if quantile == "linear":
        above = ordered.gather(2, torch.minimum(below + 1, (count - 1).clamp_min(0)))
        fraction = (rank - below).clamp_min(0).to(focus.dtype)
        # a row that sees no image has only infinities here, whose difference would be NaN
        threshold = threshold.where(above == threshold, threshold + fraction * (above - threshold))
    return focus >= threshold


def inhibited_attention(
    module: nn.Module,
    query: Float[Tensor, "batch heads rows head_dim"],
    key: Float[Tensor, "batch kv_heads keys head_dim"],
    value: Float[Tensor, "batch kv_heads keys head_dim"],
    attention_mask: Shaped[Tensor, "masks one mask_rows keys"] | None,
    inhibition: Inhibition | DecodingStep | None = None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Float[Tensor, "batch rows heads head_dim"], None]:
    """Scaled-dot-product attention under the causal mask and the layer's inhibition; registered as "cmai".

    Args:
        module: attention module of transformers.
        query, key, value: as transformers passes them.
        attention_mask: mask of `_build_mask`, or a caller's: booleans, or floats to add to the scores.
        inhibition: inhibition of this forward pass; None without one.
        scaling: factor of the scores; None is 1 / sqrt(head_dim).
        kwargs: further arguments of transformers' attention functions.
    """
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    if isinstance(inhibition, DecodingStep):
        return _attend_decoded(module, layer, query, key, value, attention_mask, inhibition, scaling, **kwargs)
    if inhibition is not None and attention_mask is not None and not _is_short_mask(attention_mask):
        _split_mask(attention_mask)  # refuse here a mask that only some layers would read
    active = inhibition if inhibition is not None and inhibition.gammas[layer] > 0 else None
    if active is None and (attention_mask is None or not _is_short_mask(attention_mask)):
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    # fused kernels, if they serve this call
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    unsupported = _unsupported(module, query, key, value, attention_mask, active, kwargs)
    if use_fused("CMAI" if active else "attention with padding", query.device, unsupported):
        return _fused_attention(module, query, key, value, attention_mask, active, scale)
    # plain code
    if attention_mask is None or _is_short_mask(attention_mask):
        padding = None if attention_mask is None else attention_mask[:, 0, 0]
        attention_mask = _explicit_mask(padding, key.shape[2], query.device)[:, :, -query.shape[2] :]
    if active is not None:
        # a StaticCache has keys to come, too
        length = active.is_image.shape[1]
        key, value, attention_mask = key[:, :, :length], value[:, :, :length], attention_mask[..., :length]
        visible, bias = _split_mask(attention_mask)
        mesh = head_mesh(module, query.shape[1])
        kept = active.to(query.device).compute_mask(layer, query, key, visible, scale, bias, mesh)
        attention_mask = visible & kept if bias is None else bias.masked_fill(~kept, torch.finfo(bias.dtype).min)
    return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)


def _attend_decoded(
    module: nn.Module,
    layer: int,
    query: Float[Tensor, "batch heads 1 head_dim"],
    key: Float[Tensor, "batch kv_heads keys head_dim"],
    value: Float[Tensor, "batch kv_heads keys head_dim"],
    attention_mask: Any,
    step: DecodingStep,
    scaling: float | None,
    **kwargs: Any,
) -> tuple[Float[Tensor, "batch 1 heads head_dim"], None]:
    """Compute the attention of a decoded token: fused where that is possible, else as for many rows."""
    visible, bias = _split_mask(attention_mask)
    if step.gammas[layer] > 0:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        mesh = head_mesh(module, query.shape[1])
        step = step.to(query.device)
        unsupported = ""
        if bias is not None:
            unsupported = "the mask has floats"
        elif mesh is not None:
            unsupported = "heads are split over ranks"
        elif kwargs.get("dropout") or kwargs.get("position_bias") is not None or kwargs.get("softcap") is not None:
            unsupported = "attention has dropout, a cap or a position bias"
        output = step.attend_fused(layer, query, key, value, visible, scale, unsupported)
        if output is not None:
            return output, None
        # the decorator torch.no_grad() would break the graph of a compiled step (torch 2.13)
        with torch.no_grad():
            kept = step.compute_mask(layer, query, key, visible, scale, bias, mesh)
        attention_mask = visible & kept if bias is None else bias.masked_fill(~kept, torch.finfo(bias.dtype).min)
    return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)


def _fused_attention(
    module: nn.Module,
    query: Float[Tensor, "batch heads rows head_dim"],
    key: Float[Tensor, "batch kv_heads rows head_dim"],
    value: Float[Tensor, "batch kv_heads rows head_dim"],
    attention_mask: UInt8[Tensor, "masks 1 1 rows"] | None,
    inhibition: Inhibition | None,
    scale: float,
) -> tuple[Float[Tensor, "batch rows heads head_dim"], None]:
    """Compute attention and its inhibition with fused kernels; the mask is None or padding."""
    from redux.kernels.masked_attention import masked_attention

    padding = key_mask = None
    if attention_mask is not None:
        padding = attention_mask[:, 0, 0].expand(len(query), -1).contiguous()
    if inhibition is not None:
        inhibition = inhibition.to(query.device)
        mesh = head_mesh(module, query.shape[1])
        key_mask = inhibition.compute_key_mask(int(module.layer_idx), query, key, padding, scale, mesh)  # type: ignore[arg-type]
    return masked_attention(query, key, value, scale, padding, key_mask).transpose(1, 2), None


UNSUPPORTED_ARGUMENTS = ("position_bias", "softcap", "cache", "sliding_window")
"""Arguments of transformers' attention functions that fused kernels do not know."""


def _unsupported(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    inhibition: Inhibition | None,
    kwargs: dict[str, Any],
) -> str:
    """Return why fused kernels cannot serve a call of `inhibited_attention`, or "" if they can."""
    # in the order of the checks: every layer of every call passes them, so text is made only for a reason
    is_causal = kwargs.get("is_causal")
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    if not is_causal or not (attention_mask is None or _is_short_mask(attention_mask)):
        return "the mask is not causal with padding"
    if query.shape[2] != key.shape[2]:
        return "there are earlier tokens in the cache"
    if kwargs.get("dropout"):
        return "attention has dropout"
    if others := [name for name in UNSUPPORTED_ARGUMENTS if kwargs.get(name) is not None]:
        return f"of {', '.join(others)}"
    if query.dtype not in FUSED_DTYPES or not query.dtype == key.dtype == value.dtype:
        return f"{query.dtype}, {key.dtype} and {value.dtype} are not one of float16, bfloat16 and float32"
    if query.is_cuda and torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda") != query.dtype:
        return "autocast would change the dtype"
    if not 16 <= query.shape[-1] == value.shape[-1] <= 128:
        return f"heads have {query.shape[-1]} and {value.shape[-1]} dimensions"
    if inhibition is not None and not inhibition.cmai.preamble:
        return "preamble is false"
    return ""


FUSED_DTYPES = {torch.float16, torch.bfloat16, torch.float32}
"""Dtypes of the fused kernels."""


def _split_mask(
    mask: Shaped[Tensor, "masks one rows keys"],
) -> tuple[Bool[Tensor, "masks one rows keys"], Float[Tensor, "masks one rows keys"] | None]:
    """Split a mask into visible pairs and values to add to scores; ValueError for one that CMAI cannot read."""
    if mask.shape[1] != 1 or not (mask.dtype == torch.bool or mask.is_floating_point()):
        raise ValueError(
            f"attention_mask: got {mask.dtype} of shape {tuple(mask.shape)}, "
            "allowed: booleans or floats of shape (batch, 1, rows, keys), one mask for all heads"
        )
    return (mask, None) if mask.dtype == torch.bool else (mask > MASKED_SCORE, mask)


def _is_short_mask(attention_mask: Tensor) -> bool:
    """Tell if a mask has the short form of `_build_mask`: causal, with padding."""
    return attention_mask.dtype == torch.uint8


def _explicit_mask(
    padding: UInt8[Tensor, "masks keys"] | None, keys: int, device: torch.device
) -> Bool[Tensor, "masks 1 keys keys"]:
    """Build a causal mask with padding, 0 for keys that no row sees."""
    causal = torch.ones(1, 1, keys, keys, dtype=torch.bool, device=device).tril_()
    return causal if padding is None else causal & padding.bool()[:, None, None]


def _build_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """Build the mask of a forward pass: in a short form if it is causal and there are no earlier tokens.

    Returns:
        None for a causal mask; uint8 of shape (batch, 1, 1, keys) for one with padding, 0 for keys that no row sees;
        else sdpa_mask's booleans of shape (batch, 1, rows, keys).
    """
    explicit = {**kwargs, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    padding, length = kwargs.get("attention_mask"), kwargs.get("q_length")
    offsets = (kwargs.get("q_offset", 0), kwargs.get("kv_offset", 0))
    if (
        args
        or kwargs.get("mask_function") is not causal_mask_function
        or not kwargs.get("allow_is_causal_skip", True)
        or kwargs.get("local_size") is not None
        or length != kwargs.get("kv_length")
        or any(isinstance(offset, Tensor) or offset != 0 for offset in offsets)
        or (padding is not None and padding.shape[-1] != length)
    ):
        return sdpa_mask(*args, **explicit)
    # transformers finds out if nothing is padded, as for its own attention: one wait for the GPU in a forward pass
    if padding is None or sdpa_mask(**kwargs) is None:
        return None
    return padding.to(torch.uint8)[:, None, None]


AttentionInterface.register(ATTENTION_NAME, inhibited_attention)
AttentionMaskInterface.register(ATTENTION_NAME, _build_mask)
