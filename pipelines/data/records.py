"""Records of LLaVA's JSON form: what one must be, and why one is not.

    [{"id": "33471", "image": "coco/33471.jpg", "conversations": [{"from": "human", "value": "<image>\\n…"},
      {"from": "gpt", "value": "…"}, …]}, …]           a record without `image` is text alone

The mixtures are put together from dozens of sources by hand, and training on them fails hours later, or learns from
empty answers without a word.  So everything that can be told without a model is told here, once, when shards are made,
by `find_fault`: one of REASONS, the field and its value.  pipelines/data/images.py does the same for image files.

LLaVA's trainer reads `image`, and `from` and `value` of each turn.  Other fields may be missing or odd.  They matter in
one case: a record about a video, a sound or an image that LLaVA does not read would be learned as text about nothing.
Such content is known by the names of fields, and by the tags that other trainers put in its place:

- In a question a tag counts anywhere, in an answer on a line of its own.
- It is a bare tag: `<video>`, `<image 1>`, `<|audio_bos|>`.  One with attributes is HTML.
- Text about tags is text: in code, in quotation marks, behind a word (`List<Image>`), before "tag" or "element", or
  among other HTML.

Ids repeat in LLaVA's own mixtures (several conversations about one image), so only a record that is the same as an
earlier one in everything is a duplicate.
"""

import functools
import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from redux.conversation import IMAGE_TOKEN, move_image_to_front

RECORD_REASONS = {
    "malformed": "not an object with conversations, a list of turns, each with from and value as text",
    "duplicate": "the same as an earlier record in everything",
    "roles": 'turns are not "human" and "gpt" by turns, from a human\'s to a gpt\'s',
    "empty turn": "somebody says nothing",
    "broken text": "half of a character (a lone surrogate), or bytes that are not UTF-8, which no tokenizer reads",
    "video": "about a video, which is neither image nor text",
    "audio": "about a sound, which is neither image nor text",
    "point cloud": "about a point cloud, which is neither image nor text",
    "image form": "an image in a form that LLaVA does not read; allowed: one path as image, and one <image>",
    "image without tag": "there is an image, but no turn has <image>",
    "tag without image": "a turn has <image>, but there is no image",
    "tags": "there is one image, but <image> in more than one turn",
    "too long": "more text than asked for",
    "outside": "the image's path leads out of the image folder",
    "missing image": "there is no such file, or it may not be read",
    "broken image": "the file is truncated, no image that Pillow reads, or too large a one",
}
"""Why a record is kept out of the shards."""

MAX_SHOWN_CHARACTERS = 200
"""Characters of a value that the quarantine list shows."""

MAX_DEPTH = 100
"""Levels of lists and objects in a record, at most; Python's own JSON reader and writer end at some hundreds."""

MISSING = "(missing)"


class RecordRejection(NamedTuple):
    """The reason to keep a record out, the field with its value as the quarantine list shows it, and details."""

    reason: str
    field: str
    value: str
    detail: str = ""

    @property
    def why(self) -> str:
        """The reason in words."""
        return f"{RECORD_REASONS[self.reason]}: {self.detail}" if self.detail else RECORD_REASONS[self.reason]


# --- files of records ------------------------------------------------------------------------------------------------


def parse_records(text: bytes, name: str) -> list[Any]:
    """Read the records of a file, unchecked: a JSON list, JSON lines, or one record.

    What Python cannot read of a record (nested too deep, a number of thousands of digits, a damaged line among JSON
    lines) stays as its text, which is no record.

    Raises:
        ValueError: it is none of these, or holds no record.
    """
    decoded = _decode(text)
    try:
        records = json.loads(decoded)
    except (ValueError, RecursionError) as error:  # a ValueError of digits is no JSONDecodeError
        if decoded.lstrip().startswith("["):
            broken = isinstance(error, json.JSONDecodeError)
            records = error if broken else [_parse_record(part) for part in _split_list(decoded)]
        else:
            lines = [_parse_record(line) for line in decoded.split("\n") if line.strip()]
            records = lines if any(isinstance(line, dict) for line in lines) else error
    if isinstance(records, dict) and "conversations" in records:
        records = [records]
    if not isinstance(records, list) or not records:
        if isinstance(records, dict):
            got = f"got one object with {_shorten(', '.join(records), 80)}"
        elif isinstance(records, Exception):
            got = f"not JSON: {records}" if decoded.strip() else "an empty file"
        else:
            got = f"got {type(records).__name__}" if records != [] else "no records"
        raise ValueError(f"{name}: {got}, allowed: a list of records as JSON, or JSON lines, one record a line")
    return [_shorten(_to_json(record)) if _is_too_deep(record) else record for record in records]


def _decode(text: bytes) -> str:
    """The text of a file in UTF-8, -16 or -32; other bytes become lone surrogates: only their record is bad."""
    encoding = json.detect_encoding(text)
    try:
        return text.decode(encoding, "surrogateescape" if encoding.startswith("utf-8") else "surrogatepass")
    except UnicodeDecodeError:  # a file that only looks like UTF-16
        return text.decode("utf-8", "surrogateescape")


def _parse_record(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text.strip()


def _split_list(text: str) -> Iterator[str]:
    """The elements of a JSON list, unread: what stands between its commas."""
    depth = first = 0
    for token in re.finditer(r'"(?:[^"\\]|\\.)*"|[\[\]{},]', text, re.DOTALL):
        mark = token.group()
        if (mark == "," and depth == 1) or (mark == "]" and depth == 1):
            yield text[first : token.start()].strip()
            first = token.end()
        depth += (mark in "[{") - (mark in "]}")
        if depth == 1 and mark == "[" and not first:
            first = token.end()
    if rest := text[first:].strip():
        yield rest


def _is_too_deep(value: Any) -> bool:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for each in level
            if isinstance(each, list | dict)
            for inner in (each.values() if isinstance(each, dict) else each)
            if isinstance(inner, list | dict)
        ]
        if not level:
            return False
    return True


# --- records ---------------------------------------------------------------------------------------------------------


def find_rejection(record: Any, words: int | None) -> RecordRejection | None:
    """Find the reason to keep a record out, its image file apart; None for a good one.

    words: at most so many, of all turns together.
    """
    return _find_form_rejection(record) or _find_content_rejection(record, words)


def _find_form_rejection(record: Any) -> RecordRejection | None:
    """The first field of another type or name than LLaVA's."""
    if not isinstance(record, dict):
        return RecordRejection("malformed", "", shorten(record))
    if fault := _find_media_field(record, "", has_image(record)):
        return fault
    if "conversations" not in record:
        return RecordRejection("malformed", "conversations", f"{MISSING}; there are {shorten(list(record))}")
    turns = record["conversations"]
    if not isinstance(turns, list):
        return RecordRejection("malformed", "conversations", shorten(turns))
    for number, turn in enumerate(turns):
        name = f"conversations[{number}]"
        if not isinstance(turn, dict):
            return RecordRejection("malformed", name, shorten(turn))
        for field in ("from", "value"):
            if not isinstance(turn.get(field), str):
                return RecordRejection(
                    "malformed", f"{name}.{field}", shorten(turn[field]) if field in turn else MISSING
                )
        if fault := _find_media_field(turn, f"{name}.", has_image(record)):
            return fault
    if has_image(record) and not isinstance(record["image"], str):
        return RecordRejection("image form", "image", shorten(record["image"]))
    for number, turn in enumerate(turns):
        if turn["from"] != ("human", "gpt")[number % 2]:
            return RecordRejection("roles", f"conversations[{number}].from", shorten(turn["from"]))
    if not turns or len(turns) % 2:
        return RecordRejection("roles", "conversations", f"{len(turns)} turns")
    return None


def _find_content_rejection(record: dict, words: int | None) -> RecordRejection | None:
    """The first turn that cannot be trained on."""
    turns, tagged = record["conversations"], []
    for number, turn in enumerate(turns):
        text, name = turn["value"], f"conversations[{number}].value"
        if not _is_unicode(text):
            return RecordRejection("broken text", name, shorten(text))
        if reason := _find_media_tag(text, number % 2 == 1):
            return RecordRejection(reason, name, shorten(text))
        tags = move_image_to_front(text).count(IMAGE_TOKEN)
        tagged += [name] * tags
        if not text.replace(IMAGE_TOKEN, "").strip() and (number % 2 or not tags):
            return RecordRejection("empty turn", name, shorten(text))
    if has_image(record) and not tagged:
        return RecordRejection("image without tag", "conversations[0].value", shorten(turns[0]["value"]))
    if tagged and not has_image(record):
        return RecordRejection("tag without image", "image", shorten(record["image"]) if "image" in record else MISSING)
    if len(tagged) > 1:
        return RecordRejection("tags", tagged[1], IMAGE_TOKEN)
    if words is not None and (count := count_words(record)) > words:
        return RecordRejection("too long", "conversations", f"{count} words")
    return None


def has_image(record: dict) -> bool:
    """Tell if the record names an image; null is none."""
    return record.get("image") is not None


def count_words(record: dict) -> int:
    """Words of all turns, the image's tag not counted."""
    return sum(len(turn["value"].replace(IMAGE_TOKEN, "").split()) for turn in record["conversations"])


def shorten(value: Any) -> str:
    """A value as one short line of text that any file can hold."""
    return _shorten(value if isinstance(value, str) else _to_json(value))


def _shorten(text: str, limit: int = MAX_SHOWN_CHARACTERS) -> str:
    text = text if len(text) <= limit else f"{text[:limit]}… ({len(text)} characters)"
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


def _to_json(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except (ValueError, TypeError, RecursionError):
        return f"{type(value).__name__}, nested too deep or no JSON"


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


# --- content that is neither image nor text --------------------------------------------------------------------------

_CONTAINER_WORDS = "paths?|files?|file_?names?|names?|urls?|uris?|list|bytes|base64|data"
_MEDIA_FIELDS = {
    "video": "videos?",
    "audio": "audios?|speech|sounds?|wavs?",
    "point cloud": "point_?clouds?|pcds?",
    "image form": "images?|imgs?|pictures?|photos?",
}
_MEDIA_FIELD_PATTERNS = {
    reason: re.compile(rf"(?:{names})(?:_?(?:{_CONTAINER_WORDS}))?", re.IGNORECASE)
    for reason, names in _MEDIA_FIELDS.items()
}
"""Fields that hold other content, by reason; those of images count where the record has no `image`."""

_TAG_WORDS = "start|end|begin|bos|eos|pad|patch|here|placeholder|soft|token|content|context|feature|embed|file|path"
_MEDIA_NAMES = {
    "video": "videos?|vid",
    "audio": "audios?|speech|sounds?|wav",
    "point cloud": "point_?clouds?|points?|pcd",
    "image form": "images?|imgs?|pictures?|photos?|vision|visual",
}
_BARE_TAGS = {
    reason: rf"<(?-i:(?!image>))(?:\|/?|/)?(?:{names})(?:[ _-]?(?:{_TAG_WORDS}))*[ _-]?\d* ?/?\|?>"
    for reason, names in _MEDIA_NAMES.items()
}
_BARE_TAGS["image form"] += r"|</?im_(?:start|end|patch)>|(?-i:\[IMG\])"
_MEDIA_TAG_PATTERNS = {
    reason: (
        re.compile(rf"(?<![A-Za-z0-9_])(?:{tag})(?!\s*(?:tags?|elements?|attributes?)\b)", re.IGNORECASE),
        re.compile(rf"^\s*(?:{tag})\s*$", re.IGNORECASE | re.MULTILINE),
    )
    for reason, tag in _BARE_TAGS.items()
}
"""Other trainers' tags, by reason: anywhere, and alone on a line."""

_QUOTED = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`|\"<[^\"\n]*>\"|'<[^'\n]*>'|“<[^”\n]*>”", re.DOTALL)
_MARKUP = re.compile(r"<(?:!doctype|html|head|body|div|span|p|ul|table|script|source)\b", re.IGNORECASE)


def _find_media_field(fields: dict, prefix: str, with_image: bool) -> RecordRejection | None:
    """A field that holds content which LLaVA does not read."""
    for field, value in fields.items():
        reason = _media_of_field(field)
        if not reason or not value or (not prefix and field == "image") or (reason == "image form" and with_image):
            continue
        return RecordRejection(reason, prefix + shorten(field), shorten(value))
    return None


@functools.lru_cache(maxsize=1024)
def _media_of_field(name: str) -> str | None:
    return next((reason for reason, names in _MEDIA_FIELD_PATTERNS.items() if names.fullmatch(name)), None)


def _find_media_tag(text: str, is_answer: bool) -> str | None:
    """The reason of a tag that stands for content which LLaVA does not read."""
    if "<" not in text and "[IMG]" not in text:
        return None
    if _MARKUP.search(text):
        return None
    plain = _QUOTED.sub(" ", text)
    return next((reason for reason, tags in _MEDIA_TAG_PATTERNS.items() if tags[is_answer].search(plain)), None)
