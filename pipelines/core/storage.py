"""Storage access: reads and writes of local paths and of all URLs that fsspec supports, with retries.

A URL is a `str`; a local path is a URL without scheme. s3:// needs the package s3fs, gs:// needs gcsfs, hf:// needs
huggingface_hub.

One retry policy, `RETRY`, applies to all stores. The libraries have retries of their own (s3fs five tries, each around
five of botocore), which multiply and are silent. For S3 they are switched off, so a try is one request, is counted in
`count_retries`, and respects the deadline. Ray's retries are not a substitute: they match the texts of Arrow's errors,
not those of s3fs.

Every try asks fsspec for the filesystem, and fsspec caches one per process. So nothing is open at import, nothing is
pickled, and a forked process gets a new one. After expired credentials, the next one reads environment and profile
again.

Costs: 1.5 ms of CPU per request to S3 (aiobotocore), so near ranges are merged; 0.02 ms per local range. Each range is
read by a thread and not by fsspec's cat_ranges. That function waits for the slowest range of a batch before any can be
retried, and reads one after the other if a filesystem is not asynchronous (hf://). Threads cost 0.2 ms of CPU per
request.
"""

import glob
import logging
import mmap
import os
import posixpath
import shutil
import stat
import tempfile
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from http.client import IncompleteRead
from typing import IO, Any, TypeVar
from uuid import uuid4

import fsspec
from fsspec.asyn import sync
from fsspec.core import split_protocol
from fsspec.utils import merge_offset_ranges
from tenacity import (
    RetryCallState,
    RetryError,
    Retrying,
    retry_if_exception,
    stop_after_attempt,
    stop_before_delay,
    wait_random_exponential,
)

from pipelines.core.failures import PermanentError
from pipelines.core.storage_errors import (
    EXPIRED_CREDENTIALS,
    describe_cause,
    find_transient_kind,
    parse_response,
    redact,
    to_user_error,
)

ByteRange = tuple[str, int, int]
"""URL, first byte, byte after the last."""

RequestResult = TypeVar("RequestResult")

MAX_CONCURRENT_REQUESTS = 64
"""Requests of one call that run at the same time."""

MAX_GAP_BYTES = 128 * 2**10
"""Maximum gap between two ranges of a file that one request reads: the bytes that arrive in the time of a request."""

MAX_BLOCK_BYTES = 8 * 2**20
"""Maximum size of a merged read, so that large reads still run in parallel."""

CHUNK_BYTES = 4 * 2**20
"""Size of the chunks in which a file is read from start to end."""

PARTIAL_SUFFIX = ".partial"
"""Suffix of a local file that is being written. `list_files` skips such files."""

logger = logging.getLogger(__name__)

_retried_kinds: list[str] = []  # appending needs no lock, and a fork could copy a locked one


@dataclass(frozen=True, kw_only=True)
class Retry:
    """Retry policy for transient errors; times in seconds.

    A wait is drawn between zero and a limit that starts at `first_wait_s` and doubles up to `longest_wait_s`. The
    deadline covers a whole call including the transfer, so larger transfers need several calls.
    """

    tries: int = 10
    deadline_s: float = 300
    first_wait_s: float = 0.5
    longest_wait_s: float = 30
    connect_timeout_s: float = 5
    read_timeout_s: float = 30


RETRY = Retry()


def read(url: str) -> bytes:
    """Read a whole file in one request. Large files are faster in ranges: see `map_file`."""

    def attempt(files: Any, path: str, seconds: float) -> bytes:
        # Otherwise s3fs asks for the size first (HEAD), and a failed HEAD has no body that gives the reason.
        options = {"max_concurrency": 1} if "s3" in files.protocol else {}
        data: bytes = _call(files, "cat_file", path, seconds=seconds, **options)
        return data

    return _run_with_retries(url, attempt)


def read_chunks(url: str) -> Iterator[bytes]:
    """Yield a file in chunks of CHUNK_BYTES, so that memory does not grow with it."""
    size = get_size(url)
    for start in range(0, size, CHUNK_BYTES):
        yield from read_ranges([(url, start, min(start + CHUNK_BYTES, size))])


def map_file(url: str) -> bytes | mmap.mmap:
    """Read a large file: map a local one into memory, read others in parallel ranges."""
    length = get_size(url)
    if is_local(url) and length:
        with open(_open_filesystem(url)[1], "rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return b"".join(
        read_ranges([(url, start, min(start + MAX_BLOCK_BYTES, length)) for start in range(0, length, MAX_BLOCK_BYTES)])
    )


def read_ranges(ranges: Sequence[ByteRange]) -> list[bytes]:
    """Read byte ranges of files.

    Local ranges are read one after the other. Remote ranges are read in parallel, near ranges of a file as one block.

    Returns:
        The bytes of each range, in the order of `ranges`, each of exactly its length.

    Raises:
        ValueError: a file ends before one of its ranges. The message names the file.
    """
    deadline = time.monotonic() + RETRY.deadline_s
    if all(is_local(url) for url, _, _ in ranges):
        return [_read_block(block, deadline) for block in ranges]
    # Merge near ranges into blocks; empty ranges need no request.
    nonempty = [byte_range for byte_range in ranges if byte_range[1] < byte_range[2]]
    if not nonempty:
        return [b""] * len(ranges)
    urls, starts, stops = (list(column) for column in zip(*nonempty, strict=True))
    merged = merge_offset_ranges(urls, starts, stops, MAX_GAP_BYTES, MAX_BLOCK_BYTES)
    blocks: list[ByteRange] = list(zip(*merged, strict=True))
    with ThreadPoolExecutor(MAX_CONCURRENT_REQUESTS) as pool:
        contents = list(pool.map(partial(_read_block, deadline=deadline), blocks))
    # Cut the ranges out of the blocks.
    block_starts = [block[:2] for block in blocks]
    result = []
    for url, start, stop in ranges:
        if start < stop:
            number = bisect_right(block_starts, (url, start)) - 1  # the last block that starts at or before the range
            first = block_starts[number][1]
            result.append(contents[number][start - first : stop - first])
        else:
            result.append(b"")
        assert len(result[-1]) == stop - start
    return result


def _read_block(block: ByteRange, deadline: float) -> bytes:
    """Read one range. EOFError inside `attempt` means that the file is too short; a short response is retried."""
    url, start, stop = block

    def attempt(files: Any, path: str, seconds: float) -> bytes:
        data: bytes = _call(files, "cat_file", path, start=start, end=stop, seconds=seconds)
        if missing := stop - start - len(data):
            size = _get_info(files, path, seconds)["size"]
            if size < stop:
                raise EOFError(f"got {start} to {stop}, the file ends at {size}")
            raise IncompleteRead(data, missing)
        return data

    return _run_with_retries(url, attempt, deadline)


def write(url: str, data: bytes) -> None:
    """Write or replace a file atomically: readers see the previous content or all of `data`.

    Parent folders are created. On S3, up to 100 MB is one put; larger data is a multipart upload that appears at once.
    """
    _run_with_retries(url, lambda files, path, seconds: _call(files, "pipe_file", path, data, seconds=seconds))


@contextmanager
def open_writer(url: str) -> Iterator[IO[bytes]]:
    """Open a file to write it in pieces. It appears or is replaced at the end of the block, atomically as by `write`.

    Memory does not grow with the file: the pieces go to a file beside a local one, and for a store to one in the
    machine's temporary folder. An error in the block leaves the previous file.
    """
    try:
        with ExitStack() as stack:
            file: IO[bytes]
            if is_local(url):
                file = _run_with_retries(url, lambda _, path, __: stack.enter_context(_open_replacement(path)))
            else:
                file = stack.enter_context(tempfile.NamedTemporaryFile())
            yield file
            file.flush()
            if not is_local(url):
                _run_with_retries(
                    url, lambda files, path, seconds: _call(files, "put_file", file.name, path, seconds=seconds)
                )
    except OSError as error:
        # An error of a write names no file, such as that of a full disk; errors of the block's other work do.
        if error.errno and not error.filename:
            raise to_user_error(url, error, is_local=True) from None
        raise


def exists(url: str) -> bool:
    """Return True if a file exists. False for a folder, because object stores have no folders."""

    def attempt(files: Any, path: str, seconds: float) -> bool:
        try:
            return bool(_get_info(files, path, seconds)["type"] == "file")
        except (FileNotFoundError, NotADirectoryError):
            return False

    return _run_with_retries(url, attempt)


def get_size(url: str) -> int:
    """Return the size of a file in bytes."""

    def attempt(files: Any, path: str, seconds: float) -> int:
        info = _get_info(files, path, seconds)
        if info["type"] != "file":
            raise IsADirectoryError("a folder")
        return int(info["size"])

    return _run_with_retries(url, attempt)


def list_files(url: str) -> list[str]:
    """List the names of the files directly in a folder, sorted.

    Returns [] if the folder is missing, because object stores cannot tell the difference.
    """
    return [name for name in _list_entries(url, "file") if not name.endswith(PARTIAL_SUFFIX)]


def list_folders(url: str) -> list[str]:
    """List the names of the folders directly in a folder, sorted; [] if it is missing."""
    return _list_entries(url, "directory")


def _list_entries(url: str, entry_type: str) -> list[str]:
    def attempt(files: Any, path: str, seconds: float) -> list[str]:
        try:
            infos = _call(files, "ls", path, detail=True, seconds=seconds)
        except FileNotFoundError as error:
            if parse_response(error)[0] == "NoSuchBucket":
                raise
            return []
        basenames = (posixpath.basename(info["name"].rstrip("/")) for info in infos if info["type"] == entry_type)
        return sorted(name for name in basenames if name)

    return _run_with_retries(url, attempt)


def remove_folder(url: str) -> None:
    """Remove the files directly in a folder. A local folder is removed with all that is in it."""
    for name in list_files(url):
        remove(join(url, name))
    if is_local(url):
        shutil.rmtree(_open_filesystem(url)[1], ignore_errors=True)


def remove_partial(url: str) -> None:
    """Remove partial files directly in a folder, left by killed writers. Object stores have none."""
    if is_local(url):
        for path in glob.glob(os.path.join(glob.escape(_open_filesystem(url)[1]), f".*{PARTIAL_SUFFIX}")):
            with suppress(FileNotFoundError):
                os.remove(path)


def remove_tree(url: str) -> None:
    """Remove a folder with all files and folders in it, if it exists."""
    for name in list_folders(url):
        remove_tree(join(url, name))
    remove_folder(url)


def remove(url: str) -> None:
    """Remove a file. A missing file is not an error: an earlier try may have removed it, and its response was lost."""

    def attempt(files: Any, path: str, seconds: float) -> None:
        try:
            _call(files, "rm_file", path, seconds=seconds)
        except FileNotFoundError as error:
            if parse_response(error)[0] == "NoSuchBucket":
                raise

    _run_with_retries(url, attempt)


def join(url: str, *names: str) -> str:
    """Join a URL and names with slashes."""
    return posixpath.join(url, *names)


def find_parent(url: str) -> str:
    """Return the folder of a file, given as URL or path."""
    return posixpath.dirname(url) or "."


def make_absolute(url: str) -> str:
    """Return the URL, or the absolute local path with links resolved, without a slash at the end."""
    return os.path.realpath(url.rpartition("://")[2]) if is_local(url) else url.rstrip("/")


def count_retries() -> dict[str, int]:
    """Count the retries of this process so far, by kind of error."""
    return dict(Counter(_retried_kinds))


class _LocalFiles:
    """Local filesystem with the methods used here, without fsspec's overhead and with atomic writes."""

    async_impl = False
    protocol = ("file", "local")

    @staticmethod
    def cat_file(path: str, start: int = 0, end: int | None = None) -> bytes:
        with open(path, "rb") as file:
            file.seek(start)
            return file.read(None if end is None else end - start)

    @staticmethod
    def pipe_file(path: str, data: bytes) -> None:
        with _open_replacement(path) as file:
            file.write(data)

    @staticmethod
    def info(path: str) -> dict[str, Any]:
        file_stat = os.stat(path)
        return {"size": file_stat.st_size, "type": "file" if stat.S_ISREG(file_stat.st_mode) else "other"}

    @staticmethod
    def ls(path: str, detail: bool = True) -> Iterator[dict[str, str]]:
        entries = os.scandir(path)  # here, so that a missing folder is an error at once
        # Read one entry at a time: a folder may have millions.
        return (
            {"name": entry.name, "type": "file" if entry.is_file() else "directory" if entry.is_dir() else "other"}
            for entry in entries
        )

    rm_file = os.remove


@contextmanager
def _open_replacement(path: str) -> Iterator[IO[bytes]]:
    """Open a file beside a local one, which it replaces at the end of the block."""
    folder, name = os.path.split(os.path.abspath(path))
    os.makedirs(folder, exist_ok=True)
    temporary = os.path.join(folder, f".{name}.{uuid4().hex}{PARTIAL_SUFFIX}")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # before the rename: a crash must not keep the name and lose the bytes
        os.replace(temporary, path)
        _sync_folder(folder)
    except BaseException:
        if os.path.exists(temporary):
            os.remove(temporary)
        raise


def _sync_folder(folder: str) -> None:
    """Make new names in a folder survive a crash of the machine. Some network file systems refuse that."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def is_local(url: str) -> bool:
    """Return True if the URL is a path on this machine."""
    return split_protocol(url)[0] in (None, "file", "local")


def _open_filesystem(url: str) -> tuple[Any, str]:
    """Return this process's filesystem for the URL, and the path in it."""
    if is_local(url):
        return _LocalFiles, url.rpartition("://")[2]
    options: dict[str, Any] = {"use_listings_cache": False}  # other processes write to the same folders
    on_s3 = split_protocol(url)[0] in ("s3", "s3a")
    # Retries of botocore are switched off here and those of s3fs below: see the module's docstring.
    if on_s3:
        options["config_kwargs"] = {
            "connect_timeout": RETRY.connect_timeout_s,
            "read_timeout": RETRY.read_timeout_s,
            "max_pool_connections": MAX_CONCURRENT_REQUESTS,
            "retries": {"total_max_attempts": 1},
            **fsspec.config.conf.get("s3", {}).get("config_kwargs", {}),
        }
    files, path = fsspec.url_to_fs(url, **options)
    if on_s3:
        files.retries = 1
    return files, path


def _call(files: Any, method: str, *args: Any, seconds: float, **kwargs: Any) -> Any:
    """Call a method of the filesystem. An asynchronous one is cancelled after `seconds`."""
    if files.async_impl:
        return sync(files.loop, getattr(files, f"_{method}"), *args, timeout=seconds, **kwargs)
    return getattr(files, method)(*args, **kwargs)


def _get_info(files: Any, path: str, seconds: float) -> dict[str, Any]:
    try:
        info: dict[str, Any] = _call(files, "info", path, seconds=seconds)
    except OSError as error:
        # S3's response to HEAD has no body; that to GET gives the reason.
        if parse_response(error)[0] in ("400", "403"):
            _call(files, "cat_file", path, start=0, end=1, seconds=seconds)
        raise
    return info


def _run_with_retries(
    url: str, work: Callable[[Any, str, float], RequestResult], deadline: float | None = None
) -> RequestResult:
    """Run `work(filesystem, path, seconds_left)`, and retry it after transient errors.

    A local path is tried once, because the kernel retries before it reports an error.

    Args:
        url: the file or folder that `work` uses.
        work: one request.
        deadline: time of `time.monotonic` after which no try starts; None allows RETRY.deadline_s from now.

    Raises:
        ValueError: the URL is wrong, the file is missing or has another type, or access is denied.
        PermanentError: credentials stay expired.
        OSError: all tries failed.
    """
    retry = RETRY
    start = time.monotonic()
    deadline = start + retry.deadline_s if deadline is None else deadline

    def attempt() -> RequestResult:
        files, path = _open_filesystem(url)
        try:
            return work(files, path, max(deadline - time.monotonic(), 1e-3))  # 0 would mean no limit
        except Exception as error:
            if find_transient_kind(error) == EXPIRED_CREDENTIALS:
                files.clear_instance_cache()  # the next try makes a filesystem that reads the credentials again
            raise

    try:
        if is_local(url):
            return attempt()
        return Retrying(
            retry=retry_if_exception(lambda error: find_transient_kind(error) is not None),
            wait=wait_random_exponential(multiplier=retry.first_wait_s, max=retry.longest_wait_s),
            stop=stop_after_attempt(retry.tries) | stop_before_delay(deadline - start),
            before_sleep=partial(_log_retry, url),
        )(attempt)
    except RetryError as retry_error:
        last = retry_error.last_attempt
        cause = last.exception() or retry_error
        kind = find_transient_kind(cause)
        tries = f"{last.attempt_number} tries in {time.monotonic() - start:.1f} s"
        text = f"{redact(url)}: given up after {tries}, at last {kind}: {describe_cause(cause)}"
        error_class = PermanentError if kind == EXPIRED_CREDENTIALS else OSError
        raise error_class(text) from None
    except Exception as error:
        raise to_user_error(url, error, is_local(url)) from None  # a chained error could show what `redact` removes


def _log_retry(url: str, state: RetryCallState) -> None:
    """Log a failed try: the first error of each kind as a warning, further ones for debugging."""
    assert state.outcome is not None
    error = state.outcome.exception()
    assert error is not None
    kind = str(find_transient_kind(error))
    level = logging.DEBUG if kind in _retried_kinds else logging.WARNING
    _retried_kinds.append(kind)
    message = "%s: try %d failed, %s: %s; the next in %.1f s; more of this kind are only counted"
    logger.log(level, message, redact(url), state.attempt_number, kind, describe_cause(error), state.upcoming_sleep)
