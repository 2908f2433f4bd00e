"""The picture tells kept, merged and dropped patches apart, and shows the kept ones as they are."""

import numpy as np
import pytest
from PIL import Image

from redux.picture import CLUSTER_COLOURS, TEXTURES, draw_patches, enlarge_image

SIDE = 8
PATCHES = SIDE * SIDE


def noise(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (64, 64, 3), dtype=np.uint8))


def plain(colour: str) -> Image.Image:
    return Image.new("RGB", (64, 64), colour)


def interior(picture: Image.Image, patch: int, side: int = SIDE) -> np.ndarray:
    """The patch's pixels, its outline apart."""
    pixels = np.asarray(picture)
    cell = pixels.shape[0] // side
    row, column = divmod(patch, side)
    return pixels[row * cell + 2 : (row + 1) * cell - 2, column * cell + 2 : (column + 1) * cell - 2]


def patch_slots() -> tuple[np.ndarray, np.ndarray]:
    """Patches 0-23 kept, 24-55 merged into eight clusters, 56-63 dropped."""
    slot = np.concatenate([np.arange(24), 24 + np.arange(32) % 8, np.full(8, -1)])
    return slot, (np.arange(PATCHES) >= 24) & (slot >= 0)


def test_kept_patches_are_the_enlarged_image():
    image = noise()
    slot, merged = patch_slots()
    picture, original = draw_patches(image, slot, merged), enlarge_image(image, PATCHES)
    assert (picture.size, picture.mode) == (original.size, "RGB")
    for patch in range(PATCHES):
        same = np.array_equal(interior(picture, patch), interior(original, patch))
        assert same == (patch < 24), patch


@pytest.mark.parametrize("colour", ["white", "black", "red", "#808080"])
def test_every_kept_patch_has_an_outline_that_is_seen(colour: str):
    everything = np.arange(PATCHES)
    pixels = np.asarray(draw_patches(plain(colour), everything, np.zeros(PATCHES, dtype=bool))).astype(int)
    cell = pixels.shape[0] // SIDE
    for start in range(0, len(pixels), cell):
        edge, middle = pixels[start : start + 2, cell // 2], pixels[start + cell // 2, cell // 2]
        assert np.abs(edge - middle).max() > 60


def test_patches_share_a_tint_where_they_share_a_token_and_only_there():
    slot, merged = patch_slots()
    picture = draw_patches(plain("white"), slot, merged)
    tints = {patch: interior(picture, patch).tobytes() for patch in np.flatnonzero(merged)}
    for one, one_tint in tints.items():
        for other, other_tint in tints.items():
            assert (one_tint == other_tint) == (slot[one] == slot[other])


def test_as_many_clusters_as_colours_and_textures_look_different():
    slot = np.arange(PATCHES) % (len(CLUSTER_COLOURS) * TEXTURES)
    picture = draw_patches(plain("white"), slot, np.ones(PATCHES, dtype=bool))
    assert len({interior(picture, patch).tobytes() for patch in range(PATCHES)}) == len(CLUSTER_COLOURS) * TEXTURES


def test_tints_follow_the_order_of_slots_not_their_numbers():
    slot, merged = patch_slots()
    spread = np.where(slot < 0, -1, slot * 7 + 3)
    assert draw_patches(noise(), slot, merged).tobytes() == draw_patches(noise(), spread, merged).tobytes()


@pytest.mark.parametrize("colour", ["white", "red", "yellow", "blue"])
def test_dropped_patches_are_grey_and_dark(colour: str):
    slot, merged = patch_slots()
    pixels = interior(draw_patches(plain(colour), slot, merged), PATCHES - 1).astype(int)
    assert np.ptp(pixels, axis=-1).max() == 0
    assert 0 < pixels.max() < 110


def test_a_patch_merged_first_and_dropped_later_is_dropped():
    slot, merged = patch_slots()
    later = merged | (slot < 0)
    assert draw_patches(noise(), slot, later).tobytes() == draw_patches(noise(), slot, merged).tobytes()


def test_border_runs_between_clusters_and_not_within_one():
    slot = np.repeat(np.arange(2), PATCHES // 2)  # Upper and lower half
    pixels = np.asarray(draw_patches(plain("white"), slot, np.ones(PATCHES, dtype=bool))).astype(int)
    cell, middle = len(pixels) // SIDE, len(pixels) // 2
    assert np.ptp(pixels[cell // 2, 1:-1], axis=0).max() == 0
    assert pixels[middle, 5].sum() < pixels[middle + 5, 5].sum()
    assert pixels[middle - 1, 5].sum() < pixels[middle - 5, 5].sum()


@pytest.mark.parametrize(("patches", "size"), [(1, 256), (16, 100), (576, 256), (576, 20)])
def test_size_is_a_whole_number_of_pixels_a_patch_near_the_one_asked_for(patches: int, size: int):
    side = round(patches**0.5)
    picture = draw_patches(noise(), np.arange(patches), np.zeros(patches, dtype=bool), size)
    assert picture.width == picture.height
    assert picture.width % side == 0
    assert abs(picture.width - size) <= 2 * side or picture.width == 4 * side


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1"])
def test_any_image_mode_is_drawn(mode: str):
    assert draw_patches(noise().convert(mode), *patch_slots()).mode == "RGB"


@pytest.mark.parametrize("patches", [0, 2, 63, 65])
def test_patches_that_fill_no_square_are_refused(patches: int):
    with pytest.raises(ValueError, match=f"patches: got {patches}"):
        draw_patches(noise(), np.arange(patches), np.zeros(patches, dtype=bool))
