"""The gateway without Ray: who may ask, and what becomes of a request whose replica fails."""

from collections.abc import AsyncIterator
from typing import Any

import pytest
from ray.exceptions import RayActorError
from starlette.testclient import TestClient

from pipelines.serving import app
from pipelines.serving.app import AnswerCall
from pipelines.serving.events import FailureEvent, PromptEvent, TextEvent
from pipelines.serving.settings import RequestLimits, ServedModel, ServerSettings
from tests.pipelines.serving.local_gateway import build_app

WORDS = ["A ", "red ", "circle", "."]


class FailingReplica:
    """A replica that dies after some words, as often as it is told, and then answers whole."""

    def __init__(self, *deaths: int, error: Exception | None = None) -> None:
        self.deaths, self.calls, self.error = [*deaths], list[AnswerCall](), error or RayActorError()

    def count_conversations(self) -> int:
        return 0

    async def answer(self, call: AnswerCall) -> AsyncIterator[Any]:
        self.calls.append(call)
        death = self.deaths.pop(0) if self.deaths else len(WORDS)
        yield PromptEvent(5, 0, 0)
        for number, word in enumerate(WORDS, 1):
            if number > death:
                raise self.error
            yield TextEvent(word, number, "stop" if number == len(WORDS) else None)


@pytest.fixture(autouse=True)
def no_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "RETRY_S", 0)


def connect(replica: Any, **options: Any) -> TestClient:
    settings = ServerSettings(model=ServedModel(name="m", path="m"), **options)
    return TestClient(build_app(settings, replica), base_url="http://localhost", raise_server_exceptions=False)


def ask(client: TestClient, **options: Any) -> Any:
    body = {"model": "m", "messages": [{"role": "user", "content": "What?"}], **options}
    return client.post("/v1/chat/completions", json=body)


@pytest.mark.parametrize("deaths", [(), (0,), (2,), (3, 1), (1, 2, 3)])
def test_an_answer_is_whole_however_many_replicas_die(deaths: tuple[int, ...]) -> None:
    replica = FailingReplica(*deaths)
    client = connect(replica)
    answer = ask(client, temperature=1).json()
    assert answer["choices"][0]["message"]["content"] == "A red circle."
    assert answer["usage"]["completion_tokens"] == len(WORDS)
    assert len(replica.calls) == len(deaths) + 1
    # Each replica draws the same tokens.
    assert len({call.sampling.seed for call in replica.calls}) == 1
    assert replica.calls[0].sampling.seed is not None


@pytest.mark.parametrize("deaths", [(0,), (3, 1)])
def test_a_stream_repeats_no_text(deaths: tuple[int, ...]) -> None:
    lines = ask(connect(FailingReplica(*deaths)), stream=True).text
    assert lines.count('"role"') == 1
    for word in WORDS:
        assert lines.count(f'"content": "{word}"') == 1
    assert lines.count('"finish_reason": "stop"') == 1
    assert lines.endswith("data: [DONE]\n\n")


def test_without_any_replica_the_request_ends_with_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "RECOVERY_S", 0)
    refused = ask(connect(FailingReplica(*[0] * 1000)))
    assert refused.status_code == 503
    assert refused.headers["retry-after"] == "1"
    assert '"error"' in ask(connect(FailingReplica(*[2] * 1000)), stream=True).text


def test_a_bug_is_an_error_of_the_protocol() -> None:
    refused = ask(connect(FailingReplica(0, error=KeyError("inner secret"))))
    assert refused.status_code == 500
    assert "KeyError" in refused.json()["error"]["message"]
    assert "secret" not in refused.text
    assert "KeyError" in ask(connect(FailingReplica(1, error=KeyError("inner"))), stream=True).text


def test_a_replica_without_a_model_is_an_error() -> None:
    class EmptyReplica(FailingReplica):
        async def answer(self, call: AnswerCall) -> AsyncIterator[Any]:
            yield FailureEvent("the model cannot be loaded: no such folder")

    refused = ask(connect(EmptyReplica()))
    assert refused.status_code == 503
    assert "no such folder" in refused.json()["error"]["message"]


def test_without_a_key_a_loopback_address_is_open_to_local_names_alone() -> None:
    client = connect(FailingReplica())
    assert ask(client).status_code == 200
    for host, status in (
        ("127.0.0.1:8000", 200),
        ("[::1]:8000", 200),
        ("LOCALHOST", 200),
        ("evil.org", 403),
        ("", 403),
    ):
        assert client.get("/v1/models", headers={"Host": host}).status_code == status


def test_with_a_key_a_public_address_has_any_name() -> None:
    client = connect(FailingReplica(), host="0.0.0.0", api_key="k")
    assert client.get("/", headers={"Host": "example.org"}).status_code == 200
    assert client.get("/v1/models", headers={"Host": "example.org"}).status_code == 401
    assert client.get("/v1/models", headers={"Host": "example.org", "Authorization": "bearer k"}).status_code == 200


def test_the_page_may_load_nothing_from_elsewhere() -> None:
    page = connect(FailingReplica()).get("/")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "frame-ancestors 'none'" in page.headers["content-security-policy"]
    for mark in ("https://", "http://www", '<link rel="stylesheet', "<script src"):
        assert mark not in page.text


def test_the_body_is_limited_also_without_its_length() -> None:
    client = connect(FailingReplica(), limits=RequestLimits(body_bytes=1000))
    headers = {"Content-Type": "application/json"}
    parts = (b" " * 100 for _ in range(20))
    assert client.post("/v1/chat/completions", content=parts, headers=headers).status_code == 413
    assert client.post("/v1/chat/completions", content=b" " * 1001, headers=headers).status_code == 413
