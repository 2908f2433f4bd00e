"""Writer of WebDataset shards on Ray Data, with an index for random access.

Shards are plain tars that any WebDataset tool reads. Each sample has two members: the image, unchanged or prepared, and
`json`, the record.

    out/000000.tar, 000001.tar, ...     KEY.jpg (or png, ...), KEY.json, KEY.jpg, ...; KEY is the record's number
    out/index.arrow                     one row per sample: see pipelines/data/shard_index.py
    out/quarantine.jsonl                {"number", "id", "reason", "field", "value", "why"} of each rejected record
    out/summary.json                    settings, number of records, samples kept, rejected records by reason

The index is written last: a folder without it is no set. Before that, `out/unfinished/` holds one part of the index for
each finished shard, and a second start continues from these parts. Folders may be on any file system that fsspec knows.
"""

import hashlib
import io
import json
import posixpath
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import pyarrow as pa
import ray.data
from pyarrow import ipc
from tqdm import tqdm

from pipelines.core import interrupts, storage
from pipelines.data import records as check
from pipelines.data import tars
from pipelines.data.images import ImageFolder, OutsideError, check_image
from pipelines.data.options import ShardOptions
from pipelines.data.shard_index import (
    INDEX_FILE,
    INDEX_SCHEMA,
    QUARANTINE_FILE,
    SUMMARY_FILE,
    UNFINISHED_DIR,
    is_finished,
    rename_former_options,
)
from redux.image import prepared

BAR_FORMAT = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_noinv_fmt}]"
"""tqdm's own, with one unit for slow and fast."""


def make_shards(records: Sequence[Any], images: str, out: str, making: ShardOptions) -> dict[str, Any]:
    """Write records (LLaVA's form, `image` a path within `images`) as shards in `out`; returns the summary.

    Records that cannot be used go to the quarantine list with a reason of `records.REASONS`.  An interrupted making
    goes on where it was; a finished one is left as it is.  A making that failed before its first shard holds nothing.
    ValueError where `out` holds shards of other records or settings, or more than the tolerated share was kept out:
    then there is no index, but the list.
    """
    asked = {**asdict(making), "records": hashlib.sha256(_to_json(records)).hexdigest()}
    del asked["max_bad_fraction"]  # more may be tolerated after all
    path, finished = storage.join(out, SUMMARY_FILE), is_finished(out)
    before = _read_previous_summary(out, asked)
    made = finished or storage.list_files(storage.join(out, UNFINISHED_DIR))
    if made and before["asked"] != asked:
        raise ValueError(
            f"{out}: holds shards of other records or settings, allowed: an empty folder; delete it, or name another"
        )
    if finished:
        return before
    storage.write(path, _to_json({"asked": asked}))
    for folder in (out, storage.join(out, UNFINISHED_DIR)):
        storage.remove_partial(folder)
    seen: set[bytes] = set()
    faults = [_find_rejection(record, making, seen) for record in records]
    each = making.samples_per_shard
    done, left, already = set(storage.list_files(storage.join(out, UNFINISHED_DIR))), list[dict[str, Any]](), 0
    for number, first in enumerate(range(0, len(records), each)):
        part = slice(first, first + each)
        if f"{number:06d}.arrow" in done:
            already += len(records[part])
        else:
            given = {"records": _to_json(records[part]), "faults": _to_json(faults[part])}
            left.append({"shard": number, "first": first, **given})
    title = f"shards {posixpath.basename(out.rstrip('/'))}"
    with tqdm(desc=title, total=len(records), initial=already, unit="record", bar_format=BAR_FORMAT) as bar:
        if left:
            rows = ray.data.from_items(left, override_num_blocks=len(left)).map(
                _write_shard, fn_args=(images, out, making), num_cpus=1
            )
            for row in rows.iter_rows():
                interrupts.raise_if_interrupted()
                bar.update(row["records"])
    return _merge_parts(records, out, making, asked, -(-len(records) // each))


def _read_previous_summary(out: str, asked: dict[str, Any]) -> dict[str, Any]:
    """The summary of a making in this folder, or what begins one.

    Raises:
        ValueError: the folder holds what no making left there, which would be overwritten.
    """
    path, tarred = storage.join(out, SUMMARY_FILE), [name for name in storage.list_files(out) if name.endswith(".tar")]
    if storage.exists(path):
        try:
            before = json.loads(storage.read(path))
        except ValueError:
            before = None
        if isinstance(before, dict) and "asked" in before:
            return {**before, "asked": rename_former_options(before["asked"])}
        raise ValueError(f"{path}: no summary of shards, allowed: a folder for the set alone; name another")
    if is_finished(out):
        return {"asked": None}
    if tarred:
        raise ValueError(f"{out}: holds tars that were not made here ({tarred[0]}), allowed: an empty folder")
    return {"asked": asked}


def _find_rejection(record: Any, making: ShardOptions, seen: set[bytes]) -> check.RecordRejection | None:
    digest = hashlib.sha256(_to_json(record)).digest()
    if digest in seen:
        return check.RecordRejection("duplicate", "", check.shorten(record))
    seen.add(digest)
    return check.find_rejection(record, making.max_words)


def _write_shard(block: dict[str, Any], images: str, out: str, making: ShardOptions) -> dict[str, Any]:
    """Write one shard, then its part of the index."""
    import webdataset  # brings torch along, which readers do without

    kept, quarantined, folder = 0, [], ImageFolder(images)
    given, faults = json.loads(block["records"]), json.loads(block["faults"])
    buffer = io.BytesIO()
    # fixed times and owner: equal records give equal bytes
    with webdataset.TarWriter(buffer, mtime=0, user="redux", group="redux") as tar:
        for number, (record, found) in enumerate(zip(given, faults, strict=True), start=block["first"]):
            fault = check.RecordRejection(*found) if found else None
            member = {"__key__": f"{number:09d}", "json": record}
            if not fault and check.has_image(record):
                fault, suffix, image = _read_image(folder, record["image"], making)
                member = {"__key__": member["__key__"], suffix: image, "json": record}
            if fault:
                quarantined.append(_quarantine_entry(number, record, fault))
                continue
            tar.write(member)
            kept += 1
    data, name = buffer.getvalue(), f"{block['shard']:06d}.tar"
    rows = tars.make_index_rows(tars.read_tar(data, name), data, name) if kept else []
    if len(rows) != kept:
        raise RuntimeError(f"{storage.join(out, name)}: of {kept} samples written {len(rows)} are read")
    storage.write(storage.join(out, name), data)
    table = pa.Table.from_pylist(rows, INDEX_SCHEMA).replace_schema_metadata({"quarantine": json.dumps(quarantined)})
    storage.write(storage.join(out, UNFINISHED_DIR, f"{block['shard']:06d}.arrow"), to_ipc_bytes(table))
    return {"records": len(given)}


def _quarantine_entry(number: int, record: Any, fault: check.RecordRejection) -> dict[str, Any]:
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


def _read_image(
    folder: ImageFolder, path: str, making: ShardOptions
) -> tuple[check.RecordRejection | None, str, bytes]:
    """The reason to keep the image out, if any; the suffix and the bytes to store."""
    try:
        image = folder.read(path)
        suffix = check_image(image)
        if making.image_size:
            suffix, image = "ppm", prepared(image, making.image_size, making.image_aspect_ratio)
    except OutsideError:
        return check.RecordRejection("outside", "image", check.shorten(path)), "", b""
    except FileNotFoundError:
        return check.RecordRejection("missing image", "image", check.shorten(path)), "", b""
    except (ValueError, MemoryError) as error:  # also where a square of it would be too large
        return check.RecordRejection("broken image", "image", check.shorten(path), check.shorten(str(error))), "", b""
    return None, suffix, image


def _merge_parts(records: Sequence[Any], out: str, making: ShardOptions, asked: dict, shards: int) -> dict[str, Any]:
    """The parts together as the index, the quarantine list and the summary."""
    names = [storage.join(out, UNFINISHED_DIR, f"{number:06d}.arrow") for number in range(shards)]
    parts = [ipc.open_file(storage.read(name)).read_all() for name in names]
    listed = [entry for part in parts for entry in json.loads(part.schema.metadata[b"quarantine"])]
    storage.write(storage.join(out, QUARANTINE_FILE), b"".join(_to_json(entry) + b"\n" for entry in listed))
    reasons = dict(sorted(Counter(entry["reason"] for entry in listed).items()))
    kept = sum(len(part) for part in parts)
    summary = {"asked": asked, "records": len(records), "kept": kept, "quarantined": reasons}
    if kept + len(listed) != len(records):
        raise RuntimeError(f"{out}: {len(records)} records became {kept} samples and {len(listed)} in quarantine")
    if len(listed) > making.max_bad_fraction * len(records):
        for name, part in zip(names, parts, strict=True):
            if json.loads(part.schema.metadata[b"quarantine"]):
                storage.remove(name)  # a second start looks again, since files can be mended
        raise ValueError(
            f"{out}: {_describe_refusal(listed, len(records), reasons, making)} {storage.join(out, QUARANTINE_FILE)}"
        )
    storage.write(storage.join(out, SUMMARY_FILE), json.dumps(summary, indent=2).encode())
    write_index(
        out, pa.concat_tables([part.replace_schema_metadata() for part in parts] or [INDEX_SCHEMA.empty_table()])
    )
    for name in names:
        storage.remove(name)
    return summary


def _describe_refusal(listed: list[dict[str, Any]], records: int, reasons: dict[str, int], making: ShardOptions) -> str:
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


def _to_json(value: Any) -> bytes:
    """JSON that `json.loads` reads, halves of characters included."""
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")


def write_index(out: str, table: pa.Table) -> None:
    """The index, which makes the folder a set."""
    storage.write(storage.join(out, INDEX_FILE), to_ipc_bytes(table))


def to_ipc_bytes(table: pa.Table) -> bytes:
    """The table as an Arrow IPC file of one record batch."""
    batch = pa.RecordBatch.from_arrays([column.combine_chunks() for column in table.columns], schema=table.schema)
    sink = io.BytesIO()
    with ipc.new_file(sink, table.schema) as file:
        file.write_batch(batch)
    return sink.getvalue()
