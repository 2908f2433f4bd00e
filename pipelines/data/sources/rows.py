"""Conversion of a row of any source to a record in LLaVA's form.

A row is an object of a JSON file, a row of a table, or a sample of a tar. Its columns are found by their usual names,
or by a column map:

- turns: `conversations` or `messages` with `from` and `value` (ShareGPT) or `role` and `content` (OpenAI), also with
  content in parts; or pairs `user` and `assistant` in `texts`
- one round: `question` and `answer`, `instruction`, `input` and `output`, or `prompt` and `response`
- a caption: `caption`, `text` or `txt`; the question is empty, or the `prompt` of the settings
- the image: `image`, `images`, `jpg` and so on: a path, bytes, a data URL, base64, or an object with one of
  them

A record that is in LLaVA's form already is not changed. The position of an image is where a turn has `<image>` or an
image part. Rows whose form has no tags get `<image>` at the start of the first question.
"""

import base64
import binascii
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from pipelines.data.options import ColumnName
from pipelines.data.records import (
    MISSING,
    RecordRejection,
    UnparsedRecord,
    find_media_field,
    holds_image,
    shorten,
)
from redux.conversation import IMAGE_TOKEN

TURN_COLUMNS = ("conversations", "messages", "conversation", "texts", "dialogue")
ROUND_COLUMNS = (
    ("question", "input", "answer"),
    ("instruction", "input", "output"),
    ("prompt", "input", "response"),
    ("query", "input", "response"),
)
"""Columns of a question, of further input for it, and of the answer."""

TEXT_COLUMNS = ("caption", "text", "txt")
IMAGE_COLUMNS = ("image", "images", "img", "jpg", "jpeg", "png", "webp", "image_path", "file_name")
ID_COLUMNS = ("id", "key", "__key__")
KNOWN_COLUMNS = frozenset([*TURN_COLUMNS, *(name for names in ROUND_COLUMNS for name in names), *TEXT_COLUMNS])
"""Usual names of columns with text: a JSON object without any of them is not a record."""

TURN_FIELDS = (("from", "value"), ("role", "content"))
ROLE_NAMES = {
    "human": "human",
    "user": "human",
    "gpt": "gpt",
    "assistant": "gpt",
    "chatgpt": "gpt",
    "model": "gpt",
    "bot": "gpt",
    "system": "system",
    "developer": "system",
}
"""Roles in lower case, and those of LLaVA."""

PART_MEDIA = {"video": "video", "video_url": "video", "audio": "audio", "audio_url": "audio", "input_audio": "audio"}
TEXT_PARTS = ("text", "input_text", "output_text")
IMAGE_PARTS = ("image", "image_url", "input_image")

PART_FIELDS = ("image", "image_url", "path", "url", "base64", "bytes")
"""Fields of an image part that hold the image."""

EMBEDDED_IMAGE = "(embedded)"
"""Path of an image whose bytes came with its row, if the row names none."""

MIN_BASE64_CHARACTERS = 128
"""Length from which a text that begins as an image in base64 is one. Smaller image files hardly exist."""

_BASE64_IMAGE_BEGINNINGS = ("/9j/", "iVBORw0KGgo", "R0lGODlh", "R0lGODdh", "UklGR")
"""First bytes of JPEG, PNG, GIF and WEBP in base64."""

_DATA_URL = re.compile(r"data:[^,;]*(?:;[^,;]*)*?(;base64)?,", re.IGNORECASE)

Columns = Mapping[ColumnName, str]


@dataclass(frozen=True)
class SourceRecord:
    """Record of a source.

    Args:
        record: record in LLaVA's form; or the row, if it could not be converted.
        image: bytes of the image that came with the row; None if `record` names a file or has no image.
        origin: file and position in it.
        rejection: reason for which the row could not be converted.
        names: fields of the row by the fields of the record that were made of them.
    """

    record: Any
    image: bytes | None = None
    origin: str = ""
    rejection: RecordRejection | None = None
    names: Mapping[str, str] = field(default_factory=dict)

    def name_field(self, rejection: RecordRejection) -> RecordRejection:
        """Replace the name of a field of the record by that of the row."""
        return rejection._replace(field=self.names.get(rejection.field, rejection.field))


@dataclass(frozen=True)
class _Turn:
    """Turn of a record, and the names of its role and of its text in the row."""

    role: str
    text: str
    role_name: str
    text_name: str


class RowError(Exception):
    """Row that cannot be converted."""

    def __init__(self, rejection: RecordRejection) -> None:
        self.rejection = rejection
        super().__init__(rejection.explanation)


def convert_row(
    row: Any, columns: Columns, prompt: str | None, origin: str, may_be_record: bool = True
) -> SourceRecord:
    """Convert a row to a record.

    Args:
        row: the row, or an UnparsedRecord. Images may be bytes.
        columns: names of columns that differ from the usual ones.
        prompt: question of a row that has a caption and no question.
        origin: file and position of the row.
        may_be_record: the row is kept as it is if it has LLaVA's form. False for rows with values that are not JSON.
    """
    if isinstance(row, UnparsedRecord):
        return SourceRecord(row.text, origin=origin, rejection=row.rejection)
    if not isinstance(row, dict) or (may_be_record and not columns and _is_llava(row)):
        return SourceRecord(row, origin=origin)
    try:
        return _Conversion(row, columns, prompt, origin).convert()
    except RowError as error:
        return SourceRecord(row, origin=origin, rejection=error.rejection)


def _is_llava(row: dict) -> bool:
    """Return True if a row is meant to be a record in LLaVA's form, so that it is checked as it is."""
    # Cheap checks first: a file of LLaVA's form has millions of such records.
    turns = row.get("conversations")
    if not isinstance(turns, list):
        # Without turns of any form, the row is rejected as a record.
        return not row.keys() & KNOWN_COLUMNS and not isinstance(turns, str)
    image = row.get("image")
    if "images" in row or not isinstance(image, str | int | float | None):
        return False
    if isinstance(image, str) and (image.startswith("data:") or _is_base64_image(image)):
        return False
    return all(
        isinstance(turn, dict)
        and not turn.keys() & {"role", "content", "user", "assistant"}
        and (not isinstance(role := turn.get("from"), str) or ROLE_NAMES.get(role.lower(), role) == role)
        for turn in turns
    )


class _Conversion:
    """Conversion of one row. `used` has the columns that were read; the others are searched for videos and sounds."""

    def __init__(self, row: dict[str, Any], columns: Columns, prompt: str | None, origin: str) -> None:
        self.row, self.columns, self.prompt, self.origin = row, columns, prompt, origin
        self.used: set[str] = set()
        self.images: list[tuple[str, Any]] = []  # field and value of each image
        self.has_tags = True
        self.needs_image = False
        self.turns_name = "conversations"

    def convert(self) -> SourceRecord:
        """Convert the row; RowError if that is not possible."""
        if extra_cells := self.row.get(None):  # type: ignore[call-overload]  # only a table of text has it
            detail = "more cells than columns: put a text with a separator into quotation marks"
            raise RowError(RecordRejection("wrong fields", "", shorten(extra_cells), detail))
        turns = self._read_turns()
        # A column of system messages, unless the turns have one.
        system = self._get("system")
        if isinstance(system, str) and system.strip() and turns[0].role != "system":
            turns.insert(0, _Turn("system", system, self.columns["system"], self.columns["system"]))
        # Images in parts of turns come before those of a column.
        self._read_image_column()
        # What is left in the row may be a video or a sound, without which the text has no sense.
        others = {name: value for name, value in self.row.items() if name not in self.used}
        is_named = "image" in self.columns
        rejection = find_media_field(others, "", bool(self.images), is_named) or self._find_other_image(others)
        if rejection:
            raise RowError(rejection)
        image_name, image_value = self._choose_image()
        if self.needs_image and image_value is None:
            raise RowError(RecordRejection("missing image", self.columns.get("image", "image"), MISSING))
        path, image = _load_image(image_name, image_value)
        # A record with the fields that training reads.
        record: dict[str, Any] = {}
        if (name := self._get("id", *ID_COLUMNS)) is not None:
            # JSON has no number for NaN.
            is_plain = isinstance(name, str | int) or (isinstance(name, float) and math.isfinite(name))
            record["id"] = name if is_plain else shorten(name if isinstance(name, dict | list) else str(name))
        if path is not None:
            record["image"] = path
        record["conversations"] = [{"from": turn.role, "value": turn.text} for turn in turns]
        if path is not None and not self.has_tags:
            _put_tag_first(record["conversations"])
        names = {"image": image_name or "image", "conversations": self.turns_name}
        for number, turn in enumerate(turns):
            names |= {
                f"conversations[{number}].from": turn.role_name,
                f"conversations[{number}].value": turn.text_name,
            }
        return SourceRecord(record, image, self.origin, names=names)

    def _get(self, column: ColumnName, *usual: str) -> Any:
        """Return the value of a column, by its name in the column map or a usual name. None if it is missing."""
        names = (self.columns[column],) if column in self.columns else usual
        name = next((name for name in names if self.row.get(name) is not None), None)
        if name is None:
            return None
        self.used.add(name)
        return self.row[name]

    # --- turns -------------------------------------------------------------------------------------------------------

    def _read_turns(self) -> list[_Turn]:
        readers: dict[ColumnName, Callable[[], list[_Turn]]] = {
            "conversations": self._read_conversation,
            "question": self._read_rounds,
            "text": self._read_caption,
        }
        # Columns that the user names come alone; otherwise a conversation says more than a caption.
        kinds = [kind for kind in readers if kind in self.columns] or list(readers)
        turns: list[_Turn] = []
        for kind in kinds:
            turns = readers[kind]()
            if turns:
                break
        if not turns:
            # A caption that is no text is named with its value.
            is_any = "text" in kinds and "text" not in self.columns
            if is_any and (name := next((name for name in TEXT_COLUMNS if name in self.row), None)):
                raise RowError(RecordRejection("wrong fields", name, shorten(self.row[name]), "a caption is text"))
            named_columns = ", ".join(self.columns[kind] for kind in kinds if kind in self.columns)
            detail = f"no column {named_columns or 'with a conversation, a question or a caption'}"
            raise RowError(RecordRejection("wrong fields", "", f"columns {shorten(list(self.row))}", detail))
        return turns

    def _read_conversation(self) -> list[_Turn]:
        name = self.columns.get("conversations") or next((name for name in TURN_COLUMNS if name in self.row), None)
        if name is None or name not in self.row:
            return []
        turns = self.row[name]
        self.used.add(name)
        self.turns_name = name
        turns = _parse_turns(turns)
        if not isinstance(turns, list) or not turns:
            raise RowError(RecordRejection("wrong fields", name, shorten(turns)))
        result = []
        for number, turn in enumerate(turns):
            field_name = f"{name}[{number}]"
            if not isinstance(turn, dict):
                raise RowError(RecordRejection("wrong fields", field_name, shorten(turn)))
            # Both turns of a round in one object, as in the_cauldron.
            if {"user", "assistant"} <= turn.keys():
                self.has_tags = False
                result += _make_round(
                    (f"{field_name}.user", turn["user"]), (f"{field_name}.assistant", turn["assistant"])
                )
                continue
            read = self._read_turn(field_name, turn)
            if read.role != "system" or number or read.text.strip():  # an empty system message is none
                result.append(read)
        return result

    def _read_turn(self, name: str, turn: dict[str, Any]) -> _Turn:
        # Read ShareGPT's fields or OpenAI's, turn by turn.
        usual = next((fields for fields in TURN_FIELDS if fields[0] in turn), TURN_FIELDS[0])
        role_name, text_name = self.columns.get("role", usual[0]), self.columns.get("content", usual[1])
        role, content = turn.get(role_name), turn.get(text_name)
        if not isinstance(role, str):
            raise RowError(RecordRejection("wrong fields", f"{name}.{role_name}", _show(turn, role_name)))
        others = {key: value for key, value in turn.items() if key not in (role_name, text_name)}
        if rejection := find_media_field(others, f"{name}.", False):
            raise RowError(rejection)
        if isinstance(content, list):
            content = "".join(self._read_parts(f"{name}.{text_name}", content))
        if not isinstance(content, str):
            raise RowError(RecordRejection("wrong fields", f"{name}.{text_name}", _show(turn, text_name)))
        return _Turn(self._translate_role(role), content, f"{name}.{role_name}", f"{name}.{text_name}")

    def _translate_role(self, role: str) -> str:
        if role == self.columns.get("user"):
            return "human"
        if role == self.columns.get("assistant"):
            return "gpt"
        return ROLE_NAMES.get(role.lower(), role)

    def _read_parts(self, name: str, parts: list[Any]) -> Iterator[str]:
        """Yield the text of each part of a message; images become `<image>`."""
        for number, part in enumerate(parts):
            field_name = f"{name}[{number}]"
            if isinstance(part, str):
                yield part
                continue
            kind = part.get("type") if isinstance(part, dict) else None
            if kind in PART_MEDIA:
                raise RowError(RecordRejection(PART_MEDIA[kind], field_name, shorten(part)))
            if kind in TEXT_PARTS and isinstance(part.get("text"), str):
                yield part["text"]
            elif kind in IMAGE_PARTS:
                # Tables give all parts the same fields, and null to those that a part lacks.
                values = {key: value for key, value in part.items() if key in PART_FIELDS and value is not None}
                others = {key: value for key, value in part.items() if key not in PART_FIELDS}
                if rejection := find_media_field(others, f"{field_name}.", False):
                    raise RowError(rejection)
                # A part without an address stands for the image of the column.
                self.images += [(field_name, values)] if values else []
                yield IMAGE_TOKEN
            else:
                detail = "a part has the type text, image or image_url, and its content"
                raise RowError(RecordRejection("wrong fields", field_name, shorten(part), detail))

    def _read_rounds(self) -> list[_Turn]:
        names: tuple[str, str | None, str] | None
        if "question" in self.columns:
            names = (self.columns["question"], self.columns.get("input"), self.columns.get("answer", "answer"))
        else:
            names = next((names for names in ROUND_COLUMNS if {names[0], names[2]} <= self.row.keys()), None)
        if names is None or names[0] not in self.row:
            return []
        question_name, input_name, answer_name = names
        self.used |= {question_name, answer_name, *([input_name] if input_name else [])}
        self.has_tags = False
        question, answer = self.row.get(question_name), self.row.get(answer_name)
        # A table may have a column without a name, such as the numbers of pandas' rows.
        extra_input = self.row.get(input_name) if input_name else None
        if isinstance(extra_input, str) and extra_input and isinstance(question, str):
            question = f"{question}\n{extra_input}"
        if isinstance(answer, list) and answer and all(isinstance(text, str) for text in answer):
            answer = Counter(answer).most_common(1)[0][0]  # of equally frequent answers, the first one
        # Earlier rounds of LLaMA-Factory's alpaca form; their answers are learned as well.
        result = []
        history = self._get("history")
        for number, pair in enumerate(history if isinstance(history, list) else ()):
            name = f"{self.columns['history']}[{number}]"
            if not isinstance(pair, list | tuple) or len(pair) != 2:
                raise RowError(RecordRejection("wrong fields", name, shorten(pair)))
            result += _make_round((f"{name}[0]", pair[0]), (f"{name}[1]", pair[1]))
        return result + _make_round((question_name, question), (answer_name, answer))

    def _read_caption(self) -> list[_Turn]:
        if "text" in self.columns:
            candidates = [self.columns["text"]]
        else:
            # img2dataset writes the same caption into the text file and the metadata.
            candidates = [name for name in TEXT_COLUMNS if isinstance(self.row.get(name), str)]
            self.used |= set(candidates)
            if len({self.row[name].strip() for name in candidates}) > 1:
                raise RowError(RecordRejection("several columns", " and ".join(candidates), "captions that differ"))
        name = candidates[0] if candidates else ""
        if name not in self.row:
            return []
        self.used.add(name)
        self.has_tags, self.needs_image = False, True
        question, caption = _make_round(("prompt", self.prompt or ""), (name, self.row[name]))
        return [question, replace(caption, text=caption.text.strip())]

    # --- images ------------------------------------------------------------------------------------------------------

    def _read_image_column(self) -> None:
        names = [self.columns["image"]] if "image" in self.columns else IMAGE_COLUMNS
        filled_names = [name for name in names if self.row.get(name) not in (None, "", [], b"")]
        self.used |= set(names)
        if len(filled_names) > 1:
            raise RowError(RecordRejection("several columns", " and ".join(filled_names), "images"))
        for name in filled_names:
            value = self.row[name]
            if isinstance(value, list) and all(isinstance(item, int | float | list) for item in value):
                detail = "a list of numbers or of lists; allowed: a path, or the bytes of an image file"
                raise RowError(RecordRejection("unsupported image", name, shorten(value), detail))
            values = value if isinstance(value, list) else [value]
            field_names = [name] if len(values) == 1 else [f"{name}[{number}]" for number in range(len(values))]
            self.images += zip(field_names, values, strict=True)

    def _find_other_image(self, others: dict[str, Any]) -> RecordRejection | None:
        """Find an image in a column whose name does not tell that it is one."""
        image_column = next((name for name, value in others.items() if holds_image(value)), None)
        if image_column is None or "image" in self.columns:
            return None
        if self.images:
            return RecordRejection("several columns", f"{self.images[0][0]} and {image_column}", "images")
        return RecordRejection(
            "unsupported image", image_column, shorten(others[image_column]), "name its column by --image-key"
        )

    def _choose_image(self) -> tuple[str, Any]:
        """Return field and value of the image; ("", None) if there is none."""
        if len(self.images) > 1:
            names = ", ".join(name for name, _ in self.images)
            raise RowError(
                RecordRejection("unsupported image", self.images[0][0], shorten(f"{len(self.images)} images: {names}"))
            )
        return self.images[0] if self.images else ("", None)


def _parse_turns(turns: Any) -> Any:
    """Return turns that a table stores as JSON, or as one list for each field. Other values stay as they are."""
    if isinstance(turns, str) and turns.lstrip().startswith("["):
        try:
            return json.loads(turns)
        except (ValueError, RecursionError):
            return turns
    # `datasets` stores a sequence of objects this way.
    columns = list(turns.values()) if isinstance(turns, dict) else []
    if columns and all(isinstance(column, list) and len(column) == len(columns[0]) for column in columns):
        return [dict(zip(turns, values, strict=True)) for values in zip(*columns, strict=True)]
    return turns


def _make_round(question: tuple[str, Any], answer: tuple[str, Any]) -> list[_Turn]:
    """Make two turns of (name, text) of a question and of an answer."""
    for name, text in (question, answer):
        if not isinstance(text, str):
            raise RowError(RecordRejection("wrong fields", name, MISSING if text is None else shorten(text)))
    return [
        _Turn(role, text, name, name) for role, (name, text) in zip(("human", "gpt"), (question, answer), strict=True)
    ]


def _put_tag_first(turns: list[dict[str, str]]) -> None:
    """Put `<image>` before the first question, unless a turn has it."""
    if not any(IMAGE_TOKEN in turn["value"] for turn in turns):
        question = next(turn for turn in turns if turn["from"] == "human")
        question["value"] = f"{IMAGE_TOKEN}\n{question['value']}" if question["value"] else IMAGE_TOKEN


def _show(turn: dict[str, Any], name: str) -> str:
    """Format the value of a field of a turn."""
    return shorten(turn[name]) if name in turn else MISSING


def _load_image(name: str, value: Any) -> tuple[str | None, bytes | None]:
    """Read the image of a row.

    Args:
        name: field of the image.
        value: path, bytes, data URL, or an object with one of them; None for no image.

    Returns:
        Path of the image, and its bytes if they are in the row.
    """
    if value is None:
        return None, None
    if isinstance(value, bytes):
        return EMBEDDED_IMAGE, value
    # An image of `datasets` is a struct of bytes and path, of which one may be null.
    if isinstance(value, dict):
        path = value.get("path")
        if isinstance(value.get("bytes"), bytes):
            return (path if isinstance(path, str) and path else EMBEDDED_IMAGE), value["bytes"]
        if isinstance(value.get("base64"), str):
            return EMBEDDED_IMAGE, _decode_base64(name, value["base64"])
        inner = [value[key] for key in ("path", "url", "image_url", "image") if value.get(key)]
        if any(other != inner[0] for other in inner[1:]):
            raise RowError(RecordRejection("unsupported image", name, shorten(value), "more than one address"))
        if inner:
            return _load_image(name, inner[0])
    if not isinstance(value, str):
        raise RowError(RecordRejection("unsupported image", name, shorten(value)))
    # A text: a data URL holds the image, all others name it.
    if match := _DATA_URL.match(value):
        if not match[1]:
            raise RowError(RecordRejection("unsupported image", name, shorten(value), "a data URL without base64"))
        return EMBEDDED_IMAGE, _decode_base64(name, value[match.end() :])
    if _is_base64_image(value):
        return EMBEDDED_IMAGE, _decode_base64(name, value)
    return value, None


def _is_base64_image(text: str) -> bool:
    """Return True if a text is an image file in base64, as in tables of MMBench. No path is so long and begins so."""
    return len(text) >= MIN_BASE64_CHARACTERS and text.startswith(_BASE64_IMAGE_BEGINNINGS)


def _decode_base64(name: str, text: str) -> bytes:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise RowError(RecordRejection("broken image", name, shorten(text), f"base64: {error}")) from None
