"""Visual-Modality Token Compression: eq. 5-8 of the paper.

Between the self-attention and the MLP of a few equally spaced ViT blocks, the k patch tokens to which the class token
attends most are kept, the others are clustered and each cluster is merged into one token.  Only the class token's row
of the attention weights is needed, so the block keeps scaled-dot-product attention for everything else and never forms
the (tokens x tokens) map.

Where the paper is silent: the budget falls geometrically over the stages (as EViT's constant keep rate), a sixth of a
stage's output tokens are clusters, and tokens go on in the order of their place in the image.  Merge weights are
normalised within a cluster by default; `merge="raw"` is eq. 7 as printed.

Shapes: batch, patches (patch tokens of this block, class token apart), out = k + c, dim.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from redux.kmeans import kmeans


class Stage(NamedTuple):
    """What one compressing block does: patch tokens kept (k) and clusters made of the rest (c)."""

    block: int
    kept: int
    clusters: int


@dataclass(frozen=True, kw_only=True)
class VMTC:
    """Settings of the compression.

    ratio: share of the patch tokens removed in total, 0 <= ratio < 1.
    stages: number of compressing blocks, equally spaced over the blocks in use.
    cluster_share: share of a stage's output tokens that are merged clusters; 0 drops the redundant tokens.
    merge: weights within a cluster; "raw" sums IPS(j) z_j as eq. 7 prints it, "normalized" divides by their sum.
    order: "spatial" keeps tokens in the order of their place in the image, "rank" is eq. 8, by importance.
    iterations: of K-means.
    """

    ratio: float = 0.5
    stages: int = 3
    cluster_share: float = 1 / 6
    merge: Literal["normalized", "raw"] = "normalized"
    order: Literal["spatial", "rank"] = "spatial"
    iterations: int = 10

    def __post_init__(self) -> None:
        for name, allowed, fits in (
            ("ratio", "0 <= ratio < 1", 0 <= self.ratio < 1),
            ("stages", "at least 1", self.stages >= 1),
            ("cluster_share", "0 <= cluster_share <= 1", 0 <= self.cluster_share <= 1),
            ("iterations", "at least 1", self.iterations >= 1),
            ("merge", "'normalized' or 'raw'", self.merge in ("normalized", "raw")),
            ("order", "'spatial' or 'rank'", self.order in ("spatial", "rank")),
        ):
            if not fits:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, allowed: {allowed}")

    def schedule(self, patches: int, blocks: int) -> tuple[Stage, ...]:
        """The compressing blocks of a tower that uses `blocks` blocks on `patches` patch tokens.

        576 patches, 23 blocks, 50 % in 3 stages: blocks 5, 11, 17 (from 0) put out 457, 363 and 288 tokens.
        Raises ValueError where there are fewer blocks than stages or a stage would keep no token.
        """
        if self.stages > blocks:
            raise ValueError(f"stages: got {self.stages}, allowed: 1 to {blocks}, the blocks in use of the image tower")
        result: list[Stage] = []
        for number in range(1, self.stages + 1):
            out = round(patches * (1 - self.ratio) ** (number / self.stages))
            clusters = round(out * self.cluster_share)
            if out < 1:
                raise ValueError(
                    f"ratio: got {self.ratio}, allowed: one that leaves at least 1 of {patches} patch tokens"
                )
            # the last tokens of a spatial grid can all be needed: no more clusters than tokens left over
            before = result[-1].kept + result[-1].clusters if result else patches
            if out == before:
                clusters = 0
            result.append(Stage(blocks * number // (self.stages + 1), out - clusters, clusters))
        return tuple(result)

    def tokens(self, patches: int, blocks: int) -> int:
        """Patch tokens that leave the tower."""
        last = self.schedule(patches, blocks)[-1]
        return last.kept + last.clusters


def importance(
    query: Float[Tensor, "batch heads 1 head_dim"], keys: Float[Tensor, "batch heads tokens head_dim"], scale: float
) -> Float[Tensor, "batch tokens-1"]:
    """IPS: attention weight from the class token to each patch token, mean over heads.

    The softmax runs over all tokens = patches + 1 keys; the class token's weight on itself is left out afterwards.
    """
    return (query @ keys.transpose(-1, -2) * scale).softmax(dim=-1).mean(dim=1)[:, 0, 1:]


def compress(
    tokens: Float[Tensor, "batch patches dim"], ips: Float[Tensor, "batch patches"], stage: Stage, vmtc: VMTC
) -> tuple[Float[Tensor, "batch out dim"], Int[Tensor, "batch patches"], Bool[Tensor, "batch out"]]:
    """Eq. 5-8 without the class token: (tokens', slot, cluster).

    slot[p] is the output token that holds input token p, -1 if it was dropped; cluster[o] tells whether output token o
    is a merged cluster.  Which token goes where is a hard choice without gradient; the merge weights carry one.
    """
    ranked = ips.argsort(dim=-1, descending=True, stable=True)
    kept, redundant = ranked.split([stage.kept, tokens.shape[1] - stage.kept], dim=-1)  # eq. 5, 6
    parts, slot = [_take(tokens, kept)], torch.full_like(ranked, -1)
    slot.scatter_(1, kept, torch.arange(stage.kept, device=tokens.device).expand_as(kept))
    if stage.clusters:
        rest, weight = _take(tokens, redundant), ips.gather(1, redundant)
        label = kmeans(rest, stage.clusters, vmtc.iterations)
        members = F.one_hot(label, stage.clusters).to(tokens.dtype) * weight.unsqueeze(-1)
        if vmtc.merge == "normalized":
            members = members / members.sum(dim=1, keepdim=True).clamp_min(torch.finfo(tokens.dtype).tiny)
        parts.append(members.transpose(1, 2) @ rest)  # eq. 7
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

    def then(self, slot: Int[Tensor, "batch tokens"], cluster: Bool[Tensor, "batch out"]) -> "Fate":
        """Follow the patches through one more `compress`."""
        alive = self.slot >= 0
        now = torch.where(alive, slot.gather(1, self.slot.clamp_min(0)), -1)
        in_cluster = cluster.gather(1, now.clamp_min(0)) & (now >= 0)
        return Fate(now, self.merged | in_cluster)
