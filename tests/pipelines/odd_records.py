"""Seeded odd records and images: sound ones with a few things changed in the ways that files go wrong."""

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
"""JSON that Python reads badly, or not at all."""


def picture(kind: str = "JPEG", side: int = 16, mode: str = "RGB", **how: Any) -> bytes:
    sink = io.BytesIO()
    Image.effect_noise((side, side + 3), 60).convert(mode).save(sink, kind, **how)
    return sink.getvalue()


def _value(chance: random.Random) -> Any:
    return chance.choice([chance.choice(VALUES), chance.choice(TEXTS), chance.choice(PATHS), chance.randrange(9)])


def _turns(chance: random.Random, with_image: bool) -> list[Any]:
    turns = [
        {"from": ("human", "gpt")[number % 2], "value": f"{chance.random()}"}
        for number in range(2 * chance.randint(1, 3))
    ]
    if with_image:
        turns[0]["value"] = f"<image>\n{turns[0]['value']}"
    return turns


def odd_record(chance: random.Random) -> str:
    """The JSON of a record, of which about half are sound."""
    record: dict[str, Any] = {"id": str(chance.randrange(10**6))}
    if chance.random() < 0.6:
        record["image"] = chance.choice(PATHS if chance.random() < 0.3 else PATHS[:3])
    record["conversations"] = turns = _turns(chance, "image" in record)
    for _ in range(chance.choice([0, 0, 0, 1, 1, 2, 3])):
        match chance.randrange(7):
            case 0:
                record[chance.choice(FIELDS)] = _value(chance)
            case 1:
                record.pop(chance.choice(list(record)), None)
            case 2 if turns:
                turns[chance.randrange(len(turns))] = _value(chance)
            case 3 if turns:
                turn = chance.choice(turns)
                if isinstance(turn, dict):
                    turn[chance.choice(["from", "value", *FIELDS])] = _value(chance)
            case 4 if turns:
                turn = chance.choice(turns)
                if isinstance(turn, dict) and isinstance(turn.get("value"), str):
                    turn["value"] += chance.choice(TEXTS)
            case 5 if turns:
                del turns[chance.randrange(len(turns))]
            case 6:
                record[chance.choice(FIELDS)] = {"raw": "RAW"}
    text = json.dumps(_value(chance) if chance.random() < 0.03 else record)
    return text.replace('{"raw": "RAW"}', chance.choice(RAW))


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


def odd_image(chance: random.Random) -> bytes:
    """The bytes of an image: whole, cut, or changed in a few places."""
    if not _MADE:
        _MADE.extend(picture(kind, **how) for kind, how in KINDS)
    data = bytearray(chance.choice(_MADE))
    match chance.randrange(8):
        case 0:
            del data[chance.randrange(len(data) + 1) :]
        case 1:
            del data[: chance.randrange(len(data))]
        case 2:
            for _ in range(chance.randint(1, 40)):
                data[chance.randrange(len(data))] = chance.randrange(256)
        case 3:  # sizes and lengths stand in the head
            for _ in range(chance.randint(1, 8)):
                data[chance.randrange(min(len(data), 64))] = chance.choice([0, 1, 127, 128, 255])
        case 4:
            at = chance.randrange(len(data))
            data[at:at] = chance.randbytes(chance.randint(1, 64))
        case 5:
            other, at = chance.choice(_MADE), chance.randrange(len(data))
            data[at:] = other[min(at, len(other)) :]
        case 6:
            data[:] = chance.randbytes(chance.randrange(200))
    return bytes(data)
