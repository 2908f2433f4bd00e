"""WebDataset shards and the index beside them.

Shards are plain tars that any WebDataset tool reads: of each sample the image file as it came and `json`, the record.
The index gives every sample's shard, byte range and checksum, so that one sample is one ranged read: training can take
any sample at any time, in any order, without streaming the tar before it.

    out/000000.tar, 000001.tar, ...     KEY.png (or jpg, ...), KEY.json, KEY.png, ...
    out/index.parquet                   key, shard, offset, length, sha256; a row a sample, in the order of the records
"""

import hashlib
import io
import json
import os
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import pyarrow as pa
from annotated_types import Ge
from pyarrow import parquet
from tqdm import tqdm

INDEX = "index.parquet"
SCHEMA = pa.schema(
    {"key": pa.string(), "shard": pa.string(), "offset": pa.int64(), "length": pa.int64(), "sha256": pa.string()}
)


@dataclass(frozen=True, kw_only=True)
class Data:
    """Where samples come from, and how many of them a shard holds."""

    source: Literal["easy-vqa"] = "easy-vqa"
    samples_per_shard: Annotated[int, Ge(1)] = 1000


@dataclass(frozen=True)
class Sample:
    """One sample as stored: the image file's bytes and the record."""

    key: str
    image: bytes
    record: dict


def make(records: Sequence[dict], out: Path, samples_per_shard: int) -> None:
    """Write records (LLaVA's form, `image` a path) as shards in `out`, then the index, which makes it a set.

    What lay there before is gone.  ValueError names a record whose image cannot be read, an id that WebDataset would
    split at a dot, and ids that are not unique.
    """
    import webdataset  # brings torch along, which readers do without

    [(most, times)] = Counter(record["id"] for record in records).most_common(1) or [("", 0)]
    if times > 1:
        raise ValueError(f"{out}: record {most!r} comes {times} times, allowed: once")
    out.mkdir(parents=True, exist_ok=True)
    for old in (out / INDEX, *out.glob("*.tar")):  # the index first: without it there is no set
        old.unlink(missing_ok=True)
    shards = [records[first : first + samples_per_shard] for first in range(0, len(records), samples_per_shard)]
    rows: list[dict] = []
    with tqdm(total=len(records), desc=f"shards {out.name}", unit="sample") as bar:
        for number, part in enumerate(shards):
            path = out / f"{number:06d}.tar"
            # fixed times and owner: equal records give equal bytes
            with webdataset.TarWriter(str(path), mtime=0, user="redux", group="redux") as tar:
                for record in part:
                    tar.write(_member(record))
                    bar.update()
            rows += index(path)
    temporary = out / f".{INDEX}"
    parquet.write_table(pa.Table.from_pylist(rows, SCHEMA), temporary)
    os.replace(temporary, out / INDEX)


def _member(record: dict) -> dict:
    path = Path(record["image"])
    if not isinstance(record["id"], str) or "." in record["id"]:
        raise ValueError(f"record {record['id']!r}: allowed: an id of text without a dot")
    try:
        image = path.read_bytes()
    except OSError as error:
        raise ValueError(f"record {record['id']}: image {path}: {error.strerror}") from None
    kept = {**record, "image": f"{record['id']}{path.suffix}"}
    return {"__key__": record["id"], path.suffix.removeprefix("."): image, "json": kept}


def index(shard: Path) -> Iterator[dict]:
    """Rows of the index for one tar, also a foreign one: members of a sample stand together and share the key."""
    with tarfile.open(shard) as tar, shard.open("rb") as file:
        members = tar.getmembers()
        keys = [member.name.rpartition(".")[0] for member in members]
        first = 0
        for number in range(1, len(members) + 1):
            if number < len(members) and keys[number] == keys[first]:
                continue
            start, last = members[first].offset, members[number - 1]
            # data is padded to whole blocks of 512 bytes
            length = last.offset_data + -(-last.size // 512) * 512 - start
            file.seek(start)
            digest = hashlib.sha256(file.read(length)).hexdigest()
            yield {"key": keys[first], "shard": shard.name, "offset": start, "length": length, "sha256": digest}
            first = number


class Shards:
    """A finished set of shards: `len`, and any samples by number.

    Small enough to travel to a task: columns of the index, no file handle.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / INDEX
        if not path.exists():
            raise ValueError(f"{folder}: no shards here, {INDEX} is missing")
        self.folder = folder
        table = parquet.read_table(path)
        self.keys, self.names, self.sums = (table[name].to_pylist() for name in ("key", "shard", "sha256"))
        self.offsets, self.lengths = (table[name].to_numpy() for name in ("offset", "length"))

    def __len__(self) -> int:
        return len(self.keys)

    def read(self, numbers: Iterable[int]) -> list[Sample]:
        """The samples with these numbers, in this order.  ValueError where stored bytes are not those of the index."""
        return [self._sample(int(number)) for number in numbers]

    def _sample(self, number: int) -> Sample:
        path = self.folder / self.names[number]
        with path.open("rb") as file:
            file.seek(self.offsets[number])
            data = file.read(self.lengths[number])
        if hashlib.sha256(data).hexdigest() != self.sums[number]:
            raise ValueError(f"{path}: sample {self.keys[number]}: bytes differ from the index's checksum")
        image, record = b"", {}
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            for member in tar:
                body = tar.extractfile(member).read()  # type: ignore[union-attr]
                if member.name.endswith(".json"):
                    record = json.loads(body)
                else:
                    image = body
        return Sample(self.keys[number], image, record)
