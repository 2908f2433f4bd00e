"""The tower gets LLaVA's pixels, to the bit: what transformers' CLIP processor makes of its padded or whole picture."""

import io
import re
import subprocess
import sys
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from redux.extras import write_install_command
from redux.image import CLIP_MEAN, CLIP_STD, load_pixels, prepare_image
from redux.model import normalize_pixels
from redux.settings import ImageAspectRatio, ImageBackend

SIDE = 16
MEAN_COLOUR = (122, 116, 104)  # CLIP's, in whole steps of 255
FITS: list[ImageAspectRatio] = ["pad", "crop"]
SEEDS = range(40)

every_fit = pytest.mark.parametrize("image_aspect_ratio", FITS)


def file(picture: Image.Image, kind: str = "png", **options: object) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth colours, an edge, and the noise of a sensor."""
    picture = np.array(noise(width // 40 + 1, height // 40 + 1, seed).resize((width, height)), dtype=float)
    picture[height // 3 :, width // 4 : width // 2] /= 2
    picture += np.random.default_rng(seed).normal(0, 6, picture.shape)
    return Image.fromarray(picture.clip(0, 255).astype(np.uint8))


def shape(seed: int) -> tuple[int, int, int]:
    """Width, height and size by chance, small ones and long ones as often as others."""
    chance = np.random.default_rng(seed)
    width, height = np.exp(chance.uniform(0, 5.5, 2)).astype(int).tolist()
    return width, height, int(chance.choice([1, 8, 33, 98]))


def llava(image: bytes, size: int, image_aspect_ratio: ImageAspectRatio) -> np.ndarray:
    """LLaVA's dataset, its expand2square, and its processor but for the floats."""
    picture = Image.open(io.BytesIO(image)).convert("RGB")
    picture.info.pop("transparency", None)  # Where it is left, transformers 5 makes white of it; LLaVA's 4.37 did not
    if image_aspect_ratio == "pad":
        width, height = picture.size
        if width > height:
            square = Image.new("RGB", (width, width), MEAN_COLOUR)
            square.paste(picture, (0, (width - height) // 2))
            picture = square
        elif height > width:
            square = Image.new("RGB", (height, height), MEAN_COLOUR)
            square.paste(picture, ((height - width) // 2, 0))
            picture = square
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": size},
        crop_size={"height": size, "width": size},
        do_rescale=False,
        do_normalize=False,
    )
    with mock.patch.object(Image.Image, "resize", across_then_down):
        return processor(picture)["pixel_values"][0]


whole_resize = Image.Image.resize


def across_then_down(picture: Image.Image, size: tuple[int, int], resample: int, reducing_gap: None) -> Image.Image:
    """Resizing as before Pillow 13, which resizes a picture more than twice as high as wide down first."""
    return whole_resize(whole_resize(picture, (size[0], picture.height), resample), size, resample)


def apart(image: bytes, size: int, image_aspect_ratio: ImageAspectRatio) -> np.ndarray:
    """By how many of 255 levels the fast way is off."""
    return np.abs(
        load_pixels(image, size, image_aspect_ratio, "fast").astype(int) - load_pixels(image, size, image_aspect_ratio)
    )


@every_fit
@pytest.mark.parametrize("seed", SEEDS)
def test_pixels_are_llavas(seed: int, image_aspect_ratio: ImageAspectRatio):
    width, height, size = shape(seed)
    image = file(noise(width, height, seed))
    got = load_pixels(image, size, image_aspect_ratio)
    assert got.dtype == np.uint8
    assert np.array_equal(got, llava(image, size, image_aspect_ratio))


@every_fit
@pytest.mark.parametrize(("width", "height"), [(640, 480), (480, 640), (500, 333), (336, 336), (337, 336), (336, 335)])
def test_pixels_of_a_photo_are_llavas(width: int, height: int, image_aspect_ratio: ImageAspectRatio):
    image = file(photo(width, height), "jpeg")
    assert np.array_equal(load_pixels(image, 336, image_aspect_ratio), llava(image, 336, image_aspect_ratio))


@every_fit
@pytest.mark.parametrize("size", [1, 7, 16])
@pytest.mark.parametrize(("width", "height"), [(1, 1), (1, 2), (1, 700), (700, 1), (3, 200), (200, 3)])
def test_pixels_of_a_tiny_or_long_image_are_llavas(
    width: int, height: int, size: int, image_aspect_ratio: ImageAspectRatio
):
    image = file(noise(width, height))
    assert np.array_equal(load_pixels(image, size, image_aspect_ratio), llava(image, size, image_aspect_ratio))


def of_mode(mode: str) -> bytes:
    picture, levels = photo(50, 30), np.arange(1500).reshape(30, 50)
    match mode:
        case "CMYK":
            return file(picture.convert("CMYK"), "jpeg")
        case "16 bits":
            return file(Image.fromarray((levels * 43).astype(np.uint16)))
        case "32 bits":
            return file(Image.fromarray(levels.astype(np.int32)), "tiff")
        case "P with one transparent":
            return file(picture.quantize(30), transparency=3)
        case "P with some transparent":
            return file(picture.quantize(30), transparency=bytes(range(0, 240, 8)))
        case "RGB with one transparent":
            return file(picture, transparency=picture.getpixel((0, 0)))
        case "animated":
            return file(picture.quantize(30), "gif", save_all=True, append_images=[photo(50, 30, 1).quantize(30)])
        case "EXIF":
            exif = Image.Exif()
            exif[274] = 6  # Turned by a quarter
            return file(picture, "jpeg", exif=exif)
    return file(picture.convert(mode))


TRANSPARENT = ["P with one transparent", "P with some transparent", "RGB with one transparent"]
MODES = ["L", "LA", "P", "1", "RGBA", "CMYK", "16 bits", "32 bits", *TRANSPARENT, "animated", "EXIF"]


@every_fit
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.filterwarnings("ignore:Palette images with Transparency")  # Pillow's advice
def test_pixels_of_any_mode_are_llavas(mode: str, image_aspect_ratio: ImageAspectRatio):
    image = of_mode(mode)
    assert np.array_equal(load_pixels(image, SIDE, image_aspect_ratio), llava(image, SIDE, image_aspect_ratio))
    assert apart(image, SIDE, image_aspect_ratio).max() <= 2


@every_fit
def test_an_image_of_the_right_size_is_taken_as_it_is(image_aspect_ratio: ImageAspectRatio):
    picture = noise(SIDE, SIDE)
    assert np.array_equal(load_pixels(file(picture), SIDE, image_aspect_ratio).transpose(1, 2, 0), np.asarray(picture))


@every_fit
@pytest.mark.parametrize("seed", SEEDS)
def test_the_fast_way_is_at_most_two_levels_off(seed: int, image_aspect_ratio: ImageAspectRatio):
    width, height, size = shape(seed)
    assert apart(file(noise(width, height, seed), "ppm"), size, image_aspect_ratio).max() <= 2


@every_fit
def test_the_fast_way_is_hardly_off_in_a_photo(image_aspect_ratio: ImageAspectRatio):
    levels = np.stack([apart(file(photo(640, 480, seed), "jpeg"), 336, image_aspect_ratio) for seed in range(3)])
    assert levels.max() <= 2
    assert levels.mean() < 0.01


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0", "4:1:1", "grey", "CMYK", "RGB"])
def test_the_fast_way_decodes_a_jpeg_as_pillow_does(subsampling: str, progressive: bool):
    picture, options = photo(99, 99), {"quality": 90, "progressive": progressive}
    match subsampling:
        case "grey":
            image = file(picture.convert("L"), "jpeg", **options)
        case "CMYK":
            image = file(picture.convert("CMYK"), "jpeg", **options)
        case "RGB":
            image = file(picture, "jpeg", keep_rgb=True, **options)
        case _:
            image = file(picture, "jpeg", subsampling=subsampling, **options)
    assert np.array_equal(load_pixels(image, 99, backend="fast"), load_pixels(image, 99))


@every_fit
@pytest.mark.parametrize("seed", SEEDS[:10])
def test_a_prepared_image_has_the_same_pixels(seed: int, image_aspect_ratio: ImageAspectRatio):
    width, height, size = shape(seed)
    image = file(noise(width, height, seed))
    expected, stored = load_pixels(image, size, image_aspect_ratio), prepare_image(image, size, image_aspect_ratio)
    for again in FITS:
        assert np.array_equal(load_pixels(stored, size, again), expected)
        assert np.array_equal(load_pixels(stored, size, again, "fast"), expected)


def test_a_prepared_image_is_one_to_webdataset():
    from webdataset.autodecode import imagehandler

    image = file(noise(30, 20))
    assert np.array_equal(
        imagehandler("rgb8")("ppm", prepare_image(image, SIDE)), load_pixels(image, SIDE).transpose(1, 2, 0)
    )


KINDS = ["jpeg", "png", "gif", "bmp", "ppm", "tiff", "webp"]


@pytest.mark.parametrize("way", ["exact", "fast"])
@pytest.mark.parametrize("left", [0.01, 0.3, 0.6, 0.95])
@pytest.mark.parametrize(("kind", "options"), [("jpeg", {"progressive": True}), *((kind, {}) for kind in KINDS)])
@pytest.mark.filterwarnings("ignore:Truncated File Read")  # Pillow says it of TIFF twice
def test_a_truncated_image_is_an_error(kind: str, options: dict[str, bool], left: float, way: ImageBackend):
    image = file(photo(60, 40), kind, **options)
    with pytest.raises(ValueError, match=r"^an image that Pillow cannot read: |^not an image that Pillow knows: "):
        load_pixels(image[: int(left * len(image))], SIDE, backend=way)


def test_an_error_says_what_is_wrong():
    with pytest.raises(ValueError, match=r"^not an image that Pillow knows: 5 bytes that begin with b'<html'$"):
        load_pixels(b"<html", SIDE)
    with pytest.raises(ValueError, match=r"^an image that Pillow cannot read: OSError: .*truncated"):
        load_pixels(file(noise(30, 30), "jpeg")[:-50], SIDE)


@pytest.mark.parametrize("way", ["exact", "fast"])
@pytest.mark.parametrize("kind", ["jpeg", "png"])
def test_a_decompression_bomb_is_an_error(kind: str, way: ImageBackend, monkeypatch: pytest.MonkeyPatch):
    image = file(Image.new("RGB", (40, 30)), kind)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 599)
    with pytest.raises(ValueError, match="DecompressionBombError: Image size \\(1200 pixels\\) exceeds limit"):
        load_pixels(image, SIDE, backend=way)


def test_an_image_too_long_to_pad_or_to_crop_is_an_error():
    image = file(noise(1, 14_000))
    with pytest.raises(ValueError, match="too large or too long: 14000 x 14000 pixels"):
        load_pixels(image, SIDE)
    with pytest.raises(ValueError, match="too large or too long: 336 x 4704000 pixels"):
        load_pixels(image, 336, "crop")


def test_the_fast_way_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "simplejpeg", None)
    with pytest.raises(ValueError, match=re.escape(write_install_command("fast"))):
        load_pixels(file(noise(8, 8)), SIDE, backend="fast")


@pytest.mark.integration
def test_the_exact_way_does_without_torch():
    read = "import sys; from redux.image import load_pixels; load_pixels(sys.stdin.buffer.read(), 4)"
    code = f"{read}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], input=file(noise(8, 6)), check=True)


def test_normalised_pixels_are_those_of_clip() -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 4, 5), dtype=np.uint8)
    floats = normalize_pixels(torch.from_numpy(images)).numpy()
    for channel in range(3):
        expected = (images[:, channel] / 255 - CLIP_MEAN[channel]) / CLIP_STD[channel]
        assert floats[:, channel] == pytest.approx(expected, abs=1e-5)
