"""Records of LLaVA's JSON form: what one must be, and why one is not.

    [{"id": "33471", "image": "coco/33471.jpg", "conversations": [{"from": "human", "value": "<image>\\n…"},
      {"from": "gpt", "value": "…"}, …]}, …]           a record without `image` is text alone

The mixtures are put together from dozens of sources by hand, and training on them fails hours later, or learns from
empty answers without a word.  So everything that can be told without a model is told here, once, when shards are made:
the record by `fault`, its image file by `image_fault`, each with one of REASONS.  Ids repeat in LLaVA's own mixtures
(several conversations about one image), so only a record that is the same as an earlier one in everything is a
duplicate.
"""

import io
import json
import posixpath
import warnings
from typing import Any

from PIL import Image

from redux.conversation import IMAGE

REASONS = {
    "malformed": "not an object with an id and conversations, or values of other types than LLaVA's",
    "duplicate": "the same as an earlier record in everything",
    "roles": "turns are not human and gpt by turns, from a human's to a gpt's",
    "empty turn": "somebody says nothing",
    "image without tag": "there is an image, but no turn has <image>",
    "tag without image": "a turn has <image>, but there is no image",
    "tags": "there is one image, but <image> more than once",
    "too long": "more text than asked for",
    "outside": "the image's path leads out of the image folder",
    "missing image": "there is no such file",
    "mislabelled image": "the file is of another format than its name says",
    "broken image": "the file is truncated, no image that Pillow reads, or too large a one",
}
"""Why a record is kept out of the shards."""

FORMATS = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".gif": "GIF", ".webp": "WEBP", ".bmp": "BMP"}
"""Format by suffix of the name."""


def read(text: bytes, name: str) -> list[Any]:
    """The records of a JSON file, unchecked.  ValueError where it is no list."""
    try:
        records = json.loads(text)
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{name}: not JSON: {error}") from None
    if not isinstance(records, list):
        raise ValueError(f"{name}: got {type(records).__name__}, allowed: a list of records")
    return records


def fault(record: Any, words: int | None) -> str | None:
    """The reason to keep a record out, its image file apart; None for a good one.

    words: at most so many, of all turns together, as LLaVA counts lengths.
    """
    if not _is_record(record):
        return "malformed"
    turns = record["conversations"]
    said = [turn["value"] for turn in turns]
    tags = sum(value.count(IMAGE) for value in said)
    if [turn["from"] for turn in turns] != ["human", "gpt"] * (len(turns) // 2) or not turns:
        return "roles"
    if any(not value.replace(IMAGE, "").strip() for value in said[1:]):
        return "empty turn"
    if not tags and not said[0].strip():
        return "empty turn"
    if "image" in record and not tags:
        return "image without tag"
    if "image" not in record and tags:
        return "tag without image"
    if tags > 1:
        return "tags"
    if words is not None and length(record) > words:
        return "too long"
    if "image" in record and inside(record["image"]) is None:
        return "outside"
    return None


def _is_record(record: Any) -> bool:
    return (
        isinstance(record, dict)
        and isinstance(record.get("id"), str | int)
        and isinstance(record.get("image", ""), str)
        and isinstance(record.get("conversations"), list)
        and all(
            isinstance(turn, dict) and isinstance(turn.get("from"), str) and isinstance(turn.get("value"), str)
            for turn in record["conversations"]
        )
    )


def length(record: dict) -> int:
    """Words of all turns, as LLaVA groups by."""
    return sum(len(turn["value"].replace(IMAGE, "").split()) for turn in record["conversations"])


def inside(path: str) -> str | None:
    """The path within the image folder; None for one that leads out of it."""
    normal = posixpath.normpath(path.replace("\\", "/"))
    return None if normal.startswith("/") or normal.split("/")[0] in ("..", ".") or "://" in path else normal


def image_fault(name: str, image: bytes) -> str | None:
    """The reason to keep an image file out; None for one that Pillow decodes to its last row."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(image)) as opened:
                if opened.format != FORMATS.get(posixpath.splitext(name)[1].lower(), opened.format):
                    return "mislabelled image"
                opened.load()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning):
        return "broken image"
    return None
