"""Classification of errors: the cause behind Ray's wrappers, the reaction to it, and its text in one line.

Ray wraps an error of a worker, a reader or an actor once for each process that passes it on. The text of a wrapper is
a whole stack trace. The user can only fix the innermost error.

This module imports neither Ray nor torch, because the command line uses it for every error, even if neither is loaded.
"""

import builtins
import errno
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum

MAX_REASON_CHARACTERS = 4000
"""Maximum length of a reason. The middle of a longer one is cut out."""

PERMANENT_ERRNOS = {
    errno.EACCES,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EISDIR,
    errno.ELOOP,
    errno.EMFILE,
    errno.ENAMETOOLONG,
    errno.ENFILE,
    errno.ENOENT,
    errno.ENOSPC,
    errno.ENOTDIR,
    errno.EPERM,
    errno.EROFS,
}
"""Errors of a file system that stay until somebody fixes them."""

LOST_CLASSES = {"RayError", "RayTrainError", "DistError", "ConnectionError", "TimeoutError", "EOFError"}
"""Names of base classes of errors that mean: another process or machine is gone."""

LOST_TEXTS = re.compile(
    r"connection (closed|reset|refused|timed out)|broken pipe|socket (closed|timeout)|timed out|gloo|nccl",
    re.IGNORECASE,
)
"""Texts of a RuntimeError with which torch.distributed reports a lost peer."""

ERRNO_HINTS = {
    errno.ENOSPC: "free space there",
    errno.EDQUOT: "free space there, or raise the quota",
    errno.EFBIG: "raise the limit of file sizes (ulimit -f)",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "raise the limit of open files (sysctl fs.file-max)",
    errno.EROFS: "remount it writable, or choose another folder",
    errno.EACCES: "get permission for it, or choose another folder",
    errno.EPERM: "get permission for it, or choose another folder",
    errno.ENAMETOOLONG: "choose a shorter path",
}
"""Advice for errors of a file system, by error number."""

CLASS_HINTS = {"OutOfMemoryError": "a smaller micro_batch_size needs less memory"}
"""Advice for an error, by the name of its class."""

_CHAIN_SEPARATOR = re.compile(
    r"^(?:The above exception was the direct cause of the following exception|"
    r"During handling of the above exception, another exception occurred):$",
    re.MULTILINE,
)
_ERROR_LINE = re.compile(r"([A-Za-z_][\w.]*)(?:: (.*))?$", re.DOTALL)


class PermanentError(OSError):
    """Error of a store that stays until somebody fixes it. The text names the store."""


class Kind(IntEnum):
    """Kind of a failure, which decides about restarts.

    Kinds are sorted: if several ranks fail, the lowest kind is taken as the cause of the others.

    PERMANENT: the error stays until the user fixes something. The stage is not restarted.
    RAISED: code raised an error. The stage is restarted, unless the same error occurs again at the same step.
    LOST: a process, a machine or a connection is gone. The stage is restarted, as often as the job allows.
    """

    PERMANENT = 0
    RAISED = 1
    LOST = 2


@dataclass(frozen=True)
class Failure:
    """Kind and text of an error."""

    kind: Kind
    text: str

    @property
    def pattern(self) -> str:
        """The text without numbers, which differ between processes."""
        return re.sub(r"0x[0-9a-f]+|\b[0-9a-f]{12,}\b|\d+(\.\d+)?", "#", self.text)


def classify_error(error: BaseException) -> Failure:
    """Find the cause of an error and return its kind and text."""
    cause = find_cause(error)
    return Failure(_classify(cause), _shorten_middle(_format_error(cause)))


@contextmanager
def locate_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    """Add the file's name to errors of the block.

    The name is missing if the kernel refuses a write to an open file. Libraries in Rust raise errors of another class.
    """
    try:
        yield
    except Exception as error:
        number = _find_errno(error)
        if not number or getattr(error, "filename", None):
            raise
        raise OSError(number, os.strerror(number), os.fspath(path)) from None


def _find_errno(error: BaseException) -> int:
    """Return the errno of a file system's error, or 0. Libraries in Rust put it in the text."""
    if isinstance(error, OSError | ValueError):
        return getattr(error, "errno", None) or 0
    match = re.search(r"\(os error (\d+)\)", str(error))
    return int(match[1]) if match else 0


def find_cause(error: BaseException) -> BaseException:
    """Return the innermost error behind Ray's wrappers, or the error itself if it is not wrapped."""
    seen = set[int]()
    while id(error) not in seen:
        seen.add(id(error))
        inner = _unwrap(error)
        if inner is None:
            break
        error = inner
    number = 0 if isinstance(error, OSError) else _find_errno(error)
    return OSError(number, os.strerror(number)) if number else error


def _unwrap(error: BaseException) -> BaseException | None:
    """Return the error that a wrapper of Ray 2.60 holds, or None if this is not a wrapper."""
    names = _class_names(error)
    # Of several workers, take the error of the lowest kind.
    if "WorkerGroupError" in names:
        failures = getattr(error, "worker_failures", {}).values()
        return min(map(find_cause, failures), key=_classify, default=None)
    # Wrappers that hold their cause in an attribute.
    for name, attribute in (
        ("RayTaskError", "cause"),
        ("UserExceptionWithTraceback", "_base_exc"),
        ("ControllerError", "controller_failure"),
        ("WorkerHealthCheckFailedError", "health_check_failure"),
    ):
        inner = getattr(error, attribute, None) if name in names else None
        if isinstance(inner, BaseException):
            # Ray Data's wrapper loses its cause when it is pickled, but the stack trace still contains it.
            if "UserCodeException" in _class_names(inner) and inner.__cause__ is None:
                return _parse_trace(str(error)) or inner
            return inner
    # Wrappers that hold their cause elsewhere.
    if "UserCodeException" in names:
        return error.__cause__
    if "ActorDiedError" in names and getattr(error, "actor_init_failed", False):
        return _parse_trace(str(error))
    return None


def _parse_trace(trace: str) -> BaseException | None:
    """Rebuild the last error of a stack trace that is not a wrapper of Ray, or return None."""
    for part in reversed(_CHAIN_SEPARATOR.split(trace)):
        lines = part.strip().splitlines()
        frames = [number for number, line in enumerate(lines) if line.startswith("  File ")]
        message = lines[frames[-1] + 1 if frames else 1 :]
        while message and message[0].startswith("    "):  # the source line of the frame
            message = message[1:]
        match = _ERROR_LINE.match("\n".join(message))
        if match and not match[1].startswith("ray."):
            return _rebuild_error(match[1].rpartition(".")[2], (match[2] or "").strip())
    return None


def _rebuild_error(name: str, text: str) -> BaseException:
    """Make an exception with this class name and text. OSError gets its errno and file name back."""
    builtin = getattr(builtins, name, None)
    if not (isinstance(builtin, type) and issubclass(builtin, Exception)):
        return type(name, (Exception,), {})(text)
    number = re.match(r"\[Errno (\d+)\] ([^:]*)(?:: '(.*)')?", text) if issubclass(builtin, OSError) else None
    if number:
        return OSError(int(number[1]), number[2], number[3])
    try:
        return builtin(text)
    except TypeError:  # UnicodeDecodeError and ExceptionGroup are made of more than a text
        return type(name, (ValueError if issubclass(builtin, ValueError) else Exception,), {})(text)


def _classify(error: BaseException) -> Kind:
    names = _class_names(error)
    if names & LOST_CLASSES:
        return Kind.LOST
    if isinstance(error, ValueError | ImportError | PermanentError):
        return Kind.PERMANENT
    if isinstance(error, OSError):
        return Kind.PERMANENT if error.errno in PERMANENT_ERRNOS else Kind.LOST
    if isinstance(error, RuntimeError) and LOST_TEXTS.search(str(error)):
        return Kind.LOST
    return Kind.RAISED


def _class_names(error: BaseException) -> set[str]:
    return {base.__name__ for base in type(error).__mro__}


def _format_error(error: BaseException) -> str:
    """Format an error as one line. File errors name the file, the problem and the advice."""
    if isinstance(error, OSError) and error.errno is not None and error.strerror:
        files = " -> ".join(os.fsdecode(name) for name in _file_names(error))
        hint = f"; {ERRNO_HINTS[error.errno]}" if error.errno in ERRNO_HINTS else ""
        return f"{files}: {error.strerror}{hint}" if files else f"{error.strerror}{hint}"
    name, text = type(error).__name__, " ".join(str(error).split())
    hint = f"; {CLASS_HINTS[name]}" if name in CLASS_HINTS else ""
    if isinstance(error, ValueError | ImportError) and text:
        return text
    # An OSError without errno comes from pipelines.core.storage, whose text names the URL.
    return (text if type(error) in (OSError, PermanentError) and text else f"{name}: {text}" if text else name) + hint


def _file_names(error: OSError) -> Iterable[str | bytes]:
    return (name for name in (error.filename, error.filename2) if isinstance(name, str | bytes))


def _shorten_middle(text: str) -> str:
    if len(text) <= MAX_REASON_CHARACTERS:
        return text
    half = MAX_REASON_CHARACTERS // 2
    return f"{text[:half]} [...] {text[-half:]}"
