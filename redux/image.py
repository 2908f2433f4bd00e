"""Pixels for the image tower: LLaVA-1.5's cropped or padded square. Does not import torch, which readers do without.

Scores are comparable with LLaVA's only if the pixels are bit-equal, and other libraries resize differently. So the
default is Pillow: 6 ms for a photo of 640 x 480 at 336 pixels, on one core. With backend "fast", simplejpeg decodes
JPEGs to the same bits, and torch resizes with other rounding: 2.5 ms. Images that are read more than once can be
prepared once: then 0.3 ms, with the same bits as Pillow. jobs/bench/pixels.py measures all three.

The square stays uint8, a quarter of the bytes of floats. `redux.model.normalize_pixels` normalises it.
"""

import io
import math

import numpy as np
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError

from redux.extras import write_install_command
from redux.settings import ImageAspectRatio, ImageBackend

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
"""Mean and deviation of CLIP's training images, in 0..1 (OpenAI CLIP)."""

RgbImage = UInt8[np.ndarray, "_ _ 3"]
"""Height, width and RGB."""


def load_pixels(
    image: bytes, size: int, image_aspect_ratio: ImageAspectRatio = "pad", backend: ImageBackend = "exact"
) -> UInt8[np.ndarray, "3 size size"]:
    """Decode an image file, make it square and resize it.

    Backend "exact" is bit-equal to LLaVA-1.5: Image.convert("RGB"), which ignores EXIF rotation and drops transparency;
    for "pad" LLaVA's expand2square; then transformers' CLIP image processor on Pillow. "fast" differs by at most 2 of
    255 levels, by 0.004 on average in photos, and needs the extra `fast`.

    Args:
        image: encoded image file.
        size: side of the result in pixels.
        image_aspect_ratio: "pad" or "crop".
        backend: "exact" or "fast".

    Raises:
        ValueError: the file is not an image, is truncated, or is too large for Pillow's limit against decompression
            bombs, also after padding or resizing. A JPEG with damage in its middle is partly grey, as for LLaVA.
    """
    return square_pixels(
        _decode_jpeg(image) if backend == "fast" else decode_rgb(image), size, image_aspect_ratio, backend
    )


def square_pixels(
    pixels: RgbImage, size: int, image_aspect_ratio: ImageAspectRatio, backend: ImageBackend = "exact"
) -> UInt8[np.ndarray, "3 size size"]:
    """Make a decoded image square and resize it; arguments and errors as `load_pixels`."""
    if pixels.shape[:2] != (size, size):  # A prepared image needs neither step
        if image_aspect_ratio == "pad":
            pixels = _pad_to_square(pixels)
        pixels = _resize_and_crop(pixels, size, backend)
    return pixels.transpose(2, 0, 1)


def prepare_image(image: bytes, size: int, image_aspect_ratio: ImageAspectRatio = "pad") -> bytes:
    """Write the pixels of `load_pixels` as a PPM file, which `load_pixels` reads without change.

    The file has 3 size² bytes and a header: at 336 pixels 339 kB, loaded in 0.3 ms. Among the lossless formats that
    WebDataset decodes, BMP, TGA and TIFF are no smaller. PNG takes 150 kB and 4 ms, WebP 110 to 150 kB and 3 ms, half
    the time of the JPEG.
    """
    return (
        b"P6\n%d %d\n255\n" % (size, size) + load_pixels(image, size, image_aspect_ratio).transpose(1, 2, 0).tobytes()
    )


def decode_rgb(image: bytes) -> RgbImage:
    """Decode an image file with Pillow; ValueError as `load_pixels`."""
    try:
        with Image.open(io.BytesIO(image)) as opened:
            return np.array(opened.convert("RGB"))
    except UnidentifiedImageError:
        raise ValueError(f"not an image that Pillow knows: {len(image)} bytes that begin with {image[:8]!r}") from None
    except MemoryError:
        raise
    except Exception as error:  # Each of Pillow's formats has its own: OSError, SyntaxError, struct.error, ...
        raise ValueError(f"an image that Pillow cannot read: {type(error).__name__}: {error}") from error


def _decode_jpeg(image: bytes) -> RgbImage:
    """Decode an image file as `decode_rgb`, in two thirds of its time for a JPEG.

    Both use libjpeg-turbo with the same settings, bit-equal for each subsampling, for grey and for progressive files.
    """
    try:
        import simplejpeg
    except ImportError as error:
        raise ValueError(f"image_backend: got fast, which needs simplejpeg: {write_install_command('fast')}") from error
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(image)
        _check_size(height, width)
        if colours not in ("CMYK", "YCCK"):  # Pillow converts these to RGB differently
            return simplejpeg.decode_jpeg(image)
    except ValueError:  # No JPEG, too large, or damaged; Pillow decides, since it reads some damaged files
        pass
    return decode_rgb(image)


def _pad_to_square(pixels: RgbImage) -> UInt8[np.ndarray, "side side 3"]:
    """Centre the image in a square of CLIP's mean colour: LLaVA's expand2square (llava/mm_utils.py)."""
    height, width, _ = pixels.shape
    side = max(height, width)
    _check_size(side, side)
    square = np.empty((side, side, 3), np.uint8)
    square[:] = np.tile(
        [np.uint8(mean * 255) for mean in CLIP_MEAN], (side, 1)
    )  # numpy is slow to repeat single pixels
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = pixels
    return square


def _resize_and_crop(pixels: RgbImage, size: int, backend: ImageBackend) -> UInt8[np.ndarray, "size size 3"]:
    """Resize the shorter edge to size and crop the centre: transformers' CLIPImageProcessorPil."""
    short = min(pixels.shape[:2])
    # Rounded down as transformers does, for equal bits.
    height, width = (size * edge // short for edge in pixels.shape[:2])
    _check_size(height, width)
    resized = (
        _resize_with_torch(pixels, height, width) if backend == "fast" else _resize_with_pillow(pixels, height, width)
    )
    top, left = (height - size) // 2, (width - size) // 2
    return resized[top : top + size, left : left + size]


def _resize_with_pillow(pixels: RgbImage, height: int, width: int) -> RgbImage:
    """Resize the width, then the height.

    Pillow 13 resizes the height of tall images first (its pull request 9549), with other bits; two calls keep the
    order of earlier versions.
    """
    across = Image.fromarray(pixels).resize((width, len(pixels)), Image.Resampling.BICUBIC)
    return np.array(across.resize((width, height), Image.Resampling.BICUBIC))


def _resize_with_torch(pixels: RgbImage, height: int, width: int) -> RgbImage:
    """Resize with torch: Pillow's algorithm with weights of 16 bits and vector instructions."""
    import torch
    from torch.nn.functional import interpolate

    channels = torch.from_numpy(pixels).permute(2, 0, 1).unsqueeze(0)
    return interpolate(channels, (height, width), mode="bicubic", antialias=True)[0].permute(1, 2, 0).numpy()


def _check_size(height: int, width: int) -> None:
    """Raise a ValueError beyond Pillow's limit, which Pillow checks for the file only, not for resized images."""
    if height * width > 2 * (Image.MAX_IMAGE_PIXELS or math.inf):
        raise ValueError(f"an image too large or too long: {width} x {height} pixels")
