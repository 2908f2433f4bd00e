"""Foreign tars as WebDataset 1.0.2 reads them: samples, the record and the image of each, and all other members.

WebDataset's `base_plus_ext` and `group_by_keys` make the samples, so an index has the samples that WebDataset reads:

- A key is the path up to the first dot of its last part: `a.0.jpg` and `a.1.jpg` are two members of sample `a`.
- Members of a sample are contiguous. The same key further on is another sample.
- Suffixes are compared in lower case. The same suffix twice in a sample is an error.
- Skipped are folders, links, devices, names without a dot, and metadata: `__name__` and everything in `__name__/`.
- A tar ends at its first block of zeros or at a damaged header, whatever follows.

The record is the `json` member, or the only member with conversations whose suffix ends in `.json`, as in `a.jpg.json`.
The image is the first of these that exists:

1. The member with a plain image suffix (`jpg`, not `depth.png`); of several, the one with the suffix of the record's
   `image`. Beside a numbered one, such as `2.jpg`, it is one of several.
2. The only member whose suffix ends in an image suffix.
3. The only member whose bytes are an image. Text files are never tried.

Each member of a tar is used, ignored or rejected, and the counts add up. A sample is rejected with a reason of
TAR_REASONS or `records.RECORD_REASONS`. The whole tar is rejected if WebDataset raises an error, loses members
silently, or needs unpickling, or if no byte range contains a sample (a compressed tar).
"""

import hashlib
import io
import json
import mmap
import posixpath
import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from pipelines.core.imports import import_without
from pipelines.data import records

TAR_REASONS = {
    "no record": "no member json, LLaVA's record",
    "split sample": "the key comes again further on, with the sample's other members",
    "sparse member": "the record or the image is stored sparse: no byte range holds it (make the tar without --sparse)",
}
"""Reasons to reject a sample of a tar, in addition to those of its record."""

_IMAGE_SUFFIXES = "apng avif bmp dib gif ico img jfif jp2 jpe jpeg jpg pbm pgm png pnm ppm tga tif tiff webp"
IMAGE_SUFFIXES = frozenset(_IMAGE_SUFFIXES.split())
"""Suffixes of images. `redux shards make` writes `img` for other formats."""
RECOGNIZED_FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "PPM", "TIFF", "JPEG2000", "AVIF")
"""Pillow's formats that are recognised by their bytes, for members with another suffix."""
_TEXT_SUFFIXES = "cls csv html id index json jsonl text tsv txt xml yaml yml"
TEXT_SUFFIXES = frozenset(_TEXT_SUFFIXES.split())
"""Suffixes of members that are never images, whatever their bytes."""
PICKLE_SUFFIXES = (".pkl", ".pickle", ".pt", ".pth", ".pyd", ".npy", ".npz")
_NUMBERED_SUFFIX = re.compile(r"(?:image|img|photo|picture)?_?\d+\.\w+$")
COMPRESSION_MAGIC = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
}
"""Compression programs by the first bytes of their files."""
MEMBER_KINDS = {tarfile.DIRTYPE: "folder", tarfile.LNKTYPE: "hard link", tarfile.SYMTYPE: "symbolic link"}
HASH_CHUNK_BYTES = 2**20

BytesLike = bytes | mmap.mmap


@dataclass(frozen=True)
class TarMember:
    """File in a tar: its suffix in lower case, and the byte offsets of header, content and end."""

    name: str
    suffix: str
    start: int
    content_start: int
    size: int
    end: int
    sparse: bool

    @property
    def content(self) -> slice:
        return slice(self.content_start, self.content_start + self.size)


@dataclass
class TarSample:
    """Sample that WebDataset reads.

    words: number of words of all turns. rejection_reason: None for a usable sample, which has a record.
    rejection_field, rejection_value: field of the record that is the reason, and its value; "" for other reasons.
    """

    key: str
    members: list[TarMember]
    record: TarMember | None = None
    image: TarMember | None = None
    words: int = 0
    rejection_reason: str | None = None
    rejection_field: str = ""
    rejection_value: str = ""

    @property
    def offset(self) -> int:
        return self.members[0].start

    @property
    def length(self) -> int:
        return self.members[-1].end - self.offset

    @property
    def used(self) -> list[TarMember]:
        return [] if self.rejection_reason else [member for member in (self.record, self.image) if member]


@dataclass
class Tar:
    """Content of a tar.

    samples: samples in the order of the tar, including rejected ones. outside: number of members outside of samples, by
    kind. links: name and kind of a link, by the key of its sample. notes: lines about unexpected content. members:
    number of all members.
    """

    samples: list[TarSample] = field(default_factory=list)
    outside: Counter[str] = field(default_factory=Counter)
    links: dict[str, tuple[str, str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    members: int = 0

    @property
    def good_samples(self) -> list[TarSample]:
        """Samples that are not rejected."""
        return [sample for sample in self.samples if not sample.rejection_reason]

    @property
    def used(self) -> Counter[str]:
        """Number of members that training reads, by suffix."""
        return Counter(member.suffix for sample in self.samples for member in sample.used)

    @property
    def ignored(self) -> Counter[str]:
        """Number of members that nothing reads, by suffix or kind."""
        unread = (member for sample in self.good_samples for member in sample.members if member not in sample.used)
        return Counter(member.suffix for member in unread) + self.outside

    @property
    def rejected(self) -> int:
        """Number of members of rejected samples."""
        return sum(len(sample.members) for sample in self.samples if sample.rejection_reason)


def read_tar(data: BytesLike, name: str) -> Tar:
    """List samples and members of a tar.

    Args:
        data: the whole tar, in memory or mapped into memory.
        name: name of the tar, for messages.

    Raises:
        ValueError: the whole tar is rejected. The message is one line.
    """
    tar = Tar()
    for sample in _group_samples(_read_members(data, name, tar), name):
        _resolve_sample(sample, data)
        tar.samples.append(sample)
    _reject_split_samples(tar, name)
    assert sum(tar.used.values()) + sum(tar.ignored.values()) + tar.rejected == tar.members, name
    return tar


def iterate_samples(data: BytesLike, name: str, tar: Tar) -> Iterator[TarSample]:
    """Yield the samples that WebDataset reads from a tar, without a search for record and image.

    Args:
        data: the whole tar, in memory or mapped into memory.
        name: name of the tar, for messages.
        tar: an empty one, which gets the members outside of samples, but no samples.

    Raises:
        ValueError: the whole tar is rejected. The message is one line.
    """
    return _group_samples(_read_members(data, name, tar), name)


def make_index_rows(tar: Tar, data: BytesLike, name: str) -> list[dict[str, Any]]:
    """Make the rows of the index, one per kept sample, with the columns of `index_file.INDEX_SCHEMA`."""
    return [
        {
            "key": to_utf8(sample.key),
            "shard": name,
            "offset": sample.offset,
            "length": sample.length,
            "sha256": _hash_range(data, sample.offset, sample.length),
            "record_at": sample.record.content_start - sample.offset if sample.record else 0,
            "record_size": sample.record.size if sample.record else 0,
            "image_at": sample.image.content_start - sample.offset if sample.image else 0,
            "image_size": sample.image.size if sample.image else 0,
            "words": sample.words,
        }
        for sample in tar.good_samples
    ]


def to_utf8(name: str) -> str:
    r"""Make a name encodable as UTF-8: bytes of other encodings become the text `\udcXX`."""
    return name.encode("utf-8", "backslashreplace").decode()


def escape_unprintable(name: str) -> str:
    """Escape a name if it contains unprintable characters, so that it fits on one line."""
    return name if name.isprintable() else ascii(name)[1:-1]


# --- as WebDataset reads ---------------------------------------------------------------------------------------------


def _read_members(data: BytesLike, name: str, tar: Tar) -> Iterator[TarMember]:
    """Yield the files that WebDataset groups into samples, and count the others in `tar`."""
    base_plus_ext = import_without("webdataset.tariterators", "torch").base_plus_ext
    end = 0
    for info, end in _read_headers(data, name):
        tar.members += 1
        if not info.isreg():
            kind = MEMBER_KINDS.get(info.type, "device")
            tar.outside[kind] += 1
            if info.islnk() or info.issym():
                tar.links[base_plus_ext(info.name)[0]] = (info.name, kind)
        elif _is_metadata(info.name):
            tar.outside["metadata"] += 1
        elif (suffix := base_plus_ext(info.name)[1]) is None:
            tar.outside["no suffix"] += 1
        elif info.name.lower().endswith(PICKLE_SUFFIXES):
            raise ValueError(
                f"{name}: member {escape_unprintable(info.name)}, allowed: what can be read without unpickling"
            )
        elif suffix.startswith("__"):
            raise ValueError(
                f"{name}: member {escape_unprintable(info.name)}, allowed: a suffix that WebDataset does not reserve"
            )
        else:
            yield TarMember(info.name, suffix.lower(), info.offset, info.offset_data, info.size, end, info.issparse())
    # The end: WebDataset stops at zeros or damage without an error, so what follows is checked here.
    if end == len(data):
        tar.notes.append(f"{name}: ends without the two blocks of zeros that end a tar: it may have been cut")
    nonzero_at = _find_nonzero_byte(data, end)
    if nonzero_at is not None:
        raise ValueError(
            f"{name}: WebDataset reads {tar.members} members and stops at byte {end}, and there is more from byte "
            f"{nonzero_at} on, allowed: one whole tar (not two concatenated tars, not a damaged or cut one)"
        )


def _read_headers(data: BytesLike, name: str) -> Iterator[tuple[tarfile.TarInfo, int]]:
    """Yield each member of the tar, and the byte offset at which the next member begins."""
    try:
        # tarfile detects a cut tar by seeking beyond the end, which a memory map does not allow.
        file = io.BytesIO(data) if isinstance(data, bytes) else _SeekableMap(data)
        with tarfile.open(fileobj=file, mode="r:") as archive:
            previous = -1
            while info := archive.next():
                if archive.offset <= previous:  # a negative size in a damaged header would loop forever
                    raise tarfile.ReadError("a member begins before the previous one")
                previous = archive.offset
                archive.members = []  # type: ignore[attr-defined]  # else all headers stay in memory
                yield info, archive.offset
    except GeneratorExit:
        raise
    except Exception as error:  # a damaged header raises more than tarfile's errors
        for magic, program in COMPRESSION_MAGIC.items():
            if data[: len(magic)] == magic:
                raise ValueError(
                    f"{name}: compressed by {program}, allowed: plain tars, of which a byte range is a sample"
                ) from None
        raise ValueError(f"{name}: cut, damaged or no tar ({error}), allowed: a whole tar") from None


class _SeekableMap(io.RawIOBase):
    """Memory map as a readable file that can seek beyond its end. Bytes are copied only when they are read."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data, self._position = data, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: len(self._data)}[whence]
        if base + offset < 0:
            raise ValueError(f"negative seek position {base + offset}")
        self._position = base + offset
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        stop = len(self._data) if size is None or size < 0 else self._position + size
        chunk = self._data[self._position : stop]
        self._position += len(chunk)
        return chunk


def _is_metadata(name: str) -> bool:
    """Return True if a member is metadata, which `webdataset.tariterators.tar_file_iterator` skips."""
    is_file = "/" not in name and name.startswith("__") and name.endswith("__")
    return is_file or re.match(r"__[^/]*__($|/)", name) is not None


def _group_samples(members: Iterator[TarMember], name: str) -> Iterator[TarSample]:
    """Group members into samples with WebDataset's function."""
    group_by_keys = import_without("webdataset.tariterators", "torch").group_by_keys
    last: TarMember | None = None  # for the message: WebDataset's error does not name the member

    def entries() -> Iterator[dict[str, Any]]:
        nonlocal last
        # `last` stays the member after whose entry WebDataset stopped.
        for last in members:
            yield {"fname": last.name, "data": last, "__url__": name}

    samples = group_by_keys(entries())
    while True:
        try:
            sample = next(samples, None)
        except ValueError as error:
            if len(error.args) > 1 and last:  # WebDataset's errors have more arguments than those of `members`
                raise ValueError(
                    f"{name}: member {escape_unprintable(last.name)}: got a second "
                    f".{escape_unprintable(last.suffix)} of one sample, allowed: one"
                ) from None
            raise
        if sample is None:
            return
        key = str(sample["__key__"])
        yield TarSample(key, [value for value in sample.values() if isinstance(value, TarMember)])


# --- which member is what --------------------------------------------------------------------------------------------


def _resolve_sample(sample: TarSample, data: BytesLike) -> None:
    """Find the sample's record and image, or the reason to reject it."""
    if any(member.sparse and find_last_suffix(member) in IMAGE_SUFFIXES | {"json"} for member in sample.members):
        sample.rejection_reason = "sparse member"
        return
    record, sample.rejection_reason = _find_record(sample, data)
    if sample.rejection_reason:
        return
    sample.image, sample.rejection_reason = find_image(sample, record, data)
    if sample.rejection_reason:
        return
    rejection = records.find_several_images(record)
    if sample.image:
        # The member counts, whatever path the record names.
        record = {**record, "image": f"image.{sample.image.suffix}"}
    elif records.has_image(record) and not rejection:
        sample.rejection_reason = "missing image"
        return
    rejection = rejection or records.find_rejection(record, None)
    if rejection:
        sample.rejection_reason = rejection.reason
        sample.rejection_field, sample.rejection_value = rejection.field, rejection.value
    else:
        sample.words = records.count_words(record)


def _find_record(sample: TarSample, data: BytesLike) -> tuple[Any, str | None]:
    """Find the sample's record, and set `sample.record`. Returns the record unchecked, or a reason to reject."""
    plain = [member for member in sample.members if member.suffix == "json"]
    dotted = [member for member in sample.members if member.suffix.endswith(".json")]
    values = {member.name: parse_member(data, member) for member in plain + dotted}
    with_conversations = [member for member in plain + dotted if _has_conversations(values[member.name])]
    if len(with_conversations) > 1:
        return None, "several records"
    candidates = with_conversations or plain
    if not candidates:
        return None, "no record"
    [sample.record] = candidates
    value = values[sample.record.name]
    if isinstance(value, records.UnparsedRecord):
        return value, "not JSON"
    return value, None if _has_conversations(value) else "wrong fields"


def _has_conversations(value: Any) -> bool:
    return isinstance(value, dict) and "conversations" in value


def find_last_suffix(member: TarMember) -> str:
    """Return the last part of a member's suffix."""
    return member.suffix.rpartition(".")[2]


def parse_member(data: BytesLike, member: TarMember) -> Any:
    """Parse a member as JSON; an `UnparsedRecord` if it is none."""
    content = bytes(data[member.content])
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        text = content.decode("utf-8-sig", "surrogateescape")
        return records.UnparsedRecord(text, records.describe_json_error(error))


def find_image(sample: TarSample, record: dict, data: BytesLike) -> tuple[TarMember | None, str | None]:
    """Find the image of a sample. Returns the member or None, and a reason to reject or None."""
    plain = [member for member in sample.members if member.suffix in IMAGE_SUFFIXES]
    dotted = [member for member in sample.members if find_last_suffix(member) in IMAGE_SUFFIXES]
    path = record.get("image")
    if len(plain) > 1 and isinstance(path, str):
        suffix = posixpath.splitext(path)[1].lower().removeprefix(".")
        plain = [member for member in plain if member.suffix == suffix] or plain
    # `jpg` beside `depth.png` is the image, but beside `2.jpg` one of several.
    numbered = [member for member in dotted if _NUMBERED_SUFFIX.match(member.suffix)]
    candidates = [*plain, *numbered] if plain else dotted
    candidates = candidates or [member for member in sample.members if _is_image(member, data)]
    if len(candidates) > 1:
        return None, "several images"
    return (candidates[0] if candidates else None), None


def _is_image(member: TarMember, data: BytesLike) -> bool:
    """Return True if the bytes of a member begin like an image. False for members with a suffix of texts."""
    if member.sparse or find_last_suffix(member) in TEXT_SUFFIXES:
        return False
    try:
        with Image.open(io.BytesIO(data[member.content]), formats=RECOGNIZED_FORMATS):
            return True
    except Exception:  # each of Pillow's formats raises other errors
        return False


def _reject_split_samples(tar: Tar, name: str) -> None:
    """Reject all samples of a repeated key if one of them is rejected; otherwise add a note."""
    by_key: dict[str, list[TarSample]] = {}
    for sample in tar.samples:
        by_key.setdefault(sample.key, []).append(sample)
    for key, same in by_key.items():
        if len(same) == 1:
            continue
        if any(sample.rejection_reason for sample in same):
            for sample in same:
                sample.rejection_reason = "split sample"
        else:
            tar.notes.append(f"{name}: {len(same)} samples have the key {escape_unprintable(key)}; all are kept")


# --- bytes -----------------------------------------------------------------------------------------------------------


def _hash_range(data: BytesLike, offset: int, length: int) -> bytes:
    digest = hashlib.sha256()
    # Hash in chunks, since a slice of a memory map is a copy.
    for start in range(offset, offset + length, HASH_CHUNK_BYTES):
        digest.update(data[start : min(start + HASH_CHUNK_BYTES, offset + length)])
    return digest.digest()


def _find_nonzero_byte(data: BytesLike, start: int) -> int | None:
    """Return the offset of the first nonzero byte at or after `start`, or None."""
    for offset in range(start, len(data), HASH_CHUNK_BYTES):
        chunk = data[offset : offset + HASH_CHUNK_BYTES]
        nonzero = chunk.lstrip(b"\0")
        if nonzero:
            return offset + len(chunk) - len(nonzero)
    return None
