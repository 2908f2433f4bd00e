"""Fused spherical K-means: two launches for all iterations and all images.

Only cosine similarities count, so K-means needs no more of an image than the Gram matrix G of its unit tokens. The
similarity of token i to the centroid of cluster C is

    sum_{j in C} G[i, j] / sqrt(sum_{j, k in C} G[j, k]).

One launch computes the Gram matrices, in tiles, from tokens that it gathers. The other runs one program per image,
which reads the image's matrix from L2 in each iteration and stops once no label changes; the plain version would repeat
the same labels until its last iteration.

Rounding: products of bfloat16 or float16 tokens are exact and summed in float32; float32 tokens are multiplied without
TF32. G is split into two float16 parts for tensor cores, with an error up to 2^-23, since the membership in a cluster
(0 or 1) is exact. Labels thus equal those of the plain version, except where similarities agree to about 1e-6. Values
that are not finite count as a similarity of 0, so that every label is valid.

Shapes: batch, tokens, dim; clusters = c.
"""

from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from redux.rounding import divide_up, next_power_of_two, round_up
from redux.settings import KMeansSeeds

_EPSILON = tl.constexpr(1e-12)  # Least length that F.normalize divides by
_FARTHEST, _STRIDED, _GIVEN = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@torch.no_grad()
def cluster_tokens(
    tokens: Float[Tensor, "batch patches dim"],
    index: Int[Tensor, "batch tokens"] | None,
    clusters: int,
    iterations: int,
    seeds: KMeansSeeds,
) -> Int[Tensor, "batch tokens"]:
    """Compute the labels of `redux.kmeans.kmeans` in two launches.

    Args:
        tokens: vectors; the last dimension must be contiguous.
        index: positions of the vectors to cluster, in this order; None takes all.
        clusters: number of clusters, c.
        iterations: updates of the centroids.
        seeds: choice of the first centroids.
    """
    batch, dim = tokens.shape[0], tokens.shape[2]
    count = tokens.shape[1] if index is None else index.shape[1]
    row = round_up(count, 16)  # Rows of G start at multiples of 64 bytes
    gram = tokens.new_empty(batch, count, row, dtype=torch.float32)
    label = torch.empty(batch, count, dtype=torch.long, device=tokens.device)
    block_c = max(16, next_power_of_two(clusters))
    block_r = 128 if block_c <= 64 and count > 64 else 64
    scores = gram.new_empty(batch, count, block_c)
    similarity = gram.new_empty(batch, count)
    # Without random seeds the kernel ignores `positions`, and any tensor will do.
    positions = _random_positions(count, clusters, tokens.device) if seeds == "random" else label
    block = 64 if tokens.dtype != torch.float32 or count <= 64 else 32
    tiles = divide_up(count, block)
    with torch.cuda.device_of(tokens):
        # One stage: in a pipeline, Triton 3.6 lets a load overwrite a tile that a product on tensor cores still reads,
        # as the loop also reads it for the lengths.
        _gram_kernel[(batch, tiles, tiles)](
            tokens, label if index is None else index, gram, tokens.stride(0), tokens.stride(1),
            0 if index is None else index.stride(0), count, row,
            DIM=dim, INDEXED=index is not None, BLOCK=block, BLOCK_D=64, num_warps=4, num_stages=1,
        )  # fmt: skip
        _kmeans_kernel[(batch,)](
            gram, scores, similarity, label, positions, count, clusters, iterations, row,
            SEEDS={"farthest": _FARTHEST, "strided": _STRIDED, "random": _GIVEN}[seeds],
            TILES_R=divide_up(count, block_r), TILES_K=divide_up(count, 64), BLOCK_R=block_r, BLOCK_K=64,
            BLOCK_C=block_c, BLOCK_N=next_power_of_two(count), num_warps=8, num_stages=3,
        )  # fmt: skip
    return label


_positions: dict[Any, Tensor] = {}


def _random_positions(count: int, clusters: int, device: torch.device) -> Int[Tensor, "clusters"]:
    """Draw the seeds "random" of the plain version once, since a copy to the device waits for it."""
    key = count, clusters, device
    if key not in _positions:
        shuffled = torch.randperm(count, generator=torch.Generator().manual_seed(0))
        _positions[key] = shuffled[:clusters].to(device)
    return _positions[key]


@triton.jit
@no_type_check
def _gram_kernel(
    tokens, index, gram, stride_batch, stride_token, stride_index, count, row,
    DIM: tl.constexpr, INDEXED: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Compute one tile of the Gram matrix of an image's unit tokens.

    Grid: (batch, tiles, tiles).

    Args:
        tokens: (batch, patches, dim).
        index: (batch, count) positions of the tokens to cluster; any pointer if all are.
        gram: written, (batch, count, row), of which each row has count numbers.
    """
    image = tl.program_id(0).to(tl.int64)
    tokens += image * stride_batch
    left = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    right = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    if INDEXED:
        left_position = tl.load(index + image * stride_index + left, mask=left < count, other=0)
        right_position = tl.load(index + image * stride_index + right, mask=right < count, other=0)
    else:
        left_position, right_position = left, right
    columns = tl.arange(0, BLOCK_D)
    left_row = tokens + left_position.to(tl.int64)[:, None] * stride_token + columns[None, :]
    right_row = tokens + right_position.to(tl.int64)[:, None] * stride_token + columns[None, :]
    # One pass over the dimensions gives the products and the lengths by which they are divided.
    product = tl.zeros((BLOCK, BLOCK), tl.float32)
    left_square = tl.zeros((BLOCK,), tl.float32)
    right_square = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, DIM, BLOCK_D):
        inside = columns[None, :] < DIM - start
        x = tl.load(left_row + start, mask=(left < count)[:, None] & inside, other=0.0)
        y = tl.load(right_row + start, mask=(right < count)[:, None] & inside, other=0.0)
        product = tl.dot(x, tl.trans(y), product, input_precision="ieee")
        left_square += tl.sum(x.to(tl.float32) * x.to(tl.float32), axis=1)
        right_square += tl.sum(y.to(tl.float32) * y.to(tl.float32), axis=1)
    left_length = tl.maximum(tl.sqrt(left_square), _EPSILON)
    right_length = tl.maximum(tl.sqrt(right_square), _EPSILON)
    cosine = product / left_length[:, None] / right_length[None, :]
    cosine = tl.where(tl.abs(cosine) < 2, cosine, 0.0)  # Also false for NaN
    here = gram + (image * count + left[:, None]) * row + right[None, :]
    tl.store(here, cosine, mask=(left < count)[:, None] & (right < count)[None, :])


@triton.jit
@no_type_check
def _choose_seeds(
    gram, positions, count, clusters, row, SEEDS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Choose the positions of the first centroids, as `redux.kmeans` does; 0 beyond the last cluster."""
    cluster = tl.arange(0, BLOCK_C)
    if SEEDS == _STRIDED:
        return tl.where(cluster < clusters, cluster * count // clusters, 0)
    if SEEDS == _GIVEN:
        return tl.load(positions + cluster, mask=cluster < clusters, other=0).to(tl.int32)
    token = tl.arange(0, BLOCK_N)
    chosen = tl.zeros((BLOCK_C,), tl.int32)
    nearest = tl.where(token < count, float("-inf"), float("inf"))
    last = tl.sum(chosen, axis=0)  # The first token
    number = 1
    while number < clusters:
        similarity = tl.load(gram + last * row + token, mask=token < count, other=0.0)
        # Infinity: a chosen token is never chosen again.
        nearest = tl.where(token == last, float("inf"), tl.maximum(nearest, similarity))
        last = tl.argmin(nearest, axis=0)
        chosen = tl.where(cluster == number, last, chosen)
        number += 1
    return chosen


@triton.jit
@no_type_check
def _score_seeds(gram, scores, seed, count, row, TILES_R: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Store each token's similarity to the first centroids."""
    cluster = tl.arange(0, BLOCK_C)
    for tile in range(TILES_R):
        token = tile * BLOCK_R + tl.arange(0, BLOCK_R)
        inside = (token < count)[:, None]
        value = tl.load(gram + seed[None, :] * row + token[:, None], mask=inside, other=0.0)
        tl.store(scores + token[:, None] * BLOCK_C + cluster[None, :], value, mask=inside)
    return tl.full((BLOCK_C,), 1.0, tl.float32)


@triton.jit
@no_type_check
def _score_members(
    gram, scores, label, count, row,
    TILES_R: tl.constexpr, TILES_K: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Store the sum of each token's similarities to the members of each cluster; return 1 / length of each sum."""
    cluster = tl.arange(0, BLOCK_C)
    square = tl.zeros((BLOCK_C,), tl.float32)
    for tile in range(TILES_R):
        token = tile * BLOCK_R + tl.arange(0, BLOCK_R)
        inside = (token < count)[:, None]
        total = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
        for tile_k in range(TILES_K):
            other = tile_k * BLOCK_K + tl.arange(0, BLOCK_K)
            value = tl.load(
                gram + token[:, None] * row + other[None, :], mask=inside & (other < count)[None, :], other=0.0
            )
            other_label = tl.load(label + other, mask=other < count, other=-1).to(tl.int32)
            member = (other_label[:, None] == cluster[None, :]).to(tl.float16)
            # Tensor cores multiply float16; two parts keep a similarity to 2^-23.
            high = value.to(tl.float16)
            low = (value - high.to(tl.float32)).to(tl.float16)
            total = tl.dot(high, member, total)
            total = tl.dot(low, member, total)
        tl.store(scores + token[:, None] * BLOCK_C + cluster[None, :], total, mask=inside)
        token_label = tl.load(label + token, mask=token < count, other=-1).to(tl.int32)
        square += tl.sum(tl.where(token_label[:, None] == cluster[None, :], total, 0.0), axis=0)
    return 1 / tl.maximum(tl.sqrt(tl.maximum(square, 0.0)), _EPSILON)


@triton.jit
@no_type_check
def _refill_clusters(
    similarity, label, members, count, clusters,
    TILES_R: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Move the least similar token into each empty cluster; the best token of every other cluster stays."""
    cluster = tl.arange(0, BLOCK_C)
    highest = tl.full((BLOCK_C,), float("-inf"), tl.float32)
    best = tl.zeros((BLOCK_C,), tl.int32)
    for tile in range(TILES_R):
        token = tile * BLOCK_R + tl.arange(0, BLOCK_R)
        value = tl.load(similarity + token, mask=token < count, other=0.0)
        token_label = tl.load(label + token, mask=token < count, other=-1).to(tl.int32)
        cluster_values = tl.where(token_label[:, None] == cluster[None, :], value[:, None], float("-inf"))
        best = tl.where(
            tl.max(cluster_values, axis=0) > highest, tile * BLOCK_R + tl.argmax(cluster_values, axis=0), best
        )
        highest = tl.maximum(highest, tl.max(cluster_values, axis=0))
    tl.debug_barrier()
    # Infinity: not movable.
    tl.store(similarity + best, tl.full((BLOCK_C,), float("inf"), tl.float32), mask=members > 0)
    tl.debug_barrier()
    token = tl.arange(0, BLOCK_N)
    movable = tl.load(similarity + token, mask=token < count, other=float("inf"))
    empty = (members == 0) & (cluster < clusters)
    left = tl.sum(empty.to(tl.int32), axis=0)
    while left > 0:
        target = tl.min(tl.where(empty, cluster, BLOCK_C), axis=0)
        moved = tl.argmin(movable, axis=0)
        tl.store(label + moved, target.to(tl.int64))
        movable = tl.where(token == moved, float("inf"), movable)
        empty = empty & (cluster != target)
        left -= 1


@triton.jit(do_not_specialize=["count", "clusters", "iterations"])
@no_type_check
def _kmeans_kernel(
    gram, scores, similarity, label, positions, count, clusters, iterations, row,
    SEEDS: tl.constexpr, TILES_R: tl.constexpr, TILES_K: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Cluster the tokens of one image; the threads pass scores and labels through global memory, which L2 holds.

    Grid: (batch,).

    Args:
        gram: (batch, count, row) Gram matrices.
        scores, similarity: scratch, (batch, count, BLOCK_C) and (batch, count).
        label: written, (batch, count).
        positions: (clusters,) positions of the seeds, for SEEDS == _GIVEN.
    """
    image = tl.program_id(0).to(tl.int64)
    gram += image * count * row
    scores += image * count * BLOCK_C
    similarity += image * count
    label += image * count
    cluster = tl.arange(0, BLOCK_C)
    seed = _choose_seeds(gram, positions, count, clusters, row, SEEDS, BLOCK_C, BLOCK_N)
    inverse = _score_seeds(gram, scores, seed, count, row, TILES_R, BLOCK_R, BLOCK_C)
    step = 0
    changed = count  # Tokens whose label may still change
    while changed > 0:
        if step > 0:
            inverse = _score_members(gram, scores, label, count, row, TILES_R, TILES_K, BLOCK_R, BLOCK_K, BLOCK_C)
        tl.debug_barrier()
        changed = 0
        members = tl.zeros((BLOCK_C,), tl.int32)
        for tile in range(TILES_R):
            token = tile * BLOCK_R + tl.arange(0, BLOCK_R)
            inside = token < count
            value = tl.load(scores + token[:, None] * BLOCK_C + cluster[None, :], mask=inside[:, None], other=0.0)
            value = tl.where((cluster < clusters)[None, :], value * inverse[None, :], float("-inf"))
            nearest = tl.argmax(value, axis=1)
            before = tl.load(label + token, mask=inside & (step > 0), other=-1).to(tl.int32)
            changed += tl.sum((inside & (nearest != before)).to(tl.int32), axis=0)
            members += tl.sum((inside[:, None] & (nearest[:, None] == cluster[None, :])).to(tl.int32), axis=0)
            # Several warps read the label that one of them overwrites.
            tl.debug_barrier()
            tl.store(similarity + token, tl.max(value, axis=1), mask=inside)
            tl.store(label + token, nearest.to(tl.int64), mask=inside)
        tl.debug_barrier()
        if tl.sum(((members == 0) & (cluster < clusters)).to(tl.int32), axis=0) > 0:
            _refill_clusters(similarity, label, members, count, clusters, TILES_R, BLOCK_R, BLOCK_C, BLOCK_N)
            changed = count
        tl.debug_barrier()
        step += 1
        if step > iterations:
            changed = 0
