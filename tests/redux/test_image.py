"""The tower gets LLaVA's padded square, scaled as CLIP's training images were."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from redux.image import MEAN, STD, pixels
from redux.model import normalise

SIDE = 16
MEAN_COLOUR = (122, 116, 104)  # CLIP's, in whole steps of 255


def png(array: np.ndarray | Image.Image) -> bytes:
    file = io.BytesIO()
    (array if isinstance(array, Image.Image) else Image.fromarray(array)).save(file, "png")
    return file.getvalue()


def noise(width: int, height: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_an_image_of_the_right_size_is_taken_as_it_is():
    image = noise(SIDE, SIDE)
    assert np.array_equal(pixels(png(image), SIDE).transpose(1, 2, 0), image)
    assert pixels(png(image), SIDE).dtype == np.uint8


@pytest.mark.parametrize(("width", "height"), [(30, 10), (10, 30), (30, 13), (30, 29)])
def test_padding_is_centred_and_has_the_mean_colour(width: int, height: int):
    image = noise(width, height)
    padded = pixels(png(image), 30).transpose(1, 2, 0)
    left, top = (30 - width) // 2, (30 - height) // 2
    inside = np.zeros((30, 30), bool)
    inside[top : top + height, left : left + width] = True
    assert np.array_equal(padded[inside].reshape(image.shape), image)
    assert (padded[~inside] == MEAN_COLOUR).all()


@pytest.mark.parametrize(("width", "height"), [(16, 16), (12, 6), (5, 9), (1, 7), (40, 31)])
@pytest.mark.parametrize("size", [8, 16, 33])
def test_pixels_are_those_of_a_padded_square_that_pillow_resized(width: int, height: int, size: int):
    image, side = noise(width, height), max(width, height)
    square = np.empty((side, side, 3), np.uint8)
    square[:] = MEAN_COLOUR
    square[(side - height) // 2 :, (side - width) // 2 :][:height, :width] = image
    expected = np.asarray(Image.fromarray(square).resize((size, size), Image.Resampling.BICUBIC))
    assert np.array_equal(pixels(png(image), size).transpose(1, 2, 0), expected)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1"])
def test_an_image_of_any_mode_has_three_channels(mode: str):
    image = Image.fromarray(noise(SIDE, SIDE)).convert(mode)
    assert np.array_equal(pixels(png(image), SIDE).transpose(1, 2, 0), np.asarray(image.convert("RGB")))


def test_normalised_pixels_are_those_of_clip() -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 4, 5), dtype=np.uint8)
    floats = normalise(torch.from_numpy(images)).numpy()
    for channel in range(3):
        expected = (images[:, channel] / 255 - MEAN[channel]) / STD[channel]
        assert floats[:, channel] == pytest.approx(expected, abs=1e-5)
