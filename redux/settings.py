"""Settings of the method and its rivals, and one check for all of them.

Plain Python: a mistake in a job file is found without torch.  `redux.vmtc`, `redux.cmai` and `redux.reduction` hold the
computations; each setting that the paper leaves open is explained here.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

TemplateName = Literal["plain", "vicuna_v1", "vicuna_bare"]
"""Of a conversation template in `redux.conversation.TEMPLATES`."""

ImageAspectRatio = Literal["pad", "crop"]
"""How an image becomes a square: its shorter edges padded (LLaVA-1.5's stage 2), or the longer ones cut (stage 1)."""

ImageBackend = Literal["exact", "fast"]
"""How pixels are computed, see `redux.image.pixels`."""

KMeansSeeds = Literal["strided", "farthest", "random"]
"""Where K-means starts from, see `redux.kmeans.kmeans`."""

Rule = tuple[str, Callable[[Any], bool]]

TYPE_NAMES = {bool: "True or False", int: "a whole number", float: "a number", NoneType: "None"}


def check_fields(settings: Any, **rules: Rule) -> None:
    """ValueError naming the first field of a dataclass that has a value it may not have, and what is allowed.

    Every field is checked against its type, strictly: True is no number and NaN neither.  `rules` gives for some of
    them what else is asked, in words and as a function of the value; None, where it is allowed, breaks no rule.
    """
    for name, hint in get_type_hints(type(settings)).items():
        value, (asked, keeps) = getattr(settings, name), rules.get(name, ("", lambda _: True))
        if not _has_type(value, hint):
            raise ValueError(f"{name}: got {value!r}, allowed: {_describe_type(hint)}")
        if value is not None and not keeps(value):
            raise ValueError(f"{name}: got {value!r}, allowed: {asked}")


def _has_type(value: Any, hint: Any) -> bool:
    if get_origin(hint) is Literal:
        return isinstance(value, str) and value in get_args(hint)
    if get_origin(hint) in (Union, UnionType):
        return any(_has_type(value, member) for member in get_args(hint))
    if get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(_has_type(each, get_args(hint)[0]) for each in value)
    if isinstance(value, bool) or hint is not float:
        return type(value) is hint
    return isinstance(value, int | float) and math.isfinite(value)


def _describe_type(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return " or ".join(map(repr, get_args(hint)))
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(_describe_type(member) for member in get_args(hint))
    if get_origin(hint) is tuple:
        return f"a tuple, of each {_describe_type(get_args(hint)[0])}"
    return TYPE_NAMES[hint]


def grid_side(patches: int) -> int:
    """Patches a side.  Raises ValueError where they do not fill a square."""
    side = round(patches**0.5)
    if side * side != patches or not patches:
        raise ValueError(f"patches: got {patches}, allowed: a square number, row by row")
    return side


class CompressionStage(NamedTuple):
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
    budget_schedule: how a total is spread over the stages; "geometric" removes the same share in each, "linear" the
        same number.
    similarity: what clusters are made by; the tokens themselves or their attention "keys", as PruMerge does.
    weights: of a token within its cluster; "raw" is IPS(j), as eq. 7 prints it, "normalized" divides by the cluster's
        sum of IPS, "total" by that of all redundant tokens.
    order: "spatial" keeps tokens in the order of their place in the image, "rank" is eq. 8, by importance, also where
        nothing is removed.  The language model counts positions as tokens come, as in LLaVA, not by patch.
    proportional: whether a merged token counts in later attention as many times as it holds patches (ToMe, arXiv
        2210.09461, eq. 1: log size is added to its scores) instead of once.
    seeds, iterations: of K-means, see `redux.kmeans`.

    >>> [tuple(stage) for stage in VMTC(tokens=64).plan_stages(576, 23)]  # block, k, c
    [(5, 231, 46), (11, 111, 22), (17, 53, 11)]
    >>> VMTC(kept=(8, 3), clusters=(2, 1), stages=(1, 3)).count_tokens_left(16, 4)
    4
    """

    ratio: float | None = None
    tokens: int | None = None
    kept: tuple[int, ...] | None = None
    clusters: int | tuple[int, ...] | None = None
    cluster_share: float = 1 / 6
    stages: int | tuple[int, ...] = 3
    budget_schedule: Literal["geometric", "linear"] = "geometric"
    similarity: Literal["tokens", "keys"] = "tokens"
    weights: Literal["normalized", "raw", "total"] = "normalized"
    order: Literal["spatial", "rank"] = "spatial"
    proportional: bool = False
    seeds: KMeansSeeds = "strided"
    iterations: int = 10

    def __post_init__(self) -> None:
        check_fields(
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
        check_fields(
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

    def plan_stages(self, patches: int, blocks: int) -> tuple[CompressionStage, ...]:
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
        result: list[CompressionStage] = []
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
            result.append(CompressionStage(place, out - clusters, clusters))
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
        if self.budget_schedule == "linear":
            return tuple(round(patches * (1 - (1 - left) * part)) for part in parts)
        return tuple(round(patches * left**part) for part in parts)

    def count_tokens_left(self, patches: int, blocks: int) -> int:
        """Patch tokens that leave the tower."""
        return self.plan_stages(patches, blocks)[-1].out


GAMMA_SCHEDULES: dict[str, Callable[[float], float]] = {
    "linear": lambda depth: depth,
    "constant": lambda depth: 1.0,
    "cosine": lambda depth: (1 - math.cos(math.pi * depth)) / 2,
    "step": lambda depth: float(depth >= 0.5),
}
"""How gamma rises from its minimum (0) to its maximum (1) over the layers, from the first (0) to the last (1)."""


@dataclass(frozen=True, kw_only=True)
class CMAI:
    """Settings of the inhibition; the defaults are the paper's, read as the module's text says.

    gamma_max: gamma, the ratio of image tokens inhibited for each text token, in the last layer; 0 <= gamma_max < 1.
    gamma_min: gamma in the first layer; 0 <= gamma_min <= gamma_max.  gamma_max / layers gives
        gamma_max (l + 1) / layers.
    schedule: how gamma goes from one to the other; "constant" is the maximum in every layer, "step" in the later half.
    scores: what A averages over heads; "weights" after the softmax, "scores" QK^T as the paper's words have it,
        "scaled" QK^T / sqrt(d_k).
    focus: "neighbourhood" is eq. 11; the others are the rivals of Table 5: "tia" is A_t2i alone, "sum" adds the rows of
        A_t2i of all text tokens up to the row's own, "discounted" adds them times discount^distance, in text tokens.
    discount: of "discounted", 0 < discount <= 1; the paper does not give its own.
    preamble: whether text before the first image counts in the softmax of "weights".
    quantile: "lower" keeps from the score at rank floor(gamma (n - 1)) on, "linear" interpolates between two ranks,
        "count" inhibits floor(gamma n), equal scores by their place.
    active: when pairs are inhibited at all.
    generated: whether tokens that are decoded on a cache are inhibited as well.

    >>> CMAI(gamma_max=0.6).compute_gammas(4)
    (0.0, 0.2, 0.4, 0.6)
    >>> CMAI(gamma_max=0.6, schedule="step").compute_gammas(4)
    (0.0, 0.0, 0.6, 0.6)
    """

    gamma_max: float = 0.6
    gamma_min: float = 0.0
    schedule: Literal["linear", "constant", "cosine", "step"] = "linear"
    scores: Literal["weights", "scores", "scaled"] = "weights"
    focus: Literal["neighbourhood", "tia", "sum", "discounted"] = "neighbourhood"
    discount: float = 0.9
    preamble: bool = True
    quantile: Literal["lower", "linear", "count"] = "lower"
    active: Literal["always", "training", "inference"] = "always"
    generated: bool = True

    def __post_init__(self) -> None:
        check_fields(
            self,
            gamma_max=("0 <= gamma_max < 1", lambda gamma: 0 <= gamma < 1),
            gamma_min=(f"0 <= gamma_min <= gamma_max, {self.gamma_max}", lambda gamma: 0 <= gamma <= self.gamma_max),
            discount=("0 < discount <= 1", lambda discount: 0 < discount <= 1),
        )

    def compute_gammas(self, layers: int) -> tuple[float, ...]:
        """gamma of each layer."""
        rise = [GAMMA_SCHEDULES[self.schedule](layer / max(layers - 1, 1)) for layer in range(layers)]
        return tuple(round(self.gamma_min + (self.gamma_max - self.gamma_min) * share, 12) for share in rise)


SPATIAL_METHODS = ("average", "stride", "bilinear")


@dataclass(frozen=True, kw_only=True)
class Reduction:
    """Settings of a reduction.  The budget is one of `tokens` and `ratio`.

    method: a name in METHODS.
    tokens: visual tokens left; a square number for "average", "stride" and "bilinear", at least 2 for "prumerge".
    ratio: share of the patch tokens removed, 0 <= ratio < 1; the spatial methods take the nearest square number.
    seed: of "random".
    neighbours: of "prumerge", how many of the most similar tokens are added to each token kept.
    weights: of "prumerge"; "raw" are the attention weights as in the authors' code, "normalized" divides by their sum,
        so that each token is a weighted mean of patches.

    >>> Reduction(method="average", ratio=0.75).count_tokens(576), Reduction(method="random", ratio=0.9).count_tokens(576)
    (144, 58)
    >>> Reduction(method="average", ratio=0.9).count_tokens(576)  # 64 is nearer to 57.6 than 49
    64
    """

    method: Literal["average", "stride", "bilinear", "random", "prumerge"]
    tokens: int | None = None
    ratio: float | None = None
    seed: int = 0
    neighbours: int = 32
    weights: Literal["raw", "normalized"] = "raw"

    def __post_init__(self) -> None:
        square = ("a square number, at least 1", lambda tokens: tokens >= 1 and tokens == math.isqrt(tokens) ** 2)
        least = (f"at least {self._least}", lambda tokens: tokens >= self._least)
        check_fields(
            self,
            tokens=square if self.method in SPATIAL_METHODS else least,
            ratio=("0 <= ratio < 1", lambda ratio: 0 <= ratio < 1),
            neighbours=("at least 1", lambda neighbours: neighbours >= 1),
        )
        if (self.tokens is None) == (self.ratio is None):
            raise ValueError(f"tokens, ratio: got {self.tokens!r}, {self.ratio!r}, allowed: exactly one of the two")

    @property
    def _least(self) -> int:
        return 2 if self.method == "prumerge" else 1

    def count_tokens(self, patches: int) -> int:
        """Visual tokens that leave.

        Raises ValueError where there are fewer patches, where too few would be left or, for the spatial methods, where
        the patches do not fill a square.
        """
        squares = [side**2 for side in range(1, grid_side(patches) + 1)] if self.method in SPATIAL_METHODS else []
        wanted = self.tokens or patches * (1 - (self.ratio or 0))
        count = min(squares, key=lambda square: abs(square - wanted), default=round(wanted))
        if wanted > patches or count < self._least:
            name = "tokens" if self.tokens else "ratio"
            allowed = f"one that leaves {self._least} to {patches} of {patches} patch tokens"
            raise ValueError(f"{name}: got {getattr(self, name)}, allowed: {allowed}")
        return count


FORMER_FIELD_NAMES = {"maximum": "gamma_max", "minimum": "gamma_min", "fall": "budget_schedule"}
"""Fields of settings that had other names when older models were saved."""

METHODS: dict[str, Any] = {"vmtc": VMTC, "cmai": CMAI, "reduction": Reduction}
"""What a configuration may hold beside LLaVA's own, as dictionaries; None is off."""
