"""The paper's baselines for VMTC: fewer image tokens after the image tower, before the projector.

The paper's "spatial down-sampling" (SPD) gives neither its pooling nor its ratio, so there are three variants.
"average", "stride" and "bilinear" turn the square grid of patches into a smaller one. Plain pooling and "random"
patches beat many published methods, so a comparison should include them. "prumerge" is LLaVA-PruMerge (Shang et al.
2024, arXiv 2403.15388), after the authors' code (github.com/42Shawn/LLaVA-PruMerge, clip_encoder.py): the tokens to
which the class token attends most, each with its most similar tokens added, and one token of all the rest.

"resize" is the only one before the tower: the image itself has fewer pixels, and the tower fewer patches in all of its
blocks, whose position embeddings are interpolated as transformers does.

Mixed tokens are one product with a matrix of weights, (out x patches): no loop over images or tokens and no wait for
the host. Its gradients are deterministic, unlike those of torch's pooling on a GPU. It runs in float32, so that
bfloat16 rounds a result once.

Cost: that product, and for "prumerge" a second one of the same size, between keys, and a sort of each of its rows. For
576 patches that is at most 1.4 GFLOP an image; the tower of CLIP ViT-L/14 takes about 370.

Shapes: batch, patches, out (tokens after the reduction), dim; width (queries and keys, heads concatenated).
"""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from redux.settings import Reduction, grid_side

ReducedTokens = tuple[Float[Tensor, "batch out dim"], Int[Tensor, "batch patches"], Bool[Tensor, "batch out"]]
"""(tokens', token_of_patch, cluster), as in `vmtc.compress_tokens`."""

ClassQueryAndKeys = tuple[Float[Tensor, "batch width"], Float[Tensor, "batch patches+1 width"]]
"""Query of the class token and all keys, the class token's first, in the tower's last block."""


def reduce_tokens(
    features: Float[Tensor, "batch patches dim"], reduction: Reduction, last: ClassQueryAndKeys | None = None
) -> ReducedTokens:
    """Reduce the tokens of a tower.

    Args:
        features: patch tokens, row by row, without the class token.
        reduction: settings.
        last: query and keys for "prumerge"; other methods ignore it.

    Returns:
        (tokens', token_of_patch, cluster). token_of_patch[b, p] is the output token that holds patch p, -1 if p was
        dropped. A pooled token holds the patches whose centre lies in its cell. cluster[b, o] is True if output token
        o mixes patches.

    Raises:
        ValueError: as `Reduction.count_tokens`, and for "prumerge" without `last`.

    Nine patches to four: the windows of "average" overlap, and the centre of the image lies in the last cell.

    >>> features = torch.arange(9.0).reshape(1, 9, 1)
    >>> tokens, token_of_patch, cluster = reduce_tokens(features, Reduction(method="average", tokens=4))
    >>> tokens.flatten().tolist(), token_of_patch.tolist()
    ([2.0, 3.0, 5.0, 6.0], [[0, 1, 1, 2, 3, 3, 2, 3, 3]])
    >>> tokens, token_of_patch, cluster = reduce_tokens(features, Reduction(method="stride", tokens=4))
    >>> tokens.flatten().tolist(), token_of_patch.tolist()
    ([0.0, 2.0, 6.0, 8.0], [[0, -1, 1, -1, -1, -1, 2, -1, 3]])
    """
    return REDUCERS[reduction.method](features, reduction, last)


def reduce_by_average(
    features: Float[Tensor, "batch patches dim"], reduction: Reduction, last: ClassQueryAndKeys | None
) -> ReducedTokens:
    """Average the patches that a cell touches: torch's adaptive average pooling.

    If the new side does not divide the old one, a patch on a border counts in full in both cells.
    """
    # In whole numbers, since fractions of a side would round at its borders.
    side, out, position, cell = _grid_sides(features, reduction)
    touches = ((position + 1) * out > cell * side) & (position * out < (cell + 1) * side)
    return _pool_grid(features, touches.float())


def reduce_by_bilinear(
    features: Float[Tensor, "batch patches dim"], reduction: Reduction, last: ClassQueryAndKeys | None
) -> ReducedTokens:
    """Weight patches linearly by their distance from a cell's centre: torch's bilinear with antialiasing.

    Without antialiasing only the two patches next to the centre would count. Half the side would then equal "average",
    a third of the side "stride".
    """
    side, out, position, cell = _grid_sides(features, reduction)
    distance = ((position + 0.5) * out / side - (cell + 0.5)).abs()  # Between centres, in cells
    return _pool_grid(features, (1 - distance).relu())


def reduce_by_stride(
    features: Float[Tensor, "batch patches dim"], reduction: Reduction, last: ClassQueryAndKeys | None
) -> ReducedTokens:
    """Select the patch in the middle of each cell; 24 to 12 patches a side takes 1, 3, 5, ... of each side."""
    side, out, _, cell = _grid_sides(features, reduction)
    middle = (2 * cell + 1) * side // (2 * out)
    return _select_patches(features, (middle * side + middle.T).flatten())


def reduce_by_random(
    features: Float[Tensor, "batch patches dim"], reduction: Reduction, last: ClassQueryAndKeys | None
) -> ReducedTokens:
    """Select random patches, in their order: the same positions for every image, batch and run."""
    patches = features.shape[1]
    # A separate generator, which neither reads nor advances the global one.
    shuffled = torch.randperm(patches, generator=torch.Generator().manual_seed(reduction.seed))
    positions = shuffled[: reduction.count_tokens(patches)].sort().values
    return _select_patches(features, positions.to(features.device))


def reduce_by_prumerge(
    features: Float[Tensor, "batch patches dim"], reduction: Reduction, last: ClassQueryAndKeys | None
) -> ReducedTokens:
    """Reduce by LLaVA-PruMerge: out - 1 tokens by falling attention with their neighbours, then one of all the rest.

    The weight of a patch is the class token's attention in the last block, with all heads as one. A kept token is
    itself plus the weighted sum of the `neighbours` tokens, kept or not, with the most similar keys. The last token is
    the weighted sum of all tokens that were not kept, and their token_of_patch. Kept tokens do not count as clusters,
    although neighbours were added to them.

    The authors keep the outliers of the attention of each image. Here the number is fixed, as in the branch that their
    code of PruMerge+ marks "for training", since a batch needs images of one length. The evenly spaced tokens of
    PruMerge+ are left out. `tokens` equal to the patches is not the identity: the last token is still weighted.
    """
    if last is None:
        raise ValueError("last: got None, allowed: query and keys; a tower with a class token is needed")
    query, keys = last
    batch, patches, _ = features.shape
    kept_count = reduction.count_tokens(patches) - 1
    attention = _class_attention(query, keys)
    kept = attention.argsort(dim=-1, descending=True, stable=True)[:, :kept_count]
    # One row of weights for each output token: neighbours, and last the patches that were not kept.
    near = attention.new_zeros(batch, kept_count, patches).scatter(2, _nearest_patches(keys[:, 1:], kept, reduction), 1)
    rest = torch.ones_like(attention).scatter(1, kept, 0).unsqueeze(1)
    weights = torch.cat([near, rest], dim=1) * attention.unsqueeze(1)
    # A kept token counts in full, whatever its own attention is.
    weights = weights.scatter(2, kept.unsqueeze(-1), 1)
    if reduction.weights == "normalized":
        weights = weights / weights.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)
    number = torch.arange(kept_count + 1, device=kept.device).expand(batch, -1)
    token_of_patch = torch.full_like(attention, kept_count, dtype=torch.long).scatter(1, kept, number[:, :-1])
    return _mix_patches(weights, features), token_of_patch, number == kept_count


def resize_pixels(
    pixels: Float[Tensor, "batch channels height width"], reduction: Reduction, patch_size: int
) -> tuple[
    Float[Tensor, "batch channels new_height new_width"], Int[Tensor, "batch patches"], Bool[Tensor, "batch out"]
]:
    """Reduce images to the pixels of fewer patches, by torch's bilinear interpolation with antialiasing.

    Args:
        pixels: normalised pixels of square images.
        reduction: settings with method "resize".
        patch_size: pixels on each side of a patch.

    Returns:
        (pixels', token_of_patch, cluster). token_of_patch[b, p] is the new patch that holds the centre of patch p.
        cluster is True, since each new patch mixes pixels of several.
    """
    side = pixels.shape[-1] // patch_size
    out = grid_side(reduction.count_tokens(side * side))
    token_of_patch = _locate_cells(side, out, pixels.device).expand(len(pixels), -1)
    cluster = torch.full((len(pixels), out * out), out < side, device=pixels.device)
    if out == side:
        return pixels, token_of_patch, cluster
    size = (out * patch_size, out * patch_size)
    resized = F.interpolate(pixels.float(), size, mode="bilinear", antialias=True, align_corners=False)
    return resized.to(pixels.dtype), token_of_patch, cluster


REDUCERS: dict[str, Callable[..., ReducedTokens]] = {
    "average": reduce_by_average,
    "stride": reduce_by_stride,
    "bilinear": reduce_by_bilinear,
    "random": reduce_by_random,
    "prumerge": reduce_by_prumerge,
}
"""Functions that reduce tokens after the tower; "resize" is `resize_pixels`, before it."""


def _grid_sides(
    features: Float[Tensor, "batch patches dim"], reduction: Reduction
) -> tuple[int, int, Int[Tensor, "side"], Int[Tensor, "out 1"]]:
    """Compute patches a side, cells a side, numbers of patches as a row and numbers of cells as a column."""
    patches = features.shape[1]
    side, out = grid_side(patches), grid_side(reduction.count_tokens(patches))
    return side, out, torch.arange(side, device=features.device), torch.arange(out, device=features.device).unsqueeze(1)


def _pool_grid(features: Float[Tensor, "batch patches dim"], weights: Float[Tensor, "cells side"]) -> ReducedTokens:
    """Pool rows and columns by the same weights, of the patches of a side in the cells of a side, not normalised."""
    weights = weights / weights.sum(dim=1, keepdim=True)
    out, side = weights.shape
    token_of_patch = _locate_cells(side, out, features.device).expand(features.shape[:2])
    tokens = _mix_patches(torch.kron(weights, weights), features)
    return tokens, token_of_patch, torch.full(tokens.shape[:2], out < side, device=features.device)


def _locate_cells(side: int, out: int, device: torch.device) -> Int[Tensor, "patches"]:
    """Locate the cell in which the centre of each patch lies, row by row."""
    cell = (2 * torch.arange(side, device=device) + 1) * out // (2 * side)
    return (cell.unsqueeze(1) * out + cell).flatten()


def _select_patches(features: Float[Tensor, "batch patches dim"], positions: Int[Tensor, "out"]) -> ReducedTokens:
    tokens = features.index_select(1, positions)
    token_of_patch = positions.new_full(features.shape[1:2], -1).scatter(
        0, positions, torch.arange(len(positions), device=positions.device)
    )
    return tokens, token_of_patch.expand(features.shape[:2]), torch.zeros_like(tokens[..., 0], dtype=torch.bool)


def _mix_patches(
    weights: Float[Tensor, "*images out patches"], features: Float[Tensor, "batch patches dim"]
) -> Float[Tensor, "batch out dim"]:
    """Multiply by weights, one matrix for all images or one for each."""
    return (weights @ features.float()).to(features.dtype)


def _class_attention(
    query: Float[Tensor, "batch width"], keys: Float[Tensor, "batch tokens width"]
) -> Float[Tensor, "batch tokens-1"]:
    """Attention weights from the class token to each patch; the softmax includes the class token."""
    scores = (keys.float() @ query.float().unsqueeze(-1)).squeeze(-1) * query.shape[-1] ** -0.5
    return scores.softmax(dim=-1)[:, 1:]


@torch.no_grad()
def _nearest_patches(
    keys: Float[Tensor, "batch patches width"], kept: Int[Tensor, "batch kept"], reduction: Reduction
) -> Int[Tensor, "batch kept near"]:
    """Find the other patches whose keys have the highest cosine similarity with the key of each kept token."""
    unit = F.normalize(keys.float(), dim=-1)
    kept_unit = unit.gather(1, kept.unsqueeze(-1).expand(-1, -1, unit.shape[-1]))
    cosine = (kept_unit @ unit.transpose(1, 2)).scatter(2, kept.unsqueeze(-1), -torch.inf)
    near = min(reduction.neighbours, keys.shape[1] - 1)
    return cosine.argsort(dim=-1, descending=True, stable=True)[..., :near]
