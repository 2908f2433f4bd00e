"""Random odd records and images from a seed: valid ones with a few typical errors."""

import io
import json
import random
from typing import Any

from PIL import Image

TEXTS = [
    "",
    " ",
    "red",
    "What?",
    "<image>",
    "<image>\nWhat?",
    "What? <image>",
    "<video>\n",
    "<Image>",
    "<|audio_bos|>",
    "a" * 9000,
    "\ud83d",
    "\udcff",
    "é",
    "e\u0301",
    "\0",
    "\u2028",
    "</s>",
    "<s>",
    "ASSISTANT:",
    "\x7f\x1b[31m",
    "null",
    "../a",
    "<" * 99,
]
VALUES = [
    None,
    True,
    False,
    0,
    -1,
    7.5,
    1e308,
    float("nan"),
    float("inf"),
    -float("inf"),
    10**400,
    [],
    {},
    [[]],
    {"": {}},
    [None],
    {"a": []},
]
FIELDS = [
    "id",
    "image",
    "conversations",
    "video",
    "images",
    "audio_path",
    "Image",
    "model",
    "",
    "\ud83d",
    "from",
    "value",
]
PATHS = [
    "a.jpg",
    "a.png",
    "b.jpg",
    "none.jpg",
    "",
    ".",
    "..",
    "/",
    "../a.jpg",
    "/etc/passwd",
    "./a.jpg",
    "A.JPG",
    "sub\\a.jpg",
    "a\0",
    "\ud83d",
    "x" * 5000,
    "s3://b/c",
    "file:///etc/passwd",
    "http://[",
    "a.jpg/b",
    "cut.jpg",
    "data:,a",
    "a.jpg?b#c",
    "%2e%2e/a.jpg",
]
RAW = ["9" * 5000, "[" * 3000 + "]" * 3000, '{"a":' * 3000 + "1" + "}" * 3000, '"\\ud83d"', "1e999", "-0", '"]},{["']
"""JSON that Python misreads or cannot read."""


def picture(kind: str = "JPEG", side: int = 16, mode: str = "RGB", **how: Any) -> bytes:
    sink = io.BytesIO()
    Image.effect_noise((side, side + 3), 60).convert(mode).save(sink, kind, **how)
    return sink.getvalue()


def _value(rng: random.Random) -> Any:
    return rng.choice([rng.choice(VALUES), rng.choice(TEXTS), rng.choice(PATHS), rng.randrange(9)])


def _turns(rng: random.Random, with_image: bool) -> list[Any]:
    turns = [
        {"from": ("human", "gpt")[number % 2], "value": f"{rng.random()}"} for number in range(2 * rng.randint(1, 3))
    ]
    if with_image:
        turns[0]["value"] = f"<image>\n{turns[0]['value']}"
    return turns


def odd_record(rng: random.Random) -> str:
    """Make the JSON of a random record. About half of them are valid."""
    record: dict[str, Any] = {"id": str(rng.randrange(10**6))}
    if rng.random() < 0.6:
        record["image"] = rng.choice(PATHS if rng.random() < 0.3 else PATHS[:3])
    record["conversations"] = turns = _turns(rng, "image" in record)
    for _ in range(rng.choice([0, 0, 0, 1, 1, 2, 3])):
        match rng.randrange(7):
            case 0:
                record[rng.choice(FIELDS)] = _value(rng)
            case 1:
                record.pop(rng.choice(list(record)), None)
            case 2 if turns:
                turns[rng.randrange(len(turns))] = _value(rng)
            case 3 if turns:
                turn = rng.choice(turns)
                if isinstance(turn, dict):
                    turn[rng.choice(["from", "value", *FIELDS])] = _value(rng)
            case 4 if turns:
                turn = rng.choice(turns)
                if isinstance(turn, dict) and isinstance(turn.get("value"), str):
                    turn["value"] += rng.choice(TEXTS)
            case 5 if turns:
                del turns[rng.randrange(len(turns))]
            case 6:
                record[rng.choice(FIELDS)] = {"raw": "RAW"}
    text = json.dumps(_value(rng) if rng.random() < 0.03 else record)
    return text.replace('{"raw": "RAW"}', rng.choice(RAW))


KINDS = [
    ("JPEG", {}),
    ("JPEG", {"mode": "L"}),
    ("JPEG", {"mode": "CMYK"}),
    ("JPEG", {"progressive": True}),
    ("PNG", {}),
    ("PNG", {"mode": "P"}),
    ("PNG", {"mode": "1"}),
    ("PNG", {"mode": "LA"}),
    ("PNG", {"mode": "I;16"}),
    ("GIF", {}),
    ("WEBP", {}),
    ("WEBP", {"lossless": True}),
    ("BMP", {}),
    ("TIFF", {}),
    ("TIFF", {"compression": "tiff_lzw"}),
    ("TIFF", {"mode": "F"}),
    ("PPM", {}),
    ("ICO", {}),
    ("TGA", {}),
    ("JPEG2000", {}),
    ("AVIF", {}),
    ("PCX", {}),
    ("SGI", {}),
    ("DDS", {}),
    ("MPO", {}),
    ("IM", {}),
    ("SPIDER", {"mode": "F"}),
]
_MADE: list[bytes] = []


def odd_image(rng: random.Random) -> bytes:
    """Make the bytes of an image: complete, truncated, or changed in a few places."""
    if not _MADE:
        _MADE.extend(picture(kind, **how) for kind, how in KINDS)
    data = bytearray(rng.choice(_MADE))
    match rng.randrange(8):
        case 0:
            del data[rng.randrange(len(data) + 1) :]
        case 1:
            del data[: rng.randrange(len(data))]
        case 2:
            for _ in range(rng.randint(1, 40)):
                data[rng.randrange(len(data))] = rng.randrange(256)
        case 3:  # sizes and lengths stand in the head
            for _ in range(rng.randint(1, 8)):
                data[rng.randrange(min(len(data), 64))] = rng.choice([0, 1, 127, 128, 255])
        case 4:
            at = rng.randrange(len(data))
            data[at:at] = rng.randbytes(rng.randint(1, 64))
        case 5:
            other, at = rng.choice(_MADE), rng.randrange(len(data))
            data[at:] = other[min(at, len(other)) :]
        case 6:
            data[:] = rng.randbytes(rng.randrange(200))
    return bytes(data)
