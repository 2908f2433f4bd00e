"""Tests of storage: written bytes are read back despite transient errors; permanent errors are raised at once."""

import logging
import multiprocessing
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import s3fs

from pipelines.core import storage
from pipelines.core.failures import PermanentError
from pipelines.core.storage import Retry, join

pytestmark = pytest.mark.usefixtures("fast")

PASSING = ("SlowDown", "InternalError", "stall", "drop", "cut", "short")


@pytest.fixture
def new_clients() -> Iterator[None]:
    """Use new S3 clients in this test. Otherwise clients are cached, since making one takes a second."""
    s3fs.S3FileSystem.clear_instance_cache()
    yield
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def short_timeouts(fast: Retry, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set time-outs that a test can wait for. A busy machine may cause more of them."""
    monkeypatch.setattr(storage, "RETRY", replace(fast, tries=20, read_timeout_s=0.4))


@pytest.fixture(params=["path", "file", "memory", "s3"])
def home(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty folder in each kind of store."""
    if request.param == "s3":
        return request.getfixturevalue("bucket")
    return {"path": str(tmp_path), "file": f"file://{tmp_path}", "memory": f"memory://{uuid4()}"}[request.param]


def random_bytes(length: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(length)


def test_what_is_written_is_read_listed_and_removed(home: str) -> None:
    assert storage.list_files(home) == []
    contents = {"b.tar": random_bytes(100_000), "a.json": b"{}", "empty": b""}
    for name, data in contents.items():
        storage.write(join(home, "set", name), data)
    storage.write(join(home, "set", "below", "c"), b"not of this folder")
    folder = join(home, "set")
    assert storage.list_files(folder) == ["a.json", "b.tar", "empty"] == storage.list_files(f"{folder}/")
    for name, data in contents.items():
        url = join(folder, name)
        assert (storage.read(url), storage.get_size(url), storage.exists(url)) == (data, len(data), True)
    storage.write(join(folder, "a.json"), b"[]")
    assert storage.read(join(folder, "a.json")) == b"[]"
    for _ in range(2):  # also what is gone already
        storage.remove(join(folder, "b.tar"))
    assert storage.list_files(folder) == ["a.json", "empty"]
    assert not storage.exists(join(folder, "b.tar"))
    assert not storage.exists(folder), "a folder is not a file"
    assert storage.count_retries() == {}


def test_a_file_that_is_written_in_pieces_appears_at_once(home: str) -> None:
    url = join(home, "set", "index")
    for pieces in ([random_bytes(70_000, seed) for seed in range(3)], [], [b"x"]):
        before = storage.read(url) if storage.exists(url) else None
        with storage.open_writer(url) as file:
            for piece in pieces:
                file.write(piece)
            assert (storage.read(url) if storage.exists(url) else None) == before
        assert storage.read(url) == b"".join(pieces)
    with pytest.raises(ZeroDivisionError), storage.open_writer(url) as file:
        file.write(bytes(5 // file.tell()))
    assert (storage.list_files(join(home, "set")), storage.read(url)) == (["index"], b"x")
    if storage.is_local(url):
        assert os.listdir(join(home, "set").removeprefix("file://")) == ["index"]


def test_a_full_disk_names_the_file_that_was_to_be_written(tmp_path: Path) -> None:
    url = str(tmp_path / "index")

    def fill_disk() -> None:
        with storage.open_writer(url) as file, open("/dev/full", "wb") as full:
            os.dup2(full.fileno(), file.fileno())
            file.write(b"0")

    with pytest.raises(OSError, match=f"No space left on device: '{url}'"):
        fill_disk()
    assert os.listdir(tmp_path) == []
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="allowed: a path whose folders"), storage.open_writer(f"{tmp_path}/file/x"):
        pass


def test_ranges_come_in_order_and_whole_however_they_lie(home: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "MAX_GAP_BYTES", 50)
    monkeypatch.setattr(storage, "MAX_BLOCK_BYTES", 3000)
    contents = {join(home, str(number)): random_bytes(20_000, number) for number in range(3)}
    for url, data in contents.items():
        storage.write(url, data)
    draw = random.Random(1)
    ranges = [(url, 0, 20_000) for url in contents]
    for _ in range(60):
        start = draw.randrange(20_000)
        length = draw.choice((0, 1, 30, 4000, 20_000))
        ranges.append((draw.choice(list(contents)), start, min(start + length, 20_000)))
    ranges += [(next(iter(contents)), start, start + 512) for start in range(0, 10_000, 512)]
    draw.shuffle(ranges)
    assert storage.read_ranges(ranges) == [contents[url][start:stop] for url, start, stop in ranges]
    assert storage.read_ranges([]) == []


def test_what_others_write_is_seen_at_once(proxy: Any, bucket: str) -> None:
    storage.write(join(bucket, "x"), b"1")
    assert storage.list_files(bucket) == ["x"]
    other = s3fs.S3FileSystem(skip_instance_cache=True)
    for name in ("x", "y"):
        other.pipe_file(join(bucket, name), b"22")
    assert storage.list_files(bucket) == ["x", "y"]
    assert (storage.get_size(join(bucket, "x")), storage.exists(join(bucket, "y"))) == (2, True)


def test_stores_may_be_mixed_in_one_call(tmp_path: Path, bucket: str) -> None:
    urls = [str(tmp_path / "x"), f"memory://{uuid4()}/x", join(bucket, "x")]
    for seed, url in enumerate(urls):
        storage.write(url, random_bytes(500, seed))
    ranges = [(url, start, start + 7) for start in range(0, 400, 100) for url in urls]
    assert storage.read_ranges(ranges) == [random_bytes(500, urls.index(url))[a:b] for url, a, b in ranges]


def test_what_is_not_there_is_said_in_one_line(home: str) -> None:
    storage.write(join(home, "short"), b"0123456789")
    missing = join(home, "missing")
    cases: list[tuple[Callable[[], object], str]] = [
        (lambda: storage.read(missing), f"{missing}: not found, allowed: an existing file"),
        (lambda: storage.get_size(missing), f"{missing}: not found"),
        (lambda: storage.get_size(home), f"{home}: not found"),
        (lambda: storage.read_ranges([(missing, 0, 5)]), f"{missing}: not found"),
        (
            lambda: storage.read_ranges([(join(home, "short"), 4, 11)]),
            f"{home}/short: bytes past its end were requested; EOFError: got 4 to 11, ",
        ),
        (lambda: storage.read_ranges([(join(home, "short"), 20, 30)]), f"{home}/short: bytes past its end"),
    ]
    for work, message in cases:
        with pytest.raises(ValueError, match=f"^{re.escape(message)}") as caught:
            work()
        assert "\n" not in str(caught.value)
    assert storage.count_retries() == {}


@pytest.mark.parametrize("name", ["file/x", "file/x/y"])
def test_a_path_through_a_file_is_a_mistake(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    for work in (lambda url: storage.write(url, b""), storage.read):
        with pytest.raises(ValueError, match=f"^{tmp_path}/{name}: .*allowed: "):
            work(str(tmp_path / name))


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("unheard://bucket/key", "unheard://bucket/key: ValueError: Protocol not known: unheard, allowed: "),
        ("gs://bucket/key", "gs://bucket/key: a package is missing: .*gcsfs"),
        ("s3://Not_a_bucket!/key", "s3://Not_a_bucket!/key: ParamValidationError: .*allowed: "),
        ("unheard://me:a-secret-of-ours@host/key?signature=a-token-of-ours", "unheard://host/key: "),
    ],
)
def test_a_url_that_cannot_be_used_is_said_in_one_line(
    proxy: Any, url: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)  # as where it is not installed
    with pytest.raises(ValueError, match=message) as caught:
        storage.read(url)
    assert "\n" not in str(caught.value)
    assert "of-ours" not in str(caught.value)
    assert proxy.asked == []


KINDS = {
    "SlowDown": "throttled",
    "InternalError": "server error",
    "stall": "time-out",
    "drop": "connection",
    "cut": "truncated body",
    "short": "truncated body",
}


@pytest.mark.parametrize("fault", PASSING)
def test_a_fault_that_passes_is_waited_out(
    proxy: Any, bucket: str, fault: str, short_timeouts: None, caplog: pytest.LogCaptureFixture
) -> None:
    url, data = join(bucket, "x"), random_bytes(5000)

    def write_in_pieces() -> None:
        with storage.open_writer(url) as file:
            file.write(data[:3000])
            file.write(data[3000:])

    acts: list[tuple[str, Callable[[], object], object]] = [
        ("PUT", lambda: storage.write(url, random_bytes(50)), None),
        ("PUT", write_in_pieces, None),
        ("range", lambda: storage.read_ranges([(url, 10, 4000)]), [data[10:4000]]),
        ("GET", lambda: storage.read(url), data),
        ("HEAD", lambda: storage.get_size(url), len(data)),
        ("GET", lambda: storage.list_files(bucket), ["x"]),
        ("DELETE", lambda: storage.remove(url), None),
        ("HEAD", lambda: storage.exists(url), False),
    ]
    hit = {"cut": ("range", "GET"), "short": ("range",)}.get(fault, ("range", "GET", "PUT", "HEAD", "DELETE"))
    with caplog.at_level(logging.WARNING):
        for method, act, expected in acts:
            if method in hit:
                # aiohttp asks once more itself where a connection that it kept is closed.
                proxy.faults.extend([fault] * (3 if fault == "drop" else 1))
            assert act() == expected
    assert not proxy.faults
    counts = storage.count_retries()
    # aiobotocore takes a list that is cut short for a lost connection.
    assert counts.keys() - ({"connection"} if fault == "cut" else set()) == {KINDS[fault]}
    assert sum(counts.values()) >= sum(method in hit for method, _, _ in acts)
    warned = [record.getMessage() for record in caplog.records]
    assert len(warned) == len(counts), "once a kind and process"
    for line in warned:
        assert line.startswith(bucket)
        assert "of-ours" not in line


@pytest.mark.parametrize("seed", range(2))
def test_nothing_is_lost_in_a_mixture_of_faults(
    proxy: Any, bucket: str, seed: int, short_timeouts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "MAX_GAP_BYTES", 0)
    draw = random.Random(seed)
    mixed = [fault for fault in PASSING for _ in range(1 if fault == "stall" else 8)] + [""] * 30
    contents = {join(bucket, f"{number:02d}"): random_bytes(3000, number) for number in range(8)}
    proxy.faults.extend(draw.sample(mixed, 20))
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(storage.write, contents, contents.values()))
    assert storage.list_files(bucket) == [f"{number:02d}" for number in range(8)]
    ranges = [(url, start, start + draw.randrange(1, 300)) for url in contents for start in range(0, 3000, 300)]
    draw.shuffle(ranges)
    proxy.faults.extend(draw.sample(mixed, len(mixed)))
    assert storage.read_ranges(ranges) == [contents[url][start:stop] for url, start, stop in ranges]
    assert not proxy.faults
    proxy.faults.extend(fault for fault in draw.sample(mixed, 20) if fault != "short")
    assert {url: storage.read(url) for url in contents} == contents
    assert sum(storage.count_retries().values()) > 20


@pytest.mark.parametrize("fault", ["SlowDown", "cut", "short", "ExpiredToken"])
def test_faults_over_the_limit_end_in_one_clear_error(
    proxy: Any, bucket: str, fault: str, fast: Retry, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = join(bucket, "x")
    storage.write(url, random_bytes(100))
    monkeypatch.setattr(storage, "RETRY", replace(fast, tries=3))
    proxy.asked.clear()
    proxy.always = fault
    with pytest.raises(OSError, match=rf"^{url}: given up after 3 tries in \d+\.\d s, at last .*: \w+: ") as caught:
        storage.read_ranges([(url, 0, 60)])
    assert isinstance(caught.value, PermanentError) == (fault == "ExpiredToken"), "these do not come back by themselves"
    assert "\n" not in str(caught.value)
    assert "of-ours" not in str(caught.value)
    # A body that is short may be all there is, so the size is asked for.
    assert len(proxy.asked) == (6 if fault == "short" else 3), "a try is one request: no library tries again below"
    assert sum(storage.count_retries().values()) == 2


@pytest.mark.parametrize("fault", ["SlowDown", "stall", "trickle"])
def test_the_deadline_holds(proxy: Any, bucket: str, fault: str, fast: Retry, monkeypatch: pytest.MonkeyPatch) -> None:
    url = join(bucket, "x")
    storage.write(url, random_bytes(4000))
    monkeypatch.setattr(storage, "RETRY", replace(fast, tries=10_000, deadline_s=1.5, read_timeout_s=0.4))
    monkeypatch.setattr(storage, "MAX_GAP_BYTES", 0)
    proxy.always = fault
    started = time.monotonic()
    with pytest.raises(OSError, match=f"^{url}: given up after"):
        storage.read_ranges([(url, start, start + 30) for start in range(0, 4000, 50)])
    assert time.monotonic() - started < 5


def test_what_does_not_pass_is_not_tried_again(proxy: Any, bucket: str) -> None:
    url = join(bucket, "x")
    storage.write(url, b"x")
    cases: list[tuple[str, Callable[[], object], str, int]] = [
        ("AccessDenied", lambda: storage.read(url), f"{url}: access denied, .*AccessDenied", 1),
        ("AccessDenied", lambda: storage.read_ranges([(url, 0, 1)]), f"{url}: access denied", 1),
        ("AccessDenied", lambda: storage.write(url, b"y"), f"{url}: access denied", 1),
        ("AccessDenied", lambda: storage.list_files(bucket), f"{bucket}: access denied", 1),
        # The answer to HEAD does not say why: that to a second question does.
        ("AccessDenied", lambda: storage.exists(url), f"{url}: access denied, .*AccessDenied", 2),
        ("", lambda: storage.read(f"{url}y"), f"{url}y: not found, .*NoSuchKey", 1),
        ("", lambda: storage.read("s3://no-such-bucket/x"), "no-such-bucket/x: not found, .*NoSuchBucket", 1),
        ("", lambda: storage.write("s3://no-such-bucket/x", b""), "no-such-bucket/x: not found", 1),
        ("", lambda: storage.list_files("s3://no-such-bucket/x"), "no-such-bucket/x: not found", 1),
    ]
    for fault, work, message, requests in cases:
        proxy.always = fault
        proxy.asked.clear()
        with pytest.raises(ValueError, match=message) as caught:
            work()
        assert len(proxy.asked) == requests, message
        assert "of-ours" not in str(caught.value)
    assert storage.count_retries() == {}
    proxy.always = ""
    assert storage.read(url) == b"x"


@pytest.mark.parametrize(
    ("answer", "act"),
    [
        ("ExpiredToken", "read"),
        ("InvalidTokenId", "read_ranges"),
        ("ExpiredToken", "write"),
        ("ExpiredToken", "size"),
        ("InvalidTokenId", "exists"),
        ("InvalidTokenId", "names"),
        ("ExpiredToken", "remove"),
    ],
)
def test_credentials_that_expired_are_read_again(
    proxy: Any, bucket: str, answer: str, act: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = join(bucket, "x")
    storage.write(url, b"0123456789")
    proxy.expired[proxy.key] = answer
    # While the first wait lasts, some other program renews them.
    renewed = f"KEY{uuid4().hex}"
    monkeypatch.setattr("tenacity.nap.time.sleep", lambda _: monkeypatch.setenv("AWS_ACCESS_KEY_ID", renewed))
    work: dict[str, Callable[[], object]] = {
        "read": lambda: storage.read(url),
        "read_ranges": lambda: storage.read_ranges([(url, 2, 5)])[0],
        "write": lambda: storage.write(url, b"new"),
        "size": lambda: storage.get_size(url),
        "exists": lambda: storage.exists(url),
        "names": lambda: storage.list_files(bucket),
        "remove": lambda: storage.remove(url),
    }
    expected = {"read": b"0123456789", "read_ranges": b"234", "size": 10, "exists": True, "names": ["x"]}
    assert work[act]() == expected.get(act)
    assert storage.count_retries() == {"expired credentials": 1}
    assert proxy.key == renewed


def test_no_credentials_at_all_are_no_access(
    bucket: str, new_clients: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    with pytest.raises(ValueError, match=f"^{bucket}/x: access denied, allowed: credentials"):
        storage.read(f"{bucket}/x")


def test_requests_go_out_side_by_side_and_near_ranges_as_one(proxy: Any, bucket: str) -> None:
    far = [(join(bucket, f"{number}"), 0, 100) for number in range(20)]
    for url, _, _ in far:
        storage.write(url, random_bytes(100_000))
    proxy.latency = 0.3
    started = time.monotonic()
    assert storage.read_ranges(far) == [random_bytes(100_000)[:100]] * 20
    assert time.monotonic() - started < 0.3 * 20 / 2
    proxy.latency = 0
    proxy.asked.clear()
    near = [(far[0][0], start, start + 900) for start in range(0, 99_000, 1000)]
    random.Random(0).shuffle(near)
    assert storage.read_ranges(near) == [random_bytes(100_000)[start:stop] for _, start, stop in near]
    assert len(proxy.asked) == 1


def test_a_forked_process_reads_on_its_own(proxy: Any, bucket: str, new_clients: None) -> None:
    url = join(bucket, "x")
    storage.write(url, b"from the parent")
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()

    def child() -> None:
        theirs.send((storage.read(url), storage.read_ranges([(url, 0, 4), (url, 9, 15)])))

    process = context.Process(target=child)
    process.start()
    assert ours.poll(15)
    assert ours.recv() == (b"from the parent", [b"from", b"parent"])
    process.join()
    assert storage.read(url) == b"from the parent"


def test_nobody_sees_half_a_local_file(tmp_path: Path) -> None:
    url, versions = str(tmp_path / "x"), [random_bytes(1_000_000, 0), random_bytes(700_000, 1)]
    storage.write(url, versions[0])
    done = threading.Event()

    def look() -> int:
        looks = 0
        while not done.is_set():
            assert storage.read(url) in versions
            assert storage.list_files(str(tmp_path)) == ["x"]
            looks += 1
        return looks

    with ThreadPoolExecutor(2) as pool:
        lookers = [pool.submit(look) for _ in range(2)]
        for number in range(30):
            storage.write(url, versions[number % 2])
        done.set()
        assert all(looker.result() for looker in lookers)


def test_a_local_write_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = str(tmp_path / "x")
    storage.write(url, b"old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        storage.write(url, b"new")
    assert (caught.value.errno, caught.value.filename) == (28, url)
    assert storage.read(url) == b"old"
    assert os.listdir(tmp_path) == ["x"]
    assert storage.count_retries() == {}


@pytest.mark.integration
def test_a_local_write_that_is_killed_leaves_what_was_there(tmp_path: Path) -> None:
    url = str(tmp_path / "x")
    storage.write(url, b"old")
    program = (
        "import os, sys, threading\nfrom pipelines.core import storage\n"
        "os.fsync = lambda _: (print('half', flush=True), threading.Event().wait())\n"
        "storage.write(sys.argv[1], b'new')"
    )
    writer = subprocess.Popen([sys.executable, "-c", program, url], stdout=subprocess.PIPE, text=True)
    assert writer.stdout
    assert writer.stdout.readline() == "half\n"
    writer.send_signal(signal.SIGKILL)
    assert writer.wait() == -signal.SIGKILL
    writer.stdout.close()
    assert storage.read(url) == b"old"
    assert storage.list_files(str(tmp_path)) == ["x"]
    storage.write(url, b"new")
    assert storage.read(url) == b"new"


def test_links_are_files(tmp_path: Path) -> None:
    (tmp_path / "there").write_bytes(b"there")
    (tmp_path / "folder").mkdir()
    for name in ("there", "folder"):
        (tmp_path / f"link to {name}").symlink_to(tmp_path / name)
    assert storage.list_files(str(tmp_path)) == ["link to there", "there"]
    assert storage.get_size(str(tmp_path / "link to there")) == 5


def test_nobody_listening_is_a_dropped_connection(
    monkeypatch: pytest.MonkeyPatch, bucket: str, new_clients: None
) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{unused.getsockname()[1]}")
        with pytest.raises(OSError, match=f"{bucket}/x: given up after 8 tries .*, at last connection"):
            storage.write(f"{bucket}/x", b"")


def test_what_a_killed_writer_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    storage.write(str(tmp_path / "whole"), b"x")
    (tmp_path / f".whole.1{storage.PARTIAL_SUFFIX}").touch()
    (tmp_path / ".hidden").touch()
    storage.remove_partial(str(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {"whole", ".hidden"}
    storage.remove_partial(str(tmp_path / "missing"))
