"""Checkpoints that lie in a bucket: their files are fetched for as long as they are read.

transformers opens folders and hub ids.  Any URL that fsspec knows (s3:// with the package s3fs) becomes a folder here;
it is gone when the weights are in memory, since a cache of whole models fills disks unnoticed.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from os import PathLike, fspath, path
from tempfile import TemporaryDirectory

import fsspec

PERMANENT_ERRORS = (ImportError, FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError, ValueError)
"""Errors of a store that the same URL will meet again; others may pass."""


@contextmanager
def local_copy(source: str | PathLike, names: Sequence[str] = (), label: str = "path") -> Iterator[str]:
    """The path itself, or where it is a URL a local folder with its files.

    ValueError where there are none, or nobody may read them; OSError where the store or the disk here is at fault.

    names: of the files that are wanted; all where empty.  what: the source is called in an error.
    """
    url = fspath(source)
    if "://" not in url:
        yield url
        return
    with TemporaryDirectory() as folder:
        try:
            files, inside = fsspec.url_to_fs(url)
            if names:
                files.get([f"{inside.rstrip('/')}/{name}" for name in names], [path.join(folder, n) for n in names])
            else:
                files.get(f"{inside.rstrip('/')}/", folder, recursive=True)
        except Exception as error:
            raise explain_error(error, f"{label}: got {url}", "a folder or URL that can be read") from error
        yield folder


def explain_error(error: Exception, place: str, allowed: str) -> ValueError | OSError:
    """An error of a store, each of which has its own, in one line: a ValueError where the URL or the rights are not
    right, an OSError where the store or the disk here is at fault.
    """
    why = f"{type(error).__name__}: {' '.join(str(error).split())}"
    if isinstance(error, PERMANENT_ERRORS) or "Credential" in type(error).__name__:
        return ValueError(f"{place}, allowed: {allowed}; {why}")
    return OSError(f"{place}: the store or the disk here is at fault; {why}")
