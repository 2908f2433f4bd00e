"""Sources of models: a mistyped folder is named at once, and a store that is away is told apart from a wrong URL."""

import errno
import http.server
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from botocore.exceptions import EndpointConnectionError, NoCredentialsError
from huggingface_hub import constants

from redux.hub import check_source, explain_error, local_copy


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (EndpointConnectionError(endpoint_url="http://127.0.0.1:9"), OSError),
        (TimeoutError("no answer"), OSError),
        (OSError(errno.ENOSPC, "No space left on device"), OSError),
        (NoCredentialsError(), ValueError),
        (FileNotFoundError("bucket/model"), ValueError),
        (PermissionError("Access Denied"), ValueError),
        (ImportError("Install s3fs to access S3"), ValueError),
    ],
)
def test_only_what_the_same_url_meets_again_is_a_mistake(error: Exception, kind: type[Exception]) -> None:
    told = explain_error(error, "model: got s3://bucket/model", "a folder that can be read")
    assert type(told) is kind
    assert str(told).startswith("model: got s3://bucket/model")
    assert str(told).endswith(f"{type(error).__name__}: {error}")


# --- folders and hub ids -------------------------------------------------------------------------------------------


class HubServer(http.server.ThreadingHTTPServer):
    """Server on this machine that records the paths of requests for models."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.requests = list[str]()


class HubHandler(http.server.BaseHTTPRequestHandler):
    """A hub with the public model `org/known` alone."""

    server: HubServer

    def do_GET(self) -> None:
        if self.path.startswith("/api/models/"):
            self.server.requests.append(self.path)
        is_known = self.path.endswith("/org/known")
        body = b'{"id": "org/known", "_id": "1", "modelId": "org/known"}' if is_known else b"{}"
        self.send_response(200 if is_known else 404)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if not is_known:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Print nothing."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    """A hub on this machine with an empty cache, and a working folder with the folders `runs/quickstart` and `mine`."""
    server = HubServer()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    (tmp_path / "runs/quickstart").mkdir(parents=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "photo.png").touch()
    monkeypatch.chdir(tmp_path)
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("runs/quikstart", "there is no folder runs/quikstart (did you mean runs/quickstart?)"),
        ("runs/other", "there is no folder runs/other"),
        ("./mine", None),
        ("./minee", "there is no folder ./minee (did you mean ./mine?)"),
        ("/gone/model", "there is no folder /gone/model"),
        ("a/b/c", "there is no folder a/b/c"),
        ("two words", "there is no folder two words"),
        ("photo.png", "photo.png is a file, not a folder"),
        ("s3://bucket/model", None),
    ],
)
def test_a_name_that_is_no_hub_id_is_refused_without_the_hub(hub: HubServer, name: str, problem: str | None) -> None:
    if problem:
        line = f"MODEL: got {name}, allowed: a folder, hub id or URL of a model; {problem}"
        with pytest.raises(ValueError, match=f"^{re.escape(line)}$"):
            check_source(name, "MODEL")
    else:
        check_source(name, "MODEL")
    assert hub.requests == []


def test_a_hub_id_is_looked_up_once(hub: HubServer, tmp_path: Path) -> None:
    check_source("org/known", "MODEL")
    with pytest.raises(ValueError, match=r"there is no folder mien \(did you mean mine\?\), and http:.* has no public"):
        check_source("mien", "MODEL")
    with pytest.raises(ValueError, match=r"^model: got org/gone, .* no folder org/gone, and http:.* has no public"):
        next(local_copy("org/gone", label="model").gen)
    # A copy in the cache needs no hub.
    (tmp_path / "cache/models--org--cached/snapshots").mkdir(parents=True)
    check_source("org/cached", "MODEL")
    asked = [path.removeprefix("/api/models/") for path in hub.requests]
    assert asked == ["org/known", "mien", "org/gone"]


def test_a_hub_that_is_away_is_named_in_one_line(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ValueError, match=r"there is no folder org/gone, and http://127\.0\.0\.1:9 cannot be asked for"):
        check_source("org/gone", "MODEL")
    assert not caplog.records, "no retries"
