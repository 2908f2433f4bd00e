"""Lookup and check of the image files that records name.

A path is first taken literally: a name may contain spaces, #, ?, % and backslashes. Then other spellings are tried:
backslashes as slashes, an absolute path, a URL, another Unicode composition (é as one or two characters), and other
case if exactly one file matches. A path never leads out of the folder by `..` or an absolute path. Links in the folder
are followed, because mixtures link their parts together.
"""

import io
import os
import posixpath
import re
import unicodedata
import warnings
from stat import S_ISREG
from urllib.parse import quote, unquote

from PIL import Image, UnidentifiedImageError

from pipelines.core import storage
from pipelines.data import records

SUFFIX_BY_FORMAT = {
    "JPEG": "jpg",
    "MPO": "jpg",  # phones: a JPEG followed by a second one
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
"""Suffix of an image in a tar by Pillow's name of the format. Others get `img`."""

MAX_HINTS = 3
"""Missing images of a shard that are searched elsewhere; the others are missing for the same reason."""

MAX_HINT_FOLDERS = 20

URL_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")


def check_image(image: bytes) -> str:
    """Decode an image file as training does, and return the suffix of its format.

    Raises:
        ValueError: the file is truncated, too large, or no image that Pillow reads.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about metadata, and about sizes that training accepts
            with Image.open(io.BytesIO(image)) as picture:
                suffix = SUFFIX_BY_FORMAT.get(picture.format or "", "img")
                picture.convert("RGB")
    except UnidentifiedImageError:  # its text has an address in memory
        pointer = image.startswith(records.LFS_POINTER.encode())
        raise ValueError(records.LFS_ADVICE if pointer else "no format that Pillow knows") from None
    except Exception as error:  # each format raises others: OSError, SyntaxError, struct.error, MemoryError, ...
        raise ValueError(" ".join(f"{type(error).__name__}: {error}".split())) from None
    return suffix


def is_image(path: str | os.PathLike[str]) -> bool:
    """Return True if Pillow knows the format of a local file. Reads its first bytes only."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            Image.open(path).close()
    except Exception:  # each format raises others
        return False
    return True


class OutsideError(ValueError):
    """Error of a path that leads out of the image folder."""


class ImageFolder:
    """Folder of images, read by the paths that records name."""

    def __init__(self, url: str) -> None:
        """Open a folder by local path or URL."""
        self.url = url.rstrip("/") or "/"
        self.is_local = storage.is_local(url)
        path = url.rpartition("://")[2] if self.is_local else ""
        self.roots = list(dict.fromkeys((os.path.abspath(path), os.path.realpath(path)))) if self.is_local else []
        self._names: dict[str, dict[str, list[str]]] = {}
        self._hints = MAX_HINTS

    def read(self, path: str) -> bytes:
        """Read the file that a record names.

        Raises:
            FileNotFoundError: the file does not exist or is not readable.
            OutsideError: the path leads out of the folder.
        """
        candidates, leads_out = self.list_candidates(path)
        for name in candidates:
            url = self._find(name) if self.is_local else self._quote(name)
            if url is None:
                continue
            try:
                return storage.read(url)
            except ValueError:
                continue
        if path and (leads_out or not candidates):
            raise OutsideError(path)
        raise FileNotFoundError(path)

    def find_elsewhere(self, path: str) -> str:
        """Describe where a missing image is, if the folder is a level too high or too low. "" if it is not found."""
        if not self.is_local or not self._hints:
            return ""
        self._hints -= 1
        # Try with too many folders in the path first, then with a folder too few.
        parts = [part for part in path.replace("\\", "/").split("/") if part not in ("", ".", "..")]
        for depth in range(1, len(parts)):
            shorter = "/".join(parts[depth:])
            if self._find(shorter):
                return f"{shorter} exists: the path has {'/'.join(parts[:depth])}/ too much for this folder"
        for name in sorted(storage.list_folders(self.url))[:MAX_HINT_FOLDERS]:
            if _is_regular_file(os.path.join(self.roots[0], name, *parts)):
                return f"it exists in {name}/: choose that folder"
        return ""

    def list_candidates(self, path: str) -> tuple[list[str], bool]:
        """List the relative paths that a record's path may mean, likeliest first.

        Returns:
            The paths, and True if an interpretation leads out of the folder.
        """
        candidates, leads_out = [], False
        for spelling in dict.fromkeys((path, path.replace("\\", "/"))):
            relative = self._to_relative(spelling)
            leads_out |= not relative
            candidates += relative
        composed = [unicodedata.normalize("NFC", name) for name in candidates]
        decomposed = [unicodedata.normalize("NFD", name) for name in candidates]
        return list(dict.fromkeys([*candidates, *composed, *decomposed])), leads_out

    def _to_relative(self, path: str) -> list[str]:
        """List interpretations of a path as relative paths within the folder; [] if all lead out of it."""
        # Of URLs, allow only those of this folder.
        if path[:7].lower() == "file://":
            paths = [path[7:], unquote(path[7:])] if self.is_local else []
        elif URL_SCHEME.match(path):
            paths = [path.removeprefix(f"{self.url}/")] if path.startswith(f"{self.url}/") else []
        else:
            paths = [path]
        # Allow absolute paths only below a root, and relative ones only without leading "..".
        relative = []
        for candidate in paths:
            if candidate.startswith("/"):
                absolute = posixpath.normpath(f"/{candidate.lstrip('/')}")
                prefixes = [root.rstrip("/") + "/" for root in self.roots]
                relative += [absolute.removeprefix(prefix) for prefix in prefixes if absolute.startswith(prefix)]
            else:
                normalized = posixpath.normpath(candidate)
                if normalized.split("/")[0] not in ("", ".", ".."):
                    relative.append(normalized)
        return [name for name in relative if name]

    def _quote(self, name: str) -> str:
        """Return the URL of a file in a store. Over HTTP, ? and # are quoted, because they are part of the name."""
        return storage.join(self.url, quote(name) if self.url.startswith(("http://", "https://")) else name)

    def _find(self, name: str) -> str | None:
        """Find the local file of that name, ignoring case. None if it is missing, ambiguous or no regular file."""
        path = self.roots[0]
        is_file = _is_regular_file(os.path.join(path, name))
        if is_file is not None:
            return os.path.join(path, name) if is_file else None
        # Look up part by part, so that each folder of the path may have other case.
        for part in name.split("/"):
            if not os.path.lexists(os.path.join(path, part)):
                matches = self._list_folded(path).get(_fold_name(part), [])
                if len(matches) != 1:
                    return None
                [part] = matches
            path = os.path.join(path, part)
        return path if _is_regular_file(path) else None

    def _list_folded(self, folder: str) -> dict[str, list[str]]:
        """List the names in a folder by their folded form. Cached, since records name many files of a folder."""
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
    """Normalise case and Unicode composition."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def _is_regular_file(path: str) -> bool | None:
    """Return True if a path is a regular file; None if it does not exist. Reading a pipe or device would not end."""
    try:
        return S_ISREG(os.stat(path).st_mode)
    except (OSError, ValueError):  # the name is too long, links form a cycle, or a null character
        return None
