"""Existing sets of shards: an index for foreign tars, and whether a set is what its index says.

Both read every byte once, a tar a task, on Ray Data.
"""

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import ray.data
from pyarrow import ipc
from tqdm import tqdm

from pipelines import records, storage
from pipelines.shards import INDEX, SCHEMA, SUMMARY, Shards, index, ipc_file, write_index


def index_tars(folder: str) -> int:
    """Write the index of a folder of tars that others made; returns the number of samples.

    Each sample needs a json member, LLaVA's record.  ValueError where there are no tars, where there is an index
    already, for a sample that is no record, and for members that only unpickling could read.
    """
    if storage.exists(storage.join(folder, INDEX)):
        raise ValueError(f"{folder}: has an index already, allowed: tars without one")
    tars = [storage.join(folder, name) for name in storage.names(folder) if name.endswith(".tar")]
    if not tars:
        raise ValueError(f"{folder}: no tars here, allowed: a folder with at least one")
    items = [{"tar": tar} for tar in tars]
    tables = [ipc.open_file(row["index"]).read_all() for row in _each(items, _index, "index")]
    write_index(folder, pa.concat_tables(tables))
    return sum(len(table) for table in tables)


def verify(folder: str) -> list[str]:
    """What is wrong with a set, a line each; empty where every byte is as the index says.

    Checked are that each shard is there and has no sample that the index lacks, every sample's checksum and record and
    what the index says of it, and that summary and index agree in number.  ValueError where the index is missing or
    damaged.
    """
    shards, wrong = Shards(folder), []
    shards.check()
    if storage.exists(summary := storage.join(folder, SUMMARY)):
        kept = json.loads(storage.read(summary)).get("kept", len(shards))
        if kept != len(shards):
            wrong.append(f"{summary}: says {kept} samples were kept, the index has {len(shards)}")
    sizes = shards.sizes
    rows = dict(zip(shards.names, zip((np.cumsum(sizes) - sizes).tolist(), sizes.tolist(), strict=True), strict=True))
    for name in storage.names(folder):
        if name.endswith(".tar") and name not in rows:
            rows[name] = (0, 0)
    items = [{"tar": name, "first": first, "rows": count} for name, (first, count) in rows.items()]
    for found in _each(items, _verify, "verify", shards):
        wrong += found["wrong"]
    return wrong


def _each(items: list[dict[str, Any]], task: Any, name: str, *args: Any) -> Iterator[dict]:
    """What the task says of each tar, in their order."""
    if not items:  # Ray Data makes no dataset of nothing
        return
    dataset = ray.data.from_items(items, override_num_blocks=len(items)).map(task, fn_args=args, num_cpus=1)
    dataset.context.execution_options.preserve_order = True
    yield from tqdm(dataset.iter_rows(), total=len(items), desc=name, unit="shard")


def _index(item: dict[str, str]) -> dict[str, bytes]:
    data, name = storage.read(item["tar"]), item["tar"].rpartition("/")[2]
    rows = []
    for row in index(data, name):
        record = _record(row, data[row["offset"] :])
        if record is None:
            raise ValueError(f"{item['tar']}: sample {row['key']}: no json with conversations, LLaVA's form")
        rows.append({**row, "words": records.length(record)})
    return {"index": ipc_file(pa.Table.from_pylist(rows, SCHEMA))}


def _verify(item: dict[str, Any], shards: Shards) -> dict[str, list[str]]:
    tar, wrong = storage.join(shards.folder, item["tar"]), []
    try:
        data = storage.read(tar)
    except ValueError as error:
        return {"wrong": [str(error)]}
    rows = shards.rows(range(item["first"], item["first"] + item["rows"]))
    for row in rows:
        part, name = data[row["offset"] : row["offset"] + row["length"]], f"{tar}: sample {row['key']}"
        if hashlib.sha256(part).digest() != row["sha256"]:
            wrong.append(f"{name}: bytes differ from the index's checksum")
            continue
        record = _record(row, part)
        if record is None:
            wrong.append(f"{name}: no json with conversations, LLaVA's form")
        elif {**row, "offset": 0} != {**next(index(part, item["tar"])), "words": records.length(record)}:
            wrong.append(f"{name}: the index says otherwise what it holds")
    end = max((row["offset"] + row["length"] for row in rows), default=0)
    if data[end:].strip(b"\0"):
        wrong.append(f"{tar}: {'goes on behind the last sample of the index' if rows else 'is not in the index'}")
    return {"wrong": wrong}


def _record(row: dict[str, Any], sample: bytes) -> dict | None:
    """The sample's record; None where there is none of LLaVA's form."""
    try:
        record = json.loads(sample[row["record_at"] : row["record_at"] + row["record_size"]])
    except ValueError:
        return None
    whole = {"id": row["key"], **record} if isinstance(record, dict) else record
    return None if records.fault(whole, None) == "malformed" else record
