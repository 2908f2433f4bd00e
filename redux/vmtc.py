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

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from redux.kmeans import Seeds, kmeans
from redux.settings import require


class Stage(NamedTuple):
    """What one compressing block does: patch tokens kept (k) and clusters made of the rest (c)."""

    block: int
    kept: int
    clusters: int

    @property
    def out(self) -> int:
        """Patch tokens that leave the block: k + c."""
        return self.kept + self.clusters


@dataclass(frozen=True, kw_only=True)
class VMTC:
    """Settings of the compression.  The budget is one of `ratio`, `tokens` or `kept`; without any, a ratio of 0.5.

    ratio: share of the patch tokens removed in total, 0 <= ratio < 1.
    tokens: patch tokens that leave the last stage.
    kept: k of each stage; asks for `clusters`.
    clusters: c, for every stage or for each; 0 drops the redundant tokens, 1 merges them into a single one.  Where a
        total leaves a stage nothing to remove, nothing is redundant, and it has no clusters whatever is asked.
    cluster_share: c as a share of a stage's output tokens, where `clusters` says nothing.
    stages: how many blocks compress, equally spaced over the blocks in use, or which, by number from 0, or from the
        end, where -1 is the last block in use.
    fall: how a total is spread over the stages; "geometric" removes the same share in each, "linear" the same number.
    similarity: what clusters are made by; the tokens themselves or their attention "keys", as PruMerge does.
    weights: of a token within its cluster; "raw" is IPS(j), as eq. 7 prints it, "normalized" divides by the cluster's
        sum of IPS, "total" by that of all redundant tokens.
    order: "spatial" keeps tokens in the order of their place in the image, "rank" is eq. 8, by importance, also where
        nothing is removed.  The language model counts positions as tokens come, as in LLaVA, not by patch.
    proportional: whether a merged token counts in later attention as many times as it holds patches (ToMe, arXiv
        2210.09461, eq. 1: log size is added to its scores) instead of once.
    seeds, iterations: of K-means, see `redux.kmeans`.

    >>> [tuple(stage) for stage in VMTC(tokens=64).schedule(576, 23)]  # block, k, c
    [(5, 231, 46), (11, 111, 22), (17, 53, 11)]
    >>> VMTC(kept=(8, 3), clusters=(2, 1), stages=(1, 3)).tokens_left(16, 4)
    4
    """

    ratio: float | None = None
    tokens: int | None = None
    kept: tuple[int, ...] | None = None
    clusters: int | tuple[int, ...] | None = None
    cluster_share: float = 1 / 6
    stages: int | tuple[int, ...] = 3
    fall: Literal["geometric", "linear"] = "geometric"
    similarity: Literal["tokens", "keys"] = "tokens"
    weights: Literal["normalized", "raw", "total"] = "normalized"
    order: Literal["spatial", "rank"] = "spatial"
    proportional: bool = False
    seeds: Seeds = "strided"
    iterations: int = 10

    def __post_init__(self) -> None:
        require(
            self,
            ratio=("0 <= ratio < 1", lambda ratio: 0 <= ratio < 1),
            tokens=("at least 1", lambda tokens: tokens >= 1),
            stages=(
                "at least 1, or block numbers",
                lambda stages: stages != () and (not isinstance(stages, int) or stages >= 1),
            ),
            cluster_share=("0 <= cluster_share <= 1", lambda share: 0 <= share <= 1),
            iterations=("at least 1", lambda iterations: iterations >= 1),
        )
        count = self.stages if isinstance(self.stages, int) else len(self.stages)
        each = f"a number of at least 0 for each of {count} stages"
        require(
            self,
            kept=(each, lambda kept: len(kept) == count and min(kept) >= 0),
            clusters=(
                f"a number of at least 0, or {each}",
                lambda clusters: (
                    clusters >= 0 if isinstance(clusters, int) else len(clusters) == count and min(clusters) >= 0
                ),
            ),
        )
        budgets = [name for name in ("ratio", "tokens", "kept") if getattr(self, name) is not None]
        if len(budgets) > 1:
            raise ValueError(
                f"{budgets[1]}: got {getattr(self, budgets[1])} besides {budgets[0]}, allowed: one of the two"
            )
        if self.kept is not None and self.clusters is None:
            raise ValueError("clusters: got None, allowed: a number, or one for each stage, as kept is given")

    def schedule(self, patches: int, blocks: int) -> tuple[Stage, ...]:
        """The compressing blocks of a tower that uses `blocks` blocks on `patches` patch tokens.

        576 patches, 23 blocks, 50 % in 3 stages: blocks 5, 11, 17 (from 0) put out 457, 363 and 288 tokens.
        Raises ValueError where a block is not in use, or a stage would keep no token or more than it is given.
        """
        places = self._places(blocks)
        numbers = self.clusters if isinstance(self.clusters, tuple) else (self.clusters,) * len(places)
        if self.kept is not None:
            outs = tuple(kept + (clusters or 0) for kept, clusters in zip(self.kept, numbers, strict=True))
        else:
            outs = self._outs(patches, len(places))
        result: list[Stage] = []
        for place, before, out, clusters in zip(places, (patches, *outs), outs, numbers, strict=False):
            if not 1 <= out <= before:
                raise ValueError(
                    f"kept: got {self.kept}, with {clusters} clusters at block {place}, allowed: 1 to {before} tokens "
                    "in all, which are there"
                )
            if clusters is None:
                clusters = round(out * self.cluster_share)
            if self.kept is None and out == before:
                clusters = 0  # nothing is redundant
            if clusters > out:
                raise ValueError(f"clusters: got {clusters}, allowed: up to {out}, all tokens that leave block {place}")
            result.append(Stage(place, out - clusters, clusters))
        return tuple(result)

    def _places(self, blocks: int) -> tuple[int, ...]:
        if isinstance(self.stages, tuple):
            places = tuple(place + blocks if place < 0 else place for place in self.stages)
            if any(not one < other for one, other in pairwise((-1, *places, blocks))):
                raise ValueError(
                    f"stages: got {self.stages}, allowed: ascending numbers up to {blocks - 1}, the last block in use "
                    "of the image tower"
                )
            return places
        if self.stages > blocks:
            raise ValueError(f"stages: got {self.stages}, allowed: 1 to {blocks}, the blocks in use of the image tower")
        return tuple(blocks * number // (self.stages + 1) for number in range(1, self.stages + 1))

    def _outs(self, patches: int, stages: int) -> tuple[int, ...]:
        """Patch tokens after each stage, from a total."""
        if self.tokens is not None and self.tokens > patches:
            raise ValueError(f"tokens: got {self.tokens}, allowed: 1 to {patches}, the patch tokens of an image")
        left = self.tokens / patches if self.tokens is not None else 1 - (0.5 if self.ratio is None else self.ratio)
        if round(patches * left) < 1:
            raise ValueError(f"ratio: got {self.ratio}, allowed: one that leaves at least 1 of {patches} patch tokens")
        parts = [number / stages for number in range(1, stages + 1)]
        if self.fall == "linear":
            return tuple(round(patches * (1 - (1 - left) * part)) for part in parts)
        return tuple(round(patches * left**part) for part in parts)

    def tokens_left(self, patches: int, blocks: int) -> int:
        """Patch tokens that leave the tower."""
        return self.schedule(patches, blocks)[-1].out


def importance(
    query: Float[Tensor, "batch heads 1 head_dim"],
    keys: Float[Tensor, "batch heads tokens head_dim"],
    scale: float,
    bias: Float[Tensor, "batch tokens"] | None = None,
) -> Float[Tensor, "batch tokens-1"]:
    """IPS: attention weight from the class token to each patch token, mean over heads.

    The softmax runs over all tokens = patches + 1 keys; the class token's weight on itself is left out afterwards.
    It is taken in float32: in bfloat16 most scores would tie.
    bias: added to the scores of each key, if the block's attention does so as well.
    """
    scores = query @ keys.transpose(-1, -2) * scale
    if bias is not None:
        scores = scores + bias[:, None, None]
    return scores.softmax(dim=-1, dtype=torch.float32).mean(dim=1)[:, 0, 1:]


def received(
    query: Float[Tensor, "batch heads tokens head_dim"],
    keys: Float[Tensor, "batch heads tokens head_dim"],
    scale: float,
    bias: Float[Tensor, "batch tokens"] | None = None,
) -> Float[Tensor, "batch tokens"]:
    """In place of IPS where a tower has no class token (SigLIP): attention weight that each patch token receives from
    all patch tokens, mean over them and over heads.  One head's map is alive at a time.
    """
    total = query.new_zeros(query.shape[0], query.shape[2], dtype=torch.float32)
    for head in range(query.shape[1]):
        scores = query[:, head] @ keys[:, head].transpose(1, 2) * scale
        scores = scores if bias is None else scores + bias[:, None]
        total = total + scores.softmax(dim=-1, dtype=torch.float32).mean(dim=1)
    return total / query.shape[1]


def compress(
    tokens: Float[Tensor, "batch patches dim"],
    ips: Float[Tensor, "batch patches"],
    stage: Stage,
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
    >>> merged, slot, cluster = compress(tokens, ips, Stage(0, kept=2, clusters=2), VMTC(order="rank"))
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
        """Follow the patches through one more `compress`."""
        alive = self.slot >= 0
        now = torch.where(alive, slot.gather(1, self.slot.clamp_min(0)), -1)
        in_cluster = cluster.gather(1, now.clamp_min(0)) & (now >= 0)
        return Fate(now, self.merged | in_cluster)
