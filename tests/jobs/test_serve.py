"""`redux serve` as its users, its operators and its attackers see it: one real server, with a key, for all tests.

The tests run in the order of the file: those that harm the server come after those that only ask it.
"""

import http.client
import io
import json
import re
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from openai import APIStatusError, OpenAI
from PIL import Image

from jobs import serve
from pipelines.serving import app
from redux.answering import load
from redux.chat import ChatModel, choose_methods, load_chat_model
from redux.messages import Message, Sampling
from tests.jobs import chatty
from tests.jobs.command_line import run_command
from tests.jobs.stops import Command, start_command
from tests.pipelines.serving.test_protocol import claim_size, encode_image, make_url, show
from tests.waiting import wait_until

pytestmark = pytest.mark.integration

KEY = "secret"
NAME = "m"
MAX_REQUESTS = 8
EVENT_S = 300
"""Limit of the wait for an event."""

IMAGE = encode_image(40, 30)
OTHER_IMAGE = encode_image(30, 40)
QUESTION = "What colour is the shape?"


@dataclass(frozen=True)
class Server:
    """A running server.

    Args:
        command: the command.
        port: its port.
        model: folder of the model.
        memory: bytes of each of its processes after the start, by process ID.
    """

    command: Command
    port: int
    model: Path
    memory: dict[int, int]

    @property
    def client(self) -> OpenAI:
        """OpenAI's client, without retries."""
        return OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key=KEY, max_retries=0, timeout=EVENT_S)

    def ask(self, content: Any, **options: Any) -> Any:
        """Ask one question with OpenAI's client."""
        messages = content if isinstance(content, list) and "role" in content[0] else [user(content)]
        return self.client.chat.completions.create(model=NAME, messages=messages, **{"max_tokens": 6, **options})

    def send(
        self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> tuple[int, bytes]:
        """Send a request with the key and JSON's content type, unless headers replace them."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=EVENT_S)
        default = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
        try:
            connection.request(method, path, body, {**default, **(headers or {})})
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def count_conversations(self) -> int:
        """Count the conversations that wait or are answered."""
        return int(json.loads(self.send("GET", "/health")[1])["conversations"])

    def find_replicas(self) -> list[psutil.Process]:
        """Find the processes that have the model."""
        return [
            process for process in self.command.iterate_processes() if "ModelReplica" in " ".join(process.cmdline())
        ]


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def text(content: str) -> dict[str, str]:
    return {"type": "text", "text": content}


def measure_memory(command: Command) -> dict[int, int]:
    """Measure the memory of each process without files, whose pages count differently as other processes map them."""
    memory = {}
    for process in command.iterate_processes():
        with suppress(psutil.NoSuchProcess):
            memory[process.pid] = sum(mapped.anonymous for mapped in process.memory_maps(grouped=True))
    return memory


def find_free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served") / NAME
    chatty.save_model(folder)
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    port = find_free_port()
    options = ["--port", str(port), "--compare", "--max-requests", str(MAX_REQUESTS), "--max-new-tokens", "32000"]
    with start_command(["serve", str(folder), *options], {"REDUX_API_KEY": KEY}, with_forks=True) as command:
        command.wait_for("Ctrl-C stops it")
        server = Server(command, port, folder, {})
        server.ask([show(make_url(IMAGE)), text(QUESTION)])  # the first answer imports further parts
        yield Server(command, port, folder, measure_memory(command))


@pytest.fixture(scope="module")
def model(folder: Path) -> ChatModel:
    """The same model in this process."""
    return load_chat_model(folder)


def answer_here(model: ChatModel, *messages: Message, **options: Any) -> str:
    sampling = Sampling(**{"max_new_tokens": 6, **options})
    return model.generate([model.encode(messages)], [sampling], lambda deltas: [])[0].text


# --- answers -----------------------------------------------------------------------------------------------------


def test_the_answer_is_that_of_evaluation(server: Server, folder: Path) -> None:
    expected = load(folder)([QUESTION], [IMAGE], max_new_tokens=6).texts[0]
    assert expected
    answer = server.ask([show(make_url(IMAGE)), text(QUESTION)])
    assert answer.choices[0].message.content == expected
    assert answer.choices[0].finish_reason == "length"
    details = answer.usage.prompt_tokens_details.model_dump()
    assert (details["image_tokens_before"], details["image_tokens"]) == (16, 8)
    assert answer.usage.completion_tokens == 6
    other = server.ask([show(make_url(OTHER_IMAGE)), text(QUESTION)])
    assert other.choices[0].message.content != expected  # else this file could not tell answers apart


def test_a_stream_has_the_same_text(server: Server, model: ChatModel) -> None:
    expected = answer_here(model, Message(role="user", text=QUESTION, images=(IMAGE,)))
    content = [show(make_url(IMAGE)), text(QUESTION)]
    chunks = list(server.ask(content, stream=True, stream_options={"include_usage": True}))
    texts = [choice.delta.content or "" for chunk in chunks for choice in chunk.choices]
    assert "".join(texts) == expected
    assert sum(map(bool, texts)) > 1
    assert chunks[-1].usage.completion_tokens == 6
    assert [choice.finish_reason for chunk in chunks for choice in chunk.choices][-1] == "length"


def test_several_images_turns_and_a_system_message(server: Server, model: ChatModel) -> None:
    messages = [
        {"role": "system", "content": "You are kind."},
        user([text("Is it a red circle?"), show(make_url(IMAGE)), show(make_url(OTHER_IMAGE))]),
        {"role": "assistant", "content": "yes"},
        user(QUESTION),
    ]
    expected = answer_here(
        model,
        Message(role="system", text="You are kind."),
        Message(role="user", text="Is it a red circle?", images=(IMAGE, OTHER_IMAGE)),
        Message(role="assistant", text="yes"),
        Message(role="user", text=QUESTION),
    )
    answer = server.ask(messages)
    assert answer.choices[0].message.content == expected
    assert answer.usage.prompt_tokens_details.model_dump()["image_tokens"] == 16


def test_a_stop_text_ends_the_answer(server: Server, model: ChatModel) -> None:
    whole = answer_here(model, Message(role="user", text=QUESTION))
    stop = whole.split()[2]
    answer = server.ask(QUESTION, stop=stop)
    assert answer.choices[0].message.content == whole[: whole.index(stop)].rstrip()
    assert answer.choices[0].finish_reason == "stop"


def test_a_seed_repeats_a_sampled_answer(server: Server, model: ChatModel) -> None:
    options = {"temperature": 2.0, "top_p": 0.95}
    first, second = (server.ask(QUESTION, seed=3, **options).choices[0].message.content for _ in range(2))
    assert first == second == answer_here(model, Message(role="user", text=QUESTION), seed=3, **options)
    assert len({server.ask(QUESTION, **options).choices[0].message.content for _ in range(5)}) > 1


def test_the_compared_model_has_no_compression(server: Server, folder: Path) -> None:
    assert [model.id for model in server.client.models.list()] == [NAME, f"{NAME}-llava"]
    plain = load_chat_model(folder, **choose_methods(folder, "all", 0.0))
    answer = server.client.chat.completions.create(
        model=f"{NAME}-llava", messages=[user([show(make_url(IMAGE)), text(QUESTION)])], max_tokens=6
    )
    assert answer.choices[0].message.content == answer_here(plain, Message(role="user", text=QUESTION, images=(IMAGE,)))
    assert answer.usage.prompt_tokens_details.model_dump()["image_tokens"] == 16


def test_a_trace_comes_with_the_answer(server: Server) -> None:
    content = [show(make_url(IMAGE)), show(make_url(OTHER_IMAGE)), text(QUESTION)]
    trace = server.ask(content, extra_body={"redux": {"trace": True}}).redux
    assert len(trace["images"]) == 2
    assert len(trace["words"]) == 6
    last = [*server.ask(content, stream=True, extra_body={"redux": {"trace": True}})][-1]
    assert last.redux == trace


def test_curl_gets_the_same_answer(server: Server, model: ChatModel) -> None:
    """The printed command works as it is, apart from the limit of the answer."""
    printed = server.command.wait_for(r"curl .*\n")[0].replace('"messages"', '"max_tokens": 6, "messages"')
    assert KEY not in server.command.output
    done = subprocess.run(
        ["bash", "-c", printed], env={"REDUX_API_KEY": KEY, "PATH": "/usr/bin:/bin"}, capture_output=True
    )
    answer = json.loads(done.stdout)["choices"][0]["message"]["content"]
    assert answer == answer_here(model, Message(role="user", text="Hello"))


def test_many_callers_get_the_answers_of_their_questions(server: Server, model: ChatModel) -> None:
    check_answers_of_many_callers(server, model)


def check_answers_of_many_callers(server: Server, model: ChatModel) -> None:
    questions = [f"{word} {QUESTION}" for word in ("yes", "red", "blue", "green", "kind", "or")]
    answers: dict[str, str] = {}

    def ask(question: str) -> None:
        answers[question] = server.ask(question).choices[0].message.content

    threads = [threading.Thread(target=ask, args=(question,)) for question in questions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(EVENT_S)
    assert answers == {question: answer_here(model, Message(role="user", text=question)) for question in questions}


# --- who may ask -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["", "Bearer", "Bearer wrong", f"Basic {KEY}", f"Bearer {KEY}x", "Bearer \u00e9"])
def test_a_wrong_key_is_refused(server: Server, value: str) -> None:
    for method, path in (("GET", "/v1/models"), ("POST", "/v1/chat/completions")):
        status, body = server.send(method, path, headers={"Authorization": value})
        assert status == 401
        assert json.loads(body)["error"]["code"] == "invalid_api_key"


def test_page_and_health_need_no_key(server: Server) -> None:
    status, page = server.send("GET", "/", headers={"Authorization": ""})
    assert status == 200
    assert b"<!doctype html>" in page
    assert KEY.encode() not in page
    assert server.send("GET", "/health", headers={"Authorization": ""})[0] == 200


def test_other_names_of_this_machine_are_refused(server: Server) -> None:
    """A page of another site may point its own name to 127.0.0.1."""
    status, body = server.send("GET", "/v1/models", headers={"Host": f"example.org:{server.port}"})
    assert status == 403
    assert b"example.org" in body
    assert server.send("GET", "/v1/models", headers={"Host": f"localhost:{server.port}"})[0] == 200


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--host", "0.0.0.0"], "--host: got 0.0.0.0, allowed: 127.0.0.1"),
        (["--port", "70000"], "--host, --port: got 127.0.0.1:70000"),
        (["--host", "192.0.2.1"], "--host: got 192.0.2.1"),
        (["--max-images", "0"], "--max-images"),
    ],
)
def test_wrong_options_are_one_line(
    folder: Path, words: list[str], error: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("REDUX_API_KEY", raising=False)
    result = run_command("serve", folder, *words)
    assert result.code == 2
    assert error in result.err.splitlines()[-1]


def test_a_port_in_use_is_one_line(server: Server, folder: Path) -> None:
    result = run_command("serve", folder, "--port", server.port)
    assert (result.code, result.out) == (2, "")
    assert result.err == (
        f"redux: --host, --port: got 127.0.0.1:{server.port}, allowed: a free address; Address already in use\n"
    )


def test_a_folder_without_a_model_is_one_line(tmp_path: Path, folder: Path) -> None:
    for content, error in (
        (None, "no job.yaml or config.json"),
        ("{", "cannot be read"),
        ('{"model_type": "bert"}', "bert"),
    ):
        if content is not None:
            (tmp_path / "config.json").write_text(content)
        result = run_command("serve", tmp_path, "--port", find_free_port())
        assert (result.code, result.out) == (2, "")
        assert error in result.err
        assert len(result.err.splitlines()) == 1


# --- abuse: 4xx with a message ------------------------------------------------------------------------------------


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def encode_large(kind: str) -> bytes:
    return encode_image(200, 200, kind)


def encode_jpeg_with_preview() -> bytes:
    """Encode the photo of a camera, with a second picture as preview."""
    file = io.BytesIO()
    photo = Image.fromarray(np.zeros((30, 40, 3), np.uint8))
    photo.save(file, "MPO", save_all=True, append_images=[photo.resize((20, 15))])
    return file.getvalue()


@pytest.mark.parametrize(
    ("url", "error"),
    [
        (make_url(claim_size(30_000, 30_000)), "image"),
        (make_url(claim_size(8_000, 8_000)), "8000 x 8000 pixels"),
        (make_url(encode_image(8, 8, "GIF", frames=1000), "gif"), "several frames"),
        (make_url(cut(encode_large("JPEG")), "jpeg"), "image"),
        (make_url(cut(encode_large("PNG"))), "image"),
        (make_url(b"<svg xmlns='http://www.w3.org/2000/svg'/>", "svg+xml"), "allowed: JPEG"),
        (make_url(b""), "image"),
        ("file:///etc/passwd", "allowed: a URL data:image"),
        ("/etc/passwd", "allowed: a URL data:image"),
        ("http://169.254.169.254/latest/meta-data/", "allowed: a URL data:image"),
        ("https://example.org/a.png", "allowed: a URL data:image"),
        ("data:text/html;base64,AAAA", "allowed: a URL data:image"),
        ("data:image/png;base64,@@@", "base64"),
    ],
)
def test_images_that_cannot_be_used_are_refused(server: Server, url: str, error: str) -> None:
    with pytest.raises(APIStatusError) as refused:
        server.ask([show(url), text(QUESTION)])
    assert refused.value.status_code == 400
    assert error in refused.value.message
    assert "Traceback" not in refused.value.message


def test_a_photo_with_a_preview_is_answered(server: Server) -> None:
    assert server.ask([show(make_url(encode_jpeg_with_preview(), "jpeg")), text(QUESTION)]).choices


def write_request(**changes: Any) -> bytes:
    return json.dumps({"model": NAME, "messages": [user("Hello")], "max_tokens": 1, **changes}).encode()


@pytest.mark.parametrize(
    ("method", "path", "body", "headers", "status", "error"),
    [
        ("POST", "/v1/chat/completions", b"{", {}, 400, "body"),
        ("POST", "/v1/chat/completions", b"[" * 100_000, {}, 400, "body"),
        ("POST", "/v1/chat/completions", b"\xff\xfe", {}, 400, "body"),
        ("POST", "/v1/chat/completions", write_request(max_tokens="many"), {}, 400, "max_tokens"),
        ("POST", "/v1/chat/completions", write_request(messages={}), {}, 400, "messages"),
        ("POST", "/v1/chat/completions", write_request(messages=[]), {}, 400, "messages"),
        ("POST", "/v1/chat/completions", write_request(messages=[user("<image>")]), {}, 400, "<image>"),
        ("POST", "/v1/chat/completions", write_request(messages=[user("yes " * 40_000)]), {}, 400, "tokens"),
        ("POST", "/v1/chat/completions", write_request(seed=1 << 70), {}, 400, "seed"),
        ("POST", "/v1/chat/completions", write_request(stop=[""]), {}, 400, "stop"),
        ("POST", "/v1/chat/completions", write_request(tools=[{}]), {}, 400, "tools"),
        ("POST", "/v1/chat/completions", write_request(model="other"), {}, 404, "allowed: m"),
        ("POST", "/v1/chat/completions", write_request(), {"Content-Type": "text/plain"}, 415, "application/json"),
        ("POST", "/v1/chat/completions", None, {"Content-Length": "-1"}, 400, ""),
        ("GET", "/v1/chat/completions", None, {}, 405, "allowed: POST"),
        ("DELETE", "/v1/models", None, {}, 405, "allowed: GET"),
        ("GET", "/v1/files", None, {}, 404, "/v1/chat/completions"),
        ("GET", "/../../etc/passwd", None, {}, 404, "allowed"),
        ("POST", "/", None, {}, 405, "allowed: GET"),
    ],
)
def test_wrong_requests_are_refused(
    server: Server, method: str, path: str, body: bytes | None, headers: dict[str, str], status: int, error: str
) -> None:
    got, answer = server.send(method, path, body, headers)
    assert got == status
    assert error in answer.decode()


@pytest.mark.parametrize("length", ["Content-Length: 100000000", "Transfer-Encoding: chunked"])
def test_a_body_of_100_mb_is_refused(server: Server, length: str) -> None:
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\n"
    part = b"%x\r\n%s\r\n" % (1 << 20, bytes(1 << 20)) if "chunked" in length else bytes(1 << 20)
    with socket.create_connection(("127.0.0.1", server.port), timeout=EVENT_S) as connection:
        connection.sendall(f"{head}Content-Type: application/json\r\n{length}\r\n\r\n".encode())
        try:
            for _ in range(96):
                connection.sendall(part)
        except OSError:  # the server has closed the connection
            pass
        assert connection.makefile("rb").readline().startswith(b"HTTP/1.1 413 ")


def test_a_client_that_leaves_ends_its_answer(server: Server) -> None:
    """The answer would take minutes."""
    for stream in (True, False):
        body = write_request(max_tokens=30_000, stream=stream)
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        with socket.create_connection(("127.0.0.1", server.port), timeout=EVENT_S) as connection:
            connection.sendall(head.encode() + body)
            wait_until(lambda: server.count_conversations() == 1)
        wait_until(lambda: server.count_conversations() == 0)


def test_too_many_requests_are_refused_and_the_others_go_on(server: Server, model: ChatModel) -> None:
    wait_until(lambda: server.count_conversations() == 0)
    with ExitStack() as stack:
        for _ in range(MAX_REQUESTS):
            stream = stack.enter_context(server.ask(QUESTION, stream=True, max_tokens=30_000))
            next(iter(stream))
        with pytest.raises(APIStatusError) as refused:
            server.ask(QUESTION)
        assert refused.value.status_code == 429
        assert refused.value.response.headers["retry-after"] == "1"
        assert server.send("GET", "/v1/models")[0] == 200
    wait_until(lambda: server.count_conversations() == 0)
    wait_until(lambda: server.send("POST", "/v1/chat/completions", write_request())[0] == 200)


def test_a_thousand_open_connections(server: Server) -> None:
    with ExitStack() as stack:
        for number in range(1000):
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=EVENT_S))
            if number % 2:  # half of them have begun a request
                connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n")
        assert server.ask(QUESTION).choices


def test_noise_on_the_port(server: Server) -> None:
    """Neither another protocol nor a web socket ends the server."""
    upgrade = b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    upgrade += b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
    for content in (
        bytes(range(256)) * 100,
        b"\x16\x03\x01\x02\x00\x01",
        b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"X: " + b"a" * 1_000_000 + b"\r\n\r\n",
        b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n" + upgrade + b"\r\n",
    ):
        with socket.create_connection(("127.0.0.1", server.port), timeout=EVENT_S) as connection:
            try:
                connection.sendall(content)
                connection.shutdown(socket.SHUT_WR)
                connection.recv(1 << 16)
            except OSError:
                continue


def test_after_all_of_it_the_server_answers_as_before(server: Server, model: ChatModel) -> None:
    expected = answer_here(model, Message(role="user", text=QUESTION, images=(IMAGE,)))
    assert server.ask([show(make_url(IMAGE)), text(QUESTION)]).choices[0].message.content == expected
    assert server.count_conversations() == 0

    def measure_growth() -> int:
        # Ray may have started further workers, whose memory is that of the process that they are forks of.
        memory = measure_memory(server.command)
        return sum(memory[process] - before for process, before in server.memory.items() if process in memory)

    wait_until(lambda: measure_growth() < 150 << 20)


def test_a_killed_replica_costs_no_request_its_answer(server: Server, model: ChatModel) -> None:
    limit, [replica] = 300, server.find_replicas()
    expected = answer_here(model, Message(role="user", text=QUESTION), max_new_tokens=limit)
    stream = iter(server.ask(QUESTION, stream=True, max_tokens=limit))
    texts = [next(stream).choices[0].delta.content or "" for _ in range(20)]
    replica.send_signal(signal.SIGKILL)
    # This runs while no replica lives.
    assert server.ask(QUESTION).choices[0].message.content == answer_here(model, Message(role="user", text=QUESTION))
    texts += [chunk.choices[0].delta.content or "" for chunk in stream]
    assert "".join(texts) == expected
    wait_until(lambda: server.find_replicas() not in ([], [replica]))


def test_a_replica_that_dies_and_its_successor_are_announced(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    states = iter([True, False, False, True, True])

    def all_replicas_run() -> bool:
        for state in states:
            return state
        raise KeyboardInterrupt

    monkeypatch.setattr(app, "all_replicas_run", all_replicas_run)
    monkeypatch.setattr(serve, "STATUS_POLL_S", 0)
    with pytest.raises(KeyboardInterrupt):
        serve._watch(2)
    assert capsys.readouterr().out.splitlines() == [
        "a copy of the model has died and is replaced; copies in all: 2",
        "all copies of the model answer again",
    ]


def test_ctrl_c_ends_the_server_and_leaves_nothing(server: Server) -> None:
    server.command.send(signal.SIGINT, "group")
    ended = server.command.wait_for_end()
    assert ended.code == 0, ended.output
    assert not ended.processes
    assert not [path for path in ended.files if "session_" in path]
    lines = ended.output.splitlines()
    assert lines[0] == "starting Ray"
    assert [
        line
        for line in lines
        if not re.match(r"starting Ray|m, m-llava: |    curl |.*cop(y|ies) of the model|stopped", line)
    ] == []


def test_two_replicas_answer_as_one_does(folder: Path, model: ChatModel) -> None:
    """After the first server has ended, so that two Rays never run at once."""
    port = find_free_port()
    with start_command(
        ["serve", str(folder), "--port", str(port), "--replicas", "2"], {"REDUX_API_KEY": KEY}, with_forks=True
    ) as command:
        command.wait_for("Ctrl-C stops it")
        server = Server(command, port, folder, {})
        replicas = server.find_replicas()
        assert len(replicas) == 2
        check_answers_of_many_callers(server, model)
        assert server.send("GET", "/v1/models", headers={"Authorization": "Bearer wrong"})[0] == 401
        # Each copy alone gives the answers of both.
        replicas[0].send_signal(signal.SIGKILL)
        check_answers_of_many_callers(server, model)
        command.send(signal.SIGINT, "group")
        ended = command.wait_for_end()
        assert ended.code == 0, ended.output
        assert not ended.processes
