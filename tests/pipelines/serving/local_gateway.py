"""The gateway and a replica in the process of the tests, behind a real port, without Ray."""

import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from pipelines.serving.app import Gateway, ModelReplica
from pipelines.serving.settings import ServerSettings


class LocalMethod:
    """A method of the replica, called as through a handle of Ray Serve."""

    def __init__(self, method: Callable[..., Any]) -> None:
        self.method = method

    def remote(self, *arguments: Any) -> Any:
        result = self.method(*arguments)
        return result if isinstance(result, AsyncIterator) else _return(result)


class LocalHandle:
    """Stands for a handle of Ray Serve."""

    def __init__(self, replica: Any) -> None:
        self._replica = replica

    def options(self, **_: Any) -> "LocalHandle":
        return self

    def __getattr__(self, name: str) -> LocalMethod:
        return LocalMethod(getattr(self._replica, name))


async def _return(value: Any) -> Any:
    return value


def build_app(settings: ServerSettings, replica: Any) -> ASGIApp:
    """Build an application of the gateway and a replica."""
    gateway = Gateway(settings, LocalHandle(replica))  # type: ignore[arg-type]

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        response = await gateway(Request(scope, receive))
        await response(scope, receive, send)

    return app


@contextmanager
def serve_locally(settings: ServerSettings) -> Iterator[str]:
    """Serve a model on a free port for the length of a with block; yields the URL."""
    replica = ModelReplica(settings.model, settings.max_batch_size)
    assert replica.engine, replica.problem
    config = uvicorn.Config(build_app(settings, replica), port=0, lifespan="off", log_level="error")
    server = uvicorn.Server(config)
    sockets = [config.bind_socket()]
    sockets[0].listen()  # so that callers wait until the server has started
    thread = threading.Thread(target=server.run, args=(sockets,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        replica.engine.close()
