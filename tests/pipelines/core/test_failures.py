"""Tests of failures: the cause of an error in one line, and its kind.

Wrapped errors come from a real Ray: from a task, from an actor's constructor and from Ray Data.
"""

import errno
import resource
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import ray
import ray.data
import torch
from ray.exceptions import ActorDiedError, RayTaskError, UserCodeException
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback, WorkerHealthCheckFailedError
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError
from safetensors import SafetensorError
from safetensors.torch import save_file

from jobs.command import EXIT_MISUSE, main
from pipelines.core import failures, jsonl, storage
from pipelines.core.failures import Kind, classify_error
from pipelines.data.consumed import ConsumedSamples
from pipelines.report import page
from pipelines.training import export, ledger, metrics
from pipelines.training.files import is_complete
from tests.pipelines.core.remote_errors import BrokenActor, end_process, raise_permission_error, raise_refusal

pytestmark = pytest.mark.integration

JOBS = Path(__file__).parents[3] / "jobs" / "recipes"


def catch_error(work: Callable[[], Any]) -> BaseException:
    try:
        work()
    except Exception as error:
        return error
    return pytest.fail("nothing was raised")


# Kinds and texts


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (ValueError("name: got 1,\n  allowed: 2"), Kind.PERMANENT, "name: got 1, allowed: 2"),
        (ImportError("lmms-eval is missing"), Kind.PERMANENT, "lmms-eval is missing"),
        (
            OSError(errno.ENOSPC, "No space left on device", "/a/b"),
            Kind.PERMANENT,
            "/a/b: No space left on device; free",
        ),
        (OSError(errno.EROFS, "Read-only file system", "/a"), Kind.PERMANENT, "/a: Read-only file system; remount it"),
        (PermissionError(errno.EACCES, "Permission denied", "/a"), Kind.PERMANENT, "/a: Permission denied; get perm"),
        (OSError(errno.EMFILE, "Too many open files"), Kind.PERMANENT, "Too many open files; raise the limit of open"),
        (OSError("s3://a/b: given up after 9 tries"), Kind.LOST, "s3://a/b: given up after 9 tries"),
        (ConnectionResetError(errno.ECONNRESET, "Connection reset"), Kind.LOST, "Connection reset"),
        (torch.distributed.DistNetworkError("gone"), Kind.LOST, "DistNetworkError: gone"),
        (RuntimeError("[../gloo/tcp/pair.cc] Connection closed by peer [127.0.0.1]"), Kind.LOST, "RuntimeError: [.."),
        (RuntimeError("shape '[2]' is invalid"), Kind.RAISED, "RuntimeError: shape '[2]' is invalid"),
        (torch.OutOfMemoryError("no"), Kind.RAISED, "OutOfMemoryError: no; a smaller micro_batch_size"),
        (KeyError("a"), Kind.RAISED, "KeyError: 'a'"),
        (AssertionError(), Kind.RAISED, "AssertionError"),
    ],
)
def test_an_error_is_one_line_and_of_a_kind(error: BaseException, kind: Kind, text: str) -> None:
    failure = classify_error(error)
    assert failure.kind == kind
    assert failure.text.startswith(text)
    assert "\n" not in failure.text


def test_a_reason_of_more_than_thousands_of_characters_keeps_both_ends() -> None:
    text = "a" + "x" * 3000 + "z"
    assert classify_error(ValueError(text)).text == text
    cut = classify_error(ValueError("a" + "x" * 10**6 + "z")).text
    assert len(cut) < 1.1 * failures.MAX_REASON_CHARACTERS
    assert (cut[0], cut[-1]) == ("a", "z")


def test_errors_that_differ_in_numbers_have_the_same_pattern() -> None:
    first, second = (classify_error(RuntimeError(f"process {n}: tried {n}.5 GiB at 0x{n:x}")) for n in (12, 934))
    assert first.text != second.text
    assert first.pattern == second.pattern
    assert first.pattern != classify_error(RuntimeError("another")).pattern


# Behind wrappers

CORE = PermissionError(errno.EACCES, "Permission denied", "/a")
CORE_TEXT = "/a: Permission denied; get permission for it, or choose another folder"


@pytest.mark.parametrize(
    "error",
    [
        RayTaskError("f", "trace", CORE),
        RayTaskError("f", "trace", CORE).as_instanceof_cause(),
        RayTaskError("f", "trace", RayTaskError("g", "trace", CORE).as_instanceof_cause()),
        UserExceptionWithTraceback(CORE, "trace"),
        UserExceptionWithTraceback(RayTaskError("f", "trace", CORE).as_instanceof_cause(), "trace"),
        WorkerHealthCheckFailedError("look", RayTaskError("f", "trace", CORE)),
        ControllerError(CORE),
        WorkerGroupError("two", {0: RuntimeError("Connection closed"), 1: UserExceptionWithTraceback(CORE, "t")}),
    ],
    ids=lambda error: type(error).__name__,
)
def test_the_innermost_error_of_a_wrapper_is_classified(error: BaseException) -> None:
    assert classify_error(error) == failures.Failure(Kind.PERMANENT, CORE_TEXT)


def raise_in_ray_data() -> None:
    try:
        raise_refusal()
    except ValueError as error:
        raise UserCodeException("UDF failed.\nFailed after 1/1 attempts.") from error


@pytest.mark.parametrize("wrap", [lambda error: error, lambda error: error.as_instanceof_cause()])
@pytest.mark.parametrize("depth", [1, 2])
def test_the_innermost_error_of_ray_data_is_read_from_the_stack_trace(wrap: Callable[..., Any], depth: int) -> None:
    """The cause of a wrapper is lost when the wrapper is pickled."""
    trace, cause = "", UserCodeException("UDF failed.\nFailed after 1/1 attempts.")
    try:
        raise_in_ray_data()
    except UserCodeException:
        trace = traceback.format_exc()
    error = wrap(RayTaskError("f", trace, cause))
    for _ in range(1, depth):
        error = wrap(RayTaskError("g", f'Traceback (most recent call last):\n  File "a", line 1\n{error}', error))
    assert classify_error(error) == failures.Failure(Kind.PERMANENT, "set: got 1, allowed: 2")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), (Kind.PERMANENT, "'utf-8' codec can't")),
        (ExceptionGroup("two", [KeyError(1)]), (Kind.RAISED, "ExceptionGroup: two (1 sub-exception)")),
    ],
)
def test_an_error_that_is_made_of_more_than_a_text_is_read_from_a_stack_trace(
    error: Exception, expected: tuple[Kind, str]
) -> None:
    trace = f'Traceback (most recent call last):\n  File "a", line 1\n{type(error).__name__}: {error}'
    failure = classify_error(RayTaskError("f", trace, UserCodeException("UDF failed.")))
    assert (failure.kind, failure.text[: len(expected[1])]) == expected


def _rows() -> ray.data.Dataset:
    return ray.data.from_items([{"id": 0}], override_num_blocks=1)


@pytest.mark.usefixtures("ray_cluster")
def test_errors_of_a_real_ray_are_classified_by_their_cause() -> None:
    refuse = ray.remote(num_cpus=0)(raise_refusal)
    broken = ray.remote(num_cpus=0)(BrokenActor)
    refused = failures.Failure(Kind.PERMANENT, "set: got 1, allowed: 2")
    assert classify_error(catch_error(lambda: ray.get(refuse.remote()))) == refused
    init = catch_error(lambda: ray.get(broken.remote("start").__call__.remote({})))
    assert isinstance(init, ActorDiedError)
    assert classify_error(init) == refused
    assert classify_error(catch_error(lambda: ray.get(broken.remote("").__call__.remote({})))) == refused
    assert classify_error(catch_error(lambda: _rows().map(raise_refusal).materialize())) == refused
    assert classify_error(catch_error(lambda: _rows().map(raise_permission_error).materialize())).text == CORE_TEXT
    assert (
        classify_error(catch_error(lambda: ray.get(ray.remote(max_retries=0)(end_process).remote({})))).kind
        == Kind.LOST
    )


def test_an_error_of_a_file_names_it(tmp_path: Path) -> None:
    failure = classify_error(catch_error(lambda: (tmp_path / "none" / "x").write_text("")))
    assert failure.text == f"{tmp_path / 'none' / 'x'}: No such file or directory"
    assert failure.kind == Kind.PERMANENT


# Disks


@contextmanager
def full_disk(size: int = 0) -> Iterator[None]:
    """Let the kernel refuse files of more than a few bytes, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))  # SIGXFSZ is ignored by Python
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def write_metrics(path: Path) -> None:
    record = metrics.MetricsWriter(path.parent, "tower", 0)
    try:
        record.write(1, {"loss": 1.0, "skipped": 0}, ConsumedSamples({}, []))
    finally:
        for file in record.files:
            with suppress(OSError):
                file.close()


def write_weights(path: Path) -> None:
    with failures.locate_errors(path):
        save_file({"a": torch.zeros(9)}, path)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("x", lambda path: storage.write(str(path), b"x")),
        ("x", lambda path: jsonl.append(path, [{"a": 1}])),
        ("x", lambda path: page.write(path, "x")),
        (ledger.LEDGER_FILE, lambda path: ledger.append_event(path.parent, "launch", "tower")),
        ("consumed.jsonl", write_metrics),
        ("x", write_weights),
    ],
    ids=["storage", "lines", "page", "ledger", "metrics", "weights"],
)
def test_an_error_of_a_full_disk_names_the_file_and_the_remedy(
    name: str, write: Callable[[Path], None], tmp_path: Path
) -> None:
    path = tmp_path / name
    with full_disk():
        failure = classify_error(catch_error(lambda: write(path)))
    assert failure == failures.Failure(
        Kind.PERMANENT, f"{path}: File too large; raise the limit of file sizes (ulimit -f)"
    )
    write(path)


def test_an_export_that_does_not_fit_on_the_disk_leaves_no_files(tmp_path: Path) -> None:
    made, out = tmp_path / "made", str(tmp_path / "out")
    made.mkdir()
    (made / "config.json").write_bytes(b"{}")
    (made / "model.safetensors").write_bytes(bytes(100))
    with full_disk(50), pytest.raises(OSError, match="File too large"):
        export.upload_folder(made, out, "here")
    assert storage.list_files(out) == []
    export.upload_folder(made, out, "here")
    assert is_complete(out)


def test_errors_without_a_disk_stay_unchanged() -> None:
    for error in (ValueError("config (os error 2)"), KeyError("a"), OSError("s3://a: given up")):
        with pytest.raises(type(error)) as raised, failures.locate_errors("x"):
            raise error
        assert raised.value is error
    assert classify_error(SafetensorError("I/O error: No space left on device (os error 28)")).kind == Kind.PERMANENT


def test_the_command_line_prints_a_full_disk_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The message has no stack trace, but the full disk, the safe data and the way to continue."""
    with full_disk():
        code = main(["run", str(JOBS / "quickstart.yaml"), "--runs-dir", str(tmp_path)])
    lines = capsys.readouterr().err.splitlines()
    assert code == EXIT_MISUSE
    assert lines == [
        f"redux: {tmp_path / 'quickstart' / 'job.yaml'}: File too large; raise the limit of file sizes (ulimit -f); "
        "finished phases are safe: after a fix, the same command continues"
    ]
