"""Writer of WebDataset shards on Ray, with an index for random access.

Shards are plain tars that any WebDataset tool reads. Each sample has two members: the image, unchanged or prepared, and
`json`, the record.

    out/000000.tar, 000001.tar, ...     KEY.jpg (or png, ...), KEY.json, KEY.jpg, ...; KEY is the record's number
    out/index.arrow                     one row per sample: see pipelines/data/index_file.py
    out/quarantine.jsonl                {"number", "id", "reason", "field", "value", "explanation"}, a rejected record a
                                        line; with "origin", its position in a source, and "repair", if --fix repairs it
    out/repaired.jsonl                  with --fix: the same of each repaired record, and the "record" as it is now
    out/summary.json                    {"settings", "records", "samples", "quarantined"}: the last three are numbers of
                                        records, of samples, and of rejected records by reason

The index is written last: a folder without it is not a set. Before that, `out/unfinished/` holds one part of the index
for each finished shard, and a second start continues from these parts. Folders may be on any file system that fsspec
knows.
"""

import hashlib
import io
import itertools
import json
import posixpath
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa
from pyarrow import ipc
from tqdm import tqdm

from pipelines.core import parallel, storage
from pipelines.core.imports import import_without
from pipelines.data import tars
from pipelines.data.digest_set import DIGEST_BYTES, DigestSet
from pipelines.data.images import URL_SCHEME, ImageFolder, OutsideError, check_image
from pipelines.data.index_file import INDEX_SCHEMA, IndexBuilder, as_record_batch
from pipelines.data.options import ShardOptions
from pipelines.data.quarantine import QuarantineError, RejectionSummary
from pipelines.data.records import RecordRejection, find_rejection, has_image, is_unicode, shorten
from pipelines.data.repairs import find_repair
from pipelines.data.shard_index import (
    QUARANTINE_FILE,
    REPAIRED_FILE,
    SUMMARY_FILE,
    UNFINISHED_DIR,
    is_finished,
    read_summary,
)
from pipelines.data.sources.opened import RecordSource
from pipelines.data.sources.rows import SourceRecord
from redux.image import prepare_image

BAR_FORMAT = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_noinv_fmt}]"
"""tqdm's default format, but with rates in the same unit for slow and fast bars."""

DOWNLOAD_ADVICE = "images of other addresses are not downloaded; img2dataset downloads them"

COUNT_FORMAT = "{desc}: {n_fmt} [{elapsed}, {rate_noinv_fmt}]"
"""Format for records that are not counted before they are read."""


def make_shards(records: Iterable[Any], images: str, out: str, options: ShardOptions) -> dict[str, Any]:
    """Write records as shards with an index.

    Rejected records go to the quarantine list with a reason of `records.RECORD_REASONS`. An interrupted run continues
    with the missing shards, and a finished set is left unchanged. A run that failed before its first shard leaves
    nothing that a later run with other options must match.

    Memory: the records of as many shards as there are CPUs. What grows with the set is in scratch files in the
    temporary folder of the machine: a digest of each record, and the index until it is written.

    Args:
        records: records in LLaVA's form, of which `image` is a path within `images`; or a `RecordSource`. They are read
            once.
        images: folder or URL of the images.
        out: folder or URL of the set.
        options: size of the shards, limits of the records, form of the stored images.

    Returns:
        The summary, as in summary.json.

    Raises:
        QuarantineError: more records than max_bad_fraction were rejected. Then there is a quarantine list, but no
            index.
        ValueError: `out` contains shards of other records or options, or other files.
    """
    settings = _describe_settings(records, options)
    finished = is_finished(out)
    previous = _read_previous_summary(out, settings)
    has_shards = finished or storage.list_files(storage.join(out, UNFINISHED_DIR))
    earlier = {name: value for name, value in (previous["settings"] or {}).items() if name != "records"}
    if has_shards and earlier != settings:
        raise _describe_conflict(out)
    if finished:
        # Records are compared by their digest, and files with images by their names and sizes.
        if "files" not in settings and previous["settings"]["records"] != _compute_digest(records):
            raise _describe_conflict(out)
        return previous
    # From here on the folder belongs to this run.
    storage.write(storage.join(out, SUMMARY_FILE), _to_json({"settings": settings}))
    for folder in (out, storage.join(out, UNFINISHED_DIR)):
        storage.remove_partial(folder)
    title = f"shards {posixpath.basename(out.rstrip('/'))}"
    total = len(records) if isinstance(records, Sized) else None
    bar_format = BAR_FORMAT if total else COUNT_FORMAT
    with DigestSet() as known_digests, tqdm(desc=title, total=total, unit="record", bar_format=bar_format) as bar:
        plan = _ShardPlan(records, out, options, known_digests)
        for count in parallel.map_bounded(_write_shard, plan.iterate_tasks(bar.update), images, out, options):
            bar.update(count)
    return _merge_parts(plan, out, options, {**settings, "records": plan.digest})


def _describe_settings(records: Iterable[Any], options: ShardOptions) -> dict[str, Any]:
    """Describe what two runs in a folder must share. The second one may tolerate more rejected records."""
    settings = {name: value for name, value in asdict(options).items() if name != "max_bad_fraction"}
    if not options.fix:  # sets of versions without this option have no value
        del settings["fix"]
    if isinstance(records, RecordSource):
        settings |= records.describe()
    # Convert the values to those that will be read again.
    plain: dict[str, Any] = json.loads(json.dumps(settings))
    return plain


def _describe_conflict(out: str) -> ValueError:
    return ValueError(
        f"{out}: contains shards of other records or settings, allowed: an empty folder; delete it, or name another"
    )


def as_source_record(record: Any) -> SourceRecord:
    """Return a record of a source, or make one of a record in LLaVA's form."""
    return record if isinstance(record, SourceRecord) else SourceRecord(record)


class _ListDigest:
    """SHA-256 of a JSON list whose items come one after the other."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self._separator = b"["  # What precedes the next item

    def add(self, item: bytes) -> None:
        """Add an item, given as JSON."""
        self._hash.update(self._separator + item)
        self._separator = b", "

    def hexdigest(self) -> str:
        """Return the digest of the list so far."""
        digest = self._hash.copy()
        digest.update(b"[]" if self._separator == b"[" else b"]")
        return digest.hexdigest()


def _compute_digest(records: Iterable[Any]) -> str:
    """Compute the digest of all records, as in the summary of a set."""
    # These are the bytes of a list that is serialised at once, whose digest older sets have.
    digest = _ListDigest()
    for record in records:
        digest.add(_to_json(as_source_record(record).record))
    return digest.hexdigest()


def admit_record(
    source_record: SourceRecord, options: ShardOptions
) -> tuple[dict[str, Any] | None, RecordRejection | None, str]:
    """Decide from the record alone if it is stored, without its image and the other records.

    Returns:
        The record to store, or None; the reason to reject it or to repair it, or None; what the repair does, also if it
        is not asked for.
    """
    if source_record.rejection:
        return None, source_record.rejection, ""
    # Most records need no repair, which costs as much as another check.
    rejection = find_rejection(source_record.record, options.max_words)
    if not rejection:
        return source_record.record, None, ""
    repair = find_repair(source_record.record, rejection, options.max_words)
    record = repair.record if repair and options.fix else None
    return record, source_record.name_field(rejection), repair.description if repair else ""


class _ShardPlan:
    """Tasks of the shards of a set. After their iteration, `count` and `digest` are those of all records.

    Args:
        records, out, options: as for `make_shards`.
        known_digests: an empty set for the digests of the records. Copies are found here, since a task sees one shard.
    """

    def __init__(self, records: Iterable[Any], out: str, options: ShardOptions, known_digests: DigestSet) -> None:
        self.records, self.out, self.options = records, out, options
        self.count = self.shards = 0
        self._digest = _ListDigest()
        self._known_digests = known_digests

    @property
    def digest(self) -> str:
        """Digest of all records."""
        return self._digest.hexdigest()

    def iterate_tasks(self, skip: Callable[[int], Any]) -> Iterator[dict[str, Any]]:
        """Yield the first argument of `_write_shard` for each shard that is not there.

        Args:
            skip: called with the number of records of each shard that is there.

        Raises:
            ValueError: a shard that is there was made of other records.
        """
        finished = set(storage.list_files(storage.join(self.out, UNFINISHED_DIR)))
        batches = iter(self.records)
        while batch := list(itertools.islice(batches, self.options.samples_per_shard)):
            # Each record is read once: what the shard needs of it is taken here.
            digest = _ListDigest()
            entries = [self._make_entry(as_source_record(record), digest) for record in batch]
            number = self.shards
            self.shards += 1
            name = f"{number:06d}.arrow"
            task = {"shard": number, "entries": entries, "records": digest.hexdigest()}
            part_digest = _read_part_digest(self.out, name) if name in finished else None
            if part_digest is None:
                yield task
            elif part_digest != task["records"]:
                raise _describe_conflict(self.out)
            else:
                skip(len(batch))

    def _make_entry(self, source_record: SourceRecord, digest: _ListDigest) -> dict[str, Any]:
        """Make what a task needs of a record: the record with its image, or an entry of the quarantine list."""
        number = self.count
        self.count += 1
        text = _to_json(source_record.record)
        for list_digest in (self._digest, digest):
            list_digest.add(text)
        if rejection := self._find_duplicate(source_record, text):
            return {"quarantine": _make_list_entry(number, source_record, rejection)}
        record, rejection, repair = admit_record(source_record, self.options)
        listed = _make_list_entry(number, source_record, rejection, repair) if rejection else None
        if record is None:
            return {"quarantine": listed}
        entry = {"number": number, "record": record, "image": source_record.image, **_locate(source_record)}
        return {**entry, "repair": {**listed, "record": record}} if listed else entry

    def _find_duplicate(self, source_record: SourceRecord, text: bytes) -> RecordRejection | None:
        if source_record.rejection:
            return None
        key = hashlib.sha256(text)
        if source_record.image is not None:  # the same words may be about several images
            key.update(hashlib.sha256(source_record.image).digest())
        if self._known_digests.add(key.digest()[:DIGEST_BYTES]):
            return None
        return RecordRejection("duplicate", "", shorten(source_record.record))


def _read_part_digest(out: str, name: str) -> str | None:
    """Read the digest of the records of a part; None if another version wrote it, or it is damaged."""
    try:
        schema = ipc.open_file(storage.read(storage.join(out, UNFINISHED_DIR, name))).schema
    except pa.ArrowException:
        return None
    # Parts of versions without the digest are made again.
    digest = (schema.metadata or {}).get(b"records")
    return digest.decode() if digest else None


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


def _write_shard(task: dict[str, Any], images: str, out: str, options: ShardOptions) -> int:
    """Write one shard, then its part of the index. Returns the number of its records. Runs in a Ray task."""
    webdataset = import_without("webdataset", "torch")
    folder = ImageFolder(images)
    num_kept = 0
    quarantined: list[dict[str, Any]] = []
    repaired: list[dict[str, Any]] = []
    buffer = io.BytesIO()
    # Times and owner are fixed: equal records give equal bytes.
    with webdataset.TarWriter(buffer, mtime=0, user="redux", group="redux") as tar:
        for entry in task["entries"]:
            if "quarantine" in entry:
                quarantined.append(entry["quarantine"])
                continue
            record, key = entry["record"], f"{entry['number']:09d}"
            sample = {"__key__": key, "json": record}
            # A record that passed so far may still have an unusable image.
            if has_image(record):
                rejection, suffix, image = read_image(folder, record["image"], entry["image"], options)
                if rejection:
                    rejection = rejection._replace(field=entry["image_name"])
                    source_record = SourceRecord(record, origin=entry["origin"])
                    quarantined.append(_make_list_entry(entry["number"], source_record, rejection))
                    continue
                sample = {"__key__": key, suffix: image, "json": record}
            tar.write(sample)
            num_kept += 1
            if "repair" in entry:
                repaired.append(entry["repair"])
    # Read the tar back as a check, and index what was read.
    data, name = buffer.getvalue(), f"{task['shard']:06d}.tar"
    rows = tars.make_index_rows(tars.read_tar(data, name), data, name) if num_kept else []
    if len(rows) != num_kept:
        raise RuntimeError(f"{storage.join(out, name)}: {num_kept} samples were written, {len(rows)} are read")
    # The part comes after the tar: its name marks the shard as finished.
    storage.write(storage.join(out, name), data)
    lists = {"quarantine": json.dumps(quarantined), "repaired": json.dumps(repaired), "records": task["records"]}
    table = pa.Table.from_pylist(rows, INDEX_SCHEMA).replace_schema_metadata(lists)
    storage.write(storage.join(out, UNFINISHED_DIR, f"{task['shard']:06d}.arrow"), to_ipc_bytes(table))
    return len(task["entries"])


def _locate(source_record: SourceRecord) -> dict[str, str]:
    """Return the position of a record in its source, and the name of its image there."""
    return {"origin": source_record.origin, "image_name": source_record.names.get("image", "image")}


def _make_list_entry(
    number: int, source_record: SourceRecord, rejection: RecordRejection, repair: str = ""
) -> dict[str, Any]:
    """Make a line of the quarantine list, as UTF-8 and JSON that any reader accepts.

    Args:
        number: number of the record in the set.
        source_record: the record.
        rejection: the reason to reject it.
        repair: what `fix` would do; "" if no repair is certain.
    """
    record = source_record.record
    name = record.get("id") if isinstance(record, dict) else None
    is_plain = name is None or (isinstance(name, int) and abs(name) < 2**63)
    entry = {
        "number": number,
        "id": name if is_plain else shorten(name),
        "reason": rejection.reason,
        "field": rejection.field,
        "value": rejection.value,
        "explanation": rejection.explanation,
    }
    if source_record.origin:
        entry["origin"] = shorten(source_record.origin)
    if repair:
        entry["repair"] = repair
    return entry


def read_image(
    folder: ImageFolder, path: str, image: bytes | None, options: ShardOptions
) -> tuple[RecordRejection | None, str, bytes]:
    """Read and check an image. Returns the rejection or None, the suffix, and the bytes to store.

    Args:
        folder: folder of the images.
        path: path that the record names.
        image: bytes that came with the record; None reads the path.
        options: form of the stored images.
    """
    try:
        image = folder.read(path) if image is None else image
        suffix = check_image(image)
        if options.image_size:
            suffix, image = "ppm", prepare_image(image, options.image_size, options.image_aspect_ratio)
    except (OutsideError, FileNotFoundError) as error:
        if not is_unicode(path):
            return RecordRejection("broken text", "image", shorten(path)), "", b""
        reason = "outside folder" if isinstance(error, OutsideError) else "missing image"
        is_address = URL_SCHEME.match(path) and not path.lower().startswith("file:")
        # The advice is the same for all images of a set, so the folder is not searched.
        hint = DOWNLOAD_ADVICE if is_address else shorten(folder.find_elsewhere(path))
        return RecordRejection(reason, "image", shorten(path), hint), "", b""
    except (ValueError, MemoryError) as error:  # also if the padded square is too large
        detail = shorten(str(error))
        return RecordRejection("broken image", "image", shorten(path), detail), "", b""
    return None, suffix, image


@dataclass
class _MergedLists:
    """Counts of the lists of all parts.

    Args:
        rejections: entries of the quarantine list.
        repaired: number of repaired records by reason.
        faulty_parts: parts with rejected records.
    """

    rejections: RejectionSummary = field(default_factory=RejectionSummary)
    repaired: Counter[str] = field(default_factory=Counter)
    faulty_parts: list[str] = field(default_factory=list)


def _merge_parts(plan: _ShardPlan, out: str, options: ShardOptions, settings: dict[str, Any]) -> dict[str, Any]:
    """Merge the parts of all shards into the quarantine list, the summary and the index."""
    with IndexBuilder() as index:
        merged = _read_parts(plan, out, options, index)
        # Counts, and the decision if there is a set.
        rejected, num_kept = merged.rejections.counts, index.num_rows
        reasons = dict(sorted(rejected.items()))
        summary = {"settings": settings, "records": plan.count, "samples": num_kept, "quarantined": reasons}
        if options.fix:
            summary["repaired"] = dict(sorted(merged.repaired.items()))
        if num_kept + rejected.total() != plan.count:
            raise RuntimeError(
                f"{out}: {plan.count} records became {num_kept} samples and {rejected.total()} in quarantine"
            )
        num_bad = rejected.total() - (rejected["duplicate"] if options.fix else 0)
        if num_bad > options.max_bad_fraction * plan.count:
            for name in merged.faulty_parts:
                storage.remove(name)  # so that a second run checks these records again: files can be repaired
            refusal = _describe_refusal(merged.rejections, plan.count, options)
            raise QuarantineError(f"{out}: {refusal} {storage.join(out, QUARANTINE_FILE)}", merged.rejections)
        # The index comes last: it makes the folder a set.
        storage.write(storage.join(out, SUMMARY_FILE), json.dumps(summary, indent=2).encode())
        index.write(out)
    storage.remove_folder(storage.join(out, UNFINISHED_DIR))
    return summary


def _read_parts(plan: _ShardPlan, out: str, options: ShardOptions, index: IndexBuilder) -> _MergedLists:
    """Add the rows of all parts to the index, and write the quarantine list. One part is in memory at a time."""
    merged = _MergedLists()
    with ExitStack() as stack:
        quarantine_list = stack.enter_context(storage.open_writer(storage.join(out, QUARANTINE_FILE)))
        if options.fix:
            repaired_list = stack.enter_context(storage.open_writer(storage.join(out, REPAIRED_FILE)))
        for number in range(plan.shards):
            name = storage.join(out, UNFINISHED_DIR, f"{number:06d}.arrow")
            part = ipc.open_file(pa.py_buffer(storage.map_file(name))).read_all()
            index.add(part)
            quarantined = _read_list(part, b"quarantine")
            if quarantined:
                merged.faulty_parts.append(name)
            for entry in quarantined:
                merged.rejections.add(entry)
                quarantine_list.write(_to_json(entry) + b"\n")
            # Without fix there is nothing in the second list.
            for entry in _read_list(part, b"repaired") if options.fix else ():
                merged.repaired[entry["reason"]] += 1
                repaired_list.write(_to_json(entry) + b"\n")
    return merged


def _read_list(part: pa.Table, name: bytes) -> list[dict[str, Any]]:
    """Read a list in the metadata of a part."""
    entries: list[dict[str, Any]] = json.loads(part.schema.metadata.get(name, b"[]"))
    return entries


def _describe_refusal(rejections: RejectionSummary, num_records: int, options: ShardOptions) -> str:
    """Explain with an example why there is no set. If all records fail alike, the form of the file is wrong."""
    num_rejected = rejections.counts.total()
    counts = ", ".join(f"{count} {reason}" for reason, count in sorted(rejections.counts.items()))
    # Parts of older versions lack some fields.
    entry = {"field": "", "value": "", "explanation": rejections.first_entry["reason"], **rejections.first_entry}
    example = (
        f"record {entry['number']}: {entry['field'] or 'the record'}: got {entry['value']}: {entry['explanation']}"
    )
    all_fail_alike = num_rejected == num_records and len(rejections.counts) == 1
    if all_fail_alike and entry["reason"] not in ("missing image", "broken image"):
        return (
            f"all {num_records} records cannot be used for one reason ({counts}), so the form of the file is wrong; "
            f'{example}; allowed: a form of "Formats" in jobs/README.md, or a column map; all are listed in'
        )
    return (
        f"{num_rejected} of {num_records} records cannot be used ({counts}), allowed: "
        f"{options.max_bad_fraction:.2%}; first {example}; all are listed in"
    )


def _to_json(value: Any) -> bytes:
    """Serialise as JSON that `json.loads` reads, including lone surrogates. Bytes become their digest."""
    return json.dumps(value, ensure_ascii=False, default=_describe_value).encode("utf-8", "surrogatepass")


def _describe_value(value: Any) -> str:
    """Describe a value of a table that JSON does not have."""
    return hashlib.sha256(value).hexdigest() if isinstance(value, bytes) else repr(value)


def to_ipc_bytes(table: pa.Table) -> bytes:
    """Serialise a table as an Arrow IPC file of one record batch."""
    sink = io.BytesIO()
    with ipc.new_file(sink, table.schema) as file:
        file.write_batch(as_record_batch(table))
    return sink.getvalue()
