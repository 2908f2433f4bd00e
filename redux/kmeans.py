"""Batched spherical K-means for the redundant tokens of VMTC.

The paper clusters "based on cosine similarity" and says nothing of seeds, iterations or empty clusters. Nothing here
is random, since recomputed activations and resumed runs must give the same clusters. Nothing here reads a value on the
host, since the GPU would wait: the number of iterations is fixed, and index arithmetic refills empty clusters. The
result has exactly c clusters, none of them empty, so that shapes are static.

Cost: 2 iterations + 1 products of (tokens x dim) by (dim x clusters) for each image, a small part of one ViT block, in
about 20 small launches an iteration. `redux.kernels.kmeans` takes two launches for all.

Shapes: batch, tokens, dim; clusters = c.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from redux.kernels import use_fused
from redux.settings import KMeansSeeds

MAX_FUSED_TOKENS, MAX_FUSED_CLUSTERS = 4096, 128  # Limits of the registers of a multiprocessor


@torch.no_grad()
def kmeans(
    tokens: Float[Tensor, "batch tokens dim"], clusters: int, iterations: int, seeds: KMeansSeeds = "strided"
) -> Int[Tensor, "batch tokens"]:
    """Compute the cluster number of each token. Every cluster in 0..clusters-1 has at least one token.

    Args:
        tokens: vectors to cluster.
        clusters: number of clusters, c.
        iterations: updates of the centroids.
        seeds: tokens that are the first centroids. "strided" takes them at equal strides of the tokens' order; VMTC
            sorts tokens by falling importance, so the seeds span it. "farthest" takes the first token, then repeatedly
            the one least similar to all seeds so far. "random" takes the same positions in every call, from seed 0.

    Raises:
        ValueError: there are fewer tokens than clusters.

    >>> tokens = torch.tensor([[[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9], [-1.0, 0.1], [-1.0, 0.0]]])
    >>> kmeans(tokens, clusters=3, iterations=5)
    tensor([[0, 0, 1, 1, 2, 2]])
    """
    count = tokens.shape[1]
    if not 1 <= clusters <= count:
        raise ValueError(f"clusters: got {clusters}, allowed: 1 to {count}, the number of tokens to cluster")
    if use_fused("K-means", tokens.device, unsupported_clustering(tokens, clusters)):
        from redux.kernels.kmeans import cluster_tokens

        return cluster_tokens(tokens, None, clusters, iterations, seeds)
    unit = F.normalize(tokens.float(), dim=-1)
    centroids = unit.gather(1, _choose_seeds(unit, clusters, seeds).unsqueeze(-1).expand(-1, -1, unit.shape[-1]))
    numbers = torch.arange(clusters, device=unit.device)
    for _ in range(iterations):
        label = _assign_clusters(unit, centroids, numbers)
        members = (label.unsqueeze(-1) == numbers).to(unit.dtype)
        centroids = F.normalize(members.transpose(1, 2) @ unit, dim=-1)
    return _assign_clusters(unit, centroids, numbers)


def unsupported_clustering(tokens: Float[Tensor, "batch tokens dim"], clusters: int) -> str:
    """Return why no kernel can cluster some or all of these tokens, or ""."""
    if tokens.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"tokens are {tokens.dtype}"
    if tokens.stride(-1) != 1:
        return "the last dimension is not contiguous"
    if tokens.shape[1] > MAX_FUSED_TOKENS or clusters > MAX_FUSED_CLUSTERS:
        return f"there are more than {MAX_FUSED_TOKENS} tokens or {MAX_FUSED_CLUSTERS} clusters"
    return ""


def _choose_seeds(
    unit: Float[Tensor, "batch tokens dim"], clusters: int, seeds: KMeansSeeds
) -> Int[Tensor, "batch clusters"]:
    """Choose the positions of the first centroids."""
    batch, count, _ = unit.shape
    if seeds == "farthest":
        chosen = torch.zeros(batch, 1, dtype=torch.long, device=unit.device)
        similarity = torch.full((batch, count), -torch.inf, device=unit.device)
        for _ in range(clusters - 1):
            last = unit.gather(1, chosen[:, -1:, None].expand(-1, -1, unit.shape[-1]))
            similarity = torch.maximum(similarity, (unit @ last.transpose(1, 2)).squeeze(-1))
            # Infinity: a chosen token is never chosen again, and its equals come last.
            similarity = similarity.scatter(1, chosen[:, -1:], torch.inf)
            chosen = torch.cat([chosen, similarity.argmin(dim=1, keepdim=True)], dim=1)
        return chosen
    if seeds == "random":
        positions = torch.randperm(count, generator=torch.Generator().manual_seed(0))[:clusters].to(unit.device)
    else:
        positions = torch.arange(clusters, device=unit.device) * count // clusters
    return positions.expand(batch, -1)


def _assign_clusters(
    unit: Float[Tensor, "batch tokens dim"],
    centroids: Float[Tensor, "batch clusters dim"],
    numbers: Int[Tensor, "clusters"],
) -> Int[Tensor, "batch tokens"]:
    """Assign each token to its nearest centroid, then move one distant token into each empty cluster.

    The best token of every other cluster stays, so that moving empties no cluster. There are enough other tokens,
    since tokens >= clusters.
    """
    similarity, nearest = (unit @ centroids.transpose(1, 2)).max(dim=-1)
    # Equal tokens (a constant image) tie everywhere: max takes the first, stable sort keeps their order.
    highest, best = similarity.unsqueeze(-1).masked_fill(nearest.unsqueeze(-1) != numbers, -torch.inf).max(dim=1)
    empty = highest == -torch.inf
    # The best token of each cluster is anchored at infinity; the least similar of the others may move.
    anchors = highest.masked_fill(~empty, torch.inf)
    movable = similarity.scatter_reduce(1, best, anchors, "amax").argsort(dim=1, stable=True)
    refill = (empty.cumsum(dim=1) - 1).clamp_min(0)
    # A cluster that is not empty assigns its own best token to itself again.
    source = torch.where(empty, movable.gather(1, refill), best)
    return nearest.scatter(1, source, numbers.expand_as(source))
