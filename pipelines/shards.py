"""WebDataset shards and the index beside them: made on Ray Data, checked, read by byte ranges.

Shards are plain tars that any WebDataset tool reads: of each sample the image file as it came and `json`, the record.
The index gives every sample's shard, byte range and checksum, so that one sample is one ranged read: training can take
any sample at any time, in any order, without streaming the tar before it.  Nothing in a shard is ever unpickled.

    out/000000.tar, 000001.tar, ...     KEY.jpg (or png, ...), KEY.json, KEY.jpg, ...; KEY the record's number
    out/index.parquet                   a row a sample, in the order of the records: SCHEMA
    out/quarantine.jsonl                {"number", "id", "reason"} of each record that is in no shard
    out/summary.json                    what was asked, records put in, samples kept, records kept out by reason

The index comes last: without it there is no set.  Before, `out/unfinished/` holds a part of it for each shard that is
there, which is what a second start goes on from.  Folders may be on any file system that fsspec knows.
"""

import hashlib
import io
import json
import os
import posixpath
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

import pyarrow as pa
import ray.data
from annotated_types import Ge
from pyarrow import parquet
from tqdm import tqdm

from pipelines import records as check
from pipelines import storage

INDEX, QUARANTINE, SUMMARY, UNFINISHED = "index.parquet", "quarantine.jsonl", "summary.json", "unfinished"
SCHEMA = pa.schema(
    {
        "key": pa.string(),
        "shard": pa.string(),
        "offset": pa.int64(),
        "length": pa.int64(),
        "sha256": pa.string(),
        "image": pa.bool_(),
        "words": pa.int32(),
    }
)
BLOCK = 512
"""Bytes of a block of a tar, to which every member is filled up."""
PICKLES = (".pkl", ".pickle", ".pt", ".pth", ".pyd", ".npy", ".npz")


@dataclass(frozen=True, kw_only=True)
class Data:
    """Where samples come from, and how many of them a shard holds."""

    source: Literal["easy-vqa"] = "easy-vqa"
    samples_per_shard: Annotated[int, Ge(1)] = 1000


@dataclass(frozen=True, kw_only=True)
class Making:
    """How records become shards.

    samples_per_shard: records put in, kept or not.
    words: a record with more is kept out; None takes any length.
    tolerance: share of the records that may be kept out before the whole fails.
    """

    samples_per_shard: Annotated[int, Ge(1)] = 1000
    words: Annotated[int, Ge(1)] | None = None
    tolerance: float = 0.0


@dataclass(frozen=True)
class Sample:
    """One sample as stored: the image file's bytes, none for text alone, and the record."""

    key: str
    image: bytes
    record: dict

    @property
    def id(self) -> str:
        """The record's own id, which may repeat; the key where it has none."""
        return str(self.record.get("id", self.key))


def make(records: Sequence[Any], images: str, out: str, making: Making) -> dict[str, Any]:
    """Write records (LLaVA's form, `image` a path within `images`) as shards in `out`; returns the summary.

    Records that cannot be used go to the quarantine list with a reason of `records.REASONS`.  An interrupted making
    goes on where it was; a finished one is left as it is.  ValueError where `out` holds shards of other records or
    settings, or more than the tolerated share was kept out: then there is no index, but the list.
    """
    asked = {**asdict(making), "records": hashlib.sha256(_json(records)).hexdigest()}
    del asked["tolerance"]  # more may be tolerated after all
    path, finished = storage.join(out, SUMMARY), storage.exists(storage.join(out, INDEX))
    before = json.loads(storage.read(path)) if storage.exists(path) else {"asked": None if finished else asked}
    if before["asked"] != asked:
        raise ValueError(f"{out}: holds shards of other records or settings, allowed: an empty folder")
    if finished:
        return before
    storage.write(path, _json({"asked": asked}))
    seen: set[bytes] = set()
    faults = [_fault(record, making, seen) for record in records]
    size = making.samples_per_shard
    done, left = set(storage.names(storage.join(out, UNFINISHED))), []
    with tqdm(total=len(records), desc=f"shards {posixpath.basename(out.rstrip('/'))}", unit="record") as bar:
        for number, first in enumerate(range(0, len(records), size)):
            part = slice(first, first + size)
            if f"{number:06d}.parquet" in done:
                bar.update(len(records[part]))
                continue
            given = {"records": _json(records[part]), "faults": _json(faults[part])}
            left.append({"shard": number, "first": first, **given})
        if left:
            rows = ray.data.from_items(left, override_num_blocks=len(left)).map(
                _shard, fn_args=(images, out), num_cpus=1
            )
            for row in rows.iter_rows():
                bar.update(row["records"])
    return _finish(records, out, making, asked, -(-len(records) // size))


def _fault(record: Any, making: Making, seen: set[bytes]) -> str | None:
    digest = hashlib.sha256(_json(record)).digest()
    if digest in seen:
        return "duplicate"
    seen.add(digest)
    return check.fault(record, making.words)


def _shard(block: dict[str, Any], images: str, out: str) -> dict[str, Any]:
    """Write one shard, then its part of the index."""
    import webdataset  # brings torch along, which readers do without

    kept, out_of = [], []
    given, faults = json.loads(block["records"]), json.loads(block["faults"])
    buffer = io.BytesIO()
    # fixed times and owner: equal records give equal bytes
    with webdataset.TarWriter(buffer, mtime=0, user="redux", group="redux") as tar:
        for number, (record, fault) in enumerate(zip(given, faults, strict=True), start=block["first"]):
            member = {"__key__": f"{number:09d}", "json": record}
            if not fault and "image" in record:
                fault, image = _image(storage.join(images, check.inside(record["image"]) or ""))
                suffix = posixpath.splitext(record["image"])[1].lower().removeprefix(".") or "img"
                member = {"__key__": member["__key__"], suffix: image, "json": record}
            if fault:
                name = record.get("id") if isinstance(record, dict) else None
                out_of.append({"number": number, "id": name, "reason": fault})
                continue
            tar.write(member)
            kept.append({"image": "image" in record, "words": check.length(record)})
    data, name = buffer.getvalue(), f"{block['shard']:06d}.tar"
    rows = [{**row, **more} for row, more in zip(index(data, name), kept, strict=True)]
    storage.write(storage.join(out, name), data)
    table = pa.Table.from_pylist(rows, SCHEMA).replace_schema_metadata({"quarantine": json.dumps(out_of)})
    sink = io.BytesIO()
    parquet.write_table(table, sink)
    storage.write(storage.join(out, UNFINISHED, f"{block['shard']:06d}.parquet"), sink.getvalue())
    return {"records": len(given)}


def _image(url: str) -> tuple[str | None, bytes]:
    try:
        image = storage.read(url)
    except ValueError:  # not there, or nobody may read it
        return "missing image", b""
    return check.image_fault(url, image), image


def _finish(records: Sequence[Any], out: str, making: Making, asked: dict, shards: int) -> dict[str, Any]:
    """The parts together as the index, the quarantine list and the summary."""
    names = [storage.join(out, UNFINISHED, f"{number:06d}.parquet") for number in range(shards)]
    parts = [parquet.read_table(io.BytesIO(storage.read(name))) for name in names]
    listed = [entry for part in parts for entry in json.loads(part.schema.metadata[b"quarantine"])]
    storage.write(storage.join(out, QUARANTINE), b"".join(_json(entry) + b"\n" for entry in listed))
    reasons = dict(sorted(Counter(entry["reason"] for entry in listed).items()))
    kept = sum(len(part) for part in parts)
    summary = {"asked": asked, "records": len(records), "kept": kept, "quarantined": reasons}
    if kept + len(listed) != len(records):
        raise RuntimeError(f"{out}: {len(records)} records became {kept} samples and {len(listed)} in quarantine")
    if len(listed) > making.tolerance * len(records):
        for name, part in zip(names, parts, strict=True):
            if json.loads(part.schema.metadata[b"quarantine"]):
                storage.remove(name)  # a second start looks again, since files can be mended
        raise ValueError(
            f"{out}: {len(listed)} of {len(records)} records cannot be used ({_counts(reasons)}), allowed: "
            f"{making.tolerance:.2%}; {storage.join(out, QUARANTINE)} lists them"
        )
    storage.write(storage.join(out, SUMMARY), json.dumps(summary, indent=2).encode())
    write_index(out, pa.concat_tables([part.replace_schema_metadata() for part in parts] or [SCHEMA.empty_table()]))
    for name in names:
        storage.remove(name)
    return summary


def _counts(reasons: dict[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in reasons.items())


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode()


def write_index(out: str, table: pa.Table) -> None:
    """The index, which makes the folder a set."""
    sink = io.BytesIO()
    parquet.write_table(table, sink)
    storage.write(storage.join(out, INDEX), sink.getvalue())


def index(tar: bytes, name: str) -> Iterator[dict]:
    """Rows of the index for one tar, also a foreign one: members of a sample stand together and share the key.

    A key is, as for WebDataset, the path up to the first dot of its last part.  ValueError for a member that only
    unpickling could read.
    """
    with tarfile.open(fileobj=io.BytesIO(tar)) as opened:
        members = [member for member in opened.getmembers() if member.isfile()]
    for member in members:
        if member.name.lower().endswith(PICKLES):
            raise ValueError(f"{name}: member {member.name}, allowed: what can be read without unpickling")
    keys = [_key(member.name) for member in members]
    first = 0
    for number in range(1, len(members) + 1):
        if number < len(members) and keys[number] == keys[first]:
            continue
        start, last = members[first].offset, members[number - 1]
        length = last.offset_data + -(-last.size // BLOCK) * BLOCK - start
        digest = hashlib.sha256(tar[start : start + length]).hexdigest()
        yield {"key": keys[first], "shard": name, "offset": start, "length": length, "sha256": digest}
        first = number


def _key(name: str) -> str:
    folder, last = posixpath.split(name)
    return posixpath.join(folder, last.partition(".")[0])


class Shards:
    """A finished set of shards: `len`, and any samples by number.

    Small enough to travel to a task: columns of the index, no file handle.
    """

    def __init__(self, folder: str | os.PathLike) -> None:
        self.folder = os.fspath(folder)
        path = storage.join(self.folder, INDEX)
        if not storage.exists(path):
            raise ValueError(f"{self.folder}: no shards here, {INDEX} is missing")
        table = parquet.read_table(io.BytesIO(storage.read(path)))
        self.keys, self.names, self.sums = (table[name].to_pylist() for name in ("key", "shard", "sha256"))
        self.offsets, self.lengths, self.words = (table[name].to_numpy() for name in ("offset", "length", "words"))
        self.has_image = table["image"].to_numpy(zero_copy_only=False)

    def __len__(self) -> int:
        return len(self.keys)

    def read(self, numbers: Iterable[int]) -> list[Sample]:
        """The samples with these numbers, in this order.  ValueError where stored bytes are not those of the index."""
        asked = [int(number) for number in numbers]
        ranges = [
            (storage.join(self.folder, self.names[n]), int(self.offsets[n]), int(self.offsets[n] + self.lengths[n]))
            for n in asked
        ]
        return [
            self._sample(number, data, url)
            for number, data, (url, _, _) in zip(asked, storage.read_ranges(ranges), ranges, strict=True)
        ]

    def _sample(self, number: int, data: bytes, url: str) -> Sample:
        if hashlib.sha256(data).hexdigest() != self.sums[number]:
            raise ValueError(f"{url}: sample {self.keys[number]}: bytes differ from the index's checksum")
        image, record = b"", {}
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            for member in tar:
                body = tar.extractfile(member).read()  # type: ignore[union-attr]
                if member.name.endswith(".json"):
                    record = json.loads(body)
                else:
                    image = body
        return Sample(self.keys[number], image, record)
