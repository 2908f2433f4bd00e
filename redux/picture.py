"""Picture of kept, merged and dropped patches, drawn over the image.

A token count shows how much was removed; a picture shows whether it was the right part. Kept patches stay unchanged,
inside a thin outline. The patches of one cluster share a translucent tint, which leaves the image visible. Dropped
patches turn dark grey.

A tint is a colour and a texture: the seven colours of Okabe and Ito (2008) for colour-blind readers, without black,
each plain, in stripes, in stripes of the other direction, and in a check. So 28 clusters look different before two
look the same.

Cost: one pass in numpy over a picture of about `size` pixels a side, some milliseconds.
"""

import numpy as np
from jaxtyping import Bool, Float, Int
from PIL import Image

from redux.settings import grid_side

CLUSTER_COLOURS = np.array(
    [
        (230, 159, 0),  # Orange
        (86, 180, 233),  # Sky blue
        (0, 158, 115),  # Bluish green
        (204, 121, 167),  # Reddish purple
        (240, 228, 66),  # Yellow
        (0, 114, 178),  # Blue
        (213, 94, 0),  # Vermillion
    ],
    dtype=np.float32,
)
TEXTURES = 4
TINT, STRIPE = 0.62, 0.28  # Opacity of a tint, and of the lighter half of a texture
DARK, LIGHT = 0.45, 0.6  # Opacity of the outlines: black around a patch, white inside it


def enlarge_image(image: Image.Image, patches: int, size: int = 256) -> Image.Image:
    """Resize the image to about `size` pixels a side, so that each patch has a multiple of 4 pixels a side."""
    side = grid_side(patches)
    cell = 4 * max(1, round(size / side / 4))
    return image.convert("RGB").resize((cell * side, cell * side), Image.Resampling.BICUBIC)


def draw_patches(
    image: Image.Image, token_of_patch: Int[np.ndarray, "patches"], merged: Bool[np.ndarray, "patches"], size: int = 256
) -> Image.Image:
    """Draw the output token of each patch over the image.

    Args:
        image: input of the image tower; an image that is not square is stretched.
        token_of_patch: token_of_patch[p] is the output token that holds patch p, -1 if p was dropped. Patches are
        numbered row by row.
        merged: merged[p] is True if patch p is part of a cluster. A patch that is neither merged nor dropped was kept.
        size: approximate side of the picture in pixels.

    Raises:
        ValueError: the patches do not fill a square.
    """
    side = grid_side(token_of_patch.size)
    picture = np.asarray(enlarge_image(image, token_of_patch.size, size)).astype(np.float32)
    cell = picture.shape[0] // side
    # Fill: grey for dropped patches, a tint for each cluster.
    dropped = token_of_patch < 0
    clustered = merged & ~dropped
    picture = np.where(_repeat_for_pixels(dropped, cell)[..., None], _darken_to_grey(picture), picture)
    picture = _tint_clusters(picture, np.where(clustered, token_of_patch, -1), cell)
    # Outlines: black between tokens.
    edges = _find_borders(token_of_patch, cell)
    picture = _blend(picture, 0, DARK * edges)
    kept = _repeat_for_pixels(~merged & ~dropped, cell)
    # A white line inside the black one: on every colour one of the two is visible.
    picture = _blend(picture, 255, LIGHT * (kept & ~edges & _inner_ring(side, cell)))
    return Image.fromarray(picture.round().astype(np.uint8))


def _repeat_for_pixels(values: np.ndarray, cell: int) -> np.ndarray:
    """Repeat the value of each patch for its pixels."""
    side = grid_side(values.size)
    return values.reshape(side, side).repeat(cell, axis=0).repeat(cell, axis=1)


def _blend(
    picture: Float[np.ndarray, "height width 3"],
    colour: Float[np.ndarray, "height width 3"] | int,
    opacity: Float[np.ndarray, "height width"],
) -> Float[np.ndarray, "height width 3"]:
    opacity = opacity[..., None].astype(np.float32)
    return picture * (1 - opacity) + np.float32(colour) * opacity


def _darken_to_grey(picture: Float[np.ndarray, "height width 3"]) -> Float[np.ndarray, "height width 3"]:
    """Turn the picture dark grey, lighter than black, so that a dropped black patch differs from a kept one."""
    luma = picture @ np.array([0.299, 0.587, 0.114], dtype=np.float32)
    return (40 + 0.2 * luma)[..., None].repeat(3, axis=2)


def _tint_clusters(
    picture: Float[np.ndarray, "height width 3"], token_of_patch: Int[np.ndarray, "patches"], cell: int
) -> Float[np.ndarray, "height width 3"]:
    """Tint each cluster by its rank among the output tokens; -1 stays unchanged."""
    # Colours go by rank, since numbers of tokens also count kept ones.
    clusters = np.unique(token_of_patch[token_of_patch >= 0])
    rank = _repeat_for_pixels(np.searchsorted(clusters, token_of_patch), cell)
    dense = _build_textures(cell, picture.shape[0])[rank // len(CLUSTER_COLOURS) % TEXTURES, *np.indices(rank.shape)]
    opacity = np.where(dense, TINT, STRIPE) * _repeat_for_pixels(token_of_patch >= 0, cell)
    return _blend(picture, CLUSTER_COLOURS[rank % len(CLUSTER_COLOURS)], opacity)


def _build_textures(cell: int, width: int) -> Bool[np.ndarray, "textures width width"]:
    """Build a mask of each texture's dense half. Its period divides the patch, so textures continue across patches."""
    row, column = np.indices((width, width))
    period = cell // 2
    half = max(1, period // 2)
    down, up = (row + column) % period < half, (row - column) % period < half
    return np.stack([np.ones_like(down), down, up, (row // half + column // half) % 2 == 0])


def _find_borders(token_of_patch: Int[np.ndarray, "patches"], cell: int) -> Bool[np.ndarray, "height width"]:
    """Find the pixels next to borders between patches of different tokens, and at the edge of the image.

    Dropped patches are one dark area without borders.
    """
    area = np.pad(_repeat_for_pixels(token_of_patch, cell), 1, constant_values=-2)
    here = area[1:-1, 1:-1]
    return (here != area[:-2, 1:-1]) | (here != area[2:, 1:-1]) | (here != area[1:-1, :-2]) | (here != area[1:-1, 2:])


def _inner_ring(side: int, cell: int) -> Bool[np.ndarray, "height width"]:
    """Find the two outermost pixels of each patch. Without the border pixels, the second one remains."""
    position = np.arange(side * cell) % cell
    outer = (position < 2) | (position >= cell - 2)
    return outer[:, None] | outer[None, :]
