"""Requests of OpenAI's protocol become conversations, or an error that names the field; images are checked first."""

import base64
import io
import json
import struct
import threading
import zlib
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipelines.serving import images, protocol
from pipelines.serving.protocol import parse_request
from pipelines.serving.settings import RequestLimits, ServedModel, ServerSettings
from redux.messages import Message

LIMITS = RequestLimits(images=2, pixels=10_000, new_tokens=50)


def encode_image(width: int = 20, height: int = 10, kind: str = "PNG", frames: int = 1) -> bytes:
    pictures = [
        Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), np.uint8))
        for seed in range(frames)
    ]
    file = io.BytesIO()
    extra: dict[str, Any] = {"save_all": True, "append_images": pictures[1:]} if frames > 1 else {}
    pictures[0].save(file, kind, **extra)
    return file.getvalue()


def make_url(content: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def claim_size(width: int, height: int) -> bytes:
    """A small PNG whose header claims another size."""
    chunks = {b"IHDR": struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), b"IDAT": zlib.compress(bytes(1000))}
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        for name, content in chunks.items()
    )


def ask(*parts: dict[str, Any], **fields: Any) -> bytes:
    content = list(parts) or "What is this?"
    return json.dumps({"model": "m", "messages": [{"role": "user", "content": content}], **fields}).encode()


def show(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def test_parts_become_text_and_images() -> None:
    picture = encode_image()
    request = parse_request(ask({"type": "text", "text": "a"}, show(make_url(picture)), {"type": "text", "text": "b"}))
    assert request.build_messages(LIMITS) == [Message(role="user", text="a\nb", images=(picture,))]


def test_the_developer_role_is_the_system_role() -> None:
    body = {"model": "m", "messages": [{"role": "developer", "content": "x"}, {"role": "user", "content": "y"}]}
    messages = parse_request(json.dumps(body).encode()).build_messages(LIMITS)
    assert [message.role for message in messages] == ["system", "user"]


def test_an_answer_is_greedy_unless_a_temperature_is_given() -> None:
    assert parse_request(ask()).build_sampling(LIMITS).temperature == 0
    sampling = parse_request(ask(temperature=1, top_p=0.5, seed=3, stop="\n", max_tokens=7)).build_sampling(LIMITS)
    assert (sampling.temperature, sampling.top_p, sampling.seed) == (1, 0.5, 3)
    assert (sampling.stop, sampling.max_new_tokens) == (("\n",), 7)


def test_long_answers_are_cut_to_the_limit_of_the_server() -> None:
    assert parse_request(ask(max_completion_tokens=10_000)).build_sampling(LIMITS).max_new_tokens == 50


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (b"", "body"),
        (b"[]", "body"),
        (b"{", "body"),
        (b"\xff\xfe", "body"),
        (b'{"model": "m"}', "messages"),
        (ask(n=2), "n"),
        (ask(temperature=-1), "temperature"),
        (ask(temperature="hot"), "temperature"),
        (ask(top_p=0), "top_p"),
        (ask(max_tokens=0), "max_tokens"),
        (ask(max_tokens=1.5), "max_tokens"),
        (ask(tools=[{"type": "function"}]), "tools"),
        (ask(logprobs=True), "logprobs"),
        (ask(presence_penalty=0.5), "presence_penalty"),
        (ask(response_format={"type": "json_object"}), "response_format.type"),
        (ask(unknown=1), "unknown"),
        (ask({"type": "audio"}), "messages.0.content"),
        (ask({"type": "text"}), "messages.0.content"),
        (ask({"type": "image_url", "image_url": "x"}), "messages.0.content"),
        (json.dumps({"model": 1, "messages": []}).encode(), "model"),
    ],
)
def test_wrong_requests_name_the_field(body: bytes, field: str) -> None:
    with pytest.raises(ValueError, match=rf"^{field}"):
        parse_request(body)


def test_options_without_effect_are_accepted_at_their_neutral_value() -> None:
    parse_request(ask(n=1, logprobs=False, presence_penalty=0, frequency_penalty=0.0, tools=[], user="u", store=False))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_formats_of_photos_are_read(kind: str) -> None:
    content = encode_image(kind=kind)
    assert images.read_image_url(make_url(content, kind.lower()), LIMITS) == content


@pytest.mark.parametrize(
    ("url", "error"),
    [
        ("", "image_url: got ''"),
        ("photo.png", "allowed: a URL data:image"),
        ("file:///etc/passwd", "allowed: a URL data:image"),
        ("http://127.0.0.1/a.png", "allowed: a URL data:image"),
        ("data:text/html;base64,AAAA", "allowed: a URL data:image"),
        ("data:image/png,abc", "allowed: a URL data:image"),
        ("data:image/png;base64,%%%", "wrong base64"),
        (make_url(b""), "got 0 bytes"),
        (make_url(b"<svg xmlns='http://www.w3.org/2000/svg'/>", "svg+xml"), "allowed: JPEG, PNG"),
        (make_url(b"%PDF-1.4", "png"), "allowed: JPEG, PNG"),
        (make_url(encode_image(200, 100)), "got 200 x 100 pixels, allowed: up to 10000"),
        (make_url(claim_size(30_000, 30_000)), "allowed: up to 10000"),
        (make_url(encode_image(kind="GIF", frames=3), "gif"), "got several frames"),
        (make_url(encode_image(kind="TIFF"), "tiff"), "allowed: JPEG, PNG"),
    ],
)
def test_images_that_cannot_be_used_are_refused(url: str, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        images.read_image_url(url, LIMITS)


def test_the_number_of_images_is_limited() -> None:
    request = parse_request(ask(*[show(make_url(encode_image()))] * 3))
    with pytest.raises(ValueError, match="messages: got 3 images, allowed: up to 2"):
        request.build_messages(LIMITS)


class _ImageHandler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(encode_image())

    def log_message(self, *_: Any) -> None:
        pass


def test_internal_addresses_are_never_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    server = HTTPServer(("127.0.0.1", 0), _ImageHandler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        url = f"http://localhost:{server.server_port}/a.png"
        with pytest.raises(ValueError, match=r"got host 'localhost', allowed: example\.org"):
            images.read_image_url(url, RequestLimits(image_hosts=("example.org",)))
        # An allowed host whose name points to an internal address.
        with pytest.raises(ValueError, match="localhost has no public address"):
            images.read_image_url(url, RequestLimits(image_hosts=("localhost",)))
        # The same request succeeds where the address counts as public, so only the check refused it.
        monkeypatch.setattr(images, "is_public_address", lambda _: True)
        assert images.read_image_url(url, RequestLimits(image_hosts=("localhost",))) == encode_image()
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.5", "::", "example.org"])
def test_a_public_address_needs_a_key(host: str) -> None:
    with pytest.raises(ValueError, match=f"--host: got {host}"):
        ServerSettings(model=ServedModel(name="m", path="m"), host=host)
    assert "secret" not in repr(ServerSettings(model=ServedModel(name="m", path="m"), host=host, api_key="secret"))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "::1", "localhost"])
def test_a_loopback_address_needs_no_key(host: str) -> None:
    assert ServerSettings(model=ServedModel(name="m", path="m"), host=host).api_key is None


def test_objects_have_the_fields_of_the_protocol() -> None:
    from openai.types.chat import ChatCompletion, ChatCompletionChunk

    completion = protocol.Completion("m")
    usage = protocol.build_usage(10, 3, 4, 8)
    whole = ChatCompletion.model_validate(completion.build_response("text", "stop", usage), strict=True)
    assert whole.choices[0].message.content == "text"
    assert whole.usage is not None
    assert whole.usage.total_tokens == 13
    chunk = ChatCompletionChunk.model_validate(completion.build_chunk({"content": "a"}), strict=True)
    assert chunk.choices[0].delta.content == "a"
    assert ChatCompletionChunk.model_validate(completion.build_last_chunk(usage=usage), strict=True).usage
