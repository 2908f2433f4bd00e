"""Local copies of checkpoints that lie in a bucket, for as long as they are read.

transformers opens folders and hub ids.  Here any URL that fsspec knows (s3:// with the package s3fs) becomes a folder.
It is deleted as soon as the weights are in memory, since a cache of whole models would fill the disk.
"""

import posixpath
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from os import PathLike, fspath, path
from tempfile import TemporaryDirectory

import fsspec

PERMANENT_ERRORS = (ImportError, FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError, ValueError)
"""Errors of a store that the same URL raises again; other errors may be temporary."""


WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
"""Suffixes of files with weights."""


@contextmanager
def local_copy(
    source: str | PathLike, names: Sequence[str] = (), label: str = "path", skips_weights: bool = False
) -> Iterator[str]:
    """Yield a local path of a checkpoint: the path itself, or for a URL a temporary folder with its files.

    Args:
        source: folder, hub id or URL.
        names: files to copy; empty copies all.
        label: name of the source in an error.
        skips_weights: files of weights are not copied.

    Raises:
        ValueError: there are no files, or access is denied.
        OSError: the store or the local disk failed.
    """
    url = fspath(source)
    # hub ids stay as they are: transformers has its own cache for them
    if "://" not in url:
        yield url
        return
    with TemporaryDirectory() as folder:
        try:
            filesystem, remote_path = fsspec.url_to_fs(url)
            remote_folder = remote_path.rstrip("/")
            # a configuration alone is read before a job starts; the weights may have many gigabytes
            if skips_weights:
                found = [posixpath.basename(file) for file in filesystem.ls(remote_folder, detail=False)]
                names = [name for name in found if name and not name.endswith(WEIGHT_SUFFIXES)]
            if names:
                filesystem.get(
                    [f"{remote_folder}/{name}" for name in names], [path.join(folder, name) for name in names]
                )
            else:
                filesystem.get(f"{remote_folder}/", folder, recursive=True)
        except Exception as error:
            raise explain_error(error, f"{label}: got {url}", "a folder or URL that can be read") from error
        yield folder


def explain_error(error: Exception, problem: str, allowed: str) -> ValueError | OSError:
    """Describe an error of a store in one line.  Each store has errors of its own.

    Args:
        error: error of a filesystem of fsspec.
        problem: start of the message.
        allowed: allowed values, for a ValueError.

    Returns:
        A ValueError for a wrong URL or missing rights, an OSError if the store or the local disk failed.
    """
    reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
    if isinstance(error, PERMANENT_ERRORS) or "Credential" in type(error).__name__:
        return ValueError(f"{problem}, allowed: {allowed}; {reason}")
    return OSError(f"{problem}: the store or the disk here is at fault; {reason}")
