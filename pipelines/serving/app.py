"""The server on Ray Serve: a gateway that speaks the protocol, and replicas that have the model.

gateway    checks key, size and content of a request, and turns events into objects of the protocol; without torch
replica    holds the model and answers in batches (`pipelines.serving.engine`); one process, or a share of a GPU, each

A request survives the death of its replica: the gateway gives it to another one, or to the one that Ray Serve starts in
its place, and skips the text that the client has already. So a sampled answer without a seed gets one here.
"""

import asyncio
import hmac
import json
import logging
import random
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit
from weakref import WeakSet

import ray
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.config import HTTPOptions
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import ApplicationStatus, LoggingConfig
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse

from pipelines.core import failures
from pipelines.serving import protocol
from pipelines.serving.events import FailureEvent, PromptEvent, RefusalEvent, TextEvent, TraceEvent
from pipelines.serving.protocol import ChatRequest, Completion
from pipelines.serving.settings import ServedModel, ServerSettings, is_loopback
from redux.messages import Message, Sampling, check_messages

APPLICATION = "redux"
"""Name of the application in Ray Serve."""

PAGE = Path(__file__).parents[1] / "templates" / "chat.html"
"""The demo page."""

PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; img-src data: blob:; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'; connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}

CONTROLLER = {"name": "SERVE_CONTROLLER_ACTOR", "namespace": "serve"}
"""Ray's name of the actor that a running Ray Serve has."""

BODY_S = 60.0
"""Seconds until a client must have sent its request."""

RECOVERY_S = 120.0
"""Seconds for which a request asks again for a replica in place of a dead one."""

FAILED_REPLICA_S = 60.0
"""Seconds after which a replica that could not load the model is replaced."""

RETRY_S = 0.5
"""Seconds between two tries."""

_logger = logging.getLogger("ray.serve")


class AnswerCall(NamedTuple):
    """A conversation for a replica.

    Args:
        model: name of the model.
        messages: the conversation.
        sampling: how to answer it.
        traces: add what the method did.
    """

    model: str
    messages: list[Message]
    sampling: Sampling
    traces: bool


class RequestError(Exception):
    """A request that is refused.

    Args:
        status: HTTP status.
        message: text for the client.
        kind: type of the error in the protocol.
        code: code of the error in the protocol.
    """

    def __init__(self, status: int, message: str, kind: str = "invalid_request_error", code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.kind, self.code = status, message, kind, code

    def build_response(self) -> Response:
        """Build the response with the error."""
        headers = {"Retry-After": "1"} if self.status in (429, 503) else None
        return JSONResponse(protocol.build_error(self.message, self.kind, self.code), self.status, headers)


class ModelReplica:
    """A copy of the model, as a deployment of Ray Serve."""

    def __init__(self, served: ServedModel, max_batch_size: int) -> None:
        # Heavy packages are imported here, since the gateway does without them.
        from pipelines.serving.engine import BatchingEngine
        from pipelines.serving.loading import load_models

        # A problem is a value, since Ray Serve would restart a replica without end if its constructor raised.
        self.problem = ""
        self.engine: BatchingEngine | None = None
        self.started_at = time.monotonic()
        try:
            self.engine = BatchingEngine(load_models(served), max_batch_size)
        except Exception as error:
            _logger.exception("the model cannot be loaded")
            self.problem = failures.classify_error(error).text

    def find_problem(self) -> str:
        """Return why the model cannot be served, or ""."""
        return self.problem

    def check_health(self) -> None:
        """Raise if the engine has ended or could not start; Ray Serve then replaces the replica."""
        if self.engine and not self.engine.is_alive:
            raise RuntimeError("the engine has ended")
        if self.problem and time.monotonic() - self.started_at > FAILED_REPLICA_S:
            raise RuntimeError(self.problem)

    def count_conversations(self) -> int:
        """Count the conversations that wait or are answered. Raises as `check_health`."""
        self.check_health()
        return self.engine.count_conversations() if self.engine else 0

    async def answer(self, call: AnswerCall) -> AsyncIterator[Any]:
        """Answer a conversation: a RefusalEvent, or a PromptEvent and the events of the engine."""
        from pipelines.serving.engine import Ticket

        if self.engine is None:
            yield FailureEvent(f"the model cannot be loaded: {self.problem}")
            return
        try:
            chat = await asyncio.to_thread(self.engine.models[call.model].encode, call.messages)
        except ValueError as error:
            yield RefusalEvent(str(error))
            return
        yield PromptEvent(len(chat.input_ids), chat.image_tokens, chat.image_tokens_before)
        loop, events = asyncio.get_running_loop(), asyncio.Queue[Any]()

        def deliver(event: Any) -> None:
            loop.call_soon_threadsafe(events.put_nowait, event)

        # The events come from the thread of the engine.
        ticket = Ticket(call.model, chat, call.sampling, call.traces, deliver)
        self.engine.submit(ticket)
        try:
            while True:
                event = await events.get()
                yield event
                is_last_text = isinstance(event, TextEvent) and event.finish_reason and not call.traces
                if is_last_text or isinstance(event, FailureEvent | TraceEvent):
                    return
        finally:  # Also if the client has left
            ticket.is_cancelled = True


class _RequestSlot:
    """A request in progress. It ends with its last reference, also if the client leaves before the answer begins."""


class Gateway:
    """The HTTP side of the server, as a deployment of Ray Serve."""

    def __init__(self, settings: ServerSettings, replica: DeploymentHandle) -> None:
        self.settings, self.replica = settings, replica
        self.created = int(time.time())
        self.slots: WeakSet[_RequestSlot] = WeakSet()
        self.page = PAGE.read_text(encoding="utf-8")

    async def __call__(self, request: Request) -> Response:
        """Route a request; every error is a response in the form of the protocol."""
        routes = {
            "/": ("GET", self._show_page),
            "/health": ("GET", self._check_health),
            "/v1/models": ("GET", self._list_models),
            "/v1/chat/completions": ("POST", self._complete),
        }
        try:
            # DNS rebinding: the name of another site may resolve to this address.
            self._check_host(request)
            # A slash at the end is ignored.
            path = request.url.path.removesuffix("/") or "/"
            if path not in routes:
                raise RequestError(404, f"got {path}, allowed: {', '.join(routes)}", code="not_found")
            method, handle = routes[path]
            # HTTP allows HEAD wherever it allows GET.
            if request.method != method and (request.method, method) != ("HEAD", "GET"):
                raise RequestError(405, f"got {request.method}, allowed: {method}", code="method_not_allowed")
            if path.startswith("/v1/"):
                self._check_key(request)
            return await handle(request)
        except RequestError as error:
            return error.build_response()
        except ClientDisconnect:
            return Response(status_code=400)
        except Exception as error:
            return _describe_bug(error).build_response()

    def _check_host(self, request: Request) -> None:
        """Refuse names other than this machine's on a loopback address: they are from pages of other sites."""
        host = urlsplit(f"//{request.headers.get('host', '')}").hostname or ""
        if is_loopback(self.settings.host) and not is_loopback(host):
            raise RequestError(403, f"got host {host!r}, allowed: localhost or a loopback address")

    def _check_key(self, request: Request) -> None:
        key = self.settings.api_key
        if key is None:
            return
        scheme, _, sent_key = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(sent_key.strip().encode(), key.encode()):
            raise RequestError(
                401, "got no key or a wrong one, allowed: Authorization: Bearer KEY", code="invalid_api_key"
            )

    async def _show_page(self, request: Request) -> Response:
        return HTMLResponse(self.page, headers=PAGE_HEADERS)

    async def _check_health(self, request: Request) -> Response:
        try:
            async with asyncio.timeout(5):
                count = await self.replica.count_conversations.remote()
        except Exception as error:  # Whatever the reason, the model does not answer
            raise RequestError(503, f"the model does not answer: {type(error).__name__}", "server_error") from None
        return JSONResponse({"status": "ok", "conversations": count})

    async def _list_models(self, request: Request) -> Response:
        return JSONResponse(protocol.build_model_list(self.settings.model.names, self.created))

    async def _complete(self, request: Request) -> Response:
        limit = self.settings.limits.concurrent
        if len(self.slots) >= limit:
            raise RequestError(429, f"got more than {limit} requests at a time", "rate_limit_error", "busy")
        # Counted before the body is read, so that waiting clients cannot fill the memory.
        slot = _RequestSlot()
        self.slots.add(slot)
        chat_request = await self._read_request(request)
        call = await self._build_call(chat_request)
        events = self._iterate_events(call)
        first_event = await anext(events)
        # From here on the answer has begun, so errors before this line have a status.
        if isinstance(first_event, RefusalEvent):
            raise RequestError(400, first_event.message)
        if isinstance(first_event, FailureEvent):
            raise RequestError(503, first_event.message, "server_error")
        completion = Completion(chat_request.model)
        if chat_request.stream:
            lines = self._stream(completion, chat_request, first_event, events, slot)
            return StreamingResponse(lines, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        return JSONResponse(await _collect(completion, first_event, events))

    async def _read_request(self, request: Request) -> ChatRequest:
        """Read and parse the body within the limits."""
        content_type = request.headers.get("content-type", "").partition(";")[0].strip()
        if content_type != "application/json":
            raise RequestError(415, f"content-type: got {content_type or 'none'}, allowed: application/json")
        limit = self.settings.limits.body_bytes
        too_large = RequestError(413, f"got more bytes, allowed: up to {limit}", code="too_large")
        # Refuse by the header before anything of the body is read.
        length = request.headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > limit:
            raise too_large
        # A client may send more than its header says, or no header.
        body = bytearray()
        try:
            async with asyncio.timeout(BODY_S):
                async for part in request.stream():
                    body += part
                    if len(body) > limit:
                        raise too_large
        except TimeoutError:
            raise RequestError(408, f"got no whole request within {BODY_S:g} s") from None
        try:
            return protocol.parse_request(bytes(body))
        except (ValueError, RecursionError) as error:
            raise RequestError(400, str(error)) from None

    async def _build_call(self, chat_request: ChatRequest) -> AnswerCall:
        names = self.settings.model.names
        if chat_request.model not in names:
            allowed = ", ".join(names)
            raise RequestError(404, f"model: got {chat_request.model!r}, allowed: {allowed}", code="model_not_found")
        limits = self.settings.limits
        try:
            sampling = chat_request.build_sampling(limits)
            # Images are decoded or fetched in a thread, so that other requests go on.
            messages = await asyncio.to_thread(chat_request.build_messages, limits)
            check_messages(messages)
        except ValueError as error:
            raise RequestError(400, str(error)) from None
        if sampling.seed is None:
            sampling = replace(sampling, seed=random.getrandbits(32))
        return AnswerCall(chat_request.model, messages, sampling, chat_request.redux.trace)

    async def _iterate_events(self, call: AnswerCall) -> AsyncIterator[Any]:
        """Yield the events of an answer, once each, however many replicas die meanwhile."""
        prompt_sent = False
        sent_characters = 0
        deadline: float | None = None
        while True:
            # A new replica repeats the answer from its beginning.
            skip = sent_characters
            try:
                async for event in self.replica.options(stream=True).answer.remote(call):
                    deadline = None
                    if isinstance(event, PromptEvent):
                        if not prompt_sent:
                            yield event
                        prompt_sent = True
                    elif isinstance(event, TextEvent):
                        text = event.text[skip:]
                        skip = max(skip - len(event.text), 0)
                        sent_characters += len(text)
                        if text or event.finish_reason or not skip:
                            yield event._replace(text=text)
                    else:
                        yield event
                return
            except RayActorError:
                deadline = deadline or time.monotonic() + RECOVERY_S
                if time.monotonic() > deadline:
                    raise RequestError(503, "the model does not answer", "server_error") from None
                await asyncio.sleep(RETRY_S)

    async def _stream(
        self,
        completion: Completion,
        chat_request: ChatRequest,
        prompt: PromptEvent,
        events: AsyncIterator[Any],
        slot: "_RequestSlot",
    ) -> AsyncIterator[str]:
        """Yield the lines of a stream of server-sent events. The slot is in use as long as the generator exists."""
        tokens = 0
        try:
            yield _format_event(completion.build_chunk({"role": "assistant", "content": ""}))
            async for event in events:
                if isinstance(event, TextEvent):
                    tokens = event.tokens
                    if event.text:
                        yield _format_event(completion.build_chunk({"content": event.text}))
                    if event.finish_reason:
                        yield _format_event(completion.build_chunk({}, event.finish_reason))
                elif isinstance(event, TraceEvent):
                    yield _format_event(completion.build_last_chunk(redux=event.trace))
                elif isinstance(event, FailureEvent):
                    yield _format_event(protocol.build_error(event.message, "server_error"))
            if chat_request.stream_options and chat_request.stream_options.include_usage:
                yield _format_event(completion.build_last_chunk(usage=_build_usage(prompt, tokens)))
            yield "data: [DONE]\n\n"
        except Exception as error:  # The status is sent already
            reported = error if isinstance(error, RequestError) else _describe_bug(error)
            yield _format_event(protocol.build_error(reported.message, reported.kind, reported.code))


def _describe_bug(error: Exception) -> RequestError:
    """Describe an error that nobody expects: its class for the client, all of it for the log."""
    _logger.error("a request failed", exc_info=error)
    return RequestError(500, f"{type(error).__name__}; the log of the server has the details", "server_error")


async def _collect(completion: Completion, prompt: PromptEvent, events: AsyncIterator[Any]) -> dict[str, Any]:
    """Collect the events of an answer into one object of the protocol."""
    texts: list[str] = []
    tokens, finish_reason, additions = 0, "stop", {}
    async for event in events:
        if isinstance(event, TextEvent):
            texts.append(event.text)
            tokens, finish_reason = event.tokens, event.finish_reason or finish_reason
        elif isinstance(event, TraceEvent):
            additions["redux"] = event.trace
        elif isinstance(event, FailureEvent):
            raise RequestError(500, event.message, "server_error")
    response = completion.build_response("".join(texts), finish_reason, _build_usage(prompt, tokens))
    return {**response, **additions}


def _build_usage(prompt: PromptEvent, tokens: int) -> dict[str, Any]:
    return protocol.build_usage(prompt.tokens, tokens, prompt.image_tokens, prompt.image_tokens_before)


def _format_event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"


def start_server(settings: ServerSettings, has_gpus: bool) -> None:
    """Start the server in the current Ray session, and return when it answers.

    Args:
        settings: address, model and limits.
        has_gpus: give each replica its share of a GPU.

    Raises:
        ValueError: Ray Serve runs already, or the model cannot be served.
    """
    if is_started():
        raise ValueError("RAY_ADDRESS: got a cluster in which Ray Serve runs already, allowed: one without")
    # Access and state go to files of the Ray session; the terminal has only lines of ours.
    _logger.setLevel(logging.CRITICAL)
    serve.start(
        proxy_location="HeadOnly",
        http_options=HTTPOptions(host=settings.host, port=settings.port),
        logging_config=LoggingConfig(log_level="WARNING", enable_access_log=False),
    )
    replica = serve.deployment(
        num_replicas=settings.replicas,
        max_ongoing_requests=2 * settings.limits.concurrent,
        ray_actor_options={"num_cpus": 0 if has_gpus else 1, "num_gpus": settings.gpu_share if has_gpus else 0},
        health_check_period_s=2,
        graceful_shutdown_timeout_s=2,
        # A process that dies while it loads the model, as without memory.
        max_constructor_retry_count=2,
    )(ModelReplica)
    gateway = serve.deployment(
        # Beyond the limit of requests the gateway itself answers, with status 429.
        max_ongoing_requests=100 * settings.limits.concurrent,
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=2,
    )(Gateway)
    replica_app = replica.bind(settings.model, settings.max_batch_size)
    try:
        serve.run(gateway.bind(settings, replica_app), name=APPLICATION, route_prefix="/")
    except RuntimeError as error:
        raise ValueError(f"{settings.model.path}: cannot be served: {error}") from None
    if problem := serve.get_deployment_handle("ModelReplica", APPLICATION).find_problem.remote().result():
        raise ValueError(problem)


def is_started() -> bool:
    """Return True if Ray Serve runs in the current Ray session."""
    try:
        ray.get_actor(**CONTROLLER)
    except ValueError:
        return False
    return True


def all_replicas_run() -> bool:
    """Return True if all replicas answer; False while Ray Serve replaces one."""
    return bool(serve.status().applications[APPLICATION].status == ApplicationStatus.RUNNING)
