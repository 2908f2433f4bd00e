"""Visual-Modality Token Compression: eq. 5-8 of the paper.

Between the self-attention and the MLP of a few equally spaced ViT blocks, the k patch tokens to which the class token
attends most are kept, the others are clustered and each cluster is merged into one token. Only the class token's row
of the attention weights is needed, so the block keeps scaled-dot-product attention for everything else and never forms
the (tokens x tokens) map.

`VMTC` has an option wherever the paper leaves something open. By default the budget falls geometrically over the
blocks (as EViT's constant keep rate), a sixth of a block's output tokens are clusters, and output tokens keep the order
of the image. Merge weights are normalised within a cluster; `weights="raw"` is eq. 7 as printed, where a merged token
is about a hundred times smaller than a kept one.

Shapes: batch, patches (patch tokens of this block, without the class token), out = k + c, dim.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from redux.kernels import use_fused
from redux.kmeans import MAX_FUSED_TOKENS, kmeans, unsupported_clustering
from redux.parallel import mean_over_ranks
from redux.settings import VMTC, CompressionStage

SINK_FACTOR = 1e-6
"""Factor of an attention sink's importance: below any other patch's, and not zero, because merge weights need a sum."""


def importance_score(
    query: Float[Tensor, "batch heads 1 head_dim"],
    keys: Float[Tensor, "batch heads tokens head_dim"],
    scale: float,
    bias: Float[Tensor, "batch tokens"] | None = None,
    mesh: Any = None,
) -> Float[Tensor, "batch tokens-1"]:
    """IPS (eq. 5): attention weight from the class token to each patch token, mean over heads.

    The softmax runs over tokens = patches + 1 keys; the class token's weight on itself is dropped afterwards. It is
    computed in float32, since most scores would tie in bfloat16.

    Args:
        query: query of the class token.
        keys: keys of all tokens, the class token first.
        scale: factor of the scores, 1 / sqrt(head_dim).
        bias: values to add to the scores of each key, as the block's attention does.
        mesh: ranks that share the heads, see `redux.parallel`.
    """
    if use_fused("importance score", keys.device, _unsupported_scores(query, keys, bias)):
        from redux.kernels.importance import score_importance

        return mean_over_ranks(score_importance(query, keys, scale, bias), mesh)
    scores = query @ keys.transpose(-1, -2) * scale
    if bias is not None:
        scores = scores + bias[:, None, None]
    mean = scores.softmax(dim=-1, dtype=torch.float32).mean(dim=1)[:, 0, 1:]
    return mean_over_ranks(mean, mesh)


def _unsupported_scores(query: Tensor, keys: Tensor, bias: Tensor | None) -> str:
    """Return why no kernel can compute the importance score of these tensors, or ""."""
    if any(values.dtype not in (torch.float32, torch.bfloat16, torch.float16) for values in (query, keys)):
        return f"keys are {keys.dtype}"
    if bias is not None and bias.requires_grad:
        return "the bias has a gradient"
    return "" if keys.shape[2] <= MAX_FUSED_TOKENS else f"there are more than {MAX_FUSED_TOKENS} tokens"


def mean_received_attention(
    query: Float[Tensor, "batch heads tokens head_dim"],
    keys: Float[Tensor, "batch heads tokens head_dim"],
    scale: float,
    bias: Float[Tensor, "batch tokens"] | None = None,
    mesh: Any = None,
) -> Float[Tensor, "batch tokens"]:
    """IPS for a tower without a class token (SigLIP): attention weight that each patch receives, mean over all patches.

    The mean also runs over heads. One head's (tokens x tokens) map is in memory at a time. Arguments are those of
    `importance_score`.
    """
    total = query.new_zeros(query.shape[0], query.shape[2], dtype=torch.float32)
    # Head by head: the maps of all heads would be the largest tensors of the tower.
    for head in range(query.shape[1]):
        scores = query[:, head] @ keys[:, head].transpose(1, 2) * scale
        scores = scores if bias is None else scores + bias[:, None]
        total = total + scores.softmax(dim=-1, dtype=torch.float32).mean(dim=1)
    return mean_over_ranks(total / query.shape[1], mesh)


def discount_sinks(
    tokens: Float[Tensor, "batch patches dim"], ips: Float[Tensor, "batch patches"], sink_norm: float | None
) -> Float[Tensor, "batch patches"]:
    """Count the importance of attention sinks a millionth.

    Some patches of large ViTs hold little of the image, have a far larger norm than the others, and draw the attention
    of the class token (Darcet et al. 2024, arXiv 2309.16588). Without this, they survive as primary tokens.

    Args:
        tokens: patch tokens z' of the block, without the class token.
        ips: importance score of each.
        sink_norm: a patch is a sink if its norm exceeds sink_norm × the median norm of its image; None has no sinks.

    >>> tokens = torch.tensor([[[1.0], [-2.0], [9.0]]])
    >>> discount_sinks(tokens, torch.tensor([[0.1, 0.2, 0.6]]), 3.0).tolist()[0] == [
    ...     float(torch.tensor(value)) for value in (0.1, 0.2, 0.6e-6)
    ... ]
    True
    """
    if sink_norm is None:
        return ips
    norm = tokens.detach().float().norm(dim=-1)
    is_sink = norm > sink_norm * norm.median(dim=-1, keepdim=True).values
    return ips.where(~is_sink, ips * SINK_FACTOR)


def compress_tokens(
    tokens: Float[Tensor, "batch patches dim"],
    ips: Float[Tensor, "batch patches"],
    stage: CompressionStage,
    vmtc: VMTC,
    cluster_features: Float[Tensor, "batch patches width"] | None = None,
) -> tuple[Float[Tensor, "batch out dim"], Int[Tensor, "batch patches"], Bool[Tensor, "batch out"]]:
    """Compress patch tokens by eq. 5-8.

    The choice of tokens and clusters has no gradient; the merge weights have one.

    Args:
        tokens: patch tokens, without the class token.
        ips: importance score of each.
        stage: numbers of kept tokens (k) and clusters (c) of the block.
        vmtc: settings.
        cluster_features: vectors for K-means; None takes the tokens.

    Returns:
        (tokens', token_of_patch, cluster). token_of_patch[b, p] is the output token that holds input token p, -1 if p
        was dropped. cluster[b, o] is True if output token o is a merged cluster.

    Six tokens: the two most important are kept, the other four become two clusters.

    >>> tokens = torch.tensor([[[1.0, 0.0], [2.0, 0.0], [0.0, 1.0], [0.0, 3.0], [5.0, 5.0], [9.0, 1.0]]])
    >>> ips = torch.tensor([[0.1, 0.1, 0.1, 0.3, 0.25, 0.05]])
    >>> stage = CompressionStage(0, kept=2, clusters=2)
    >>> merged, token_of_patch, cluster = compress_tokens(tokens, ips, stage, VMTC(order="rank"))
    >>> merged  # token 3, token 4, and by weight tokens 0, 1 and 5, (0.1 * 1 + 0.1 * 2 + 0.05 * 9) / 0.25; and token 2
    tensor([[[0.0000, 3.0000],
             [5.0000, 5.0000],
             [3.0000, 0.2000],
             [0.0000, 1.0000]]])
    >>> token_of_patch
    tensor([[2, 2, 3, 0, 1, 2]])
    """
    ranked = ips.argsort(dim=-1, descending=True, stable=True)
    if use_fused("token compression", tokens.device, _unsupported(tokens, ips, stage, cluster_features)):
        return _compress_fused(tokens, ips, ranked, stage, vmtc, cluster_features)
    # Fixed numbers for every image, so that shapes are static and the host never waits.
    kept, redundant = ranked.split([stage.kept, tokens.shape[1] - stage.kept], dim=-1)  # Eq. 5, 6
    parts = [_gather_tokens(tokens, kept)]
    token_of_patch = torch.full_like(ranked, -1)
    token_of_patch.scatter_(1, kept, torch.arange(stage.kept, device=tokens.device).expand_as(kept))
    if stage.clusters:
        # Redundant tokens come by falling importance, the order in which K-means takes its seeds.
        redundant_tokens = _gather_tokens(tokens, redundant)
        weight = ips.gather(1, redundant)
        features = redundant_tokens if cluster_features is None else _gather_tokens(cluster_features, redundant)
        label = kmeans(features, stage.clusters, vmtc.iterations, vmtc.seeds)
        # members[b, t, c]: merge weight of redundant token t in cluster c.
        is_member = label.unsqueeze(-1) == torch.arange(stage.clusters, device=label.device)
        members = weight.unsqueeze(-1) * is_member
        if vmtc.weights != "raw":
            total = members.sum(dim=1 if vmtc.weights == "normalized" else (1, 2), keepdim=True)
            members = members / total.clamp_min(torch.finfo(weight.dtype).tiny)
        parts.append((members.transpose(1, 2) @ redundant_tokens.to(weight.dtype)).to(tokens.dtype))  # Eq. 7
        token_of_patch.scatter_(1, redundant, label + stage.kept)
    merged = torch.cat(parts, dim=1)  # Eq. 8
    cluster = (torch.arange(merged.shape[1], device=tokens.device) >= stage.kept).expand(merged.shape[:2])
    return (
        _sort_by_position(merged, token_of_patch, cluster)
        if vmtc.order == "spatial"
        else (merged, token_of_patch, cluster)
    )


def _unsupported(
    tokens: Float[Tensor, "batch patches dim"],
    ips: Float[Tensor, "batch patches"],
    stage: CompressionStage,
    cluster_features: Float[Tensor, "batch patches width"] | None,
) -> str:
    """Return why no kernel can compress these tokens, or ""."""
    if ips.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"importance is {ips.dtype}"
    # The tokens themselves are merged with the same restrictions.
    features = tokens if cluster_features is None else cluster_features
    return unsupported_clustering(tokens, 0) or unsupported_clustering(features, stage.clusters)


def _compress_fused(
    tokens: Float[Tensor, "batch patches dim"],
    ips: Float[Tensor, "batch patches"],
    ranked: Int[Tensor, "batch patches"],
    stage: CompressionStage,
    vmtc: VMTC,
    cluster_features: Float[Tensor, "batch patches width"] | None,
) -> tuple[Float[Tensor, "batch out dim"], Int[Tensor, "batch patches"], Bool[Tensor, "batch out"]]:
    from redux.kernels.compression import merge_tokens
    from redux.kernels.kmeans import cluster_tokens

    label = None
    if stage.clusters:
        features, redundant = tokens if cluster_features is None else cluster_features, ranked[:, stage.kept :]
        label = cluster_tokens(features, redundant, stage.clusters, vmtc.iterations, vmtc.seeds)
    return merge_tokens(tokens, ips, ranked, label, stage, vmtc)


def _gather_tokens(
    tokens: Float[Tensor, "batch patches dim"], index: Int[Tensor, "batch some"]
) -> Float[Tensor, "batch some dim"]:
    return tokens.gather(1, index.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


def _sort_by_position(
    tokens: Float[Tensor, "batch out dim"],
    token_of_patch: Int[Tensor, "batch patches"],
    cluster: Bool[Tensor, "batch out"],
) -> tuple[Float[Tensor, "batch out dim"], Int[Tensor, "batch patches"], Bool[Tensor, "batch out"]]:
    """Sort output tokens by the first input token that each of them holds."""
    patches, out = token_of_patch.shape[1], tokens.shape[1]
    position = torch.arange(patches, device=token_of_patch.device).expand_as(token_of_patch)
    # Dropped tokens (token_of_patch -1) write into an extra column, which is cut off afterwards.
    column = torch.where(token_of_patch < 0, out, token_of_patch)
    first = token_of_patch.new_full((token_of_patch.shape[0], out + 1), patches).scatter_reduce(
        1, column, position, "amin"
    )[:, :out]
    order = first.argsort(dim=1, stable=True)
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(out, device=token_of_patch.device).expand_as(order))
    moved = torch.where(token_of_patch < 0, token_of_patch, rank.gather(1, token_of_patch.clamp_min(0)))
    return _gather_tokens(tokens, order), moved, cluster.gather(1, order)


class PatchAssignment(NamedTuple):
    """The visual token that holds each patch of an image, after all compressing blocks.

    Args:
        token_of_patch: token_of_patch[b, p] is the visual token that holds patch p, -1 if a block dropped p.
        merged: merged[b, p] is True if any block merged patch p into a cluster.
    """

    token_of_patch: Int[Tensor, "batch patches"]
    merged: Bool[Tensor, "batch patches"]

    @classmethod
    def untouched(cls, batch: int, patches: int, device: torch.device) -> "PatchAssignment":
        """Build the assignment before compression: every patch is its own token."""
        token_of_patch = torch.arange(patches, device=device).expand(batch, patches)
        return cls(token_of_patch, torch.zeros_like(token_of_patch, dtype=torch.bool))

    def count_patches(self, tokens: int) -> Int[Tensor, "batch tokens"]:
        """Count the patches that each of the tokens holds."""
        column = torch.where(self.token_of_patch < 0, tokens, self.token_of_patch)
        counts = column.new_zeros(column.shape[0], tokens + 1)
        return counts.scatter_add(1, column, torch.ones_like(column))[:, :tokens]

    def then(
        self, token_of_patch: Int[Tensor, "batch tokens"], cluster: Bool[Tensor, "batch out"]
    ) -> "PatchAssignment":
        """Follow the patches through one more `compress_tokens`, whose results these are."""
        # Blocks of one tower may lie on several devices; the result lies where the last of them is.
        previous, merged = self.token_of_patch.to(token_of_patch.device), self.merged.to(token_of_patch.device)
        if use_fused("patch assignment", token_of_patch.device):
            from redux.kernels.compression import follow_patches

            return PatchAssignment(*follow_patches(previous, merged, token_of_patch, cluster))
        current = torch.where(previous >= 0, token_of_patch.gather(1, previous.clamp_min(0)), -1)
        in_cluster = cluster.gather(1, current.clamp_min(0)) & (current >= 0)
        return PatchAssignment(current, merged | in_cluster)
