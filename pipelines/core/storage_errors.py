"""Errors of stores: whether a retry may help, and their text for the user.

The errors of all libraries behind fsspec are told apart by error codes, HTTP statuses and names of classes, because few
of the libraries are installed.
"""

import re
from collections.abc import Iterable

EXPIRED_CREDENTIALS = "expired credentials"
"""Kind of the errors after which a new filesystem reads the credentials again."""

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
"""Kinds of transient errors by error code of S3 and compatible stores."""

TRANSIENT_STATUSES = {408: "time-out", 429: "throttled", 503: "throttled"}
"""Kinds of transient errors by HTTP status, for stores whose responses have no code."""

TRANSIENT_CLASSES = {
    **dict.fromkeys(("TimeoutError", "Timeout", "TimeoutException"), "time-out"),
    **dict.fromkeys(("IncompleteRead", "IncompleteReadError", "ResponseStreamingError"), "truncated body"),
    **dict.fromkeys(("ClientPayloadError", "FlexibleChecksumError"), "truncated body"),
    **dict.fromkeys(("ConnectionError", "ClientConnectionError", "TransportError", "HTTPClientError"), "connection"),
    "ResponseParserError": "server error",
}
"""Kinds of transient errors without a response, by class name; the first match counts."""


def find_transient_kind(error: BaseException) -> str | None:
    """Return the kind of a transient error, or None for an error that stays."""
    code, status = parse_response(error)
    if code in TRANSIENT_CODES:
        return TRANSIENT_CODES[code]
    classes = {base.__name__ for cause in _iterate_causes(error) for base in type(cause).__mro__}
    for name, kind in TRANSIENT_CLASSES.items():
        if name in classes:
            return kind
    return TRANSIENT_STATUSES.get(status, "server error" if status >= 500 else None)


def parse_response(error: BaseException) -> tuple[str, int]:
    """Return the store's error code and HTTP status from a library's error; ("", 0) without a response."""
    for cause in _iterate_causes(error):
        response = getattr(cause, "response", None)
        if isinstance(response, dict):  # botocore
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            return str(response.get("Error", {}).get("Code", "")), int(status)
        # requests, httpx, aiohttp and gcsfs keep the status in different attributes.
        for owner, name in ((response, "status_code"), (cause, "status_code"), (cause, "status"), (cause, "code")):
            status = getattr(owner, name, None)
            if isinstance(status, int) and 400 <= status < 600:
                return str(status), status
    return "", 0


def _iterate_causes(error: BaseException | None) -> Iterable[BaseException]:
    """Yield the error, its cause, the cause of that, and so on."""
    while error is not None:
        yield error
        error = error.__cause__


def to_user_error(url: str, error: Exception, is_local: bool) -> Exception:
    """Turn a permanent error into one that names the URL and the remedy. Other errors, such as bugs, are returned.

    Args:
        url: the file or folder.
        error: error of a library.
        is_local: the URL is a path on this machine, whose errors have a number.
    """
    name, message = redact(url), describe_cause(error)
    if isinstance(error, ImportError):
        return ValueError(f"{name}: a package is missing: {message}")
    if isinstance(error, FileExistsError | NotADirectoryError):
        return ValueError(f"{name}: {message}, allowed: a path whose folders are folders")
    if isinstance(error, FileNotFoundError | IsADirectoryError):
        # A store says which part is missing, such as the bucket.
        detail = "" if is_local and isinstance(error, FileNotFoundError) else f"; {message}"
        return ValueError(f"{name}: not found, allowed: an existing file{detail}")
    if isinstance(error, PermissionError) or "Credential" in type(error).__name__:
        return ValueError(f"{name}: access denied, allowed: credentials with permission; {message}")
    if isinstance(error, EOFError) or parse_response(error)[1] == 416:
        return ValueError(f"{name}: bytes past its end were requested; {message}")
    if isinstance(error, ValueError) or any(base.__name__ == "BotoCoreError" for base in type(error).__mro__):
        return ValueError(f"{name}: {message}, allowed: a path, or a URL such as s3://bucket/key")
    if isinstance(error, OSError) and error.errno and error.strerror and is_local:
        return OSError(error.errno, error.strerror, name)
    return OSError(f"{name}: {message}") if isinstance(error, OSError) else error


def describe_cause(error: BaseException) -> str:
    """Format the first cause of an error as one line."""
    *_, first = _iterate_causes(error)
    text = " ".join(str(first).split())
    return redact(f"{type(first).__name__}: {text}" if text else type(first).__name__)


def redact(text: str) -> str:
    """Remove possible credentials from a text with URLs: user:password@ and the query of a signed URL."""
    return re.sub(r"(?<=://)[^/\s@]*@|\?\S*", "", text)
