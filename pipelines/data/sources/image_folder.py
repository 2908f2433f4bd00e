"""Rows of folders of images: a caption file beside each image (img2dataset), or a table of Hugging Face's ImageFolder.

00000/000000007.jpg, 000000007.txt, 000000007.json      the caption is the text, or `caption` in the JSON; both are read
metadata.jsonl (or metadata.csv, metadata.parquet)      {"file_name": "7.jpg", "text": "…"}
"""

import json
import posixpath
from collections import Counter
from collections.abc import Iterator
from typing import Any

from pipelines.core import storage
from pipelines.data.records import RecordRejection
from pipelines.data.sources.json_records import read_json_records
from pipelines.data.sources.rows import KNOWN_COLUMNS, TEXT_COLUMNS, Columns
from pipelines.data.sources.tables import read_csv, read_parquet
from pipelines.data.tars import IMAGE_SUFFIXES

METADATA_FILES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
CAPTION_FILE_SUFFIXES = ("txt", "caption")


FolderRow = tuple[str, dict[str, Any], RecordRejection | None]
"""File name of an image, its values by the names of columns, and the reason to reject it."""


def read_image_folder(
    folder: str, columns: Columns, below: str = "", parents: frozenset[str] = frozenset()
) -> Iterator[FolderRow]:
    """Yield a row for each image of a folder and of the folders below it, in the order of their names.

    The names of the files of one folder are in memory.

    Args:
        folder: the folder.
        columns: names of columns that differ from the usual ones.
        below: folder in it; "" for itself.
        parents: folders above this one, without links.

    Raises:
        ValueError: a link leads to a folder above it.
    """
    resolved = storage.make_absolute(storage.join(folder, below))
    if resolved in parents:
        raise ValueError(
            f"{storage.join(folder, below)}: a link to {resolved}, a folder above it, allowed: links to other "
            "folders; remove the link"
        )
    names = list_visible(storage.join(folder, below))
    tables = [name for name in METADATA_FILES if name in names]
    if len(tables) > 1:
        raise ValueError(f"{storage.join(folder, below)}: got {' and '.join(tables)}, allowed: one of them")
    if tables:
        # A table is about the images below it as well.
        for origin, row in _read_metadata(folder, posixpath.join(below, tables[0])):
            yield origin, row, None
        return
    # Caption files are looked up in the listing: a request for each would be slow on a store.
    known = frozenset(names)
    images = [name for name in names if split_suffix(name)[1] in IMAGE_SUFFIXES]
    images_of_stem = Counter(split_suffix(name)[0] for name in images)
    for name in images:
        stem, path = split_suffix(name)[0], posixpath.join(below, name)
        row, rejection = _read_texts(storage.join(folder, below), stem, known, columns)
        if images_of_stem[stem] > 1:  # one of them may be a mask
            detail = f"{images_of_stem[stem]} images are named {stem}"
            rejection = RecordRejection("several images", "image", path, detail)
        yield path, {**row, "id": posixpath.join(below, stem), "image": path}, rejection
    # Read folder after folder, so that the order is that of the paths.
    for name in storage.list_folders(storage.join(folder, below)):
        yield from read_image_folder(folder, columns, posixpath.join(below, name), parents | {resolved})


def list_visible(folder: str) -> list[str]:
    """List the files of a folder without hidden ones, which macOS writes beside others as ._NAME."""
    return [name for name in storage.list_files(folder) if not name.startswith(".")]


def split_suffix(name: str) -> tuple[str, str]:
    """Split a file name into its stem and its suffix in lower case, without the dot."""
    stem, suffix = posixpath.splitext(name)
    return stem, suffix[1:].lower()


def _read_texts(
    folder: str, stem: str, known: frozenset[str], columns: Columns
) -> tuple[dict[str, Any], RecordRejection | None]:
    """Read the text files and the JSON beside an image. Returns their values, and a reason to reject or None."""
    names = {suffix: _find_file(stem, suffix, known) for suffix in (*CAPTION_FILE_SUFFIXES, "json")}
    texts = {
        suffix: storage.read(storage.join(folder, name)).decode("utf-8-sig", "surrogateescape")
        for suffix, name in names.items()
        if name and suffix != "json"
    }
    metadata = _read_object(storage.join(folder, names["json"])) if names["json"] else {}
    # A column map may name any value; without text files, the JSON may be a whole record.
    if not texts or columns.keys() - {"image", "id"}:
        return {**metadata, **texts}, None
    # Of the JSON beside a text, only captions count: it may be about something else, such as boxes.
    captions = {str(names[suffix]): text for suffix, text in texts.items()}
    captions |= {f"{names['json']}[{key}]": metadata[key] for key in TEXT_COLUMNS if isinstance(metadata.get(key), str)}
    if len({text.strip() for text in captions.values()}) > 1:
        return texts, RecordRejection("several columns", " and ".join(captions), "captions that differ")
    return {"txt": next(iter(texts.values()))}, None


def _find_file(stem: str, suffix: str, known: frozenset[str]) -> str | None:
    """Find the file of a stem with a suffix in small or capital letters."""
    spellings = (f"{stem}.{spelling}" for spelling in (suffix, suffix.upper(), suffix.capitalize()))
    return next((name for name in spellings if name in known), None)


def _read_object(url: str) -> dict[str, Any]:
    """Read a JSON object; {} for anything else."""
    try:
        value = json.loads(storage.read(url))
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


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
