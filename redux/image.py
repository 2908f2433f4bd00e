"""An image as the tower reads it: LLaVA-1.5's padded square.  No torch here: readers do without."""

import io

import numpy as np
from jaxtyping import UInt8
from PIL import Image

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
"""Of CLIP's training images, in 0..1 (OpenAI CLIP)."""


def pixels(image: bytes, size: int) -> UInt8[np.ndarray, "3 size size"]:
    """The image file, padded to a square with CLIP's mean colour and resized: LLaVA-1.5's stage 2."""
    with Image.open(io.BytesIO(image)) as opened:
        picture = opened.convert("RGB")
    if picture.size != (size, size):
        side = max(picture.size)
        square = Image.new("RGB", (side, side), tuple(int(mean * 255) for mean in MEAN))
        square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
        picture = square.resize((size, size), Image.Resampling.BICUBIC)
    return np.array(picture).transpose(2, 0, 1)
