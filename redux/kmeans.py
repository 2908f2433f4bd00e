"""Batched spherical K-means for the redundant tokens of VMTC.

The paper clusters "based on cosine similarity" and says nothing of seeds, iterations or empty clusters.  Training must
give the same clusters again when activations are recomputed or a run resumes, so nothing here is random; a GPU must not
wait for the host, so nothing here looks at a value: the number of iterations is fixed and empty clusters are refilled
by index arithmetic.  Exactly c clusters come out, none empty, so that shapes stay static.

Cost: 2 iterations + 1 products of (tokens x dim) by (dim x clusters) for each image, a small part of one ViT block.

Shapes: batch, tokens, dim; clusters = c.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from redux.settings import KMeansSeeds


@torch.no_grad()
def kmeans(
    tokens: Float[Tensor, "batch tokens dim"], clusters: int, iterations: int, seeds: KMeansSeeds = "strided"
) -> Int[Tensor, "batch tokens"]:
    """Cluster number of each token.  Every cluster in 0..clusters-1 holds at least one token.

    seeds: which tokens the centroids start from.  "strided" takes them at equal strides of the order in which the
        tokens arrive; VMTC hands them over by falling importance, so the seeds span it.  "farthest" takes the first
        token, then again and again the one least like all seeds before it; "random" takes always the same places,
        drawn once from seed 0.
    Raises ValueError where there are fewer tokens than clusters.

    >>> tokens = torch.tensor([[[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9], [-1.0, 0.1], [-1.0, 0.0]]])
    >>> kmeans(tokens, clusters=3, iterations=5)
    tensor([[0, 0, 1, 1, 2, 2]])
    """
    count = tokens.shape[1]
    if not 1 <= clusters <= count:
        raise ValueError(f"clusters: got {clusters}, allowed: 1 to {count}, the number of tokens to cluster")
    unit = F.normalize(tokens.float(), dim=-1)
    centroids = unit.gather(1, _choose_seeds(unit, clusters, seeds).unsqueeze(-1).expand(-1, -1, unit.shape[-1]))
    for _ in range(iterations):
        members = F.one_hot(_assign_clusters(unit, centroids), clusters).to(unit.dtype)
        centroids = F.normalize(members.transpose(1, 2) @ unit, dim=-1)
    return _assign_clusters(unit, centroids)


def _choose_seeds(
    unit: Float[Tensor, "batch tokens dim"], clusters: int, seeds: KMeansSeeds
) -> Int[Tensor, "batch clusters"]:
    batch, count, _ = unit.shape
    if seeds == "farthest":
        chosen = torch.zeros(batch, 1, dtype=torch.long, device=unit.device)
        likeness = torch.full((batch, count), -torch.inf, device=unit.device)
        for _ in range(clusters - 1):
            last = unit.gather(1, chosen[:, -1:, None].expand(-1, -1, unit.shape[-1]))
            # a token chosen once, or equal to one that was, is the last to be chosen
            likeness = torch.maximum(likeness, (unit @ last.transpose(1, 2)).squeeze(-1))
            likeness = likeness.scatter(1, chosen[:, -1:], torch.inf)
            chosen = torch.cat([chosen, likeness.argmin(dim=1, keepdim=True)], dim=1)
        return chosen
    if seeds == "random":
        places = torch.randperm(count, generator=torch.Generator().manual_seed(0))[:clusters].to(unit.device)
    else:
        places = torch.arange(clusters, device=unit.device) * count // clusters
    return places.expand(batch, -1)


def _assign_clusters(
    unit: Float[Tensor, "batch tokens dim"], centroids: Float[Tensor, "batch clusters dim"]
) -> Int[Tensor, "batch tokens"]:
    """Nearest centroid of each token, then one ill-fitting token moved into each cluster left empty.

    The best token of every cluster that has any stays where it is, so moving never empties a cluster; there are always
    enough others, since tokens >= clusters.
    """
    clusters = centroids.shape[1]
    fit, nearest = (unit @ centroids.transpose(1, 2)).max(dim=-1)
    members = F.one_hot(nearest, clusters).bool()
    empty = ~members.any(dim=1)
    # equal tokens (a constant image) tie everywhere: argmax takes the first, stable sort keeps their order
    best = fit.unsqueeze(-1).masked_fill(~members, -torch.inf).argmax(dim=1)
    anchored = torch.zeros_like(empty, dtype=torch.long).new_zeros(fit.shape)
    anchored.scatter_add_(1, best, (~empty).long())
    movable = fit.masked_fill(anchored > 0, torch.inf).argsort(dim=1, stable=True)
    refill = (empty.cumsum(dim=1) - 1).clamp_min(0)
    moved = movable.gather(1, refill)
    target = torch.arange(clusters, device=unit.device).expand_as(moved)
    # a cluster that is not empty writes its own best token back to itself
    source = torch.where(empty, moved, best)
    return nearest.scatter(1, source, target)
