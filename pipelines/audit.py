"""Existing sets of shards: an index for foreign tars, and whether a set is what its index says.

Both read every byte once, a tar a task, on Ray Data.
"""

import hashlib
import json
import tarfile
from collections.abc import Iterator
from io import BytesIO
from typing import Any

import pyarrow as pa
import ray.data
from pyarrow import parquet
from tqdm import tqdm

from pipelines import records, storage
from pipelines.shards import INDEX, SCHEMA, SUMMARY, index, write_index


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
    tables = [parquet.read_table(BytesIO(row["index"])) for row in _each(tars, _index, "index")]
    write_index(folder, pa.concat_tables(tables))
    return sum(len(table) for table in tables)


def verify(folder: str) -> list[str]:
    """What is wrong with a set, a line each; empty where every byte is as the index says.

    Checked are that each shard is there and has no sample that the index lacks, every sample's checksum and record, and
    that summary and index agree in number.
    """
    path = storage.join(folder, INDEX)
    if not storage.exists(path):
        raise ValueError(f"{folder}: no shards here, {INDEX} is missing")
    table = parquet.read_table(BytesIO(storage.read(path)))
    wrong = []
    if storage.exists(summary := storage.join(folder, SUMMARY)):
        kept = json.loads(storage.read(summary))["kept"]
        if kept != len(table):
            wrong.append(f"{summary}: says {kept} samples were kept, the index has {len(table)}")
    rows: dict[str, list[dict]] = {}
    for row in table.to_pylist():
        rows.setdefault(row["shard"], []).append(row)
    tars = {storage.join(folder, name): json.dumps(own) for name, own in rows.items()}
    for name in storage.names(folder):
        if name.endswith(".tar") and name not in rows:
            wrong.append(f"{storage.join(folder, name)}: is not in the index")
    for found in _each(list(tars), _verify, "verify", tars):
        wrong += found["wrong"]
    return wrong


def _each(tars: list[str], task: Any, name: str, known: dict[str, str] | None = None) -> Iterator[dict]:
    """What the task says of each tar, in their order."""
    items = [{"tar": tar, "rows": (known or {}).get(tar, "")} for tar in tars]
    dataset = ray.data.from_items(items, override_num_blocks=len(items)).map(task, num_cpus=1)
    dataset.context.execution_options.preserve_order = True
    yield from tqdm(dataset.iter_rows(), total=len(items), desc=name, unit="shard")


def _index(item: dict[str, str]) -> dict[str, bytes]:
    data, name = storage.read(item["tar"]), item["tar"].rpartition("/")[2]
    rows = []
    for row in index(data, name):
        members = _members(data[row["offset"] : row["offset"] + row["length"]])
        record = _record(members)
        if record is None:
            raise ValueError(f"{item['tar']}: sample {row['key']}: no json with conversations, LLaVA's form")
        rows.append({**row, "image": len(members) > 1, "words": records.length(record)})
    sink = BytesIO()
    parquet.write_table(pa.Table.from_pylist(rows, SCHEMA), sink)
    return {"index": sink.getvalue()}


def _verify(item: dict[str, str]) -> dict[str, list[str]]:
    tar, wrong = item["tar"], []
    try:
        data = storage.read(tar)
    except ValueError as error:
        return {"wrong": [str(error)]}
    rows = json.loads(item["rows"])
    for row in rows:
        part = data[row["offset"] : row["offset"] + row["length"]]
        if hashlib.sha256(part).hexdigest() != row["sha256"]:
            wrong.append(f"{tar}: sample {row['key']}: bytes differ from the index's checksum")
        elif _record(_members(part)) is None:
            wrong.append(f"{tar}: sample {row['key']}: no json with conversations, LLaVA's form")
    end = max(row["offset"] + row["length"] for row in rows)
    if data[end:].strip(b"\0"):
        wrong.append(f"{tar}: goes on behind the last sample of the index")
    return {"wrong": wrong}


def _members(sample: bytes) -> dict[str, bytes]:
    with tarfile.open(fileobj=BytesIO(sample)) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar if member.isfile()}  # type: ignore[union-attr]


def _record(members: dict[str, bytes]) -> dict | None:
    for name, body in members.items():
        if name.endswith(".json"):
            try:
                record = json.loads(body)
            except ValueError:
                return None
            return record if isinstance(record, dict) and isinstance(record.get("conversations"), list) else None
    return None
