"""Checkpoints that lie in a bucket: their files are fetched for as long as they are read.

transformers opens folders and hub ids.  Any URL that fsspec knows (s3:// with the package s3fs) becomes a folder here;
it is gone when the weights are in memory, since a cache of whole models fills disks unnoticed.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from os import PathLike, fspath, path
from tempfile import TemporaryDirectory

import fsspec


@contextmanager
def fetched(source: str | PathLike, names: Sequence[str] = (), what: str = "path") -> Iterator[str]:
    """The path itself, or where it is a URL a local folder with its files.  ValueError where there are none.

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
        except (ImportError, OSError, ValueError) as error:
            raise ValueError(f"{what}: got {url}, allowed: a folder or URL that can be read; {error}") from error
        yield folder
