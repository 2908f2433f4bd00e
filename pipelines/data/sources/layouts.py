"""Detection of the form of a source by its path, its files and the descriptions in it.

Nothing is guessed where two readings are possible: the error names them, and how to choose.
"""

import fnmatch
import json
import posixpath
import re
from dataclasses import dataclass, field
from typing import Any, Literal

import yaml
from braceexpand import braceexpand

from pipelines.core import storage
from pipelines.data.options import ColumnName
from pipelines.data.sources.image_folder import METADATA_FILES, list_visible, split_suffix
from pipelines.data.sources.rows import IMAGE_COLUMNS, Columns
from pipelines.data.sources.tables import read_columns
from pipelines.data.tars import IMAGE_SUFFIXES, PICKLE_SUFFIXES

FileKind = Literal["json", "parquet", "arrow", "csv", "tar"]

KIND_BY_SUFFIX: dict[str, FileKind] = {
    "json": "json",
    "jsonl": "json",
    "ndjson": "json",
    "parquet": "parquet",
    "arrow": "arrow",
    "feather": "arrow",
    "csv": "csv",
    "tsv": "csv",
    "tar": "tar",
}
COMPRESSED_FILE_SUFFIXES = ("gz", "tgz", "bz2", "xz", "zst", "zip", "7z")

ALLOWED_SOURCES = (
    "a JSON, JSON Lines, parquet, Arrow, CSV or tar file, a folder of one of these, a folder of images with captions, "
    "an Energon folder, or FOLDER/dataset_info.json:NAME"
)

LLAMA_FACTORY_FILE = "dataset_info.json"
HUB_KEYS = ("hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name")
LLAMA_FACTORY_KEYS = frozenset({"file_name", "file_sha1", "formatting", "columns", "tags", "split"})
LLAMA_FACTORY_TYPES: tuple[tuple[str, Any, str], ...] = (
    ("file_name", str, "the name of a file or a folder"),
    ("columns", dict | None, "names of columns by their meaning"),
    ("tags", dict | None, "names of fields and roles by their meaning"),
)
"""Types of an entry's values, and what is allowed."""

ALPACA_COLUMNS: dict[str, tuple[ColumnName, str | None]] = {
    "prompt": ("question", "instruction"),
    "query": ("input", "input"),
    "response": ("answer", "output"),
    "history": ("history", None),
    "system": ("system", None),
    "images": ("image", None),
}
"""Columns of LLaMA-Factory's alpaca form, with their names here and their defaults."""

SHAREGPT_COLUMNS: dict[str, tuple[ColumnName, str | None]] = {
    "messages": ("conversations", "conversations"),
    "system": ("system", None),
    "images": ("image", None),
}
SHAREGPT_TAGS: dict[str, tuple[ColumnName, str]] = {
    "role_tag": ("role", "from"),
    "content_tag": ("content", "value"),
    "user_tag": ("user", "human"),
    "assistant_tag": ("assistant", "gpt"),
}
UNREAD_TAGS = {"system_tag": "system", "observation_tag": None, "function_tag": None}
"""Tags that are not read, with the only value that they may have."""

ENERGON_DIR = ".nv-meta"
ENERGON_FIELDS: dict[str, dict[str, ColumnName]] = {
    "Captioning": {"image": "image", "caption": "text"},
    "VQA": {"image": "image", "context": "question", "answers": "answer"},
}
"""Fields of Energon's sample types, with their columns here."""


@dataclass(frozen=True)
class Layout:
    """Files of a source and how to read them.

    kind: kind of the files; "images" for a folder of images, which is the only entry of `files`. files: URLs, in order.
    images: default of the folder of the images. columns: columns that a description names. excluded: keys of samples of
    tars that are left out, by URL.
    """

    kind: FileKind | Literal["images"]
    files: tuple[str, ...]
    images: str
    columns: Columns = field(default_factory=dict)
    excluded: dict[str, frozenset[str]] = field(default_factory=dict)


def find_layout(source: str) -> Layout:
    """Find the form of a source.

    Args:
        source: file, folder or URL; a pattern such as "data/train-*.parquet"; or FOLDER/dataset_info.json:NAME.

    Raises:
        ValueError: nothing is there, or its form is not read, or there are several.
    """
    if not source.strip():
        raise ValueError(f"source: got an empty text, allowed: {ALLOWED_SOURCES}")
    # The name of an entry follows a colon, which no other source has after this file name.
    path, _, entry = source.partition(f"{LLAMA_FACTORY_FILE}:")
    if entry:
        return _find_llama_factory(path + LLAMA_FACTORY_FILE, entry)
    folder, name = posixpath.split(source.rstrip("/"))
    # A file or a folder may have these characters in its own name.
    is_pattern = any(mark in name for mark in "*?[") and not storage.exists(source)
    if is_pattern and not (storage.list_files(source) or storage.list_folders(source)):
        matches = fnmatch.filter(list_visible(folder or "."), name)
        if not matches:
            raise ValueError(f"{source}: no file matches, allowed: a pattern of names in {folder or '.'}")
        return _choose_files(source, folder or ".", matches)
    if storage.exists(source):
        return _find_file(source)
    return _find_folder(source.rstrip("/") or "/")


# --- files -----------------------------------------------------------------------------------------------------------


def _find_file(url: str) -> Layout:
    name = posixpath.basename(url)
    _, suffix = split_suffix(name)
    if suffix in COMPRESSED_FILE_SUFFIXES:
        raise _describe_compressed(url)
    if name.lower().endswith(PICKLE_SUFFIXES):
        raise ValueError(f"{url}: pickled, allowed: {ALLOWED_SOURCES}; nothing is unpickled")
    if name == LLAMA_FACTORY_FILE:
        return _find_llama_factory(url, "")
    # A file with another name may be JSON: reading it shows that.
    return Layout(KIND_BY_SUFFIX.get(suffix, "json"), (url,), storage.find_parent(url))


def _describe_compressed(url: str) -> ValueError:
    return ValueError(f"{url}: compressed, allowed: {ALLOWED_SOURCES}; unpack it first")


def _find_packed_kind(name: str) -> FileKind | None:
    """Find the kind of the file that a compressed file holds, as "json" for a.jsonl.gz. None for other files."""
    stem, suffix = split_suffix(name)
    if suffix == "tgz":
        return "tar"
    return KIND_BY_SUFFIX.get(split_suffix(stem)[1]) if suffix in COMPRESSED_FILE_SUFFIXES else None


def _choose_files(source: str, folder: str, names: list[str]) -> Layout:
    """Choose the files of a folder, which must be of one kind and of one split."""
    # Files of other kinds, such as a README, are not data.
    kinds = sorted({KIND_BY_SUFFIX[suffix] for name in names if (suffix := split_suffix(name)[1]) in KIND_BY_SUFFIX})
    for name in names:
        packed = _find_packed_kind(name)
        # A part of the data would be missing.
        if packed and (not kinds or packed in kinds) and split_suffix(name)[0] not in names:
            raise _describe_compressed(storage.join(folder, name))
    if len(kinds) != 1:
        got = " and ".join(kinds) if kinds else f"files such as {names[0]}"
        raise ValueError(f"{source}: got {got}, allowed: files of one kind; give a pattern such as {source}/*.jsonl")
    chosen = [name for name in names if KIND_BY_SUFFIX.get(split_suffix(name)[1]) == kinds[0]]
    # The hub's names of parts: SPLIT-00000-of-00002.parquet.
    splits = sorted({match[1] for name in chosen if (match := re.match(r"(.+?)-\d{5}-of-\d{5}\b", name))})
    if len(splits) > 1:
        raise ValueError(
            f"{source}: got the splits {', '.join(splits)}, allowed: one of them; give a pattern such as "
            f"{storage.join(folder, splits[-1])}-*"
        )
    return Layout(kinds[0], tuple(storage.join(folder, name) for name in chosen), folder)


# --- folders ---------------------------------------------------------------------------------------------------------


def _find_folder(folder: str) -> Layout:
    names, folders = list_visible(folder), storage.list_folders(folder)
    if not names and not folders:
        raise ValueError(f"{folder}: does not exist, allowed: {ALLOWED_SOURCES}")
    if ENERGON_DIR in folders:
        return _find_energon(folder)
    # Descriptions come before files, and tars before the tables beside them.
    suffixes = {split_suffix(name)[1] for name in names}
    if "state.json" in names and LLAMA_FACTORY_FILE in names:  # written by `datasets`, not by LLaMA-Factory
        return _choose_files(folder, folder, [name for name in names if name.endswith(".arrow")])
    if "dataset_dict.json" in names:
        raise ValueError(f"{folder}: got the splits {', '.join(folders)}, allowed: the folder of one of them")
    if LLAMA_FACTORY_FILE in names:
        return _find_llama_factory(storage.join(folder, LLAMA_FACTORY_FILE), "")
    if "tar" in suffixes:  # img2dataset writes parquet files and JSON statistics beside its tars
        tars = [name for name in names if name.lower().endswith(".tar") or _find_packed_kind(name) == "tar"]
        return _choose_files(folder, folder, tars)
    if suffixes & IMAGE_SUFFIXES or set(names) & set(METADATA_FILES) or _has_images_below(folder, names, folders):
        return Layout("images", (folder,), folder)
    if suffixes & KIND_BY_SUFFIX.keys() or any(map(_find_packed_kind, names)):
        return _choose_files(folder, folder, names)
    if "data" in folders:  # as the hub stores a data set
        return _find_folder(storage.join(folder, "data"))
    raise ValueError(
        f"{folder}: got {', '.join([*names, *(f'{name}/' for name in folders)][:5])}, allowed: {ALLOWED_SOURCES}"
    )


def _has_images_below(folder: str, names: list[str], folders: list[str]) -> bool:
    """Return True if a folder has folders of images, and tables of their metadata at most."""
    if not folders:
        return False
    # img2dataset writes a table of metadata beside each folder.
    tables = [name for name in names if split_suffix(name)[1] == "parquet"]
    if tables and set(read_columns(storage.join(folder, tables[0]))) & {*IMAGE_COLUMNS, "conversations", "messages"}:
        return False
    return any(
        split_suffix(name)[1] in IMAGE_SUFFIXES or name in METADATA_FILES
        for below in folders[:3]
        for name in list_visible(storage.join(folder, below))
    )


# --- LLaMA-Factory ---------------------------------------------------------------------------------------------------


def _find_llama_factory(url: str, name: str) -> Layout:
    """Find the files of an entry of LLaMA-Factory's dataset_info.json."""
    entries = _read_object(url)
    local = [key for key, entry in entries.items() if isinstance(entry, dict) and "file_name" in entry]
    if not name and len(entries) == len(local) == 1:
        name = local[0]
    if name not in entries:
        names = ", ".join(local[:20]) or "none with a file_name"
        got = f"no entry {name}" if name else f"{len(entries)} entries"
        raise ValueError(f"{url}: got {got}, allowed: one of {names}, such as {url}:{local[0] if local else 'NAME'}")
    entry, where = entries[name], f"{url}: {name}"
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: got {entry!r}, allowed: an object")
    # Data that is not on this machine, preferences, and settings that change the data are refused.
    if hub := next((key for key in HUB_KEYS if key in entry), None):
        raise ValueError(
            f"{where}.{hub}: got {entry[hub]}, allowed: file_name; download the data, and give the path of its files"
        )
    for key, kinds, allowed in LLAMA_FACTORY_TYPES:
        if not isinstance(value := entry.get(key), kinds):
            raise ValueError(f"{where}.{key}: got {value!r}, allowed: {allowed}")
    if entry.get("ranking") or {"chosen", "rejected", "kto_tag"} & (entry.get("columns") or {}).keys():
        raise ValueError(f"{where}: got preferences, allowed: conversations with one answer each")
    if unread := entry.keys() - LLAMA_FACTORY_KEYS - {"ranking"}:
        raise ValueError(f"{where}.{min(unread)}: got {entry[min(unread)]!r}, allowed: {sorted(LLAMA_FACTORY_KEYS)}")
    columns = _map_llama_factory(where, entry)
    folder = storage.find_parent(url)
    file_layout = find_layout(storage.join(folder, str(entry.get("file_name"))))
    return Layout(file_layout.kind, file_layout.files, folder, columns)


def _map_llama_factory(where: str, entry: dict[str, Any]) -> Columns:
    """Translate the columns and tags of an entry."""
    formatting = entry.get("formatting", "alpaca")
    if formatting not in ("alpaca", "sharegpt"):
        raise ValueError(f"{where}.formatting: got {formatting}, allowed: alpaca, sharegpt")
    known = ALPACA_COLUMNS if formatting == "alpaca" else SHAREGPT_COLUMNS
    named = {key: value for key, value in (entry.get("columns") or {}).items() if value}
    # Videos and sounds stay columns of the row, and reject their records.
    if unread := named.keys() - known.keys() - {"videos", "audios"}:
        raise ValueError(f"{where}.columns.{min(unread)}: got {named[min(unread)]!r}, allowed: {', '.join(known)}")
    # Take LLaMA-Factory's defaults, unless the entry names other columns.
    columns: dict[ColumnName, str] = {}
    for key, (column, default) in known.items():
        if name := named.get(key, default):
            columns[column] = name
    tags = (entry.get("tags") or {}) if formatting == "sharegpt" else {}
    for section, values in (("columns", named), ("tags", tags)):
        for key, value in values.items():
            if not isinstance(value, str):
                raise ValueError(f"{where}.{section}.{key}: got {value!r}, allowed: a name")
    for key, value in tags.items():
        if key in UNREAD_TAGS and UNREAD_TAGS[key] in (None, value):
            continue
        if key not in SHAREGPT_TAGS:
            raise ValueError(f"{where}.tags.{key}: got {value!r}, allowed: {', '.join(SHAREGPT_TAGS)}")
    if formatting == "sharegpt":
        columns |= {column: tags.get(key, default) for key, (column, default) in SHAREGPT_TAGS.items()}
    return columns


def _read_object(url: str) -> dict[str, Any]:
    try:
        value = json.loads(storage.read(url))
    except ValueError as error:
        raise ValueError(f"{url}: not JSON: {error}, allowed: entries of data sets by name") from None
    if not isinstance(value, dict) or not value:
        raise ValueError(f"{url}: got {type(value).__name__}, allowed: entries of data sets by name")
    return value


# --- Energon ---------------------------------------------------------------------------------------------------------


def _find_energon(folder: str) -> Layout:
    """Find the tars of the training split of an Energon folder, and the members of its samples."""
    description = _read_yaml(storage.join(folder, ENERGON_DIR, "dataset.yaml"))
    split = _read_yaml(storage.join(folder, ENERGON_DIR, "split.yaml"))
    parts = split.get("split_parts")
    path = storage.join(folder, ENERGON_DIR, "split.yaml")
    if not isinstance(parts, dict) or not parts.get("train"):
        raise ValueError(f"{path}: got split_parts {parts!r}, allowed: tars for train")
    exclude = split.get("exclude") or []
    for name, value in (("split_parts.train", parts["train"]), ("exclude", exclude)):
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise ValueError(f"{path}: {name}: got {value!r}, allowed: a list of names")
    names, excluded = _apply_exclusions(_expand_braces(path, parts["train"]), _expand_braces(path, exclude))
    files = tuple(storage.join(folder, name) for name in names)
    columns = _map_energon(storage.join(folder, ENERGON_DIR, "dataset.yaml"), description)
    excluded_keys = {storage.join(folder, name): frozenset(keys) for name, keys in excluded.items()}
    return Layout("tar", files, folder, columns, excluded_keys)


def _expand_braces(path: str, names: list[str]) -> list[str]:
    """Expand names such as "{00000..00009}.tar", as Energon does."""
    try:
        return [expanded for name in names for expanded in braceexpand(name)]
    except ValueError as error:
        raise ValueError(f"{path}: {error}, allowed: braces in pairs") from None


def _apply_exclusions(train: list[str], exclude: list[str]) -> tuple[list[str], dict[str, set[str]]]:
    """Remove excluded tars, and collect the excluded keys of the others."""
    # An item is a tar, or a sample of a tar.
    keys: dict[str, set[str]] = {}
    for item in exclude:
        tar, slash, key = item.rpartition("/")
        if slash and tar.endswith(".tar"):
            keys.setdefault(tar, set()).add(key)
    return [name for name in train if name not in exclude], keys


def _map_energon(path: str, description: dict[str, Any]) -> Columns:
    """Translate the field map of a sample type. Without a field map, samples are read as those of any tar."""
    sample_type = description.get("sample_type") or description
    if not isinstance(sample_type, dict):
        raise ValueError(f"{path}: sample_type: got {sample_type!r}, allowed: __module__ and __class__")
    name = re.sub(r"(Sample|Webdataset)$", "", str(sample_type.get("__class__", "")))
    fields = description.get("field_map")
    if not fields:
        # A sample loader is code, which is not run.
        return {}
    if not isinstance(fields, dict) or not all(isinstance(value, str) for value in fields.values()):
        raise ValueError(f"{path}: field_map: got {fields!r}, allowed: members by their meaning")
    known = ENERGON_FIELDS.get(name)
    if known is None:
        allowed = ", ".join(f"{kind}Sample" for kind in ENERGON_FIELDS)
        raise ValueError(
            f"{path}: got a field_map of {name}Sample, allowed: {allowed}; or name the members by --image-key, "
            "--text-key and the tars by a pattern"
        )
    return {column: str(fields[key]) for key, column in known.items() if key in fields}


def _read_yaml(path: str) -> dict[str, Any]:
    if not storage.exists(path):
        raise ValueError(f"{path}: does not exist, allowed: a folder that `energon prepare` has finished")
    try:
        value = yaml.safe_load(storage.read(path))
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}, allowed: YAML of Energon") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: got {type(value).__name__}, allowed: YAML of Energon")
    return value
