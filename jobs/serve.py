"""Serve a trained model (`redux serve`)."""

import json
import os
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal
from unittest.mock import patch

from jobs.layout import find_model
from pipelines.core import interrupts
from pipelines.serving.settings import (
    API_KEY_VARIABLE,
    MEGABYTE,
    MEGAPIXEL,
    RequestLimits,
    ServedModel,
    ServerSettings,
)
from pipelines.training.files import CONFIG_FILE
from redux.extras import write_install_command

STATUS_POLL_S = 2.0
"""Seconds between two looks at the replicas."""

SERVE_PACKAGES = ("fastapi", "starlette", "uvicorn")
"""Packages that ray[serve] adds to Ray."""


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """Options of `redux serve`, see its help. `pipelines.serving.settings` explains their values."""

    model: str
    name: str | None
    host: str
    port: int
    compare: bool
    image_tokens: int | Literal["all"] | None
    gamma: float | None
    device: str | None
    replicas: int
    gpu_share: float
    max_batch_size: int
    max_body: int
    max_images: int
    max_pixels: int
    max_new_tokens: int
    max_requests: int
    image_host: Sequence[str]


def run_server(options: ServeOptions) -> None:
    """Serve a model until the command is interrupted.

    Raises:
        ValueError: the model, the address or an option cannot be used.
    """
    try:
        _serve_until_interrupted(build_settings(options))
    except BaseException:
        # An interrupt may appear as another error: of an import, of a library, of a stopping Ray.
        if not interrupts.was_interrupted():
            raise
    print("stopped")


def _serve_until_interrupted(settings: ServerSettings) -> None:
    check_model(settings.model.path)
    if os.environ.get("RAY_ADDRESS", "") in ("", "local"):  # A cluster listens on another machine
        check_port(settings.host, settings.port)
    if any(find_spec(package) is None for package in SERVE_PACKAGES):
        raise ValueError(f"serve: needs ray[serve]: {write_install_command('serve')}")
    # Seconds to import, which wrong options need not wait for.
    import ray
    from ray import serve

    from pipelines.core import cluster
    from pipelines.serving import app

    with cluster.open_session():
        has_gpus = cluster.count_gpus() > 0 and settings.model.device != "cpu"
        needed = {"GPU": settings.gpu_share} if has_gpus else {"CPU": 1.0}
        total = {name: amount * settings.replicas for name, amount in needed.items()}
        cluster.require_resources(total, f"--replicas {settings.replicas}")
        # Ray 2.60 prints a line for each process that ends, also those that Ray Serve ends.
        with patch.object(ray._private.worker, "print_to_stdstream"):
            was_started = app.is_started()
            try:
                app.start_server(settings, has_gpus)
                print(describe_server(settings), flush=True)
                _watch(settings.replicas)
            finally:
                # A private Ray ends with all its processes, at once.
                if not cluster.is_private() and not was_started:
                    serve.shutdown()


def _watch(replicas: int) -> None:
    """Print a line when a replica has died, and when all answer again. Ends by an interrupt alone."""
    from pipelines.serving import app

    was_complete = True
    while True:
        interrupts.raise_if_interrupted()
        time.sleep(STATUS_POLL_S)
        is_complete = app.all_replicas_run()
        if was_complete and not is_complete:
            print(f"a copy of the model has died and is replaced; copies in all: {replicas}", flush=True)
        elif is_complete and not was_complete:
            print("all copies of the model answer again", flush=True)
        was_complete = is_complete


def build_settings(options: ServeOptions) -> ServerSettings:
    """Build the settings from the options.

    Raises:
        ValueError: there is no such model, or the address is public and there is no key.
    """
    path = find_model(options.model)
    if Path(path).is_dir():
        path = str(Path(path).resolve())  # Replicas may have another working directory
    name = options.name or Path(options.model).resolve().name
    return ServerSettings(
        model=ServedModel(
            name=name,
            path=path,
            image_tokens=options.image_tokens,
            gamma=options.gamma,
            compares=options.compare,
            device=options.device,
        ),
        host=options.host,
        port=options.port,
        api_key=os.environ.get(API_KEY_VARIABLE) or None,
        replicas=options.replicas,
        gpu_share=options.gpu_share,
        max_batch_size=options.max_batch_size,
        limits=RequestLimits(
            body_bytes=options.max_body * MEGABYTE,
            images=options.max_images,
            pixels=options.max_pixels * MEGAPIXEL,
            new_tokens=options.max_new_tokens,
            concurrent=options.max_requests,
            image_hosts=tuple(options.image_host),
        ),
    )


def check_model(path: str) -> None:
    """Raise a ValueError if a local folder has no LLaVA; other sources are read by the replicas."""
    config = Path(path) / CONFIG_FILE
    if not config.exists():
        return
    try:
        model_type = json.loads(config.read_bytes()).get("model_type")
    except (ValueError, AttributeError):
        raise ValueError(f"{config}: cannot be read as JSON, allowed: the configuration of a model") from None
    if model_type != "llava":
        raise ValueError(f"{path}: got a model of type {model_type}, allowed: llava, with a CLIP or SigLIP tower")


def check_port(host: str, port: int) -> None:
    """Raise a ValueError if the address cannot be listened on."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        # As the server does; a port that an ended server has just left is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, OverflowError, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ValueError(f"--host, --port: got {host}:{port}, allowed: a free address; {reason}") from None


def describe_server(settings: ServerSettings) -> str:
    """Describe where the server is, and how to ask it."""
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    url = f"http://{host}:{settings.port}"
    key = f' -H "Authorization: Bearer ${API_KEY_VARIABLE}"' if settings.api_key else ""
    body = f'{{"model": "{settings.model.name}", "messages": [{{"role": "user", "content": "Hello"}}]}}'
    return (
        f"{', '.join(settings.model.names)}: {url} (page), {url}/v1 (OpenAI's protocol); Ctrl-C stops it\n"
        f"    curl {url}/v1/chat/completions -H 'Content-Type: application/json'{key} -d '{body}'"
    )
