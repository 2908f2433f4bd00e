"""Serve a trained model (`redux serve`)."""

import argparse
import os
import socket
import threading
from importlib.util import find_spec
from pathlib import Path

from jobs.layout import find_model
from pipelines.serving.settings import API_KEY_VARIABLE, MEGABYTE, RequestLimits, ServedModel, ServerSettings
from redux.extras import write_install_command


def run_server(arguments: argparse.Namespace) -> None:
    """Serve a model until the command is interrupted.

    Raises:
        ValueError: the model, the address or an option cannot be used.
    """
    settings = build_settings(arguments)
    check_port(settings.host, settings.port)
    if find_spec("starlette") is None:
        raise ValueError(f"serve: needs ray[serve]: {write_install_command('serve')}")
    # a second to import, which wrong options need not wait for
    from ray import serve

    from pipelines.core import cluster
    from pipelines.serving.app import start_server

    with cluster.open_session():
        has_gpus = cluster.count_gpus() > 0
        needed = {"GPU": settings.gpu_share} if has_gpus else {"CPU": 1.0}
        total = {name: amount * settings.replicas for name, amount in needed.items()}
        cluster.require_resources(total, f"--replicas {settings.replicas}")
        try:
            start_server(settings, has_gpus)
            print(describe_server(settings), flush=True)
            threading.Event().wait()
        except KeyboardInterrupt:
            print("stopping")
        finally:
            serve.shutdown()


def build_settings(arguments: argparse.Namespace) -> ServerSettings:
    """Build the settings from the options.

    Raises:
        ValueError: there is no such model, or the address is public and there is no key.
    """
    path = find_model(arguments.model)
    name = arguments.name or Path(arguments.model).resolve().name
    return ServerSettings(
        model=ServedModel(
            name=name,
            path=path,
            image_tokens=arguments.image_tokens,
            gamma=arguments.gamma,
            compares=arguments.compare,
            device=arguments.device,
        ),
        host=arguments.host,
        port=arguments.port,
        api_key=os.environ.get(API_KEY_VARIABLE) or None,
        replicas=arguments.replicas,
        gpu_share=arguments.gpu_share,
        max_batch_size=arguments.max_batch_size,
        limits=RequestLimits(
            body_bytes=arguments.max_body * MEGABYTE,
            images=arguments.max_images,
            pixels=arguments.max_pixels * MEGABYTE,
            new_tokens=arguments.max_new_tokens,
            concurrent=arguments.max_requests,
            image_hosts=tuple(arguments.image_host),
        ),
    )


def check_port(host: str, port: int) -> None:
    """Raise a ValueError if the address cannot be listened on."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        # as the server does; a port that an ended server has just left is free
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ValueError(f"--host, --port: got {host}:{port}, allowed: a free address; {error.strerror}") from None


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
