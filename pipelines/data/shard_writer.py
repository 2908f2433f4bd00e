"""Writer of WebDataset shards on Ray Data, with an index for random access.

Shards are plain tars that any WebDataset tool reads. Each sample has two members: the image, unchanged or prepared, and
`json`, the record.

    out/000000.tar, 000001.tar, ...     KEY.jpg (or png, ...), KEY.json, KEY.jpg, ...; KEY is the record's number
    out/index.arrow                     one row per sample: see pipelines/data/shard_index.py
    out/quarantine.jsonl                {"number", "id", "reason", "field", "value", "explanation"}, a rejected record a
                                        line
    out/summary.json                    {"settings", "records", "samples", "quarantined"}: the last three are numbers of
                                        records, of samples, and of rejected records by reason

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
from pipelines.core.imports import import_without
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
    read_summary,
)
from redux.image import prepare_image

BAR_FORMAT = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_noinv_fmt}]"
"""tqdm's default format, but with rates in the same unit for slow and fast bars."""


def make_shards(records: Sequence[Any], images: str, out: str, options: ShardOptions) -> dict[str, Any]:
    """Write records as shards with an index.

    Rejected records go to the quarantine list with a reason of `records.RECORD_REASONS`. An interrupted run continues
    with the missing shards, and a finished set is left unchanged. A run that failed before its first shard leaves
    nothing that a later run with other options must match.

    Args:
        records: records in LLaVA's form; `image` is a path within `images`.
        images: folder or URL of the images.
        out: folder or URL of the set.
        options: size of the shards, limits of the records, form of the stored images.

    Returns:
        The summary, as in summary.json.

    Raises:
        ValueError: `out` contains shards of other records or options, or other files; or more records than
            max_bad_fraction were rejected. Then there is a quarantine list, but no index.
    """
    # the settings that two runs in the same folder must share; more may be tolerated in the second one
    settings = {**asdict(options), "records": hashlib.sha256(_to_json(records)).hexdigest()}
    del settings["max_bad_fraction"]
    finished = is_finished(out)
    previous = _read_previous_summary(out, settings)
    has_shards = finished or storage.list_files(storage.join(out, UNFINISHED_DIR))
    if has_shards and previous["settings"] != settings:
        raise ValueError(
            f"{out}: contains shards of other records or settings, allowed: an empty folder; delete it, or name another"
        )
    if finished:
        return previous
    # from here on the folder belongs to this run
    storage.write(storage.join(out, SUMMARY_FILE), _to_json({"settings": settings}))
    for folder in (out, storage.join(out, UNFINISHED_DIR)):
        storage.remove_partial(folder)
    # duplicates are known here only, since a task sees one shard
    seen: set[bytes] = set()
    rejections = [_find_rejection(record, options, seen) for record in records]
    tasks, num_done = _list_missing_shards(records, rejections, out, options)
    title = f"shards {posixpath.basename(out.rstrip('/'))}"
    with tqdm(desc=title, total=len(records), initial=num_done, unit="record", bar_format=BAR_FORMAT) as bar:
        if tasks:
            rows = ray.data.from_items(tasks, override_num_blocks=len(tasks)).map(
                _write_shard, fn_args=(images, out, options), num_cpus=1
            )
            for row in rows.iter_rows():
                interrupts.raise_if_interrupted()
                bar.update(row["records"])
    return _merge_parts(records, out, options, settings, -(-len(records) // options.samples_per_shard))


def _list_missing_shards(
    records: Sequence[Any], rejections: Sequence[check.RecordRejection | None], out: str, options: ShardOptions
) -> tuple[list[dict[str, Any]], int]:
    """List the arguments of `_write_shard` for each shard that is not there, and count the records of the others."""
    done = set(storage.list_files(storage.join(out, UNFINISHED_DIR)))
    tasks = list[dict[str, Any]]()
    num_done = 0
    for number, first in enumerate(range(0, len(records), options.samples_per_shard)):
        part = slice(first, first + options.samples_per_shard)
        if f"{number:06d}.arrow" in done:
            num_done += len(records[part])
        else:
            # as JSON, since Arrow would give all records the same fields
            columns = {"records": _to_json(records[part]), "rejections": _to_json(rejections[part])}
            tasks.append({"shard": number, "first": first, **columns})
    return tasks, num_done


def _read_previous_summary(out: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Read the summary of an earlier run in this folder, or start one.

    Raises:
        ValueError: the folder contains files of other programs, which would be overwritten.
    """
    if previous := read_summary(out):
        return previous
    path = storage.join(out, SUMMARY_FILE)
    if storage.exists(path):
        raise ValueError(f"{path}: no summary of shards, allowed: a folder for the set alone; name another")
    if is_finished(out):  # an index without a summary: foreign tars that were indexed
        return {"settings": None}
    if foreign_tars := [name for name in storage.list_files(out) if name.endswith(".tar")]:
        raise ValueError(f"{out}: contains tars that were not made here ({foreign_tars[0]}), allowed: an empty folder")
    return {"settings": settings}


def _find_rejection(record: Any, options: ShardOptions, seen: set[bytes]) -> check.RecordRejection | None:
    """Find the reason to reject a record. `seen` has the digests of earlier records."""
    digest = hashlib.sha256(_to_json(record)).digest()
    if digest in seen:
        return check.RecordRejection("duplicate", "", check.shorten(record))
    seen.add(digest)
    return check.find_rejection(record, options.max_words)


def _write_shard(task: dict[str, Any], images: str, out: str, options: ShardOptions) -> dict[str, Any]:
    """Write one shard, then its part of the index. Runs in a Ray task."""
    webdataset = import_without("webdataset", "torch")
    num_kept, quarantined, folder = 0, [], ImageFolder(images)
    records, rejections = json.loads(task["records"]), json.loads(task["rejections"])
    buffer = io.BytesIO()
    # fixed times and owner: equal records give equal bytes
    with webdataset.TarWriter(buffer, mtime=0, user="redux", group="redux") as tar:
        for number, (record, fields) in enumerate(zip(records, rejections, strict=True), start=task["first"]):
            rejection = check.RecordRejection(*fields) if fields else None
            sample = {"__key__": f"{number:09d}", "json": record}
            # a record that passed so far may still have an unusable image
            if not rejection and check.has_image(record):
                rejection, suffix, image = _read_image(folder, record["image"], options)
                sample = {"__key__": sample["__key__"], suffix: image, "json": record}
            if rejection:
                quarantined.append(_quarantine_entry(number, record, rejection))
                continue
            tar.write(sample)
            num_kept += 1
    # read the tar back as a check, and index what was read
    data, name = buffer.getvalue(), f"{task['shard']:06d}.tar"
    rows = tars.make_index_rows(tars.read_tar(data, name), data, name) if num_kept else []
    if len(rows) != num_kept:
        raise RuntimeError(f"{storage.join(out, name)}: {num_kept} samples were written, {len(rows)} are read")
    # the part comes after the tar: its name marks the shard as finished
    storage.write(storage.join(out, name), data)
    table = pa.Table.from_pylist(rows, INDEX_SCHEMA)
    table = table.replace_schema_metadata({"quarantine": json.dumps(quarantined)})
    storage.write(storage.join(out, UNFINISHED_DIR, f"{task['shard']:06d}.arrow"), to_ipc_bytes(table))
    return {"records": len(records)}


def _quarantine_entry(number: int, record: Any, rejection: check.RecordRejection) -> dict[str, Any]:
    """Make a line of the quarantine list, as UTF-8 and JSON that any reader accepts."""
    name = record.get("id") if isinstance(record, dict) else None
    is_plain = name is None or (isinstance(name, int) and abs(name) < 2**63)
    return {
        "number": number,
        "id": name if is_plain else check.shorten(name),
        "reason": rejection.reason,
        "field": rejection.field,
        "value": rejection.value,
        "explanation": rejection.explanation,
    }


def _read_image(
    folder: ImageFolder, path: str, options: ShardOptions
) -> tuple[check.RecordRejection | None, str, bytes]:
    """Read and check an image. Returns the rejection or None, the suffix, and the bytes to store."""
    try:
        image = folder.read(path)
        suffix = check_image(image)
        if options.image_size:
            suffix, image = "ppm", prepare_image(image, options.image_size, options.image_aspect_ratio)
    except OutsideError:
        return check.RecordRejection("outside folder", "image", check.shorten(path)), "", b""
    except FileNotFoundError:
        return check.RecordRejection("missing image", "image", check.shorten(path)), "", b""
    except (ValueError, MemoryError) as error:  # also if the padded square is too large
        detail = check.shorten(str(error))
        return check.RecordRejection("broken image", "image", check.shorten(path), detail), "", b""
    return None, suffix, image


def _merge_parts(
    records: Sequence[Any], out: str, options: ShardOptions, settings: dict, num_shards: int
) -> dict[str, Any]:
    """Merge the parts of all shards into the quarantine list, the summary and the index."""
    names = [storage.join(out, UNFINISHED_DIR, f"{number:06d}.arrow") for number in range(num_shards)]
    parts = [ipc.open_file(storage.read(name)).read_all() for name in names]
    quarantined = [entry for part in parts for entry in json.loads(part.schema.metadata[b"quarantine"])]
    storage.write(storage.join(out, QUARANTINE_FILE), b"".join(_to_json(entry) + b"\n" for entry in quarantined))
    # counts, and the decision if there is a set
    reasons = dict(sorted(Counter(entry["reason"] for entry in quarantined).items()))
    num_kept = sum(len(part) for part in parts)
    summary = {"settings": settings, "records": len(records), "samples": num_kept, "quarantined": reasons}
    if num_kept + len(quarantined) != len(records):
        raise RuntimeError(
            f"{out}: {len(records)} records became {num_kept} samples and {len(quarantined)} in quarantine"
        )
    if len(quarantined) > options.max_bad_fraction * len(records):
        for name, part in zip(names, parts, strict=True):
            if json.loads(part.schema.metadata[b"quarantine"]):
                storage.remove(name)  # so that a second run checks these records again: files can be repaired
        refusal = _describe_refusal(quarantined, len(records), reasons, options)
        raise ValueError(f"{out}: {refusal} {storage.join(out, QUARANTINE_FILE)}")
    # the index comes last: it makes the folder a set
    storage.write(storage.join(out, SUMMARY_FILE), json.dumps(summary, indent=2).encode())
    tables = [part.replace_schema_metadata() for part in parts] or [INDEX_SCHEMA.empty_table()]
    write_index(out, pa.concat_tables(tables))
    for name in names:
        storage.remove(name)
    return summary


def _describe_refusal(
    quarantined: list[dict[str, Any]], num_records: int, reasons: dict[str, int], options: ShardOptions
) -> str:
    """Explain with an example why there is no set. If all records fail alike, the form of the file is wrong."""
    counts = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
    # parts of older versions lack some fields
    first = {"field": "", "value": "", "explanation": quarantined[0]["reason"], **quarantined[0]}
    example = (
        f"record {first['number']}: {first['field'] or 'the record'}: got {first['value']}: {first['explanation']}"
    )
    all_fail_alike = len(quarantined) == num_records and len(reasons) == 1
    if all_fail_alike and first["reason"] not in ("missing image", "broken image"):
        return (
            f"all {num_records} records cannot be used for one reason ({counts}), so the form of the file is wrong; "
            f"{example}; allowed: a list of records of LLaVA's form in UTF-8; all are listed in"
        )
    return (
        f"{len(quarantined)} of {num_records} records cannot be used ({counts}), allowed: "
        f"{options.max_bad_fraction:.2%}; first {example}; all are listed in"
    )


def _to_json(value: Any) -> bytes:
    """Serialise as JSON that `json.loads` reads, including lone surrogates."""
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")


def write_index(out: str, table: pa.Table) -> None:
    """Write the index, which makes the folder a set."""
    storage.write(storage.join(out, INDEX_FILE), to_ipc_bytes(table))


def to_ipc_bytes(table: pa.Table) -> bytes:
    """Serialise a table as an Arrow IPC file of one record batch."""
    batch = pa.RecordBatch.from_arrays([column.combine_chunks() for column in table.columns], schema=table.schema)
    sink = io.BytesIO()
    with ipc.new_file(sink, table.schema) as file:
        file.write_batch(batch)
    return sink.getvalue()
