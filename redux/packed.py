"""Packed rows as a batch of their conversations, for attention with CMAI.

A packed row has several conversations, and positions restart in each. Attention is the only part of a language model
that looks at other tokens. So queries, keys and values are split into one sequence per conversation, padded on the
right, and the outputs are joined to rows again. All code of CMAI, plain and fused, then sees conversations as it does
without packing, and computes no pair of two conversations.

Shapes: rows and length (of packed rows), tokens = rows x length, conversations, longest (conversation).
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from redux.cmai import Inhibition


@dataclass(frozen=True)
class PackedConversations:
    """The conversations of packed rows.

    Args:
        tokens: index of each token of a conversation among those of all rows; padding repeats the first one.
        padding: 0 for padding.
        indices: for each token of the rows, its index among those of all padded conversations.
    """

    tokens: Int[Tensor, "conversations longest"]
    padding: UInt8[Tensor, "conversations longest"]
    indices: Int[Tensor, "rows length"]

    @classmethod
    def find(cls, position_ids: Int[Tensor, "rows length"]) -> "PackedConversations | None":
        """Find conversations as transformers does: one starts wherever positions do not go on by one.

        Returns:
            None if each row is a single conversation.

        >>> PackedConversations.find(torch.tensor([[0, 1, 2, 0, 1]])).tokens
        tensor([[0, 1, 2],
                [3, 4, 3]])
        """
        rows, length = position_ids.shape
        is_start = torch.ones_like(position_ids, dtype=torch.bool)
        is_start[:, 1:] = position_ids.diff(dim=1) != 1
        starts = is_start.flatten().nonzero().flatten()
        if len(starts) == rows:
            return None
        numbers = torch.arange(rows * length, device=position_ids.device)
        sizes = torch.cat([starts[1:], starts.new_tensor([rows * length])]) - starts
        longest = int(sizes.max())
        is_token = numbers[:longest] < sizes[:, None]
        tokens = torch.where(is_token, starts[:, None] + numbers[:longest], starts[:, None])
        conversation = is_start.flatten().cumsum(dim=0) - 1
        indices = conversation * longest + numbers - starts[conversation]
        return cls(tokens, is_token.to(torch.uint8), indices.view(rows, length))

    def to(self, device: torch.device, non_blocking: bool = False) -> "PackedConversations":
        """Copy the tensors to a device."""
        tensors = (self.tokens, self.padding, self.indices)
        return PackedConversations(*(tensor.to(device, non_blocking=non_blocking) for tensor in tensors))

    def split_flags(self, flags: Bool[Tensor, "rows length"]) -> Bool[Tensor, "conversations longest"]:
        """Split flags of tokens; False for padding."""
        return flags.flatten()[self.tokens] & self.padding.bool()

    def split(self, rows: Float[Tensor, "rows heads length dim"]) -> Float[Tensor, "conversations heads longest dim"]:
        """Split queries, keys or values."""
        flat = rows.transpose(1, 2).flatten(0, 1).index_select(0, self.tokens.flatten())
        return flat.unflatten(0, self.tokens.shape).transpose(1, 2).contiguous()

    def join(self, outputs: Float[Tensor, "conversations longest heads dim"]) -> Float[Tensor, "rows length heads dim"]:
        """Join the outputs of attention to rows."""
        return outputs.flatten(0, 1).index_select(0, self.indices.flatten()).unflatten(0, self.indices.shape)


@dataclass(frozen=True)
class PackedInhibition:
    """The inhibition of a forward pass of packed rows.

    Args:
        conversations: the conversations of the rows.
        inhibition: inhibition of these conversations.
    """

    conversations: PackedConversations
    inhibition: Inhibition

    def to(self, device: Any, non_blocking: bool = False) -> "PackedInhibition":
        """Return the inhibition on another device. accelerate's hooks call it."""
        device = torch.device(device)
        if device == self.conversations.tokens.device:
            return self
        conversations = self.conversations.to(device, non_blocking)
        return replace(self, conversations=conversations, inhibition=self.inhibition.to(device, non_blocking))
