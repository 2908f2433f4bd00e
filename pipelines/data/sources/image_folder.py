"""Rows of folders of images: a caption file beside each image (img2dataset), or a table of Hugging Face's ImageFolder.

00000/000000007.jpg, 000000007.txt, 000000007.json      the caption is the text, or `caption` in the JSON
metadata.jsonl (or metadata.csv, metadata.parquet)      {"file_name": "7.jpg", "text": "…"}
"""

import json
import posixpath
from collections.abc import Iterator
from typing import Any

from pipelines.core import storage
from pipelines.data.sources.json_records import read_json_records
from pipelines.data.sources.rows import KNOWN_COLUMNS
from pipelines.data.sources.tables import read_csv, read_parquet
from pipelines.data.tars import IMAGE_SUFFIXES

METADATA_FILES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
CAPTION_FILE_SUFFIXES = ("txt", "caption")


def read_image_folder(folder: str, below: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield file name and values of each image of a folder and of the folders below it, in the order of their names.

    Args:
        folder: the folder.
        below: folder in it; "" for itself.
    """
    names = storage.list_files(storage.join(folder, below))
    table = next((name for name in METADATA_FILES if name in names), None)
    if table:
        # a table is about the images below it as well
        yield from _read_metadata(folder, posixpath.join(below, table))
        return
    # caption files are looked up in the listing: a request for each would be slow on a store
    known = frozenset(names)
    for name in names:
        stem, suffix = split_suffix(name)
        if suffix in IMAGE_SUFFIXES:
            path = posixpath.join(below, name)
            row = {"id": posixpath.join(below, stem), "image": path}
            yield path, {**_read_caption_file(folder, below, stem, known), **row}
    # folder after folder, so that the order is that of the paths
    for name in storage.list_folders(storage.join(folder, below)):
        yield from read_image_folder(folder, posixpath.join(below, name))


def split_suffix(name: str) -> tuple[str, str]:
    """Split a file name into its stem and its suffix in lower case, without the dot."""
    stem, suffix = posixpath.splitext(name)
    return stem, suffix[1:].lower()


def _read_caption_file(folder: str, below: str, stem: str, known: frozenset[str]) -> dict[str, Any]:
    """Read the text or the JSON beside an image."""
    for suffix in CAPTION_FILE_SUFFIXES:
        if f"{stem}.{suffix}" in known:
            text = storage.read(storage.join(folder, below, f"{stem}.{suffix}"))
            return {"txt": text.decode("utf-8-sig", "surrogateescape")}
    if f"{stem}.json" in known:
        try:
            value = json.loads(storage.read(storage.join(folder, below, f"{stem}.json")))
        except (ValueError, RecursionError):
            return {}
        return value if isinstance(value, dict) else {}
    return {}


def _read_metadata(folder: str, path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the rows of a table of images; their files are beside the table."""
    url = storage.join(folder, path)
    if path.endswith(".jsonl"):
        rows = read_json_records(url, KNOWN_COLUMNS | {"file_name"})
    elif path.endswith(".csv"):
        rows = read_csv(url)
    else:
        rows = read_parquet(url)
    for position, row in rows:
        if isinstance(row, dict) and isinstance(row.get("file_name"), str):
            row = {**row, "file_name": posixpath.join(posixpath.dirname(path), row["file_name"])}
        yield f"{path}: {position}", row
