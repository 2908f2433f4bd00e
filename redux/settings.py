"""Settings of the method and of the paper's baselines, and one check for all of them.

Plain Python, so that a mistake in a job file is found without torch. `redux.vmtc`, `redux.cmai` and `redux.reduction`
hold the computations. Each setting that the paper leaves open is explained here.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

TemplateName = Literal["plain", "vicuna_v1", "vicuna_bare", "chat"]
"""Name of a conversation template in `redux.conversation.TEMPLATES`, or "chat" for that of the tokenizer."""

ImageAspectRatio = Literal["pad", "crop"]
"""Method to make an image square: pad the shorter edges (LLaVA-1.5's stage 2), or crop the longer ones (stage 1)."""

ImageBackend = Literal["exact", "fast"]
"""Library that computes pixels, see `redux.image.load_pixels`."""

KernelChoice = Literal["auto", "plain", "fused"]
"""Choice between fused kernels and plain code, see `redux.kernels`."""

KMeansSeeds = Literal["strided", "farthest", "random"]
"""Choice of the first centroids of K-means, see `redux.kmeans.kmeans`."""

FieldRule = tuple[str, Callable[[Any], bool]]
"""Allowed values of a field in words, and a function that checks a value."""

TYPE_NAMES = {bool: "True or False", int: "a whole number", float: "a number", NoneType: "None"}


def check_fields(settings: Any, **rules: FieldRule) -> None:
    """Check the fields of a dataclass against their types and against rules.

    Types are strict: True is not a number, and neither is NaN. None breaks no rule if the type allows it.

    Args:
        settings: instance of a dataclass.
        rules: rules by field.

    Raises:
        ValueError: names the first field with a value that is not allowed, and the allowed values.
    """
    for name, hint in get_type_hints(type(settings)).items():
        value = getattr(settings, name)
        allowed, is_allowed = rules.get(name, ("", lambda _: True))
        if not _has_type(value, hint):
            raise ValueError(f"{name}: got {value!r}, allowed: {_describe_type(hint)}")
        if value is not None and not is_allowed(value):
            raise ValueError(f"{name}: got {value!r}, allowed: {allowed}")


def _has_type(value: Any, hint: Any) -> bool:
    """Return True if a value has the annotated type: a Literal, a union, a tuple of any length, or a plain class."""
    if get_origin(hint) is Literal:
        return isinstance(value, str) and value in get_args(hint)
    if get_origin(hint) in (Union, UnionType):
        return any(_has_type(value, member) for member in get_args(hint))
    if get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(_has_type(item, get_args(hint)[0]) for item in value)
    # Bool is a subclass of int, and a whole number may stand for a float.
    if isinstance(value, bool) or hint is not float:
        return type(value) is hint
    return isinstance(value, int | float) and math.isfinite(value)


def _describe_type(hint: Any) -> str:
    *first, last = _list_alternatives(hint)
    return f"{', '.join(first)} or {last}" if first else last


def _list_alternatives(hint: Any) -> list[str]:
    if get_origin(hint) is Literal:
        return list(map(repr, get_args(hint)))
    if get_origin(hint) in (Union, UnionType):
        return [text for member in get_args(hint) for text in _list_alternatives(member)]
    if get_origin(hint) is tuple:
        return [f"a tuple (each {_describe_type(get_args(hint)[0])})"]
    return [TYPE_NAMES[hint]]


def grid_side(patches: int) -> int:
    """Compute the number of patches on each side of the image; ValueError if they do not fill a square."""
    side = round(patches**0.5)
    if side * side != patches or not patches:
        raise ValueError(f"patches: got {patches}, allowed: a square number, row by row")
    return side


class CompressionStage(NamedTuple):
    """Token counts of one compressing block.

    Args:
        block: index of the block, from 0.
        kept: patch tokens kept, k of eq. 5.
        clusters: clusters of the other tokens, c of eq. 7.
    """

    block: int
    kept: int
    clusters: int

    @property
    def num_tokens_out(self) -> int:
        """Patch tokens that leave the block: k + c."""
        return self.kept + self.clusters


@dataclass(frozen=True, kw_only=True)
class VMTC:
    """Settings of the token compression.

    A stage of the compression is a block of the image tower that compresses. It is not a stage of the training.

    Args:
        ratio: share of the image tokens removed in total, 0 <= ratio < 1. Set at most one of `ratio`, `tokens` and
            `kept`; without any of them, half of the tokens are removed.
        tokens: number of image tokens that reach the language model, instead of `ratio`.
        kept: k of each compressing block, instead of `ratio`; requires `clusters`.
        clusters: c, one number for all compressing blocks or one for each. 0 drops the redundant tokens, 1 merges them
            into a single one. A block that removes no token has no clusters, unless `kept` is set.
        cluster_share: c as a share of a block's output tokens, if `clusters` is null. The default is 1/6.
        stages: number of compressing blocks, equally spaced over the blocks in use. Or a list of their indices, from 0;
            -1 is the last block in use.
        budget_schedule: distribution of the budget over the compressing blocks. "geometric" removes the same share in
            each, "linear" the same number.
        similarity: vectors that are clustered: "tokens", or their attention "keys", as in PruMerge.
        weights: merge weight of a token in its cluster. "raw" is IPS(j), its importance (eq. 5), as eq. 7 is printed,
            "normalized" divides by the cluster's sum of IPS, "total" by the sum of all redundant tokens.
        order: order of the output tokens. "spatial" is that of the image, "rank" is by importance (eq. 8), even if no
            token is removed. The language model numbers positions in this order.
        proportional: in later attention, weight a merged token by its number of patches (ToMe, arXiv 2210.09461, eq. 1,
            adds log size to the scores). false counts each token once.
        sink_norm: patches whose norm exceeds sink_norm × the median norm of the image's patches are attention sinks
            (arXiv 2309.16588), and their importance is multiplied by 1e-6: they are kept last and add almost nothing
            to a cluster. null treats all patches alike.
        seeds: first centroids of K-means, see `redux.kmeans`.
        iterations: iterations of K-means.

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
    sink_norm: float | None = None
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
            sink_norm=("at least 1", lambda sink_norm: sink_norm >= 1),
            iterations=("at least 1", lambda iterations: iterations >= 1),
        )
        count = self.stages if isinstance(self.stages, int) else len(self.stages)
        # Lists by block need a number for each compressing block.
        per_stage = f"a number of at least 0 for each of {count} compressing blocks"
        check_fields(
            self,
            kept=(per_stage, lambda kept: len(kept) == count and min(kept) >= 0),
            clusters=(
                f"a number of at least 0, or {per_stage}",
                lambda clusters: (
                    clusters >= 0 if isinstance(clusters, int) else len(clusters) == count and min(clusters) >= 0
                ),
            ),
        )
        # The three are ways to give one budget.
        budgets = [name for name in ("ratio", "tokens", "kept") if getattr(self, name) is not None]
        if len(budgets) > 1:
            raise ValueError(
                f"{budgets[1]}: got {getattr(self, budgets[1])} besides {budgets[0]}, allowed: one of the two"
            )
        # cluster_share is a share of the output, which `kept` alone does not determine.
        if self.kept is not None and self.clusters is None:
            raise ValueError("clusters: got None, allowed: a number, or one for each block, because kept is given")

    def plan_stages(self, patches: int, blocks: int) -> tuple[CompressionStage, ...]:
        """Plan the compressing blocks of a tower.

        576 patches, 23 blocks, 50 % in 3 compressing blocks: blocks 5, 11, 17 (from 0) output 457, 363 and 288 tokens.

        Args:
            patches: patch tokens of an image.
            blocks: blocks in use.

        Raises:
            ValueError: a block is not in use, or would keep no token or more than its input.
        """
        numbers = self._block_numbers(blocks)
        # A stage without a number of clusters gets one from cluster_share below.
        clusters_by_stage = self.clusters if isinstance(self.clusters, tuple) else (self.clusters,) * len(numbers)
        # Tokens after each block: k + c where k is given, else from the total.
        if self.kept is not None:
            outs = tuple(kept + (clusters or 0) for kept, clusters in zip(self.kept, clusters_by_stage, strict=True))
        else:
            outs = self._tokens_after_stages(patches, len(numbers))
        stages: list[CompressionStage] = []
        # Not strict: the tokens before each block have one value more, that after the last block.
        for number, tokens, out, clusters in zip(numbers, (patches, *outs), outs, clusters_by_stage, strict=False):
            if not 1 <= out <= tokens:
                raise ValueError(
                    f"kept: got {self.kept}, with {clusters} clusters at block {number}, allowed: 1 to {tokens} "
                    "tokens in all, which are there"
                )
            if clusters is None:
                clusters = round(out * self.cluster_share)
            if self.kept is None and out == tokens:
                clusters = 0  # Nothing is redundant
            if clusters > out:
                raise ValueError(
                    f"clusters: got {clusters}, allowed: up to {out}, all tokens that leave block {number}"
                )
            stages.append(CompressionStage(number, out - clusters, clusters))
        return tuple(stages)

    def _block_numbers(self, blocks: int) -> tuple[int, ...]:
        """Resolve `stages` to indices of blocks, from 0."""
        if isinstance(self.stages, tuple):
            numbers = tuple(number + blocks if number < 0 else number for number in self.stages)
            # -1 and `blocks` are the bounds.
            if any(number >= following for number, following in pairwise((-1, *numbers, blocks))):
                raise ValueError(
                    f"stages: got {self.stages}, allowed: ascending numbers up to {blocks - 1}, the last block in use "
                    "of the image tower"
                )
            return numbers
        if self.stages > blocks:
            raise ValueError(f"stages: got {self.stages}, allowed: 1 to {blocks}, the blocks in use of the image tower")
        return tuple(blocks * number // (self.stages + 1) for number in range(1, self.stages + 1))

    def _tokens_after_stages(self, patches: int, stages: int) -> tuple[int, ...]:
        """Compute the patch tokens after each compressing block from the total budget."""
        if self.tokens is not None and self.tokens > patches:
            raise ValueError(f"tokens: got {self.tokens}, allowed: 1 to {patches}, the patch tokens of an image")
        if self.tokens is not None:
            fraction_left = self.tokens / patches
        else:
            fraction_left = 1 - (0.5 if self.ratio is None else self.ratio)
        if round(patches * fraction_left) < 1:
            raise ValueError(f"ratio: got {self.ratio}, allowed: one that leaves at least 1 of {patches} patch tokens")
        parts = [number / stages for number in range(1, stages + 1)]
        # Each block is rounded from the start, not from the block before, so errors do not add up.
        if self.budget_schedule == "linear":
            return tuple(round(patches * (1 - (1 - fraction_left) * part)) for part in parts)
        return tuple(round(patches * fraction_left**part) for part in parts)

    def count_tokens_left(self, patches: int, blocks: int) -> int:
        """Compute the patch tokens after the last compressing block."""
        return self.plan_stages(patches, blocks)[-1].num_tokens_out


GAMMA_SCHEDULES: dict[str, Callable[[float], float]] = {
    "linear": lambda depth: depth,
    "constant": lambda depth: 1.0,
    "cosine": lambda depth: (1 - math.cos(math.pi * depth)) / 2,
    "step": lambda depth: float(depth >= 0.5),
}
"""Rise of gamma from its minimum (0) to its maximum (1), by depth: 0 in the first layer, 1 in the last."""


@dataclass(frozen=True, kw_only=True)
class CMAI:
    """Settings of the attention inhibition.

    The defaults are the paper's, in the reading of `redux.cmai`.

    Args:
        gamma_max: gamma, the ratio of image tokens inhibited for each text token, in the last layer; 0 <= gamma_max
            < 1.
        gamma_min: gamma in the first layer, 0 <= gamma_min <= gamma_max. If it is gamma_max / layers, a linear
            schedule gives layer l, counted from 0, gamma_max (l + 1) / layers.
        schedule: rise of gamma over the layers. "constant" is gamma_max in every layer, "step" in the later half.
        scores: values whose mean over heads is A, the attention in the focus score (eq. 9-11). "weights" are attention
            weights, after the softmax; "scores" are QK^T, the paper's attention score; "scaled" are QK^T / sqrt(d_k).
        focus: focus score. "neighbourhood" is eq. 11. The others are the baselines of Table 5; "tia" is A_t2i alone,
            "sum" adds the rows of A_t2i of all text tokens up to the row's own, "discounted" adds them times
            discount^distance, in text tokens.
        heads: "mean" averages A over heads, and one mask serves all heads. "each" has a focus score and a mask for each
            head, by plain code. A list of numbers, layer × heads + head from 0, inhibits these heads alone, each by a
            mask of its own; `redux.heads` selects the heads that matter most for the answers.
        discount: discount of "discounted", 0 < discount <= 1. The paper gives none.
        preamble: false leaves text before the first image out of the softmax of "weights".
        quantile: threshold among the n image tokens of a text token. "lower" is the score at rank floor(gamma (n - 1)),
            and keeps equal scores; "linear" interpolates between two ranks; "count" inhibits exactly floor(gamma n)
            pairs, of equal scores the first.
        active: phase in which pairs are inhibited.
        generated: true also inhibits pairs of generated tokens, which are decoded with a cache.

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
    heads: Literal["mean", "each"] | tuple[int, ...] = "mean"
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
            heads=(
                "mean, each, or different numbers of at least 0",
                lambda heads: isinstance(heads, str) or (len(set(heads)) == len(heads) > 0 and min(heads) >= 0),
            ),
            discount=("0 < discount <= 1", lambda discount: 0 < discount <= 1),
        )

    def select_heads(self, layer: int, num_heads: int) -> tuple[int, ...]:
        """Select the heads of a layer that are inhibited; all of them for "mean" and "each"."""
        if isinstance(self.heads, str):
            return tuple(range(num_heads))
        return tuple(number % num_heads for number in self.heads if number // num_heads == layer)

    def compute_gammas(self, layers: int) -> tuple[float, ...]:
        """Compute gamma of each layer."""
        rise = [GAMMA_SCHEDULES[self.schedule](layer / max(layers - 1, 1)) for layer in range(layers)]
        # 12 digits remove the noise of binary fractions, so that 0.6 stays 0.6.
        return tuple(round(self.gamma_min + (self.gamma_max - self.gamma_min) * share, 12) for share in rise)


SPATIAL_METHODS = ("average", "stride", "bilinear", "resize")


@dataclass(frozen=True, kw_only=True)
class Reduction:
    """Settings of a baseline of VMTC that reduces tokens after the tower, or with "resize" pixels before it.

    The budget is one of `tokens` and `ratio`.

    Args:
        method: method of `redux.reduction`.
        tokens: image tokens after the reduction. A square number for the spatial methods "average", "stride",
            "bilinear" and "resize", at least 2 for "prumerge".
        ratio: share of the image tokens removed, 0 <= ratio < 1. The spatial methods take the nearest square number.
        seed: seed of "random".
        neighbours: for "prumerge", number of the most similar tokens added to each kept token.
        weights: weights of "prumerge". "raw" are the attention weights as in the authors' code, "normalized" divides
            by their sum, so that each token is a weighted mean of patches.

    >>> Reduction(method="average", ratio=0.75).count_tokens(576)
    144
    >>> Reduction(method="random", ratio=0.9).count_tokens(576)
    58
    >>> Reduction(method="average", ratio=0.9).count_tokens(576)  # 64 is nearer to 57.6 than 49
    64
    """

    method: Literal["average", "stride", "bilinear", "resize", "random", "prumerge"]
    tokens: int | None = None
    ratio: float | None = None
    seed: int = 0
    neighbours: int = 32
    weights: Literal["raw", "normalized"] = "raw"

    def __post_init__(self) -> None:
        square = ("a square number, at least 1", lambda tokens: tokens >= 1 and tokens == math.isqrt(tokens) ** 2)
        at_least = (f"at least {self._min_tokens}", lambda tokens: tokens >= self._min_tokens)
        check_fields(
            self,
            tokens=square if self.method in SPATIAL_METHODS else at_least,
            ratio=("0 <= ratio < 1", lambda ratio: 0 <= ratio < 1),
            neighbours=("at least 1", lambda neighbours: neighbours >= 1),
        )
        if (self.tokens is None) == (self.ratio is None):
            raise ValueError(f"tokens, ratio: got {self.tokens!r}, {self.ratio!r}, allowed: exactly one of the two")

    @property
    def _min_tokens(self) -> int:
        return 2 if self.method == "prumerge" else 1

    def count_tokens(self, patches: int) -> int:
        """Compute the image tokens after the reduction.

        Raises:
            ValueError: there are fewer patches, too few tokens would be left, or a spatial method gets patches that do
                not fill a square.
        """
        squares = [side**2 for side in range(1, grid_side(patches) + 1)] if self.method in SPATIAL_METHODS else []
        target = self.tokens or patches * (1 - (self.ratio or 0))
        count = min(squares, key=lambda square: abs(square - target), default=round(target))
        if target > patches or count < self._min_tokens:
            name = "tokens" if self.tokens else "ratio"
            allowed = f"one that leaves {self._min_tokens} to {patches} of {patches} patch tokens"
            raise ValueError(f"{name}: got {getattr(self, name)}, allowed: {allowed}")
        return count


FORMER_FIELD_NAMES = {"maximum": "gamma_max", "minimum": "gamma_min", "fall": "budget_schedule"}
"""Former names of fields, in configurations that older versions saved."""

METHODS: dict[str, Any] = {"vmtc": VMTC, "cmai": CMAI, "reduction": Reduction}
"""Classes of the settings that a configuration adds to LLaVA's, as dictionaries; None is off."""
