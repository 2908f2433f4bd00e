"""Local copies of checkpoints that lie in a bucket, for as long as they are read.

transformers opens folders and hub ids. Here any URL that fsspec knows (s3:// with the package s3fs) becomes a folder.
It is deleted as soon as the weights are in memory, since a cache of whole models would fill the disk.
"""

import difflib
import os
import posixpath
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from os import PathLike, fspath, path
from tempfile import TemporaryDirectory

import fsspec
from huggingface_hub import HfApi, constants, errors
from huggingface_hub.file_download import repo_folder_name

PERMANENT_ERRORS = (ImportError, FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError, ValueError)
"""Errors of a store that the same URL raises again; other errors may be temporary."""

HUB_ID = re.compile(r"([a-z0-9][\w.-]*/)?[a-z0-9][\w.-]*", re.ASCII | re.IGNORECASE)
"""Form of the name of a model on the hub."""

HUB_TIMEOUT_S = 10.0
"""Seconds to wait for the hub to say that it has a model."""

ALLOWED_MODELS = "a folder, hub id or URL of a model"

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
"""Suffixes of files with weights."""


@contextmanager
def local_copy(
    source: str | PathLike,
    names: Sequence[str] = (),
    label: str = "path",
    skips_weights: bool = False,
    asks_hub: bool = True,
    allowed: str = ALLOWED_MODELS,
) -> Iterator[str]:
    """Yield a local path of a checkpoint: the path itself, or for a URL a temporary folder with its files.

    Args:
        source: folder, hub id or URL.
        names: files to copy; empty copies all.
        label: name of the source in an error.
        skips_weights: files of weights are not copied.
        asks_hub: ask the hub if it has a model of this name, with the user's own token and cache.
        allowed: sources that are allowed, for the error of a folder that does not exist.

    Raises:
        ValueError: there is no such folder or model, there are no files, or access is denied.
        OSError: the store or the local disk failed.
    """
    url = fspath(source)
    # Hub ids stay as they are: transformers has its own cache for them.
    if "://" not in url:
        if asks_hub or not is_hub_id(url):
            check_source(url, label, allowed)
        yield url
        return
    with TemporaryDirectory() as folder:
        try:
            filesystem, remote_path = fsspec.url_to_fs(url)
            remote_folder = remote_path.rstrip("/")
            # A configuration alone is read before a job starts; the weights may have many gigabytes.
            if skips_weights:
                entries = [posixpath.basename(file) for file in filesystem.ls(remote_folder, detail=False)]
                names = [name for name in entries if name and not name.endswith(WEIGHT_SUFFIXES)]
            if names:
                filesystem.get(
                    [f"{remote_folder}/{name}" for name in names], [path.join(folder, name) for name in names]
                )
            else:
                filesystem.get(f"{remote_folder}/", folder, recursive=True)
        except Exception as error:
            raise explain_error(error, f"{label}: got {url}", "a folder or URL that can be read") from error
        yield folder


def check_source(source: str | PathLike, label: str, allowed: str = ALLOWED_MODELS) -> None:
    """Check that a local folder exists, or that the hub has a model of this name. URLs are not checked.

    transformers would ask the hub for a mistyped folder, six times within 25 s if the hub cannot be reached.

    Args:
        source: folder, hub id or URL.
        label: name of the source in the error.
        allowed: sources that are allowed, for the error.

    Raises:
        ValueError: the source is neither a folder nor a model on the hub.
    """
    name = fspath(source)
    if "://" in name or path.isdir(name):
        return
    if is_hub_id(name):
        problem = _explain_hub(name)
        problem = problem and f"{describe_missing(name)}, and {problem}"
    else:
        problem = describe_missing(name)
    if problem:
        raise ValueError(f"{label}: got {name}, allowed: {allowed}; {problem}")


def is_hub_id(name: str) -> bool:
    """Return True if a name can be that of a model on the hub, and neither is nor looks like a path or URL.

    >>> [is_hub_id(name) for name in ("lmsys/vicuna-7b-v1.5", "/data/clip", "s3://bucket/clip", "runs/a/b")]
    [True, False, False, False]
    """
    folder = path.dirname(name)
    # A name in a folder that exists is a mistyped path, such as runs/name.
    if path.exists(name) or (folder and path.isdir(folder)):
        return False
    return bool(HUB_ID.fullmatch(name))


def describe_missing(source: str | PathLike) -> str:
    """Describe that a path is not a folder, with a similar name beside it if there is one."""
    name = fspath(source)
    if path.exists(name):
        return f"{name} is a file, not a folder"
    parent, base = path.split(name.rstrip("/"))
    text = f"there is no folder {name}"
    if not path.isdir(parent or "."):
        return text
    folders = [entry.name for entry in os.scandir(parent or ".") if entry.is_dir()]
    similar = difflib.get_close_matches(base, folders, n=1)
    return text + "".join(f" (did you mean {path.join(parent, found)}?)" for found in similar)


def _explain_hub(name: str) -> str:
    """Explain why the hub gives no model of this name; "" if it does, or if its cache has a copy."""
    cached = path.join(constants.HF_HUB_CACHE, repo_folder_name(repo_id=name, repo_type="model"), "snapshots")
    if path.isdir(cached):
        return ""
    try:
        HfApi(endpoint=constants.ENDPOINT).model_info(name, timeout=HUB_TIMEOUT_S)
    except errors.GatedRepoError:
        return ""  # transformers explains how to get access
    except errors.RepositoryNotFoundError:
        return f"{constants.ENDPOINT} has no public model {name} (for a private one, `hf auth login`)"
    except Exception as error:  # Those of HTTP clients differ between versions
        reason = " ".join(str(error).split())[:200]
        return f"{constants.ENDPOINT} cannot be asked for a model {name} ({type(error).__name__}: {reason})"
    return ""


def explain_error(error: Exception, problem: str, allowed: str) -> ValueError | OSError:
    """Describe an error of a store in one line. Each store has errors of its own.

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
