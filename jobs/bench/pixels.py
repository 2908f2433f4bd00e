"""Measure the time to make one image's pixels: exact, fast, and from a prepared file.

    python jobs/bench/pixels.py

JPEGs of 640 x 480 like those of a camera, smooth colours with edges and noise, on one core; needs the extra `fast`.
The script prints the result and appends it to pixels.jsonl; only ratios within one run can be compared.
"""

import argparse
import io
import statistics
import time
from collections.abc import Callable, Sequence
from typing import get_args

import numpy as np
import PIL
import simplejpeg
import torch
from PIL import Image

from jobs.bench.record import add_out_option, append_record
from redux.image import load_pixels, prepare_image
from redux.settings import ImageAspectRatio


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=40, help="default: %(default)s")
    parser.add_argument("--size", type=int, default=336, help="default: %(default)s")
    add_out_option(parser, __file__)
    arguments = parser.parse_args(argv)
    # One thread, as in the readers of a stage.
    torch.set_num_threads(1)
    files = [make_photo(seed) for seed in range(arguments.images)]
    times_ms = {
        image_aspect_ratio: measure(files, arguments.size, image_aspect_ratio)
        for image_aspect_ratio in get_args(ImageAspectRatio)
    }
    for image_aspect_ratio, times in times_ms.items():
        print(f"{image_aspect_ratio:5}", *(f"{variant} {ms:.2f} ms  " for variant, ms in times.items()))
    append_record(
        arguments.out,
        versions={module.__name__: module.__version__ for module in (PIL, simplejpeg, torch)},
        images=arguments.images,
        size=arguments.size,
        jpeg_kb=round(statistics.mean(map(len, files)) / 1e3),
        prepared_kb=round(len(prepare_image(files[0], arguments.size)) / 1e3),
        ms=times_ms,
    )


def measure(files: list[bytes], size: int, image_aspect_ratio: ImageAspectRatio) -> dict[str, float]:
    """Measure the median milliseconds of each variant; the variants alternate, so that all see the same load."""
    times: dict[str, list[float]] = {"exact": [], "fast": [], "prepared": []}
    load_pixels(files[0], size, image_aspect_ratio, "fast")  # Libraries that torch loads at first use
    for image in files:
        square = prepare_image(image, size, image_aspect_ratio)
        times["exact"].append(_time_ms(load_pixels, image, size, image_aspect_ratio))
        times["fast"].append(_time_ms(load_pixels, image, size, image_aspect_ratio, "fast"))
        times["prepared"].append(_time_ms(load_pixels, square, size, image_aspect_ratio))
    return {variant: round(statistics.median(values), 3) for variant, values in times.items()}


def make_photo(seed: int, width: int = 640, height: int = 480) -> bytes:
    """Make a JPEG of smooth colours with discs and noise."""
    rng = np.random.default_rng(seed)
    colours = Image.fromarray(rng.integers(0, 256, (height // 40, width // 40, 3), dtype=np.uint8))
    picture = np.array(colours.resize((width, height), Image.Resampling.BICUBIC), dtype=float)
    y, x = np.ogrid[:height, :width]
    for _ in range(20):
        disc = np.hypot(x - rng.uniform(0, width), y - rng.uniform(0, height)) < rng.uniform(20, 120)
        picture[disc] = picture[disc] / 2 + rng.uniform(0, 128, 3)
    picture += rng.normal(0, 6, picture.shape)
    file = io.BytesIO()
    Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(file, "jpeg", quality=90)
    return file.getvalue()


def _time_ms(function: Callable[..., object], *arguments: object, repeats: int = 3) -> float:
    """Measure the shortest of several times, because other load only adds to a time."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function(*arguments)
        times.append(time.perf_counter() - start)
    return min(times) * 1e3


if __name__ == "__main__":
    main()
