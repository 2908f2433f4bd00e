"""Images of requests: data URLs, and files of allowed hosts. Everything doubtful is refused before it is decoded.

Only formats that photos have are opened, since each of Pillow's decoders is a way in. The header gives size and number
of frames, so a small file cannot claim much memory.
"""

import base64
import binascii
import http.client
import io
import ipaddress
import socket
import urllib.parse

from PIL import Image

from pipelines.serving.settings import RequestLimits

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
"""Formats of Pillow that are opened."""


def read_image_url(url: str, limits: RequestLimits) -> bytes:
    """Return the image file that a URL of a request contains or names.

    Raises:
        ValueError: the URL is of another kind, the host is not allowed, or the image is beyond the limits.
    """
    scheme = url.partition(":")[0].lower()
    if scheme == "data":
        content = _decode_data_url(url)
    elif scheme in ("http", "https") and limits.image_hosts:
        content = _fetch(url, limits)
    else:
        allowed = f", or http(s) of {', '.join(limits.image_hosts)}" if limits.image_hosts else ""
        raise ValueError(f"image_url: got {url[:40]!r}, allowed: a URL data:image/…;base64,…{allowed}")
    check_sent_image(content, limits.pixels)
    return content


def check_sent_image(content: bytes, max_pixels: int) -> None:
    """Check format, size and frames of an image by its header.

    Raises:
        ValueError: the file is not an image, has several frames or too many pixels.
    """
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            width, height = image.size
            # The further pictures in a camera's JPEG (MPO) are previews; Pillow decodes the first one.
            is_animated = image.format != "MPO" and getattr(image, "is_animated", False)
    except Image.DecompressionBombError:
        raise ValueError(f"image: got one beyond Pillow's limit, allowed: up to {max_pixels} pixels") from None
    except MemoryError:
        raise
    except Exception as error:  # Each of Pillow's formats has its own
        reason = type(error).__name__
        raise ValueError(f"image: got {len(content)} bytes ({reason}), allowed: {', '.join(FORMATS)}") from None
    if width * height > max_pixels:
        raise ValueError(f"image: got {width} x {height} pixels, allowed: up to {max_pixels} in all")
    if is_animated:
        raise ValueError("image: got several frames, allowed: one")


def _decode_data_url(url: str) -> bytes:
    header, comma, data = url.partition(",")
    if not comma or not header.lower().startswith("data:image/") or not header.lower().endswith(";base64"):
        raise ValueError(f"image_url: got {url[:40]!r}, allowed: a URL data:image/…;base64,…")
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError):
        raise ValueError("image_url: got wrong base64, allowed: a URL data:image/…;base64,…") from None


def _fetch(url: str, limits: RequestLimits) -> bytes:
    """Fetch a file from an allowed host, without redirects, and never from an internal address."""
    parts = urllib.parse.urlsplit(url)
    host = parts.hostname or ""
    if host not in limits.image_hosts:
        raise ValueError(f"image_url: got host {host!r}, allowed: {', '.join(limits.image_hosts)}")
    port = parts.port or (443 if parts.scheme == "https" else 80)
    connection_class = _PinnedHTTPS if parts.scheme == "https" else _PinnedHTTP
    try:
        connection = connection_class(host, port, timeout=limits.fetch_s)
        connection.request("GET", urllib.parse.urlunsplit(("", "", parts.path or "/", parts.query, "")))
        response = connection.getresponse()
        if response.status != 200:
            raise ValueError(f"image_url: got status {response.status} of {host}, allowed: 200")
        content = response.read(limits.body_bytes + 1)
    except (OSError, http.client.HTTPException) as error:
        raise ValueError(f"image_url: {host} cannot be read: {type(error).__name__}: {error}") from None
    if len(content) > limits.body_bytes:
        raise ValueError(f"image_url: got more bytes, allowed: up to {limits.body_bytes}")
    return content


def is_public_address(address: str) -> bool:
    """Return True if an IP address belongs to the public internet."""
    return ipaddress.ip_address(address).is_global


def _open_public_socket(host: str, port: int, timeout: float | None) -> socket.socket:
    """Connect to a public address of a host. The address is checked and used, so no second look-up can change it."""
    addresses = [str(info[4][0]) for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    for address in addresses:
        if is_public_address(address):
            return socket.create_connection((address, port), timeout)
    raise OSError(f"{host} has no public address")


class _PinnedHTTP(http.client.HTTPConnection):
    """Connection to a checked address."""

    def connect(self) -> None:
        self.sock = _open_public_socket(self.host, self.port, self.timeout)


class _PinnedHTTPS(http.client.HTTPSConnection):
    """Connection to a checked address, with the certificate of the host."""

    def connect(self) -> None:
        plain = _open_public_socket(self.host, self.port, self.timeout)
        self.sock = self._context.wrap_socket(plain, server_hostname=self.host)  # type: ignore[attr-defined]
