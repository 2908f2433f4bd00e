"""Existing sets of shards: an index for tars that others made, and the check of a set against its index.

Both read every byte once, a tar a task, on Ray Data; local tars are mapped into memory, others are read into it.
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
from pipelines.data.shard_index import INDEX_FILE, INDEX_SCHEMA, QUARANTINE_FILE, SUMMARY_FILE, UNFINISHED_DIR, Shards
from pipelines.data.shard_writer import BAR_FORMAT, to_ipc_bytes, write_index

COMPRESSED_SUFFIXES = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst")
"""How names of compressed tars end."""


@dataclass
class IndexReport:
    """Members and samples of the tars of a new index.

    samples: in the index.  quarantined: samples kept out, by reason.  members: all of the tars; each is used, ignored
    or refused.  used, ignored: members by suffix or kind.  refused: members of samples that were kept out.
    notes: lines on what is otherwise than people may think.
    """

    tars: int = 0
    samples: int = 0
    quarantined: Counter[str] = field(default_factory=Counter)
    members: int = 0
    used: Counter[str] = field(default_factory=Counter)
    ignored: Counter[str] = field(default_factory=Counter)
    refused: int = 0
    notes: list[str] = field(default_factory=list)


def index_tars(folder: str, tolerance: float = 0.0) -> IndexReport:
    """Write the index of a folder of tars that others made: the samples that WebDataset reads from them.

    Samples that cannot be used are listed in quarantine.jsonl with a reason of `tars.REASONS` or `records.REASONS`.

    Args:
        folder: local or any URL.
        tolerance: share of the samples that may be kept out.

    Raises:
        ValueError: one line, where there are no tars, an index already, or an unfinished making; where a tar as a whole
            cannot be used; and where more samples than tolerated are kept out: then there is the list, but no index.
    """
    if storage.exists(storage.join(folder, INDEX_FILE)):
        raise ValueError(
            f"{folder}: has an index already, allowed: tars without one; delete {INDEX_FILE} to index them again"
        )
    if storage.list_files(storage.join(folder, UNFINISHED_DIR)):
        raise ValueError(f"{folder}: an interrupted `redux shards make` is here, allowed: start that again instead")
    names, notes = _list_tars(folder)
    found = IndexReport(tars=len(names), notes=notes)
    tables, listed, errors = [], [], []
    for row in _map_tars([{"tar": storage.join(folder, name)} for name in names], _index_tar, "index"):
        if row["error"]:
            errors.append(row["error"])
            continue
        tables.append(ipc.open_file(row["index"]).read_all())
        report = json.loads(row["report"])
        listed += report["quarantine"]
        found.notes += report["notes"]
        found.members += report["members"]
        found.refused += report["refused"]
        found.used += Counter(report["used"])
        found.ignored += Counter(report["ignored"])
    if errors:
        raise ValueError(errors[0] + (f"; and {len(errors) - 1} more tars" if errors[1:] else ""))
    found.samples = sum(map(len, tables))
    found.quarantined = Counter(entry["reason"] for entry in listed)
    if found.members != found.used.total() + found.ignored.total() + found.refused:
        raise RuntimeError(f"{folder}: {found}: members do not add up")
    storage.write(storage.join(folder, QUARANTINE_FILE), "".join(json.dumps(entry) + "\n" for entry in listed).encode())
    if not found.samples or len(listed) > tolerance * (found.samples + len(listed)):
        raise ValueError(_describe_refusal(folder, found, listed, tolerance))
    write_index(folder, pa.concat_tables(tables))
    return found


def _list_tars(folder: str) -> tuple[list[str], list[str]]:
    """Names of the tars directly in a folder, and notes on others; ValueError where there are none to be read."""
    names = storage.list_files(folder)
    if packed := [name for name in names if name.lower().endswith(COMPRESSED_SUFFIXES)]:
        raise ValueError(
            f"{storage.join(folder, packed[0])}: compressed, allowed: plain tars, of which a byte range is a sample"
            + (f"; and {len(packed) - 1} more" if packed[1:] else "")
        )
    if unsaid := [name for name in names if tars.to_utf8(name) != name]:
        raise ValueError(f"{folder}: got the file name {unsaid[0]!a}, allowed: names in UTF-8")
    below = {
        name: sum(_is_tar(each) for each in storage.list_files(storage.join(folder, name)))
        for name in storage.list_folders(folder)
    }
    below = {name: count for name, count in below.items() if count}
    if not any(map(_is_tar, names)):
        more = f"; folders below have some, each is a set of its own: {', '.join(below)}" if below else ""
        raise ValueError(f"{folder}: no tars here, allowed: a folder with at least one{more}")
    notes = [
        f"{storage.join(folder, name)}: {count} tars in this folder are not indexed" for name, count in below.items()
    ]
    return [name for name in names if _is_tar(name)], notes


def _is_tar(name: str) -> bool:
    return name.lower().endswith(".tar")


def _describe_refusal(folder: str, found: IndexReport, listed: list[dict[str, Any]], tolerance: float) -> str:
    """The line on why there is no index."""
    if not listed:
        return f"{folder}: no samples in {found.tars} tars, allowed: at least one"
    counts = ", ".join(f"{count} {reason}" for reason, count in found.quarantined.items())
    first = listed[0]
    reasons, advice = set(found.quarantined), ""
    if "members apart" in reasons or ("no record" in reasons and reasons & {"tag without image", "missing image"}):
        advice = (
            "; members of a sample must stand together and share their path up to the first dot, KEY.jpg and KEY.json: "
            "put them into one folder, and pack it by tar --sort=name"
        )
    elif reasons & {"malformed", "no record"}:
        advice = (
            "; KEY.json must hold LLaVA's record with conversations, not metadata such as img2dataset's: write a JSON "
            "file of records, and pack it with the images by `redux shards make`"
        )
    return (
        f"{folder}: {len(listed)} of {found.samples + len(listed)} samples cannot be used ({counts}; first "
        f"{tars.escape_unprintable(first['key'])} of {first['shard']}: {first['why']}), allowed: {tolerance:.2%}"
        f"{advice}; {storage.join(folder, QUARANTINE_FILE)} lists them"
    )


def verify_set(folder: str, decode: bool = False) -> list[str]:
    """What is wrong with a set, a line each; empty where every byte is as the index says.

    Checked are that each shard is there and has no sample that the index lacks, every sample's checksum and record and
    what the index says of it, and that summary and index agree in number.

    Args:
        folder: local or any URL.
        decode: also decode every image, as training does.

    Raises:
        ValueError: where the index is missing or damaged.
    """
    shards, wrong = Shards(folder), []
    shards.validate()
    if storage.exists(summary := storage.join(folder, SUMMARY_FILE)):
        kept = json.loads(storage.read(summary)).get("kept", len(shards))
        if kept != len(shards):
            wrong.append(f"{summary}: says {kept} samples were kept, the index has {len(shards)}")
    sizes = shards.shard_sizes
    rows = dict(
        zip(shards.shard_names, zip((np.cumsum(sizes) - sizes).tolist(), sizes.tolist(), strict=True), strict=True)
    )
    for name in storage.list_files(folder):
        if _is_tar(name) and name not in rows:
            rows[name] = (0, 0)
    items = [{"tar": name, "first": first, "rows": count} for name, (first, count) in rows.items()]
    for found in _map_tars(items, _verify_tar, "verify", shards, decode):
        wrong += found["wrong"]
    return wrong


def _map_tars(items: list[dict[str, Any]], task: Any, name: str, *args: Any) -> Iterator[dict]:
    """What the task says of each tar, in their order."""
    if not items:  # Ray Data makes no dataset of nothing
        return
    dataset = ray.data.from_items(items, override_num_blocks=len(items)).map(task, fn_args=args, num_cpus=1)
    dataset.context.execution_options.preserve_order = True
    for row in tqdm(dataset.iter_rows(), total=len(items), desc=name, unit="shard", bar_format=BAR_FORMAT):
        interrupts.raise_if_interrupted()
        yield row


def _index_tar(item: dict[str, str]) -> dict[str, Any]:
    """Return the part of the index of one tar, and its counts and notes."""
    name = item["tar"].rpartition("/")[2]
    try:
        data = storage.map_file(item["tar"])
        tar = tars.read_tar(data, item["tar"])
    except ValueError as error:
        return {"index": b"", "report": "", "error": str(error)}
    report = {
        "quarantine": [
            {"shard": name, "key": tars.to_utf8(sample.key), "reason": sample.fault, "why": _explain_rejection(sample)}
            for sample in tar.samples
            if sample.fault
        ],
        "members": tar.members,
        "used": tar.used,
        "ignored": tar.ignored,
        "refused": tar.refused,
        "notes": tar.notes,
    }
    table = pa.Table.from_pylist(tars.make_index_rows(tar, data, name), INDEX_SCHEMA)
    return {"index": to_ipc_bytes(table), "report": json.dumps(report), "error": ""}


def _explain_rejection(sample: tars.TarSample) -> str:
    """A refused sample's reason in words, and its members."""
    why = (tars.TAR_REASONS | records.RECORD_REASONS)[sample.fault or ""]
    return f"{why}; it has {', '.join(tars.escape_unprintable(member.name) for member in sample.members)}"


def _verify_tar(item: dict[str, Any], shards: Shards, decode: bool) -> dict[str, list[str]]:
    """Lines on what is wrong with one tar."""
    tar, wrong = storage.join(shards.folder, item["tar"]), []
    try:
        data = storage.map_file(tar)
    except ValueError as error:
        return {"wrong": [str(error)]}
    rows = shards.read_rows(range(item["first"], item["first"] + item["rows"]))
    for row in rows:
        part = data[row["offset"] : row["offset"] + row["length"]]
        if hashlib.sha256(part).digest() != row["sha256"]:
            wrong.append(f"{tar}: sample {row['key']}: bytes differ from the index's checksum")
        elif decode and row["image_size"]:
            image = part[row["image_at"] : row["image_at"] + row["image_size"]]
            try:
                images.check_image(image)
            except ValueError as error:
                wrong.append(f"{tar}: sample {row['key']}: broken image: {error}")
    if not any("checksum" in line for line in wrong):  # a damaged header would only be reported twice
        wrong += _compare_with_index(data, item["tar"], tar, rows)
    return {"wrong": wrong}


def _compare_with_index(data: tars.BytesLike, name: str, url: str, rows: list[dict[str, Any]]) -> list[str]:
    """Lines on where the index says otherwise what a tar holds."""
    try:
        tar = tars.read_tar(data, url)
    except ValueError as error:
        return [str(error)]
    refused = {sample.offset: sample for sample in tar.samples if sample.fault}
    held = {row["offset"]: row for row in tars.make_index_rows(tar, data, name)}
    if held and not rows:
        return [f"{url}: is not in the index"]
    wrong = []
    for row in rows:
        if sample := refused.get(row["offset"]):
            wrong.append(f"{url}: sample {row['key']}: {sample.fault}: {_explain_rejection(sample)}")
        elif held.pop(row["offset"], None) != row:
            wrong.append(f"{url}: sample {row['key']}: the index says otherwise what it holds")
    if held:
        wrong.append(f"{url}: holds {len(held)} samples that are not in the index")
    return wrong
