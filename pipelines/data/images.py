"""Image files of a folder: found however their path is written, and decoded once before they are stored.

A path is taken literally first: a name may hold spaces, #, ?, % and backslashes.  Then it is read as others write it:
with backslashes for slashes, from the root on, as a URL, composed otherwise (é as one character or two), and, where
just one file fits, in other capitals.  It never leads out of the folder by `..` or from the root; a link in the folder
is followed, as mixtures link their parts together.
"""

import io
import os
import posixpath
import re
import unicodedata
import warnings
from stat import S_ISREG
from urllib.parse import quote, unquote

from PIL import Image

from pipelines.core import storage

SUFFIX_BY_FORMAT = {
    "JPEG": "jpg",
    "MPO": "jpg",  # of phones: a JPEG with a second one behind
    "PNG": "png",
    "GIF": "gif",
    "WEBP": "webp",
    "BMP": "bmp",
    "TIFF": "tif",
    "PPM": "ppm",
    "AVIF": "avif",
    "JPEG2000": "jp2",
    "ICO": "ico",
    "TGA": "tga",
}
"""Suffix of an image in a tar by Pillow's name of its format; `img` for others."""

URL_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")


def check_image(image: bytes) -> str:
    """Decode an image file as training will; returns the suffix of its format, whatever it is called.

    Raises:
        ValueError: it is truncated, no image that Pillow reads, or too large a one.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata, and of sizes that training takes
            with Image.open(io.BytesIO(image)) as opened:
                suffix = SUFFIX_BY_FORMAT.get(opened.format or "", "img")
                opened.convert("RGB")
    except Exception as error:  # OSError, SyntaxError, struct.error, MemoryError, ...: each format has its own
        raise ValueError(" ".join(f"{type(error).__name__}: {error}".split())) from None
    return suffix


class OutsideError(ValueError):
    """A path leads out of the image folder."""


class ImageFolder:
    """The images of a folder, by the paths that records name.

    url: a local path, or a URL.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/") or "/"
        self.is_local = storage.is_local(url)
        path = url.rpartition("://")[2] if self.is_local else ""
        self.roots = list(dict.fromkeys((os.path.abspath(path), os.path.realpath(path)))) if self.is_local else []
        self._names: dict[str, dict[str, list[str]]] = {}

    def read(self, path: str) -> bytes:
        """Read the file that a record names.

        Raises:
            FileNotFoundError: there is none, or nobody may read it.
            OutsideError: the path leads out of the folder.
        """
        inside, leads_out = self.locate(path)
        for name in inside:
            if (found := self._find(name) if self.is_local else self._quoted(name)) is None:
                continue
            try:
                return storage.read(found)
            except ValueError:
                continue
        if path and (leads_out or not inside):
            raise OutsideError(path)
        raise FileNotFoundError(path)

    def locate(self, path: str) -> tuple[list[str], bool]:
        """Paths within the folder that a record's path may mean, likeliest first; and whether a reading leads out."""
        found, leads_out = [], False
        for form in dict.fromkeys((path, path.replace("\\", "/"))):
            readings = self._readings(form)
            leads_out |= not readings
            found += readings
        composed = [unicodedata.normalize("NFC", name) for name in found]
        parted = [unicodedata.normalize("NFD", name) for name in found]
        return list(dict.fromkeys([*found, *composed, *parted])), leads_out

    def _readings(self, path: str) -> list[str]:
        if path[:7].lower() == "file://":
            written = [path[7:], unquote(path[7:])] if self.is_local else []
        elif URL_SCHEME.match(path):
            written = [path.removeprefix(f"{self.url}/")] if path.startswith(f"{self.url}/") else []
        else:
            written = [path]
        found = []
        for each in written:
            if each.startswith("/"):
                whole = posixpath.normpath(f"/{each.lstrip('/')}")
                prefixes = [root.rstrip("/") + "/" for root in self.roots]
                found += [whole.removeprefix(prefix) for prefix in prefixes if whole.startswith(prefix)]
            elif (plain := posixpath.normpath(each)).split("/")[0] not in ("", ".", ".."):
                found.append(plain)
        return [each for each in found if each]

    def _quoted(self, name: str) -> str:
        """The URL of a file in a store; over HTTP what would be a query or a fragment is part of the name."""
        return storage.join(self.url, quote(name) if self.url.startswith(("http://", "https://")) else name)

    def _find(self, name: str) -> str | None:
        """The local file of that name; None where there is none, or what is there is no file."""
        at = self.roots[0]
        if (whole := _is_regular_file(os.path.join(at, name))) is not None:
            return os.path.join(at, name) if whole else None
        for part in name.split("/"):
            if not os.path.lexists(os.path.join(at, part)):
                fitting = self._listed(at).get(_fold_name(part), [])
                if len(fitting) != 1:
                    return None
                [part] = fitting
            at = os.path.join(at, part)
        return at if _is_regular_file(at) else None

    def _listed(self, folder: str) -> dict[str, list[str]]:
        """Names in a folder by what is left of them without capitals and composition."""
        if folder not in self._names:
            names: dict[str, list[str]] = {}
            try:
                for name in os.listdir(folder):
                    names.setdefault(_fold_name(name), []).append(name)
            except (OSError, ValueError):
                pass
            self._names[folder] = names
        return self._names[folder]


def _fold_name(name: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def _is_regular_file(path: str) -> bool | None:
    """Tell if a path is a regular file; None if nothing is there.  Reading a pipe or device would not end."""
    try:
        return S_ISREG(os.stat(path).st_mode)
    except (OSError, ValueError):  # too long a name, a circle of links, a null character
        return None
