"""Visual-Modality Token Compression: eq. 5-8 of the paper.

Between the self-attention and the MLP of a few equally spaced ViT blocks, the k patch tokens to which the class token
attends most are kept, the others are clustered and each cluster is merged into one token.  Only the class token's row
of the attention weights is needed, so the block keeps scaled-dot-product attention for everything else and never forms
the (tokens x tokens) map.

Where the paper is silent `VMTC` has an option, and its defaults are: the budget falls geometrically over the stages
(as EViT's constant keep rate), a sixth of a stage's output tokens are clusters, and tokens go on in the order of their
place in the image.  Merge weights are normalised within a cluster by default; `weights="raw"` is eq. 7 as printed,
where a merged token is some hundred times smaller than one that was kept.

Shapes: batch, patches (patch tokens of this block, class token apart), out = k + c, dim.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from redux.kmeans import kmeans
from redux.parallel import mean_over_ranks
from redux.settings import VMTC, CompressionStage


def importance(
    query: Float[Tensor, "batch heads 1 head_dim"],
    keys: Float[Tensor, "batch heads tokens head_dim"],
    scale: float,
    bias: Float[Tensor, "batch tokens"] | None = None,
    mesh: Any = None,
) -> Float[Tensor, "batch tokens-1"]:
    """IPS: attention weight from the class token to each patch token, mean over heads.

    The softmax runs over all tokens = patches + 1 keys; the class token's weight on itself is left out afterwards.
    It is taken in float32: in bfloat16 most scores would tie.
    bias: added to the scores of each key, if the block's attention does so as well.
    mesh: of the ranks that share the heads, see `redux.parallel`.
    """
    scores = query @ keys.transpose(-1, -2) * scale
    if bias is not None:
        scores = scores + bias[:, None, None]
    mean = scores.softmax(dim=-1, dtype=torch.float32).mean(dim=1)[:, 0, 1:]
    return mean_over_ranks(mean, mesh)


def received(
    query: Float[Tensor, "batch heads tokens head_dim"],
    keys: Float[Tensor, "batch heads tokens head_dim"],
    scale: float,
    bias: Float[Tensor, "batch tokens"] | None = None,
    mesh: Any = None,
) -> Float[Tensor, "batch tokens"]:
    """In place of IPS where a tower has no class token (SigLIP): attention weight that each patch token receives from
    all patch tokens, mean over them and over heads.  One head's map is alive at a time.
    """
    total = query.new_zeros(query.shape[0], query.shape[2], dtype=torch.float32)
    for head in range(query.shape[1]):
        scores = query[:, head] @ keys[:, head].transpose(1, 2) * scale
        scores = scores if bias is None else scores + bias[:, None]
        total = total + scores.softmax(dim=-1, dtype=torch.float32).mean(dim=1)
    return mean_over_ranks(total / query.shape[1], mesh)


def compress(
    tokens: Float[Tensor, "batch patches dim"],
    ips: Float[Tensor, "batch patches"],
    stage: CompressionStage,
    vmtc: VMTC,
    similar: Float[Tensor, "batch patches width"] | None = None,
) -> tuple[Float[Tensor, "batch out dim"], Int[Tensor, "batch patches"], Bool[Tensor, "batch out"]]:
    """Eq. 5-8 without the class token: (tokens', slot, cluster).

    similar: what clusters are made by, if not the tokens.
    slot[p] is the output token that holds input token p, -1 if it was dropped; cluster[o] tells whether output token o
    is a merged cluster.  Which token goes where is a hard choice without gradient; the merge weights carry one.

    Six tokens, of which the two most important are kept and the other four become two clusters:

    >>> tokens = torch.tensor([[[1.0, 0.0], [2.0, 0.0], [0.0, 1.0], [0.0, 3.0], [5.0, 5.0], [9.0, 1.0]]])
    >>> ips = torch.tensor([[0.1, 0.1, 0.1, 0.3, 0.25, 0.05]])
    >>> merged, slot, cluster = compress(tokens, ips, CompressionStage(0, kept=2, clusters=2), VMTC(order="rank"))
    >>> merged  # token 3, token 4, and by weight tokens 0, 1 and 5, (0.1 * 1 + 0.1 * 2 + 0.05 * 9) / 0.25; and token 2
    tensor([[[0.0000, 3.0000],
             [5.0000, 5.0000],
             [3.0000, 0.2000],
             [0.0000, 1.0000]]])
    >>> slot
    tensor([[2, 2, 3, 0, 1, 2]])
    """
    ranked = ips.argsort(dim=-1, descending=True, stable=True)
    kept, redundant = ranked.split([stage.kept, tokens.shape[1] - stage.kept], dim=-1)  # eq. 5, 6
    parts, slot = [_take(tokens, kept)], torch.full_like(ranked, -1)
    slot.scatter_(1, kept, torch.arange(stage.kept, device=tokens.device).expand_as(kept))
    if stage.clusters:
        rest, weight = _take(tokens, redundant), ips.gather(1, redundant)
        alike = rest if similar is None else _take(similar, redundant)
        label = kmeans(alike, stage.clusters, vmtc.iterations, vmtc.seeds)
        members = F.one_hot(label, stage.clusters).to(weight.dtype) * weight.unsqueeze(-1)
        if vmtc.weights != "raw":
            total = members.sum(dim=1 if vmtc.weights == "normalized" else (1, 2), keepdim=True)
            members = members / total.clamp_min(torch.finfo(weight.dtype).tiny)
        parts.append((members.transpose(1, 2) @ rest.to(weight.dtype)).to(tokens.dtype))  # eq. 7
        slot.scatter_(1, redundant, label + stage.kept)
    merged = torch.cat(parts, dim=1)  # eq. 8
    cluster = (torch.arange(merged.shape[1], device=tokens.device) >= stage.kept).expand(merged.shape[:2])
    return _by_place(merged, slot, cluster) if vmtc.order == "spatial" else (merged, slot, cluster)


def _take(
    tokens: Float[Tensor, "batch patches dim"], index: Int[Tensor, "batch some"]
) -> Float[Tensor, "batch some dim"]:
    return tokens.gather(1, index.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


def _by_place(
    tokens: Float[Tensor, "batch out dim"], slot: Int[Tensor, "batch patches"], cluster: Bool[Tensor, "batch out"]
) -> tuple[Float[Tensor, "batch out dim"], Int[Tensor, "batch patches"], Bool[Tensor, "batch out"]]:
    """Reorder output tokens by the first input token each of them holds."""
    patches, out = slot.shape[1], tokens.shape[1]
    place = torch.arange(patches, device=slot.device).expand_as(slot)
    # dropped tokens (slot -1) write into a column of their own, cut off afterwards
    column = torch.where(slot < 0, out, slot)
    first = slot.new_full((slot.shape[0], out + 1), patches).scatter_reduce(1, column, place, "amin")[:, :out]
    by_place = first.argsort(dim=1, stable=True)
    rank = by_place.argsort(dim=1)
    moved = torch.where(slot < 0, slot, rank.gather(1, slot.clamp_min(0)))
    return _take(tokens, by_place), moved, cluster.gather(1, by_place)


class Fate(NamedTuple):
    """Where each patch of an image went, over all stages.

    slot[b, p]: the visual token that holds patch p, -1 if it was dropped on the way.
    merged[b, p]: whether patch p was merged into a cluster at any stage.
    """

    slot: Int[Tensor, "batch patches"]
    merged: Bool[Tensor, "batch patches"]

    @classmethod
    def untouched(cls, batch: int, patches: int, device: torch.device) -> "Fate":
        """Every patch is its own token."""
        slot = torch.arange(patches, device=device).expand(batch, patches)
        return cls(slot, torch.zeros_like(slot, dtype=torch.bool))

    def sizes(self, tokens: int) -> Int[Tensor, "batch tokens"]:
        """How many patches each of the tokens holds."""
        column = torch.where(self.slot < 0, tokens, self.slot)
        counts = column.new_zeros(column.shape[0], tokens + 1)
        return counts.scatter_add(1, column, torch.ones_like(column))[:, :tokens]

    def then(self, slot: Int[Tensor, "batch tokens"], cluster: Bool[Tensor, "batch out"]) -> "Fate":
        """Follow the patches through one more `compress`, to the device where that was."""
        before, merged = self.slot.to(slot.device), self.merged.to(slot.device)
        now = torch.where(before >= 0, slot.gather(1, before.clamp_min(0)), -1)
        in_cluster = cluster.gather(1, now.clamp_min(0)) & (now >= 0)
        return Fate(now, merged | in_cluster)
