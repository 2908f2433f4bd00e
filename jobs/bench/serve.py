"""Measure the server: requests per second and time to the first token, by concurrent requests and image tokens.

    python jobs/bench/serve.py                       # a random model whose language part carries the load
    python jobs/bench/serve.py runs/quickstart       # a trained model, with the image tokens of its training

The random model has a tower of 336 px in patches of 14 px (21.7M weights) and a LLaMA of 99M weights, in bf16; only its
speed has a meaning. The server starts once for each number of image tokens, with the same weights. All answers have
the same number of tokens; each caller asks its next question when it has its answer. The script prints the results and
appends them to serve.jsonl; only numbers of one run can be compared.
"""

import argparse
import base64
import http.client
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import ray
import torch
import transformers

from jobs.bench.pixels import make_photo
from jobs.bench.record import add_out_option, append_record
from redux.architecture import LanguageSizes, ModelSettings, TowerSizes
from redux.conversation import train_word_tokenizer
from redux.model import build_model
from redux.processor import build_processor, record_training_format

QUESTION = "What is in the image?"
VOCABULARY = f"USER: {QUESTION} ASSISTANT: " + " ".join(f"word{number}" for number in range(200))

LAYERS = 12
"""Layers of the random model's tower and of its language model."""

SMALLEST_LAYERS = 4
"""Layers with which the random model becomes small: VMTC needs some in the tower."""

ROUNDS = 2
"""Requests of each caller, at least."""


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", help="folder of a run or a model; default: a random model")
    parser.add_argument("--tokens", type=int, nargs="+", default=[576, 288, 64], help="default: %(default)s")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32], help="default: %(default)s")
    parser.add_argument("--requests", type=int, default=16, help="requests at least, default: %(default)s")
    parser.add_argument("--new-tokens", type=int, default=16, help="default: %(default)s")
    parser.add_argument("--small", action="store_true", help="make the random model small, to try the script")
    add_out_option(parser, __file__)
    arguments = parser.parse_args(argv)
    body = write_request(arguments.new_tokens)
    with tempfile.TemporaryDirectory() as folder:
        model = arguments.model or save_random_model(Path(folder), arguments.small)
        variants = [None] if arguments.model else arguments.tokens
        results = []
        for tokens in variants:
            with start_server(model, tokens) as url:
                measure(url, body, 1, 1)  # The first answer imports further parts
                for callers in arguments.concurrency:
                    requests = max(arguments.requests, ROUNDS * callers)
                    results.append({"concurrency": callers, **measure(url, body, callers, requests)})
                    print(json.dumps(results[-1]), flush=True)
    append_record(
        arguments.out,
        versions={module.__name__: module.__version__ for module in (ray, torch, transformers)},
        device=torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPUs",
        model=str(arguments.model) if arguments.model else "random",
        new_tokens=arguments.new_tokens,
        results=results,
    )


def save_random_model(folder: Path, small: bool) -> Path:
    """Save a random LLaVA in bf16, whose answers end only at their limit; return its folder."""
    tokenizer = train_word_tokenizer([VOCABULARY], 1024)
    width, layers = (64, SMALLEST_LAYERS) if small else (384, LAYERS)
    tower = TowerSizes(
        image_size=336,
        patch_size=14,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        intermediate_size=4 * width,
    )
    language = LanguageSizes(
        hidden_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        intermediate_size=20 * width // 3 // 64 * 64,
        max_position_embeddings=1024,
    )
    torch.manual_seed(0)
    # Trained with all image tokens: the number is chosen when it is served.
    model = build_model(ModelSettings(tower=tower, language=language, vmtc=None), tokenizer)
    with torch.no_grad():
        model.get_output_embeddings().weight[tokenizer.all_special_ids] = 0
    print(f"{sum(weight.numel() for weight in model.parameters()) / 1e6:.1f}M weights", flush=True)
    record_training_format(model, tokenizer, "vicuna_v1", "pad")
    model.to(torch.bfloat16).save_pretrained(folder)
    build_processor(model.config, tokenizer).save_pretrained(folder)
    return folder


@contextmanager
def start_server(model: str | Path, tokens: int | None) -> Iterator[str]:
    """Serve a model for the length of a with block; yields the URL."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "jobs.command", "serve", str(model), "--port", str(port)]
    command += ["--max-batch-size", "32"]
    if tokens:
        side_tokens = json.loads((Path(model) / "config.json").read_text())["image_seq_length"]
        command += ["--image-tokens", "all" if tokens == side_tokens else str(tokens)]
    environment = {name: value for name, value in os.environ.items() if name != "REDUX_API_KEY"}
    started_at = time.monotonic()
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert server.stdout
        if not any("Ctrl-C stops it" in line for line in server.stdout):
            raise RuntimeError(f"the server ended with {server.wait()}")
        print(f"ready after {time.monotonic() - started_at:.1f} s", flush=True)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.communicate()


def write_request(new_tokens: int) -> dict[str, Any]:
    """Write the body of a request: a photo, a question and the length of the answer."""
    photo = base64.b64encode(make_photo(0)).decode()
    image = {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{photo}"}}
    content = [image, {"type": "text", "text": QUESTION}]
    return {"messages": [{"role": "user", "content": content}], "max_tokens": new_tokens, "stream": True}


def measure(url: str, body: dict[str, Any], callers: int, requests: int) -> dict[str, Any]:
    """Ask from several threads, and measure requests per second and the times to the first token.

    Returns:
        {"image_tokens", "requests", "requests_per_s", "first_token_p50_ms", "first_token_p95_ms"}.
    """
    host = urlsplit(url).netloc
    connection = http.client.HTTPConnection(host)
    connection.request("GET", "/v1/models")
    name = json.load(connection.getresponse())["data"][0]["id"]
    content = json.dumps({**body, "model": name, "stream_options": {"include_usage": True}})
    # The threads share the numbers of the requests, so that fast callers ask more often.
    numbers, lock = iter(range(requests)), threading.Lock()
    first_token_s: list[float] = []
    tokens: set[int] = set()

    def call() -> None:
        connection = http.client.HTTPConnection(host)
        while True:
            with lock:
                if next(numbers, None) is None:
                    return
            first_s, image_tokens = _ask(connection, content)
            with lock:
                first_token_s.append(first_s)
                tokens.add(image_tokens)

    threads = [threading.Thread(target=call) for _ in range(callers)]
    started_at = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - started_at
    if len(first_token_s) != requests:
        raise RuntimeError(f"{requests - len(first_token_s)} of {requests} requests failed")
    p50, p95 = np.percentile(first_token_s, [50, 95])
    return {
        "image_tokens": tokens.pop(),
        "requests": requests,
        "requests_per_s": round(requests / seconds, 2),
        "first_token_p50_ms": round(1e3 * p50),
        "first_token_p95_ms": round(1e3 * p95),
    }


def _ask(connection: http.client.HTTPConnection, content: str) -> tuple[float, int]:
    """Ask one question; return the seconds to the first text and the image tokens."""
    started_at = time.perf_counter()
    first_s, image_tokens = 0.0, 0
    connection.request("POST", "/v1/chat/completions", content, {"Content-Type": "application/json"})
    response = connection.getresponse()
    if response.status != 200:
        raise RuntimeError(response.read().decode())
    for line in response:
        if not line.startswith(b"data: {"):
            continue
        event = json.loads(line.removeprefix(b"data: "))
        if not first_s and any(choice["delta"].get("content") for choice in event["choices"]):
            first_s = time.perf_counter() - started_at
        if event.get("usage"):
            image_tokens = event["usage"]["prompt_tokens_details"]["image_tokens"]
    return first_s or time.perf_counter() - started_at, image_tokens


if __name__ == "__main__":
    main()
