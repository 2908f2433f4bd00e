"""Indexing of foreign tars, and verification of a set against its index.

Both read every byte once on Ray Data, one task per tar. Local tars are mapped into memory, others are read into memory.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import ray.data
from pyarrow import ipc
from tqdm import tqdm

from pipelines.core import interrupts, storage
from pipelines.data import images, records, tars
from pipelines.data.index_file import INDEX_FILE, INDEX_SCHEMA, IndexBuilder
from pipelines.data.quarantine import QuarantineError, RejectionSummary
from pipelines.data.shard_index import (
    QUARANTINE_FILE,
    SUMMARY_FILE,
    UNFINISHED_DIR,
    Shards,
    read_summary,
)
from pipelines.data.shard_writer import BAR_FORMAT, to_ipc_bytes

COMPRESSED_SUFFIXES = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst")
"""Suffixes of compressed tars."""


@dataclass
class IndexReport:
    """Counts of tars, samples and members of a new index.

    samples: samples in the index. rejections: the other samples. members: all members of the tars; each is used,
    ignored or rejected. used, ignored: members by suffix or kind. rejected: members of rejected samples. notes: lines
    about unexpected content.
    """

    tars: int = 0
    samples: int = 0
    rejections: RejectionSummary = field(default_factory=RejectionSummary)
    members: int = 0
    used: Counter[str] = field(default_factory=Counter)
    ignored: Counter[str] = field(default_factory=Counter)
    rejected: int = 0
    notes: list[str] = field(default_factory=list)


def index_tars(folder: str, max_bad_fraction: float = 0.0) -> IndexReport:
    """Write an index for a folder of foreign tars, with the samples that WebDataset reads from them.

    Unusable samples are listed in quarantine.jsonl with a reason of `tars.TAR_REASONS` or `records.RECORD_REASONS`.

    Args:
        folder: folder or URL of the tars.
        max_bad_fraction: fraction of the samples that may be rejected.

    Returns:
        Counts of what was indexed.

    Raises:
        ValueError: the folder has no tars, an index, or unfinished shards; a whole tar is unusable; or more samples
            than max_bad_fraction are rejected. Then there is a quarantine list, but no index. One line.
    """
    if storage.exists(storage.join(folder, INDEX_FILE)):
        raise ValueError(
            f"{folder}: has an index already, allowed: tars without one; delete {INDEX_FILE} to index them again"
        )
    if storage.list_files(storage.join(folder, UNFINISHED_DIR)):
        raise ValueError(f"{folder}: an interrupted `redux shards make` is here, allowed: start that again instead")
    # There is one task per tar; errors are collected, so that the message can count them.
    names, notes = _list_tars(folder)
    report, errors = IndexReport(tars=len(names), notes=notes), []
    with IndexBuilder() as index:
        # The quarantine list comes first: it explains a refusal.
        with storage.open_writer(storage.join(folder, QUARANTINE_FILE)) as quarantine_list:
            for row in _map_tars([{"tar": storage.join(folder, name)} for name in names], _index_tar, "index"):
                if row["error"]:
                    errors.append(row["error"])
                    continue
                index.add(ipc.open_file(row["index"]).read_all())
                for entry in _add_tar_report(report, json.loads(row["report"])):
                    quarantine_list.write(json.dumps(entry).encode() + b"\n")
            if errors:
                raise ValueError(errors[0] + (f"; and {len(errors) - 1} more tars" if errors[1:] else ""))
        report.samples = index.num_rows
        if report.members != report.used.total() + report.ignored.total() + report.rejected:
            raise RuntimeError(f"{folder}: {report}: members do not add up")
        num_rejected = report.rejections.counts.total()
        if not report.samples or num_rejected > max_bad_fraction * (report.samples + num_rejected):
            raise QuarantineError(_describe_refusal(folder, report, max_bad_fraction), report.rejections)
        index.write(folder)
    return report


def _add_tar_report(report: IndexReport, tar_report: dict[str, Any]) -> list[dict[str, Any]]:
    """Add the counts of a tar to those of all. Returns its entries of the quarantine list."""
    entries: list[dict[str, Any]] = tar_report["quarantine"]
    for entry in entries:
        report.rejections.add(entry)
    report.notes += tar_report["notes"]
    report.members += tar_report["members"]
    report.rejected += tar_report["rejected"]
    report.used += Counter(tar_report["used"])
    report.ignored += Counter(tar_report["ignored"])
    return entries


def _list_tars(folder: str) -> tuple[list[str], list[str]]:
    """List the tars directly in a folder, and notes about tars below it. ValueError if there are none."""
    names = storage.list_files(folder)
    # Files that cannot be indexed.
    compressed = [name for name in names if name.lower().endswith(COMPRESSED_SUFFIXES)]
    if compressed:
        raise ValueError(
            f"{storage.join(folder, compressed[0])}: compressed, allowed: plain tars, of which a byte range is a sample"
            + (f"; and {len(compressed) - 1} more" if compressed[1:] else "")
        )
    if not_utf8 := [name for name in names if tars.to_utf8(name) != name]:
        raise ValueError(f"{folder}: got the file name {not_utf8[0]!a}, allowed: names in UTF-8")
    # Tars one level below, which users may expect to be indexed.
    below = {
        name: sum(map(_is_tar, storage.list_files(storage.join(folder, name)))) for name in storage.list_folders(folder)
    }
    below = {name: count for name, count in below.items() if count}
    if not any(map(_is_tar, names)):
        hint = f"; folders below have some, each is a separate set: {', '.join(below)}" if below else ""
        raise ValueError(f"{folder}: no tars here, allowed: a folder with at least one{hint}")
    notes = [
        f"{storage.join(folder, name)}: {count} tars in this folder are not indexed" for name, count in below.items()
    ]
    return [name for name in names if _is_tar(name)], notes


def _is_tar(name: str) -> bool:
    return name.lower().endswith(".tar")


def _describe_refusal(folder: str, report: IndexReport, max_bad_fraction: float) -> str:
    """Explain in one line why there is no index."""
    rejected = report.rejections.counts
    if not rejected:
        return f"{folder}: no samples in {report.tars} tars, allowed: at least one"
    counts = ", ".join(f"{count} {reason}" for reason, count in rejected.items())
    rejection = report.rejections.first_entry
    # Advice for the two usual mistakes: members that do not stand together, and records of another form.
    reasons, advice = set(rejected), ""
    if "split sample" in reasons or ("no record" in reasons and reasons & {"tag without image", "missing image"}):
        advice = (
            "; members of a sample must stand together and share their path up to the first dot, KEY.jpg and KEY.json: "
            "put them into one folder, and pack it by tar --sort=name"
        )
    elif reasons & {"wrong fields", "no record"}:
        advice = (
            "; KEY.json must hold LLaVA's record with conversations: `redux shards make --source` reads tars with "
            "captions or other conversations"
        )
    example = f"{tars.escape_unprintable(rejection['key'])} of {rejection['shard']}: {rejection['explanation']}"
    return (
        f"{folder}: {rejected.total()} of {report.samples + rejected.total()} samples cannot be used ({counts}; first "
        f"{example}), allowed: {max_bad_fraction:.2%}{advice}; {storage.join(folder, QUARANTINE_FILE)} lists them"
    )


def verify_set(folder: str, decode: bool = False) -> list[str]:
    """Verify every byte of a set against its index.

    Each shard must exist and have no sample that the index lacks. Each sample must have its checksum, a valid record
    and the values of its row. Summary and index must have the same number of samples.

    Args:
        folder: folder or URL of the set.
        decode: True also decodes every image, as training does.

    Returns:
        One line per error; empty for a correct set.

    Raises:
        ValueError: the index is missing or damaged.
    """
    shards = Shards(folder)
    errors: list[str] = []
    shards.validate()
    summary = read_summary(folder)
    if summary and summary.get("samples", len(shards)) != len(shards):
        path = storage.join(folder, SUMMARY_FILE)
        errors.append(f"{path}: says {summary['samples']} samples were kept, the index has {len(shards)}")
    # Rows of each shard as (first row, number of rows); a tar that the index lacks has none.
    sizes = shards.shard_sizes
    spans = zip((np.cumsum(sizes) - sizes).tolist(), sizes.tolist(), strict=True)
    rows = dict(zip(shards.shard_names, spans, strict=True))
    for name in storage.list_files(folder):
        if _is_tar(name) and name not in rows:
            rows[name] = (0, 0)
    items = [{"tar": name, "start": start, "rows": count} for name, (start, count) in rows.items()]
    for row in _map_tars(items, _verify_tar, "verify", shards, decode):
        errors += row["errors"]
    return errors


def _map_tars(items: list[dict[str, Any]], task: Any, name: str, *args: Any) -> Iterator[dict]:
    """Run a task per tar on Ray Data, and yield its results in the order of the items."""
    if not items:  # Ray Data cannot make an empty dataset
        return
    dataset = ray.data.from_items(items, override_num_blocks=len(items)).map(task, fn_args=args, num_cpus=1)
    dataset.context.execution_options.preserve_order = True
    for row in tqdm(dataset.iter_rows(), total=len(items), desc=name, unit="shard", bar_format=BAR_FORMAT):
        interrupts.raise_if_interrupted()
        yield row


def _index_tar(item: dict[str, str]) -> dict[str, Any]:
    """Index one tar. Returns its part of the index, and its counts and notes as JSON. Runs in a Ray task."""
    name = item["tar"].rpartition("/")[2]
    # Errors are values: the caller counts them over all tars.
    try:
        data = storage.map_file(item["tar"])
        tar = tars.read_tar(data, item["tar"])
    except ValueError as error:
        return {"index": b"", "report": "", "error": str(error)}
    report = {
        "quarantine": [
            {
                "shard": name,
                "key": tars.to_utf8(sample.key),
                "reason": sample.rejection_reason,
                "field": sample.rejection_field,
                "value": sample.rejection_value or _list_members(sample),
                "explanation": _explain_rejection(sample),
            }
            for sample in tar.samples
            if sample.rejection_reason
        ],
        "members": tar.members,
        "used": tar.used,
        "ignored": tar.ignored,
        "rejected": tar.rejected,
        "notes": tar.notes,
    }
    table = pa.Table.from_pylist(tars.make_index_rows(tar, data, name), INDEX_SCHEMA)
    return {"index": to_ipc_bytes(table), "report": json.dumps(report), "error": ""}


def _explain_rejection(sample: tars.TarSample) -> str:
    """Explain the reason of a rejected sample, and list its members."""
    explanation = (tars.TAR_REASONS | records.RECORD_REASONS)[sample.rejection_reason or ""]
    return f"{explanation}; it has {_list_members(sample)}"


def _list_members(sample: tars.TarSample) -> str:
    return ", ".join(tars.escape_unprintable(member.name) for member in sample.members)


def _verify_tar(item: dict[str, Any], shards: Shards, decode: bool) -> dict[str, list[str]]:
    """Verify one tar, and return a line per error. Runs in a Ray task."""
    tar = storage.join(shards.folder, item["tar"])
    errors: list[str] = []
    try:
        data = storage.map_file(tar)
    except ValueError as error:
        return {"errors": [str(error)]}
    rows = shards.read_rows(range(item["start"], item["start"] + item["rows"]))
    is_damaged = False
    for row in rows:
        part = data[row["offset"] : row["offset"] + row["length"]]
        if hashlib.sha256(part).digest() != row["sha256"]:
            errors.append(f"{tar}: sample {row['key']}: bytes differ from the index's checksum")
            is_damaged = True
        elif decode and row["image_size"]:
            image = part[row["image_at"] : row["image_at"] + row["image_size"]]
            try:
                images.check_image(image)
            except ValueError as error:
                errors.append(f"{tar}: sample {row['key']}: broken image: {error}")
    if not is_damaged:  # else a damaged header would be reported twice
        errors += _compare_with_index(data, item["tar"], tar, rows)
    return {"errors": errors}


def _compare_with_index(data: tars.BytesLike, name: str, url: str, rows: list[dict[str, Any]]) -> list[str]:
    """Compare the samples of a tar with the rows of the index. Returns a line per difference."""
    try:
        tar = tars.read_tar(data, url)
    except ValueError as error:
        return [str(error)]
    # The offset identifies a sample, since keys may repeat.
    rejected = {sample.offset: sample for sample in tar.samples if sample.rejection_reason}
    unindexed = {row["offset"]: row for row in tars.make_index_rows(tar, data, name)}
    if unindexed and not rows:
        return [f"{url}: is not in the index"]
    errors = []
    for row in rows:
        if sample := rejected.get(row["offset"]):
            errors.append(f"{url}: sample {row['key']}: {sample.rejection_reason}: {_explain_rejection(sample)}")
        elif unindexed.pop(row["offset"], None) != row:
            errors.append(f"{url}: sample {row['key']}: its row of the index differs from the tar")
    if unindexed:
        errors.append(f"{url}: contains {len(unindexed)} samples that are not in the index")
    return errors
