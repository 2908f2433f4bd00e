"""Caches of keys and values that also hold what CMAI needs of earlier tokens: image positions and rows of A_t2i.

The rows lie in preallocated tensors. A `FocusCache` doubles them when they are full, so a decoded token copies none.
A `StaticFocusCache` has the size of its StaticCache, and tensors that stay at their addresses: compiled decoding and
CUDA graphs read and write them in place.

After a prompt the number of image tokens is known on the host. A decoded token is an image token only if the model
itself generates one, and the host does not wait to see that. `FREE_COLUMNS` columns are reserved for such tokens. A
FocusCache counts the tokens again before these columns can be full. A StaticFocusCache counts further image tokens as
text.

Shapes: batch, keys (all tokens so far), slots (columns of image tokens, with free ones and a last one that nobody
reads), image (columns in use), rows (tokens from `start` on), head (none, or the heads that have rows of their own).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import Cache

FREE_COLUMNS = 16
"""Columns for image tokens that the model generates until the host counts again, and a last one that stays free."""

MIN_FREE_ROWS = 64
"""Least number of free rows in a new tensor."""


class FocusRows(Cache):
    """Image positions and rows of A_t2i, a part of `FocusCache` and `StaticFocusCache`.

    Attributes:
        length: tokens so far; a tensor in a StaticFocusCache, since compiled code may not depend on it.
        start: position of the first row of A_t2i. Tokens before it see no image or are part of one.
        num_columns: image tokens of the sequence with most of them, when the host last counted.
        columns: positions of image tokens, left-aligned, (batch, slots); None until the host has counted.
        count: image tokens of each sequence, (batch, 1).
        flags: True for image tokens, (batch, capacity); False for tokens to come.
        free_columns: decoded tokens until the host must count again.
    """

    is_static = False
    length: int | Tensor = 0
    start: int = 0
    num_columns: int = 0
    columns: Tensor | None = None
    count: Tensor | None = None
    free_columns: int = 0
    flags: Tensor | None = None
    _rows: dict[int, Tensor]  # By layer, (batch, capacity, slots), or with the heads as a last dimension
    _keys_with_rows: int = 0  # Tokens of the last call that wrote rows

    def forget_tokens(self) -> None:
        """Remove all tokens, for an empty cache."""
        self.length, self.start, self.num_columns, self.free_columns = 0, 0, 0, 0
        self.columns = self.count = self.flags = None
        self._rows, self._keys_with_rows = {}, 0

    @property
    def is_image(self) -> Bool[Tensor, "batch keys"] | None:
        """True for keys so far that are image tokens; None before the first token."""
        return None if self.flags is None else self.flags[:, : int(self.length)]

    @property
    def t2i(self) -> dict[int, Float[Tensor, "batch earlier image *head"]]:
        """A_t2i of the latest tokens by layer. Tokens before them see no image or are part of one."""
        earlier = max(min(int(self.length), self._keys_with_rows) - self.start, 0)
        return {layer: rows[:, :earlier, : self.num_columns] for layer, rows in self._rows.items()}

    def has_tokens(self) -> bool:
        """Return True if any token was added."""
        return self.flags is not None and (isinstance(self.length, Tensor) or self.length > 0)

    def is_ready(self, rows: int) -> bool:
        """Return True if a call of so many tokens can do without the host knowing which of them are image tokens."""
        # Without an image there is nothing to inhibit; a compiled step cannot count, so it goes on all the same.
        has_columns = self.columns is not None and (self.num_columns > 0 or self.is_static)
        return rows == 1 and has_columns and self.free_columns > 0

    def needs_count(self, rows: int) -> bool:
        """Return True if the host must locate image tokens again before a decoded token: free columns may be full."""
        return rows == 1 and not self.is_static and self.num_columns > 0 and self.free_columns <= 0

    def fits_tokens(self) -> bool:
        """Return True if all tokens of the cache were added while CMAI was on."""
        return int(self.get_seq_length()) == int(self.length)

    def add_tokens(self, is_image: Bool[Tensor, "batch rows"]) -> Bool[Tensor, "batch keys"]:
        """Add the tokens of a call.

        Returns:
            True for keys so far that are image tokens.
        """
        old_length = int(self.length)
        new_length = old_length + is_image.shape[1]
        if self.flags is None or self.flags.shape[1] < new_length:
            flags = is_image.new_zeros(len(is_image), self._capacity(new_length))
            if self.flags is not None:
                flags[:, :old_length] = self.flags[:, :old_length].to(flags.device)
            self.flags = self._pin(flags)
        self.flags[:, old_length:new_length] = is_image
        self._set_length(new_length)
        return self.flags[:, :new_length].to(is_image.device)

    def set_columns(
        self, columns: Int[Tensor, "batch image"], count: Int[Tensor, "batch 1"], first_text_row: int
    ) -> None:
        """Store the positions of image tokens, as the host has counted them.

        Args:
            columns: positions of image tokens, left-aligned.
            count: image tokens of each sequence.
            first_text_row: position of the first text after an image, in any sequence.
        """
        if not self._keys_with_rows:
            self.start = first_text_row
        self.num_columns = columns.shape[1]
        # Room for tokens that the model generates, without a new tensor for each.
        slots = F.pad(columns, (0, FREE_COLUMNS))
        if self.columns is not None and self.columns.shape == slots.shape and self.count is not None:
            # Compiled code knows these tensors by their addresses.
            self.columns.copy_(slots)
            self.count.copy_(count)
        else:
            self.columns, self.count = self._pin(slots), self._pin(count.clone())
        self.free_columns = FREE_COLUMNS - 1

    def add_decoded_token(self, is_image: Bool[Tensor, "batch 1"]) -> tuple[Int[Tensor, ""], Bool[Tensor, "batch 1"]]:
        """Add one token to each sequence without waiting for the device.

        Returns:
            The token's position, and True where it counts as an image token.
        """
        assert self.columns is not None
        assert self.count is not None
        assert self.flags is not None
        is_image = is_image.to(self.count.device) & (self.count < self.columns.shape[1] - 1)
        position = self._advance()
        # A column beyond the count is free: text tokens write there, too, and the next one overwrites it.
        self.columns.scatter_(1, self.count, position.expand(len(is_image), 1))
        self.count.add_(is_image)
        self.flags.index_copy_(1, position.reshape(1), is_image)
        return position, is_image

    def get_flags(self, keys: int) -> Bool[Tensor, "batch keys"]:
        """Return the flags of image tokens, for as many keys as a layer has."""
        assert self.flags is not None
        return self.flags[:, :keys]

    def prepare_rows(
        self, layer: int, keys: int, like: Tensor, heads: tuple[int, ...] = ()
    ) -> Float[Tensor, "batch rows slots *head"]:
        """Return the rows of a layer from `start` to the last of the keys, for writing in place.

        Arguments are those of `reserve_rows`.
        """
        assert self.columns is not None
        # Removed image tokens, such as those of assisted decoding, leave more columns than there are slots.
        return self.reserve_rows(layer, keys, like, heads)[:, : max(keys - self.start, 0), : self.columns.shape[1]]

    def reserve_rows(
        self, layer: int, keys: int, like: Tensor, heads: tuple[int, ...] = ()
    ) -> Float[Tensor, "batch capacity slots_at_least *head"]:
        """Return all rows of a layer from `start` on, with room for those of all keys; those to come are zero.

        Args:
            layer: index of the layer.
            keys: keys of the layer.
            like: a tensor whose device and batch size the rows have.
            heads: the number of heads that have rows of their own, as a last dimension; () for one mean of all heads.
        """
        assert self.columns is not None
        needed, slots = max(keys - self.start, 0), self.columns.shape[1]
        rows = self._rows.get(layer)
        if rows is None or rows.shape[1] < needed or rows.shape[2] < slots:
            size = (len(like), self._row_capacity(keys), slots, *heads)
            grown = torch.zeros(size, dtype=torch.float32, device=like.device)
            if rows is not None:
                grown[:, : rows.shape[1], : rows.shape[2]] = rows  # Earlier tokens see no later image
            self._rows[layer] = rows = self._pin(grown)
        self._keys_with_rows = keys
        return rows

    def write_row(
        self, layer: int, keys: int, row: Int[Tensor, "1"], t2i: Float[Tensor, "batch 1 slots *head"]
    ) -> None:
        """Write A_t2i of one token into the rows of a layer."""
        self.prepare_rows(layer, keys, t2i, t2i.shape[3:]).index_copy_(1, row, t2i)

    def append_rows(
        self, layer: int, t2i: Float[Tensor, "batch rows image *head"]
    ) -> Float[Tensor, "batch earlier image *head"]:
        """Store A_t2i of the last rows of a call, and return all rows of the layer."""
        rows = self.prepare_rows(layer, int(self.length), t2i, t2i.shape[3:])
        earlier = rows.shape[1] - t2i.shape[1]
        rows[:, earlier:, : t2i.shape[2]] = t2i
        return rows[:, :, : t2i.shape[2]]

    # How the tensors grow; a StaticFocusCache overrides these.

    def _capacity(self, tokens: int) -> int:
        """Compute the tokens to have room for, so that copying is amortised."""
        known = 0 if self.flags is None else self.flags.shape[1]
        return max(2 * known if tokens > known else known, tokens + MIN_FREE_ROWS)

    def _row_capacity(self, tokens: int) -> int:
        return self._capacity(tokens) - self.start

    def _pin(self, tensor: Tensor) -> Tensor:
        """Fix the address of a tensor for compiled code."""
        return tensor

    def _set_length(self, length: int) -> None:
        self.length = length

    def _advance(self) -> Int[Tensor, ""]:
        """Return the position of a decoded token and count it."""
        assert self.flags is not None
        position = int(self.length)
        self.length = position + 1
        self.free_columns -= 1
        if self.length > self.flags.shape[1]:
            self.flags = F.pad(self.flags, (0, self._capacity(self.length) - self.flags.shape[1]))
        return torch.full((), position, dtype=torch.long, device=self.flags.device)

    # generate calls these methods for beam search, for several answers and for assisted decoding.

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._select_sequences(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._select_sequences(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._select_sequences(lambda tensor: tensor[indices.to(tensor.device)])

    def reset(self) -> None:
        super().reset()
        self.forget_tokens()

    def crop(self, tokens_to_remove: int) -> None:
        length_before = int(self.get_seq_length())
        super().crop(tokens_to_remove)
        length = int(self.length) - (length_before - int(self.get_seq_length()))
        self._set_length(length)
        self.free_columns = 0  # Image tokens may be among the removed ones, so the host counts again
        if self.flags is not None:
            self.flags[:, length:] = False
        for rows in self._rows.values():
            rows[:, max(length - self.start, 0) :] = 0.0
        if length <= self.start:
            self._keys_with_rows = 0  # No row is left, so the next prompt may begin its rows elsewhere

    def _select_sequences(self, select: Callable[[Tensor], Tensor]) -> None:
        """Replace the tensors of all sequences by those of selected sequences."""
        if self.flags is not None:
            self.flags = select(self.flags)
        if self.columns is not None and self.count is not None:
            self.columns, self.count = select(self.columns), select(self.count)
        self._rows = {layer: select(rows) for layer, rows in self._rows.items()}


class FocusCache(FocusRows, DynamicCache):
    """Cache of keys and values that grows with the tokens, and of the rows of A_t2i that CMAI needs of them."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.forget_tokens()


class StaticFocusCache(FocusRows, StaticCache):
    """Cache of keys and values of a fixed size, and of the rows of A_t2i, for compiled decoding and CUDA graphs."""

    is_static = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.forget_tokens()

    def reset(self) -> None:
        # Compiled code knows these tensors by their addresses.
        length, flags, columns, count, rows = self.length, self.flags, self.columns, self.count, self._rows
        super().reset()
        if isinstance(length, Tensor):
            self.length, self.flags, self.columns, self.count, self._rows = length, flags, columns, count, rows
            for tensor in (length, flags, columns, count, *rows.values()):
                if tensor is not None:
                    tensor.zero_()

    def copy_tokens(self, source: FocusCache, slots: int, start: int) -> None:
        """Copy the tokens of a FocusCache into the tensors of this cache, which keep their addresses.

        Args:
            source: cache of a prompt, whose keys and values the layers have already.
            slots: columns to have room for, at least those of the source.
            start: position of the first row, at most the source's, before which rows are zero.
        """
        assert source.flags is not None
        length, flags = int(source.length), source.flags
        if self.flags is None:
            self.flags = self._pin(flags.new_zeros(len(flags), self._capacity(length)))
        self.flags.zero_()
        self.flags[:, :length] = flags[:, :length]
        self._set_length(length)
        self.start, self._keys_with_rows = start, length
        if source.columns is None or source.count is None:
            return
        if self.columns is None or self.count is None:
            self.columns = self._pin(source.columns.new_zeros(len(flags), slots))
            self.count = self._pin(source.count.clone())
        self.columns.zero_()
        self.columns[:, : source.num_columns] = source.columns[:, : source.num_columns]
        self.count.copy_(source.count)
        self.num_columns, self.free_columns = source.num_columns, FREE_COLUMNS - 1
        for layer, rows in source.t2i.items():
            target_rows = self.prepare_rows(layer, self.get_max_length(), rows, rows.shape[3:])
            target_rows.zero_()
            offset = source.start - start
            target_rows[:, offset : offset + rows.shape[1], : rows.shape[2]] = rows
        for layer in self._rows.keys() - source._rows.keys():
            self._rows[layer].zero_()

    def _capacity(self, tokens: int) -> int:
        return max(self.get_max_length(), tokens)

    def _row_capacity(self, tokens: int) -> int:
        return self._capacity(tokens)  # The next prompt may have another start

    def _pin(self, tensor: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            torch._dynamo.mark_static_address(tensor)
        return tensor

    def _set_length(self, length: int) -> None:
        if isinstance(self.length, Tensor):
            self.length.fill_(length)
        elif self.flags is not None:
            self.length = self._pin(torch.full((), length, dtype=torch.long, device=self.flags.device))

    def _advance(self) -> Int[Tensor, ""]:
        assert isinstance(self.length, Tensor)
        position = self.length.clone()
        self.length.add_(1)
        return position


@dataclass(frozen=True)
class HeadRows:
    """View of a cache for heads that have their own rows: each head of each sequence counts as a separate sequence.

    Args:
        cache: the cache.
        num_heads: heads with rows.
    """

    cache: FocusRows
    num_heads: int

    @property
    def start(self) -> int:
        return self.cache.start

    def get_flags(self, keys: int) -> Bool[Tensor, "sequences keys"]:
        """Return the flags of image tokens, see `FocusRows.get_flags`."""
        return self.cache.get_flags(keys).repeat_interleave(self.num_heads, dim=0)

    def append_rows(
        self, layer: int, t2i: Float[Tensor, "sequences rows image"]
    ) -> Float[Tensor, "sequences earlier image"]:
        """Store A_t2i of the last rows of a call, and return all rows of the layer."""
        return self._join(self.cache.append_rows(layer, self._split(t2i)))

    def prepare_rows(self, layer: int, keys: int, like: Tensor) -> Float[Tensor, "sequences rows slots"]:
        """Return a copy of the rows of a layer, see `FocusRows.prepare_rows`; `write_row` changes the cache."""
        return self._join(self.cache.prepare_rows(layer, keys, like[:: self.num_heads], (self.num_heads,)))

    def write_row(self, layer: int, keys: int, row: Int[Tensor, "1"], t2i: Float[Tensor, "sequences 1 slots"]) -> None:
        """Write A_t2i of one token into the rows of a layer."""
        self.cache.write_row(layer, keys, row, self._split(t2i))

    def _split(self, t2i: Float[Tensor, "sequences rows image"]) -> Float[Tensor, "batch rows image heads"]:
        return t2i.unflatten(0, (-1, self.num_heads)).permute(0, 2, 3, 1)

    def _join(self, t2i: Float[Tensor, "batch rows image heads"]) -> Float[Tensor, "sequences rows image"]:
        return t2i.permute(0, 3, 1, 2).flatten(0, 1)


def adopt_cache(cache: Cache) -> Cache:
    """Make an empty DynamicCache or StaticCache one of this module's, in place, since its owner passes it again."""
    classes: dict[type, type[FocusRows]] = {DynamicCache: FocusCache, StaticCache: StaticFocusCache}
    adopted = classes.get(type(cache))
    if adopted is not None and int(cache.get_seq_length()) == 0:
        cache.__class__ = adopted
        assert isinstance(cache, FocusRows)
        cache.forget_tokens()
    return cache
