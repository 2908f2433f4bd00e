"""Every byte that the data floor reads or writes: local paths and any URL that fsspec knows, by the same functions.

A URL is a `str`; a local path is one without scheme.  s3:// needs the package s3fs, gs:// gcsfs, hf:// huggingface_hub.

One policy of retries, `RETRY`, stands for all stores.  The libraries bring their own below it (s3fs five tries around
botocore's five), which multiply and are silent; for S3 they are switched off, so that a try is a request, counted in
`retries`, and the deadline holds.  Ray's retries cannot stand in: they match the texts of Arrow's errors, not s3fs's.

A try asks fsspec for its filesystem anew, which keeps one a process: nothing is open at import, nothing is pickled,
a forked process gets its own, and after expired credentials the next one reads environment and profile again.

Costs: 1.5 ms of CPU a request to S3 (aiobotocore), which is why near ranges are read as one; 0.02 ms a local range.
Ranges go out from a thread each and not through fsspec's cat_ranges: that waits for the slowest of a batch before any
can be tried again, and one by one where a filesystem is not asynchronous (hf://); threads cost 0.2 ms of CPU a request.
"""

import glob
import logging
import mmap
import os
import posixpath
import re
import shutil
import stat
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from http.client import IncompleteRead
from typing import Any, TypeVar
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

ByteRange = tuple[str, int, int]
"""URL, first byte, byte after the last."""

T = TypeVar("T")

MAX_CONCURRENT_REQUESTS = 64
"""Requests of one call that are on their way together."""

MAX_GAP_BYTES = 128 * 2**10
"""Bytes between two ranges of a file up to which one request takes both: what arrives in the time a request costs."""

MAX_BLOCK_BYTES = 8 * 2**20
"""Bytes that ranges read as one do not exceed together, so that large reads keep going out side by side."""

PARTIAL_SUFFIX = ".partial"
"""How a local file ends that is being written; `names` does not show it."""

EXPIRED_CREDENTIALS = "expired credentials"
"""The kind of fault after which a fresh filesystem reads the credentials again."""

TRANSIENT_CODES = {
    **dict.fromkeys(
        ("ExpiredToken", "ExpiredTokenException", "RequestExpired", "TokenRefreshRequired"), EXPIRED_CREDENTIALS
    ),
    **dict.fromkeys(("InvalidToken", "InvalidTokenId"), EXPIRED_CREDENTIALS),
    **dict.fromkeys(("SlowDown", "TooManyRequests", "TooManyRequestsException", "ServiceUnavailable"), "throttled"),
    **dict.fromkeys(("Throttling", "ThrottlingException", "ThrottledException", "RequestLimitExceeded"), "throttled"),
    "InternalError": "server error",
    "RequestTimeout": "time-out",
    "IncompleteBody": "truncated body",
}
"""Codes of S3 and its like for what passes with time, and what it is called here."""

TRANSIENT_STATUSES = {408: "time-out", 429: "throttled", 503: "throttled"}
"""The same for stores whose answers have no code."""

TRANSIENT_CLASSES = {
    **dict.fromkeys(("TimeoutError", "Timeout", "TimeoutException"), "time-out"),
    **dict.fromkeys(("IncompleteRead", "IncompleteReadError", "ResponseStreamingError"), "truncated body"),
    **dict.fromkeys(("ClientPayloadError", "FlexibleChecksumError"), "truncated body"),
    **dict.fromkeys(("ConnectionError", "ClientConnectionError", "TransportError", "HTTPClientError"), "connection"),
    "ResponseParserError": "server error",
}
"""The same for errors without an answer, the first that fits.  By name, since few of the libraries are installed."""

logger = logging.getLogger(__name__)

_retried_kinds: list[str] = []  # kinds of faults retried; appending needs no lock, which a fork could find held


@dataclass(frozen=True, kw_only=True)
class Retry:
    """How long faults that pass are waited out, in seconds.

    A wait is drawn between zero and a limit that starts at `first_wait_s` and doubles up to `longest_wait_s`.  The
    deadline is that of a whole call, transfer included: what takes longer to move is not for one call.
    """

    tries: int = 10
    deadline_s: float = 300
    first_wait_s: float = 0.5
    longest_wait_s: float = 30
    connect_timeout_s: float = 5
    read_timeout_s: float = 30


RETRY = Retry()


def read(url: str) -> bytes:
    """The whole file in one request; large ones are faster in ranges."""

    def once(files: Any, path: str, seconds: float) -> bytes:
        # s3fs would first ask for the size, and no answer to that has a body which says what is wrong
        options = {"max_concurrency": 1} if "s3" in files.protocol else {}
        data: bytes = _call(files, "cat_file", path, seconds=seconds, **options)
        return data

    return _run_with_retries(url, once)


def map_file(url: str) -> bytes | mmap.mmap:
    """The whole of a large file: a local one mapped into memory, others read in ranges, side by side."""
    length = get_size(url)
    if is_local(url) and length:
        with open(_open_filesystem(url)[1], "rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return b"".join(
        read_ranges([(url, at, min(at + MAX_BLOCK_BYTES, length)) for at in range(0, length, MAX_BLOCK_BYTES)])
    )


def read_ranges(ranges: Sequence[ByteRange]) -> list[bytes]:
    """The bytes of each range, in this order, each of exactly its length.

    From a store near ranges of a file are read as one, and all side by side.  ValueError names the file that ends
    before a range of it does.
    """
    until = time.monotonic() + RETRY.deadline_s
    if all(is_local(url) for url, _, _ in ranges):
        return [_read_block(one, until) for one in ranges]
    wanted = [one for one in ranges if one[1] < one[2]]
    columns = ([one[part] for one in wanted] for part in range(3))
    blocks: list[ByteRange] = list(zip(*merge_offset_ranges(*columns, MAX_GAP_BYTES, MAX_BLOCK_BYTES), strict=True))
    with ThreadPoolExecutor(MAX_CONCURRENT_REQUESTS) as pool:
        held = list(pool.map(partial(_read_block, until=until), blocks))
    firsts = [block[:2] for block in blocks]
    result = []
    for url, start, stop in ranges:
        if start < stop:
            number = bisect_right(firsts, (url, start)) - 1  # of those that start no later, the last holds the range
            first = firsts[number][1]
            result.append(held[number][start - first : stop - first])
        else:
            result.append(b"")
        assert len(result[-1]) == stop - start
    return result


def _read_block(block: ByteRange, until: float) -> bytes:
    url, start, stop = block

    def once(files: Any, path: str, seconds: float) -> bytes:
        data: bytes = _call(files, "cat_file", path, start=start, end=stop, seconds=seconds)
        if missing := stop - start - len(data):
            size = _get_info(files, path, seconds)["size"]
            if size < stop:
                raise EOFError(f"got {start} to {stop}, the file ends at {size}")
            raise IncompleteRead(data, missing)
        return data

    return _run_with_retries(url, once, until)


def write(url: str, data: bytes) -> None:
    """Make or replace the file, whole or not at all: readers see what was there before, or all of `data`.

    Folders above are made.  On S3 it is one put up to 100 MB, and parts that appear together above.
    """
    _run_with_retries(url, lambda files, path, seconds: _call(files, "pipe_file", path, data, seconds=seconds))


def exists(url: str) -> bool:
    """Whether a file is there; a folder is none, since object stores have no folders."""

    def once(files: Any, path: str, seconds: float) -> bool:
        try:
            return bool(_get_info(files, path, seconds)["type"] == "file")
        except (FileNotFoundError, NotADirectoryError):
            return False

    return _run_with_retries(url, once)


def get_size(url: str) -> int:
    """Bytes that the file holds."""

    def once(files: Any, path: str, seconds: float) -> int:
        info = _get_info(files, path, seconds)
        if info["type"] != "file":
            raise IsADirectoryError("a folder")
        return int(info["size"])

    return _run_with_retries(url, once)


def list_files(url: str) -> list[str]:
    """Names of the files directly in a folder, sorted; [] also where it is missing: object stores cannot tell."""
    return [name for name in _list_entries(url, "file") if not name.endswith(PARTIAL_SUFFIX)]


def list_folders(url: str) -> list[str]:
    """Names of the folders directly in a folder, sorted; [] also where it is missing."""
    return _list_entries(url, "directory")


def _list_entries(url: str, kind: str) -> list[str]:
    def once(files: Any, path: str, seconds: float) -> list[str]:
        try:
            infos = _call(files, "ls", path, detail=True, seconds=seconds)
        except FileNotFoundError as error:
            if _parse_response(error)[0] == "NoSuchBucket":
                raise
            return []
        found = (posixpath.basename(info["name"].rstrip("/")) for info in infos if info["type"] == kind)
        return sorted(name for name in found if name)

    return _run_with_retries(url, once)


def remove_folder(url: str) -> None:
    """Remove the files directly in a folder, and a local folder itself, if it is there."""
    for name in list_files(url):
        remove(join(url, name))
    if is_local(url):
        shutil.rmtree(_open_filesystem(url)[1], ignore_errors=True)


def remove_partial(url: str) -> None:
    """Remove files directly in a folder whose writers were killed in the middle; object stores have no such files."""
    if is_local(url):
        for path in glob.glob(os.path.join(glob.escape(_open_filesystem(url)[1]), f".*{PARTIAL_SUFFIX}")):
            with suppress(FileNotFoundError):
                os.remove(path)


def remove_tree(url: str) -> None:
    """Remove a folder with all that is below it, if it is there."""
    for name in list_folders(url):
        remove_tree(join(url, name))
    remove_folder(url)


def remove(url: str) -> None:
    """Remove the file, if it is there: a try may have removed it whose answer was lost."""

    def once(files: Any, path: str, seconds: float) -> None:
        try:
            _call(files, "rm_file", path, seconds=seconds)
        except FileNotFoundError as error:
            if _parse_response(error)[0] == "NoSuchBucket":
                raise

    _run_with_retries(url, once)


def join(url: str, *names: str) -> str:
    """The URL of what lies under `url`."""
    return posixpath.join(url, *names)


def make_absolute(url: str) -> str:
    """The URL, or the local path from the root on and without links; no slash at its end."""
    return os.path.realpath(url.rpartition("://")[2]) if is_local(url) else url.rstrip("/")


def count_retries() -> dict[str, int]:
    """How often this process tried again so far, by kind of fault."""
    return dict(Counter(_retried_kinds))


class _LocalFiles:
    """Of local files what is asked of a filesystem here, without fsspec's layers; writing is whole or not at all."""

    async_impl = False
    protocol = ("file", "local")

    @staticmethod
    def cat_file(path: str, start: int = 0, end: int | None = None) -> bytes:
        with open(path, "rb") as file:
            file.seek(start)
            return file.read(None if end is None else end - start)

    @staticmethod
    def pipe_file(path: str, data: bytes) -> None:
        folder, name = os.path.split(os.path.abspath(path))
        os.makedirs(folder, exist_ok=True)
        temporary = os.path.join(folder, f".{name}.{uuid4().hex}{PARTIAL_SUFFIX}")
        try:
            with open(temporary, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())  # or a machine that fails may keep the name and lose the bytes
            os.replace(temporary, path)
        except BaseException:
            if os.path.exists(temporary):
                os.remove(temporary)
            raise

    @staticmethod
    def info(path: str) -> dict[str, Any]:
        about = os.stat(path)
        return {"size": about.st_size, "type": "file" if stat.S_ISREG(about.st_mode) else "other"}

    @staticmethod
    def ls(path: str, detail: bool = True) -> list[dict[str, str]]:
        with os.scandir(path) as entries:
            return [
                {"name": entry.name, "type": "file" if entry.is_file() else "directory" if entry.is_dir() else "other"}
                for entry in entries
            ]

    rm_file = os.remove


def is_local(url: str) -> bool:
    """Tell if the URL is a path on this machine."""
    return split_protocol(url)[0] in (None, "file", "local")


def _open_filesystem(url: str) -> tuple[Any, str]:
    """The process's filesystem for the URL, and the path there."""
    if is_local(url):
        return _LocalFiles, url.rpartition("://")[2]
    options: dict[str, Any] = {"use_listings_cache": False}  # others write too
    on_s3 = split_protocol(url)[0] in ("s3", "s3a")
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
    """What the filesystem's method answers; an asynchronous one is given up after so many seconds."""
    if files.async_impl:
        return sync(files.loop, getattr(files, f"_{method}"), *args, timeout=seconds, **kwargs)
    return getattr(files, method)(*args, **kwargs)


def _get_info(files: Any, path: str, seconds: float) -> dict[str, Any]:
    try:
        info: dict[str, Any] = _call(files, "info", path, seconds=seconds)
    except OSError as error:
        if _parse_response(error)[0] in ("400", "403"):  # S3 answers HEAD without a body; its answer to GET says why
            _call(files, "cat_file", path, start=0, end=1, seconds=seconds)
        raise
    return info


def _run_with_retries(url: str, work: Callable[[Any, str, float], T], until: float | None = None) -> T:
    """`work(filesystem, path, seconds left)`, tried again while faults are of the passing kind.

    A local path is asked once: the kernel has tried again itself before it reports a fault.
    ValueError where the URL, what is there, or the rights are not right, OSError when all tries failed:
    PermanentError where credentials stay expired.
    """
    retry, started = RETRY, time.monotonic()
    until = started + retry.deadline_s if until is None else until

    def once() -> T:
        files, path = _open_filesystem(url)
        try:
            return work(files, path, max(until - time.monotonic(), 1e-3))  # zero would be no limit
        except Exception as error:
            if _transient_kind(error) == EXPIRED_CREDENTIALS:
                files.clear_instance_cache()
            raise

    try:
        if is_local(url):
            return once()
        return Retrying(
            retry=retry_if_exception(lambda error: _transient_kind(error) is not None),
            wait=wait_random_exponential(multiplier=retry.first_wait_s, max=retry.longest_wait_s),
            stop=stop_after_attempt(retry.tries) | stop_before_delay(until - started),
            before_sleep=partial(_log_retry, url),
        )(once)
    except RetryError as used_up:
        last, seconds = used_up.last_attempt, time.monotonic() - started
        cause = last.exception() or used_up
        tries = f"{last.attempt_number} tries in {seconds:.1f} s"
        told = f"{_redact(url)}: given up after {tries}, at last {_transient_kind(cause)}: {_message(cause)}"
        raise (PermanentError if _transient_kind(cause) == EXPIRED_CREDENTIALS else OSError)(told) from None
    except Exception as error:
        raise _to_user_error(url, error) from None  # the chain may show what `_shown` hides


def _log_retry(url: str, state: RetryCallState) -> None:
    assert state.outcome is not None
    error = state.outcome.exception()
    assert error is not None
    kind = str(_transient_kind(error))
    level = logging.DEBUG if kind in _retried_kinds else logging.WARNING
    _retried_kinds.append(kind)
    note = "%s: try %d failed, %s: %s; the next in %.1f s; more of this kind are only counted"
    logger.log(level, note, _redact(url), state.attempt_number, kind, _message(error), state.upcoming_sleep)


def _transient_kind(error: BaseException) -> str | None:
    """What a fault is called that passes with time; None for one that stays."""
    code, status = _parse_response(error)
    if code in TRANSIENT_CODES:
        return TRANSIENT_CODES[code]
    classes = {base.__name__ for one in _iterate_causes(error) for base in type(one).__mro__}
    for name, kind in TRANSIENT_CLASSES.items():
        if name in classes:
            return kind
    return TRANSIENT_STATUSES.get(status, "server error" if status >= 500 else None)


def _parse_response(error: BaseException) -> tuple[str, int]:
    """The store's code and HTTP status as the libraries' errors carry them; ("", 0) without an answer."""
    for one in _iterate_causes(error):
        response = getattr(one, "response", None)
        if isinstance(response, dict):  # botocore
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            return str(response.get("Error", {}).get("Code", "")), int(status)
        for holder, name in ((response, "status_code"), (one, "status_code"), (one, "status"), (one, "code")):
            if isinstance(number := getattr(holder, name, None), int) and 400 <= number < 600:
                return str(number), number
    return "", 0


def _iterate_causes(error: BaseException | None) -> Iterable[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _to_user_error(url: str, error: Exception) -> Exception:
    """An error that stays, in words that name the URL and what to do; one of ours that is a mistake, as it is."""
    at, told = _redact(url), _message(error)
    if isinstance(error, ImportError):
        return ValueError(f"{at}: a package is missing: {told}")
    if isinstance(error, FileExistsError | NotADirectoryError):
        return ValueError(f"{at}: {told}, allowed: a path whose folders are folders")
    if isinstance(error, FileNotFoundError | IsADirectoryError):
        return ValueError(f"{at}: not there, allowed: a file that is; {told}")
    if isinstance(error, PermissionError) or "Credential" in type(error).__name__:
        return ValueError(f"{at}: no access, allowed: credentials and rights for it; {told}")
    if isinstance(error, EOFError) or _parse_response(error)[1] == 416:
        return ValueError(f"{at}: bytes past its end are wanted; {told}")
    if isinstance(error, ValueError) or any(base.__name__ == "BotoCoreError" for base in type(error).__mro__):
        return ValueError(f"{at}: {told}, allowed: a path, or a URL such as s3://bucket/key")
    if isinstance(error, OSError) and error.errno and error.strerror and is_local(url):
        return OSError(error.errno, error.strerror, at)
    return OSError(f"{at}: {told}") if isinstance(error, OSError) else error


def _message(error: BaseException) -> str:
    """The first cause in one line."""
    *_, first = _iterate_causes(error)
    text = " ".join(str(first).split())
    return _redact(f"{type(first).__name__}: {text}" if text else type(first).__name__)


def _redact(text: str) -> str:
    """A URL, or a text with URLs, without what may be credentials: user:password@ and a signed query."""
    return re.sub(r"(?<=://)[^/\s@]*@|\?\S*", "", text)
