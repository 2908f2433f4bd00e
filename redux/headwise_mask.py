"""Masks of CMAI for all heads of a layer, or for each head that has a mask of its own.

A mask for all heads follows from the mean of their attention. For masks of single heads, each such head of a sequence
counts as a separate sequence with one head, so the code for the mean serves both.

Shapes: batch, heads, kv_heads, rows (queries of this call), keys (all tokens so far), image (columns of image tokens),
masks (batch, or 1 if all sequences share a mask).
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, TypeVar

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from redux.focus import fold_heads, unfold_heads
from redux.focus_cache import HeadRows
from redux.settings import CMAI

Mask = TypeVar("Mask", bound="HeadwiseMask")


@dataclass(frozen=True, kw_only=True)
class HeadwiseMask(ABC):
    """Base of `redux.cmai.Inhibition` and `redux.decoding.DecodingStep`, which document the fields."""

    SEQUENCE_FIELDS: ClassVar[tuple[str, ...]] = ()
    """Fields that are tensors with a row for each sequence."""

    SHARED_FIELDS: ClassVar[tuple[str, ...]] = ()
    """Fields that are tensors which all sequences share."""

    cmai: CMAI
    gammas: tuple[float, ...]
    columns: Int[Tensor, "batch image"]
    valid: Bool[Tensor, "batch image"]
    cache: Any
    copies: dict[torch.device, Any] = field(default_factory=dict, repr=False, compare=False)

    def to(self: Mask, device: Any, non_blocking: bool = False) -> Mask:
        """Return the masks on another device, copied once for all layers there. accelerate's hooks call it."""
        if (device := torch.device(device)) == self.columns.device:
            return self
        if device not in self.copies:
            names = self.SEQUENCE_FIELDS + self.SHARED_FIELDS
            tensors = {name: getattr(self, name).to(device, non_blocking=non_blocking) for name in names}
            self.copies[device] = replace(self, **tensors)
        return self.copies[device]

    def compute_mask(
        self,
        layer: int,
        query: Float[Tensor, "batch heads rows head_dim"],
        key: Float[Tensor, "batch kv_heads keys head_dim"],
        visible: Bool[Tensor, "masks 1 rows keys"],
        scale: float,
        bias: Float[Tensor, "masks 1 rows keys"] | None = None,
        mesh: Any = None,
    ) -> Bool[Tensor, "batch mask_heads rows keys"]:
        """Compute the pairs that stay in one layer: one mask for all heads, or one for each if `CMAI.heads` says so.

        Args:
            layer: index of the layer.
            query: queries of the new tokens.
            key: keys of all tokens so far.
            visible: pairs that the causal mask leaves.
            scale: factor of the scores.
            bias: values to add to the scores.
            mesh: ranks that share the heads, see `redux.parallel`.

        Returns:
            False for pairs of a text row and an image key whose focus is below the row's quantile, else True.

        Raises:
            ValueError: heads have numbers, and ranks share the heads.
        """
        if self.cmai.heads == "mean":
            return self._compute_shared_mask(layer, query, key, visible, scale, bias, mesh)
        if mesh is not None and self.cmai.heads != "each":
            raise ValueError(f"heads: got {self.cmai.heads}, allowed with tensor parallelism: mean or each")
        heads = self.cmai.select_heads(layer, query.shape[1])
        if not heads:
            return query.new_ones(len(query), 1, query.shape[2], key.shape[2], dtype=torch.bool)
        # A head is a sequence here, and its mean needs no other rank.
        visible = repeat_for_heads(visible, len(query), len(heads))
        bias = None if bias is None else repeat_for_heads(bias, len(query), len(heads))
        queries, keys = fold_heads(query, key, heads)
        masks = self._repeat_for_heads(len(heads))._compute_shared_mask(
            layer, queries, keys, visible, scale, bias, None
        )
        return unfold_heads(masks, heads, query.shape[1])

    @abstractmethod
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

    def _repeat_for_heads(self: Mask, num_heads: int) -> Mask:
        """Return the masks of the sequences of `fold_heads`."""
        tensors = {name: getattr(self, name).repeat_interleave(num_heads, dim=0) for name in self.SEQUENCE_FIELDS}
        cache = self.cache if self.cache is None else HeadRows(self.cache, num_heads)
        return replace(self, **tensors, cache=cache, copies={})


def repeat_for_heads(
    pairs: Shaped[Tensor, "masks 1 rows keys"], batch: int, num_heads: int
) -> Shaped[Tensor, "repeated 1 rows keys"]:
    """Repeat a mask for the sequences of `fold_heads`; one that all sequences share stays as it is."""
    return pairs.repeat_interleave(num_heads, dim=0) if len(pairs) == batch else pairs
