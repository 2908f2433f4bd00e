"""WebDataset shards and the index beside them: made on Ray Data, checked, read by byte ranges.

Shards are plain tars that any WebDataset tool reads: of each sample the image, as it came or prepared, and `json`, the
record.  The index gives every sample's shard, byte range and checksum, so that one sample is one ranged read: training
can take any sample at any time, in any order, without streaming the tar before it.  Nothing in a shard is ever
unpickled.

    out/000000.tar, 000001.tar, ...     KEY.jpg (or png, ...), KEY.json, KEY.jpg, ...; KEY the record's number
    out/index.arrow                     a row a sample, in the order of the records: SCHEMA
    out/quarantine.jsonl                {"number", "id", "reason", "field", "value", "why"} of each record in no shard
    out/summary.json                    what was asked, records put in, samples kept, records kept out by reason

The index comes last: without it there is no set.  Before, `out/unfinished/` holds a part of it for each shard that is
there, which is what a second start goes on from.  Folders may be on any file system that fsspec knows.

The index is an Arrow IPC file of one uncompressed record batch, about 100 bytes a sample.  On a local path it is mapped
into memory: a process pays for the pages that it touches, and all processes of a machine share them; so it is replaced
and never written to in place, which would end who reads it.  From a bucket each process reads it whole.
"""

import contextlib
import functools
import hashlib
import io
import json
import os
import posixpath
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any
from uuid import uuid4

import numpy as np
import pyarrow as pa
import ray.data
from jaxtyping import Bool, Int32, Int64
from pyarrow import ipc
from tqdm import tqdm

from pipelines.core import interrupts, storage
from pipelines.data import records as check
from pipelines.data import tars
from pipelines.data.images import ImageFolder, OutsideError, decode
from pipelines.data.options import Making
from redux.image import prepare_image
from redux.settings import ImageAspectRatio

BAR = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_noinv_fmt}]"
"""tqdm's own, with one unit for slow and fast."""

FORMER_NAMES = {
    "words": "max_words",
    "size": "image_size",
    "fit": "image_aspect_ratio",
    "tolerance": "max_bad_fraction",
}
"""Settings that had other names when older sets were made."""

INDEX, QUARANTINE, SUMMARY, UNFINISHED = "index.arrow", "quarantine.jsonl", "summary.json", "unfinished"
SCHEMA = pa.schema(
    {
        "key": pa.large_string(),
        "shard": pa.dictionary(pa.int32(), pa.string()),
        "offset": pa.int64(),
        "length": pa.int64(),
        "sha256": pa.binary(32),
        "record_at": pa.int64(),
        "record_size": pa.int64(),
        "image_at": pa.int64(),
        "image_size": pa.int64(),
        "words": pa.int32(),
    }
)
"""Of each sample: its name, tar, range of bytes and their checksum; within the range the record and the image file,
of size 0 for text alone; and the words of all turns.

Samples of a shard stand together, and the dictionary has the shards in the order of their samples.
"""


@dataclass(frozen=True)
class Sample:
    """One sample as stored: the image file's bytes, none for text alone, and the record."""

    key: str
    image: bytes
    record: dict

    @property
    def id(self) -> str:
        """The record's own id, which may repeat; the key where it has none."""
        name = self.record.get("id")
        return self.key if name is None else str(name).encode("utf-8", "backslashreplace").decode()


def make(records: Sequence[Any], images: str, out: str, making: Making) -> dict[str, Any]:
    """Write records (LLaVA's form, `image` a path within `images`) as shards in `out`; returns the summary.

    Records that cannot be used go to the quarantine list with a reason of `records.REASONS`.  An interrupted making
    goes on where it was; a finished one is left as it is.  A making that failed before its first shard holds nothing.
    ValueError where `out` holds shards of other records or settings, or more than the tolerated share was kept out:
    then there is no index, but the list.
    """
    asked = {**asdict(making), "records": hashlib.sha256(_json(records)).hexdigest()}
    del asked["max_bad_fraction"]  # more may be tolerated after all
    path, finished = storage.join(out, SUMMARY), is_finished(out)
    before = _asked_before(out, asked)
    made = finished or storage.names(storage.join(out, UNFINISHED))
    if made and before["asked"] != asked:
        raise ValueError(
            f"{out}: holds shards of other records or settings, allowed: an empty folder; delete it, or name another"
        )
    if finished:
        return before
    storage.write(path, _json({"asked": asked}))
    for folder in (out, storage.join(out, UNFINISHED)):
        storage.remove_partial(folder)
    seen: set[bytes] = set()
    faults = [_find_fault(record, making, seen) for record in records]
    each = making.samples_per_shard
    done, left, already = set(storage.names(storage.join(out, UNFINISHED))), list[dict[str, Any]](), 0
    for number, first in enumerate(range(0, len(records), each)):
        part = slice(first, first + each)
        if f"{number:06d}.arrow" in done:
            already += len(records[part])
        else:
            given = {"records": _json(records[part]), "faults": _json(faults[part])}
            left.append({"shard": number, "first": first, **given})
    title = f"shards {posixpath.basename(out.rstrip('/'))}"
    with tqdm(desc=title, total=len(records), initial=already, unit="record", bar_format=BAR) as bar:
        if left:
            rows = ray.data.from_items(left, override_num_blocks=len(left)).map(
                _shard, fn_args=(images, out, making), num_cpus=1
            )
            for row in rows.iter_rows():
                interrupts.check()
                bar.update(row["records"])
    return _finish(records, out, making, asked, -(-len(records) // each))


def is_finished(out: str) -> bool:
    """Tell if the folder holds a finished set."""
    return storage.exists(storage.join(out, INDEX))


def _current_names(asked: dict[str, Any]) -> dict[str, Any]:
    """Settings in a summary under the names they have now; sets that are in use were made under others."""
    return {FORMER_NAMES.get(name, name): value for name, value in asked.items()}


def _asked_before(out: str, asked: dict[str, Any]) -> dict[str, Any]:
    """The summary of a making in this folder, or what begins one.

    Raises:
        ValueError: the folder holds what no making left there, which would be overwritten.
    """
    path, tarred = storage.join(out, SUMMARY), [name for name in storage.names(out) if name.endswith(".tar")]
    if storage.exists(path):
        try:
            before = json.loads(storage.read(path))
        except ValueError:
            before = None
        if isinstance(before, dict) and "asked" in before:
            return {**before, "asked": _current_names(before["asked"])}
        raise ValueError(f"{path}: no summary of shards, allowed: a folder for the set alone; name another")
    if is_finished(out):
        return {"asked": None}
    if tarred:
        raise ValueError(f"{out}: holds tars that were not made here ({tarred[0]}), allowed: an empty folder")
    return {"asked": asked}


def _find_fault(record: Any, making: Making, seen: set[bytes]) -> check.Fault | None:
    digest = hashlib.sha256(_json(record)).digest()
    if digest in seen:
        return check.Fault("duplicate", "", check.shorten(record))
    seen.add(digest)
    return check.find_fault(record, making.max_words)


def _shard(block: dict[str, Any], images: str, out: str, making: Making) -> dict[str, Any]:
    """Write one shard, then its part of the index."""
    import webdataset  # brings torch along, which readers do without

    kept, quarantined, folder = 0, [], ImageFolder(images)
    given, faults = json.loads(block["records"]), json.loads(block["faults"])
    buffer = io.BytesIO()
    # fixed times and owner: equal records give equal bytes
    with webdataset.TarWriter(buffer, mtime=0, user="redux", group="redux") as tar:
        for number, (record, found) in enumerate(zip(given, faults, strict=True), start=block["first"]):
            fault = check.Fault(*found) if found else None
            member = {"__key__": f"{number:09d}", "json": record}
            if not fault and check.has_image(record):
                fault, suffix, image = _image(folder, record["image"], making)
                member = {"__key__": member["__key__"], suffix: image, "json": record}
            if fault:
                quarantined.append(_entry(number, record, fault))
                continue
            tar.write(member)
            kept += 1
    data, name = buffer.getvalue(), f"{block['shard']:06d}.tar"
    rows = tars.rows(tars.read_tar(data, name), data, name) if kept else []
    if len(rows) != kept:
        raise RuntimeError(f"{storage.join(out, name)}: of {kept} samples written {len(rows)} are read")
    storage.write(storage.join(out, name), data)
    table = pa.Table.from_pylist(rows, SCHEMA).replace_schema_metadata({"quarantine": json.dumps(quarantined)})
    storage.write(storage.join(out, UNFINISHED, f"{block['shard']:06d}.arrow"), ipc_file(table))
    return {"records": len(given)}


def _entry(number: int, record: Any, fault: check.Fault) -> dict[str, Any]:
    """A line of the quarantine list: UTF-8, and JSON for any reader."""
    name = record.get("id") if isinstance(record, dict) else None
    plain = name if name is None or (isinstance(name, int) and abs(name) < 2**63) else check.shorten(name)
    return {
        "number": number,
        "id": plain,
        "reason": fault.reason,
        "field": fault.field,
        "value": fault.value,
        "why": fault.why,
    }


def _image(folder: ImageFolder, path: str, making: Making) -> tuple[check.Fault | None, str, bytes]:
    """The reason to keep the image out, if any; the suffix and the bytes to store."""
    try:
        image = folder.read(path)
        suffix = decode(image)
        if making.image_size:
            suffix, image = "ppm", prepare_image(image, making.image_size, making.image_aspect_ratio)
    except OutsideError:
        return check.Fault("outside", "image", check.shorten(path)), "", b""
    except FileNotFoundError:
        return check.Fault("missing image", "image", check.shorten(path)), "", b""
    except (ValueError, MemoryError) as error:  # also where a square of it would be too large
        return check.Fault("broken image", "image", check.shorten(path), check.shorten(str(error))), "", b""
    return None, suffix, image


def _finish(records: Sequence[Any], out: str, making: Making, asked: dict, shards: int) -> dict[str, Any]:
    """The parts together as the index, the quarantine list and the summary."""
    names = [storage.join(out, UNFINISHED, f"{number:06d}.arrow") for number in range(shards)]
    parts = [ipc.open_file(storage.read(name)).read_all() for name in names]
    listed = [entry for part in parts for entry in json.loads(part.schema.metadata[b"quarantine"])]
    storage.write(storage.join(out, QUARANTINE), b"".join(_json(entry) + b"\n" for entry in listed))
    reasons = dict(sorted(Counter(entry["reason"] for entry in listed).items()))
    kept = sum(len(part) for part in parts)
    summary = {"asked": asked, "records": len(records), "kept": kept, "quarantined": reasons}
    if kept + len(listed) != len(records):
        raise RuntimeError(f"{out}: {len(records)} records became {kept} samples and {len(listed)} in quarantine")
    if len(listed) > making.max_bad_fraction * len(records):
        for name, part in zip(names, parts, strict=True):
            if json.loads(part.schema.metadata[b"quarantine"]):
                storage.remove(name)  # a second start looks again, since files can be mended
        raise ValueError(f"{out}: {_refusal(listed, len(records), reasons, making)} {storage.join(out, QUARANTINE)}")
    storage.write(storage.join(out, SUMMARY), json.dumps(summary, indent=2).encode())
    write_index(out, pa.concat_tables([part.replace_schema_metadata() for part in parts] or [SCHEMA.empty_table()]))
    for name in names:
        storage.remove(name)
    return summary


def _refusal(listed: list[dict[str, Any]], records: int, reasons: dict[str, int], making: Making) -> str:
    """Why there is no set, with an example; where all records fail alike it is their form that is wrong."""
    counts = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
    first = {"field": "", "value": "", "why": "", **listed[0]}  # an older version's part has the reason alone
    example = f"record {first['number']}: {first['field'] or 'the record'}: got {first['value']}: {first['why']}"
    if len(listed) == records and len(reasons) == 1 and first["reason"] not in ("missing image", "broken image"):
        return (
            f"all {records} records cannot be used for one reason ({counts}), so the form of the file is wrong; "
            f"{example}; allowed: a list of records of LLaVA's form in UTF-8; all are listed in"
        )
    return (
        f"{len(listed)} of {records} records cannot be used ({counts}), allowed: {making.max_bad_fraction:.2%}; first "
        f"{example}; all are listed in"
    )


def _json(value: Any) -> bytes:
    """JSON that `json.loads` reads, halves of characters included."""
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")


def write_index(out: str, table: pa.Table) -> None:
    """The index, which makes the folder a set."""
    storage.write(storage.join(out, INDEX), ipc_file(table))


def ipc_file(table: pa.Table) -> bytes:
    """The table as an Arrow IPC file of one record batch."""
    batch = pa.RecordBatch.from_arrays([column.combine_chunks() for column in table.columns], schema=table.schema)
    sink = io.BytesIO()
    with ipc.new_file(sink, table.schema) as file:
        file.write_batch(batch)
    return sink.getvalue()


class Shards:
    """A finished set of shards: `len`, and any samples by number.

    It travels to a task as little more than its folder's name; there the index is opened at the first look-up, once a
    process.  A set made anew in the same folder is seen by what is constructed after it.
    """

    def __init__(self, folder: str | os.PathLike) -> None:
        """ValueError where there is no index, or no valid one; its rows are checked as they are read."""
        self.folder = os.fspath(folder)
        self._opening = uuid4().hex
        self._length = _open(self.folder, self._opening)[1].num_rows

    def __len__(self) -> int:
        return self._length

    def records(self) -> Iterator[Any]:
        """All records in the order of the index, unchecked; where one cannot be read some are left out."""
        for first in range(0, len(self), 64):
            ranges = []
            for row in self.rows(range(first, min(first + 64, len(self)))):
                start = row["offset"] + row["record_at"]
                ranges.append((storage.join(self.folder, row["shard"]), start, start + row["record_size"]))
            with contextlib.suppress(ValueError):
                yield from map(json.loads, storage.read_ranges(ranges))

    @property
    def names(self) -> list[str]:
        """Of each shard the file's name, in the order of the index."""
        return self._rows["shard"].dictionary.to_pylist()

    @property
    def sizes(self) -> Int64[np.ndarray, " shards"]:
        """Of each shard how many samples it holds, in the order of the index."""
        shard = self._rows["shard"]
        # the shards' numbers ascend, so that a search finds where each starts in a few pages of them
        return np.diff(np.searchsorted(shard.indices.to_numpy(), np.arange(len(shard.dictionary) + 1)))

    @property
    def words(self) -> Int32[np.ndarray, " samples"]:
        """Of each sample the words of all turns; a view of the index."""
        return self._rows["words"].to_numpy()

    @property
    def has_image(self) -> Bool[np.ndarray, " samples"]:
        """Of each sample whether it has an image; a byte a sample."""
        return self._rows["image_size"].to_numpy() > 0

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the index in hex: the same for the same samples in the same order.  Reads all of the index."""
        return hashlib.sha256(self._opened[0]).hexdigest()

    @property
    def prepared(self) -> tuple[int, ImageAspectRatio] | None:
        """Size and fit of images that are stored as squares; None where they are stored as they came."""
        path = storage.join(self.folder, SUMMARY)  # which sets of others lack
        asked = _current_names(json.loads(storage.read(path)).get("asked", {})) if storage.exists(path) else {}
        return (asked["image_size"], asked["image_aspect_ratio"]) if asked.get("image_size") else None

    def key(self, number: int) -> str:
        """The sample's name in its tar."""
        return self.rows([number])[0]["key"]

    def rows(self, numbers: Iterable[int]) -> list[dict[str, Any]]:
        """Rows of the index: SCHEMA's columns.  IndexError where there is no such number, ValueError for a bad row."""
        asked, table = np.array([int(number) for number in numbers], np.int64), self._rows
        if (wrong := asked[(asked < 0) | (asked >= len(self))]).size:
            raise IndexError(f"{self.folder}: got sample {wrong[0]}, allowed: 0 to {len(self) - 1}")
        # Arrow follows what a damaged row says out of the file
        shard = table["shard"].indices.to_numpy()[asked]
        if ((shard < 0) | (shard >= len(table["shard"].dictionary))).any():
            raise _damaged(self.folder, "a row of no shard")
        try:
            for number in asked.tolist():
                table["key"].slice(number, 1).validate(full=True)
        except pa.ArrowException as error:
            raise _damaged(self.folder, error) from None
        return table.take(pa.array(asked)).to_pylist()

    def check(self) -> None:
        """Read all of the index.  ValueError where it is damaged."""
        try:
            self._rows.validate(full=True)
        except pa.ArrowException as error:
            raise _damaged(self.folder, error) from None
        shard = self._rows["shard"]
        steps = np.diff(shard.indices.to_numpy(), prepend=-1, append=len(shard.dictionary))
        if ((steps != 0) & (steps != 1)).any() or len(set(self.names)) < len(self.names):
            raise _damaged(self.folder, "samples of a shard do not stand together")

    def read(self, numbers: Iterable[int]) -> list[Sample]:
        """The samples with these numbers, in this order.  ValueError where stored bytes are not those of the index."""
        return read([(self, number) for number in numbers])

    @property
    def _opened(self) -> tuple[pa.Buffer, pa.RecordBatch]:
        opened = _open(self.folder, self._opening)
        if opened[1].num_rows != len(self):
            raise ValueError(f"{self.folder}: {INDEX} has {opened[1].num_rows} samples now, it had {len(self)}")
        return opened

    @property
    def _rows(self) -> pa.RecordBatch:
        return self._opened[1]


@functools.lru_cache(maxsize=64)  # more than a mixture has sets
def _open(folder: str, opening: str) -> tuple[pa.Buffer, pa.RecordBatch]:
    """The index file and its rows, once a process for each opening, as the file may be replaced between two."""
    path = storage.join(folder, INDEX)
    if not storage.exists(path):
        raise ValueError(f"{folder}: no shards here, {INDEX} is missing")
    data = pa.py_buffer(storage.mapped(path))
    try:
        file = ipc.open_file(data)
        if not file.schema.equals(SCHEMA) or file.num_record_batches != 1:
            raise _damaged(folder, "other columns, or more than one batch")
        rows = file.get_batch(0)
        rows.validate()
        rows["shard"].dictionary.validate(full=True)
    except (pa.ArrowException, OSError) as error:
        raise _damaged(folder, error) from None
    if any(column.null_count for column in rows.columns):
        raise _damaged(folder, "rows with nulls")
    return data, rows


def _damaged(folder: str, why: object) -> ValueError:
    return ValueError(f"{storage.join(folder, INDEX)}: not an index of shards, or damaged: {why}")


def read(wanted: Sequence[tuple[Shards, int]]) -> list[Sample]:
    """Samples of several sets, side by side, in this order; as `Shards.read`."""
    found: dict[int, dict[str, Any]] = {}
    for shards in dict.fromkeys(shards for shards, _ in wanted):
        places = [place for place, (one, _) in enumerate(wanted) if one is shards]
        found |= zip(places, shards.rows(wanted[place][1] for place in places), strict=True)
    rows = [found[place] for place in range(len(wanted))]
    urls = [storage.join(shards.folder, row["shard"]) for (shards, _), row in zip(wanted, rows, strict=True)]
    ranges = [(url, row["offset"], row["offset"] + row["length"]) for url, row in zip(urls, rows, strict=True)]
    return [_sample(*each) for each in zip(rows, storage.read_ranges(ranges), urls, strict=True)]


def _sample(row: dict[str, Any], data: bytes, url: str) -> Sample:
    if hashlib.sha256(data).digest() != row["sha256"]:
        raise ValueError(f"{url}: sample {row['key']}: bytes differ from the index's checksum")
    image, record = (data[row[f"{part}_at"] : row[f"{part}_at"] + row[f"{part}_size"]] for part in ("image", "record"))
    return Sample(row["key"], image, json.loads(record))
