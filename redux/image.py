"""An image as the tower reads it: LLaVA-1.5's cropped or padded square.  No torch here: readers do without.

Scores compare with LLaVA's only where its pixels are the same to the bit, and a resize by another library differs, so
the default is Pillow's: 6 ms for a photo of 640 x 480 at 336, on one core.  Those who feed more images than that
decode JPEGs by simplejpeg, to the same bits, and resize by torch, which rounds otherwise: 2.5 ms (way="fast").  Those
who read them more than once prepare them once: 0.3 ms, the same bits again.  jobs/bench/pixels.py measures all three.

The square stays uint8, a quarter of the bytes of floats; normalising to MEAN and STD is left to redux.model.
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
"""Of CLIP's training images, in 0..1 (OpenAI CLIP)."""

RgbImage = UInt8[np.ndarray, "_ _ 3"]
"""Height, width and RGB."""


def load_pixels(
    image: bytes, size: int, image_aspect_ratio: ImageAspectRatio = "pad", way: ImageBackend = "exact"
) -> UInt8[np.ndarray, "3 size size"]:
    """The image file as RGB, padded or cropped to a square and resized to size x size pixels.

    "exact" equals LLaVA-1.5 to the bit: Image.convert("RGB"), thus no turning by EXIF and transparency dropped, for
    "pad" its expand2square, then transformers' CLIP image processor on Pillow.  "fast" differs from it by at most 2 of
    255 levels, by 0.004 on average in photos, and needs the extra `fast`.

    ValueError: no image, a truncated one, or one that Pillow takes for a decompression bomb, also after padding or
    resizing.  A JPEG damaged in its middle is what Pillow makes of it, partly grey, as it is for LLaVA.
    """
    picture = _decode_jpeg(image) if way == "fast" else decode_rgb(image)
    if picture.shape[:2] != (size, size):  # neither would change those
        if image_aspect_ratio == "pad":
            picture = _pad_to_square(picture)
        picture = _resize_and_crop(picture, size, way)
    return picture.transpose(2, 0, 1)


def prepare_image(image: bytes, size: int, image_aspect_ratio: ImageAspectRatio = "pad") -> bytes:
    """The image file made into what `pixels` takes as it is: a PPM file of those pixels, 3 size² bytes and a header.

    At 336 that is 339 kB and 0.3 ms to load.  Of the formats that keep every bit and that WebDataset decodes, BMP, TGA
    and TIFF are no smaller; PNG takes 150 kB and 4 ms, WebP 110 to 150 kB and 3 ms, half the time from the JPEG.
    """
    return (
        b"P6\n%d %d\n255\n" % (size, size) + load_pixels(image, size, image_aspect_ratio).transpose(1, 2, 0).tobytes()
    )


def decode_rgb(image: bytes) -> RgbImage:
    """The image file as Pillow reads it; ValueError as `pixels`."""
    try:
        with Image.open(io.BytesIO(image)) as opened:
            return np.array(opened.convert("RGB"))
    except UnidentifiedImageError:
        raise ValueError(f"not an image that Pillow knows: {len(image)} bytes that begin with {image[:8]!r}") from None
    except MemoryError:
        raise
    except Exception as error:  # OSError, SyntaxError, struct.error, ...: each format of Pillow's has its own
        raise ValueError(f"an image that Pillow cannot read: {type(error).__name__}: {error}") from error


def _decode_jpeg(image: bytes) -> RgbImage:
    """What `rgb` returns and raises, in two thirds of its time for a JPEG.

    Both decode by libjpeg-turbo with the same settings, equal to the bit for each subsampling, grey, progressive.
    """
    try:
        import simplejpeg
    except ImportError as error:
        raise ValueError(f'way="fast" needs simplejpeg: {write_install_command("fast")}') from error
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(image)
        _check_size(height, width)
        if colours not in ("CMYK", "YCCK"):  # Pillow's way to RGB is another
            return simplejpeg.decode_jpeg(image)
    except ValueError:  # no JPEG, too large, or damaged, which Pillow may forgive: its word counts
        pass
    return decode_rgb(image)


def _pad_to_square(picture: RgbImage) -> UInt8[np.ndarray, "side side 3"]:
    """The picture amid a square of CLIP's mean colour; LLaVA's expand2square (llava/mm_utils.py)."""
    height, width, _ = picture.shape
    side = max(height, width)
    _check_size(side, side)
    square = np.empty((side, side, 3), np.uint8)
    square[:] = np.tile(
        [np.uint8(mean * 255) for mean in CLIP_MEAN], (side, 1)
    )  # numpy is slow to repeat single pixels
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = picture
    return square


def _resize_and_crop(picture: RgbImage, size: int, way: ImageBackend) -> UInt8[np.ndarray, "size size 3"]:
    """The middle of the picture, its shorter edge resized to size; transformers' CLIPImageProcessorPil."""
    short = min(picture.shape[:2])
    height, width = (size * edge // short for edge in picture.shape[:2])
    _check_size(height, width)
    resized = (
        _resize_with_torch(picture, height, width) if way == "fast" else _resize_with_pillow(picture, height, width)
    )
    top, left = (height - size) // 2, (width - size) // 2
    return resized[top : top + size, left : left + size]


def _resize_with_pillow(picture: RgbImage, height: int, width: int) -> RgbImage:
    """Across, then down, as Pillow always did; from 13 on it takes tall pictures down first (its pull request 9549)."""
    across = Image.fromarray(picture).resize((width, len(picture)), Image.Resampling.BICUBIC)
    return np.array(across.resize((width, height), Image.Resampling.BICUBIC))


def _resize_with_torch(picture: RgbImage, height: int, width: int) -> RgbImage:
    """Pillow's algorithm in weights of 16 bits, with vector instructions."""
    import torch
    from torch.nn.functional import interpolate

    channels = torch.from_numpy(picture).permute(2, 0, 1).unsqueeze(0)
    return interpolate(channels, (height, width), mode="bicubic", antialias=True)[0].permute(1, 2, 0).numpy()


def _check_size(height: int, width: int) -> None:
    """ValueError beyond Pillow's own limit, which it applies to the file only."""
    if height * width > 2 * (Image.MAX_IMAGE_PIXELS or math.inf):
        raise ValueError(f"an image too large or too long: {width} x {height} pixels")
