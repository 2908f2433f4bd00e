"""An image tower whose blocks compress, within the forward pass of the tower and of each block.

The tower runs up to the layer that LLaVA reads; blocks above it are never computed. Some blocks put VMTC between their
attention and their MLP. All of it happens inside the `forward` of the tower and of the block, so hooks on these calls
still run: FSDP2 gathers weights, accelerate moves inputs, and activation checkpointing recomputes.

`extend_module` gives a module a subclass of its own class with the same name. A keyword selects the second path
through `forward`; without it, `forward` is transformers' own. Weights and their names stay the same.

The tower is any ViT of CLIP's or SigLIP's build. SigLIP has no class token, so there IPS is the attention that a patch
receives from all other patches.

Shapes: batch, all (patches of this block, and the class token if there is one), fewer (tokens after it), dim.
"""

from functools import cache
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from redux.parallel import head_mesh, join_heads
from redux.precision import without_autocast
from redux.reduction import reduce_tokens, resize_pixels
from redux.settings import VMTC, CompressionStage, Reduction
from redux.vmtc import PatchAssignment, compress_tokens, discount_sinks, importance_score, mean_received_attention


class BlockCompression(NamedTuple):
    """Compression in one block.

    Args:
        stage: tokens kept and clusters made; None keeps all.
        vmtc: settings.
        num_prefix_tokens: tokens before the patches, 1 with a class token, else 0.
    """

    stage: CompressionStage | None
    vmtc: VMTC
    num_prefix_tokens: int


class TowerCompression(NamedTuple):
    """Compression in a whole tower.

    Args:
        num_blocks_used: blocks that are computed.
        num_prefix_tokens: tokens before the patches, 1 with a class token, else 0.
        compressions: compressing blocks by number.
        reduction: reduction of the patches after the last of these blocks, or of the pixels before the first.
        first_token_only: run all modules in the same order on the first token of each image, and compress nothing. For
            their hooks, at a small part of the cost. Not with a reduction, whose gradients need all tokens.
    """

    num_blocks_used: int
    num_prefix_tokens: int
    compressions: dict[int, BlockCompression]
    reduction: Reduction | None
    first_token_only: bool = False


def is_clip_like(tower: nn.Module) -> bool:
    """Return True if the tower has blocks of CLIP's build, so that they can be run one by one."""
    blocks: Any = getattr(getattr(tower, "encoder", None), "layers", None)
    parts = ("layer_norm1", "self_attn", "layer_norm2", "mlp")
    return bool(blocks) and all(hasattr(blocks[0], part) for part in parts) and hasattr(blocks[0].self_attn, "q_proj")


class ExtendedModule:
    """A mixin that adds a second forward pass to a module of transformers.

    Attributes:
        extends: the mixin and the class of transformers; copying and pickling rebuild the subclass from them.
        original_forward: `forward` of the class of transformers.
    """

    extends: Any
    original_forward: Any

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = object.__reduce_ex__(self, protocol)
        constructor, args, *state = reduced
        # pickle cannot import a subclass that was made at run time; a further subclass, made by FSDP2, is left alone.
        if type(self) is _extension_class(*self.extends):
            constructor, args = _new_extended, self.extends
        return constructor, args, *state


@cache
def _extension_class(mixin: Any, original_class: Any) -> Any:
    """Build a subclass of both with the name of the second, by which transformers, FSDP and accelerate choose."""
    fields = {
        "__module__": original_class.__module__,
        "__qualname__": original_class.__qualname__,
        "__doc__": original_class.__doc__,
        "extends": (mixin, original_class),
        "original_forward": original_class.forward,
    }
    return type(original_class.__name__, (mixin, original_class), fields)


def _new_extended(mixin: Any, original_class: Any) -> Any:
    extended = _extension_class(mixin, original_class)
    return extended.__new__(extended)


def extend_module(module: Any, mixin: Any) -> None:
    """Add the mixin's forward pass to a module, unless it has it already."""
    if not isinstance(module, mixin):
        original_class: Any = type(module)
        module.__class__ = _extension_class(mixin, original_class)


class CompressingTower(ExtendedModule):
    """Mixin of the image tower."""

    def forward(
        self: Any,
        pixel_values: Any = None,
        *args: Any,
        tower_compression: TowerCompression | None = None,
        **kwargs: Any,
    ) -> Any:
        """Encode images with compression, or as transformers does if `tower_compression` is None.

        Returns:
            (tokens, token_of_patch, merged): tokens (batch, all, dim), the class token first if there is one; and the
            fields of `PatchAssignment`.
        """
        if tower_compression is None:
            return self.original_forward(pixel_values, *args, **kwargs)
        prefix, reduction = tower_compression.num_prefix_tokens, tower_compression.reduction
        hidden, assignment = self.embed_patches(pixel_values, tower_compression)
        mask = None
        # VMTC: follow each patch through the compressing blocks.
        for number, block in enumerate(self.encoder.layers[: tower_compression.num_blocks_used]):
            compression = tower_compression.compressions.get(number)
            if compression is None:
                hidden = block(hidden, attention_mask=mask)
                continue
            if tower_compression.first_token_only:
                compression = compression._replace(stage=None)
            hidden, token_of_patch, cluster = block(hidden, attention_mask=mask, compression=compression)
            assignment = assignment.then(token_of_patch, cluster)
            if compression.vmtc.proportional:
                # Log size on the scores counts a merged token once for each of its patches (ToMe, eq. 1).
                sizes = assignment.count_patches(hidden.shape[1] - prefix).to(hidden.dtype)
                mask = F.pad(sizes.log(), (prefix, 0))[:, None, None]
        # A baseline: reduce once, after the last block.
        if reduction and reduction.method != "resize":
            class_attention = None
            if reduction.method == "prumerge":
                class_attention = self.encoder.layers[-1](hidden, query_and_keys_only=True)
            class_tokens, patches = hidden.split([prefix, hidden.shape[1] - prefix], dim=1)
            with without_autocast(hidden.device):
                patches, token_of_patch, cluster = reduce_tokens(patches, reduction, class_attention)
            hidden = torch.cat([class_tokens, patches], dim=1)
            assignment = assignment.then(token_of_patch, cluster)
        return hidden, *assignment

    def embed_patches(
        self: Any, pixel_values: Float[Tensor, "batch 3 height width"], compression: TowerCompression
    ) -> tuple[Float[Tensor, "batch all dim"], PatchAssignment]:
        """Embed the patches of the images, or of smaller ones, and assign each patch of the image to its token."""
        resized = None
        # Fewer pixels: the patches of the whole image are followed, although only those of the smaller one exist.
        if compression.reduction is not None and compression.reduction.method == "resize":
            pixel_values, *resized = resize_pixels(pixel_values, compression.reduction, self.embeddings.patch_size)
        hidden = self.embeddings(pixel_values, **({"interpolate_pos_encoding": True} if resized else {}))
        if hasattr(self, "pre_layrnorm"):  # CLIP has this norm, under this name; SigLIP has none
            hidden = self.pre_layrnorm(hidden)
        if compression.first_token_only:
            hidden = hidden[:, :1]
        num_patches = resized[0].shape[1] if resized else hidden.shape[1] - compression.num_prefix_tokens
        assignment = PatchAssignment.untouched(hidden.shape[0], num_patches, hidden.device)
        return hidden, assignment.then(*resized) if resized else assignment


class CompressingBlock(ExtendedModule):
    """Mixin of a transformer block of the tower."""

    def forward(
        self: Any,
        hidden_states: Float[Tensor, "batch all dim"],
        attention_mask: Float[Tensor, "batch 1 1 all"] | None = None,
        *,
        compression: BlockCompression | None = None,
        query_and_keys_only: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Run the block with VMTC, or as transformers does without the two keywords.

        Args:
            hidden_states: tokens, the class token first if there is one.
            attention_mask: values to add to the scores of each key.
            compression: runs eq. 1 and 2 with VMTC between attention and MLP.
            query_and_keys_only: returns the class token's query and all keys, for PruMerge, and computes nothing else.
        """
        if query_and_keys_only:
            return self._class_query_and_keys(hidden_states)
        if compression is None:
            return self.original_forward(hidden_states, attention_mask, **kwargs)
        return self._compress(hidden_states, attention_mask, compression)

    def _compress(
        self: Any,
        hidden: Float[Tensor, "batch all dim"],
        mask: Float[Tensor, "batch 1 1 all"] | None,
        compression: BlockCompression,
    ) -> tuple[Float[Tensor, "batch fewer dim"], Int[Tensor, "batch patches"], Bool[Tensor, "batch out"]]:
        """Run the block with VMTC; queries, keys and values serve both the attention and the importance score."""
        stage, vmtc, prefix = compression
        # Eq. 1: attention.
        attention = self.self_attn
        normed = self.layer_norm1(hidden)
        query, key, value = (
            project(normed).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
            for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        # With tensor parallelism this rank has some of the heads.
        mesh = head_mesh(attention, query.shape[1])
        dropout = attention.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=dropout, scale=attention.scale
        )
        hidden = hidden + attention.out_proj(mixed.transpose(1, 2).flatten(2))
        if stage is None:
            untouched = PatchAssignment.untouched(hidden.shape[0], hidden.shape[1] - prefix, hidden.device)
            return hidden + self.mlp(self.layer_norm2(hidden)), *untouched
        # Eq. 5-8: the importance score, from the class token or, without one, from all patches.
        bias = None if mask is None else mask[:, 0, 0]
        if prefix:
            ips = importance_score(query[:, :, :1], key, attention.scale, bias, mesh)
        else:
            ips = mean_received_attention(query, key, attention.scale, bias, mesh)
        ips = discount_sinks(hidden[:, prefix:], ips, vmtc.sink_norm)
        cluster_features = None
        if vmtc.similarity == "keys":
            cluster_features = join_heads(key.transpose(1, 2).flatten(2), mesh)[:, prefix:]
        with without_autocast(hidden.device):
            patches, token_of_patch, cluster = compress_tokens(hidden[:, prefix:], ips, stage, vmtc, cluster_features)
        hidden = torch.cat([hidden[:, :prefix], patches], dim=1)
        # Eq. 2: the MLP, on fewer tokens.
        return hidden + self.mlp(self.layer_norm2(hidden)), token_of_patch, cluster

    def _class_query_and_keys(
        self: Any, hidden: Float[Tensor, "batch all dim"]
    ) -> tuple[Float[Tensor, "batch dim"], Float[Tensor, "batch all dim"]]:
        """Compute the class token's query and all keys, the heads of all ranks side by side."""
        attention = self.self_attn
        normed = self.layer_norm1(hidden)
        query, keys = attention.q_proj(normed[:, 0]), attention.k_proj(normed)
        mesh = head_mesh(attention, keys.shape[-1] // attention.head_dim)
        return join_heads(query, mesh), join_heads(keys, mesh)
