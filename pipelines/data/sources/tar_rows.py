"""Rows of foreign WebDataset tars: captions (img2dataset), conversations, and samples of Energon.

The text of a sample is its JSON, if that has a conversation, or a caption in a text member or in the JSON. The JSON may
also be the list of turns alone, or name its images by their suffixes, as LLaVA-OneVision-1.5 writes both:

    KEY.jpg     KEY.json  [{"role": "user", "content": "<image>\\n…"}, {"role": "assistant", "content": "…"}]
    KEY.0_a.jpg KEY.json  {"texts": [{"role": …, "content": …}, …], "media": "image", "name": ["0_a.jpg"]}

A column map names members by their suffixes, and values in a JSON member as "json[caption]". Nothing is unpickled, and
no code of a dataset is run.
"""

import functools
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from pipelines.core import storage
from pipelines.data import tars
from pipelines.data.records import (
    LFS_ADVICE,
    LFS_POINTER,
    MISSING,
    RecordRejection,
    UnparsedRecord,
    find_several_images,
    shorten,
)
from pipelines.data.sources.rows import TURN_COLUMNS, Columns, SourceRecord, convert_row
from pipelines.data.tars import BytesLike, TarMember, TarSample

CAPTION_SUFFIXES = ("txt", "text", "caption")


def read_tar_records(
    url: str, columns: Columns, prompt: str | None, excluded: frozenset[str]
) -> Iterator[SourceRecord]:
    """Yield the records of a tar, in the order of its samples.

    Args:
        url: the tar.
        columns, prompt: as for `convert_row`; columns are suffixes of members or values in JSON members.
        excluded: keys of samples that are left out.
    """
    data, name = storage.map_file(url), url.rpartition("/")[2]
    tar = tars.Tar()
    for sample in tars.iterate_samples(data, url, tar):
        if sample.key in excluded:
            continue
        origin = f"{name}: sample {tars.escape_unprintable(sample.key)}"
        row, rejection = _make_row(sample, data, columns)
        if rejection:
            yield SourceRecord(row, origin=origin, rejection=rejection)
        else:
            yield _explain_link(convert_row(row, columns, prompt, origin, may_be_record=False), sample.key, tar)


def _explain_link(record: SourceRecord, key: str, tar: tars.Tar) -> SourceRecord:
    """Name the link that stands in the tar in place of a missing image."""
    if record.rejection is None or record.rejection.reason != "missing image" or key not in tar.links:
        return record
    name, kind = tar.links[key]
    detail = (
        f"{tars.escape_unprintable(name)} is a {kind}, which WebDataset skips; tar --hard-dereference -h packs files"
    )
    return replace(record, rejection=record.rejection._replace(detail=detail))


def _make_row(sample: TarSample, data: BytesLike, columns: Columns) -> tuple[dict[str, Any], RecordRejection | None]:
    """Make the row of a sample: its values by the names of columns. Or the reason to reject it."""
    members = {member.suffix: member for member in sample.members}
    row, problem = _read_json(sample, data)
    row = {"key": tars.to_utf8(sample.key), **row}
    if problem:
        return row, RecordRejection(problem, "", ", ".join(members))
    captions = [suffix for suffix in CAPTION_SUFFIXES if suffix in members and not row.keys() & set(TURN_COLUMNS)]
    for suffix in captions:
        text = _read_text(members[suffix], data)
        if isinstance(row.get(suffix), str) and row[suffix].strip() != text.strip():
            both = f"json[{suffix}] and {suffix}"
            return row, RecordRejection("several columns", both, shorten(text), "captions that differ")
        row[suffix] = text
    if not columns and not captions and (unread := _find_unread_json(sample, data)):
        return row, unread
    # Members that the column map or Energon's field map names.
    for column, accessor in columns.items():
        suffix, keys = split_accessor(accessor)
        if member := members.get(suffix.lower()):
            row[accessor] = _read_value(member, keys, data, column == "image")
    if "image" in columns:
        return row, None
    return _add_image(sample, row, data)


def _read_json(sample: TarSample, data: BytesLike) -> tuple[dict[str, Any], str | None]:
    """Read the JSON members of a sample as one row. Returns the row, and a reason to reject or None."""
    dotted = [member for member in sample.members if tars.find_last_suffix(member) == "json"]
    values = [(member, tars.parse_member(data, member)) for member in dotted]
    # The list of turns alone, or an object with the turns.
    turns = [{"messages": value} for _, value in values if _is_turns(value)]
    rows = turns + [value for _, value in values if isinstance(value, dict) and value.keys() & set(TURN_COLUMNS)]
    if len(rows) > 1:
        return {}, "several records"
    # Without turns, a caption may be in the metadata.
    metadata = [value for member, value in values if member.suffix == "json" and isinstance(value, dict)]
    return dict(next(iter(rows or metadata), {})), None


def _find_unread_json(sample: TarSample, data: BytesLike) -> RecordRejection | None:
    """Find a member `json` that is not JSON, since the caption or the turns may be in it."""
    member = next((member for member in sample.members if member.suffix == "json"), None)
    value = None if member is None else tars.parse_member(data, member)
    if not isinstance(value, UnparsedRecord):
        return None
    detail = LFS_ADVICE if value.text.startswith(LFS_POINTER) else value.problem
    return value.rejection._replace(field="json", detail=detail)


def _is_turns(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(turn, dict) for turn in value)


def _add_image(
    sample: TarSample, row: dict[str, Any], data: BytesLike
) -> tuple[dict[str, Any], RecordRejection | None]:
    """Put the bytes of the image into the row."""
    listed = row.pop("name", None) if "media" in row else None
    media = row.pop("media", None)
    # LLaVA-OneVision's JSON names its members, also those that are not images.
    if isinstance(listed, list) and listed and media == "video":
        return {**row, "video": listed}, None
    if isinstance(listed, list) and listed:
        by_suffix = {member.suffix: member for member in sample.members}
        members = [by_suffix.get(str(name).lower()) for name in listed]
        if None in members:
            return row, RecordRejection("missing image", "name", shorten(listed))
        row["image"] = [_read_bytes(member, data) for member in members if member]
        return row, None
    # The same rule as for tars with records of LLaVA.
    member, problem = tars.find_image(sample, row, data)
    if problem:
        images = [m.suffix for m in sample.members if tars.find_last_suffix(m) in tars.IMAGE_SUFFIXES]
        return row, RecordRejection(problem, "", ", ".join(images))
    if rejection := find_several_images(row):
        return row, rejection
    named = row.get("image") or row.get("images")
    # The member counts, whatever path the record names.
    for name in ("image", "images"):
        row.pop(name, None)
    if member:
        row["image"] = _read_bytes(member, data)
    elif named:
        return row, RecordRejection("missing image", "image", f"{shorten(named)}; members: {MISSING}")
    return row, None


def _read_value(member: TarMember, keys: tuple[str | int, ...], data: BytesLike, is_image: bool) -> Any:
    """Read a member, or a value in a JSON member. None if there is no such value."""
    if is_image and not keys:
        return _read_bytes(member, data)
    if tars.find_last_suffix(member) != "json":
        return _read_text(member, data)
    # A sample without the value is rejected later, as one without the column.
    value = tars.parse_member(data, member)
    if isinstance(value, UnparsedRecord):
        return None
    for key in keys:
        try:
            value = value[key]
        except (KeyError, IndexError, TypeError):
            return None
    return value


def _read_bytes(member: TarMember, data: BytesLike) -> bytes:
    return bytes(data[member.content])


def _read_text(member: TarMember, data: BytesLike) -> str:
    """Read a text. Invalid bytes become lone surrogates, so that only their record is rejected."""
    return _read_bytes(member, data).decode("utf-8-sig", "surrogateescape")


@functools.lru_cache(maxsize=64)
def split_accessor(accessor: str) -> tuple[str, tuple[str | int, ...]]:
    """Split the name of a value in a JSON member into suffix and keys.

    >>> split_accessor("json[answers][0]")
    ('json', ('answers', 0))
    """
    suffix, *keys = re.split(r"[\[\]]+", accessor.rstrip("]"))
    return suffix, tuple(int(key) if key.isdecimal() else key for key in keys)
