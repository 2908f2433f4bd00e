"""Reasons of failures: the innermost error behind Ray's wrappers, whether it would recur, and its text in one line.

Ray wraps what a worker, a reader or an actor raised, once for each process that passes it on, and the text of a wrapper
is a whole stack trace.  What the user can mend is the error at its core.

This module imports neither Ray nor torch: the command line uses it for every error, also where neither is loaded.
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
"""Length of a reason; a longer one loses its middle."""

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
"""Faults of a file system that stay until somebody mends them."""

LOST_CLASSES = {"RayError", "RayTrainError", "DistError", "ConnectionError", "TimeoutError", "EOFError"}
"""Base classes of errors about another process or machine that is gone, by name."""

LOST_TEXTS = re.compile(
    r"connection (closed|reset|refused|timed out)|broken pipe|socket (closed|timeout)|timed out|gloo|nccl",
    re.IGNORECASE,
)
"""Texts of a RuntimeError by which torch.distributed tells that a peer is gone."""

ERRNO_HINTS = {
    errno.ENOSPC: "free space there",
    errno.EDQUOT: "free space there, or raise the quota",
    errno.EFBIG: "raise the limit of file sizes (ulimit -f)",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "raise the limit of open files (sysctl fs.file-max)",
    errno.EROFS: "mount it for writing, or name another folder",
    errno.EACCES: "get the right to it, or name another folder",
    errno.EPERM: "get the right to it, or name another folder",
    errno.ENAMETOOLONG: "name a shorter path",
}
"""Advice on a fault of a file system."""

CLASS_HINTS = {"OutOfMemoryError": "a smaller micro_batch_size needs less memory"}
"""Advice on an error by the name of its class."""

_CHAIN_SEPARATOR = re.compile(
    r"^(?:The above exception was the direct cause of the following exception|"
    r"During handling of the above exception, another exception occurred):$",
    re.MULTILINE,
)
_ERROR_LINE = re.compile(r"([A-Za-z_][\w.]*)(?:: (.*))?$", re.DOTALL)


class PermanentError(OSError):
    """A fault of a store that stays until somebody mends it; the text names the store."""


class Kind(IntEnum):
    """Reaction to an error, the most telling first: of several ranks' errors it is the cause of the others.

    PERMANENT: it stays until the user mends something; nothing is started again.
    RAISED: code failed; if the same comes again at the same step, nothing is started again.
    LOST: a process, a machine or a connection is gone; all is started again, as often as the job allows.
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
        """The text without the numbers that differ from one process to the next."""
        return re.sub(r"0x[0-9a-f]+|\b[0-9a-f]{12,}\b|\d+(\.\d+)?", "#", self.text)


def classify_error(error: BaseException) -> Failure:
    """The failure that an error is, as its innermost error tells."""
    cause = find_cause(error)
    return Failure(_classify(cause), _shorten_middle(_format_error(cause)))


@contextmanager
def locate_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    """Give errors of writing the name of the file: it is missing where the kernel refuses bytes of an open file, and
    libraries in Rust raise an error of their own.
    """
    try:
        yield
    except Exception as error:
        number = _find_errno(error)
        if not number or getattr(error, "filename", None):
            raise
        raise OSError(number, os.strerror(number), os.fspath(path)) from None


def _find_errno(error: BaseException) -> int:
    """The number of a file system's error, which libraries in Rust put in its text; 0 for another error."""
    if isinstance(error, OSError | ValueError):
        return getattr(error, "errno", None) or 0
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else 0


def find_cause(error: BaseException) -> BaseException:
    """The error at the core of Ray's wrappers; an error of any other kind is returned as it is."""
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
    names = _class_names(error)
    if "WorkerGroupError" in names:
        failures = getattr(error, "worker_failures", {}).values()
        return min(map(find_cause, failures), key=_classify, default=None)
    for name, attribute in (
        ("RayTaskError", "cause"),
        ("UserExceptionWithTraceback", "_base_exc"),
        ("ControllerError", "controller_failure"),
        ("WorkerHealthCheckFailedError", "health_check_failure"),
    ):
        inner = getattr(error, attribute, None) if name in names else None
        if isinstance(inner, BaseException):
            # Ray Data's wrapper loses its cause when it is pickled; the stack trace still ends the cause's part with it
            if "UserCodeException" in _class_names(inner) and inner.__cause__ is None:
                return _parse_trace(str(error)) or inner
            return inner
    if "UserCodeException" in names:
        return error.__cause__
    if "ActorDiedError" in names and getattr(error, "actor_init_failed", False):
        return _parse_trace(str(error))
    return None


def _parse_trace(trace: str) -> BaseException | None:
    """The last error of a stack trace that is not Ray's wrapper, as a new exception; None where there is none."""
    for part in reversed(_CHAIN_SEPARATOR.split(trace)):
        lines = part.strip().splitlines()
        frames = [number for number, line in enumerate(lines) if line.startswith("  File ")]
        rest = lines[frames[-1] + 1 if frames else 1 :]
        while rest and rest[0].startswith("    "):  # the frame's line of code
            rest = rest[1:]
        found = _ERROR_LINE.match("\n".join(rest))
        if found and not found[1].startswith("ray."):
            return _rebuild_error(found[1].rpartition(".")[2], (found[2] or "").strip())
    return None


def _rebuild_error(name: str, text: str) -> BaseException:
    known = getattr(builtins, name, None)
    if not (isinstance(known, type) and issubclass(known, Exception)):
        return type(name, (Exception,), {})(text)
    number = re.match(r"\[Errno (\d+)\] ([^:]*)(?:: '(.*)')?", text) if issubclass(known, OSError) else None
    return OSError(int(number[1]), number[2], number[3]) if number else known(text)


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
    """An error in one line: an error of a file names the file, the fault and what mends it."""
    if isinstance(error, OSError) and error.errno is not None and error.strerror:
        where = " -> ".join(os.fsdecode(name) for name in _file_names(error))
        hint = f"; {ERRNO_HINTS[error.errno]}" if error.errno in ERRNO_HINTS else ""
        return f"{where}: {error.strerror}{hint}" if where else f"{error.strerror}{hint}"
    name, text = type(error).__name__, " ".join(str(error).split())
    hint = f"; {CLASS_HINTS[name]}" if name in CLASS_HINTS else ""
    if isinstance(error, ValueError | ImportError) and text:
        return text
    # an OSError without a number is one of pipelines.core.storage, which names the place itself
    return (text if type(error) in (OSError, PermanentError) and text else f"{name}: {text}" if text else name) + hint


def _file_names(error: OSError) -> Iterable[str | bytes]:
    return (name for name in (error.filename, error.filename2) if isinstance(name, str | bytes))


def _shorten_middle(text: str) -> str:
    if len(text) <= MAX_REASON_CHARACTERS:
        return text
    half = MAX_REASON_CHARACTERS // 2
    return f"{text[:half]} [...] {text[-half:]}"
