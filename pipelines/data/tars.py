"""A tar as WebDataset 1.0.2 reads it: its samples, the record and the image of each, and all other members.

WebDataset's own `base_plus_ext` and `group_by_keys` make the samples, so that an index holds those that it reads:

- A key is the path up to the first dot of its last part: `a.0.jpg` and `a.1.jpg` are two members of sample `a`.
- Members of a sample stand together.  The same key further on is another sample.
- Suffixes count in small letters.  The same one twice in a sample is an error.
- Left out are folders, links and devices, names without a dot, and metadata: `__name__` and all below `__name__/`.
- A tar ends with its first block of zeros, or where a header is damaged, whatever follows.

The record is the `json` member, or the only one whose suffix ends in `.json` and that has conversations, as in
`a.jpg.json`.  The image is the member with a plain suffix of images (`jpg`, not `depth.png`); among several the one
whose suffix the record's `image` has; without a plain one the only one whose suffix ends in one of images, and without
that the only one whose bytes are an image.  No text file is ever taken for one.

Each of a tar's members is used, ignored or refused, and these add up.  A sample is refused with a reason of REASONS or
of `records.REASONS`.  The tar as a whole is refused where WebDataset raises an error, would lose members without a
word, or would need unpickling, and where no byte range holds what it reads (a compressed tar).
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

from pipelines.data import records

TAR_REASONS = {
    "no record": "no member json, LLaVA's record",
    "several records": "more than one member has conversations: a key ends at the first dot of a file's name",
    "several images": "more than one member can be the image, and the record does not tell which",
    "members apart": "the key comes again further on, with the sample's other members",
    "sparse member": "the record or the image is stored sparse: no byte range holds it (make the tar without --sparse)",
}
"""Why a sample of a tar is refused, beside the reasons of its record."""

_IMAGE_SUFFIXES = "apng avif bmp dib gif ico img jfif jp2 jpe jpeg jpg pbm pgm png pnm ppm tga tif tiff webp"
IMAGE_SUFFIXES = frozenset(_IMAGE_SUFFIXES.split())
"""Suffixes of images; `img` is what `redux shards make` writes where a file's name has no suffix of these."""
RECOGNIZED_FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "PPM", "TIFF", "JPEG2000", "AVIF")
"""Pillow's formats by which bytes without a telling suffix are known."""
_TEXT_SUFFIXES = "cls csv html id index json jsonl text tsv txt xml yaml yml"
TEXT_SUFFIXES = frozenset(_TEXT_SUFFIXES.split())
"""Suffixes of what is no image, whatever its bytes."""
PICKLE_SUFFIXES = (".pkl", ".pickle", ".pt", ".pth", ".pyd", ".npy", ".npz")
COMPRESSION_MAGIC = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
}
"""Programs by the first bytes of what they compress."""
MEMBER_KINDS = {tarfile.DIRTYPE: "folder", tarfile.LNKTYPE: "hard link", tarfile.SYMTYPE: "symbolic link"}
HASH_CHUNK_BYTES = 2**20

BytesLike = bytes | mmap.mmap


@dataclass(frozen=True)
class TarMember:
    """A file in a tar: its suffix in small letters, and where it begins, has its bytes and ends."""

    name: str
    suffix: str
    start: int
    at: int
    size: int
    end: int
    sparse: bool


@dataclass
class TarSample:
    """A sample that WebDataset reads.

    words: of all turns.  fault: the reason to refuse it; None for a good one, which has a record.
    """

    key: str
    members: list[TarMember]
    record: TarMember | None = None
    image: TarMember | None = None
    words: int = 0
    fault: str | None = None

    @property
    def offset(self) -> int:
        return self.members[0].start

    @property
    def length(self) -> int:
        return self.members[-1].end - self.offset

    @property
    def used(self) -> list[TarMember]:
        return [] if self.fault else [member for member in (self.record, self.image) if member]


@dataclass
class Tar:
    """Content of a tar.

    samples: in its order, refused ones too.  outside: how many members are of no sample, by kind.  notes: lines on what
        is read otherwise than people may think.
    """

    samples: list[TarSample] = field(default_factory=list)
    outside: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)
    members: int = 0

    @property
    def kept(self) -> list[TarSample]:
        return [sample for sample in self.samples if not sample.fault]

    @property
    def used(self) -> Counter[str]:
        """Members that training reads, by suffix."""
        return Counter(member.suffix for sample in self.samples for member in sample.used)

    @property
    def ignored(self) -> Counter[str]:
        """Members that nothing reads, by suffix or kind."""
        rest = (member for sample in self.kept for member in sample.members if member not in sample.used)
        return Counter(member.suffix for member in rest) + self.outside

    @property
    def refused(self) -> int:
        """Members of refused samples."""
        return sum(len(sample.members) for sample in self.samples if sample.fault)


def read_tar(data: BytesLike, name: str) -> Tar:
    """List what a tar holds.

    Args:
        data: the whole tar, in memory or mapped into it.
        name: of the tar, for errors.

    Raises:
        ValueError: one line, where the tar as a whole is refused.
    """
    tar = Tar()
    for sample in _group_samples(_read_members(data, name, tar), name):
        _resolve_sample(sample, data)
        tar.samples.append(sample)
    _reject_split_samples(tar, name)
    assert sum(tar.used.values()) + sum(tar.ignored.values()) + tar.refused == tar.members, name
    return tar


def make_index_rows(tar: Tar, data: BytesLike, name: str) -> list[dict[str, Any]]:
    """Rows of the index, one for each kept sample: `pipelines.data.shard_index.SCHEMA`."""
    return [
        {
            "key": to_utf8(sample.key),
            "shard": name,
            "offset": sample.offset,
            "length": sample.length,
            "sha256": _sha256(data, sample.offset, sample.length),
            "record_at": sample.record.at - sample.offset if sample.record else 0,
            "record_size": sample.record.size if sample.record else 0,
            "image_at": sample.image.at - sample.offset if sample.image else 0,
            "image_size": sample.image.size if sample.image else 0,
            "words": sample.words,
        }
        for sample in tar.kept
    ]


def to_utf8(name: str) -> str:
    r"""A name as UTF-8 can write it: bytes of other encodings become `\udcXX`."""
    return name.encode("utf-8", "backslashreplace").decode()


def escape_unprintable(name: str) -> str:
    """A name as one line shows it."""
    return name if name.isprintable() else ascii(name)[1:-1]


# --- as WebDataset reads ---------------------------------------------------------------------------------------------


def _read_members(data: BytesLike, name: str, tar: Tar) -> Iterator[TarMember]:
    """Files that WebDataset groups into samples; the others are counted in `tar`."""
    from webdataset.tariterators import base_plus_ext  # brings torch along, which readers do without

    end = 0
    for info, end in _read_headers(data, name):
        tar.members += 1
        if not info.isreg():
            tar.outside[MEMBER_KINDS.get(info.type, "device")] += 1
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
                f"{name}: member {escape_unprintable(info.name)}, allowed: a suffix that WebDataset does not keep for "
                "itself"
            )
        else:
            yield TarMember(info.name, suffix.lower(), info.offset, info.offset_data, info.size, end, info.issparse())
    if end == len(data):
        tar.notes.append(f"{name}: ends without the two blocks of zeros that end a tar: it may have been cut")
    if (at := _find_nonzero_byte(data, end)) is not None:
        raise ValueError(
            f"{name}: WebDataset reads {tar.members} members and stops at byte {end}, and there is more from byte "
            f"{at} on, allowed: one whole tar (not two behind one another, nor a damaged or cut one)"
        )


def _read_headers(data: BytesLike, name: str) -> Iterator[tuple[tarfile.TarInfo, int]]:
    """Each member of the tar, and the byte at which the next one begins."""
    try:
        # a mapped file cannot seek behind its end, which is how tarfile finds that one is cut
        file = io.BytesIO(data) if isinstance(data, bytes) else _SeekableMap(data)
        with tarfile.open(fileobj=file, mode="r:") as opened:
            begin = -1
            while info := opened.next():
                if opened.offset <= begin:
                    raise tarfile.ReadError("a member that begins before the one ahead of it")
                begin = opened.offset
                opened.members = []  # type: ignore[attr-defined]  # or all headers stay in memory, as for WebDataset
                yield info, opened.offset
    except GeneratorExit:
        raise
    except Exception as error:  # a damaged header brings up more than tarfile's own errors
        for magic, program in COMPRESSION_MAGIC.items():
            if data[: len(magic)] == magic:
                raise ValueError(
                    f"{name}: compressed by {program}, allowed: plain tars, of which a byte range is a sample"
                ) from None
        raise ValueError(f"{name}: cut, damaged or no tar ({error}), allowed: a whole tar") from None


class _SeekableMap(io.RawIOBase):
    """A mapped file as a file that can be read, of which nothing is copied before."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data, self._at = data, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: len(self._data)}[whence]
        if base + offset < 0:
            raise ValueError(f"negative seek position {base + offset}")
        self._at = base + offset
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        stop = len(self._data) if size is None or size < 0 else self._at + size
        found = self._data[self._at : stop]
        self._at += len(found)
        return found


def _is_metadata(name: str) -> bool:
    """Metadata of the tar, as `webdataset.tariterators.tar_file_iterator` leaves it out."""
    whole = "/" not in name and name.startswith("__") and name.endswith("__")
    return whole or re.match(r"__[^/]*__($|/)", name) is not None


def _group_samples(members: Iterator[TarMember], name: str) -> Iterator[TarSample]:
    """The members as WebDataset's samples."""
    from webdataset.tariterators import group_by_keys

    last: TarMember | None = None

    def entries() -> Iterator[dict[str, Any]]:
        nonlocal last
        for last in members:
            yield {"fname": last.name, "data": last, "__url__": name}

    samples = group_by_keys(entries())
    while True:
        try:
            sample = next(samples, None)
        except ValueError as error:
            if len(error.args) > 1 and last:  # WebDataset adds to its own, and not to those of `members`
                raise ValueError(
                    f"{name}: member {escape_unprintable(last.name)}: got a second "
                    f".{escape_unprintable(last.suffix)} of one sample, allowed: one"
                ) from None
            raise
        if sample is None:
            return
        key = str(sample["__key__"])
        yield TarSample(key, [each for each in sample.values() if isinstance(each, TarMember)])


# --- which member is what --------------------------------------------------------------------------------------------


def _resolve_sample(sample: TarSample, data: BytesLike) -> None:
    """Find the sample's record and image, or the reason to refuse it."""
    if any(member.sparse and _last_suffix(member) in IMAGE_SUFFIXES | {"json"} for member in sample.members):
        sample.fault = "sparse member"
        return
    record, sample.fault = _find_record(sample, data)
    if sample.fault:
        return
    sample.image, sample.fault = _find_image(sample, record, data)
    if sample.fault:
        return
    if sample.image:
        record = {**record, "image": f"image.{sample.image.suffix}"}  # the tar's, whatever path it had before
    elif records.has_image(record):
        sample.fault = "missing image"
        return
    found = records.find_rejection(record, None)
    sample.fault = found and found.reason
    if not sample.fault:
        sample.words = records.count_words(record)


def _find_record(sample: TarSample, data: BytesLike) -> tuple[Any, str | None]:
    """The sample's record, unchecked, or the reason that it has none; notes the member."""
    plain = [member for member in sample.members if member.suffix == "json"]
    dotted = [member for member in sample.members if member.suffix.endswith(".json")]
    values = {member.name: _parse_json(data, member) for member in plain + dotted}
    talks = [
        member
        for member in plain + dotted
        if isinstance(value := values[member.name], dict) and "conversations" in value
    ]
    if len(talks) > 1:
        return None, "several records"
    if not (found := talks or plain):
        return None, "no record"
    [sample.record] = found
    value = values[sample.record.name]
    return value, None if isinstance(value, dict) and "conversations" in value else "malformed"


def _last_suffix(member: TarMember) -> str:
    """The last part of a member's suffix."""
    return member.suffix.rpartition(".")[2]


def _parse_json(data: BytesLike, member: TarMember) -> Any:
    try:
        return json.loads(data[member.at : member.at + member.size])
    except (ValueError, RecursionError):
        return None


def _find_image(sample: TarSample, record: dict, data: BytesLike) -> tuple[TarMember | None, str | None]:
    """The sample's image, if it has one, or the reason to refuse the sample."""
    plain = [member for member in sample.members if member.suffix in IMAGE_SUFFIXES]
    dotted = [member for member in sample.members if _last_suffix(member) in IMAGE_SUFFIXES]
    if len(plain) > 1 and isinstance(named := record.get("image"), str):
        suffix = posixpath.splitext(named)[1].lower().removeprefix(".")
        plain = [member for member in plain if member.suffix == suffix] or plain
    found = plain or dotted or [member for member in sample.members if _is_image(member, data)]
    if len(found) > 1:
        return None, "several images"
    return (found[0] if found else None), None


def _is_image(member: TarMember, data: BytesLike) -> bool:
    """Tell if the bytes of a member begin as an image does, and its suffix says nothing else."""
    if member.sparse or _last_suffix(member) in TEXT_SUFFIXES:
        return False
    try:
        with Image.open(io.BytesIO(data[member.at : member.at + member.size]), formats=RECOGNIZED_FORMATS):
            return True
    except Exception:  # each of Pillow's formats has its own errors
        return False


def _reject_split_samples(tar: Tar, name: str) -> None:
    """Refuse all samples of a key that comes again, where one of them is not whole; note keys that repeat."""
    by_key: dict[str, list[TarSample]] = {}
    for sample in tar.samples:
        by_key.setdefault(sample.key, []).append(sample)
    for key, same in by_key.items():
        if len(same) == 1:
            continue
        if any(sample.fault for sample in same):
            for sample in same:
                sample.fault = "members apart"
        else:
            tar.notes.append(f"{name}: {len(same)} samples have the key {escape_unprintable(key)}; all are kept")


# --- bytes -----------------------------------------------------------------------------------------------------------


def _sha256(data: BytesLike, offset: int, length: int) -> bytes:
    digest = hashlib.sha256()
    for at in range(offset, offset + length, HASH_CHUNK_BYTES):
        digest.update(data[at : min(at + HASH_CHUNK_BYTES, offset + length)])
    return digest.digest()


def _find_nonzero_byte(data: BytesLike, start: int) -> int | None:
    """The place of the first byte from `start` on that is not zero."""
    for at in range(start, len(data), HASH_CHUNK_BYTES):
        part = data[at : at + HASH_CHUNK_BYTES]
        if rest := part.lstrip(b"\0"):
            return at + len(part) - len(rest)
    return None
