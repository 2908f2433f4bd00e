"""Validation of records in LLaVA's JSON form.

    [{"id": "33471", "image": "coco/33471.jpg", "conversations": [{"from": "human", "value": "<image>\\n…"},
      {"from": "gpt", "value": "…"}, …]}, …]           a record without `image` is text only

Mixtures are assembled by hand from dozens of sources. Errors in them make training fail hours later, or the model
silently learns from empty answers. So `find_rejection` checks everything that needs no model, once, when shards are
made. It returns one of RECORD_REASONS, the field and its value. pipelines/data/images.py does the same for image files.

LLaVA's trainer reads `image`, and `from` and `value` of each turn. Other fields may be missing or have any value, with
one exception: a record about a video, a sound or an image that LLaVA does not read would be trained on as text without
its subject. Such content is detected by names of fields, and by the tags that other trainers use as placeholders:

- In a question, a tag counts anywhere; in an answer, only alone on a line.
- The tag is bare: `<video>`, `<image 1>`, `<|audio_bos|>`. A tag with attributes is HTML.
- Text about tags is allowed: in code, in quotation marks, after a word (`List<Image>`), before "tag" or "element", or
  together with other HTML.

Ids repeat in LLaVA's mixtures (several conversations about one image), so a record is a duplicate only if it equals an
earlier one in all fields.

If an object of JSON has a key twice, the last value counts, as in Python's reader. Checking for such keys would make
parsing 40 to 90 % slower.
"""

import functools
import json
import re
from dataclasses import dataclass
from typing import Any, NamedTuple

from redux.conversation import IMAGE_TOKEN, move_image_to_front

RECORD_REASONS = {
    "not JSON": "the reader of JSON cannot parse it",
    "wrong fields": "not an object with conversations, a list of turns, each with from and value as text",
    "duplicate": "equal to an earlier record in all fields",
    "turn order": 'turns must alternate between "human" and "gpt", from a first "human" to a last "gpt"; one "system" '
    "turn may come before",
    "empty turn": "a turn without text",
    "broken text": "a lone surrogate, or bytes that are not UTF-8, which no tokenizer reads",
    "video": "about a video, which is neither image nor text",
    "audio": "about a sound, which is neither image nor text",
    "point cloud": "about a point cloud, which is neither image nor text",
    "unsupported image": "several images, or an image in a form that is not read; allowed: one image, and one <image>",
    "image without tag": "there is an image, but no turn has <image>",
    "tag without image": "a turn has <image>, but there is no image",
    "tag in system message": "<image> in the system message; allowed: in a turn of human",
    "several tags": "there is one image, but <image> in more than one turn",
    "too long": "more words than max_words",
    "outside folder": "the image's path leads out of the image folder",
    "missing image": "the file does not exist or is not readable",
    "broken image": "the file is truncated, too large, or no image that Pillow reads",
    "several records": "more than one member has conversations: a key ends at the first dot of a file's name",
    "several columns": "more than one column can be the image or the caption",
    "several images": "more than one member can be the image, and the record does not tell which",
}
"""Reasons to reject a record, with explanations."""

MAX_SHOWN_CHARACTERS = 200
"""Maximum number of characters of a value in the quarantine list."""

MAX_DEPTH = 100
"""Maximum nesting of lists and objects in a record. Python's JSON reader and writer fail at some hundreds."""

MISSING = "(missing)"

LFS_POINTER = "version https://git-lfs"
"""Beginning of a file of a clone without git-lfs, in place of its content."""

LFS_ADVICE = "a git-lfs pointer; git lfs pull fetches the file"


class RecordRejection(NamedTuple):
    """Rejection of a record: the reason, the field, its value as in the quarantine list, and details."""

    reason: str
    field: str
    value: str
    detail: str = ""

    @property
    def explanation(self) -> str:
        """Explanation of the reason."""
        return f"{RECORD_REASONS[self.reason]}: {self.detail}" if self.detail else RECORD_REASONS[self.reason]


@dataclass(frozen=True)
class UnparsedRecord:
    """Record that Python cannot parse as JSON: its text and the problem."""

    text: str
    problem: str

    @property
    def rejection(self) -> RecordRejection:
        return RecordRejection("not JSON", "", shorten(self.text), self.problem)


def describe_json_error(error: ValueError | RecursionError) -> str:
    """Describe an error of the reader of JSON in a record."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg}: character {error.pos}"
    if isinstance(error, UnicodeDecodeError):
        return "bytes that are not UTF-8"
    return "nested too deep" if isinstance(error, RecursionError) else "a number with too many digits"


# --- records ---------------------------------------------------------------------------------------------------------


def find_rejection(record: Any, max_words: int | None) -> RecordRejection | None:
    """Find the reason to reject a record, without a look at its image file. None for a valid record.

    Args:
        record: any JSON value, or an UnparsedRecord.
        max_words: maximum number of words of all turns together; None for no limit.
    """
    return _find_form_rejection(record) or _find_content_rejection(record, max_words)


def _find_form_rejection(record: Any) -> RecordRejection | None:
    """Find the first field with another type or name than LLaVA's."""
    if isinstance(record, UnparsedRecord):
        return record.rejection
    if not isinstance(record, dict):
        return RecordRejection("wrong fields", "", shorten(record))
    # Check the fields of the record.
    if rejection := find_media_field(record, "", has_image(record)):
        return rejection
    if "conversations" not in record:
        return RecordRejection("wrong fields", "conversations", f"{MISSING}; there are {shorten(list(record))}")
    turns = record["conversations"]
    if not isinstance(turns, list):
        return RecordRejection("wrong fields", "conversations", shorten(turns))
    # Check the fields of the turns.
    for number, turn in enumerate(turns):
        name = f"conversations[{number}]"
        if not isinstance(turn, dict):
            return RecordRejection("wrong fields", name, shorten(turn))
        for field in ("from", "value"):
            if not isinstance(turn.get(field), str):
                return RecordRejection(
                    "wrong fields", f"{name}.{field}", shorten(turn[field]) if field in turn else MISSING
                )
        if rejection := find_media_field(turn, f"{name}.", has_image(record)):
            return rejection
    if has_image(record) and not isinstance(record["image"], str):
        return RecordRejection("unsupported image", "image", shorten(record["image"]))
    # Check the order of the turns.
    num_system = count_system_turns(turns)
    for number, turn in enumerate(turns[num_system:]):
        if turn["from"] != ("human", "gpt")[number % 2]:
            return RecordRejection("turn order", f"conversations[{num_system + number}].from", shorten(turn["from"]))
    if len(turns) == num_system or (len(turns) - num_system) % 2:
        return RecordRejection("turn order", "conversations", f"{len(turns)} turns")
    return None


def _find_content_rejection(record: dict, max_words: int | None) -> RecordRejection | None:
    """Find the first turn that cannot be trained on."""
    turns = record["conversations"]
    num_system = count_system_turns(turns)
    tagged = []  # names of the turns with <image>, once per tag
    for number, turn in enumerate(turns, start=-num_system):
        text, name = turn["value"], f"conversations[{num_system + number}].value"
        if not is_unicode(text):
            return RecordRejection("broken text", name, shorten(text))
        if text.startswith(LFS_POINTER):
            return RecordRejection("broken text", name, shorten(text), LFS_ADVICE)
        if reason := _find_media_tag(text, number % 2 == 1):
            return RecordRejection(reason, name, shorten(text))
        tags = move_image_to_front(text).count(IMAGE_TOKEN)
        if tags and number < 0:
            return RecordRejection("tag in system message", name, shorten(text))
        tagged += [name] * tags
        if not text.replace(IMAGE_TOKEN, "").strip() and (number % 2 or not tags):
            return RecordRejection("empty turn", name, shorten(text))
    # Image and tags must agree.
    if has_image(record) and not tagged:
        question = turns[num_system]["value"]
        return RecordRejection("image without tag", f"conversations[{num_system}].value", shorten(question))
    if tagged and not has_image(record):
        return RecordRejection("tag without image", "image", shorten(record["image"]) if "image" in record else MISSING)
    if len(tagged) > 1:
        return RecordRejection("several tags", tagged[1], IMAGE_TOKEN)
    if max_words is not None and (count := count_words(record)) > max_words:
        return RecordRejection("too long", "conversations", f"{count} words")
    return None


def find_several_images(record: dict) -> RecordRejection | None:
    """Find a field with a list of several images, since the image of a tar stands for the path that a record names."""
    for field in ("image", "images"):
        value = record.get(field)
        if isinstance(value, list) and len(value) > 1:
            return RecordRejection("unsupported image", field, shorten(value), f"{len(value)} images")
    return None


def has_image(record: dict) -> bool:
    """Return True if the record names an image. `null` names none."""
    return record.get("image") is not None


def count_system_turns(turns: list[Any]) -> int:
    """Return 1 if the first turn is a system message, otherwise 0."""
    return int(bool(turns) and turns[0]["from"] == "system")


def count_words(record: dict) -> int:
    """Count the words of all turns, without image tags."""
    return sum(len(turn["value"].replace(IMAGE_TOKEN, "").split()) for turn in record["conversations"])


def shorten(value: Any) -> str:
    """Format a value as one short line of printable text."""
    return shorten_text(value if isinstance(value, str) else _to_json(value))


def shorten_text(text: str, limit: int = MAX_SHOWN_CHARACTERS) -> str:
    """Shorten a text and escape what is not printable."""
    text = text if len(text) <= limit else f"{text[:limit]}… ({len(text)} characters)"
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def _to_json(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, default=_describe_value)
    except (ValueError, TypeError, RecursionError):
        return f"{type(value).__name__}, nested too deep or no JSON"


def _describe_value(value: Any) -> str:
    """Describe a value of a table that JSON does not have."""
    return f"{len(value)} bytes" if isinstance(value, bytes) else str(value)


def is_unicode(text: str) -> bool:
    """Return True if a text can be written as UTF-8, which a lone surrogate cannot."""
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
    "unsupported image": "images?|imgs?|pictures?|photos?",
}
_MEDIA_FIELD_PATTERNS = {
    reason: re.compile(rf"(?:{names})(?:_?(?:{_CONTAINER_WORDS}))?", re.IGNORECASE)
    for reason, names in _MEDIA_FIELDS.items()
}
"""Patterns of fields with other media, by reason. Those of images count only if the record has no `image`."""

_SIDES = "left|right|first|second|before|after|source|target|reference|input|output|edited"
_IMAGE_WORDS = _MEDIA_FIELDS["unsupported image"]
_ONE_OF_SEVERAL_IMAGES = re.compile(
    rf"(?:(?:{_SIDES})_)?(?:{_IMAGE_WORDS})(?:_?(?:{_CONTAINER_WORDS}))?(?:_?\d+|_(?:{_SIDES}))?"
    rf"(?:_?(?:{_CONTAINER_WORDS}))?|(?:\w+_)?file_names|(?:{_SIDES})_file_name",
    re.IGNORECASE,
)
"""Pattern of fields with one of several images, such as image_2, image1_path and left_image, and of `image` itself."""

_IMAGE_MAGIC = (b"\xff\xd8\xff", b"\x89PNG\r\n", b"GIF8", b"II*\0", b"MM\0*", b"\0\0\0\x0cjP  ")
"""First bytes of images."""

_IMAGE_PATH = re.compile(
    r"data:image/.*|\S+\.(?:jpe?g|png|webp|gif|bmp|tiff?|avif|jp2|ppm)(?:\?\S*)?", re.DOTALL | re.I
)

_TAG_WORDS = "start|end|begin|bos|eos|pad|patch|here|placeholder|soft|token|content|context|feature|embed|file|path"
_MEDIA_NAMES = {
    "video": "videos?|vid",
    "audio": "audios?|speech|sounds?|wav",
    "point cloud": "point_?clouds?|points?|pcd",
    "unsupported image": "images?|imgs?|pictures?|photos?|vision|visual",
}
_BARE_TAGS = {
    reason: rf"<(?-i:(?!image>))(?:\|/?|/)?(?:{names})(?:[ _-]?(?:{_TAG_WORDS}))*[ _-]?\d* ?/?\|?>"
    for reason, names in _MEDIA_NAMES.items()
}
_BARE_TAGS["unsupported image"] += r"|</?im_(?:start|end|patch)>|(?-i:\[IMG\])"
_MEDIA_TAG_PATTERNS = {
    reason: (
        re.compile(rf"(?<![A-Za-z0-9_])(?:{tag})(?!\s*(?:tags?|elements?|attributes?)\b)", re.IGNORECASE),
        re.compile(rf"^\s*(?:{tag})\s*$", re.IGNORECASE | re.MULTILINE),
    )
    for reason, tag in _BARE_TAGS.items()
}
"""Patterns of other trainers' tags, by reason: anywhere in a text, and alone on a line."""

_QUOTED = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`|\"<[^\"\n]*>\"|'<[^'\n]*>'|“<[^”\n]*>”", re.DOTALL)
_MARKUP = re.compile(r"<(?:!doctype|html|head|body|div|span|p|ul|table|script|source)\b", re.IGNORECASE)


def find_media_field(fields: dict, prefix: str, with_image: bool, is_named: bool = False) -> RecordRejection | None:
    """Find a field with content that LLaVA does not read.

    Args:
        fields: fields of a record or of a turn.
        prefix: name of the turn with a dot; "" for a record.
        with_image: the record has an image, so that other fields may describe it.
        is_named: the user has named the column of the image, so that other images are not meant.
    """
    for field, value in fields.items():
        if not value or (not prefix and field == "image"):
            continue
        reason = _media_of_field(field)
        # Other fields describe the image, unless they are about several images.
        if reason == "unsupported image" and with_image:
            reason = reason if isinstance(value, list) and len(value) > 1 and not is_named else None
        if (
            not reason
            and not (with_image and is_named)
            and _may_be_one_of_several(field)
            and holds_image(value, or_path=True)
        ):
            reason = "unsupported image"
        if reason:
            return RecordRejection(reason, prefix + shorten(field), shorten(value))
    return None


@functools.lru_cache(maxsize=1024)  # a file uses few names for many records
def _media_of_field(name: str) -> str | None:
    return next((reason for reason, names in _MEDIA_FIELD_PATTERNS.items() if names.fullmatch(name)), None)


@functools.lru_cache(maxsize=1024)
def _may_be_one_of_several(name: str) -> bool:
    """Return True if a field is named as one of several images, such as image_2."""
    is_plain = _MEDIA_FIELD_PATTERNS["unsupported image"].fullmatch(name)
    return not is_plain and _ONE_OF_SEVERAL_IMAGES.fullmatch(name) is not None


def holds_image(value: Any, or_path: bool = False) -> bool:
    """Return True if a value of a table is an image: its bytes, an object with them, or a list of these.

    Args:
        value: the value.
        or_path: a path or a data URL of an image counts as well.
    """
    if isinstance(value, list):
        return any(holds_image(item, or_path) for item in value)
    if isinstance(value, dict):
        return any(holds_image(value.get(name), or_path) for name in ("bytes", "path", "url", "base64"))
    if isinstance(value, str):
        return or_path and _IMAGE_PATH.fullmatch(value) is not None
    return isinstance(value, bytes) and (value.startswith(_IMAGE_MAGIC) or value[8:12] == b"WEBP")


def _find_media_tag(text: str, is_answer: bool) -> str | None:
    """Find the reason to reject a text for a tag of content that LLaVA does not read."""
    if "<" not in text and "[IMG]" not in text:
        return None
    # Text about tags is allowed.
    if _MARKUP.search(text):
        return None
    plain = _QUOTED.sub(" ", text)
    return next((reason for reason, tags in _MEDIA_TAG_PATTERNS.items() if tags[is_answer].search(plain)), None)


def find_image_tags(text: str) -> list[str]:
    """List the tags with which other trainers mark an image in a question."""
    return [match.group() for match in _MEDIA_TAG_PATTERNS["unsupported image"][0].finditer(text)]


def replace_image_tag(text: str, tag: str) -> str:
    """Replace a tag of another trainer by `<image>`."""
    return text.replace(tag, IMAGE_TOKEN, 1)
