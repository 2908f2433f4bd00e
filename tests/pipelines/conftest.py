"""Fixtures of the tests of pipelines: records and shards of them, a tokenizer, plans of small stages, and an S3 server.

The S3 server is moto's, in a separate process, behind a proxy that injects faults.
"""

import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pytest
import torch.distributed as dist
from PIL import Image

from pipelines.core import storage
from pipelines.core.storage import Retry
from pipelines.data import shard_writer
from pipelines.data.options import ShardOptions
from pipelines.data.shard_index import Shards
from pipelines.training.plan import StagePlan
from redux.architecture import count_image_tokens
from redux.conversation import TEMPLATES, train_word_tokenizer
from tests.pipelines import small

BUCKET = "floor"
FAST = Retry(tries=8, deadline_s=20, first_wait_s=0.01, longest_wait_s=0.05, connect_timeout_s=2, read_timeout_s=3)
ANSWERS = {
    "SlowDown": (503, "Please reduce your request rate."),
    "InternalError": (500, "We encountered an internal error. Please try again."),
    "ExpiredToken": (400, "The provided token has expired."),
    "InvalidTokenId": (403, "The security token included in the request is invalid"),
    "AccessDenied": (403, "Access Denied"),
}
SIZES = ((8, 8), (16, 16), (12, 6), (5, 9))
COLOURS = ("red", "blue", "green")


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the records' images."""
    return tmp_path_factory.mktemp("images")


@pytest.fixture(scope="session")
def records(pictures: Path) -> list[dict]:
    """22 records of one to four rounds; no two images are the same, and not all have the same size."""
    noise = np.random.default_rng(0)
    result = []
    for number in range(22):
        width, height = SIZES[number % len(SIZES)]
        picture = noise.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(picture).save(pictures / f"{number}.png")
        turns = []
        for round_ in range(number % 4 + 1):
            question = f"is there {'no ' * round_}{COLOURS[round_ % 3]} shape number {number}?"
            turns += [{"from": "human", "value": question}, {"from": "gpt", "value": ("yes", "no")[round_ % 2]}]
        turns[0]["value"] = f"<image>\n{turns[0]['value']}"
        result.append({"id": f"test/{number}", "image": f"{number}.png", "conversations": turns})
    return result


@pytest.fixture(scope="session")
def stored(
    in_process: Callable[[], AbstractContextManager[None]],
    records: list[dict],
    pictures: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Shards:
    """The records as five shards; no test writes there."""
    folder = tmp_path_factory.mktemp("shards")
    with in_process():
        shard_writer.make_shards(records, str(pictures), str(folder), ShardOptions(samples_per_shard=5))
    return Shards(folder)


@pytest.fixture(scope="session")
def tokenizer(records: list[dict], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tokenizer of the records' words."""
    folder = tmp_path_factory.mktemp("tokenizer")
    pieces = [piece for record in records for piece, _ in TEMPLATES["vicuna_bare"].split_spans(record["conversations"])]
    train_word_tokenizer(pieces, max_length=96).save_pretrained(folder)
    return folder


class Proxy(ThreadingHTTPServer):
    """Proxy that passes requests on to the store, or answers with the next of `faults` while there are any.

    Faults are the names in `ANSWERS` and these: `stall` never answers. `drop` executes the request and closes without
    an answer. `cut` closes in the middle of the body. `short` sends half of the body, with its length. `trickle` sends
    a byte every tenth of a second.
    """

    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, store: tuple[str, int]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.store = store
        self.closed = threading.Event()
        self.clear()

    def clear(self) -> None:
        self.faults: deque[str] = deque()
        self.always = ""
        self.latency = 0.0
        self.expired: dict[str, str] = {}  # answers to keys
        self.asked: list[str] = []
        self.key = ""

    def next_fault(self, signed: str) -> str:
        if found := re.search(r"Credential=(\w+)/", signed):
            self.key = found[1]
            if found[1] in self.expired:
                return self.expired[found[1]]
        try:
            return self.faults.popleft()
        except IndexError:
            return self.always

    def handle_error(self, request: object, address: object) -> None:
        """Ignore errors: clients that give up are part of the tests."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy

    def log_message(self, format: str, *args: object) -> None: ...

    def handle_any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.asked.append(f"{self.command} {self.path.partition('?')[0]}")
        fault = self.server.next_fault(self.headers.get("Authorization", ""))
        if self.server.latency:
            self.server.closed.wait(self.server.latency)
        if fault in ANSWERS:
            status, message = ANSWERS[fault]
            text = f'<?xml version="1.0"?><Error><Code>{fault}</Code><Message>{message}</Message></Error>'
            self.answer(status, [("Content-Type", "application/xml")], text.encode())
        elif fault == "stall":
            self.rfile.read(1)  # returns when the client gives up
            self.close_connection = True
        else:
            self.forward(body, fault)

    do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = handle_any  # noqa: N815

    def forward(self, body: bytes, fault: str) -> None:
        connection = HTTPConnection(*self.server.store)
        connection.request(self.command, self.path, body, dict(self.headers))
        answer = connection.getresponse()
        data = answer.read()
        connection.close()
        # The answer to HEAD has no body, so its length is that of the file.
        length = answer.headers.get("Content-Length", "0") if self.command == "HEAD" else str(len(data))
        headers = [(name, value) for name, value in answer.getheaders() if name not in ("Content-Length", "Connection")]
        if fault == "drop":
            self.close_connection = True
        elif fault == "short" and answer.status == 206:
            self.answer(answer.status, headers, data[: len(data) // 2])
        else:
            self.answer(answer.status, headers, data, length, fault)

    def answer(
        self, status: int, headers: list[tuple[str, str]], data: bytes, length: str = "", fault: str = ""
    ) -> None:
        self.send_response(status)
        for name, value in [*headers, ("Content-Length", length or str(len(data)))]:
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault == "trickle":
            for byte in data:
                self.wfile.write(bytes([byte]))
                if self.server.closed.wait(0.1):
                    return
        elif fault == "cut":
            self.wfile.write(data[: len(data) // 2])
            self.close_connection = True
        else:
            self.wfile.write(data)


@pytest.fixture(scope="session")
def server() -> Iterator[Proxy]:
    """The proxy before a store with one empty bucket."""
    command = [sys.executable, "-u", "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"]
    log = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert log.stdout
    port = next(int(found[1]) for line in log.stdout if (found := re.search(r"http://127\.0\.0\.1:(\d+)", line)))
    threading.Thread(target=log.stdout.read, daemon=True).start()  # a full pipe would stop it
    proxy = Proxy(("127.0.0.1", port))
    threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    maker = HTTPConnection("127.0.0.1", port)
    maker.request("PUT", f"/{BUCKET}")
    assert maker.getresponse().status == 200
    yield proxy
    proxy.closed.set()
    proxy.shutdown()
    proxy.server_close()
    log.terminate()
    log.wait()


@pytest.fixture
def proxy(server: Proxy, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """The proxy without faults, and this process's credentials for it."""
    server.clear()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_address[1]}",
        "AWS_ACCESS_KEY_ID": "FIRSTKEY",
        "AWS_SECRET_ACCESS_KEY": "a-secret-of-ours",
        "AWS_SESSION_TOKEN": "a-token-of-ours",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    yield server
    server.clear()


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> Retry:
    """Short retries for this process, without any retry so far."""
    monkeypatch.setattr(storage, "RETRY", FAST)
    monkeypatch.setattr(storage, "_retried_kinds", [])
    return FAST


@pytest.fixture
def bucket(proxy: Proxy) -> str:
    return f"s3://{BUCKET}/{uuid4()}"


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """A folder with a short name, because paths of Ray's sockets in it are limited in length."""
    made = Path(tempfile.mkdtemp(prefix="day-", dir="/tmp"))
    yield made
    shutil.rmtree(made)


@pytest.fixture
def single_process_group() -> Iterator[None]:
    """A process group of this process alone, for collectives."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="session")
def new_plan(
    in_process: Callable[[], AbstractContextManager[None]],
    records: list[dict],
    pictures: Path,
    tokenizer: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., StagePlan]:
    """Function that makes the plan of a small stage in a new run folder. Every third record has no image.

    Keyword arguments change the stage; `plan` is a dictionary of changes of the plan.
    """
    folder = tmp_path_factory.mktemp("mixed")
    texts = [
        {
            **record,
            "conversations": [
                {**turn, "value": turn["value"].replace("<image>\n", "")} for turn in record["conversations"]
            ],
        }
        for record in records
    ]
    for record in texts:
        del record["image"]
    mixed = [
        text if number % 3 == 0 else record for number, (record, text) in enumerate(zip(records, texts, strict=True))
    ]
    with in_process():
        shard_writer.make_shards(mixed, str(pictures), str(folder), ShardOptions(samples_per_shard=5))

    def make(plan: dict[str, Any] | None = None, **stage: Any) -> StagePlan:
        run = tmp_path_factory.mktemp("run")
        small_plan = StagePlan(
            name="small",
            stage=replace(small.STAGE, **stage),
            model=small.MODEL,
            seed=0,
            workers=(2, 2),
            run=run,
            checkpoints=str(run / "checkpoints"),
            sets={"set": str(folder)},
            max_bad_fraction=0,
            tokenizer=tokenizer,
            start=None,
            image_size=small.MODEL.tower.image_size,
            image_tokens=count_image_tokens(small.MODEL),
        )
        return replace(small_plan, **(plan or {}))

    return make
