"""An image tower whose blocks compress, within the forward pass of the tower and of each block.

The tower runs up to the layer that LLaVA reads: the block above it is never computed.  Some of its blocks put VMTC
between their attention and their MLP.  All of it happens inside the `forward` of the tower and of the block, so that
whatever is hung on their calls runs as well: FSDP2 gathers weights, accelerate moves inputs, and activations are
recomputed.

`extend` gives a module a subclass of its own class with the same name.  That subclass has a second way through
`forward`, which a keyword asks for; without it, it is transformers' own.  Weights and their names stay the same.

The tower is any ViT of CLIP's or SigLIP's build.  SigLIP has no class token, so there IPS is the attention that a patch
receives from all others.

Shapes: batch, all (patches of this block, with the class token where there is one), fewer (those that leave it), dim.
"""

from functools import cache
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from redux.parallel import head_mesh, join_heads
from redux.reduction import reduce
from redux.settings import VMTC, CompressionStage, Reduction
from redux.vmtc import Fate, compress, importance, received


class Compression(NamedTuple):
    """Compression of one block; first: tokens before the patches, 1 with a class token, else 0."""

    stage: CompressionStage
    vmtc: VMTC
    first: int


class Encoding(NamedTuple):
    """Compression of a tower.

    depth: blocks that are computed.
    first: tokens before the patches, 1 with a class token, else 0.
    compressions: by block.
    reduction: of the patches that leave the last of these blocks.
    """

    depth: int
    first: int
    compressions: dict[int, Compression]
    reduction: Reduction | None


def is_clip_like(tower: nn.Module) -> bool:
    """Tell if the tower's blocks can be run one by one: it is of CLIP's build."""
    blocks: Any = getattr(getattr(tower, "encoder", None), "layers", None)
    parts = ("layer_norm1", "self_attn", "layer_norm2", "mlp")
    return bool(blocks) and all(hasattr(blocks[0], part) for part in parts) and hasattr(blocks[0].self_attn, "q_proj")


class Extended:
    """A mixin for modules of transformers; copied and pickled as such.

    extends: this mixin and the class of transformers.
    own_forward: the forward pass of that class.
    """

    extends: Any
    own_forward: Any

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = object.__reduce_ex__(self, protocol)
        make, args, *state = reduced
        if type(self) is _extension(*self.extends):  # FSDP2 makes a subclass of it in its turn
            make, args = _new, self.extends
        return make, args, *state


@cache
def _extension(mixin: Any, own: Any) -> Any:
    """A subclass of both that bears the name of the second, which transformers, FSDP and accelerate go by."""
    fields = {
        "__module__": own.__module__,
        "__qualname__": own.__qualname__,
        "__doc__": own.__doc__,
        "extends": (mixin, own),
        "own_forward": own.forward,
    }
    return type(own.__name__, (mixin, own), fields)


def _new(mixin: Any, own: Any) -> Any:
    made = _extension(mixin, own)
    return made.__new__(made)


def extend(module: Any, mixin: Any) -> None:
    """Give a module the second way through its forward pass, once."""
    if not isinstance(module, mixin):
        own: Any = type(module)
        module.__class__ = _extension(mixin, own)


class EncodingTower(Extended):
    """Mixin of a tower."""

    def forward(
        self: Any, pixel_values: Any = None, *args: Any, encoding: Encoding | None = None, **kwargs: Any
    ) -> Any:
        """As the tower's own; with `encoding` (tokens, slot, merged): the tokens, and where each patch went (`Fate`).

        The class token goes first, where there is one.
        """
        if encoding is None:
            return self.own_forward(pixel_values, *args, **kwargs)
        first = encoding.first
        hidden = self.embeddings(pixel_values)
        if hasattr(self, "pre_layrnorm"):
            hidden = self.pre_layrnorm(hidden)
        fate = Fate.untouched(hidden.shape[0], hidden.shape[1] - first, hidden.device)
        mask = None
        for number, block in enumerate(self.encoder.layers[: encoding.depth]):
            compression = encoding.compressions.get(number)
            if compression is None:
                hidden = block(hidden, attention_mask=mask)
                continue
            hidden, slot, cluster = block(hidden, attention_mask=mask, compression=compression)
            fate = fate.then(slot, cluster)
            if compression.vmtc.proportional:
                sizes = fate.sizes(hidden.shape[1] - first).to(hidden.dtype)
                mask = F.pad(sizes.log(), (first, 0))[:, None, None]
        if encoding.reduction:
            last = self.encoder.layers[-1](hidden, looked_at=True) if encoding.reduction.method == "prumerge" else None
            classes, patches = hidden.split([first, hidden.shape[1] - first], dim=1)
            patches, slot, cluster = reduce(patches, encoding.reduction, last)
            hidden, fate = torch.cat([classes, patches], dim=1), fate.then(slot, cluster)
        return hidden, *fate


class CompressingBlock(Extended):
    """Mixin of a block."""

    def forward(
        self: Any,
        hidden_states: Float[Tensor, "batch all dim"],
        attention_mask: Float[Tensor, "batch 1 1 all"] | None = None,
        *,
        compression: Compression | None = None,
        looked_at: bool = False,
        **kwargs: Any,
    ) -> Any:
        """As the block's own; with `compression` eq. 1 and 2 with VMTC between attention and MLP.

        With `looked_at` what PruMerge goes by: the class token's query and all keys; nothing else is computed.
        """
        if looked_at:
            return self._last_attention(hidden_states)
        if compression is None:
            return self.own_forward(hidden_states, attention_mask, **kwargs)
        return self._compress(hidden_states, attention_mask, compression)

    def _compress(
        self: Any,
        hidden: Float[Tensor, "batch all dim"],
        mask: Float[Tensor, "batch 1 1 all"] | None,
        compression: Compression,
    ) -> tuple[Float[Tensor, "batch fewer dim"], Int[Tensor, "batch patches"], Bool[Tensor, "batch out"]]:
        """Queries, keys and values are computed once and serve both the attention and the importance score."""
        stage, vmtc, first = compression
        attention = self.self_attn
        normed = self.layer_norm1(hidden)
        query, key, value = (
            project(normed).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
            for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        mesh = head_mesh(attention, query.shape[1])
        dropout = attention.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=dropout, scale=attention.scale
        )
        hidden = hidden + attention.out_proj(mixed.transpose(1, 2).flatten(2))
        bias = None if mask is None else mask[:, 0, 0]
        ips = (
            importance(query[:, :, :1], key, attention.scale, bias, mesh)
            if first
            else received(query, key, attention.scale, bias, mesh)
        )
        similar = None
        if vmtc.similarity == "keys":
            similar = join_heads(key.transpose(1, 2).flatten(2), mesh)[:, first:]
        patches, slot, cluster = compress(hidden[:, first:], ips, stage, vmtc, similar)
        hidden = torch.cat([hidden[:, :first], patches], dim=1)
        return hidden + self.mlp(self.layer_norm2(hidden)), slot, cluster

    def _last_attention(
        self: Any, hidden: Float[Tensor, "batch all dim"]
    ) -> tuple[Float[Tensor, "batch dim"], Float[Tensor, "batch all dim"]]:
        attention = self.self_attn
        normed = self.layer_norm1(hidden)
        query, keys = attention.q_proj(normed[:, 0]), attention.k_proj(normed)
        mesh = head_mesh(attention, keys.shape[-1] // attention.head_dim)
        return join_heads(query, mesh), join_heads(keys, mesh)
