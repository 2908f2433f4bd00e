"""S3 server of a simulated set of shards of any size, with a latency: its bytes are computed when they are read.

All blocks of the index have the same rows, and all samples the same bytes, so a set of 100 million samples takes no
disk. A client cannot tell: it sends the requests that it would send for a real set.
"""

import hashlib
import io
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import ipc

from pipelines.data import tars
from pipelines.data.index_file import BLOCK_MARK, INDEX_FILE, MARK_LENGTH, ROWS_PER_BLOCK, STORED_SCHEMA
from pipelines.data.shard_index import SUMMARY_FILE
from redux.rounding import divide_up

SAMPLES_PER_SHARD = 10_000
SET_URL = "s3://bucket/set"
FINGERPRINT = hashlib.sha256(b"simulated").hexdigest()

CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "simulated",
    "AWS_SECRET_ACCESS_KEY": "simulated",
    "AWS_DEFAULT_REGION": "us-east-1",
}


@dataclass(frozen=True)
class TiledFile:
    """File whose middle repeats: head, `count` times the tile, tail."""

    head: bytes
    tile: bytes
    count: int
    tail: bytes = b""

    def __len__(self) -> int:
        return len(self.head) + self.count * len(self.tile) + len(self.tail)

    def read(self, start: int, stop: int) -> bytes:
        """Compute bytes start..stop-1."""
        end = len(self.head) + self.count * len(self.tile)
        parts = [self.head[start:stop]]
        if start < end and stop > len(self.head) and self.tile:
            tiles_start = max(start - len(self.head), 0)
            tiles_stop = min(stop, end) - len(self.head)
            number = tiles_start // len(self.tile)
            tiles = self.tile * (divide_up(tiles_stop, len(self.tile)) - number)
            parts.append(tiles[tiles_start - number * len(self.tile) : tiles_stop - number * len(self.tile)])
        parts.append(self.tail[max(start - end, 0) : max(stop - end, 0)])
        return b"".join(parts)


class _SkippingSink(io.RawIOBase):
    """File that keeps what is written while `keeps` is True, and counts the rest."""

    def __init__(self) -> None:
        self.keeps, self.length, self.kept = True, 0, bytearray()

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.length

    def write(self, data: Any) -> int:
        if self.keeps:
            self.kept += data
        self.length += len(data)
        return len(data)


def simulate_set(sample: tuple[bytes, str], samples: int) -> dict[str, TiledFile]:
    """Simulate a set.

    Args:
        sample: image file and text of the answer of all samples.
        samples: number of samples, a multiple of SAMPLES_PER_SHARD and so that blocks of the index are full.

    Returns:
        Its files by name. All shards are those of "000000.tar".
    """
    import webdataset

    image, answer = sample
    turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": answer}]
    buffer = io.BytesIO()
    with webdataset.TarWriter(buffer, mtime=0) as tar:
        tar.write({"__key__": "000000000", "jpg": image, "json": {"id": 0, "image": "0.jpg", "conversations": turns}})
    data = buffer.getvalue()
    [row] = tars.make_index_rows(tars.read_tar(data, "000000.tar"), data, "000000.tar")
    return {
        INDEX_FILE: _simulate_index(row, samples),
        SUMMARY_FILE: TiledFile(json.dumps({"settings": {}, "samples": samples}).encode(), b"", 0),
        "000000.tar": TiledFile(b"", data[: row["length"]], SAMPLES_PER_SHARD),
    }


def _simulate_index(row: dict[str, Any], samples: int) -> TiledFile:
    """Simulate the index: each block has the rows of samples of the first shard."""
    if samples % ROWS_PER_BLOCK or samples % SAMPLES_PER_SHARD:
        raise ValueError(f"samples: got {samples}, allowed: multiples of {ROWS_PER_BLOCK} and of {SAMPLES_PER_SHARD}")
    shards = samples // SAMPLES_PER_SHARD
    about = {
        "shards": ["000000.tar"] + [f"{number:06d}.tar" for number in range(1, shards)],
        "sizes": [SAMPLES_PER_SHARD] * shards,
        "rows_per_block": ROWS_PER_BLOCK,
        "fingerprint": FINGERPRINT,
    }
    number = np.arange(ROWS_PER_BLOCK)
    columns: dict[str, Any] = {name: [value] * ROWS_PER_BLOCK for name, value in row.items()}
    columns |= {"shard": 0 * number, "offset": number * row["length"], "key": [f"{i:09d}" for i in number]}
    block = pa.RecordBatch.from_pydict(columns, STORED_SCHEMA)
    sink = _SkippingSink()
    schema = STORED_SCHEMA.with_metadata({name: json.dumps(value) for name, value in about.items()})
    with ipc.new_file(sink, schema) as file:
        ends = []
        for turn in range(samples // ROWS_PER_BLOCK):
            file.write_batch(block, custom_metadata={BLOCK_MARK: FINGERPRINT[:MARK_LENGTH]})
            ends.append(sink.length)
            # The first two blocks show how long a block is.
            sink.keeps = turn < 1
        sink.keeps = True
    size = ends[1] - ends[0]
    head, tile, tail = sink.kept[: ends[0] - size], sink.kept[ends[0] : ends[1]], sink.kept[ends[1] :]
    return TiledFile(bytes(head), bytes(tile), len(ends), bytes(tail))


class SimulatedBucket(ThreadingHTTPServer):
    """S3 server of the files of a set.

    Attributes:
        latency_s: seconds before an answer.
        requests: number of requests.
        bytes_sent: bytes of their answers.
    """

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, files: dict[str, TiledFile], latency_s: float) -> None:
        super().__init__(("127.0.0.1", 0), _BucketHandler)
        self.files, self.latency_s = files, latency_s
        self.requests = self.bytes_sent = 0
        self.lock = threading.Lock()

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables with which clients reach the server."""
        return {**CREDENTIALS, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.server_address[1]}"}


class _BucketHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: SimulatedBucket

    def log_message(self, format: str, *args: object) -> None: ...

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        """Answer with a file or a range of it, after the latency."""
        time.sleep(self.server.latency_s)  # It is what is simulated
        name = self.path.partition("?")[0].rpartition("/")[2]
        # All shards have the same samples.
        file = self.server.files.get("000000.tar" if name.endswith(".tar") else name)
        if file is None:
            self.send(404, b"<Error><Code>NoSuchKey</Code></Error>", {})
            return
        byte_range = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        start, stop = (int(byte_range[1]), min(int(byte_range[2]) + 1, len(file))) if byte_range else (0, len(file))
        headers = {"ETag": '"simulated"', "Last-Modified": "Sat, 28 Nov 2026 00:00:00 GMT"}
        if self.command == "HEAD":
            self.send(200, b"", {**headers, "Content-Length": str(len(file))})
            return
        if byte_range:
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(file)}"
        self.send(206 if byte_range else 200, file.read(start, stop), headers)

    def send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        """Send an answer, and count it."""
        with self.server.lock:
            self.server.requests += 1
            self.server.bytes_sent += len(data)
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)


@contextmanager
def serve_bucket(files: dict[str, TiledFile], latency_s: float = 0.0) -> Iterator[SimulatedBucket]:
    """Serve the files of a set in threads of this process."""
    server = SimulatedBucket(files, latency_s)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
