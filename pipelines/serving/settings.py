"""Settings of the server. Imports neither torch nor Ray."""

import ipaddress
from dataclasses import dataclass, field
from typing import Literal

MEGABYTE = 1_000_000
MEGAPIXEL = 1_000_000

API_KEY_VARIABLE = "REDUX_API_KEY"
"""Environment variable with the key that requests to /v1 must have."""


@dataclass(frozen=True, kw_only=True)
class RequestLimits:
    """Limits of a request. A request beyond them is refused with a 4xx status.

    Args:
        body_bytes: size of a request with its images.
        images: images of a conversation.
        pixels: width x height of an image.
        new_tokens: tokens of an answer; longer requests are cut to it.
        concurrent: requests that are in progress or wait at the same time; further ones get status 429.
        image_hosts: hosts from which images may be fetched by http(s); the default is none.
        fetch_s: seconds until the fetch of an image is given up.
    """

    body_bytes: int = 20 * MEGABYTE
    images: int = 8
    pixels: int = 50 * MEGAPIXEL
    new_tokens: int = 2048
    concurrent: int = 128
    image_hosts: tuple[str, ...] = ()
    fetch_s: float = 10.0


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """A model that is served, under one or two names.

    Args:
        name: name in the protocol.
        path: folder, Hugging Face Hub id or URL.
        image_tokens, gamma: settings of the method, as for `redux.chat.choose_methods`.
        compares: also serve the same weights without VMTC and CMAI, as "NAME-llava".
        device: device; None takes a GPU if there is one.
    """

    name: str
    path: str
    image_tokens: int | Literal["all"] | None = None
    gamma: float | None = None
    compares: bool = False
    device: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the models in the protocol, the main one first."""
        return (self.name, f"{self.name}-llava") if self.compares else (self.name,)


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """Settings of the server.

    Args:
        model: the model.
        host, port: address.
        api_key: key that requests to /v1 must have; None requires none.
        replicas: copies of the model.
        gpu_share: share of a GPU for each copy, if there are GPUs.
        max_batch_size: conversations that a copy answers at the same time.
        limits: limits of a request.

    Raises:
        ValueError: the address is public and there is no key.
    """

    model: ServedModel
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = field(default=None, repr=False)
    replicas: int = 1
    gpu_share: float = 1.0
    max_batch_size: int = 16
    limits: RequestLimits = RequestLimits()

    def __post_init__(self) -> None:
        if not self.api_key and not is_loopback(self.host):
            raise ValueError(
                f"--host: got {self.host}, allowed: 127.0.0.1, or any with a key in the variable {API_KEY_VARIABLE}"
            )


def is_loopback(host: str) -> bool:
    """Return True if only programs of this machine reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
